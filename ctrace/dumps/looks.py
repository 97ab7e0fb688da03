"""Tables at moments in time: where one dump ends, and when each was made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.dumps.found import Dump, Spool

MOVED: Final = 0.0005
"""Share of entries that come again with less time left from which on the same: of a large table
that is listed while it works, some close and open again meanwhile."""
REPEATED: Final = 0.02
"""Share of entries that come again from which on a stretch is several dumps: the kernel may
list an entry twice while its hash table is walked, but hardly more."""
RACE: Final = 1
"""Seconds by which the timeout of an entry that one walk lists twice may differ."""
PIECES: Final = 10_000

Rows = npt.NDArray[np.intp]


@dataclass
class Look:
    """One table at one moment."""

    dump: Dump
    start: int
    """Number of its first entry in the spool."""
    rows: Rows
    """Its entries, counted from ``start``; each once."""
    ct: npt.NDArray[np.uint64]
    left: npt.NDArray[np.int64]
    """Seconds until each expires; -1 unknown."""
    at: float = 0.0
    """UTC seconds."""
    known_by: str = ""
    """How ``at`` is known: ``told``, ``file``, ``now``, ``clock`` or ``countdown``."""
    apart: Optional[float] = None
    """Seconds since the look before it in its series; None for the first."""


def looks(spool: Spool, dumps: list[Dump], now: float) -> tuple[list[Look], int]:
    """The looks of table dumps, oldest first, and how many had to be left out because
    nothing tells how long before the next they were."""
    by_series: dict[tuple[str, str], list[Look]] = {}
    for dump in dumps:
        if not dump.events and not dump.list and len(dump):
            found = by_series.setdefault((dump.netns, dump.series), [])
            found += _split(spool, dump)
    out, left_out = [], 0
    for series in by_series.values():
        left_out += _date(series, now)
        out += series
    return sorted(out, key=lambda look: (look.at, look.start)), left_out


def _split(spool: Spool, dump: Dump) -> Iterator[Look]:
    """A loop's output without anything between its dumps, at the entries that come again."""
    parts = [
        (part["ct"].copy(), part["overdue_ms"].astype(np.int64))
        for _, part in spool.parts(dump.start, dump.stop)
    ]
    ct = np.concatenate([one for one, _ in parts])
    over = np.concatenate([one for _, one in parts])
    left = np.where(over > 0, -1, -over // 1000)
    before = _before(ct)
    again = np.flatnonzero(before >= 0)
    edges = [0]
    earlier = before[again]
    moved = (left[again] >= 0) & (left[earlier] - left[again] > RACE)
    if len(again) > REPEATED * len(ct) or int(moved.sum()) > MOVED * len(ct):
        for at in again.tolist():
            if before[at] >= edges[-1] and len(edges) < PIECES:
                edges.append(at)
    for start, stop in zip(edges, [*edges[1:], len(ct)]):
        rows = start + np.flatnonzero(before[start:stop] < start)
        yield Look(dump, dump.start, rows, ct[rows], left[rows])


def _before(ct: npt.NDArray[np.uint64]) -> Rows:
    """Where each entry stood before; -1 for the first time."""
    order = np.argsort(ct, kind="stable")
    same = np.flatnonzero(ct[order[1:]] == ct[order[:-1]])
    out = np.full(len(ct), -1, np.intp)
    out[order[same + 1]] = order[same]
    return out


def _date(series: list[Look], now: float) -> int:
    """Give each look its time, from the last to the first; the number of those dropped."""
    for look in series:
        dump = look.dump
        told = [("told", dump.at), ("file", dump.file_time), ("now", now)]
        look.known_by, look.at = next((by, at) for by, at in told if at is not None)
    if any(look.known_by != "told" for look in series):
        series.sort(key=lambda look: (look.at, look.start))
    for at in range(len(series) - 2, -1, -1):
        one, following = series[at], series[at + 1]
        gap = following.at - one.at
        same = one.dump is following.dump
        exact = one.known_by == "told" and following.known_by in ("told", "countdown")
        apart = None if same else _by_clock(one.dump.clock, following.dump.clock)
        if apart is not None:
            one.at, one.known_by = following.at - apart, "clock"
        elif not exact or same or gap <= 0:
            counted = countdown(one, following)
            if counted is not None:
                one.at, one.known_by = following.at - counted, "countdown"
            elif same or gap <= 0:
                del series[: at + 1]
                return at + 1
        following.apart = following.at - one.at
    return 0


def _by_clock(
    one: Optional[tuple[str, float]], other: Optional[tuple[str, float]]
) -> Optional[float]:
    """Seconds between two times of the same zone; None where they are not of the same."""
    if one is None or other is None or one[0] != other[0] or other[1] <= one[1]:
        return None
    return other[1] - one[1]


def countdown(one: Look, other: Look) -> Optional[float]:
    """Seconds between two looks, by how far most timeouts went down; None when none did."""
    _, mine, its = np.intersect1d(one.ct, other.ct, return_indices=True)
    was, now = one.left[mine], other.left[its]
    steps = (was - now)[(was >= 0) & (now >= 0) & (was > now)]
    if not len(steps):
        return None
    values, times = np.unique(steps, return_counts=True)
    return float(values[times.argmax()])
