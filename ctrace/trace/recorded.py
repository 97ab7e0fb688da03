"""What a recording, several merged, and a redacted one have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Optional, Protocol

from ctrace.batch import Batch, Clock, HookInfo
from ctrace.trace.assembly import Missing
from ctrace.trace.meta import Header
from ctrace.trace.writer import Writer


class Recorded(Protocol):
    """A finished source: batches by time, and what its header says."""

    path: str
    ended: Optional[str]

    @property
    def missing(self) -> Missing:
        """What it lacks, as far as has been read."""

    @property
    def header(self) -> Header:
        """Host, hooks, clock, facts."""

    @property
    def hooks(self) -> HookInfo:
        """The hook family that made the records."""

    @property
    def clock(self) -> Clock:
        """Boot clock to UTC."""

    @property
    def started(self) -> int:
        """Boot clock, ns."""

    @property
    def until(self) -> int:
        """Boot clock, ns, of the last batch."""

    def batches(self, interval: float = 0.0) -> Iterator[Batch]:
        """Batches from the beginning or the last seek."""

    def seek(self, utc: int) -> None:
        """Where :meth:`batches` begins, UTC ns."""

    def rulesets(self) -> Iterator[tuple[int, str]]:
        """(namespace, its rules as text)."""

    def notes(self) -> Iterator[str]:
        """Remarks of the recorder."""

    def close(self) -> None:
        """Let go of the files."""


def copy(source: Recorded, path: str, show: Callable[[float], None] = lambda _: None) -> Writer:
    """Write ``source`` to a new file; the closed writer tells how much. Raises CtraceError."""
    writer = Writer(path, source.header)
    length = max(1, source.until - source.started)
    with writer:
        for batch in source.batches():
            writer.write(batch)
            show((batch.until - source.started) / length)
        for netns, text in source.rulesets():
            writer.ruleset(netns, text)
        for text in source.notes():
            writer.note(text)
        if source.missing:
            writer.note(f"the original was incomplete: {source.missing}")
    return writer
