"""A table of the heaviest keys: exact while they fit, with a stated error beyond.

While every key has a row, every number is exact. When rows run out, a key's
weight (entries that came, and refusals) is first summed in a cell of a sketch, which
it may share with others: an upper bound. A key gets a row once that bound is above
``floor``, and carries what it may lack as its ``error``; the lightest rows give
theirs up, and their weight goes to the sketch. So for every key ever seen::

    weight <= true weight <= weight + error        (with a row)
    true weight <= floor                           (without one)

What a given-up row had counted is not lost: the caller folds it into a coarser
table, so that sums over a source or a service stay whole.

One window is counted in four steps: ``find`` looks each event's hash up in an open-addressed
index; ``locate`` gives rows to the keys without one that have earned it; ``count`` adds each
event's counters, packed in one word, to its row; ``drain`` unpacks them when somebody reads.
tests/model/test_heavy.py holds the bounds above for any sequence of windows.

A plain sorted merge (sort a window's hashes, sum runs, insert what is new) takes 1.7 to 4 times
as long with 200 to 40,000 keys, for one counter, and bounds neither rows nor errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.model.keys.columns import PACKED_BITS, PACKED_MAX, U64, Window, key_hash, some
from ctrace.model.keys.scatter import Rows, Scatter, add_at

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
    "begun": np.int32,
    "found": np.int32,
}
"""What adds up. ``begun`` was held when a recount began, which ``found`` so many then
(:mod:`ctrace.model.keys.recount`). ``births`` is the sum of (sign x time in 1024 ns): with
``held`` it gives the integral of ``held`` over time, ``held * now - births``."""

_FLOW_NAMES: Final = ("inserts", "destroys", "expired")
_END_NAMES: Final = ("assured", "unreplied", "closed")
"""What a window's packed counters hold, from the lowest bits on."""

_ROW_BITS: Final = 17
_ROW_MASK: Final = np.uint64((1 << _ROW_BITS) - 1)
_DISPLACED: Final = np.uint64(1 << _ROW_BITS)
"""Bit of an index entry: a key whose own place this is stands farther on."""
_LOW: Final = _ROW_MASK | _DISPLACED
"""What an entry holds beside the key's hash."""
_EMPTY: Final = ~_LOW
"""A place without an entry: what no hash begins with but by chance, one of 2**46."""
SKETCHED: Final = np.uint8(0x40)
"""Bit of ``flags``: the key was in the sketch before it had a row."""

_MOST: Final = 0.75
"""Share of events with a row from which on all are handled."""

_CAUTION: Final = 16
"""Of this many free rows, one is given away in a window once keys are turned away."""
_EAGER: Final = 2
"""The same while none is taken."""
_BUSY: Final = 16
"""Events of a new key in one window that are worth counting at once."""
CELLS_PER_ROW: Final = 8
_FIELD: Final = np.uint64(PACKED_MAX)
_HALF, _ODD = np.uint64(32), np.uint64(1)


class Found:
    """Which events of a window have a row, and which.

    Most have none in a flood of new keys, and what is asked of them all should be a bit.
    """

    def __init__(self, entry: U64, hit: npt.NDArray[np.bool_]) -> None:
        self.hit = hit
        """Whether an event has a row."""
        self._entry = entry
        """The row in the lowest bits, where there is one."""
        self._all: Optional[Rows] = None
        """The row of each event, once asked for."""

    @classmethod
    def of(cls, rows: Rows) -> Found:
        """From the row of each event, 0 for none."""
        return cls(rows.view(np.uint64), rows != 0)

    @classmethod
    def nothing(cls, n: int) -> Found:
        """No row for any of ``n`` events."""
        return cls(np.zeros(n, np.uint64), np.zeros(n, bool))

    def rows(self, at: Optional[Rows] = None) -> Rows:
        """The row of each event at ``at`` (of all, if None), 0 without one."""
        if self._all is not None:
            return self._all if at is None else self._all.take(at)
        entry, hit = some(self._entry, at), some(self.hit, at)
        rows: Rows = (entry & _ROW_MASK).view(np.int64)
        if not hit.all():
            rows *= hit
        return rows

    def split(self) -> tuple[Optional[Rows], Rows]:
        """Events to handle (None: all) and their rows; without one (row 0) only among all."""
        if np.count_nonzero(self.hit) > _MOST * len(self.hit):
            self._all = self.rows()
            return None, self._all
        at = np.flatnonzero(self.hit)
        return at, (self._entry.take(at) & _ROW_MASK).view(np.int64)

    def put(self, at: Rows, rows: Rows) -> None:
        """Set rows of the events at ``at``."""
        self._entry[at] = rows.view(np.uint64)
        self.hit[at] = rows != 0
        self._all = None

    def keep(self, events: npt.NDArray[np.bool_]) -> None:
        """Forget the rows of all but these events."""
        self.hit &= events
        self._all = None

    def among(self, n: int, at: Rows) -> Found:
        """The same seen from a window of ``n`` events, of which these were those at ``at``."""
        found = Found.nothing(n)
        found._entry[at], found.hit[at] = self._entry, self.hit
        return found


