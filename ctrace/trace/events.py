"""Events to columns and back, exactly: 120 bytes become about seven.

What makes them small: an entry's destroy refers to the tuple stored with its
insert; a reply tuple that mirrors the original is one bit pattern; IPv4 is four
bytes; of times only the steps are kept; and columns are compressed apart.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.record import RECORD, WORDS, Events, Kind, words
from ctrace.trace.columns import Columns, Unsigned, encode, encode_dictionary
from ctrace.trace.format import WINDOW, BlockHead, Column, Compressor, Damaged, Section

U64 = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.intp]

IMAGE: Final = 11
"""Words of a tuple's image: ct, four addresses, ports, and netns | proto | family | zone."""

_LOW32 = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_WRAP = WINDOW - 1
_NONE = -(1 << 62)
_MAPPED = np.uint64(0xFFFF0000)
_HASH = np.uint64(0x9E3779B97F4A7C15)
_INDEX_BITS = 20
_TILE = 1024
_INDEX_SHIFT = np.uint64(64 - _INDEX_BITS)

# Shape of a tuple: which addresses are IPv4 in IPv6 form, and how the reply is told.
SRC4, DST4, REPLY_SRC4, REPLY_DST4 = 1, 2, 64, 128
ADDRESSES, PORTS = 2, 4
"""Bit positions of the reply's two codes."""
MIRRORED, ZERO, STORED = 0, 1, 2

_SIDES = (
    (1, SRC4, Column.SRC4, Column.SRC_HIGH, Column.SRC_LOW),
    (3, DST4, Column.DST4, Column.DST_HIGH, Column.DST_LOW),
)
_REPLY_SIDES = (
    (5, REPLY_SRC4, Column.REPLY_SRC4, Column.REPLY_SRC_HIGH, Column.REPLY_SRC_LOW),
    (7, REPLY_DST4, Column.REPLY_DST4, Column.REPLY_DST_HIGH, Column.REPLY_DST_LOW),
)


def transposed(parts: Sequence[Events], room: Optional[U64] = None) -> U64:
    """Arrays of records as (15, n) words, in tiles that stay in cache; in ``room`` if they fit."""
    n = sum(map(len, parts))
    fits = room is not None and n <= room.shape[1]
    out = room[:, :n] if room is not None and fits else np.empty((WORDS, n), np.uint64)
    at = 0
    for part in parts:
        rows = words(part)
        for i in range(0, len(rows), _TILE):
            tile = rows[i : i + _TILE]
            out[:, at : at + len(tile)] = tile.T
            at += len(tile)
    return out


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
        self, image: Sequence[U64], makers: Indices, destroys: Indices
    ) -> tuple[Indices, npt.NDArray[np.bool_], npt.NDArray[np.uint32]]:
        """Decide for each row where its tuple stands.

        ``image`` is eleven columns; ``destroys`` are the rows of destroys, ``makers`` the
        others. Returns the rows that store theirs (in stored order), for each destroy
        whether it refers, and the distances of those that do.
        """
        n = len(image[0])
        key = self._hash(image)
        slot = (image[0] * _HASH) >> _INDEX_SHIFT
        key_d, slot_d = key[destroys], slot[destroys]

        # Entries of earlier blocks, before this one's tuples take the oldest places.
        place = self._index[slot_d].astype(np.int64)
        refers = self._key[place] == key_d
        refers &= ((self.total - 1 - place) & _WRAP) + n + 1 <= (WINDOW if self.total else 0)

        count = self.total + len(makers)
        self._store(self.total, key[makers])
        self._index[slot[makers]] = np.arange(self.total, count) & _WRAP
        rest = np.flatnonzero(~refers)
        if len(rest):
            new = self._index[slot_d[rest]].astype(np.int64)
            found = self._key[new] == key_d[rest]
            # A candidate of an earlier block may come here too: keep it inside the window.
            newest = (count - 1 - new) & _WRAP
            found &= (newest < count) & (newest + 1 + len(rest) <= WINDOW)
            place[rest], refers[rest] = new, found

        alone = destroys[~refers]
        self.total = count + len(alone)
        self._store(count, key[alone])
        distance = ((self.total - 1 - place[refers]) & _WRAP) + 1
        return np.concatenate((makers, alone)), refers, distance.astype(np.uint32)

    def _store(self, first: int, keys: U64) -> None:
        at = first & _WRAP
        fits = min(len(keys), WINDOW - at)
        self._key[at : at + fits] = keys[:fits]
        self._key[: len(keys) - fits] = keys[fits:]

    def _hash(self, image: Sequence[U64]) -> U64:
        total = np.zeros(len(image[0]), np.uint64)
        part = np.empty_like(total)
        for word, secret in zip(image, self._secrets, strict=True):
            # Folding brings the bits that differ in addresses, all high ones, down.
            np.right_shift(word, _32, out=part)
            part ^= word
            part *= secret
            total += part
        return total


