"""What was in the tables before ctrace started, read while events already arrive.

The tables are dumped a slice at a time, so that memory does not grow with their size, the largest
first: for each namespace the kernel walks the one hash table of all, so a hundred small ones beside
a large one take seconds (ctnetlink_dump_table in nf_conntrack_netlink.c).
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, Optional

from ctrace.capture.table.seed import Seeding, Slice
from ctrace.errors import CtraceError
from ctrace.host import ctnetlink, netns
from ctrace.host.netns import Namespace
from ctrace.record import Events, empty, join

LATE: Final = 0.1
"""Seconds to wait for the event of an entry that a dump shows: its CPU may have been interrupted
between making the entry and reporting it."""
SPELL: Final = 0.2
"""Seconds after which a slice ends with its namespace, however small it is."""
MISSING: Final = 0.02
"""Share of all entries that may be missing when something is told of the rest."""
PATHS: Final = 5
"""Paths tried to reach a namespace's entries."""


class Older:
    """The entries of some namespaces that are older than all events since ``seeding`` began.

    Call :meth:`read` for one slice after another, and :meth:`with_events` with everything
    that is captured, until :attr:`done`.
    """

    def __init__(
        self,
        spaces: Sequence[Namespace],
        seeding: Seeding,
        ids: Mapping[int, int],
        *,
        held: Optional[Mapping[int, int]] = None,
        late: float = LATE,
        named: Callable[[Events], Events] = lambda rows: rows,
    ) -> None:
        """``ids``: the id that each namespace number has in events; ``held``: how many entries
        each number has, where known; ``late``: seconds by which an event may follow its dump;
        ``named`` gives a dump's rows the same names, and may leave some out."""
        self._ids = ids
        self._seeding, self._late, self._named = seeding, max(late, LATE), named
        counts = held or {}
        self._slices = slices(spaces, lambda inum: counts.get(inum, 0) + seeding.told(ids[inum]))
        self._unread = set(ids.values())
        self._waiting: deque[tuple[float, Slice]] = deque()
        self.missing = {space: counts.get(inum, 0) for inum, space in ids.items()}
        """Entries by the id of each namespace of which some have not been yielded."""

    @property
    def done(self) -> bool:
        """Whether everything has been yielded."""
        return not self._unread and not self._waiting

    @property
    def reading(self) -> bool:
        """Whether there is more to read."""
        return bool(self._unread)

    @property
    def due(self) -> float:
        """When (monotonic) everything read so far is certain."""
        return self._waiting[-1][0] if self._waiting else 0.0

    @property
    def waiting(self) -> int:
        """Slices that were read and wait for their events."""
        return len(self._waiting)

    def read(self) -> None:
        """Read a slice. In one thread; everything else may be called in another."""
        part = next(self._slices)
        ended = [self._ids[inum] for inum in part.ended]
        part = Slice(self._named(part.rows), ended)
        self._waiting.append((time.monotonic() + self._late, part))
        self._unread -= set(ended)

    def with_events(self, events: Events, taken: float, at: int) -> Events:
        """The entries older than all events that are known by now, as of ``at`` (boot clock, ns).

        They belong before ``events``, which are everything that came since the last call
        until ``taken`` (monotonic), later than ``at``.
        """
        found = [self._seeding.first(events, at)]
        while self._waiting and self._waiting[0][0] <= taken:
            found.append(self._seeding.dumped(self._waiting[0][1], at))
            for ended in self._waiting.popleft()[1].ended:
                self.missing.pop(ended, None)
        return join(found)


def must_wait(seedings: Sequence[Older], entries: int) -> bool:
    """Whether too many of all ``entries`` have not been yielded to tell what holds the tables."""
    missing = sum(sum(older.missing.values()) for older in seedings)
    return bool(seedings) and (not missing or missing > MISSING * entries)


def slices(
    spaces: Sequence[Namespace], weight: Callable[[int], int] = lambda _: 0
) -> Iterator[Slice]:
    """What is in the tables now, in slices of at least :data:`~ctrace.host.ctnetlink.SLICE` rows
    or :data:`SPELL` seconds of reading, except the last.

    ``weight``: how many entries wait for a namespace, by its number, to be read: those in its
    table, and those that have to be remembered until then. The next one is that with most.
    """
    parts: list[Events] = []
    ended: list[int] = []
    left, began = list(spaces), time.monotonic()
    while left:
        if ended and time.monotonic() - began > SPELL:
            yield Slice(join(parts) if parts else empty(), tuple(ended))
            parts, ended, began = [], [], time.monotonic()
        space = max(left, key=lambda one: weight(one.inum))
        left.remove(space)
        for rows in _existing(space):
            parts.append(rows)
            if sum(map(len, parts)) >= ctnetlink.SLICE:
                yield Slice(join(parts), tuple(ended))
                parts, ended, began = [], [], time.monotonic()
        ended.append(space.inum)
    yield Slice(join(parts) if parts else empty(), tuple(ended))


def _existing(space: Namespace) -> Iterator[Events]:
    """The entries of one namespace; none where it has gone, or conntrack is not loaded.

    A path through a process leads elsewhere when that process ends or enters another namespace,
    even for a moment; then another process is tried.
    """
    found: Optional[Namespace] = space
    for _ in range(PATHS):
        if found is None:
            return
        with contextlib.suppress(CtraceError, OSError):
            for table in ctnetlink.slices(found.path):
                if table.netns != space.inum:
                    break
                yield table.events
            else:
                return
        found = next((one for one in netns.find() if one.inum == space.inum), None)
