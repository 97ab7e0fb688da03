"""The tables of keys that every group is made of, and how a window is counted into them.

Two fine tables see every event: *pair* (source, service) and *target* (destination,
service). Where a key has no row there, its event goes to a coarser one: *source*,
or *service* and *destination*. Detail (lifetimes and the like) of rows too light for a
slot goes the same way. A group is then a sum over a fine table and a coarse one.
*process* counts what local processes opened, *space* everything in a namespace: what a
share is a share of, also when keys are too many for the coarse tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.model import histogram
from ctrace.model.keys.columns import (
    CLOSE,
    I64,
    NETNS_MASK,
    OWNED,
    TICK_MS,
    TIME_WAIT,
    U64,
    Keys,
    Window,
    key_hash,
    service_hash,
    some,
)
from ctrace.model.keys.details import Details, details
from ctrace.model.keys.heavy import HeavyTable
from ctrace.model.keys.index import Found
from ctrace.model.keys.level import Level
from ctrace.model.keys.pairing import EXISTING
from ctrace.model.keys.rich import YOUNG_NS, RichPool
from ctrace.model.keys.scatter import Rows
from ctrace.model.keys.timeouts import Timeouts
from ctrace.record import TCP, Kind, Status

SEEN_REPLY: Final = np.uint16(int(Status.SEEN_REPLY))


@dataclass(frozen=True)
class Left:
    """What a fine level leaves to its parents."""

    events: npt.NDArray[np.bool_]
    """Those without a row."""
    ends: npt.NDArray[np.bool_]
    """Aligned with :attr:`Details.ends`: those without detail."""

    def any(self) -> bool:
        """Whether there is something."""
        return bool(self.events.any() or self.ends.any())


_PROCESS_ROWS: Final = 4_000
"""Rows of the process table; the number must fit the field in which entries remember it."""
_SHARES: Final = (
    (28_000, 384, False),  # pair
    (14_000, 384, True),  # target
    (8_000, 96, False),  # source
    (7_000, 96, True),  # service
    (7_000, 96, True),  # destination
    (_PROCESS_ROWS, 128, False),  # process
    (1_000, 32, False),  # space
)
"""Rows, rows with detail, and whether distinct sources are counted, at scale 1."""


def _sizes(scale: float) -> Iterator[tuple[int, int, bool]]:
    """Of each level: rows, how many have detail, whether that counts distinct sources."""
    for rows, rich, distinct in _SHARES:
        most = EXISTING - 1 if rows == _PROCESS_ROWS else 100_000
        yield (
            min(max(64, int(rows * scale)), most),
            min(max(8, int(rich * scale)), 60_000),
            distinct,
        )


def needed(scale: float) -> int:
    """Bytes that ``Levels(scale)`` will take, computed without allocating.

    Memory that was taken and given back is zeroed explicitly when taken again, so every page of it
    counts as used; fresh memory counts page by page as it is used.
    """
    return sum(
        HeavyTable.needed(rows) + RichPool.needed(rich, distinct)
        for rows, rich, distinct in _sizes(scale)
    )


class Levels:
    """All tables, sized for a part of the memory limit."""

    def __init__(self, scale: float) -> None:
        self.timeouts = Timeouts()
        self._all = tuple(Level(*size) for size in _sizes(scale))
        self.pair, self.target, self.source, self.service, *others = self._all
        self.destination, self.process, self.space = others
        self.pair.parents = [(self.source, NETNS_MASK, True)]
        self.target.parents = [
            (self.service, ~np.uint64(0), False),
            (self.destination, NETNS_MASK, True),
        ]

    def all(self) -> tuple[Level, ...]:
        """Every level."""
        return self._all

    def nbytes(self) -> int:
        """Memory held."""
        return sum(level.nbytes() for level in self.all())

    def owners(self, w: Window) -> tuple[Rows, npt.NDArray[np.uint16], Rows | None]:
        """Rows of the processes that opened this window's entries.

        Returns (indices of owned inserts, the ``extra`` of each event for pairing,
        how rows moved if some were given up).
        """
        extra = np.zeros(w.n, np.uint16)
        existing = w.where(Kind.EXISTING)
        extra[existing] = EXISTING
        owned = w.owned
        if not owned.size:
            return owned, extra, None
        cgroup = w.events["cgroup"][owned]
        owner, netns = w.owner(owned), w.netns(owned)
        level = self.process
        used = level.table.used
        found = level.locate(
            w,
            owned,
            key_hash(owner, cgroup, netns),
            np.ones(len(owned), bool),
            Keys(owner, cgroup, netns.take),
        )
        extra[owned] = found.rows()
        moved = None
        if level.table.gave_up:
            moved = np.zeros(used + 1, np.intp)
            kept = level.table.moved_from
            moved[kept] = np.arange(1, len(kept) + 1)
        return owned, extra, moved

    def feed(
        self, w: Window, ends: Rows, age: I64, extra: npt.NDArray[np.uint16], owned: Rows, part: int
    ) -> None:
        """Count a window. ``age`` is the age of ``ends``, ``extra`` that of each event, both from
        pairing.

        One in ``part`` of the ends was looked up.
        """
        d = details(w, ends, age, extra, owned, part, self.timeouts)
        opener = extra & np.uint16(EXISTING - 1)
        meta, target = w.meta, w.target_hash
        opened = np.flatnonzero(opener)
        if opened.size:
            meta, target = meta.copy(), target.copy()
            target[opened] = w.target_hash_owned(opened)
            meta[opened] |= OWNED
            found = Found.of(opener.astype(np.intp))
            self.process.count(w, d, found)
            self.process.measure(d, self.process.slots(found, d.ends))

        self._space(w, d)
        fine = self._fine(self.pair, w, d, w.pair_hash, Keys(*w.src, w.meta.take))
        if fine.any():
            self._coarse(self.source, w, d, fine, w.src_only, Keys(*w.src, w.netns))

        fine = self._fine(self.target, w, d, target, Keys(*w.dst, meta.take))
        if fine.any():
            keys = Keys(None, None, meta.take)
            self._coarse(self.service, w, d, fine, lambda at: service_hash(some(meta, at)), keys)
            self._coarse(self.destination, w, d, fine, w.dst_only, Keys(*w.dst, w.netns))

    def look(self, w: Window, at: Rows, age: I64, extra: npt.NDArray[np.uint16]) -> None:
        """Count looks at living entries, for rows with detail. ``age`` in ns, -1: unknown."""
        idle = w.idle_ms(at).astype(np.int64)
        timeout = w.events["timeout_ms"][at]
        known = (age >= 0) & (idle >= 0) & (idle <= age / 1e6 + TICK_MS)
        known &= ~self.timeouts.older(w, at, age)
        at, age, idle = at[known], age[known], idle[known]
        timeout, extra = timeout[known], extra[known]
        young = age < YOUNG_NS
        closed = np.isin(w.states(at), (TIME_WAIT, CLOSE)) & (w.proto(at) == TCP)
        unreplied = young & (w.status.take(at) & SEEN_REPLY == 0)
        assured = young & w.assured(at)
        seen = [young, closed, unreplied, assured, closed & (w.states(at) == CLOSE)]
        life = np.maximum(age / 1e6 - idle, 0).astype(np.float32)
        life_bin = histogram.bins(life)
        opener = (extra & np.uint16(EXISTING - 1)).astype(np.intp)
        meta = w.meta[at] | np.where(opener != 0, OWNED, np.uint64(0))
        found = [(self.process, opener)]
        for level, addresses, service in (
            (self.pair, w.src, w.meta[at]),
            (self.target, w.dst, meta),
        ):
            high, low = (part[at] for part in addresses)
            found.append((level, level.table.find_rows(key_hash(high, low, service))))
        for level, rows in found:
            slots = level.table.rich[rows].astype(np.intp)
            level.rich.count_looks(slots, seen, timeout, life_bin)

    def _space(self, w: Window, d: Details) -> None:
        """Count into the namespaces' table."""
        level, keys = self.space, Keys(None, None, w.netns)
        if not w.alone:
            level.count(w, d, level.locate(w, None, w.space_only(None), w.comes, keys))
            return
        first = np.zeros(1, np.intp)
        row = level.locate(w, first, w.space_only(first), np.ones(1, bool), keys).rows()
        level.count_all(w, d, int(row[0]))

    @staticmethod
    def _fine(level: Level, w: Window, d: Details, h: U64, keys: Keys) -> Left:
        """Count into a fine level; returns what its parents should see."""
        found = level.locate(w, None, h, w.comes, keys)
        level.count(w, d, found)
        for direction, at in d.directions:
            level.table.flags[found.rows(at)] |= np.uint8(1 << direction)
        slots = level.slots(found, d.ends)
        level.measure(d, slots)
        return Left(~found.hit, slots == 0)

    @staticmethod
    def _coarse(
        level: Level,
        w: Window,
        d: Details,
        left: Left,
        hashes: Callable[[Optional[Rows]], U64],
        keys: Keys,
    ) -> None:
        """Count what a fine level has no row for, and measure what it has no detail for."""
        wanted = left.events.copy()
        wanted[d.ends[left.ends]] = True
        number = int(np.count_nonzero(wanted))
        without_detail = number > np.count_nonzero(left.events)
        worth = wanted if without_detail and level.rich.free else w.comes & left.events
        if level.table.scarce and 4 * number > 3 * w.n:  # the few others are as soon looked up
            found = level.locate(w, None, hashes(None), worth, keys)
        else:
            at = np.flatnonzero(wanted)
            part = level.locate(w, at, hashes(at), worth.take(at), keys.at(at))
            found = part.among(w.n, at)
        level.measure(d, level.slots(found, d.ends) * left.ends)
        found.keep(left.events)
        level.count(w, d, found)

    def tick(self, number: int, seconds: float) -> None:
        """Close an interval in every table."""
        for level in self.all():
            level.tick(number, seconds)
