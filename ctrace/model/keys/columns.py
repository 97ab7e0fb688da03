"""From a slice of records to columns, and from columns to 64-bit group keys.

A group key is three words: an address (two words, zero where the group has
none) and a *meta* word, ``netns << 32 | owned << 24 | proto << 16 | port``. Keys
are found by a 64-bit hash of the three; two of a million distinct keys share a
hash with a probability of 3e-8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Optional, TypeVar

import numpy as np
import numpy.typing as npt

from ctrace.model.keys.scatter import Rows
from ctrace.record import MAPPED_PREFIX, Events, Kind, Reason, Status

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
Column = TypeVar("Column", bound=npt.NDArray[Any])

WINDOW: Final = 1 << 17
"""Events handled at once: twice as many would not be cheaper, half as many would cost more."""
NETNS_MASK: Final = np.uint64(0xFFFFFFFF_00000000)
OWNED: Final = np.uint64(1 << 24)
SERVICE_MASK: Final = np.uint64(0xFFFFFFFF_00FFFFFF)
"""Everything of a meta word but :data:`OWNED`."""

PORTED: Final = (6, 17, 33, 132, 136)
"""Protocols whose tuple holds ports: TCP, UDP, DCCP, SCTP, UDP-Lite."""

_C0: Final = np.uint64(0x9E3779B97F4A7C15)
C1: Final = np.uint64(0xC2B2AE3D27D4EB4F)
C2: Final = np.uint64(0x165667B19E3779F9)
_C3: Final = np.uint64(0xD6E8FEB86659FD93)
_C4: Final = np.uint64(0xFF51AFD7ED558CCD)
_LOW_HALF: Final = np.uint64(0xFFFFFFFF)
MAPPED: Final = np.uint64(int.from_bytes(MAPPED_PREFIX[8:], "little"))
_IDENTITY_MIX: Final = np.uint64(0xE7037ED1A0B428DB)
_S32: Final = np.uint64(32)
_S48: Final = np.uint64(48)

OWNER: Final = 13
"""Index of the owner in a record seen as 64-bit words (ctrace.record.WORDS)."""


ESTABLISHED: Final = 3
TIME_WAIT: Final = 7
CLOSE: Final = 8
KIND, REASON = np.uint16(0xF), np.uint16(0xF00)
"""Masks of a code, kind | reason << 8."""
PACKED_BITS: Final = 21
PACKED_MAX: Final = (1 << PACKED_BITS) - 1
"""Events that a packed counter can hold before it must be drained."""

AF_INET: Final = 2
TIME_SHIFT: Final = 10
TIME_UNIT: Final = (1 << TIME_SHIFT) / 1e9
"""Seconds in a unit of packed times."""
TICK_MS: Final = np.float32(50)
"""ms by which a time measured in ticks, and its reading, may be late."""
_ENTRY_KINDS: Final = [int(kind) for kind in (Kind.INSERT, Kind.DESTROY, Kind.EXISTING)]
NOWHERE: Final = np.zeros(0, np.intp)
NAT = int(Status.SRC_NAT) | int(Status.DST_NAT)


def spread(h: U64) -> U64:
    """Bijective finaliser, in place: distinct inputs stay distinct.

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
    h = (low >> _S32) * C1
    h += ((low & _LOW_HALF) - MAPPED) * _C4
    h += (high ^ (high >> _S32)) * _C0
    return h


