"""From an entry's identity to its birth, so that its end tells how long it stayed.

A fixed table of 8-byte slots (23 bits of the identity's hash, 40 bits of birth
time in units of 16 us), in buckets of eight. An entry's slot is found by its
identity, the kernel address that ``ct`` holds, which is reused as soon as an entry
is freed: a birth replaces whatever the identity held before. Entries whose end
was lost therefore go away by themselves, by reuse or, in a full bucket, as the
oldest. A wrong match needs two live entries with the same 40 bits of hash
(one in five million per lookup, with 200,000 entries).

Under a flood one entry of :data:`~ctrace.record.PART` is enough to know lifetimes, and
pairing all would cost more than everything else. :attr:`Births.thin` then leaves out
the others, except where the birth has an ``extra``: who opened an entry is needed for each.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from ctrace.model.keys.columns import I64, U64, identity
from ctrace.model.keys.scatter import Rows
from ctrace.record import in_part

_WAY_BITS: Final = 3
WAYS: Final = 1 << _WAY_BITS
UNIT_SHIFT: Final = 14
_TIME_BITS: Final = 40
_TIME_MASK: Final = np.uint64((1 << _TIME_BITS) - 1)
_HALF: Final = np.uint64(1 << (_TIME_BITS - 1))
_UNITS: Final = np.uint64(UNIT_SHIFT)
_NONE: Final[Rows] = np.zeros(0, np.intp)
_NO_ID: Final[U64] = np.zeros(0, np.uint64)
UNKNOWN: Final = -1
"""Age of an end whose birth is unknown."""
_TAG_BITS: Final = 64 - _TIME_BITS
_MOST_BITS: Final = 25
"""Bits of a slot number at most: with more, a tag's bits would overlap those that a sort packs."""
EXISTING: Final = 0x8000
"""Bit of ``extra``: the entry was there before the tracer, its birth is unknown."""

LATE_NS: Final = 100_000_000
"""ns by which a birth may be reported after its own end, because CPUs are polled in turn."""
_LATE_MAX: Final = 1024


def _way(first: U64, way: int) -> Rows:
    """The n-th slot to try: around the bucket from where the identity starts."""
    if not way:
        return first.view(np.int64)
    seven = np.uint64(WAYS - 1)
    return ((first & ~seven) | ((first + np.uint64(way)) & seven)).view(np.int64)


