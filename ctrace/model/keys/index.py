"""Which row a key's hash has: an open-addressed index over a table's rows.

An entry is the hash with its lowest bits replaced by the row. A hash looks at its own place, and
at those behind it as long as a bit there says that a key of this place stands farther on.

Invariants, held by tests/model/keys/test_heavy.py:

- every hash that was entered and not cleared is found, with the row that it was entered with;
- a hash that was not entered is not found, but where it is alike in all bits above the row's.
"""

from __future__ import annotations

from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.model.keys.columns import U64, some
from ctrace.model.keys.scatter import Rows

_ROW_BITS: Final = 17
_ROW_MASK: Final = np.uint64((1 << _ROW_BITS) - 1)
_DISPLACED: Final = np.uint64(1 << _ROW_BITS)
"""Bit of an index entry: some key that belongs here is stored farther on."""
_LOW: Final = _ROW_MASK | _DISPLACED
"""Bits of an entry that do not belong to the key's hash."""
_EMPTY: Final = ~_LOW
"""An unused place. A hash begins like this only by chance, one in 2**46."""
_NO_HASH: Final[U64] = np.zeros(0, np.uint64)

_MOST: Final = 0.75
"""Share of events with a row above which all are handled."""


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
        """The same for a window of ``n`` events, where these are the events at ``at``."""
        found = Found.nothing(n)
        found._entry[at], found.hit[at] = self._entry, self.hit
        return found


class Index:
    """Places for the hashes of up to ``rows`` rows, a quarter of them used at most."""

    def __init__(self, rows: int) -> None:
        bits = self._bits(rows)
        self._shift = np.uint64(64 - bits)
        self._last = np.uint64((1 << bits) - 1)
        self._places = np.full(1 << bits, _EMPTY)
        self.nbytes = self._places.nbytes

    @staticmethod
    def _bits(rows: int) -> int:
        return max(4, (4 * rows).bit_length())

    @classmethod
    def needed(cls, rows: int) -> int:
        """Bytes that an index of this many rows takes."""
        return _EMPTY.itemsize << cls._bits(rows)

    def find(self, h: U64) -> Found:
        """The row of each hash."""
        at = h >> self._shift
        entry = self._places.take(at.view(np.int64), mode="clip")
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
            here = self._places.take(at.view(np.int64))
            match = (here ^ h.take(pending)) <= _LOW
            which = pending[match]
            entry[which], hit[which] = here[match], True
            more = np.flatnonzero(~match & (here != _EMPTY))
            pending, at = pending[more], at[more]
        return Found(entry, hit)

    def enter(self, hashes: U64, rows: Rows) -> None:
        """Map these hashes to these rows; none of them may be in the index yet."""
        entry = (hashes & ~_LOW) | rows.astype(np.uint64)
        home = at = hashes >> self._shift
        displaced = [_NO_HASH]
        while entry.size:
            places = at.view(np.int64)
            free = self._places[places] == _EMPTY
            self._places[places[free]] = entry[free]
            left = np.flatnonzero((self._places[places] ^ entry) & ~_DISPLACED)
            entry, at = entry[left], (at[left] + np.uint64(1)) & self._last
            home = home[left]
            displaced.append(home)
        self._places[np.concatenate(displaced).view(np.int64)] |= _DISPLACED

    def clear(self) -> None:
        """Forget every hash."""
        self._places[:] = _EMPTY
