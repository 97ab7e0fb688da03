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
tests/model/keys/test_heavy.py holds the bounds above for any sequence of windows.

A plain sorted merge (sort a window's hashes, sum runs, insert what is new) takes 1.7 to 4 times
as long with 200 to 40,000 keys, for one counter, and bounds neither rows nor errors.
"""

from __future__ import annotations

from typing import Any, Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.model.keys.columns import (
    PACKED_BITS,
    PACKED_MAX,
    U64,
    Keys,
    Window,
    grouped,
    key_hash,
    some,
)
from ctrace.model.keys.index import Found, Index
from ctrace.model.keys.scatter import Rows, Scatter
from ctrace.model.keys.sketch import Sketch

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
    "older": np.int64,
    "begun": np.int32,
    "found": np.int32,
}
"""What adds up. ``begun`` was held when a recount began, which ``found`` so many then
(:mod:`ctrace.model.keys.recount`). ``births`` is the sum of (sign x time in 1024 ns): with
``held`` it gives the integral of ``held`` over time, ``held * now - births``."""

_FLOW_NAMES: Final = ("inserts", "destroys", "expired")
_END_NAMES: Final = ("assured", "unreplied", "closed")
"""Fields of a window's packed counters, from the lowest bits up."""

SKETCHED: Final = np.uint8(0x40)
"""Bit of ``flags``: the key was in the sketch before it had a row."""

_CAUTION: Final = 16
"""Once keys are turned away, one in this many free rows may be given away per window."""
_EAGER: Final = 2
"""The same, but while none has been taken."""
_BUSY: Final = 16
"""Events of a new key in one window that make it worth counting at once."""
_FIELD: Final = np.uint64(PACKED_MAX)


_FEW: Final = 16
"""Rows of the table that the sizes of larger ones are derived from."""


_NONE: Final[Rows] = np.zeros(0, np.intp)


class HeavyTable:
    """Rows of counters for up to ``rows`` keys of three words. Row 0 belongs to no key."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.used = 0
        self.floor = 0
        self.pruned = 0
        self._sketch: Optional[Sketch] = None
        """Taken once keys are turned away."""
        self.index = Index(rows)
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

    def find_rows(self, h: U64) -> Rows:
        """The row of each hash; 0 for those without."""
        return self.index.find(h).rows()

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
        found = self.index.find(h)
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
            self._sketch = Sketch(self.rows)
            if self._is_tight():
                self._prune()
                found = self.index.find(h)
        new = np.flatnonzero(comes & ~found.hit)
        if new.size and self._earn(new, h, keys):
            others = np.flatnonzero(~found.hit)
            found.put(others, self.find_rows(h.take(others)))
        return found

    @property
    def scarce(self) -> bool:
        """Whether keys are turned away, so that rows must be earned."""
        return self._sketch is not None

    def _is_tight(self) -> bool:
        return self.rows - self.used < max(1, self.rows // 16)

    def _earn(self, new: Rows, h: U64, keys: Keys) -> bool:
        """Give rows to newcomers that may be heavier than the floor, by the sketch.

        Returns whether to count them in this window, too: that costs looking up all the others
        again. Otherwise they count from the next window on.
        """
        assert self._sketch is not None
        weight = self._sketch.add(h.take(new), 1)
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
        """Keys ever seen: exact while all have rows, else estimated from the sketch."""
        if self._sketch is None:
            return self.used
        never = int(np.count_nonzero((self.flags[1 : self.used + 1] & SKETCHED) == 0))
        return never + self._sketch.distinct()

    def given_up(self) -> int:
        """Keys without a row."""
        return max(0, self.distinct() - self.used)

    def absorb(self, keys: npt.NDArray[np.uint64], counters: dict[str, npt.NDArray[Any]]) -> Rows:
        """Add counters that a finer table gave up; returns the row of each, 0 if it was turned
        away."""
        h = key_hash(keys[:, 0], keys[:, 1], keys[:, 2])
        hashes, _, order, starts = grouped(h)
        rows = self.find_rows(hashes)
        new = np.flatnonzero(rows == 0)
        weight = np.maximum(counters["inserts"] + counters["existing"] + counters["drops"], 0)
        if new.size > self.rows - self.used:
            if self._sketch is None:
                self._sketch = Sketch(self.rows)
            sums = np.add.reduceat(weight[order], starts)[new]
            new = new[np.argsort(-sums, kind="stable")]
            room = self.rows - self.used
            turned = new[room:]
            self.pruned += turned.size
            bound = self._sketch.add(hashes[turned], np.sort(sums)[::-1][room:].astype(np.uint32))
            self.floor = max(self.floor, int(bound.max()))
            new = new[:room]
        if new.size:
            error: npt.NDArray[np.int64] | int = 0
            if self._sketch is not None:
                error = self._sketch.bounds(hashes[new])
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
        self.index.enter(hashes, given)
        return given

    # -- giving rows up -------------------------------------------------------

    def weight(self) -> npt.NDArray[np.int64]:
        """Per row, entries that came plus refusals, since the row was given."""
        self.drain()
        c = self.counters
        total: npt.NDArray[np.int64] = c["inserts"] + c["existing"] + c["drops"]
        return np.maximum(total, 0)

    def _prune(self) -> None:
        """Give up a quarter of the rows: the lightest, and those without information."""
        bound = (self.weight() + self.error)[1 : self.used + 1]
        part = max(1, self.used // 4)
        order = np.argsort(bound)
        self.floor = max(self.floor, int(bound[order[part - 1]]))
        # Rows at or below the floor say no more than having none.
        gone = np.flatnonzero(bound <= self.floor)
        if gone.size > self.used // 2:
            gone = order[:part]
        if self._sketch is not None:
            self._sketch.raise_to(self.hash[gone + 1], bound[gone])
        self.pruned += gone.size
        dropped = gone + 1
        self.gave_up = True
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
        self.index.clear()
        self.index.enter(self.hash[1 : m + 1], np.arange(1, m + 1))

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
        """Drain the packed counters if this many more events might overflow one."""
        if self._pending + events > PACKED_MAX:
            self.drain()
        self._pending += events

    def drain(self) -> None:
        """Move the packed counters to their own columns."""
        if not self._pending:
            return
        n, c = self.used + 1, self.counters
        for packed, names in ((self._flow[:n], _FLOW_NAMES), (self._end[:n], _END_NAMES)):
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
        """Bytes that a table of this many rows takes."""
        small = cls(_FEW)
        each = sum(column.nbytes for column in small.columns()) // (_FEW + 1)
        return Sketch.needed(rows) + Index.needed(rows) + each * (rows + 1)

    def nbytes(self) -> int:
        """Memory held."""
        own = sum(column.nbytes for column in self.columns())
        # the sketch is taken once keys are turned away, and counted from the start
        return Sketch.needed(self.rows) + self.index.nbytes + own
