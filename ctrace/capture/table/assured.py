"""What is in each table, from a walk over a part of it each second.

No event reports that an entry becomes ASSURED or changes its state, and entries that end say little
about those that stay. So a few hundred entries of the table are looked at each second, bucket after
bucket: the hash decides which bucket an entry is in, so the sample is fair.
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
"""Entries per second after which the walk stops; a run of 128 nodes may exceed it."""
RUNS: Final = 256
"""Program runs per second: at most 32,768 nodes and empty buckets, about 2 ms."""
FIRST_RUNS: Final = 1024
"""Program runs per second until the first round of the table is complete, so that results come
soon."""
LOOKED_AT: Final = 256
"""Walked entries per second that are examined more closely: about 1 ms."""
ASKED: Final = 8
"""Entries that are tried to find the table."""
LOOK_MET: Final = 1
"""Bit set in an entry's address to mark such a closer look (bpf/look.h)."""
_NOTHING: Final = (0, 0)


class Survey:
    """Resumes where the last walk stopped.

    ``only``: the namespace whose entries count, or 0.
    """

    def __init__(self, only: int = 0) -> None:
        self._only = only
        self._found: list[int] = []
        self._round = False
        """Whether it has completed a round of the table."""
        self._lock = threading.Lock()
        self._walker: Optional[Walker] = None
        self._works = True
        self._begun = False
        """Loading takes some 50 ms and must not delay the first snapshot."""
        self._recent: list[int] = []
        self._base = self._buckets = self._next = 0
        self._seen: dict[int, tuple[int, int]] = {}
        """The walker's totals at the end of the last walk."""
        self._met: dict[int, tuple[int, int]] = {}
        """The same, only of walks that were certainly over the table."""

    def note(self, events: Events) -> None:
        """Recently captured events: inserts among them show where the table is."""
        if self._base or not self._works or not len(events):
            return
        inserts = events["ct"][events["kind"] == int(Kind.INSERT)][-ASKED:]
        self._recent = inserts.tolist() or self._recent

    def take(self, tables: Sequence[TableReading]) -> tuple[TableReading, ...]:
        """The readings, each with the entries counted in its table so far: nothing in the first
        ones."""
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
        """Whether the table cannot be found: no events came since, or walking is refused."""
        return not self._base

    def found(self) -> list[int]:
        """Entries (``ct``) that the last :meth:`take` walked over, an even sample of them; once."""
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