_FEW: Final = 16
"""Rows of the table by which the size of larger ones is told."""


class HeavyTable:
    """Rows of counters for up to ``rows`` keys of three words. Row 0 belongs to no key."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.used = 0
        self.floor = 0
        self.pruned = 0
        self.turned = 0
        """Events that came for keys without a row."""
        bits = (CELLS_PER_ROW * rows - 1).bit_length()
        self._cells, self._cell_shift = 1 << bits, np.uint64(64 - bits)
        self._sketch: npt.NDArray[np.uint32] | None = None
        bits = max(4, (4 * rows).bit_length())
        self._shift = np.uint64(64 - bits)
        self._last = np.uint64((1 << bits) - 1)
        self._index = np.full(1 << bits, _EMPTY)
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

    def find(self, h: U64) -> Found:
        """The row of each hash."""
        at = h >> self._shift
        entry = self._index.take(at.view(np.int64), mode="clip")
        np.bitwise_xor(entry, h, out=at)
        hit = at <= _LOW
        if hit.all():
            return Found(entry, hit)
        np.bitwise_and(entry, _DISPLACED, out=at)
        farther = at != 0
        farther &= ~hit
        pending = np.flatnonzero(farther)
        at = h.take(pending) >> self._shift
        while pending.size:
            at = (at + np.uint64(1)) & self._last
            here = self._index.take(at.view(np.int64))
            match = (here ^ h.take(pending)) <= _LOW
            which = pending[match]
            entry[which], hit[which] = here[match], True
            more = np.flatnonzero(~match & (here != _EMPTY))
            pending, at = pending[more], at[more]
        return Found(entry, hit)

    def find_rows(self, h: U64) -> Rows:
        """The row of each hash; 0 for those without."""
        return self.find(h).rows()

    def locate(self, h: U64, comes: npt.NDArray[np.bool_], keys: Keys) -> Found:
        """The row of each event, after giving rows to new keys.

        ``comes`` marks the events that add weight, and so earn a row once rows are
        scarce; before, every event does: an end may be reported ahead of its birth,
        or its birth be lost. ``keys(indices)`` gives the (n, 3)
        key words of events. Afterwards ``given`` are the new rows and ``given_at`` an
        event of each; if ``gave_up``, the ``dropped*`` attributes hold what pruned
        rows had.
        """
        self.gave_up = False
        self.given = _NONE
        if self._sketch is not None and self._is_tight():
            self._prune()
        found = self.find(h)
        if self._sketch is None:
            new = np.flatnonzero(~found.hit)
            if not new.size:
                return found
            hashes, size, order, starts = grouped(h.take(new))
            if len(hashes) <= self.rows - self.used:
                self.given_at = new[order[starts]]
                self.given = self._admit(hashes, keys(self.given_at), 0)
                found.put(new[order], np.repeat(self.given, size))
                return found
            self._sketch = np.zeros(self._cells, np.uint32)
            if self._is_tight():
                self._prune()
                found = self.find(h)
        new = np.flatnonzero(comes & ~found.hit)
        if new.size and self._earn(new, h, keys):
            others = np.flatnonzero(~found.hit)
            found.put(others, self.find_rows(h.take(others)))
        return found

    def _cell(self, h: U64) -> Rows:
        """The sketch's cell of each hash, as by chance also for keys in a row: squares are."""
        cell = h >> _HALF
        cell ^= h
        cell *= cell | _ODD
        cell >>= self._cell_shift
        return cell.view(np.int64)

    @property
    def scarce(self) -> bool:
        """Whether keys are turned away, so that a row must be earned."""
        return self._sketch is not None

    def _is_tight(self) -> bool:
        return self.rows - self.used < max(1, self.rows // 16)

    def _earn(self, new: Rows, h: U64, keys: Keys) -> bool:
        """Give rows to newcomers that may be heavier than the floor, by the sketch.

        Returns whether to count them in this window, too: that costs looking up all the others
        again. Otherwise they count from the next window on.
        """
        assert self._sketch is not None
        cell = self._cell(h.take(new))
        add_at(self._sketch, cell, 1)
        weight = self._sketch.take(cell)
        self.turned += new.size
        heavy = np.flatnonzero(weight > self.floor)
        if not heavy.size:
            return False
        # One event of each key from here on: a key must not stand in its own way.
        mine = new.take(heavy)
        hashes, size, order, starts = grouped(h.take(mine))
        first = order[starts]
        mine, bound = mine[first], weight[heavy[first]]
        quota = max(1, (self.rows - self.used) // (_CAUTION if self.used else _EAGER))
        if len(bound) > quota:
            self.floor = max(self.floor, int(np.partition(bound, -quota - 1)[-quota - 1]))
            some = np.flatnonzero(bound > self.floor)
            hashes, size, mine, bound = hashes[some], size[some], mine[some], bound[some]
        if not mine.size:
            return False
        now = int(size.max()) >= max(_BUSY, len(h) >> 11)
        self.given_at = mine
        self.given = self._admit(hashes, keys(mine), bound.astype(np.int64) - size * now)
        self.flags[self.given] |= SKETCHED
        return now

    def distinct(self) -> int:
        """Keys ever seen: exact while all have rows, else estimated from the sketch.

        The estimate counts empty cells: about 1 % standard error up to twice as many keys as
        there are cells (262,144 at the default size), and at most twelve times as many.
        """
        if self._sketch is None:
            return self.used
        empty = max(1, int(np.count_nonzero(self._sketch == 0)))
        never = int(np.count_nonzero((self.flags[1 : self.used + 1] & SKETCHED) == 0))
        return never + round(self._cells * float(np.log(self._cells / empty)))

    def given_up(self) -> int:
        """Keys without a row."""
        return max(0, self.distinct() - self.used)

    def absorb(self, keys: npt.NDArray[np.uint64], counters: dict[str, npt.NDArray[Any]]) -> Rows:
        """Add counters that a finer table gave up; returns the row of each, 0 if turned away."""
        h = key_hash(keys[:, 0], keys[:, 1], keys[:, 2])
        hashes, _, order, starts = grouped(h)
        rows = self.find_rows(hashes)
        new = np.flatnonzero(rows == 0)
        weight = np.maximum(counters["inserts"] + counters["existing"] + counters["drops"], 0)
        if new.size > self.rows - self.used:
            if self._sketch is None:
                self._sketch = np.zeros(self._cells, np.uint32)
            sums = np.add.reduceat(weight[order], starts)[new]
            new = new[np.argsort(-sums, kind="stable")]
            room = self.rows - self.used
            turned = new[room:]
            self.pruned += turned.size
            cell = self._cell(hashes[turned])
            add_at(self._sketch, cell, np.sort(sums)[::-1][room:].astype(np.uint32))
            self.floor = max(self.floor, int(self._sketch[cell].max()))
            new = new[:room]
        if new.size:
            error: npt.NDArray[np.int64] | int = 0
            if self._sketch is not None:
                error = self._sketch[self._cell(hashes[new])].astype(np.int64)
            rows[new] = self._admit(hashes[new], keys[order[starts[new]]], error)
            if self._sketch is not None:
                self.flags[rows[new]] |= SKETCHED
        spread = np.empty(len(h), np.intp)
        spread[order] = np.repeat(rows, np.diff(starts, append=len(h)))
        scatter = Scatter(spread)
        for name, values in counters.items():
            scatter.add(self.counters[name], values)
        return spread

    def _admit(
        self, hashes: U64, keys: npt.NDArray[np.uint64], error: npt.NDArray[np.int64] | int
    ) -> Rows:
        given = np.arange(self.used + 1, self.used + 1 + len(hashes))
        self.used += len(hashes)
        self.hash[given] = hashes
        self.key[given] = keys
        self.error[given] = error
        self._enter(hashes, given)
        return given

    def _enter(self, hashes: U64, rows: Rows) -> None:
        entry = (hashes & ~_LOW) | rows.astype(np.uint64)
        home = at = hashes >> self._shift
        displaced = [_NO_HASH]
        while entry.size:
            places = at.view(np.int64)
            free = self._index[places] == _EMPTY
            self._index[places[free]] = entry[free]
            left = np.flatnonzero((self._index[places] ^ entry) & ~_DISPLACED)
            entry, at = entry[left], (at[left] + np.uint64(1)) & self._last
            home = home[left]
            displaced.append(home)
        self._index[np.concatenate(displaced).view(np.int64)] |= _DISPLACED

    # -- giving rows up -------------------------------------------------------

    def weight(self) -> npt.NDArray[np.int64]:
        """Per row, entries that came plus refusals, since it has a row."""
        self.drain()
        c = self.counters
        total: npt.NDArray[np.int64] = c["inserts"] + c["existing"] + c["drops"]
        return np.maximum(total, 0)

    def _prune(self) -> None:
        """Give up a quarter of the rows, the lightest, and those that tell nothing."""
        bound = (self.weight() + self.error)[1 : self.used + 1]
        part = max(1, self.used // 4)
        order = np.argsort(bound)
        self.floor = max(self.floor, int(bound[order[part - 1]]))
        # Rows at or below the floor say no more than having none.
        gone = np.flatnonzero(bound <= self.floor)
        if gone.size > self.used // 2:
            gone = order[:part]
        if self._sketch is not None:
            cell = self._cell(self.hash[gone + 1])
            np.maximum.at(self._sketch, cell, bound[gone].astype(np.uint32))
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
        self._index[:] = _EMPTY
        self._enter(self.hash[1 : m + 1], np.arange(1, m + 1))

    # -- counting -------------------------------------------------------------

    def count(self, found: Found, window: Window) -> None:
        """Add a window's events to their rows."""
        at, rows = found.split()
        if not rows.size:
            return
        self.make_room(window.n)
        scatter = Scatter(rows)
        scatter.add(self._flow, some(window.flow, at))
        scatter.add(self.counters["births"], some(window.births, at))
        if at is None:
            Scatter(rows.take(window.ends)).add(self._end, window.end.take(window.ends))
        else:
            scatter.add(self._end, window.end.take(at))

    def count_all(self, row: int, window: Window) -> None:
        """Add all of a window's events to one row."""
        c = self.counters
        c["births"][row] += window.births.sum()
        for packed, names in ((window.flow, _FLOW_NAMES), (window.end, _END_NAMES)):
            total = int(packed.sum())
            for at, name in enumerate(names):
                c[name][row] += total >> (at * PACKED_BITS) & PACKED_MAX

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
            (self._flow[:n], _FLOW_NAMES),
            (self._end[:n], _END_NAMES),
        ):
            for at, name in enumerate(names):
                c[name][:n] += ((packed >> np.uint64(at * PACKED_BITS)) & _FIELD).view(np.int64)
            packed[:] = 0
        self._pending = 0

    def held(self, at: Optional[Rows] = None) -> npt.NDArray[np.int64]:
        """Entries in the table now, of each of these rows, or of all."""
        self.drain()
        came, there, went = (
            some(self.counters[name], at) for name in ("inserts", "existing", "destroys")
        )
        net: npt.NDArray[np.int64] = came + there - went
        return np.maximum(net, 0)

    def tick(self, seconds: float) -> None:
        """Close an interval: rates per second since the previous tick."""
        self.drain()
        for name, before in self.at_tick.items():
            now = self.counters[name]
            self.rate[name][:] = (now - before) / seconds
            before[:] = now

    @classmethod
    def needed(cls, rows: int) -> int:
        """Bytes that a table of so many rows holds."""
        small = cls(_FEW)
        each = sum(column.nbytes for column in small.columns()) // (_FEW + 1)
        sketch = 4 << (CELLS_PER_ROW * rows - 1).bit_length()
        index = small._index.itemsize << max(4, (4 * rows).bit_length())
        return sketch + index + each * (rows + 1)

    def nbytes(self) -> int:
        """Memory held."""
        sketch = 4 * self._cells  # taken once keys are turned away, counted from the start
        return sketch + self._index.nbytes + sum(column.nbytes for column in self.columns())


class Keys:
    """Key words of some of a window's events, gathered only for those asked for."""

    def __init__(
        self,
        high: U64 | None,
        low: U64 | None,
        meta: Callable[[Rows], U64],
        chosen: Rows | None = None,
    ) -> None:
        self._high, self._low, self._meta, self._chosen = high, low, meta, chosen

    def __call__(self, at: Rows) -> npt.NDArray[np.uint64]:
        """The (n, 3) key words of the events at these indices."""
        if self._chosen is not None:
            at = self._chosen[at]
        out = np.zeros((len(at), 3), np.uint64)
        for column, part in enumerate((self._high, self._low)):
            if part is not None:
                out[:, column] = part[at]
        out[:, 2] = self._meta(at)
        return out

    def at(self, chosen: Rows) -> Keys:
        """The same for indices into ``chosen``."""
        return Keys(self._high, self._low, self._meta, chosen)


_NONE: Final[Rows] = np.zeros(0, np.intp)
_NO_HASH: Final[U64] = np.zeros(0, np.uint64)


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
