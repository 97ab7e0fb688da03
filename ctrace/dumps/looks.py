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
MANY: Final = 10
"""Entries of a protocol that do not all go between two looks."""

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
    series: int = 0
    """The same for looks that can be compared."""
    beside: int = 0
    """Entries of other series, of protocols that this one has not, that were held then."""


def looks(spool: Spool, dumps: list[Dump], now: float) -> tuple[list[Look], int]:
    """The looks of table dumps, oldest first, and how many were left out.

    A look is left out if its distance in time to the next is unknown, or if another series of the
    same protocols is used in its place.
    """
    by_series: dict[tuple[str, str], list[Look]] = {}
    for dump in dumps:
        if not dump.events and not dump.list and len(dump):
            found = by_series.setdefault((dump.netns, dump.series), [])
            found += _split(spool, dump)
    left_out, tables = 0, Tables(spool)
    by_netns: dict[str, list[list[Look]]] = {}
    for (netns, name), looks_ in by_series.items():
        for series in [looks_] if name else tables.alike(looks_):
            left_out += _date(series, now, files=not name)
            by_netns.setdefault(netns, []).append(series)
    out: list[Look] = []
    for several in by_netns.values():
        for number, series in enumerate(several):
            for look in series:
                look.series = number
        left_out += tables.one(several)
        out += _in_order([look for series in several for look in series])
    return sorted(out, key=lambda look: (look.at, look.start)), left_out


def _in_order(found: list[Look]) -> list[Look]:
    """In order of time, each with the number of entries that the other series held then."""
    last: dict[int, int] = {}
    for look in sorted(found, key=lambda look: (look.at, look.start)):
        last[look.series] = len(look.rows)
        look.beside = sum(last.values()) - len(look.rows)
    return found


class Tables:
    """Which looks are of the same table: files that a user names say nothing of how they were
    made."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    def _kinds(self, look: Look) -> npt.NDArray[np.intp]:
        """Family and protocol of each of its entries, as a number."""
        stop = look.start + int(look.rows[-1]) + 1
        found = [
            part["family"].astype(np.intp) << 8 | part["proto"]
            for _, part in self._spool.parts(look.start, stop)
        ]
        return np.concatenate(found)[look.rows]

    def alike(self, found: list[Look]) -> list[list[Look]]:
        """Looks of different files apart where one shows kinds of entries that another has not."""
        files: dict[str, list[Look]] = {}
        for look in found:
            files.setdefault(look.dump.source, []).append(look)
        if len(files) < 2:
            return [found]
        out: list[tuple[set[int], set[int], list[Look]]] = []
        for mine in files.values():
            kinds, counts = np.unique(self._kinds(mine[-1]), return_counts=True)
            every, many = set(kinds.tolist()), set(kinds[counts >= MANY].tolist())
            of = next((one for one in out if many <= one[0] and one[1] <= every), None)
            if of is None:
                out.append((every, many, list(mine)))
            else:
                of[2].extend(mine)
        return [looks_ for _, _, looks_ in out]

    def one(self, several: list[list[Look]]) -> int:
        """Of series of one table keep what the fullest has not; the number of looks left out."""
        if len(several) < 2:
            return 0
        main = max(several, key=lambda s: (not s[-1].dump.cut, len(s) > 1, len(s[-1].rows)))
        shown, left_out = np.unique(self._kinds(main[-1])), 0
        for series in several:
            if series is main:
                continue
            for look in list(series):
                keep = ~np.isin(self._kinds(look), shown)
                look.rows, look.ct, look.left = look.rows[keep], look.ct[keep], look.left[keep]
                if not len(look.rows):
                    series.remove(look)
                    left_out += 1
        return left_out


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
    known = (left[again] >= 0) & (left[earlier] >= 0)
    gone = left[earlier] - left[again]
    moved = known & (gone > RACE)
    # Few lines of one moment that occur twice are no second dump, however small the first is.
    twice = 2 * len(again) < len(ct) and bool((known & (abs(gone) <= RACE)).all())
    if not twice and (len(again) > REPEATED * len(ct) or int(moved.sum()) > MOVED * len(ct)):
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


def _date(series: list[Look], now: float, *, files: bool = False) -> int:
    """Give each look its time, from the last to the first; the number of those dropped.

    ``files``: these are of files that may be of different hosts.
    """
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
        strange = files and one.dump.source != following.dump.source
        if strange and not np.isin(one.ct, following.ct).any():
            del series[: at + 1]
            return at + 1
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
