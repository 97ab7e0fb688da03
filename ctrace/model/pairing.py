"""From an entry's identity to its birth, so that its end tells how long it stayed.

A fixed table of 8-byte slots (23 bits of the identity's hash, 40 bits of birth
time in units of 16 us), in buckets of eight. An entry's slot is found by its
identity, the kernel address that ``ct`` holds, which is reused as soon as an entry
is freed: a birth replaces whatever the identity held before. Entries whose end
was lost therefore go away by themselves, by reuse or, in a full bucket, as the
oldest. A wrong match needs two live entries with the same 43 bits of hash
(one in five million per lookup).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from ctrace.model.keys import I64, U64, finish
from ctrace.model.scatter import Rows

WAYS: Final = 8
UNIT_SHIFT: Final = 14
_TIME_BITS: Final = 40
_TIME_MASK: Final = np.uint64((1 << _TIME_BITS) - 1)
_HALF: Final = np.uint64(1 << (_TIME_BITS - 1))
_NETNS_MIX: Final = np.uint64(0x9FB21C651E98DF25)
_IDENTITY_MIX: Final = np.uint64(0xE7037ED1A0B428DB)
EXISTING: Final = 0x8000
"""Bit of ``extra``: the entry was there before the tracer, its birth is unknown."""

LATE_NS: Final = 100_000_000
"""How much later a birth may be reported than its own end, by CPUs polled in turn."""
_LATE_MAX: Final = 1024


def identity(ct: U64, netns: U64) -> U64:
    """A 64-bit identity: the address, and for ctnetlink's 32-bit ids the namespace."""
    return finish((ct * _IDENTITY_MIX) ^ (netns * _NETNS_MIX))