def encode_events(
    table: U64, index: TupleIndex, compress: Compressor
) -> tuple[list[Section], BlockHead]:
    """The sections of these rows, and a header with the fields that follow from them.

    ``table`` is (15, n) words as :func:`transposed` gives them, or a slice of that.
    """
    n = table.shape[1]
    first_tuple = index.total
    kinds = table[12]
    kind = kinds.astype(np.uint8)
    image = [*table[1:11], (table[11] & _LOW32) | ((kinds >> np.uint64(16)) << _32)]
    is_destroy = kind == Kind.DESTROY
    makers, destroys = np.flatnonzero(~is_destroy), np.flatnonzero(is_destroy)
    stored, refers, distance = index.place(image, makers, destroys)

    steps = np.empty(n, np.uint64)
    steps[0] = 0
    np.subtract(table[0, 1:], table[0, :-1], out=steps[1:])
    sections = encode(Column.TS, steps, compress)
    sections += encode(Column.KIND, kind, compress)
    for column, shift in ((Column.REASON, 8), (Column.DIRECTION, 48), (Column.STATE, 56)):
        sections += encode(column, (kinds >> np.uint64(shift)).astype(np.uint8), compress)
    status = (table[11] >> _32).astype(np.uint32)
    sections += encode_dictionary(Column.STATUS, status, compress)
    sections += encode_dictionary(Column.OWNER, table[13].take(makers), compress)
    sections += encode_dictionary(Column.CGROUP, table[14].take(makers), compress)
    sections += _encode_ends(table[13].take(destroys), table[14].take(destroys), compress)
    sections += encode(Column.REFERS, refers.view(np.uint8), compress)
    sections += encode(Column.DISTANCE, distance, compress)
    sections += _encode_tuples([word.take(stored) for word in image], compress)
    return sections, BlockHead(
        0, rows=n, tuples=len(stored), first_tuple=first_tuple, ts=int(table[0, 0])
    )


def _encode_ends(times: U64, rest: U64, compress: Compressor) -> list[Section]:
    idle, overdue = _halves(times)
    timeout, mark = _halves(rest)
    return (
        encode(Column.IDLE, idle - timeout - overdue, compress)
        + encode(Column.OVERDUE, overdue, compress)
        + encode_dictionary(Column.TIMEOUT, timeout, compress)
        + encode_dictionary(Column.MARK, mark, compress)
    )


def _halves(word: U64) -> tuple[Unsigned, Unsigned]:
    pair = word.view(np.uint32).reshape(-1, 2)
    return np.ascontiguousarray(pair[:, 0]), np.ascontiguousarray(pair[:, 1])


def _mapped(high: U64, low: U64) -> npt.NDArray[np.bool_]:
    is4: npt.NDArray[np.bool_] = (high == 0) & ((low & _LOW32) == _MAPPED)
    return is4


