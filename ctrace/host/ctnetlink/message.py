"""ctnetlink messages to records, with numpy: no Python per message.

Messages with the same attributes in the same order (a *layout*) have every field at
the same offset. One message of each layout is parsed; the others are compared with
it in one vectorised step, header word by header word, and decoded by column. A real
table has a dozen layouts. Attribute numbers: linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from ctrace.record import RECORD, STATE_UNKNOWN, WORDS, Events, empty, words

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]
Path = tuple[int, ...]

ORIG, REPLY, STATUS, PROTOINFO, TIMEOUT, MARK, ID, ZONE, TIMESTAMP = 1, 2, 3, 4, 7, 8, 12, 18, 20
NESTED: Final = frozenset(
    [(tuple_,) for tuple_ in (ORIG, REPLY)]
    + [(tuple_, part) for tuple_ in (ORIG, REPLY) for part in (1, 2)]
    + [(PROTOINFO,), (PROTOINFO, 1), (TIMESTAMP,)]
)
"""Attributes whose inside is read; any other is skipped as a whole."""
HEADER: Final = 20
"""struct nlmsghdr and struct nfgenmsg."""
LAYOUTS: Final = 64
"""Layouts cached per message length; beyond that, a layout is parsed anew each time."""


@dataclass(frozen=True)
class Decoded:
    """What messages say, one row each, in the order given."""

    events: Events
    """Tuples, ct (CTA_ID), status, proto, family, zone, state; the rest is zero."""
    kind: npt.NDArray[np.uint16]
    """nlmsg_type's low byte: IPCTNL_MSG_CT_NEW is 0, _DELETE is 2."""
    flags: npt.NDArray[np.uint16]
    portid: U32
    """Netlink port of the program that caused it; 0: the kernel itself."""
    left: npt.NDArray[np.int32]
    """CTA_TIMEOUT, seconds until the entry expires; -1 when not told."""
    mark: U32
    start: npt.NDArray[np.uint64]
    """CTA_TIMESTAMP_START, ns since the epoch; 0 unless nf_conntrack_timestamp is on."""


@dataclass(frozen=True)
class _Layout:
    """Where one kind of message has each field."""

    headers: npt.NDArray[np.intp]
    """Word index of every attribute header."""
    expected: U32
    """The words found there."""
    at: dict[Path, int]
    """Byte offset of each value."""


