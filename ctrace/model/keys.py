"""From a slice of records to columns, and from columns to 64-bit group keys.

A group key is three words: an address (two words, zero where the group has
none) and a *meta* word, ``netns << 32 | owned << 24 | proto << 16 | port``. Keys
are found by a 64-bit hash of the three; two of a million distinct keys share a
hash with a probability of 3e-8.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from ctrace.record import STATE_UNKNOWN, Events, Kind, Reason, Status, words

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

WINDOW: Final = 1 << 16
"""Events handled at once: their columns stay in the second-level cache."""
_SLAB: Final = 4096  # records whose columns are read while their lines are in cache

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
_S32: Final = np.uint64(32)
_S29: Final = np.uint64(29)

_PORT_MASK = np.zeros(256, np.uint64)
_PORT_MASK[list(PORTED)] = 0xFFFF

# One byte, kind | reason << 4, tells what an event adds to its keys.
_SIGN = np.zeros(256, np.int64)
"""+1 for an entry that came, -1 for one that went."""
_FLOW = np.zeros(256, np.uint64)
"""Packed counters: inserts | destroys << 21 | expired << 42."""
for _code in range(256):
    _kind, _reason = _code & 15, _code >> 4
    if _kind in (Kind.INSERT, Kind.EXISTING):
        _SIGN[_code] = 1
    if _kind == Kind.INSERT:
        _FLOW[_code] = 1
    if _kind == Kind.DESTROY:
        _SIGN[_code] = -1
        _FLOW[_code] = (1 << 21) | ((1 << 42) if _reason == Reason.EXPIRED else 0)

# Six bits of a destroy, SEEN_REPLY | ASSURED << 1 | state << 2.
_END = np.zeros(64, np.uint64)
"""Packed counters: assured | unreplied << 21 | closed << 42."""
TIME_WAIT: Final = 7
CLOSE: Final = 8
for _code in range(64):
    _END[_code] = (
        (_code >> 1 & 1)
        | (0 if _code & 1 else 1 << 21)
        | ((1 << 42) if _code >> 2 in (TIME_WAIT, CLOSE) else 0)
    )

PACKED_BITS: Final = 21
PACKED_MAX: Final = (1 << PACKED_BITS) - 1
"""Events that a packed counter takes before it must be drained."""

TCP: Final = 6
UDP: Final = 17
AF_INET: Final = 2
TIME_SHIFT: Final = 10
_ENTRY_KINDS: Final = [int(kind) for kind in (Kind.INSERT, Kind.DESTROY, Kind.EXISTING)]
_EMPTY: Final = np.zeros(0, np.uint64)
_NOWHERE: Final = np.zeros(0, np.intp)
_ASSURED = np.uint64(int(Status.ASSURED) << 32)
_NAT = np.uint64((int(Status.SRC_NAT) | int(Status.DST_NAT)) << 32)


def finish(h: U64) -> U64:
    """Spread every bit of ``h`` over the whole word, in place."""
    h ^= h >> _S32
    h *= _C3
    h ^= h >> _S29
    return h


def address_hash(high: U64, low: U64) -> U64:
    """A partial hash of addresses, to be added to a meta word's and finished.

    An empty ``high`` stands for zeros, as every IPv4 address has.
    """
    h = low >> _S32
    h ^= low
    h *= _C1
    if high.size:
        h += (high ^ (high >> _S32)) * _C0
    return h


def key_hash(high: U64, low: U64, meta: U64) -> U64:
    """The hash of whole keys: what :class:`Window` computes piece by piece."""
    return finish(address_hash(high, low) + meta * _C2)


@dataclass
class Window:
    """The columns of up to :data:`WINDOW` events, one array per field."""

    n: int
    events: Events
    ts: U64
    ct: U64
    src: tuple[U64, U64]
    dst: tuple[U64, U64]
    netns: U64
    """Shifted up by 32 bits, as in a meta word."""
    status: U64
    """The raw word: IPS_* bits from bit 32."""
    meta: U64
    owner: U64
    """Only where the kind has an owner."""
    kind: U8
    reason: U8
    counts: npt.NDArray[np.intp]
    """Events by (reason, kind), 16 each."""
    what: U64
    """The raw word that kind, reason, protocol, direction and state are from."""
    state: U8
    flow: U64
    births: I64
    """Times in units of 1024 ns of the entries that came; negative of those that went."""
    ends: npt.NDArray[np.intp]
    """Indices of the destroys."""
    comes: npt.NDArray[np.bool_]
    """Inserts, existing entries and drops: what makes a key worth a row."""
    end: U64
    """Packed counters of the destroys, aligned with ``ends``."""
    src_hash: U64
    dst_hash: U64
    _found: dict[Kind, npt.NDArray[np.intp]] = field(default_factory=dict)

    def where(self, kind: Kind) -> npt.NDArray[np.intp]:
        """Indices of the events of a kind."""
        if kind == Kind.DESTROY:
            return self.ends
        if kind not in self._found:
            some = self.counts[:, kind].any()
            self._found[kind] = np.flatnonzero(self.kind == int(kind)) if some else _NOWHERE
        return self._found[kind]

    def because(self, *reasons: Reason) -> npt.NDArray[np.intp]:
        """Indices of the events with one of these reasons."""
        some = [reason for reason in reasons if self.counts[reason].any()]
        if not some:
            return _NOWHERE
        found = self.reason == int(some[0])
        for reason in some[1:]:
            found |= self.reason == int(reason)
        return np.flatnonzero(found)

    def entries(self) -> npt.NDArray[np.intp] | None:
        """Indices of the births and ends of entries with an identity; None for all."""
        if self.ct.all() and int(self.counts[:, _ENTRY_KINDS].sum()) == self.n:
            return None
        return np.flatnonzero(np.isin(self.kind, _ENTRY_KINDS) & (self.ct != 0))

    def nat(self) -> npt.NDArray[np.intp]:
        """Indices of the events whose tuple was rewritten."""
        if not np.bitwise_or.reduce(self.status) & _NAT:
            return _NOWHERE
        return np.flatnonzero((self.status & _NAT) != 0)

    def pair_hash(self) -> U64:
        """Hash of (source, service)."""
        return finish(self.src_hash + self.meta * _C2)

    def target_hash(self, meta: U64) -> U64:
        """Hash of (destination, service)."""
        return finish(self.dst_hash + meta * _C2)

    def proto(self, at: npt.NDArray[np.intp]) -> U64:
        """Protocol numbers of the events at these indices."""
        return (self.meta[at] >> np.uint64(16)) & np.uint64(0xFF)

    def directions(self, at: npt.NDArray[np.intp]) -> U8:
        """:class:`Direction` of the events at these indices."""
        return (self.what.take(at) >> np.uint64(48)).astype(np.uint8) & np.uint8(3)

    def assured(self, at: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        """Whether the entries at these indices are ASSURED."""
        found: npt.NDArray[np.bool_] = self.status.take(at) & _ASSURED != 0
        return found

    def sources(self, at: npt.NDArray[np.intp]) -> U64:
        """Hash of the source's address, for the events at ``at``."""
        return finish(self.src_hash.take(at))

    def src_only(self, at: npt.NDArray[np.intp]) -> U64:
        """Hash of the source alone, for the events at ``at``."""
        if at.size == self.n:
            return finish(self.src_hash + self.netns * _C2)
        return finish(self.src_hash.take(at) + self.netns.take(at) * _C2)

    def dst_only(self, at: npt.NDArray[np.intp]) -> U64:
        """Hash of the destination alone, for the events at ``at``."""
        return finish(self.dst_hash.take(at) + self.netns.take(at) * _C2)


