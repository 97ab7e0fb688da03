"""The recording format, version 1.

The promise, which tests/recording holds us to:

* A recording is append-only. It is a signature followed by blocks, and nothing
  that was written is ever changed.
* Each block checks itself: a CRC-32 over its header and directory, and one over
  each section. A block is used whole or not at all.
* After a crash, ``kill -9`` or a power cut at any byte, everything up to the last
  complete block is readable, and the reader says how much is missing. A damaged
  block in the middle costs itself alone (and the destroys that refer to it): the
  events lost are counted by the row numbers on both sides.
* A full disk ends the recording with one line and keeps what is there.
* A file that is being written can be read; reading again finds what came since.
* A later version reads earlier files. An earlier one says which version it needs:
  the signature, the major number after it and ``needs`` in the first block keep
  their places for ever. Blocks, sections and fields that a reader does not know
  are skipped, so a minor number may add them.
* A file from a stranger is input: no pickle, every length is checked against a
  limit before anything is allocated, every reference against its range.

Layout, all little-endian::

    file      signature (11 bytes b"\\x89ctrace\\r\\n\\x1a\\n"), major u8, minor u8, 3 zero bytes
              block...  (the first is HEAD; after a clean end the last is FOOT)
              trailer   (after a clean end: offset of FOOT u64, b"ctraceEF")
    block     header    BLOCK below
              directory ENTRY below, one per section
              crc       u32 over header and directory
              section...
    section   one byte plane of a column, or a blob; stored raw, zlib or zstd

A column of n unsigned integers is stored as its low byte planes; the bytes above
are the same in all rows and stand in the directory (``base``), so a constant
column has no section data at all. A column with few distinct values is a
dictionary (id | TABLE) and a column of codes.

Blocks of kind BATCHES hold the events of one or more batches, at most about one
second's or MAX_ROWS. Row columns have ``rows`` values. An entry's tuple (with its
identity and namespace) is stored once: ``tuples`` counts those that this block
stores, and a destroy whose insert is among the last WINDOW tuples refers to it by
distance. To read a block in the middle of a file, read the tuples of the blocks
before it back to WINDOW of them; nothing else crosses blocks.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple, Union

from ctrace.errors import CtraceError

SIGNATURE: Final = b"\x89ctrace\r\n\x1a\n"
MAJOR: Final = 1
MINOR: Final = 0
FILE_HEAD: Final = SIGNATURE + bytes((MAJOR, MINOR)) + bytes(3)
TRAILER: Final = struct.Struct("<Q8s")
TRAILER_MAGIC: Final = b"ctraceEF"

MAGIC: Final = b"\xc7tB\n"
BLOCK: Final = struct.Struct("<4sHHIIIIQQQQQ")
"""magic, kind, sections, length of the whole block, rows, tuples, batches ended in it,
number of its first row, tuple and batch, time of its first row and of its last batch."""
ENTRY: Final = struct.Struct("<HBBIIIQ")
"""column, plane, codec, values, stored bytes, CRC-32 of those, base."""
CRC: Final = struct.Struct("<I")

WINDOW: Final = 1 << 19
"""Tuples. A destroy may refer to one this far back."""
MAX_ROWS: Final = 1 << 16
"""Rows that a writer puts in one block."""

# What a reader accepts. A writer stays far below.
LIMIT_ROWS: Final = 1 << 17
LIMIT_SECTIONS: Final = 1024
LIMIT_BLOCK: Final = 64 << 20
LIMIT_BLOB: Final = 16 << 20
LIMIT_BATCH: Final = 1 << 22
"""Events in one batch; a writer splits larger ones."""
LIMIT_TIME: Final = 1 << 62
"""Nanoseconds: year 2116 counted from 1970, and any uptime."""
LIMIT_RESYNC: Final = 10_000
"""Positions tried for the next block after damage, in the whole file."""


class BlockKind(IntEnum):
    """What a block holds."""

    HEAD = 1
    BATCHES = 2
    RULESET = 3
    NOTE = 4
    PERF = 5
    """What conntrack cost on a host, up to this point of the recording."""
    FOOT = 6


class Codec(IntEnum):
    """How a section's bytes are stored."""

    RAW = 0
    ZLIB = 1
    ZSTD = 2


class Column(IntEnum):
    """Section ids of a BATCHES block and the blobs of the others."""

    # One value per row.
    TS = 1
    KIND = 2
    REASON = 3
    DIRECTION = 4
    STATE = 5
    STATUS = 6
    # One value per row that is no destroy.
    OWNER = 10
    CGROUP = 11
    # One value per destroy.
    IDLE = 12
    """idle_ms - timeout_ms - overdue_ms: near zero when the entry simply expired."""
    OVERDUE = 13
    TIMEOUT = 14
    MARK = 15
    REFERS = 16
    """1 where the destroy's tuple is stored with its insert."""
    DISTANCE = 17
    """One value per such destroy: this block's first tuple + tuples - the tuple's number."""
    # One value per tuple stored here.
    CT = 20
    SHAPE = 21
    SPORT = 22
    DPORT = 23
    NETNS = 24
    ZONE = 25
    PROTO = 26
    FAMILY = 27
    # One value per port pair or address that the shape calls for.
    REPLY_SPORT = 28
    REPLY_DPORT = 29
    SRC4 = 30
    SRC_HIGH = 31
    SRC_LOW = 32
    DST4 = 33
    DST_HIGH = 34
    DST_LOW = 35
    REPLY_SRC4 = 36
    REPLY_SRC_HIGH = 37
    REPLY_SRC_LOW = 38
    REPLY_DST4 = 39
    REPLY_DST_HIGH = 40
    REPLY_DST_LOW = 41
    # Blobs.
    BATCHES = 64
    COUNTS = 65
    TABLES = 66
    NAMES = 67
    JSON = 68
    TEXT = 69
    INDEX = 70
    BESIDE = 72
    """Readings of rules and tables together; earlier readers skip it."""


