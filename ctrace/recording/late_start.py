"""A recording that begins while its source has long been running.

A source tells each name once, and the entries of the table at its start. A recording
that begins later gets both from here: the names kept so far, and a dump of the tables,
brought back to the moment at which the recording began.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Optional, Protocol, runtime_checkable

from ctrace.batch import Batch, Names, Source
from ctrace.errors import CtraceError
from ctrace.record import Events, empty, join
from ctrace.recording import host_facts
from ctrace.recording.recorder import RulesetReader
from ctrace.recording.told_once import Known
from ctrace.recording.writer import Writer

PATIENCE = 5.0
"""Seconds that the end of a recording waits for what is still being read."""


@runtime_checkable
class Dumps(Protocol):
    """A source that can say what is in the tables now."""

    def existing(self) -> Events:
        """Every entry that matches the source's filter; may take seconds."""

    def seeded(self, existing: Events, events: Events, at: int) -> Events:
        """Which of them were there at ``at`` already, given all ``events`` since."""


class LateRecording:
    """A file that batches are written to from now on. Nothing here waits but ``close``."""

    def __init__(self, path: str, source: Source, known: Known, shown_filter: str = "") -> None:
        """Raises CtraceError when the file exists or cannot be made."""
        self._at = known.batch.until
        header = replace(
            host_facts.header(source, shown_filter), started=self._at, base=dict(known.counts)
        )
        self._writer = Writer(path, header)
        self.path = path
        names = known.batch.names
        copies = Names(
            dict(names.netns), dict(names.owners), dict(names.cgroups), dict(names.listeners)
        )
        self._first: Optional[Batch] = replace(known.batch, names=copies)
        """What the file begins with, once the entries of that moment are known."""
        self._waiting: list[Batch] = []
        self._rules = RulesetReader()
        self._source = source
        self._existing: Optional[Events] = None
        self._dumped = 0
        """Boot clock, ns, at the dump's end."""
        self._dump = threading.Thread(target=self._read, name="ctrace-dump", daemon=True)
        self._dump.start()

    def _read(self) -> None:
        if isinstance(self._source, Dumps):
            try:
                self._existing = self._source.existing()
            except (CtraceError, OSError):
                self._existing = None
        self._dumped = time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def write(self, batch: Batch) -> None:
        """Take a batch. Raises CtraceError when the disk refuses."""
        if self._first is None:
            self._writer.write(batch)
            for netns, text in self._rules.done():
                self._writer.ruleset(netns, text)
            return
        self._waiting.append(batch)
        # What changed while the tables were read is in the batches that reach over it.
        if self._dumped and batch.until >= self._dumped:
            self._begin(self._existing)

    def _begin(self, existing: Optional[Events]) -> None:
        assert self._first is not None
        first, self._first = self._first, None
        rows = empty()
        if existing is not None and isinstance(self._source, Dumps):
            since = join([batch.events for batch in self._waiting])
            rows = self._source.seeded(existing, since, self._at)
        self._writer.write(replace(first, events=rows, until=self._at))
        if existing is None:
            self._writer.note("the entries that were there at the beginning are not known")
        waiting, self._waiting = self._waiting, []
        for batch in waiting:
            self._writer.write(batch)

    def close(self, reason: str = "") -> None:
        """End the file. Raises CtraceError when the last events could not be written."""
        if self._first is not None:
            self._begin(None)
        for netns, text in self._rules.done(wait=PATIENCE):
            self._writer.ruleset(netns, text)
        self._writer.close(reason)
