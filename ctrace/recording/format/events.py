"""Events to columns and back, exactly: 120 bytes become about seven.

What makes them small: an entry's destroy refers to the tuple stored with its
insert; a reply tuple that mirrors the original is one bit pattern; IPv4 is four
bytes; of times only the steps are kept; and columns are compressed apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.record import RECORD, WORDS, Events, Kind, words
from ctrace.recording.format.codecs import Compressor
from ctrace.recording.format.columns import Columns, Unsigned, encode, encode_dictionary
from ctrace.recording.format.layout import WINDOW, BlockHead, Column, Damaged, Section
from ctrace.recording.format.window import IMAGE, U64, Image, Ring, TupleIndex

_LOW32 = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_MAPPED = np.uint64(0xFFFF0000)
_TILE = 1024

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
    """Arrays of records as (15, n) words, in tiles that stay in cache; in ``room`` if they fit.

    The reply's addresses become what differs from the original's turned round: nothing
    but where NAT was.
    """
    n = sum(map(len, parts))
    fits = room is not None and n <= room.shape[1]
    out = room[:, :n] if room is not None and fits else np.empty((WORDS, n), np.uint64)
    at = 0
    for part in parts:
        rows = words(part)
        for i in range(0, len(rows), _TILE):
            tile = rows[i : i + _TILE]
            turned = out[:, at : at + len(tile)]
            turned[:] = tile.T
            turned[6:8] ^= turned[4:6]
            turned[8:10] ^= turned[2:4]
            at += len(tile)
    return out


def tuple_words(table: U64) -> list[Optional[U64]]:
    """The tuples of a :func:`transposed` table as :data:`ctrace.recording.format.window.Image`."""
    rest = table[12] >> np.uint64(16)
    rest <<= _32
    rest |= table[11] & _LOW32
    return [word if word.any() else None for word in (*table[1:11], rest)]


def encode_events(
    table: U64, index: TupleIndex, compress: Compressor
) -> tuple[list[Section], BlockHead]:
    """The sections of these rows, and a header with the fields derived from them.

    ``table`` is (15, n) words as :func:`transposed` gives them, or a slice of that.
    """
    n = table.shape[1]
    first_tuple = index.total
    kind = _byte(table[12], 0)
    image = tuple_words(table)
    is_destroy = kind == Kind.DESTROY
    makers, destroys = np.flatnonzero(~is_destroy), np.flatnonzero(is_destroy)
    stored, refers, distance = index.place(image, makers, destroys)

    steps = np.empty(n, np.uint64)
    steps[0] = 0
    np.subtract(table[0, 1:], table[0, :-1], out=steps[1:])
    sections = encode(Column.TS, steps, compress)
    # Where reason follows from kind, and status, both have the same codes.
    sections += encode_dictionary(Column.KIND, kind, compress)
    sections += encode_dictionary(Column.REASON, _byte(table[12], 1), compress)
    sections += encode(Column.DIRECTION, _byte(table[12], 6), compress)
    sections += encode(Column.STATE, _byte(table[12], 7), compress)
    sections += encode_dictionary(Column.STATUS, _half(table[11], 1), compress)
    sections += encode_dictionary(Column.OWNER, table[13].take(makers), compress)
    sections += encode_dictionary(Column.CGROUP, table[14].take(makers), compress)
    sections += _encode_ends(table[13].take(destroys), table[14].take(destroys), compress)
    sections += encode(Column.REFERS, refers.view(np.uint8), compress)
    sections += encode(Column.DISTANCE, distance, compress)
    taken = [None if word is None else word.take(stored) for word in image]
    sections += _encode_tuples(taken, len(stored), compress)
    return sections, BlockHead(
        0, rows=n, tuples=len(stored), first_tuple=first_tuple, ts=int(table[0, 0])
    )


def _encode_ends(times: U64, rest: U64, compress: Compressor) -> list[Section]:
    idle, overdue = _half(times, 0), _half(times, 1)
    timeout, mark = _half(rest, 0), _half(rest, 1)
    return (
        encode(Column.IDLE, idle - timeout - overdue, compress)
        + encode(Column.OVERDUE, overdue, compress)
        + encode_dictionary(Column.TIMEOUT, timeout, compress)
        + encode_dictionary(Column.MARK, mark, compress)
    )


def _half(word: U64, i: int) -> Unsigned:
    return np.ascontiguousarray(word.view(np.uint32)[i::2])


def _byte(word: U64, i: int) -> Unsigned:
    return np.ascontiguousarray(word.view(np.uint8)[i::8])


def _mapped(high: Optional[U64], low: U64) -> npt.NDArray[np.bool_]:
    is4: npt.NDArray[np.bool_] = (low & _LOW32) == _MAPPED
    if high is not None:
        is4 &= high == 0
    return is4


def _encode_tuples(image: Image, n: int, compress: Compressor) -> list[Section]:
    shape = np.zeros(n, np.uint8)
    sections: list[Section] = []
    for word, bit, *columns in _SIDES:
        is4, address = _encode_address(image[word], image[word + 1], n, columns, compress)
        shape |= is4.view(np.uint8) * np.uint8(bit)
        sections += address
    if any(word is not None for word in image[5:9]):
        sections += _encode_replies(image, n, shape, compress)
    identity, words, rest = (_whole(image[i], n) for i in (0, 9, 10))
    ports = words.view(np.uint16).reshape(-1, 4)
    mirrored = (ports[:, 2] == ports[:, 1]) & (ports[:, 3] == ports[:, 0])
    if not mirrored.all():
        zero = (ports[:, 2] | ports[:, 3]) == 0
        told = np.where(mirrored, MIRRORED, np.where(zero, ZERO, STORED)).astype(np.uint8)
        shape |= told << PORTS
        rows = np.flatnonzero(told == STORED)
        sections += encode(Column.REPLY_SPORT, ports[rows, 2], compress)
        sections += encode(Column.REPLY_DPORT, ports[rows, 3], compress)
    return (
        sections
        + encode(Column.SHAPE, shape, compress)
        + encode(Column.CT, identity, compress)
        + encode(Column.SPORT, np.ascontiguousarray(ports[:, 0]), compress)
        + encode_dictionary(Column.DPORT, np.ascontiguousarray(ports[:, 1]), compress)
        + encode_dictionary(Column.NETNS, _half(rest, 0), compress)
        + encode_dictionary(Column.PROTO, _byte(rest, 4), compress)
        + encode(Column.FAMILY, _byte(rest, 5), compress)
        + encode(Column.ZONE, np.ascontiguousarray(rest.view(np.uint16)[3::4]), compress)
    )


def _whole(word: Optional[U64], n: int) -> U64:
    return np.zeros(n, np.uint64) if word is None else word


def _encode_replies(
    image: Image, n: int, shape: npt.NDArray[np.uint8], compress: Compressor
) -> list[Section]:
    """The replies' addresses that do not mirror the original; their codes go into ``shape``."""
    words = [_whole(word, n) for word in image]
    differs = (words[5] | words[6] | words[7] | words[8]) != 0
    reply = {
        5: words[5] ^ words[3],
        6: words[6] ^ words[4],
        7: words[7] ^ words[1],
        8: words[8] ^ words[2],
    }
    zero = (reply[5] | reply[6] | reply[7] | reply[8]) == 0
    addresses = np.where(differs, np.where(zero, ZERO, STORED), MIRRORED).astype(np.uint8)
    shape |= addresses << ADDRESSES
    told = np.flatnonzero(addresses == STORED)
    sections: list[Section] = []
    for word, bit, *columns in _REPLY_SIDES:
        high, low = reply[word].take(told), reply[word + 1].take(told)
        is4, address = _encode_address(high, low, len(told), columns, compress)
        shape[told] |= is4.view(np.uint8) * np.uint8(bit)
        sections += address
    return sections


def _encode_address(
    high: Optional[U64], low: Optional[U64], n: int, columns: list[Any], compress: Compressor
) -> tuple[npt.NDArray[np.bool_], list[Section]]:
    """Which of these addresses are IPv4, and all of them."""
    four, six_high, six_low = columns
    low = _whole(low, n)
    is4 = _mapped(high, low)
    if is4.all():
        return is4, encode_dictionary(four, _half(low, 1), compress)
    sections = encode_dictionary(four, _half(low[is4], 1), compress)
    sections += encode_dictionary(six_high, _whole(high, n)[~is4], compress)
    return is4, sections + encode_dictionary(six_low, low[~is4], compress)


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
        """For each row the number of its tuple, which may be in an earlier block."""
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