def key_hash(high: U64, low: U64, meta: U64) -> U64:
    """The hash of whole keys: what :class:`Window` computes piece by piece."""
    return address_hash(high, low) + meta * C2


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
        """The owner word of the events at these indices, where their kind has one."""
        owner: U64 = self.words[at, OWNER]
        return owner

    def idle_ms(self, at: npt.NDArray[np.intp]) -> npt.NDArray[np.int32]:
        """ms since something last renewed them, -1 unknown; for destroys and looks at these
        indices."""
        return self.owner(at).astype(np.uint32).view(np.int32)

    def where(self, kind: Kind) -> npt.NDArray[np.intp]:
        """Indices of the events of a kind."""
        if kind == Kind.DESTROY:
            return self.ends
        if kind not in self._found:
            some = self.counts[:, kind].any()
            self._found[kind] = np.flatnonzero(self.code & KIND == int(kind)) if some else NOWHERE
        return self._found[kind]

    def because(self, *reasons: Reason) -> npt.NDArray[np.intp]:
        """Indices of the events with one of these reasons."""
        some = [reason for reason in reasons if self.counts[reason].any()]
        if not some:
            return NOWHERE
        reason = self.code & REASON
        found = reason == int(some[0]) << 8
        for other in some[1:]:
            found |= reason == int(other) << 8
        return np.flatnonzero(found)

    def entries(self) -> npt.NDArray[np.intp] | None:
        """Indices of the births and ends of entries with an identity; None for all."""
        if self.named and int(self.counts[:, _ENTRY_KINDS].sum()) == self.n:
            return None
        return np.flatnonzero(np.isin(self.code & KIND, _ENTRY_KINDS) & (self.ct != 0))

    def nat(self) -> npt.NDArray[np.intp]:
        """Indices of the events whose tuple was rewritten."""
        if not self.translated:
            return NOWHERE
        return np.flatnonzero(self.status & np.uint16(NAT))

    def proto(self, at: npt.NDArray[np.intp]) -> U64:
        """Protocol numbers of the events at these indices."""
        return (self.meta[at] >> np.uint64(16)) & np.uint64(0xFF)

    def kinds(self, at: npt.NDArray[np.intp]) -> U16:
        """:class:`Kind` of the events at these indices."""
        return self.code.take(at) & KIND

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
        return self.dst_hash.take(at) + (self.meta.take(at) | OWNED) * C2

    def _with_netns(self, addresses: U64, at: Optional[npt.NDArray[np.intp]]) -> U64:
        meta = self.meta[:1] if self.alone else some(self.meta, at)
        return some(addresses, at) + (meta & NETNS_MASK) * C2


def some(column: Column, at: Optional[npt.NDArray[np.intp]]) -> Column:
    """A column's values at these indices, or the column."""
    return column if at is None else column.take(at)  # type: ignore[return-value]


_NO_ADDRESS: Final = address_hash(np.zeros(1, np.uint64), np.zeros(1, np.uint64))[0]


def service_hash(meta: U64) -> U64:
    """The hash of keys without an address."""
    h: U64 = meta * C2 + _NO_ADDRESS
    return h


def has_port(proto: int) -> bool:
    """Whether a protocol's tuple holds ports."""
    return proto in PORTED


class Keys:
    """Key words of some of a window's events, gathered only for those asked for."""

    def __init__(
        self,
        high: U64 | None,
        low: U64 | None,
        meta: Callable[[Rows], U64],
        chosen: Rows | None = None,
    ) -> None:
        self._high, self._low, self._meta, self._chosen = high, low, meta, chosen

    def __call__(self, at: Rows) -> npt.NDArray[np.uint64]:
        """The (n, 3) key words of the events at these indices."""
        if self._chosen is not None:
            at = self._chosen[at]
        out = np.zeros((len(at), 3), np.uint64)
        for column, part in enumerate((self._high, self._low)):
            if part is not None:
                out[:, column] = part[at]
        out[:, 2] = self._meta(at)
        return out

    def at(self, chosen: Rows) -> Keys:
        """The same for indices into ``chosen``."""
        return Keys(self._high, self._low, self._meta, chosen)


def grouped(h: U64) -> tuple[U64, npt.NDArray[np.intp], Rows, Rows]:
    """Distinct values of ``h``: (values, how many of each, order, starts in the order).

    One sort of the hashes with their index packed into the low bits, which is
    three times faster than an argsort. Hashes that differ only in those bits
    (17 of 64) stay apart, and may show up as more than one group.
    """
    n = len(h)
    bits = np.uint64(max(1, (n - 1).bit_length()))
    mask = (np.uint64(1) << bits) - np.uint64(1)
    packed = (h & ~mask) | np.arange(n, dtype=np.uint64)
    packed.sort()
    order = (packed & mask).view(np.int64)
    ordered = h.take(order)
    change = np.empty(n, bool)
    change[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=change[1:])
    starts = np.flatnonzero(change)
    return ordered[starts], np.diff(starts, append=n), order, starts
