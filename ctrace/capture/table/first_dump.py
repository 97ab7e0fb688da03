"""What was in the tables before ctrace started, read while events already arrive.

The tables are dumped a slice at a time, so that memory does not grow with their size.
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
        late: float = LATE,
        named: Callable[[Events], Events] = lambda rows: rows,
    ) -> None:
        """``ids``: the id that each namespace number has in events; ``late``: seconds by which an
        event may follow its dump; ``named`` gives a dump's rows the same names, and may leave some
        out."""
        self._ids = ids
        self._seeding, self._late, self._named = seeding, max(late, LATE), named
        self._slices = slices(spaces, lambda inum: seeding.told(ids[inum]))
        self._unread = set(ids.values())
        self._waiting: deque[tuple[float, Slice]] = deque()

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
            self._waiting.popleft()
        return join(found)


def slices(
    spaces: Sequence[Namespace], told: Callable[[int], int] = lambda _: 0
) -> Iterator[Slice]:
    """What is in the tables now, in slices of at least :data:`~ctrace.host.ctnetlink.SLICE` rows,
    except the last.

    ``told``: how much has to be remembered of a namespace, by its number, until it is read; the
    next one is that with most.
    """
    parts: list[Events] = []
    ended: list[int] = []
    left = list(spaces)
    while left:
        space = max(left, key=lambda one: told(one.inum))
        left.remove(space)
        for rows in _existing(space):
            parts.append(rows)
            if sum(map(len, parts)) >= ctnetlink.SLICE:
                yield Slice(join(parts), tuple(ended))
                parts, ended = [], []
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
