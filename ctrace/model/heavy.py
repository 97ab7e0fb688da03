"""A table of the heaviest keys: exact while they fit, with a stated error beyond.

While every key has a row, every number is exact. When rows run out, keys whose
weight (entries that came, and refusals) is lowest give up theirs, and newcomers
get a row only with a weight above a threshold. ``floor`` bounds what any key
without a row may have had; a key that gets a row later carries the floor of that
moment as its ``error``. So for every key ever seen::

    weight <= true weight <= weight + error        (with a row)
    true weight <= floor                           (without one)

What a given-up row had counted is not lost: the caller folds it into a coarser
table, so that sums over a source or a service stay whole.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ctrace.model.keys import PACKED_BITS, PACKED_MAX, U64, Window, key_hash
from ctrace.model.scatter import Rows, Scatter

COUNTERS: Final = {
    "inserts": np.int64,
    "destroys": np.int64,
    "expired": np.int64,
    "deleted": np.int64,
    "drops": np.int64,
    "assured": np.int64,
    "unreplied": np.int64,
    "closed": np.int64,
    "births": np.int64,
    "evicted": np.int64,
    "failed": np.int32,
    "existing": np.int64,
    "existing_assured": np.int32,
    "older": np.int64,
}
"""What adds up. ``births`` is the sum of (sign x time in us): with ``held`` it gives the
integral of ``held`` over time, ``held * now - births``."""

_ROW_BITS: Final = 17
_ROW_MASK: Final = np.uint64((1 << _ROW_BITS) - 1)
_FIELD: Final = np.uint64(PACKED_MAX)


class HeavyTable:
    """Rows of counters for up to ``rows`` keys of three words. Row 0 belongs to no key."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.used = 0
        self.floor = 0
        self.pruned = 0
        self._lightest = 0
        bits = max(4, (2 * rows).bit_length())
        self._shift = np.uint64(64 - bits)
        self._last = np.uint64((1 << bits) - 1)
        self._index = np.zeros(1 << bits, np.uint64)
        self._pending = 0
        self.given = self.given_at = self.moved_from = _NONE
        self.gave_up = False
        self.hash = np.zeros(rows + 1, np.uint64)
        self.key = np.zeros((rows + 1, 3), np.uint64)
        self.counters: dict[str, npt.NDArray[Any]] = {
            name: np.zeros(rows + 1, kind) for name, kind in COUNTERS.items()
        }
        self._flow = np.zeros(rows + 1, np.uint64)
        self._end = np.zeros(rows + 1, np.uint64)
        self.error = np.zeros(rows + 1, np.int64)
        self.first = np.zeros(rows + 1, np.int64)
        self.owner = np.zeros(rows + 1, np.uint64)
        self.flags = np.zeros(rows + 1, np.uint8)
        self.rich = np.zeros(rows + 1, np.uint16)
        self.at_tick = {name: np.zeros(rows + 1, np.int64) for name in ("inserts", "drops")}
        self.rate = {name: np.zeros(rows + 1, np.float32) for name in ("inserts", "drops")}

    # -- finding and admitting ------------------------------------------------

    def find(self, h: U64) -> Rows:
        """The row of each hash; 0 for those without."""
        at = h >> self._shift
        entry = self._index.take(at.view(np.int64))
        miss = (entry ^ h) > _ROW_MASK
        rows = (entry & _ROW_MASK).view(np.int64)
        rows[miss] = 0
        pending = np.flatnonzero(miss & (entry != 0))
        while pending.size:
            at = (at.take(pending) if at.size != pending.size else at) + np.uint64(1) & self._last
            hashes = h.take(pending)
            entry = self._index.take(at.view(np.int64))
            hit = (entry ^ hashes) <= _ROW_MASK
            rows[pending[hit]] = (entry[hit] & _ROW_MASK).view(np.int64)
            more = np.flatnonzero(~hit & (entry != 0))
            pending, at = pending[more], at[more]
        return rows

    def locate(self, h: U64, comes: npt.NDArray[np.bool_], keys: Keys) -> tuple[Rows, Rows]:
        """The row of each event, after giving rows to new keys.

        ``comes`` marks the events that are worth a row; ``keys(indices)`` gives the
        (n, 3) key words of events. Also returns the rows given up meanwhile, whose
        content the ``dropped*`` attributes keep until the next call. ``given`` are the
        new rows and ``given_at`` an event of each.
        """
        self.gave_up = False
        rows = self.find(h)
        missing = np.flatnonzero(rows == 0)
        if not missing.size:
            return rows, _NONE
        new = missing[comes[missing]]
        if not new.size:
            return rows, _NONE
        hashes, weight, order, starts = grouped(h.take(new))
        dropped = _NONE
        if self.rows - self.used < max(1, self.rows // 16) and self._can_prune(int(weight.max())):
            dropped = self._prune()
            rows = self.find(h)
        chosen = self._choose(weight)
        if not chosen.size:
            return rows, dropped
        self.given_at = new[order[starts[chosen]]]
        given = self.given = self._admit(hashes[chosen], keys(self.given_at))
        row_of = np.zeros(len(hashes), np.intp)
        row_of[chosen] = given
        rows[new[order]] = np.repeat(row_of, weight)
        others = missing[~comes[missing]]
        if others.size:
            rows[others] = self.find(h.take(others))
        return rows, dropped

    def absorb(self, keys: npt.NDArray[np.uint64], counters: dict[str, npt.NDArray[Any]]) -> Rows:
        """Add counters that a finer table gave up; returns the row of each, 0 if turned away."""
        h = key_hash(keys[:, 0], keys[:, 1], keys[:, 2])
        hashes, _, order, starts = grouped(h)
        rows = self.find(hashes)
        new = np.flatnonzero(rows == 0)
        weight = counters["inserts"] + counters["existing"] + counters["drops"]
        if new.size > self.rows - self.used:
            sums = np.add.reduceat(weight[order], starts)[new]
            new = new[np.argsort(-sums, kind="stable")]
            room = self.rows - self.used
            self.floor += int(np.sort(sums)[::-1][room])
            self.pruned += new.size - room
            new = new[:room]
        if new.size:
            rows[new] = self._admit(hashes[new], keys[order[starts[new]]])
        spread = np.empty(len(h), np.intp)
        spread[order] = np.repeat(rows, np.diff(starts, append=len(h)))
        scatter = Scatter(spread)
        for name, values in counters.items():
            scatter.add(self.counters[name], values)
        return spread

    def _choose(self, weight: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """Which of the new keys get a row, by their weight in this window.

        Once keys had to be turned away, newcomers share a quarter of what is free, so
        that there is always room for a heavy one.
        """
        free = self.rows - self.used
        quota = free if not self.pruned else free // 4
        if len(weight) <= quota:
            return np.arange(len(weight))
        at = len(weight) - quota - 1
        limit = int(np.partition(weight, at)[at])
        chosen = np.flatnonzero(weight > limit)
        self.floor += limit
        self.pruned += len(weight) - chosen.size
        return chosen

    def _admit(self, hashes: U64, keys: npt.NDArray[np.uint64]) -> Rows:
        given = np.arange(self.used + 1, self.used + 1 + len(hashes))
        self.used += len(hashes)
        self.hash[given] = hashes
        self.key[given] = keys
        self.error[given] = self.floor
        self._enter(hashes, given)
        return given

    def _enter(self, hashes: U64, rows: Rows) -> None:
        entry = (hashes & ~_ROW_MASK) | rows.astype(np.uint64)
        at = hashes >> self._shift
        while entry.size:
            places = at.view(np.int64)
            free = self._index[places] == 0
            self._index[places[free]] = entry[free]
            left = np.flatnonzero(self._index[places] != entry)
            entry, at = entry[left], (at[left] + np.uint64(1)) & self._last

    # -- giving rows up -------------------------------------------------------

    def weight(self) -> npt.NDArray[np.int64]:
        """Per row, entries that came plus refusals, since it has a row."""
        self.drain()
        c = self.counters
        total: npt.NDArray[np.int64] = c["inserts"] + c["existing"] + c["drops"]
        return total

    def _can_prune(self, heaviest: int) -> bool:
        """Whether enough rows are no heavier than a newcomer might be.

        Looks at all rows, but only when the answer may have changed: weights only grow.
        """
        if self.floor + heaviest < self._lightest:
            return False
        bound = (self.weight() + self.error)[1 : self.used + 1]
        part = max(1, self.used // 4)
        self._lightest = int(np.partition(bound, part - 1)[part - 1])
        return self._lightest <= self.floor + heaviest

    def _prune(self) -> Rows:
        """Give up a quarter of the rows, the lightest, and those that tell nothing."""
        bound = (self.weight() + self.error)[1 : self.used + 1]
        part = max(1, self.used // 4)
        order = np.argpartition(bound, part - 1)
        self.floor = max(self.floor, int(bound[order[part - 1]]))
        # Rows at or below the floor say no more than having none.
        gone = np.flatnonzero(bound <= self.floor)
        if gone.size > self.used // 2:
            gone = order[:part]
        self._lightest = self.floor
        self.pruned += gone.size
        dropped = gone + 1
        self.gave_up = True
        self.dropped_hash = self.hash[dropped]
        self.dropped_key = self.key[dropped]
        self.dropped = {name: column[dropped] for name, column in self.counters.items()}
        self.dropped_rich = self.rich[dropped]
        self.dropped_flags = self.flags[dropped]
        keep = np.ones(self.used, bool)
        keep[gone] = False
        self._compact(np.flatnonzero(keep) + 1)
        return dropped

    def columns(self) -> list[npt.NDArray[Any]]:
        """Every per-row array."""
        return [
            self.hash, self.key, self.error, self.first, self.owner, self.flags, self.rich,
            self._flow, self._end,
            *self.counters.values(), *self.at_tick.values(), *self.rate.values(),
        ]  # fmt: skip

    def _compact(self, keep: Rows) -> None:
        self.moved_from = keep
        m = len(keep)
        for column in self.columns():
            column[1 : m + 1] = column[keep]
            column[m + 1 : self.used + 1] = 0
        self.used = m
        self._index[:] = 0
        self._enter(self.hash[1 : m + 1], np.arange(1, m + 1))

    # -- counting -------------------------------------------------------------

    def count(self, rows: Rows, window: Window, end_rows: Rows) -> Scatter:
        """Add a window's events to their rows (row 0 takes those without)."""
        self.make_room(window.n)
        scatter = Scatter(rows)
        scatter.add(self._flow, window.flow)
        scatter.add(self.counters["births"], window.births)
        Scatter(end_rows).add(self._end, window.end)
        return scatter

    def make_room(self, events: int) -> None:
        """Drain the packed counters if so many more events might overflow one."""
        if self._pending + events > PACKED_MAX:
            self.drain()
        self._pending += events

    def drain(self) -> None:
        """Move the packed counters to their own columns."""
        if not self._pending:
            return
        n, c = self.used + 1, self.counters
        for packed, names in (
            (self._flow[:n], ("inserts", "destroys", "expired")),
            (self._end[:n], ("assured", "unreplied", "closed")),
        ):
            for at, name in enumerate(names):
                c[name][:n] += ((packed >> np.uint64(at * PACKED_BITS)) & _FIELD).view(np.int64)
            packed[:] = 0
        self._pending = 0

    def held(self) -> npt.NDArray[np.int64]:
        """Entries in the table now, per row."""
        self.drain()
        c = self.counters
        net: npt.NDArray[np.int64] = c["inserts"] + c["existing"] - c["destroys"]
        return np.maximum(net, 0)

    def tick(self, seconds: float) -> None:
        """Close an interval: rates per second since the previous tick."""
        self.drain()
        for name, before in self.at_tick.items():
            now = self.counters[name]
            self.rate[name][:] = (now - before) / seconds
            before[:] = now

    def nbytes(self) -> int:
        """Memory held."""
        return self._index.nbytes + sum(column.nbytes for column in self.columns())


class Keys:
    """Key words of some of a window's events."""

    def __init__(self, high: U64 | None, low: U64 | None, meta: U64 | None) -> None:
        self.parts = (high, low, meta)

    def __call__(self, at: npt.NDArray[np.intp]) -> npt.NDArray[np.uint64]:
        """The (n, 3) key words of the events at these indices."""
        out = np.zeros((len(at), 3), np.uint64)
        for column, part in enumerate(self.parts):
            if part is not None:
                out[:, column] = part[at]
        return out

    def at(self, chosen: npt.NDArray[np.intp]) -> Keys:
        """The same for indices into ``chosen``."""
        return Keys(*(None if part is None else part[chosen] for part in self.parts))


_NONE: Final[Rows] = np.zeros(0, np.intp)


def grouped(h: U64) -> tuple[U64, npt.NDArray[np.intp], Rows, Rows]:
    """Distinct values of ``h``: (values, how many of each, order, starts in the order).

    One sort of the hashes with their index packed into the low bits, which is
    three times faster than an argsort. Hashes that differ only in those bits
    (17 of 64) stay apart, and may show up as more than one group.
    """
    n = len(h)
    bits = np.uint64(max(1, (n - 1).bit_length()))
    mask = (np.uint64(1) << bits) - np.uint64(1)
    packed = (h & ~mask) | np.arange(n, dtype=np.uint64)
    packed.sort()
    order = (packed & mask).view(np.int64)
    ordered = h.take(order)
    change = np.empty(n, bool)
    change[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=change[1:])
    starts = np.flatnonzero(change)
    return ordered[starts], np.diff(starts, append=n), order, starts
