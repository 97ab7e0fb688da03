"""The record: one numpy dtype for ``struct ctrace_record`` in bpf/record.h.

Everything after a source is arithmetic on arrays of this dtype. Sixteen-byte
addresses hold IPv4 as ``::ffff:a.b.c.d``; ports are in host order; times are
nanoseconds of CLOCK_BOOTTIME.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Events = npt.NDArray[np.void]
"""A one-dimensional array of :data:`RECORD`."""


class Kind(IntEnum):
    """What happened to an entry (``enum ctrace_kind``)."""

    INSERT = 1
    DESTROY = 2
    DROP = 3
    INSERT_FAILED = 4
    EXISTING = 5
    """Was there when its table was first read. With reason NEW, it was made after the start, in a
    namespace found later."""
    SAMPLED = 6
    """Nothing happened: the result of a look at a young entry (its state, status, idle time)."""
    MET = 7
    """Nothing happened: the same for an entry met by a walk over the table, an even sample."""
    RECOUNT = 8
    """Marks the start of a recount of what ``netns`` holds, because events were lost."""
    FOUND = 9
    """An entry that was there at the last RECOUNT; once for each."""
    RECOUNTED = 10
    """All such entries have been reported."""


class Reason(IntEnum):
    """Why it happened (``enum ctrace_reason``); also the index of its exact counter."""

    NONE = 0
    NEW = 1
    USER = 2
    NAT_CLASH = 3
    EXPIRED = 4
    EVICTED = 5
    GC_PRESSURE = 6
    DELETED = 7
    GONE = 8
    TABLE_FULL = 9
    NO_MEMORY = 10
    CLASH = 11
    CHAIN_TOO_LONG = 12
    FAILED = 13
    CLASH_RESOLVED = 14
    RING_FULL = 15


N_REASONS: Final = 16

KIND_OF: Final[dict[Reason, Kind]] = {
    Reason.NEW: Kind.INSERT,
    Reason.USER: Kind.INSERT,
    Reason.NAT_CLASH: Kind.INSERT,
    Reason.EXPIRED: Kind.DESTROY,
    Reason.EVICTED: Kind.DESTROY,
    Reason.GC_PRESSURE: Kind.DESTROY,
    Reason.DELETED: Kind.DESTROY,
    Reason.GONE: Kind.DESTROY,
    Reason.TABLE_FULL: Kind.DROP,
    Reason.NO_MEMORY: Kind.DROP,
    Reason.CLASH: Kind.INSERT_FAILED,
    Reason.CHAIN_TOO_LONG: Kind.INSERT_FAILED,
    Reason.FAILED: Kind.INSERT_FAILED,
}
REASONS_OF: Final[dict[Kind, list[int]]] = {
    kind: [int(reason) for reason, its in KIND_OF.items() if its == kind]
    for kind in (Kind.INSERT, Kind.DESTROY, Kind.DROP, Kind.INSERT_FAILED)
}
"""By kind the indices of its counters."""


ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17
GRE: Final = 47
ICMPV6: Final = 58
"""Protocols by their numbers in IP's header (IANA)."""


class Direction(IntEnum):
    """The direction of the packet that made the entry, or was refused one."""

    UNKNOWN = 0
    IN = 1
    OUT = 2
    FORWARD = 3


class Status(IntFlag):
    """``enum ip_conntrack_status``, the same bits from 4.x to 7.2.

    ``SRC_NAT`` and ``DST_NAT`` mean that the tuple really was rewritten; the
    ``*_DONE`` bits are set on every entry once NAT hooks are loaded.
    """

    EXPECTED = 1 << 0
    SEEN_REPLY = 1 << 1
    ASSURED = 1 << 2
    CONFIRMED = 1 << 3
    SRC_NAT = 1 << 4
    DST_NAT = 1 << 5
    SEQ_ADJUST = 1 << 6
    SRC_NAT_DONE = 1 << 7
    DST_NAT_DONE = 1 << 8
    DYING = 1 << 9
    FIXED_TIMEOUT = 1 << 10
    TEMPLATE = 1 << 11
    NAT_CLASH = 1 << 12
    HELPER = 1 << 13
    OFFLOAD = 1 << 14
    HW_OFFLOAD = 1 << 15


OF_THEN: Final = 1 << 31
"""A bit of ``status`` that is ctrace's own: the EXISTING record's state and status are those of
when its entry was made or first read, long ago, and tell nothing of now."""

TCP_STATES: Final = (
    "NONE",
    "SYN_SENT",
    "SYN_RECV",
    "ESTABLISHED",
    "FIN_WAIT",
    "CLOSE_WAIT",
    "LAST_ACK",
    "TIME_WAIT",
    "CLOSE",
    "SYN_SENT2",
)
"""``enum tcp_conntrack``, in the kernel's order and conntrack(8)'s spelling."""

STATE_UNKNOWN: Final = 255

