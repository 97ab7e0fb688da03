"""What is in each table, by walking a part of it each second.

No event tells when an entry becomes ASSURED or changes its state, and those that end say
little of those that stay. So a few hundred entries of the table itself are looked at, the
next buckets each time: which bucket an entry is in depends on nothing that one asks for here.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Optional

from ctrace.batch import TableReading
from ctrace.errors import CtraceError
from ctrace.kernel.chains import Walker
from ctrace.record import Events, Kind

ENOUGH: Final = 512
"""Stop after this many entries a second; a run of 128 nodes may exceed it."""
RUNS: Final = 256
"""Runs of a second: at most 32,768 nodes and empty buckets, about 2 ms."""
FIRST_RUNS: Final = 1024
"""The same until it has been once round the table, so that something is known soon."""
LOOKED_AT: Final = 256
"""Entries that were met and are looked at more closely in a second: about 1 ms."""
ASKED: Final = 8
"""Entries that are asked for where the table is."""
LOOK_MET: Final = 1
"""Bit of an entry's address with which a look is one of these (bpf/look.h)."""
_NOTHING: Final = (0, 0)


class Survey:
    """Walks on from where it stopped the last time.

    ``only``: the namespace whose entries count, or 0.
    """

    def __init__(self, only: int = 0) -> None:
        self._only = only
        self._found: list[int] = []
        self._round = False
        """Whether it has been once round the table."""
        self._lock = threading.Lock()
        self._walker: Optional[Walker] = None
        self._works = True
        self._begun = False
        """Loading takes some 50 ms, which shall not hold up the first snapshot."""
        self._recent: list[int] = []
        self._base = self._buckets = self._next = 0
        self._seen: dict[int, tuple[int, int]] = {}
        """What the walker had met at the end of the last walk."""
        self._met: dict[int, tuple[int, int]] = {}
        """The same of walks that were surely over the table."""

    def note(self, events: Events) -> None:
        """Some that were lately captured: inserts among them tell where the table is."""
        if self._base or not self._works or not len(events):
            return
        inserts = events["ct"][events["kind"] == int(Kind.INSERT)][-ASKED:]
        self._recent = inserts.tolist() or self._recent

    def take(self, tables: Sequence[TableReading]) -> tuple[TableReading, ...]:
        """The readings, with what was met of each table so far: nothing in the first ones."""
        with self._lock:
            buckets = max((table.buckets for table in tables), default=0)
            if self._works and self._begun and buckets and (self._base or self._recent):
                try:
                    self._walk(buckets)
                except CtraceError:
                    # BPF_PROG_TEST_RUN of this kind is refused here: nothing else is lost
                    self._end()
            self._begun = True
            here = {table.netns: self._met.get(table.netns, _NOTHING) for table in tables}
            self._met = {netns: met for netns, met in here.items() if met != _NOTHING}
        return tuple(
            replace(table, met=here[table.netns][0], met_assured=here[table.netns][1])
            for table in tables
        )

    @property
    def lost(self) -> bool:
        """Whether it does not know where the table is: nothing came since, or it is refused."""
        return not self._base

    def found(self) -> list[int]:
        """Entries (``ct``) that the last :meth:`take` met, an even part of them; once."""
        with self._lock:
            found, self._found = self._found, []
        return found

    def close(self) -> None:
        """Free everything; safe to call twice, and while another thread walks."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        self._works = False
        if self._walker is not None:
            self._walker.close()
            self._walker = None

    def _walk(self, buckets: int) -> None:
        if buckets != self._buckets:  # it was made anew, elsewhere
            self._base, self._buckets, self._next, self._round = 0, buckets, 0, False
        if self._walker is None:
            self._walker = Walker()
        walker = self._walker
        for base in [self._base] if self._base else walker.bases(0, self._recent):
            first = self._next
            runs = RUNS if self._round else FIRST_RUNS
            walked = walker.walk(base, first, 1, buckets, runs=runs, enough=ENOUGH, only=self._only)
            before, self._seen = self._seen, walker.met()
            if not walked.is_table(walked.next - first):
                self._base = self._next = 0
                continue
            self._base = base
            self._next = walked.next if walked.next < buckets else 0
            self._round = self._round or not self._next
            found = walker.found()
            self._found = found[:: max(1, -(-len(found) // LOOKED_AT))]
            for netns, (entries, assured) in self._seen.items():
                was = before.get(netns, _NOTHING)
                if was[0] > entries:  # forgotten meanwhile: this is all since
                    was = _NOTHING
                met = self._met.get(netns, _NOTHING)
                self._met[netns] = met[0] + entries - was[0], met[1] + assured - was[1]
            return
