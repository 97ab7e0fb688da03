"""What is shared across blocks, by writer and reader: the last WINDOW tuples.

A tuple is eleven 64-bit words: identity, source and destination, the reply's source and
destination, ports, and netns | proto | family | zone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.recording.format.layout import WINDOW

U64 = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.intp]
Image = Sequence[Optional[U64]]
"""A tuple's words as columns of equal length; None for one that is 0 in every row."""

IMAGE: Final = 11
"""Words of a tuple."""

_32 = np.uint64(32)
_WRAP = WINDOW - 1
_NONE = -(1 << 62)
_INDEX_BITS = 20


class TupleIndex:
    """Finds the stored tuple that a destroy can refer to: the last WINDOW of them.

    A direct-mapped table by identity gives one candidate per destroy. It counts when
    identity and tuple are equal by a 64-bit hash under a key that no sender of packets
    knows. A candidate lost to a collision in the table costs bytes only.
    """

    def __init__(self) -> None:
        self.total = 0
        self._key = np.zeros(WINDOW, np.uint64)
        self._index = np.zeros(1 << _INDEX_BITS, np.uint32)
        self._secrets = np.frombuffer(os.urandom(8 * IMAGE), np.uint64) | np.uint64(1)

    def place(
        self, image: Image, makers: Indices, destroys: Indices
    ) -> tuple[Indices, npt.NDArray[np.bool_], npt.NDArray[np.uint32]]:
        """Decide for each row where its tuple stands.

        ``destroys`` are the rows of destroys, ``makers`` the others. Returns the rows that
        store theirs (in stored order), for each destroy whether it refers, and the
        distances of those that do. Zero words may be None, or not, from call to call.
        """
        n = len(makers) + len(destroys)
        key, slot = self._hash(image, n), _slots(image[0], n)
        key_d, slot_d = key.take(destroys), slot.take(destroys)

        # Entries of earlier blocks, before this one's tuples take the oldest places.
        place = self._index.take(slot_d)
        refers = self._key.take(place) == key_d
        refers &= _age(place, self.total) < (max(0, WINDOW - n) if self.total else 0)

        count = self.total + len(makers)
        self._store(self.total, key.take(makers))
        self._index[slot.take(makers)] = np.arange(self.total, count) & _WRAP
        rest = np.flatnonzero(~refers)
        if len(rest):
            new = self._index.take(slot_d.take(rest))
            found = self._key.take(new) == key_d.take(rest)
            # A candidate of an earlier block may come here too: keep it inside the window.
            found &= _age(new, count) < min(count, WINDOW - len(rest))
            place[rest], refers[rest] = new, found

        alone = destroys.take(np.flatnonzero(~refers))
        self.total = count + len(alone)
        if len(alone):
            self._store(count, key.take(alone))
            makers = np.concatenate((makers, alone))
            place = place.take(np.flatnonzero(refers))
        return makers, refers, _age(place, self.total) + np.uint32(1)

    def _store(self, first: int, keys: U64) -> None:
        at = first & _WRAP
        fits = min(len(keys), WINDOW - at)
        self._key[at : at + fits] = keys[:fits]
        self._key[: len(keys) - fits] = keys[fits:]

    def _hash(self, image: Image, n: int) -> U64:
        total = np.zeros(n, np.uint64)
        part = np.empty_like(total)
        for word, secret in zip(image, self._secrets):
            if word is None:  # as if it were there: 0 adds nothing
                continue
            # Folding brings the bits that differ in addresses, all high ones, down.
            np.right_shift(word, _32, out=part)
            part ^= word
            part *= secret
            total += part
        return total


def _slots(identity: Optional[U64], n: int) -> npt.NDArray[np.int64]:
    """Entries are at least 256 bytes apart; what the kernel made together stays together."""
    if identity is None:
        return np.zeros(n, np.int64)
    slots = identity >> np.uint64(8)
    slots &= np.uint64((1 << _INDEX_BITS) - 1)
    return slots.view(np.int64)


def _age(place: npt.NDArray[np.uint32], total: int) -> npt.NDArray[np.uint32]:
    """How many of ``total`` tuples came after the one stored there."""
    age: npt.NDArray[np.uint32] = np.uint32(total - 1 & _WRAP) - place
    age &= np.uint32(_WRAP)
    return age


class Ring:
    """The last values of a sequence, by number; grows to WINDOW of them and no further."""

    def __init__(self, dtype: npt.DTypeLike, width: int = 1) -> None:
        self._width = width
        self._data: npt.NDArray[Any] = np.empty((1 << 12, width), dtype)
        self._number = np.full(1 << 12, _NONE, np.int64)
        self._first = self._end = -1
        self._whole = True

    def append(self, first: int, values: npt.NDArray[Any]) -> None:
        """Add the values numbered from ``first``; numbers may be left out, not repeated."""
        if self._first < 0:
            self._first = self._end = first
        self._whole &= first == self._end
        self._end = first + len(values)
        size = len(self._data)
        while size < WINDOW and size < self._end - self._first:
            size *= 2
        if size != len(self._data):
            data = np.empty((size, self._width), self._data.dtype)
            number = np.full(size, _NONE, np.int64)
            filled = np.flatnonzero(self._number != _NONE)
            place = self._number[filled] & (size - 1)
            data[place], number[place] = self._data[filled], self._number[filled]
            self._data, self._number = data, number
        values = values.reshape(-1, self._width)
        done = 0
        while done < len(values):
            at = (first + done) & (size - 1)
            part = values[done : done + size - at]
            self._data[at : at + len(part)] = part
            self._number[at : at + len(part)] = first + done + np.arange(len(part))
            done += len(part)

    def take(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """The values with these numbers, as (n, width); arbitrary where the ring does not have
        one."""
        return self._data.take(numbers & (len(self._data) - 1), axis=0)

    def has(self, numbers: npt.NDArray[np.int64]) -> Optional[npt.NDArray[np.bool_]]:
        """Which of these numbers the ring has; None when it has them all."""
        if self._whole and (not len(numbers) or int(numbers.min()) >= self._first):
            return None
        has: npt.NDArray[np.bool_] = self._number[numbers & (len(self._number) - 1)] == numbers
        return None if has.all() else has
