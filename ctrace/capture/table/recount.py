"""What is held, counted anew from the table after events were lost.

Where a birth or an end was lost, what its keys hold would stay wrong for ever. The table knows:
it is read again through ctnetlink, one namespace after another, a part of it each second. What
comes first of an entry since the reading began settles it, as at the start
(:mod:`ctrace.capture.table.seed`):

- INSERT: it is new, and was counted as it came.
- DESTROY: it was there when the reading began.
- the reading itself: it was there, too.

So only a number of eight bytes is kept of each entry, not the table.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.batch import Counts
from ctrace.errors import CtraceError
from ctrace.filters import Filter
from ctrace.host import ctnetlink
from ctrace.host.netns import Namespace
from ctrace.losses import Losses
from ctrace.record import Events, Kind, Reason, boot_ns, empty, identity, join, words

QUIET: Final = 1.0
"""Seconds without a loss before a reading begins: during a flood it would be in vain."""
SPELL: Final = 0.05
"""Seconds of each second that are spent reading."""
ENTRIES: Final = 1 << 16
"""Entries that one batch brings at most (8 MB), plus a few thousand."""
COST: Final = 20.0
"""After a reading, the next begins no sooner than this many times its own duration."""
MOST: Final = 1 << 22
"""Entries, and ends while reading, that can be told apart (32 MB); with more, nothing is known."""
AGAIN: Final = 30.0
"""Seconds after which a reading that failed is tried again."""
LATE_NS: Final = 100_000_000
"""ns within which the event of an entry that was read arrives, also from an interrupted sender."""


@dataclass
class _Reading:
    """A table that is being read."""

    space: Namespace
    pieces: Iterator[Events]
    settled: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    """Identities that had an event since the reading began, sorted."""
    waiting: list[Events] = field(default_factory=list)
    """Pieces that may still be changed by events not polled yet."""
    read_at: int = 0
    """Boot clock, ns, when the last of them was read."""
    done: bool = False
    worked: float = 0.0

    def settle(self, rows: Events) -> Events:
        """Of these, in order of arrival, the entries that were there when the reading began."""
        if not len(rows):
            return rows
        told = identity(words(rows))
        ids, first = np.unique(told, return_index=True)
        at = np.searchsorted(self.settled, ids)
        known = np.zeros(len(ids), bool)
        inside = at < len(self.settled)
        known[inside] = self.settled[at[inside]] == ids[inside]
        fresh = rows[np.sort(first[~known])]
        self.settled = np.insert(self.settled, at[~known], ids[~known])
        there: Events = fresh[fresh["kind"] != int(Kind.INSERT)].copy()
        return there


class Recount:
    """Notes losses, and reads the tables again once they have ended."""

    def __init__(self, wanted: Filter, *, same_ids: bool) -> None:
        """``same_ids``: events come from ctnetlink too, so a dump's ``ct`` is the same as
        theirs."""
        self._wanted = wanted
        self._same_ids = same_ids
        self._losses = Losses()
        self._doubtful: dict[int, tuple[float, int]] = {}
        """Namespaces, by inode number, that lost something, and when that was last reported:
        monotonic seconds, and nanoseconds of the boot clock."""
        self._reading: Optional[_Reading] = None
        self._due = 0.0
        self._at = 0
        """Boot clock, ns: the end of the last batch."""

    def note(self, lost: int, counts: Mapping[int, Counts], spaces: Collection[int]) -> None:
        """``lost`` records are missing from a batch; ``counts`` show which namespaces they belong
        to."""
        whose = self._losses.of(lost, counts, spaces).keys() & set(spaces)
        if self._reading and self._reading.space.inum in whose:
            self._stop()
        told = time.monotonic(), boot_ns()
        self._doubtful.update(dict.fromkeys(whose, told))

    def take(self, events: Events, until: int, spaces: Sequence[Namespace], look: bool) -> Events:
        """A batch's events, up to ``until`` (boot clock, ns), with what the reading adds.

        ``look``: set about once a second, when a part of the table may be read.
        """
        if not self._doubtful and not self._reading:
            return events
        here = {space.inum: space for space in spaces}
        before, self._at = self._at, max(until, int(events["ts"][-1]) if len(events) else 0)
        if self._reading and self._reading.space.inum not in here:
            self._stop()
        self._doubtful = {inum: at for inum, at in self._doubtful.items() if inum in here}
        if self._reading:
            try:
                found, done = self._read_on(self._reading, events, until, look)
            except (CtraceError, OSError):
                self._stop(AGAIN)
                return events
            # (first: an entry's end must not come before it is found)
            found["ts"] = before
            return join([found, events, *([self._end(self._reading)] if done else [])])
        now = time.monotonic()
        if look and now >= self._due:
            # A loss is reported before older events of a backlog. An entry whose birth
            # comes after the beginning must not be one whose end was lost.
            quiet = [
                inum
                for inum, (last, at) in self._doubtful.items()
                if now - last >= QUIET and at <= self._at
            ]
            if not quiet:
                return events
            space = here[quiet[0]]
            self._reading = _Reading(space, ctnetlink.pieces(space.path, space.inum))
            return join([events, _mark(Kind.RECOUNT, space.inum, self._at)])
        return events

    def close(self) -> None:
        """Close the table; safe to call twice."""
        self._stop()

    def _stop(self, pause: float = 0.0) -> None:
        reading, self._reading = self._reading, None
        if reading:
            self._doubtful.setdefault(reading.space.inum, (0.0, 0))
            _close(reading)
            self._due = max(self._due, time.monotonic() + pause)

    def _read_on(
        self, reading: _Reading, events: Events, until: int, look: bool
    ) -> tuple[Events, bool]:
        """The entries now known to have been there, and whether the reading is complete."""
        begin = time.monotonic()
        mine = events["netns"] == reading.space.inum
        mine &= np.isin(events["kind"], (int(Kind.INSERT), int(Kind.DESTROY)))
        parts = [reading.settle(events[mine])]
        if reading.read_at + LATE_NS <= until:
            parts += [reading.settle(piece) for piece in reading.waiting]
            reading.waiting = []
            if reading.done:
                return self._found(reading, parts), True
            if look:
                self._read(reading, begin)
        if len(reading.settled) > MOST:
            raise CtraceError("too much for a recount")
        reading.worked += time.monotonic() - begin
        return self._found(reading, parts), False

    def _read(self, reading: _Reading, begin: float) -> None:
        count = 0
        while time.monotonic() - begin < SPELL and count < ENTRIES:
            piece = next(reading.pieces, None)
            if piece is None:
                reading.done = True
                break
            count += len(piece)
            reading.waiting.append(piece[self._wanted.mask(piece)])
        reading.read_at = boot_ns()

    def _found(self, reading: _Reading, parts: Sequence[Events]) -> Events:
        found = join(parts)
        if not self._same_ids:
            found["ct"][found["kind"] == int(Kind.EXISTING)] = 0
        found["kind"], found["reason"] = Kind.FOUND, Reason.NONE
        found["netns"] = reading.space.inum
        found["owner"], found["cgroup"] = 0, 0
        return found

    def _end(self, reading: _Reading) -> Events:
        self._reading = None
        self._doubtful.pop(reading.space.inum, None)
        _close(reading)
        self._due = max(self._due, time.monotonic() + COST * reading.worked)
        return _mark(Kind.RECOUNTED, reading.space.inum, self._at)


def _close(reading: _Reading) -> None:
    close = getattr(reading.pieces, "close", None)
    if close is not None:
        close()


def _mark(kind: Kind, netns: int, at: int) -> Events:
    row = empty(1)
    row["kind"], row["netns"], row["ts"] = kind, netns, at
    return row