TABLE: Final = 0x100
"""Added to a column's id: its dictionary."""


class Damaged(Exception):
    """A block that does not hold what it claims. Never leaves ctrace.recording."""


class FormatError(CtraceError):
    """The file cannot be read at all: not a recording, or of another version."""


Buffer = Union[bytes, memoryview]

Read = Callable[[int, int], Buffer]
"""(offset, length) to the bytes there."""

Expand = Callable[[int, Buffer, int], Buffer]
"""(codec, stored bytes, length) to the bytes of a section. Raises Damaged."""


class Section(NamedTuple):
    """One byte plane, or a blob, as it stands in the file."""

    column: int
    plane: int
    codec: int
    values: int
    base: int
    data: Buffer

    def entry(self) -> bytes:
        """Its line of the directory."""
        return ENTRY.pack(
            self.column,
            self.plane,
            self.codec,
            self.values,
            len(self.data),
            zlib.crc32(self.data),
            self.base,
        )


@dataclass(frozen=True)
class BlockHead:
    """A block's header; numbers not used by its kind are 0."""

    kind: int
    rows: int = 0
    tuples: int = 0
    batches: int = 0
    first_row: int = 0
    first_tuple: int = 0
    first_batch: int = 0
    ts: int = 0
    until: int = 0

    def pack(self, sections: list[Section]) -> list[Buffer]:
        """The block as buffers for one writev."""
        directory = b"".join(section.entry() for section in sections)
        length = BLOCK.size + len(directory) + CRC.size + sum(len(s.data) for s in sections)
        head = BLOCK.pack(
            MAGIC,
            self.kind,
            len(sections),
            length,
            self.rows,
            self.tuples,
            self.batches,
            self.first_row,
            self.first_tuple,
            self.first_batch,
            self.ts,
            self.until,
        )
        head += directory
        return [head + CRC.pack(zlib.crc32(head)), *(s.data for s in sections if len(s.data))]


class Entry(NamedTuple):
    """Where one section stands."""

    plane: int
    codec: int
    values: int
    offset: int
    stored: int
    crc: int
    base: int


@dataclass(frozen=True)
class Block:
    """A block with an intact header and directory."""

    offset: int
    length: int
    head: BlockHead
    columns: dict[int, list[Entry]]


class File:
    """A file read by position. Not mapped: one that shrinks while it is read must not kill us."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size = os.fstat(fd).st_size

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``, fewer at the end of the file."""
        return os.pread(self.fd, length, offset)

    def load(self, block: Block) -> Read:
        """Load a whole block into memory, to be read by the same positions."""
        data = memoryview(self.read(block.offset, block.length))

        def read(offset: int, length: int) -> memoryview:
            return data[offset - block.offset : offset - block.offset + length]

        return read


def read_block(file: File, offset: int) -> Block:
    """The block at ``offset`` of a file. Raises Damaged unless it is complete and intact.

    Sections are not touched: their own CRC is checked when they are read.
    """
    data = file.read(offset, 4096)
    if len(data) < BLOCK.size + CRC.size:
        raise Damaged("the file ends inside a block")
    fields = BLOCK.unpack_from(data)
    magic, kind, sections, length = fields[:4]
    if magic != MAGIC:
        raise Damaged("no block begins here")
    if not BLOCK.size + CRC.size <= length <= LIMIT_BLOCK or sections > LIMIT_SECTIONS:
        raise Damaged("a block larger than the limits")
    if offset + length > file.size:
        raise Damaged("the file ends inside a block")
    end = BLOCK.size + sections * ENTRY.size
    if end + CRC.size > length:
        raise Damaged("a directory larger than its block")
    if end + CRC.size > len(data):
        data = file.read(offset, end + CRC.size)
        if end + CRC.size > len(data):
            raise Damaged("the file ends inside a block")
    if zlib.crc32(data[:end]) != CRC.unpack_from(data, end)[0]:
        raise Damaged("a header fails its check")
    head = BlockHead(kind, *fields[4:])
    if head.rows > LIMIT_ROWS or head.tuples > head.rows or head.batches > LIMIT_ROWS:
        raise Damaged("a block larger than the limits")
    if head.ts > LIMIT_TIME or head.until > LIMIT_TIME:
        raise Damaged("a time out of range")
    columns: dict[int, list[Entry]] = {}
    place = offset + end + CRC.size
    for column, plane, codec, values, stored, crc, base in ENTRY.iter_unpack(
        data[BLOCK.size : end]
    ):
        columns.setdefault(column, []).append(Entry(plane, codec, values, place, stored, crc, base))
        place += stored
    if place != offset + length:
        raise Damaged("sections and block differ in length")
    return Block(offset, length, head, columns)


def read_section(read: Read, entry: Entry, expand: Expand, limit: int) -> Buffer:
    """A section's bytes, checked. Raises Damaged."""
    if entry.values > limit:
        raise Damaged("a section larger than the limits")
    stored = read(entry.offset, entry.stored)
    if len(stored) != entry.stored or zlib.crc32(stored) != entry.crc:
        raise Damaged("a section fails its check")
    return expand(entry.codec, stored, entry.values)
