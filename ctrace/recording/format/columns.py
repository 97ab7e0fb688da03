"""Columns of unsigned integers as byte planes, constants and dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
import numpy.typing as npt

from ctrace.recording.format.codecs import Compressor, Decompressor
from ctrace.recording.format.layout import (
    LIMIT_ROWS,
    TABLE,
    Block,
    Damaged,
    Entry,
    Read,
    Section,
    read_section,
)

Unsigned = npt.NDArray[Any]
"""A contiguous array of u1, u2, u4 or u8."""

CONSTANT = 0xFF
"""Plane number of a column whose values all equal the base."""

_HASH_BITS = 15
_HASH = 0x9E3779B97F4A7C15


def encode(column: int, values: Unsigned, compress: Compressor) -> list[Section]:
    """The planes of a column; nothing at all for an empty one."""
    n = len(values)
    if n == 0:
        return []
    low, high = int(values.min()), int(values.max())
    differing = (low ^ high).bit_length()
    if differing == 0:
        return [Section(column, CONSTANT, 0, n, low, b"")]
    planes = (differing + 7) // 8
    base = low >> 8 * planes << 8 * planes
    raw = np.ascontiguousarray(values).view(np.uint8).reshape(n, -1)
    sections = []
    for plane in range(planes):
        codec, data = compress(raw[:, plane].tobytes())
        sections.append(Section(column, plane, codec, n, base if plane == 0 else 0, data))
    return sections


def encode_dictionary(column: int, values: Unsigned, compress: Compressor) -> list[Section]:
    """A column as codes into a table, if it repeats itself enough."""
    coded = dictionary(values) if len(values) >= 64 else None
    if coded is None:
        return encode(column, values, compress)
    table, codes = coded
    return encode(column, codes, compress) + encode(column | TABLE, table, compress)


def dictionary(values: Unsigned) -> Optional[tuple[Unsigned, Unsigned]]:
    """(distinct values, codes), or None when more than a quarter are distinct.

    Codes of many values are by frequency, so that their high byte seldom changes.

    A direct-mapped hash table finds nearly all repeats in one pass; sorting, several
    times as slow, sees only what collided.
    """
    n = len(values)
    if values.min() == values.max():
        return None
    few = _few(values)
    if few is not None:
        return few
    # As wide as need be: the product of 32-bit numbers takes half as long.
    wide = values if values.itemsize == 8 else values.astype(np.uint32, copy=False)
    bits = min(_HASH_BITS, n.bit_length())
    hashed = wide * wide.dtype.type(_HASH >> 8 * (8 - wide.itemsize))
    hashed >>= wide.dtype.type(8 * wide.itemsize - bits)
    place = hashed.astype(np.intp)
    slots = np.zeros(1 << bits, wide.dtype)
    slots[place] = wide
    missed = np.flatnonzero(slots.take(place) != wide)
    if len(missed) > n // 4:
        return None
    others = np.empty(0, wide.dtype)
    if len(missed):
        others, inverse = np.unique(wide.take(missed), return_inverse=True)
        place[missed] = len(slots) + inverse
    counts = np.bincount(place, minlength=len(slots) + len(others))
    used = np.flatnonzero(counts != 0)
    if len(used) > n // 4 or len(used) > 1 << 16:
        return None
    used = used[np.argsort(-counts[used], kind="stable")]
    rank = np.empty(len(counts), np.uint16 if len(used) > 256 else np.uint8)
    rank[used] = np.arange(len(used))
    table = np.concatenate((slots, others))[used].astype(values.dtype)
    return table, rank.take(place)


def _few(values: Unsigned) -> Optional[tuple[Unsigned, Unsigned]]:
    """The same where a handful of values, all among the first ones, make up the column.

    In the order of their first appearance: columns that change together get equal codes.
    """
    head = values[:512]
    table = np.unique(head)
    if len(table) > 6:
        return None
    table = table[np.argsort([(head == value).argmax() for value in table])]
    codes = np.zeros(len(values), np.uint8)
    found = int(np.count_nonzero(values == table[0]))
    for code, value in enumerate(table[1:], 1):
        here = values == value
        found += int(np.count_nonzero(here))
        codes += here.view(np.uint8) * np.uint8(code)
    return (table, codes) if found == len(values) else None


class Columns:
    """The columns of one block, decoded on request. Every error is Damaged."""

    def __init__(self, read: Read, block: Block, expand: Decompressor) -> None:
        self._read, self.block, self._expand = read, block, expand

    def __contains__(self, column: int) -> bool:
        return column in self.block.columns

    def get(self, column: int, n: int, dtype: Optional[npt.DTypeLike]) -> Unsigned:
        """``n`` values of a column as ``dtype`` (None: as narrow as they are stored).

        Raises Damaged when the column is missing, has another length, or holds
        values that ``dtype`` has no room for.
        """
        wanted = None if dtype is None else np.dtype(dtype)
        if column | TABLE not in self:
            return self._planes(column, n, wanted)
        codes = self._planes(column, n, None)
        table = self._planes(column | TABLE, self.block.columns[column | TABLE][0].values, wanted)
        if len(codes) and int(codes.max()) >= len(table):
            raise Damaged("a code beyond its dictionary")
        if codes.itemsize == table.itemsize == 1:  # several times as fast as taking them
            by_code = table.tobytes().ljust(256, b"\0")
            return np.frombuffer(codes.tobytes().translate(by_code), np.uint8)
        return table.take(codes)

    def _planes(self, column: int, n: int, wanted: Optional[np.dtype[Any]]) -> Unsigned:
        entries: Sequence[Entry] = self.block.columns.get(column, ())
        if not 0 <= n <= LIMIT_ROWS:
            raise Damaged("more rows than the limits")
        if not entries:
            if n:
                raise Damaged(f"column {column} is missing")
            return np.empty(0, wanted or np.uint8)
        if any(entry.values != n for entry in entries):
            raise Damaged(f"column {column} has another length than its block")
        constant = entries[0].plane == CONSTANT
        planes = 0 if constant else len(entries)
        if constant and (len(entries) > 1 or entries[0].stored):
            raise Damaged(f"column {column} is constant and is not")
        if not constant and [entry.plane for entry in entries] != list(range(planes)):
            raise Damaged(f"column {column} lacks a plane")
        base = entries[0].base
        least = max(planes, (base.bit_length() + 7) // 8, 1)
        if least > (wanted.itemsize if wanted else 8):
            raise Damaged(f"column {column} holds values out of range")
        narrow = np.dtype(f"<u{1 if least == 1 else 2 if least == 2 else 4 if least < 5 else 8}")
        if constant:
            return np.full(n, base, wanted or narrow)
        data = [
            np.frombuffer(read_section(self._read, entry, self._expand, LIMIT_ROWS), np.uint8)
            for entry in entries
        ]
        if planes == 1 and base == 0:
            values = data[0]
        else:
            values = np.full(n, base, narrow) if base else np.zeros(n, narrow)
            raw = values.view(np.uint8).reshape(n, narrow.itemsize)
            for plane, part in enumerate(data):
                raw[:, plane] = part
        return values if wanted is None else values.astype(wanted, copy=False)

    def blob(self, column: int, limit: int) -> bytes:
        """A blob's bytes; empty when the block has none. Raises Damaged."""
        entries = self.block.columns.get(column)
        if not entries:
            return b""
        return bytes(read_section(self._read, entries[0], self._expand, limit))


def encode_blob(column: int, data: bytes, compress: Compressor) -> list[Section]:
    """A blob as a section; nothing for an empty one."""
    if not data:
        return []
    codec, stored = compress(data)
    return [Section(column, 0, codec, len(data), 0, stored)]
