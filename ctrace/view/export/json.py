"""A snapshot as JSON: the schema of ctrace/share/snapshot.md, stable within a major version.

Its fields are those of the dataclasses in model/snapshot, which say what each means. Names
end in their unit where it is not plain: ``_s`` seconds, ``_per_s`` per second. What is unknown is
``null``, never zero.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime, timezone
from typing import Any, Final, Optional

import numpy as np

from ctrace.batch import DUMP
from ctrace.model.snapshot import Cause, Percentiles, Snapshot, Table, Tuple5
from ctrace.record import Status
from ctrace.view.unseen import CHANGES, REFUSALS, told, trusted, unseen

SCHEMA: Final = 1
"""Rises when a field changes its meaning or goes; not when one is added."""

NAMES: Final = {"cost": "self", "rates": "rates_per_s", "edges": "edges_s"}
"""Fields that JSON calls otherwise."""
SECONDS: Final = ("p50", "p90", "p99", "at_least", "by_load", "error")
"""Of percentiles: what ends in ``_s``."""
COUNTS: Final = ("states", "ended_states", "zones")
"""Pairs of a name and a number, which become an object."""
QUANTILES: Final = ("waited", "idle")
"""Quantiles at even steps, of which JSON has three."""
SPANS: Final = ("frees", "fill_after", "memory")
"""Lowest and highest: an empty list where nothing is known."""
MOMENTS: Final = ("full_since", "first_seen")
"""UTC seconds."""


def snapshot_json(snapshot: Snapshot) -> dict[str, Any]:
    """The snapshot as an object that ``json.dumps`` takes as it is."""
    absent = unseen(snapshot.hooks)
    texts = snapshot.hooks.family == DUMP
    nothing = texts and not any(table.read or table.count for table in snapshot.tables)
    by_row = absent if snapshot.held_total_error is None else absent | CHANGES | REFUSALS
    data = {"schema": SCHEMA, "exact": _exact(snapshot)} | _object(snapshot)
    data |= {
        "ts": utc(snapshot.ts),
        "tables": [_table(table, absent, texts) for table in snapshot.tables],
        "culprits": [told(row, by_row) for row in data["culprits"]],
        "held_total": None if nothing else snapshot.held_total,
        "top": {
            group: [{"key": key, "new_per_s": _plain(value)} for key, value in keys]
            for group, keys in snapshot.top.items()
        },
    }
    for name in ("totals", "rates_per_s", "history"):
        data[name] = told(data[name], absent)
    return told(data, absent)


def _exact(snapshot: Snapshot) -> bool:
    reckoned = snapshot.held_total_error is not None or trusted(snapshot.hooks) is not None
    return not (snapshot.lost or snapshot.unseen or snapshot.memory.pruned or reckoned)


def utc(nanoseconds: int) -> str:
    """``2026-11-22T19:48:49.000000000Z``: RFC 3339 with all nine digits."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


def utc_seconds(seconds: Optional[float]) -> Optional[str]:
    """A UTC time in seconds the same way, to the millisecond; None stays None."""
    if seconds is None:
        return None
    moment = datetime.fromtimestamp(round(seconds, 3), timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _table(table: Table, absent: frozenset[str], texts: bool) -> dict[str, Any]:
    """``texts``: it comes from texts, which may all lack its number of entries."""
    data = _object(table) | {"fill": _plain(table.fill), "load": _plain(table.load)}
    if texts and not table.read:
        data["count"] = None
    if not table.max_known:
        data |= {"max": None, "fill": None}
    if not table.buckets:
        data |= {"buckets": None, "load": None}
    for name in ("totals", "rates_per_s"):
        data[name] = told(data[name], absent)
    return told(data, absent)


_known: dict[Any, tuple[str, ...]] = {}
"""Names of each class's fields."""


def _names(kind: Any) -> tuple[str, ...]:
    if kind not in _known:
        _known[kind] = tuple(one.name for one in fields(kind))
    return _known[kind]


def _object(of: Any) -> dict[str, Any]:
    """A dataclass with JSON's names and values."""
    out: dict[str, Any] = {}
    for name in _names(type(of)):
        value = getattr(of, name)
        if isinstance(value, Percentiles):
            out.update(_percentiles(name, value))
        elif name in QUANTILES:
            out.update(_three(name, value))
        else:
            make = _MADE.get(name, _plain)
            out[NAMES.get(name, name)] = make(value)
    if isinstance(of, Cause):
        out["remedy"] = of.remedy
    return out


def _plain(value: Any) -> Any:
    """Anything in JSON's types. Microseconds and millionths are the finest that we measure, and
    there is no infinity."""
    if isinstance(value, (float, np.floating)):
        return round(float(value), 6) if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, Tuple5):
        return _tuple(value)
    if is_dataclass(value):
        return _object(value)
    return dict(value) if isinstance(value, Mapping) else value


_MADE: Final[Mapping[str, Callable[[Any], Any]]] = {
    **dict.fromkeys(COUNTS, dict),
    **dict.fromkeys(SPANS, lambda value: _plain(value or ())),
    **dict.fromkeys(MOMENTS, utc_seconds),
}


def _percentiles(name: str, values: Percentiles) -> dict[str, Any]:
    return {
        f"{name}_{part}_s" if part in SECONDS else f"{name}_{part}": _plain(getattr(values, part))
        for part in _names(type(values))
    }


def _three(name: str, evenly: tuple[float, ...]) -> dict[str, Any]:
    return {
        f"{name}_{label}_s": _plain(evenly[round(q * (len(evenly) - 1))]) if evenly else None
        for label, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    }


def _tuple(flow: Tuple5) -> dict[str, Any]:
    """A sample with conntrack's addresses in canonical text and its status as names."""
    return {
        "proto": flow.proto,
        "src": canonical(flow.src),
        "dst": canonical(flow.dst),
        "sport": flow.sport,
        "dport": flow.dport,
        "reply": {
            "src": canonical(flow.reply_src),
            "dst": canonical(flow.reply_dst),
            "sport": flow.reply_sport,
            "dport": flow.reply_dport,
        }
        if flow.reply_src
        else None,
        "status": status_names(flow.status),
        "state": flow.state,
    }


def status_names(bits: int) -> list[str]:
    """``["SEEN_REPLY", "ASSURED"]``: the IPS_* bits that are set, lowest first."""
    return [flag.name for flag in Status if flag & bits and flag.name]


def canonical(text: str) -> str:
    """An address in RFC 5952 form; anything else as it is."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return text