class Births:
    """Birth times of the entries alive, for at most ``slots`` (a power of two, up to 2**25)."""

    def __init__(self, slots: int) -> None:
        bits = min(max(4, (slots - 1).bit_length()), _MOST_BITS)
        self._slot = np.zeros(1 << bits, np.uint64)
        self._extra = np.zeros(1 << bits, np.uint16)
        # An identity, from its highest bit on: bucket, tag, the way to begin with.
        at = 64 - (bits - _WAY_BITS)
        self._bucket_shift = np.uint64(at)
        self._tag_shift = np.uint64(at - _TAG_BITS)
        self._way_shift = np.uint64(at - _TAG_BITS - _WAY_BITS)
        self._late_id = self._late_ts = _NO_ID
        self._extras = False
        self._thin = False
        self._thick_since = -1
        self._marks = np.zeros(1 << bits, bool)
        """Whether an identity that begins with these bits may have an ``extra``."""
        self._mark_shift = np.uint64(64 - bits)
        self.forgotten = 0
        """Births that a full bucket pushed out: these entries' residence stays unknown."""
        self.late = 0
        """Ends that were reported before their own birth."""

    def nbytes(self) -> int:
        """Memory held."""
        return self._slot.nbytes + self._extra.nbytes + self._marks.nbytes

    @property
    def thin(self) -> bool:
        """Whether most entries without an ``extra`` are left out."""
        return self._thin

    @property
    def certain_since(self) -> float:
        """Boot clock, ns: entries that were known after this, and are not now, have ended."""
        return math.inf if self._thin else self._thick_since

    def thin_out(self, thin: bool, now: int) -> None:
        """Begin or stop to leave most out, at ``now`` (ns); call it once an interval."""
        if self._thin and not thin:
            self._thick_since = now
        self._thin = thin
        if thin and self._extras:
            some = np.flatnonzero((self._extra != 0) & (self._slot != 0))
            tag = self._slot.take(some) >> np.uint64(64 - _WAY_BITS)
            self._marks[:] = False
            self._marks[(some & -WAYS) | tag.view(np.int64)] = True

    def step(
        self,
        ct: U64,
        meta: U64,
        ts: U64,
        ends: npt.NDArray[np.bool_],
        extra: npt.NDArray[np.uint16],
    ) -> tuple[Rows, I64, npt.NDArray[np.uint16]]:
        """Handle births and ends in time order; of ``meta`` the namespace counts.

        Returns indices of the ends that were looked for, in order, nanoseconds since the birth
        of each or :data:`UNKNOWN`, and per event the ``extra`` given at its birth. At most
        2**17 events.
        """
        self._extras |= bool(extra.any())
        if self._thin:
            return self._step_thin(ct, meta, ts, ends, extra)
        at = np.flatnonzero(ends)
        age, found = self._step(identity(ct, meta), ts, ends, extra)
        age = age.take(at)
        if self._thick_since >= 0:
            sure = np.flatnonzero(~self._unsure(ct.take(at), ts.take(at), age, found.take(at)))
            at, age = at.take(sure), age.take(sure)
        return at, age, found

    def _unsure(
        self, ct: U64, ts: U64, age: I64, found: npt.NDArray[np.uint16]
    ) -> npt.NDArray[np.bool_]:
        """Ends whose birth was not sampled: their age would be that of a previous entry there."""
        unsure: npt.NDArray[np.bool_] = ~in_part(ct) & (found == 0)
        if not self._thin:
            unsure &= (age < 0) | (ts.view(np.int64) - age < self._thick_since)
        return unsure

    def _step_thin(
        self,
        ct: U64,
        meta: U64,
        ts: U64,
        ends: npt.NDArray[np.bool_],
        extra: npt.NDArray[np.uint16],
    ) -> tuple[Rows, I64, npt.NDArray[np.uint16]]:
        looked = in_part(ct)
        if self._extras:
            mark = (identity(ct, meta) >> self._mark_shift).view(np.int64)
            self._marks[mark[extra != 0]] = True
            looked |= self._marks.take(mark)
        at = np.flatnonzero(looked)
        some, times, ended = ct.take(at), ts.take(at), ends.take(at)
        age, extras = self._step(identity(some, meta.take(at)), times, ended, extra.take(at))
        found = extra
        if self._extras:  # some only looked as if they might have an ``extra``
            found = extra.copy()
            found[at] = extras
            ended &= ~self._unsure(some, times, age, extras)
        which = np.flatnonzero(ended)
        return at.take(which), age.take(which), found

    def _step(
        self, ident: U64, ts: U64, ends: npt.NDArray[np.bool_], extra: npt.NDArray[np.uint16]
    ) -> tuple[I64, npt.NDArray[np.uint16]]:
        n = len(ident)
        age = np.full(n, UNKNOWN, np.int64)
        found = extra
        if not n:
            return age, found
        if self._extras:
            found = extra.copy()

        # Sort by identity, then time: the index and the kind are packed into low bits.
        bits = np.uint64(max(1, (n - 1).bit_length()) + 1)
        low = (np.uint64(1) << bits) - np.uint64(1)
        packed = ident & ~low
        packed |= np.arange(0, 2 * n, 2, dtype=np.uint64)
        packed |= ends.astype(np.uint64)
        packed.sort()
        order = ((packed & low) >> np.uint64(1)).view(np.int64)
        end = (packed.astype(np.uint8) & np.uint8(1)).view(bool)
        run = packed >> bits
        same = np.empty(n + 1, bool)
        same[0] = same[n] = False
        np.equal(run[1:], run[:-1], out=same[1:n])

        # A birth directly followed by an end of the same identity.
        inside = np.flatnonzero(same[1:n] & end[1:] & ~end[:-1])
        if inside.size:
            born, died = order[inside], order[inside + 1]
            age[died] = (ts[died] - ts[born]).view(np.int64)
            found[died] = extra[born]

        unmatched = _NONE
        wanted = np.flatnonzero(end & ~same[:n])
        if wanted.size:
            at = order.take(wanted)
            unmatched = self._take(packed.take(wanted), ts.take(at), at, age, found)
        stays = ~(end | same[1:])
        if self._late_id.size:
            self._drop_late(stays, packed, int(bits), ts, order)
        kept = np.flatnonzero(stays)
        if kept.size:
            at = order.take(kept)
            self._put(packed.take(kept), ts.take(at), extra.take(at))
        self._remember_late(unmatched, ident, ts)
        if self._extras:
            exists = (found & EXISTING) != 0
            if exists.any():
                age[exists] = UNKNOWN
        return age, found

    def peek(self, ct: U64, meta: U64, ts: U64) -> tuple[I64, npt.NDArray[np.uint16]]:
        """Age at ``ts`` and ``extra`` of entries that live on; UNKNOWN without their birth."""
        ident = identity(ct, meta)
        age, found = np.full(len(ident), UNKNOWN, np.int64), np.zeros(len(ident), np.uint16)
        first, tag, now = self._first(ident), self._tag(ident), ts >> _UNITS
        for way in range(WAYS):
            place = _way(first, way)
            slot = self._slot.take(place)
            units = (now - slot) & _TIME_MASK
            extra = self._extra.take(place)
            match = ((slot ^ tag) <= _TIME_MASK) & (units < _HALF)
            found[match] = extra[match]
            match &= (extra & EXISTING) == 0
            age[match] = (units[match] << _UNITS).view(np.int64)
        if self._thin or self._thick_since >= 0:
            age[self._unsure(ct, ts, age, found)] = UNKNOWN
        return age, found

    def _first(self, ident: U64) -> U64:
        """The slot to try first."""
        first = (ident >> self._bucket_shift) << np.uint64(_WAY_BITS)
        first |= (ident >> self._way_shift) & np.uint64(WAYS - 1)
        return first

    def _tag(self, ident: U64) -> U64:
        tag = (ident >> self._tag_shift) << np.uint64(_TIME_BITS)
        tag |= np.uint64(1 << _TIME_BITS)  # a slot in use is never zero
        return tag

    def _take(self, ident: U64, ts: U64, at: Rows, age: I64, found: npt.NDArray[np.uint16]) -> Rows:
        """Fill in ``age`` and ``found`` of the ends at ``at``; returns those without a birth."""
        first, tag, now = self._first(ident), self._tag(ident), ts >> _UNITS
        for way in range(WAYS):
            place = _way(first, way)
            slot = self._slot.take(place)
            match = (slot ^ tag) <= _TIME_MASK
            hit = np.flatnonzero(match)
            if hit.size:
                spot, who = place, at
                if hit.size < at.size:
                    spot, who, slot = place.take(hit), at.take(hit), slot.take(hit)
                units = (now if hit.size == at.size else now.take(hit)) - slot
                units &= _TIME_MASK
                if units.max() >= _HALF:  # reported by CPUs whose order is not certain
                    units[units >= _HALF] = 0
                age[who] = (units << _UNITS).view(np.int64)
                self._slot[spot] = 0
                if self._extras:
                    found[who] = self._extra.take(spot)
                if hit.size == at.size:
                    return _NONE
            left = np.flatnonzero(~match)
            first, tag, now, at = first.take(left), tag.take(left), now.take(left), at.take(left)
        return at

    def _put(self, ident: U64, ts: U64, extra: npt.NDArray[np.uint16]) -> None:
        first, tag = self._first(ident), self._tag(ident)
        value = tag | ((ts >> _UNITS) & _TIME_MASK)
        for way in range(WAYS):
            place = _way(first, way)
            slot = self._slot.take(place)
            ok = np.flatnonzero((slot == 0) | ((slot ^ tag) <= _TIME_MASK))
            spot = place.take(ok)
            self._slot[spot] = value.take(ok)
            if self._extras:
                self._extra[spot] = extra.take(ok)
            left = np.flatnonzero(self._slot.take(place) != value)
            if not left.size:
                return
            first, tag, value = first.take(left), tag.take(left), value.take(left)
            extra = extra.take(left)
        self.forgotten += len(first)
        for _ in range(WAYS):
            bucket = (first & ~np.uint64(WAYS - 1))[:, None].view(np.int64) + np.arange(WAYS)
            older_by = (value[:, None] - self._slot[bucket]) & _TIME_MASK
            older_by[older_by >= _HALF] = 0
            place = bucket[np.arange(len(bucket)), older_by.argmax(axis=1)]
            self._slot[place], self._extra[place] = value, extra
            left = np.flatnonzero(self._slot.take(place) != value)  # two chose the same
            if not left.size:
                return
            first, value, extra = first[left], value[left], extra[left]

    def _remember_late(self, unmatched: Rows, ident: U64, ts: U64) -> None:
        if not unmatched.size:
            self._late_id = self._late_ts = _NO_ID
            return
        recent = unmatched[ts[unmatched] + np.uint64(LATE_NS) >= ts[-1]][-_LATE_MAX:]
        self._late_id, self._late_ts = ident[recent], ts[recent]

    def _drop_late(
        self, kept: npt.NDArray[np.bool_], packed: U64, bits: int, ts: U64, order: Rows
    ) -> None:
        """Leave out births whose end came in the previous window; all but ``ts`` in ``order``."""
        low = np.uint64((1 << bits) - 1)
        at = np.searchsorted(packed, self._late_id & ~low)
        inside = at < len(packed)
        at, late_id, late_ts = at[inside], self._late_id[inside], self._late_ts[inside]
        late = kept[at] & ((packed[at] ^ late_id) <= low) & (ts[order[at]] <= late_ts)
        kept[at[late]] = False
        self.late += int(late.sum())

    def remap(self, moved: npt.NDArray[np.uint16]) -> None:
        """Renumber the ``extra`` of every birth: ``moved[old]`` is the new number."""
        flag = self._extra & np.uint16(EXISTING)
        self._extra[:] = moved[self._extra & np.uint16(EXISTING - 1)] | flag

    def alive(self) -> int:
        """Entries that are alive: their birth is known, or they are known to be older."""
        return int(np.count_nonzero(self._slot))
