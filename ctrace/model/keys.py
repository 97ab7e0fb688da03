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
_NETNS_MIX: Final = np.uint64(0x9FB21C651E98DF25)
_IDENTITY_MIX: Final = np.uint64(0xE7037ED1A0B428DB)
_S32: Final = np.uint64(32)
_S29: Final = np.uint64(29)

# Places in a record seen as 64-bit words (ctrace.record.WORDS).
_TS, _CT, _SRC, _DST, _PORTS, _PLACE, _WHAT, _OWNER = 0, 1, 2, 4, 10, 11, 12, 13

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


def identity(ct: U64, netns: U64) -> U64:
    """A 64-bit identity: the address, and for ctnetlink's 32-bit ids the namespace."""
    ident = netns * _NETNS_MIX
    ident ^= ct
    ident *= _IDENTITY_MIX  # the high bits, which everything is taken from, depend on all
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
    ident: U64
    """What :func:`identity` makes of the entry's address; ``named`` says whether all have one."""
    named: bool
    meta: U64
    kind: U8
    reason: U8
    counts: npt.NDArray[np.intp]
    """Events by (reason, kind), 16 each."""
    flow: U64
    births: I64
    """Times in units of 1024 ns of the entries that came; negative of those that went."""
    ends: npt.NDArray[np.intp]
    """Indices of the destroys."""
    end: U64
    """Packed counters of the destroys, aligned with ``ends``."""
    comes: npt.NDArray[np.bool_]
    """Inserts, existing entries and drops: what makes a key worth a row."""
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
        return self.words[at, _PLACE] << _S32

    def owner(self, at: npt.NDArray[np.intp]) -> U64:
        """The word that is the owner, where the kind has one, of the events at these indices."""
        return self.words[at, _OWNER]

    def idle_ms(self, at: npt.NDArray[np.intp]) -> npt.NDArray[np.int32]:
        """How long nothing renewed them, -1 unknown; of destroys and looks at these indices."""
        return self.owner(at).astype(np.uint32).view(np.int32)

    def status(self, at: npt.NDArray[np.intp]) -> npt.NDArray[np.uint32]:
        """IPS_* bits of the events at these indices."""
        return (self.words[at, _PLACE] >> _S32).astype(np.uint32)

    def state(self, at: npt.NDArray[np.intp]) -> U8:
        """Protocol states of the events at these indices."""
        return (self.words[at, _WHAT] >> np.uint64(56)).astype(np.uint8)

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
        if self.named and int(self.counts[:, _ENTRY_KINDS].sum()) == self.n:
            return None
        return np.flatnonzero(np.isin(self.kind, _ENTRY_KINDS) & (self.words[:, _CT] != 0))

    def nat(self) -> npt.NDArray[np.intp]:
        """Indices of the events whose tuple was rewritten."""
        if not self.translated:
            return _NOWHERE
        return np.flatnonzero(self.words[:, _PLACE] & _NAT)

    def proto(self, at: npt.NDArray[np.intp]) -> U64:
        """Protocol numbers of the events at these indices."""
        return (self.meta[at] >> np.uint64(16)) & np.uint64(0xFF)

    def directions(self, at: npt.NDArray[np.intp]) -> U8:
        """:class:`Direction` of the events at these indices."""
        return (self.words[at, _WHAT] >> np.uint64(48)).astype(np.uint8) & np.uint8(3)

    def assured(self, at: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        """Whether the entries at these indices are ASSURED."""
        return self.status(at) & np.uint32(int(Status.ASSURED)) != 0

    def sources(self, at: npt.NDArray[np.intp]) -> U64:
        """Hash of the source's address, for the events at ``at``."""
        return finish(self.src_hash.take(at))

    def src_only(self, at: npt.NDArray[np.intp]) -> U64:
        """Hash of the source alone, for the events at ``at``."""
        return finish(self.src_hash.take(at) + self.netns(at) * _C2)

    def dst_only(self, at: npt.NDArray[np.intp]) -> U64:
        """Hash of the destination alone, for the events at ``at``."""
        return finish(self.dst_hash.take(at) + self.netns(at) * _C2)

    def target_hash_owned(self, at: npt.NDArray[np.intp]) -> U64:
        """As ``target_hash`` with :data:`OWNED`, for the events at ``at``."""
        return finish(self.dst_hash.take(at) + (self.meta.take(at) | OWNED) * _C2)


def service_hash(meta: U64) -> U64:
    """Hash of services."""
    return finish(meta * _C2)


def window(events: Events) -> Window:
    """The columns of a slice of events, in one pass over its memory.

    (A kind is compared as an int: numpy would widen the column for a member of an enum.)
    """
    table = words(events)
    n = len(table)
    ts, ident, meta, src_hash, dst_hash, pair_hash, target_hash, flow = np.empty((8, n), np.uint64)
    births = np.empty(n, np.int64)
    kind, reason, ending = np.empty((3, n), np.uint8)
    owned = np.empty(n, bool)
    named, ordered, status = True, True, np.uint64(0)
    for at in range(0, n, _SLAB):
        part, here = table[at : at + _SLAB], slice(at, at + _SLAB)
        time = ts[here]
        time[:] = part[:, _TS]
        ordered = ordered and not (time[1:] < time[:-1]).any() and (not at or time[0] >= ts[at - 1])
        what, place = part[:, _WHAT].copy(), part[:, _PLACE].copy()
        status |= np.bitwise_or.reduce(place)

        low = what.astype(np.uint32).view(np.uint8)
        kinds, reasons, protos = kind[here], reason[here], low[2::4]
        kinds[:], reasons[:] = low[0::4], low[1::4]
        code = (kinds | (reasons << np.uint8(4))).astype(np.intp)
        _FLOW.take(code, out=flow[here], mode="clip")
        born = births[here]
        np.right_shift(time, np.uint64(TIME_SHIFT), out=born.view(np.uint64))
        born *= _SIGN.take(code)
        bits = (place >> np.uint64(33)).astype(np.uint8)
        bits &= np.uint8(3)
        states = (what >> np.uint64(56)).astype(np.uint8)
        np.minimum(states, np.uint8(15), out=states)
        np.bitwise_or(bits, states << np.uint8(2), out=ending[here])

        netns = place << _S32
        service = np.right_shift(part[:, _PORTS], np.uint64(16), out=meta[here])
        if ((protos == TCP) | (protos == UDP)).all():
            service &= np.uint64(0xFFFF)
        else:
            service &= _PORT_MASK.take(protos)
        service |= what & np.uint64(0xFF0000)  # the protocol has the same place there
        service |= netns

        ct = part[:, _CT].copy()
        named = named and bool(ct.all())
        ident[here] = identity(ct, netns)
        owned[here] = (part[:, _OWNER] != 0) & (kinds == int(Kind.INSERT))

        mixed = service * _C2
        wide = not (low[3::4] == AF_INET).all()  # else the upper words are zero
        for column, hashed, with_service in (
            (_SRC, src_hash[here], pair_hash[here]),
            (_DST, dst_hash[here], target_hash[here]),
        ):
            high = part[:, column].copy() if wide else _EMPTY
            hashed[:] = address_hash(high, part[:, column + 1].copy())
            finish(np.add(hashed, mixed, out=with_service))

    ends = np.flatnonzero(kind == int(Kind.DESTROY))
    return Window(
        n=n,
        events=events,
        words=table,
        ts=ts,
        ordered=bool(ordered),
        ident=ident,
        named=named,
        meta=meta,
        kind=kind,
        reason=reason,
        counts=_counted(kind, reason),
        flow=flow,
        births=births,
        ends=ends,
        end=_END.take(ending.take(ends)),
        comes=(kind == int(Kind.INSERT)) | (kind == int(Kind.EXISTING)) | (kind == int(Kind.DROP)),
        translated=bool(status & _NAT),
        owned=np.flatnonzero(owned),
        src_hash=src_hash,
        dst_hash=dst_hash,
        pair_hash=pair_hash,
        target_hash=target_hash,
    )


def _counted(kind: U8, reason: U8) -> npt.NDArray[np.intp]:
    """Events by (reason, kind): bytes are compared 64 at a time, binned one by one."""
    counts = np.zeros((16, 16), np.intp)
    rest = np.ones(len(kind), bool)
    for usual, its in ((Reason.NEW, Kind.INSERT), (Reason.EXPIRED, Kind.DESTROY)):
        these = (reason == int(usual)) & (kind == int(its))
        counts[usual, its] = np.count_nonzero(these)
        rest &= ~these
    code = kind[rest] | (reason[rest] << np.uint8(4))
    counts += np.bincount(code, minlength=256).reshape(16, 16)
    return counts


def has_port(proto: int) -> bool:
    """Whether a protocol's tuple holds ports."""
    return proto in PORTED


UNKNOWN_STATE: Final = STATE_UNKNOWN