RECORD: Final[np.dtype[np.void]] = np.dtype(
    {
        "names": [
            "ts", "ct", "src", "dst", "reply_src", "reply_dst",
            "sport", "dport", "reply_sport", "reply_dport",
            "netns", "status", "kind", "reason", "proto", "family",
            "zone", "direction", "state",
            "owner", "cgroup",
            "idle_ms", "overdue_ms", "timeout_ms", "mark",
        ],
        "formats": [
            "<u8", "<u8", ("u1", 16), ("u1", 16), ("u1", 16), ("u1", 16),
            "<u2", "<u2", "<u2", "<u2",
            "<u4", "<u4", "u1", "u1", "u1", "u1",
            "<u2", "u1", "u1",
            "<u8", "<u8",
            "<i4", "<i4", "<u4", "<u4",
        ],
        "offsets": [
            0, 8, 16, 32, 48, 64,
            80, 82, 84, 86,
            88, 92, 96, 97, 98, 99,
            100, 102, 103,
            104, 112,
            104, 108, 112, 116,
        ],
        "itemsize": 120,
    }
)  # fmt: skip
"""``struct ctrace_record``. ``owner``/``cgroup`` (insert, drop, insert_failed) and
``idle_ms``/``overdue_ms``/``timeout_ms``/``mark`` (destroy, sampled) share their bytes, as
in C: read the ones that the row's kind has."""

ROW: Final = np.dtype((np.void, RECORD.itemsize))
"""A record as plain bytes: numpy copies these in half the time it needs for fields or words."""
Rows = npt.NDArray[np.void]
"""A one-dimensional array of :data:`ROW`."""

WORDS: Final = 15
"""A record seen as 64-bit words: 2-3 src, 4-5 dst, 6-7 and 8-9 the reply's, 10 ports."""

PART: Final = 16
_PART_MASK: Final = np.uint64((PART - 1) << 9)


def boot_ns() -> int:
    """Now, as events are stamped: ns of CLOCK_BOOTTIME."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def in_part(ct: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Whether entries are in the one of :data:`PART` that is examined when all are too many.

    Decided by the entry's address in memory, which does not depend on its flow; ctnetlink's ids are
    hashes.
    """
    found: npt.NDArray[np.bool_] = (ct & _PART_MASK) == 0
    return found


PROTO_NAMES: Final[dict[int, str]] = {
    1: "icmp", 2: "igmp", 4: "ipip", 6: "tcp", 17: "udp", 33: "dccp", 41: "ipv6",
    47: "gre", 50: "esp", 51: "ah", 58: "icmpv6", 132: "sctp", 136: "udplite",
}  # fmt: skip
PROTO_NUMBERS: Final[dict[str, int]] = {name: number for number, name in PROTO_NAMES.items()}

MAPPED_PREFIX: Final = bytes(10) + b"\xff\xff"


def empty(n: int = 0) -> Events:
    """An array of ``n`` zeroed records."""
    return np.zeros(n, RECORD)


def words(events: Events) -> npt.NDArray[np.uint64]:
    """The records as an (n, 15) array of 64-bit words, without a copy if contiguous."""
    return np.ascontiguousarray(events).view(np.uint64).reshape(-1, WORDS)


def join(parts: Sequence[Events]) -> Events:
    """Arrays of records one after another.

    Never ``np.concatenate`` records themselves: it packs the fields anew, one after
    another, and the result is no :data:`RECORD` any more.
    """
    if not parts:
        return empty()
    whole: Events = np.concatenate([words(part) for part in parts]).view(RECORD).reshape(-1)
    return whole


def identity(rows: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A 64-bit hash that identifies entries; two of a million collide once in 10^7 runs.

    ``rows`` are :func:`words`: both tuples, protocol, zone and namespace count. Different in each
    run.
    """
    zone_mask = np.uint64(0xFFFF)
    proto = (rows[:, 12] >> np.uint64(16)) & np.uint64(0xFF)
    where = (rows[:, 11] << np.uint64(32)) | (proto << np.uint64(16))
    where |= (rows[:, 12] >> np.uint64(32)) & zone_mask
    mixed = where * _ODD[0]
    for column in range(2, 11):
        mixed = (mixed ^ (mixed >> np.uint64(29)) ^ rows[:, column]) * _ODD[column - 1]
    hashed: npt.NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(32))
    return hashed


_ODD = np.frombuffer(os.urandom(80), np.uint64) | np.uint64(1)
"""Random multipliers: a sender who chooses ports cannot choose collisions."""


def by_time(events: Events) -> Events:
    """The records sorted by time, equal ones as they stand; the same array when they are."""
    times = events["ts"]
    if (times[1:] < times[:-1]).any():
        events = events.view(ROW)[np.argsort(times, kind="stable")].view(RECORD)
    return events


def proto_name(number: int) -> str:
    """``tcp`` for 6; a protocol without a name stays a number, as in conntrack(8)."""
    return PROTO_NAMES.get(number, str(number))


def address_bytes(text: str) -> bytes:
    """The 16 bytes that a record holds for an address in text form.

    Raises ValueError when the text is no IPv4 or IPv6 address.
    """
    if ":" in text:
        return socket.inet_pton(socket.AF_INET6, str(IPv6Address(text)))
    return MAPPED_PREFIX + IPv4Address(text).packed


def address_text(raw: Any) -> str:
    """The text form of a record's 16 address bytes (bytes or a u1 array)."""
    data = bytes(raw)
    if data[:12] == MAPPED_PREFIX:
        return socket.inet_ntop(socket.AF_INET, data[12:])
    return socket.inet_ntop(socket.AF_INET6, data)
