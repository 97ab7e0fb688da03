"""A flight recorder's directory, and consecutive segments, read as one recording."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Optional

import numpy.typing as npt

from ctrace.batch import Batch, Counts, TableReading
from ctrace.cost.result import Perf
from ctrace.errors import CtraceError
from ctrace.recording.format.layout import FormatError
from ctrace.recording.reader import Recording

SUFFIX = ".ctrace"
"""The suffix of a segment's file name."""
SESSION, NUMBER = "segment.session", "segment.number"
"""Facts in a segment's header: which run of the recorder, and which segment of it."""


class Series(Recording):
    """Consecutive segments of one run as one recording.

    What concerns single files (``columns``, ``tables``, ``rulesets`` ...) goes through all of them;
    the entries that each later segment repeats are left out.
    """

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths[0])
        self._rest: list[Recording] = []
        try:
            for path in paths[1:]:
                self._rest.append(Recording(path))
        except CtraceError:
            self.close()
            raise
        for one in self._rest:
            one.header = replace(one.header, base=self.header.base)
            self.missing.take(one.missing)
            one.missing = self.missing
        if self._rest:
            self.ended = self._rest[-1].ended

    @property
    def until(self) -> int:
        """Boot clock, ns, of the last batch."""
        return self._rest[-1].until if self._rest else super().until

    def batches(self, interval: float = 0.0) -> Iterator[Batch]:
        """The batches of all segments, each once."""
        yield from super().batches(interval)
        for one in self._rest:
            one._from = self._from
            for batch in one.batches(interval):
                if batch.until > one.started:
                    yield batch

    def columns(self, *names: str) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Fields of every event; entries alive at each segment's start are repeated."""
        for one in self._all():
            yield from Recording.columns(one, *names)

    def tables(self) -> Iterator[tuple[int, tuple[TableReading, ...]]]:
        """Readings of all segments."""
        for one in self._all():
            for until, tables in Recording.tables(one):
                if one is self or until > one.started:
                    yield until, tables

    def counts(self) -> Iterator[tuple[int, dict[int, Counts]]]:
        """Counters of all segments."""
        for one in self._all():
            for until, counts in Recording.counts(one):
                if one is self or until > one.started:
                    yield until, counts

    def measurements(self) -> Iterator[tuple[str, Perf]]:
        """Those of all segments."""
        for one in self._all():
            yield from Recording.measurements(one)

    def _all(self) -> list[Recording]:
        return [self, *self._rest]

    def close(self) -> None:
        """Close every file."""
        super().close()
        for one in self._rest:
            one.close()


def runs(directory: str) -> list[list[str]]:
    """The segments in a directory as runs of consecutive ones, oldest run first.

    Unreadable files are left out. Raises FormatError when all of them are.
    """
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(SUFFIX))
    except OSError as error:
        raise FormatError(f"cannot read {directory}: {error.strerror}") from None
    found: list[list[str]] = []
    last: Optional[tuple[str, int]] = None
    unreadable: Optional[FormatError] = None
    for path in (os.path.join(directory, name) for name in names):
        try:
            with Recording(path) as recording:
                facts = recording.header.facts
        except FormatError as error:
            unreadable = unreadable or error
            continue
        here = (facts.get(SESSION, path), _number(facts.get(NUMBER, "0")))
        if last is not None and here == (last[0], last[1] + 1):
            found[-1].append(path)
        else:
            found.append([path])
        last = here
    if unreadable is not None and not found:
        raise unreadable
    return found


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def open_recording(path: str) -> Recording:
    """The recording at ``path``; of a flight recorder's directory, its last run.

    Raises CtraceError.
    """
    path = os.fspath(path)
    if not os.path.isdir(path):
        return Recording(path)
    found = runs(path)
    if not found:
        raise FormatError(f"{path} is a directory without recordings")
    recording = Series(found[-1]) if len(found[-1]) > 1 else Recording(found[-1][0])
    if len(found) > 1:
        before = found[-2]
        rest = f" and the {len(before) - 1} after it" if len(before) > 1 else ""
        recording.remark = (
            f"{path} holds {len(found)} recordings with gaps between them, and this is the last; "
            f"to see the one before, name its files: {before[0]}{rest}"
        )
    return recording