def service_hash(meta: U64) -> U64:
    """Hash of services."""
    return finish(meta * _C2)


def window(events: Events) -> Window:
    """The columns of a slice of events, in one pass over its memory.

    (A kind is compared as an int: numpy would widen the column for a member of an enum.)
    """
    table = words(events)
    n = len(table)
    columns = np.empty((8, n), np.uint64)
    for at in range(0, n, _SLAB):
        part = table[at : at + _SLAB]
        for row, column in enumerate((0, 1, 3, 5, 10, 11, 12, 13)):
            columns[row, at : at + _SLAB] = part[:, column]
    ts, ct, src1, dst1, ports, place, what, owner = columns
    low = what.astype(np.uint32).view(np.uint8)
    if (low[3::4] == AF_INET).all():  # the upper words of all addresses are zero
        src0 = dst0 = _EMPTY
    else:
        src0, dst0 = table[:, 2].copy(), table[:, 4].copy()

    kind, reason, proto = low[0::4].copy(), low[1::4].copy(), low[2::4].copy()
    state = (what >> np.uint64(56)).astype(np.uint8)
    code = (kind | (reason << np.uint8(4))).astype(np.intp)
    netns = place << _S32
    meta = ports >> np.uint64(16)
    if ((proto == TCP) | (proto == UDP)).all():
        meta &= np.uint64(0xFFFF)
    else:
        meta &= _PORT_MASK.take(proto)
    meta |= what & np.uint64(0xFF0000)  # the protocol has the same place there
    meta |= netns

    births = (ts >> np.uint64(TIME_SHIFT)).view(np.int64)
    births *= _SIGN.take(code)
    ends = np.flatnonzero(kind == int(Kind.DESTROY))
    bits = (place.take(ends) >> np.uint64(33)).astype(np.uint8) & np.uint8(3)
    bits |= np.minimum(state.take(ends), np.uint8(15)) << np.uint8(2)
    comes = (kind == int(Kind.INSERT)) | (kind == int(Kind.EXISTING)) | (kind == int(Kind.DROP))
    return Window(
        n=n,
        events=events,
        ts=ts,
        ct=ct,
        src=(src0, src1),
        dst=(dst0, dst1),
        netns=netns,
        status=place,
        meta=meta,
        owner=owner,
        kind=kind,
        reason=reason,
        counts=np.bincount(code, minlength=256).reshape(16, 16),
        what=what,
        state=state,
        flow=_FLOW.take(code),
        births=births,
        ends=ends,
        comes=comes,
        end=_END.take(bits),
        src_hash=address_hash(src0, src1),
        dst_hash=address_hash(dst0, dst1),
    )


def has_port(proto: int) -> bool:
    """Whether a protocol's tuple holds ports."""
    return proto in PORTED


UNKNOWN_STATE: Final = STATE_UNKNOWN