def _encode_tuples(image: Sequence[U64], compress: Compressor) -> list[Section]:
    mirrored = (image[5] == image[3]) & (image[6] == image[4])
    mirrored &= (image[7] == image[1]) & (image[8] == image[2])
    zero = (image[5] | image[6] | image[7] | image[8]) == 0
    addresses = np.where(mirrored, MIRRORED, np.where(zero, ZERO, STORED)).astype(np.uint8)
    ports = image[9].view(np.uint16).reshape(-1, 4)
    mirrored = (ports[:, 2] == ports[:, 1]) & (ports[:, 3] == ports[:, 0])
    zero = (ports[:, 2] | ports[:, 3]) == 0
    reply_ports = np.where(mirrored, MIRRORED, np.where(zero, ZERO, STORED)).astype(np.uint8)
    shape = addresses << ADDRESSES | reply_ports << PORTS

    sections: list[Section] = []
    for word, bit, *columns in _SIDES:
        is4 = _mapped(image[word], image[word + 1])
        shape |= is4.view(np.uint8) * np.uint8(bit)
        sections += _encode_address(image[word], image[word + 1], is4, columns, compress)
    told = np.flatnonzero(addresses == STORED)
    for word, bit, *columns in _REPLY_SIDES:
        high, low = image[word].take(told), image[word + 1].take(told)
        is4 = _mapped(high, low)
        shape[told] |= is4.view(np.uint8) * np.uint8(bit)
        sections += _encode_address(high, low, is4, columns, compress)
    told = np.flatnonzero(reply_ports == STORED)
    return (
        sections
        + encode(Column.REPLY_SPORT, ports[told, 2], compress)
        + encode(Column.REPLY_DPORT, ports[told, 3], compress)
        + encode(Column.SHAPE, shape, compress)
        + encode(Column.CT, image[0], compress)
        + encode(Column.SPORT, np.ascontiguousarray(ports[:, 0]), compress)
        + encode_dictionary(Column.DPORT, np.ascontiguousarray(ports[:, 1]), compress)
        + encode_dictionary(Column.NETNS, image[10].astype(np.uint32), compress)
        + encode(Column.PROTO, (image[10] >> _32).astype(np.uint8), compress)
        + encode(Column.FAMILY, (image[10] >> np.uint64(40)).astype(np.uint8), compress)
        + encode(Column.ZONE, (image[10] >> np.uint64(48)).astype(np.uint16), compress)
    )


def _encode_address(
    high: U64, low: U64, is4: npt.NDArray[np.bool_], columns: list[Any], compress: Compressor
) -> list[Section]:
    four, six_high, six_low = columns
    if is4.all():
        return encode_dictionary(four, (low >> np.uint64(32)).astype(np.uint32), compress)
    sections = encode_dictionary(four, (low[is4] >> np.uint64(32)).astype(np.uint32), compress)
    sections += encode_dictionary(six_high, high[~is4], compress)
    return sections + encode_dictionary(six_low, low[~is4], compress)


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
        """The values numbered so, as (n, width); what the ring has not is arbitrary."""
        return self._data.take(numbers & (len(self._data) - 1), axis=0)

    def has(self, numbers: npt.NDArray[np.int64]) -> Optional[npt.NDArray[np.bool_]]:
        """Which of these numbers the ring has; None when it has them all."""
        if self._whole and (not len(numbers) or int(numbers.min()) >= self._first):
            return None
        has: npt.NDArray[np.bool_] = self._number[numbers & (len(self._number) - 1)] == numbers
        return None if has.all() else has


