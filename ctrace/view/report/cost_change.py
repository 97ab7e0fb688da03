"""Two measurements side by side: before a change and after it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Optional

from rich.console import Group, RenderableType
from rich.text import Text

from ctrace import files
from ctrace.cost.result import Perf
from ctrace.errors import CtraceError
from ctrace.recording.format.cost_block import from_json
from ctrace.recording.format.layout import Damaged
from ctrace.view import format as fmt
from ctrace.view.report.cost import PERCENTILES, grid, latency_name

LIMIT: Final = 16 << 20
P99: Final = PERCENTILES.index("p99")


@dataclass(frozen=True)
class Change:
    """One number before and after; None: not measured then."""

    what: str
    unit: str
    before: Optional[float]
    after: Optional[float]


def load(path: str) -> Perf:
    """What ``ctrace perf --format json`` printed earlier. Raises CtraceError."""
    try:
        data = json.loads(files.content(path, LIMIT))
        for latency in data["latencies"]:
            values = latency.pop("ns")
            latency["percentiles"] = [values[name] for name in PERCENTILES]
        return from_json(data)
    except OSError as error:
        raise CtraceError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError, Damaged):
        raise CtraceError(
            f"{path} is not a measurement: make one with ctrace perf -o FILE.json"
        ) from None


def changes(before: Perf, after: Perf) -> Iterator[Change]:
    """The values that can be compared, the share of CPU time first."""
    yield Change("conntrack's share of CPU time", "%", _percent(before), _percent(after))
    old, new = _numbers(before), _numbers(after)
    for what, unit in sorted(old.keys() | new.keys()):
        yield Change(what, unit, old.get((what, unit)), new.get((what, unit)))
    yield Change("mean chain as found", "", _chain(before), _chain(after))
    yield Change("waiting for conntrack's locks", "us/s", _waited(before), _waited(after))


def _numbers(perf: Perf) -> dict[tuple[str, str], float]:
    """Values by name and unit."""
    found = {}
    for row in perf.latencies:
        name = latency_name(row)
        found[f"{name}: mean", "ns"] = row.mean
        found[f"{name}: p99", "ns"] = row.percentiles[P99]
        found[f"{name}: packets", "/s"] = row.packets / (perf.duration_s or 1.0)
    return found


def _chain(perf: Perf) -> Optional[float]:
    return None if perf.chains is None else perf.chains.mean


def render_changes(before: Perf, after: Perf) -> RenderableType:
    """As a table; numbers that neither has are left out."""
    table = grid("", "before", "after", "change")
    for row in changes(before, after):
        if row.before is None and row.after is None:
            continue
        table.add_row(row.what, _cell(row.before, row.unit), _cell(row.after, row.unit), _by(row))
    parts: list[RenderableType] = [Text("\nBefore and after", style="bold"), table]
    if before.family != after.family:
        parts.append(
            Text(f"timed with {before.family or 'nothing'} before: times differ in what they hold")
        )
    return Group(*parts)


def changes_json(before: Perf, after: Perf) -> list[dict[str, Any]]:
    """The same as a list of objects: what, unit, before, after."""
    return [vars(row) for row in changes(before, after)]


def _percent(perf: Perf) -> Optional[float]:
    return None if perf.cpu_share is None else 100 * perf.cpu_share


def _waited(perf: Perf) -> Optional[float]:
    if perf.waits is None or not perf.duration_s:
        return None
    return sum(wait.total_ns for wait in perf.waits) / 1e3 / perf.duration_s


def _cell(value: Optional[float], unit: str) -> str:
    if value is None:
        return "not measured"
    text = fmt.count(value) if abs(value) >= 100 else fmt.decimal(value, 2)
    return f"{text} {unit}".strip()


def _by(row: Change) -> str:
    if row.before is None or row.after is None or not row.before:
        return ""
    return f"{100 * ((row.after - row.before) / row.before):+.0f} %"