class Births:
    """Birth times of the entries alive, for at most ``slots`` of them (a power of two)."""

    def __init__(self, slots: int) -> None:
        bits = max(4, (slots - 1).bit_length())
        self._slot = np.zeros(1 << bits, np.uint64)
        self._extra = np.zeros(1 << bits, np.uint16)
        self._bucket_shift = np.uint64(64 - bits + 3)
        self._start_shift = np.uint64(64 - bits)
        self._tag_shift = np.uint64(64 - bits - 24)
        self._late_id = np.zeros(0, np.uint64)
        self._late_ts = np.zeros(0, np.uint64)
        self.forgotten = 0
        """Births that a full bucket pushed out: these entries' residence stays unknown."""
        self.late = 0
        """Ends that were reported before their own birth."""

    def nbytes(self) -> int:
        """Memory held."""
        return self._slot.nbytes + self._extra.nbytes

    def step(
        self, ident: U64, ts: U64, ends: npt.NDArray[np.bool_], extra: npt.NDArray[np.uint16]
    ) -> tuple[I64, npt.NDArray[np.uint16]]:
        """Handle births and ends in time order.

        Per event, what is known of an end: nanoseconds since its birth, or -1, and
        the ``extra`` given at the birth. Births get -1 and their own.
        """
        n = len(ident)
        age = np.full(n, -1, np.int64)
        found = extra.copy()
        if not n:
            return age, found
        bits = np.uint64(max(1, (n - 1).bit_length()))
        mask = (np.uint64(1) << bits) - np.uint64(1)
        packed = (ident & ~mask) | np.arange(n, dtype=np.uint64)
        packed.sort()
        order = (packed & mask).view(np.int64)
        run = packed >> bits
        same = run[1:] == run[:-1]
        end = ends.take(order)

        # A birth directly followed by an end of the same identity.
        inside = np.flatnonzero(same & end[1:] & ~end[:-1])
        if inside.size:
            born, died = order[inside], order[inside + 1]
            age[died] = (ts[died] - ts[born]).view(np.int64)
            found[died] = extra[born]

        first = np.empty(n, bool)
        first[0] = True
        np.logical_not(same, out=first[1:])
        wanted = order[np.flatnonzero(end & first)]
        if wanted.size:
            self._take(ident.take(wanted), ts.take(wanted), wanted, age, found)

        last = np.empty(n, bool)
        last[-1] = True
        np.logical_not(same, out=last[:-1])
        kept = order[np.flatnonzero(last & ~end)]
        if kept.size:
            kept = self._drop_late(kept, ident, ts)
            self._put(ident.take(kept), ts.take(kept), extra.take(kept))
        unmatched = wanted[age[wanted] < 0]
        self._remember_late(unmatched, ident, ts)
        exists = (found & EXISTING) != 0
        if exists.any():
            age[exists] = -1
        return age, found

    def _place(self, ident: U64) -> tuple[U64, U64, U64]:
        base = (ident >> self._bucket_shift) << np.uint64(3)
        start = (ident >> self._start_shift) & np.uint64(7)
        tag = (ident >> self._tag_shift) << np.uint64(_TIME_BITS)
        tag |= np.uint64(1 << _TIME_BITS)  # a slot in use is never zero
        return base, start, tag

    def _take(self, ident: U64, ts: U64, at: Rows, age: I64, found: npt.NDArray[np.uint16]) -> None:
        base, start, tag = self._place(ident)
        now = ts >> np.uint64(UNIT_SHIFT)
        left = None
        for way in range(WAYS):
            place = (base | ((start + np.uint64(way)) & np.uint64(7))).view(np.int64)
            slot = self._slot.take(place)
            match = ((slot ^ tag) <= _TIME_MASK) & (slot != 0)
            hit = np.flatnonzero(match)
            if hit.size:
                spot, who = place[hit], at[hit]
                units = (now[hit] - slot[hit]) & _TIME_MASK
                units[units >= _HALF] = 0  # reported by CPUs whose order is not certain
                age[who] = (units << np.uint64(UNIT_SHIFT)).view(np.int64)
                found[who] = self._extra[spot]
                self._slot[spot] = 0
            left = np.flatnonzero(~match)
            if not left.size:
                return
            base, start, tag, now, at = base[left], start[left], tag[left], now[left], at[left]

    def _put(self, ident: U64, ts: U64, extra: npt.NDArray[np.uint16]) -> None:
        base, start, tag = self._place(ident)
        value = tag | ((ts >> np.uint64(UNIT_SHIFT)) & _TIME_MASK)
        for way in range(WAYS):
            place = (base | ((start + np.uint64(way)) & np.uint64(7))).view(np.int64)
            slot = self._slot.take(place)
            ok = np.flatnonzero((slot == 0) | ((slot ^ tag) <= _TIME_MASK))
            spot = place[ok]
            self._slot[spot] = value[ok]
            self._extra[spot] = extra[ok]
            left = np.flatnonzero(self._slot.take(place) != value)
            if not left.size:
                return
            base, start, tag, value = base[left], start[left], tag[left], value[left]
            extra = extra[left]
        bucket = base[:, None].view(np.int64) + np.arange(WAYS)
        oldest = ((value[:, None] - self._slot[bucket]) & _TIME_MASK).argmax(axis=1)
        place = bucket[np.arange(len(bucket)), oldest]
        self._slot[place], self._extra[place] = value, extra
        self.forgotten += len(place)

    def _remember_late(self, unmatched: Rows, ident: U64, ts: U64) -> None:
        recent = unmatched[ts[unmatched] + np.uint64(LATE_NS) >= ts[-1]][-_LATE_MAX:]
        self._late_id, self._late_ts = ident[recent], ts[recent]

    def _drop_late(self, kept: Rows, ident: U64, ts: U64) -> Rows:
        """Leave out births whose end came in the previous window."""
        if not self._late_id.size:
            return kept
        order = np.argsort(self._late_id)
        ids = self._late_id[order]
        at = np.minimum(np.searchsorted(ids, ident[kept]), len(ids) - 1)
        late = (ids[at] == ident[kept]) & (self._late_ts[order][at] >= ts[kept])
        self.late += int(late.sum())
        on_time: Rows = kept[~late]
        return on_time

    def remap(self, moved: npt.NDArray[np.uint16]) -> None:
        """Renumber the ``extra`` of every birth: ``moved[old]`` is the new number."""
        flag = self._extra & np.uint16(EXISTING)
        self._extra[:] = moved[self._extra & np.uint16(EXISTING - 1)] | flag

    def alive(self) -> int:
        """Entries whose birth is known or that are known to be older."""
        return int(np.count_nonzero(self._slot))