class Rows:
    """One block's events, decoded column by column. Every error is Damaged."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self.head = columns.block.head
        self.n = self.head.rows

    def ts(self) -> U64:
        """Times of all rows."""
        steps = self._columns.get(Column.TS, self.n, None)
        return np.cumsum(steps, dtype=np.uint64) + np.uint64(self.head.ts)

    def row(self, column: Column) -> Unsigned:
        """A column of all rows: KIND, REASON, DIRECTION, STATE (u1) or STATUS (u4)."""
        return self._columns.get(column, self.n, np.uint32 if column == Column.STATUS else np.uint8)

    def tail(self, is_destroy: npt.NDArray[np.bool_], column: Column) -> tuple[Any, Unsigned]:
        """(rows, values) of OWNER, CGROUP, OVERDUE, TIMEOUT, MARK or IDLE (as stored)."""
        of_destroy = column >= Column.IDLE
        rows = np.flatnonzero(is_destroy if of_destroy else ~is_destroy)
        dtype = np.uint32 if of_destroy else np.uint64
        return rows, self._columns.get(column, len(rows), dtype)

    def numbers(self, is_destroy: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """For each row the number of its tuple, possibly one of an earlier block."""
        first, tuples = self.head.first_tuple, self.head.tuples
        if first >> 62:
            raise Damaged("a tuple number out of range")
        destroys = np.flatnonzero(is_destroy)
        refers = self._columns.get(Column.REFERS, len(destroys), np.uint8) != 0
        distance = self._columns.get(Column.DISTANCE, int(refers.sum()), np.uint32)
        if tuples != self.n - len(distance):
            raise Damaged("tuples and references do not add up")
        if len(distance) and (int(distance.max()) > WINDOW or int(distance.min()) == 0):
            raise Damaged("a reference beyond the window")
        # The n-th row that is no destroy has the n-th tuple.
        out = np.cumsum(~is_destroy, dtype=np.int64)
        out += first - 1
        makers = self.n - len(destroys)
        referred = first + tuples - distance.astype(np.int64)
        if len(distance) < len(destroys):
            of_destroys = np.empty(len(destroys), np.int64)
            of_destroys[~refers] = first + makers + np.arange(tuples - makers)
            of_destroys[refers] = referred
            referred = of_destroys
        out[destroys] = referred
        return out

    def tuples(self) -> npt.NDArray[np.uint64]:
        """The images of the tuples stored here: (tuples, 11) words."""
        n = self.head.tuples
        image = np.zeros((n, IMAGE), np.uint64)
        if not n:
            return image
        get = self._columns.get
        shape = get(Column.SHAPE, n, np.uint8)
        addresses, reply_ports = shape >> ADDRESSES & 3, shape >> PORTS & 3
        if max(int(addresses.max()), int(reply_ports.max())) > STORED:
            raise Damaged("an unknown shape")
        image[:, 0] = get(Column.CT, n, np.uint64)
        for word, bit, *columns in _SIDES:
            image[:, word : word + 2] = self._address(shape & bit != 0, columns)
        mirrored = addresses == MIRRORED
        if mirrored.all():
            image[:, 5:7], image[:, 7:9] = image[:, 3:5], image[:, 1:3]
        else:
            image[mirrored, 5:7], image[mirrored, 7:9] = image[mirrored, 3:5], image[mirrored, 1:3]
            told = np.flatnonzero(addresses == STORED)
            for word, bit, *columns in _REPLY_SIDES:
                image[told, word : word + 2] = self._address(shape[told] & bit != 0, columns)
        ports = np.zeros((n, 4), np.uint16)
        ports[:, 0] = get(Column.SPORT, n, np.uint16)
        ports[:, 1] = get(Column.DPORT, n, np.uint16)
        swapped = reply_ports == MIRRORED
        ports[:, 2] = ports[:, 1] * swapped
        ports[:, 3] = ports[:, 0] * swapped
        told = np.flatnonzero(reply_ports == STORED)
        ports[told, 2] = get(Column.REPLY_SPORT, len(told), np.uint16)
        ports[told, 3] = get(Column.REPLY_DPORT, len(told), np.uint16)
        image[:, 9] = ports.view(np.uint64)[:, 0]
        image[:, 10] = get(Column.NETNS, n, np.uint32)
        for column, dtype, shift in (
            (Column.PROTO, np.uint8, 32),
            (Column.FAMILY, np.uint8, 40),
            (Column.ZONE, np.uint16, 48),
        ):
            image[:, 10] |= get(column, n, dtype).astype(np.uint64) << np.uint64(shift)
        return image

    def tuple_column(self, column: Column) -> npt.NDArray[Any]:
        """One scalar column of the tuples stored here (CT, SPORT, DPORT, NETNS, ...)."""
        return self._columns.get(column, self.head.tuples, TUPLE_DTYPES[column])

    def tuple_address(self, destination: bool) -> npt.NDArray[np.uint64]:
        """The source or destination of the tuples stored here: (tuples, 2) words."""
        _, bit, *columns = _SIDES[destination]
        shape = self._columns.get(Column.SHAPE, self.head.tuples, np.uint8)
        return self._address(shape & bit != 0, columns)

    def _address(self, is4: npt.NDArray[np.bool_], columns: list[Any]) -> U64:
        four, six_high, six_low = columns
        out = np.empty((len(is4), 2), np.uint64)
        count = int(is4.sum())
        low = self._columns.get(four, count, np.uint32).astype(np.uint64)
        low = low << np.uint64(32) | _MAPPED
        if count == len(is4):
            out[:, 0], out[:, 1] = 0, low
            return out
        out[is4, 0], out[is4, 1] = 0, low
        out[~is4, 0] = self._columns.get(six_high, len(is4) - count, np.uint64)
        out[~is4, 1] = self._columns.get(six_low, len(is4) - count, np.uint64)
        return out

    def events(self, window: Ring) -> tuple[Events, Optional[npt.NDArray[np.bool_]]]:
        """All rows as records, and which of them have their tuple (None: all).

        ``window`` holds the tuples of the blocks before and gets this block's. A row
        whose tuple is neither there nor here has lost it with a block that is damaged.
        """
        kind = self.row(Column.KIND)
        is_destroy = kind == Kind.DESTROY
        numbers = self.numbers(is_destroy)
        out = np.empty((self.n, WORDS), np.uint64)
        out[:, 0] = self.ts()
        out[:, 12] = self.row(Column.STATE)
        out[:, 12] <<= np.uint64(8)
        out[:, 12] |= self.row(Column.DIRECTION)
        out[:, 12] <<= np.uint64(48)
        out[:, 12] |= self.row(Column.REASON).astype(np.uint64) << np.uint64(8)
        out[:, 12] |= kind
        status = self.row(Column.STATUS).astype(np.uint64) << np.uint64(32)
        for word, column in ((13, Column.OWNER), (14, Column.CGROUP)):
            rows, values = self.tail(is_destroy, column)
            out[rows, word] = values
        rows, overdue = self.tail(is_destroy, Column.OVERDUE)
        timeout = self.tail(is_destroy, Column.TIMEOUT)[1]
        idle = self.tail(is_destroy, Column.IDLE)[1] + timeout + overdue
        mark = self.tail(is_destroy, Column.MARK)[1]
        out[rows, 13] = np.column_stack((idle, overdue)).view(np.uint64)[:, 0]
        out[rows, 14] = np.column_stack((timeout, mark)).view(np.uint64)[:, 0]
        # Everything that can be wrong has been read: only now may the window change.
        window.append(self.head.first_tuple, self.tuples())
        known = window.has(numbers)
        image = window.take(numbers)
        out[:, 1:11] = image[:, :10]
        out[:, 11] = image[:, 10] & _LOW32 | status
        out[:, 12] |= image[:, 10] >> np.uint64(32) << np.uint64(16)
        return out.view(RECORD)[:, 0], known


TUPLE_DTYPES: Final[dict[Column, Any]] = {
    Column.CT: np.uint64,
    Column.SPORT: np.uint16,
    Column.DPORT: np.uint16,
    Column.NETNS: np.uint32,
    Column.ZONE: np.uint16,
    Column.PROTO: np.uint8,
    Column.FAMILY: np.uint8,
}
