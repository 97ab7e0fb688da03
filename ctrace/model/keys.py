"""From a slice of records to columns, and from columns to 64-bit group keys.

A group key is three words: an address (two words, zero where the group has
none) and a *meta* word, ``netns << 32 | owned << 24 | proto << 16 | port``. Keys
are found by a 64-bit hash of the three; two of a million distinct keys share a
hash with a probability of 3e-8.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Optional, TypeVar

import numpy as np
import numpy.typing as npt

from ctrace.record import (
    MAPPED_PREFIX,
    RECORD,
    STATE_UNKNOWN,
    Direction,
    Events,
    Kind,
    Reason,
    Status,
    words,
)

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
Column = TypeVar("Column", bound=npt.NDArray[Any])

WINDOW: Final = 1 << 17
"""Events handled at once: twice as many would not be cheaper, half as many dearer."""
_APART: Final = 136
_SLAB: Final = 8192
"""Records (1 MiB) whose columns are made while they, and these, are in the cache."""

NETNS_MASK: Final = np.uint64(0xFFFFFFFF_00000000)
OWNED: Final = np.uint64(1 << 24)
SERVICE_MASK: Final = np.uint64(0xFFFFFFFF_00FFFFFF)
"""Everything of a meta word but :data:`OWNED`."""

PORTED: Final = (6, 17, 33, 132, 136)
"""Protocols whose tuple holds ports: TCP, UDP, DCCP, SCTP, UDP-Lite."""

_C0: Final = np.uint64(0x9E3779B97F4A7C15)
_C1: Final = np.uint64(0xC2B2AE3D27D4EB4F)
_C2: Final = np.uint64(0x165667B19E3779F9)
_C3: Final = np.uint64(0xD6E8FEB86659FD93)
_C4: Final = np.uint64(0xFF51AFD7ED558CCD)
_LOW_HALF: Final = np.uint64(0xFFFFFFFF)
MAPPED: Final = np.uint64(int.from_bytes(MAPPED_PREFIX[8:], "little"))
_IDENTITY_MIX: Final = np.uint64(0xE7037ED1A0B428DB)
_S32: Final = np.uint64(32)
_S48: Final = np.uint64(48)

# Places in a record seen as 64-bit words (ctrace.record.WORDS).
_TS, _CT, _SRC, _DST, _PORTS, _PLACE, _WHAT, _OWNER = 0, 1, 2, 4, 10, 11, 12, 13

# Places of 16-bit words: of the status its lowest bits, for records are little-endian.
_FIELDS: Final = dict(RECORD.fields or {})
_STATUS, _WAY = (_FIELDS[name][1] // 2 for name in ("status", "direction"))
_H16, _PROTO = np.uint32(16), np.uint32(0xFF0000)

_PORT_MASK = np.zeros(256, np.uint32)
_PORT_MASK[list(PORTED)] = 0xFFFF

# A code, kind | reason << 8, tells what an event adds to its keys.
_KIND, _REASON = np.uint16(0xF), np.uint16(0xF00)
_FLOW = np.zeros(1 << 12, np.uint64)
"""Packed counters: inserts | destroys << 21 | expired << 42."""
for _reason in range(16):
    _FLOW[Kind.INSERT | _reason << 8] = 1
    _FLOW[Kind.DESTROY | _reason << 8] = 1 << 21 | (_reason == Reason.EXPIRED) << 42

# And at its end SEEN_REPLY | ASSURED | whether it is one << 3 | state << 8.
_END = np.zeros(1 << 12, np.uint64)
"""Packed counters: assured | unreplied << 21 | closed << 42."""
TIME_WAIT: Final = 7
CLOSE: Final = 8
_REPLIED_ASSURED: Final = int(Status.SEEN_REPLY) | int(Status.ASSURED)
for _state in range(16):
    for _status in (0, Status.SEEN_REPLY, Status.ASSURED, _REPLIED_ASSURED):
        _END[_status | 8 | _state << 8] = (
            bool(_status & Status.ASSURED)
            | (not _status & Status.SEEN_REPLY) << 21
            | (_state in (TIME_WAIT, CLOSE)) << 42
        )

PACKED_BITS: Final = 21
PACKED_MAX: Final = (1 << PACKED_BITS) - 1
"""Events that a packed counter takes before it must be drained."""

TCP: Final = 6
UDP: Final = 17
AF_INET: Final = 2
TIME_SHIFT: Final = 10
_USUAL: Final = [
    int(kind) | int(reason) << 8
    for kind, reason in ((Kind.INSERT, Reason.NEW), (Kind.DESTROY, Reason.EXPIRED))
]
_ENTRY_KINDS: Final = [int(kind) for kind in (Kind.INSERT, Kind.DESTROY, Kind.EXISTING)]
_NOWHERE: Final = np.zeros(0, np.intp)
_RECEIVED: Final = int(Direction.IN) & int(Direction.FORWARD) & ~int(Direction.OUT)
"""Bit of a direction that is neither OUT nor UNKNOWN."""
_NAT = int(Status.SRC_NAT) | int(Status.DST_NAT)


def spread(h: U64) -> U64:
    """Hashes like random ones, in place; what is different stays so.

    A key's is a sum of products: enough to tell it from others, and to find it by its highest
    bits. But keys in a row lie more evenly in it than chance has it.
    """
    h ^= h >> _S32
    h *= _C3
    return h


def address_hash(high: U64, low: U64) -> U64:
    """A partial hash of addresses, to be added to a meta word's.

    Only the last four bytes count for IPv4, whose others are always the same.
    """
    h = (low >> _S32) * _C1
    h += ((low & _LOW_HALF) - MAPPED) * _C4
    h += (high ^ (high >> _S32)) * _C0
    return h


def key_hash(high: U64, low: U64, meta: U64) -> U64:
    """The hash of whole keys: what :class:`Window` computes piece by piece."""
    return address_hash(high, low) + meta * _C2


def identity(ct: U64, meta: U64) -> U64:
    """A 64-bit identity: the address, and for ctnetlink's 32-bit ids the namespace.

    The high bits, which everything is taken from, depend on all.
    """
    ident = (meta >> _S32) << _S48
    ident ^= ct
    ident *= _IDENTITY_MIX
    return ident


@dataclass
class Window:
    """The columns of up to :data:`WINDOW` events that every one of them needs.

    What only some are asked for is read from the records then.
    """

    n: int
    events: Events
    words: U64
    """The records, (n, 15)."""
    ts: U64
    ordered: bool
    """Whether the times never step back."""
    ct: U64
    named: bool
    """Whether every ``ct`` names an entry."""
    meta: U64
    alone: bool
    """Whether all are of one namespace."""
    code: U16
    """Kind | reason << 8."""
    status: U16
    """IPS_* bits."""
    way: U16
    """Direction | protocol state << 8."""
    counts: npt.NDArray[np.intp]
    """Events by (reason, kind), 16 each."""
    flow: U64
    births: I64
    """Times in units of 1024 ns of the entries that came; negative of those that went."""
    ended: npt.NDArray[np.bool_]
    """The destroys."""
    ends: npt.NDArray[np.intp]
    """Their indices."""
    end: U64
    """Packed counters of the destroys; 0 for all else."""
    comes: npt.NDArray[np.bool_]
    """Inserts, existing and found entries, drops: what makes a key worth a row."""
    translated: bool
    """Whether any tuple was rewritten."""
    owned: npt.NDArray[np.intp]
    """Indices of the inserts that a local process made."""
    src_hash: U64
    dst_hash: U64
    pair_hash: U64
    """Hash of (source, service)."""
    target_hash: U64
    """Hash of (destination, service)."""
    _found: dict[Kind, npt.NDArray[np.intp]] = field(default_factory=dict)

    @property
    def src(self) -> tuple[U64, U64]:
        """Both words of the source's address, as views of the records."""
        return self.words[:, 2], self.words[:, 3]

    @property
    def dst(self) -> tuple[U64, U64]:
        """Both words of the destination's address, as views of the records."""
        return self.words[:, 4], self.words[:, 5]

    def netns(self, at: npt.NDArray[np.intp]) -> U64:
        """Namespaces of the events at these indices, shifted up as in a meta word."""
        return self.meta.take(at) & NETNS_MASK

    def owner(self, at: npt.NDArray[np.intp]) -> U64:
        """The word that is the owner, where the kind has one, of the events at these indices."""
        owner: U64 = self.words[at, _OWNER]
        return owner

    def idle_ms(self, at: npt.NDArray[np.intp]) -> npt.NDArray[np.int32]:
        """How long nothing renewed them, -1 unknown; of destroys and looks at these indices."""
        return self.owner(at).astype(np.uint32).view(np.int32)

    def where(self, kind: Kind) -> npt.NDArray[np.intp]:
        """Indices of the events of a kind."""
        if kind == Kind.DESTROY:
            return self.ends
        if kind not in self._found:
            some = self.counts[:, kind].any()
            self._found[kind] = np.flatnonzero(self.code & _KIND == int(kind)) if some else _NOWHERE
        return self._found[kind]

    def because(self, *reasons: Reason) -> npt.NDArray[np.intp]:
        """Indices of the events with one of these reasons."""
        some = [reason for reason in reasons if self.counts[reason].any()]
        if not some:
            return _NOWHERE
        reason = self.code & _REASON
        found = reason == int(some[0]) << 8
        for other in some[1:]:
            found |= reason == int(other) << 8
        return np.flatnonzero(found)

    def entries(self) -> npt.NDArray[np.intp] | None:
        """Indices of the births and ends of entries with an identity; None for all."""
        if self.named and int(self.counts[:, _ENTRY_KINDS].sum()) == self.n:
            return None
        return np.flatnonzero(np.isin(self.code & _KIND, _ENTRY_KINDS) & (self.ct != 0))

    def nat(self) -> npt.NDArray[np.intp]:
        """Indices of the events whose tuple was rewritten."""
        if not self.translated:
            return _NOWHERE
        return np.flatnonzero(self.status & np.uint16(_NAT))

    def proto(self, at: npt.NDArray[np.intp]) -> U64:
        """Protocol numbers of the events at these indices."""
        return (self.meta[at] >> np.uint64(16)) & np.uint64(0xFF)

    def kinds(self, at: npt.NDArray[np.intp]) -> U16:
        """:class:`Kind` of the events at these indices."""
        return self.code.take(at) & _KIND

    def directions(self, at: npt.NDArray[np.intp]) -> U8:
        """:class:`Direction` of the events at these indices."""
        return (self.way.take(at) & np.uint16(3)).astype(np.uint8)

    def states(self, at: npt.NDArray[np.intp]) -> U8:
        """Protocol states of the events at these indices."""
        return (self.way.take(at) >> np.uint16(8)).astype(np.uint8)

    def assured(self, at: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        """Whether the entries at these indices are ASSURED."""
        found: npt.NDArray[np.bool_] = self.status.take(at) & np.uint16(int(Status.ASSURED)) != 0
        return found

    def sources(self, at: npt.NDArray[np.intp]) -> U64:
        """Hash of the source's address, for the events at ``at``."""
        return spread(self.src_hash.take(at))

    def space_only(self, at: Optional[npt.NDArray[np.intp]]) -> U64:
        """Hash of the namespace, for the events at ``at`` or all."""
        return service_hash(some(self.meta, at) & NETNS_MASK)

    def src_only(self, at: Optional[npt.NDArray[np.intp]]) -> U64:
        """Hash of the source alone, for the events at ``at`` or all."""
        return self._with_netns(self.src_hash, at)

    def dst_only(self, at: Optional[npt.NDArray[np.intp]]) -> U64:
        """Hash of the destination alone, for the events at ``at`` or all."""
        return self._with_netns(self.dst_hash, at)

    def target_hash_owned(self, at: npt.NDArray[np.intp]) -> U64:
        """As ``target_hash`` with :data:`OWNED`, for the events at ``at``."""
        return self.dst_hash.take(at) + (self.meta.take(at) | OWNED) * _C2

    def _with_netns(self, addresses: U64, at: Optional[npt.NDArray[np.intp]]) -> U64:
        meta = self.meta[:1] if self.alone else some(self.meta, at)
        return some(addresses, at) + (meta & NETNS_MASK) * _C2


def some(column: Column, at: Optional[npt.NDArray[np.intp]]) -> Column:
    """A column's values at these indices, or the column."""
    return column if at is None else column.take(at)  # type: ignore[return-value]


_NO_ADDRESS: Final = address_hash(np.zeros(1, np.uint64), np.zeros(1, np.uint64))[0]


def service_hash(meta: U64) -> U64:
    """The hash of keys without an address."""
    h: U64 = meta * _C2 + _NO_ADDRESS
    return h


def window(events: Events) -> Window:
    """The columns of a slice of events, in one pass over its memory.

    (A code is compared with an int: numpy would widen the column for a member of an enum. What
    is taken from a table is asked for by intp: numpy takes by bytes five times slower.)
    """
    table = words(events)
    n = len(table)
    halves, quarters = table.view(np.uint32), table.view(np.uint16)
    # (rows whose distance is a power of two would share the same few places in a cache)
    columns = np.empty((7, n + _APART), np.uint64)[:, :n]
    ts, ct, meta, src_hash, dst_hash, pair_hash, target_hash = columns
    code, status, way = np.empty((3, n), np.uint16)
    named, ordered, alone = True, True, True
    for at in range(0, n, _SLAB):
        here = slice(at, at + _SLAB)
        part, half, quarter = table[here], halves[here], quarters[here]
        time = ts[here]
        time[:] = part[:, _TS]
        ordered = ordered and not (time[1:] < time[:-1]).any() and (not at or time[0] >= ts[at - 1])
        ct[here] = part[:, _CT]
        named = named and int(ct[here].min()) > 0

        what = half[:, 2 * _WHAT].copy()  # kind, reason, protocol, family
        np.bitwise_and(what.view(np.uint16)[0::2], _KIND | _REASON, out=code[here])
        status[here], way[here] = quarter[:, _STATUS], quarter[:, _WAY]
        service = half[:, 2 * _PORTS] >> _H16
        proto = what & _PROTO
        every, some = int(np.bitwise_and.reduce(what)), int(np.bitwise_or.reduce(what))
        narrow = every >> 24 == some >> 24 == AF_INET
        if (every ^ some) & int(_PROTO) or not has_port(some >> 16 & 0xFF):
            service &= _PORT_MASK.take((proto >> _H16).astype(np.intp))
        service |= proto  # it has the same place in a meta word
        both = meta[here].view(np.uint32)
        both[0::2], both[1::2] = service, half[:, 2 * _PLACE]

        mixed = meta[here] ^ meta[0]
        alone = alone and int(np.bitwise_or.reduce(mixed)) >> 32 == 0
        np.multiply(meta[here], _C2, out=mixed)
        for first, hashed, with_service in (
            (_SRC, src_hash[here], pair_hash[here]),
            (_DST, dst_hash[here], target_hash[here]),
        ):
            if narrow:
                hashed[:] = half[:, 2 * first + 3]
                np.multiply(hashed, _C1, out=hashed)
            else:
                hashed[:] = address_hash(part[:, first], part[:, first + 1])
            np.add(hashed, mixed, out=with_service)

    kind = code & _KIND
    ended, comes = kind == int(Kind.DESTROY), kind == int(Kind.INSERT)
    owned = _owned(table, way, comes)
    comes |= kind == int(Kind.EXISTING)
    births = (ts >> np.uint64(TIME_SHIFT)).view(np.int64)
    births *= (comes.view(np.int8) - ended.view(np.int8)).astype(np.int64)
    comes |= kind == int(Kind.DROP)
    counts = _counted(code)
    if counts[:, Kind.FOUND].any():
        comes |= kind == int(Kind.FOUND)
    return Window(
        n=n,
        events=events,
        words=table,
        ts=ts,
        ordered=bool(ordered),
        ct=ct,
        named=named,
        meta=meta,
        alone=alone,
        code=code,
        status=status,
        way=way,
        counts=counts,
        flow=_FLOW.take(code.astype(np.intp)),
        births=births,
        ended=ended,
        ends=np.flatnonzero(ended),
        end=_END.take(_ending(status, way, ended).astype(np.intp)),
        comes=comes,
        translated=bool(np.bitwise_or.reduce(status) & np.uint16(_NAT)),
        owned=owned,
        src_hash=src_hash,
        dst_hash=dst_hash,
        pair_hash=pair_hash,
        target_hash=target_hash,
    )


def _ending(status: U16, way: U16, ended: npt.NDArray[np.bool_]) -> U16:
    """What :data:`_END` is asked by, of each event."""
    asked = way & np.uint16(0xF00)
    asked |= status & np.uint16(_REPLIED_ASSURED)
    asked |= ended.astype(np.uint16) * np.uint16(8)
    return asked


def _owned(table: U64, way: U16, inserts: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """Inserts with an owner: only what this host sends may have one."""
    if int(np.bitwise_and.reduce(way)) & _RECEIVED:
        return _NOWHERE
    some = np.flatnonzero((way & np.uint16(_RECEIVED) == 0) & inserts)
    return some[table[some, _OWNER] != 0] if some.size else some


def _counted(code: U16) -> npt.NDArray[np.intp]:
    """Events by (reason, kind); what is usual is compared, the rest binned one by one."""
    counts = np.zeros(1 << 12, np.intp)
    rest = np.ones(len(code), bool)
    for usual in _USUAL:
        others = code != usual
        counts[usual] = len(code) - np.count_nonzero(others)
        rest &= others
    counts += np.bincount(code.take(np.flatnonzero(rest)), minlength=len(counts))
    return counts.reshape(16, 256)[:, :16]


def has_port(proto: int) -> bool:
    """Whether a protocol's tuple holds ports."""
    return proto in PORTED


UNKNOWN_STATE: Final = STATE_UNKNOWN
