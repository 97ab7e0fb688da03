"""The lives of namespace numbers: the kernel reuses a number as soon as its namespace has gone.

The first life of a number is known by the number itself, later ones by :func:`~ctrace.batch.life`.
All entries of a namespace are freed before its number is (cleanup_net runs net_ns_net_exit last,
net/core/net_namespace.c, 6.18), so one moment separates the events of two lives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ctrace.batch import Counts, Names, TableReading, life
from ctrace.host import netns
from ctrace.host.netns import Namespace
from ctrace.record import N_REASONS, Events

_NONE: Counts = np.zeros(N_REASONS, np.uint64)


@dataclass
class _Life:
    cookie: int
    """SO_NETNS_COOKIE; 0 where the kernel has none (before 5.14)."""
    number: int = 0
    """How many lives of the same number came before."""
    since: int = 0
    """Boot clock, ns: later events belong to this life."""
    base: Counts = field(default_factory=lambda: np.zeros(N_REASONS, np.uint64))
    """What had been counted under this number before."""
    before: dict[int, Counts] = field(default_factory=dict)
    """Counts of earlier lives, by id: only a few have ids of their own."""


class Lives:
    """Which life of its number each namespace is in."""

    def __init__(self) -> None:
        self._of: dict[int, _Life] = {}
        self._again: set[int] = set()
        """Numbers that were reused: only these need any work."""
        self._gone: dict[int, int] = {}
        """Numbers whose namespace has gone, and when that was noticed."""

    def left(self, gone: Iterable[int], at: int) -> list[int]:
        """These numbers are unused since ``at`` (boot clock, ns); returns the lives that ended."""
        gone = list(gone)
        self._gone.update(dict.fromkeys(gone, at))
        return [self.id_of(inum) for inum in gone]

    def came(self, fresh: Sequence[Namespace], counts: Mapping[int, Counts]) -> None:
        """Namespaces that were not there at the last look; ``counts`` are the current counters."""
        for space in fresh:
            cookie = netns.cookie(space)
            known = self._of.get(space.inum)
            left = self._gone.pop(space.inum, None)
            if known is None:
                self._of[space.inum] = _Life(cookie)
            elif left is not None and (cookie != known.cookie or not cookie):
                total = counts.get(space.inum, known.base)
                name = life(space.inum, known.number)
                done = {**known.before, name: total - known.base + known.before.get(name, _NONE)}
                self._of[space.inum] = _Life(cookie, known.number + 1, left, total.copy(), done)
                self._again.add(space.inum)

    def id_of(self, inum: int) -> int:
        """The id of the present, or last, life of a number."""
        known = self._of.get(inum)
        return life(inum, known.number) if known else inum

    def events(self, events: Events) -> Events:
        """The same events, each with the id of the life that it happened in."""
        return self._named(events, events["ts"]) if self._again and len(events) else events

    def dumped(self, events: Events) -> Events:
        """The same for entries that are in the table now."""
        if not self._again or not len(events):
            return events
        return self._named(events, np.full(len(events), np.iinfo(np.uint64).max))

    def _named(self, events: Events, ts: npt.NDArray[np.uint64]) -> Events:
        copied = events
        for inum in self._again:
            mine = events["netns"] == inum
            if not mine.any():
                continue
            if copied is events:
                copied = events.copy()
            known = self._of[inum]
            now = mine & (ts > np.uint64(known.since))
            copied["netns"][mine] = life(inum, known.number - 1)
            copied["netns"][now] = life(inum, known.number)
        return copied

    def counts(self, counts: Mapping[int, Counts]) -> Mapping[int, Counts]:
        """Counters by life."""
        if not self._again:
            return counts
        found = dict(counts)
        for inum in self._again & found.keys():
            known, total = self._of[inum], found.pop(inum)
            found.update(known.before)
            name = life(inum, known.number)
            found[name] = total - known.base + known.before.get(name, _NONE)
        return found

    def tables(self, tables: tuple[TableReading, ...]) -> tuple[TableReading, ...]:
        """Readings by life."""
        if not self._again:
            return tables
        return tuple(replace(one, netns=self.id_of(one.netns)) for one in tables)

    def names(self, names: Names) -> Names:
        """Names by life."""
        if not self._again:
            return names
        spaces = (replace(one, inum=self.id_of(one.inum)) for one in names.netns.values())
        return replace(
            names,
            netns={one.inum: one for one in spaces},
            listeners={
                (self.id_of(inum), proto, port): owner
                for (inum, proto, port), owner in names.listeners.items()
            },
        )