class Decoder:
    """Decodes batches of messages; remembers the layouts that it has seen."""

    def __init__(self) -> None:
        self._layouts: dict[int, list[_Layout]] = {}

    def decode(self, data: U8, starts: I64, lengths: I64) -> Decoded:
        """Decode the messages at byte offsets ``starts`` (multiples of 4) of ``data``.

        ``data`` is contiguous, 4-byte aligned, and long enough for the last message
        rounded up to 4. A message cut short decodes as zeros with proto 0.
        """
        n = len(starts)
        out = Decoded(
            empty(n),
            np.zeros(n, np.uint16),
            np.zeros(n, np.uint16),
            np.zeros(n, np.uint32),
            np.full(n, -1, np.int32),
            np.zeros(n, np.uint32),
            np.zeros(n, np.uint64),
        )
        stream = data.view(np.uint32)
        for length in np.unique(lengths):
            if length < HEADER:
                continue
            rows = np.flatnonzero(lengths == length)
            size = (int(length) + 3) // 4
            block = stream[(starts[rows] // 4)[:, None] + np.arange(size)]
            self._same_length(int(length), rows, block, out)
        return out

    def _same_length(self, length: int, rows: I64, block: U32, out: Decoded) -> None:
        known = self._layouts.setdefault(length, [])
        tried = 0
        while len(rows):
            if tried == len(known):
                if len(known) >= LAYOUTS:
                    known.clear()
                    tried = 0
                known.append(_parse(block[0].tobytes()[:length]))
            layout = known[tried]
            tried += 1
            fits = (block[:, layout.headers] == layout.expected).all(axis=1)
            if fits.all():
                _fill(layout, rows, block, out)
                return
            if fits.any():
                _fill(layout, rows[fits], np.ascontiguousarray(block[fits]), out)
                rows, block = rows[~fits], block[~fits]


def _parse(message: bytes) -> _Layout:
    """The layout of one message. A malformed attribute ends its level, as in libnl."""
    headers: list[int] = []
    at: dict[Path, int] = {}

    def level(start: int, end: int, parent: Path) -> None:
        here = start
        while here + 4 <= end:
            size, kind = struct.unpack_from("=HH", message, here)
            headers.append(here // 4)
            if size < 4 or here + size > end:
                return
            path = (*parent, kind & 0x3FFF)
            if path in NESTED:
                level(here + 4, here + size, path)
            else:
                at[path] = here + 4
            here += (size + 3) & ~3

    level(HEADER, len(message), ())
    stream = np.frombuffer(message.ljust((len(message) + 3) & ~3, b"\0"), np.uint32)
    index = np.array(headers, np.intp)
    return _Layout(index, stream[index], at)


def _fill(layout: _Layout, rows: I64, block: U32, out: Decoded) -> None:
    """Decode messages of one layout into ``rows`` of ``out``."""
    columns = _Columns(block)
    part = empty(len(rows))
    _tuples(layout.at, columns, part)
    part["family"] = columns.raw[:, 16]
    part["state"] = STATE_UNKNOWN
    for path, name, read in (
        ((ORIG, 2, 1), "proto", columns.u8),
        ((PROTOINFO, 1, 1), "state", columns.u8),
        ((STATUS,), "status", columns.be32),
        ((ID,), "ct", columns.be32),
        ((ZONE,), "zone", columns.be16),
        ((ORIG, 3), "zone", columns.be16),
    ):
        if path in layout.at:
            part[name] = read(layout.at[path])
    # Whole records as 64-bit words: several times as fast as a structured copy.
    out.events.view(np.uint64).reshape(-1, WORDS)[rows] = words(part)
    out.kind[rows] = block[:, 1] & 0xFF
    out.flags[rows] = block[:, 1] >> 16
    out.portid[rows] = block[:, 3]
    for path, column, wide in (
        ((TIMEOUT,), out.left, columns.be32),
        ((MARK,), out.mark, columns.be32),
        ((TIMESTAMP, 1), out.start, columns.be64),
    ):
        if path in layout.at:
            column[rows] = wide(layout.at[path])


def _tuples(at: dict[Path, int], columns: _Columns, part: Events) -> None:
    """Both directions' addresses and ports."""
    octets = part.view(np.uint8).reshape(-1, RECORD.itemsize)
    for side, first, prefix in ((ORIG, 16, ""), (REPLY, 48, "reply_")):
        for attribute, start in ((1, first), (2, first + 16)):  # IPv4
            if (side, 1, attribute) in at:
                octets[:, start + 10 : start + 12] = 0xFF
                octets[:, start + 12 : start + 16] = columns.octets(at[side, 1, attribute], 4)
        for attribute, start in ((3, first), (4, first + 16)):  # IPv6
            if (side, 1, attribute) in at:
                octets[:, start : start + 16] = columns.octets(at[side, 1, attribute], 16)
        sport, dport = prefix + "sport", prefix + "dport"
        # Ports, the identifier of ICMP and of ICMPv6
        for attribute, name in ((2, sport), (3, dport), (4, sport), (7, sport)):
            if (side, 2, attribute) in at:
                part[name] = columns.be16(at[side, 2, attribute])
        for kind, code in ((5, 6), (8, 9)):  # type and code of ICMP and of ICMPv6
            if (side, 2, kind) in at and (side, 2, code) in at:
                high = columns.u8(at[side, 2, kind]).astype(np.uint16) << np.uint16(8)
                part[dport] = high | columns.u8(at[side, 2, code])


class _Columns:
    """Values at a byte offset of every message, in host order."""

    def __init__(self, block: U32) -> None:
        self.block = block
        self.raw: U8 = block.view(np.uint8).reshape(len(block), -1)

    def octets(self, at: int, n: int) -> U8:
        return self.raw[:, at : at + n]

    def u8(self, at: int) -> U8:
        return self.raw[:, at]

    def be16(self, at: int) -> npt.NDArray[np.uint16]:
        return (self.raw[:, at].astype(np.uint16) << np.uint16(8)) | self.raw[:, at + 1]

    def be32(self, at: int) -> U32:
        return np.ascontiguousarray(self.block[:, at // 4]).byteswap()

    def be64(self, at: int) -> npt.NDArray[np.uint64]:
        return self.be32(at).astype(np.uint64) << np.uint64(32) | self.be32(at + 4)
