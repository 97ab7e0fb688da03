"""A recording that begins while its source has long been running.

A source yields each name once, and the entries of the table at its start. A recording that begins
later gets both from here: the names remembered so far, and a dump of the tables.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Protocol, runtime_checkable

from ctrace.batch import Batch, Names, Source
from ctrace.errors import for_later
from ctrace.record import Events, boot_ns, by_time, join
from ctrace.recording.recorder import host_facts
from ctrace.recording.recorder.run import RulesetReader
from ctrace.recording.recorder.told_once import Known
from ctrace.recording.writer import Writer

AHEAD = 4
"""Parts of the tables that may wait for a batch (8 MB)."""
PATIENCE = 5.0
"""Seconds that the end of a recording waits for unfinished reading."""


class Older(Protocol):
    """The entries that were there before a recording began, as they become known."""

    @property
    def done(self) -> bool:
        """Whether all have been yielded."""

    @property
    def waiting(self) -> int:
        """Parts that were read and wait for their events."""

    @property
    def reading(self) -> bool:
        """Whether there is more to read."""

    def read(self) -> None:
        """Read a part of the tables. In one thread."""

    def with_events(self, events: Events, taken: float, at: int) -> Events:
        """Those known by now, as of ``at``, to come before ``events``, which are all that came
        until ``taken`` (monotonic)."""


@runtime_checkable
class Dumps(Protocol):
    """A source that can dump the tables as they are now."""

    def older(self) -> Older:
        """The entries that match the source's filter and are older than the next batch."""


class LateRecording:
    """A file that receives batches from now on. Only ``close`` blocks."""

    def __init__(self, path: str, source: Source, known: Known, shown_filter: str = "") -> None:
        """Raises CtraceError when the file exists or cannot be made."""
        self._until = at = known.batch.until
        tables = known.batch.tables
        alone = tables[0].netns if len(tables) == 1 else None
        header = host_facts.header(source, shown_filter, alone)
        header = replace(header, started=at, base=dict(known.counts))
        self._writer = Writer(path, header)
        self.path = path
        names = known.batch.names
        copies = Names(
            dict(names.netns), dict(names.owners), dict(names.cgroups), dict(names.listeners)
        )
        self._writer.write(replace(known.batch, names=copies, until=at))
        self._rules = RulesetReader(known.counts)
        self._older = source.older() if isinstance(source, Dumps) else None
        if self._older is None:
            self._writer.note("the entries that were there at the beginning are not known")
        self._closing = threading.Event()
        self._reading = threading.Thread(target=self._read, name="ctrace-dump", daemon=True)
        self._reading.start()

    def _read(self) -> None:
        older = self._older
        with for_later():
            while older is not None and older.reading and not self._closing.is_set():
                if older.waiting >= AHEAD:
                    self._closing.wait(0.02)
                else:
                    older.read()

    @property
    def complete(self) -> bool:
        """Whether it has all entries that were there at the beginning, where that is possible."""
        return self._older is None

    def write(self, batch: Batch) -> None:
        """Take a batch. Raises CtraceError when the disk refuses."""
        if self._older is not None:
            # What it has was captured by its own time, which is boot clock.
            lag = boot_ns() - batch.until
            rows = self._older.with_events(batch.events, time.monotonic() - lag / 1e9, self._until)
            if len(rows):
                batch = replace(batch, events=by_time(join([rows, batch.events])))
            if self._older.done:
                self._older = None
        self._until = batch.until
        self._writer.write(batch)
        for netns, text in self._rules.done():
            self._writer.ruleset(netns, text)

    def close(self, reason: str = "") -> None:
        """End the file. Raises CtraceError when the last events could not be written."""
        self._closing.set()
        self._reading.join()
        if self._older is not None:
            self._writer.note("not all entries that were there at the beginning are known")
        for netns, text in self._rules.done(wait=PATIENCE):
            self._writer.ruleset(netns, text)
        self._writer.close(reason)
