"""The table as it was when the hooks were attached: a dump, corrected by events.

A dump takes time, and is read after the hooks are in place, so an entry may be in
both. What an entry's *first* event says settles it:

- INSERT: it was not there before; a row of the dump is that same new entry.
- DESTROY: it was there before, also when the dump came too late to see it.
- none: it was there before if the dump has it.

With that, existing + inserts - destroys is the table at every later moment, entry by
entry. A large table is never held whole: the dump comes in slices, and of what is done, and
of what events told, only identities stay, 8 bytes each, until the namespace's dump has ended.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ctrace.record import RECORD, Events, Kind, Reason, empty, identity, words

U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Slice:
    """A part of what is in some namespaces' tables."""

    rows: Events
    ended: Sequence[int] = ()
    """Namespaces that have no rows after this slice."""


class Seeding:
    """Finds the entries older than all events, from these and slices of a dump as they come.

    ``open``: the namespaces whose tables will be dumped, one after another. A result's
    ``ct`` is the one that the entry's DESTROY carries where that came before its slice;
    else 0, or the dump's with ``same_ids`` (when events come from ctnetlink too). Owner
    fields are zero.

    An entry is known by both its tuples, protocol, zone and namespace: after a NAT
    clash two entries share the original one.
    """

    def __init__(self, open: Collection[int], *, same_ids: bool = False) -> None:
        self._open: set[int] = set(open)
        self._same_ids = same_ids
        self._told = {netns: _Set() for netns in open}
        """For each open namespace: its entries whose first event has come."""
        self._given = _Set()
        """Entries already yielded from the dump of the namespace being dumped."""

    def first(self, events: Events, at: int) -> Events:
        """The entries that the next events show to have existed at ``at`` (boot clock, ns).

        Give it all events, in time order; ``at`` is before them.
        """
        ends = (events["kind"] == Kind.INSERT) | (events["kind"] == Kind.DESTROY)
        ends &= np.isin(events["netns"], list(self._open))
        events = events[ends]
        if not len(events):
            return empty()
        rows = words(events)
        entries, index = np.unique(identity(rows), return_index=True)
        spaces = events["netns"][index]
        new = ~(self._has_told(entries, spaces) | self._given.has(entries))
        for netns in np.unique(spaces[new]).tolist():
            self._told[netns].add(entries[new & (spaces == netns)])
        found: Events = rows[np.sort(index[new])].view(RECORD).reshape(-1)
        return self._older(found[found["kind"] == Kind.DESTROY], at)

    def dumped(self, part: Slice, at: int) -> Events:
        """The entries of a slice that existed; every event up to the end of its reading must have
        come."""
        entries, index = np.unique(identity(words(part.rows)), return_index=True)
        new = ~(self._has_told(entries, part.rows["netns"][index]) | self._given.has(entries))
        entries, index = entries[new], index[new]
        if part.ended:
            self._open -= set(part.ended)
            for netns in part.ended:
                self._told.pop(netns, None)
            self._given = _Set()
            going_on = np.isin(part.rows["netns"][index], list(self._open))
            self._given.add(entries[going_on])
        else:
            self._given.add(entries)
        rows = self._older(part.rows[np.sort(index)], at)
        if not self._same_ids:
            rows["ct"] = 0
        return rows

    def told(self, netns: int) -> int:
        """How many entries of an open namespace had their first event."""
        return len(self._told.get(netns, ()))

    def _has_told(self, entries: U64, spaces: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        """Which of these entries, in these namespaces, had their first event."""
        found = np.zeros(len(entries), bool)
        for netns in np.unique(spaces).tolist():
            if netns in self._told:
                mine = spaces == netns
                found[mine] = self._told[netns].has(entries[mine])
        return found

    def _older(self, rows: Events, at: int) -> Events:
        """``rows``, a copy, as entries that were there at ``at``."""
        rows["ts"], rows["kind"], rows["reason"] = at, Kind.EXISTING, Reason.NONE
        rows["owner"] = rows["cgroup"] = 0
        return rows


class _Set:
    """A growing set of numbers, in sorted arrays."""

    def __init__(self) -> None:
        self._piles: list[U64] = []

    def __len__(self) -> int:
        return sum(map(len, self._piles))

    def has(self, numbers: U64) -> npt.NDArray[np.bool_]:
        """Which of these numbers are in the set."""
        found = np.zeros(len(numbers), bool)
        for pile in self._piles:
            if len(pile):
                at = np.searchsorted(pile, numbers)
                found |= pile[at.clip(max=len(pile) - 1)] == numbers
        return found

    def add(self, numbers: U64) -> None:
        """Add sorted numbers that are not in the set yet."""
        self._piles.append(numbers)
        # Each is at least twice as large as the next, so there are few and each is seldom copied.
        while len(self._piles) > 1 and len(self._piles[-2]) < 2 * len(self._piles[-1]):
            last = self._piles.pop()
            self._piles[-1] = np.concatenate([self._piles[-1], last])
            self._piles[-1].sort()
