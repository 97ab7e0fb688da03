"""What single, merged and redacted recordings have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Optional, Protocol, TypeVar

from ctrace.batch import Batch, Clock, Counts, HookInfo, Source
from ctrace.cost.result import Perf
from ctrace.recording.assembly import Missing
from ctrace.recording.format.meta import Header
from ctrace.recording.writer import Writer

_S = TypeVar("_S", bound="Headed")


class Headed:
    """What every recording knows from its header; a context manager that closes it."""

    header: Header

    @property
    def hooks(self) -> HookInfo:
        """The hook family that made the records, and what it could not see."""
        return self.header.hooks

    @property
    def clock(self) -> Clock:
        """Boot clock to UTC."""
        return self.header.clock

    @property
    def started(self) -> int:
        """Boot clock, ns, at which the recording began."""
        return self.header.started

    def close(self) -> None:
        """Close the files; safe to call twice."""
        raise NotImplementedError

    def __enter__(self: _S) -> _S:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Recorded(Source, Protocol):
    """A finished source: batches by time, and what its header says."""

    path: str
    ended: Optional[str]

    @property
    def missing(self) -> Missing:
        """What is missing, as far as it has been read."""

    @property
    def header(self) -> Header:
        """Host, hooks, clock, facts."""

    @property
    def until(self) -> int:
        """Boot clock, ns, of the last batch."""

    def batches(self, interval: float = 0.0) -> Iterator[Batch]:
        """Batches from the beginning or the last seek."""

    def seek(self, utc: int) -> None:
        """Where :meth:`batches` begins, UTC ns."""

    def counts(self) -> Iterator[tuple[int, dict[int, Counts]]]:
        """(boot clock ns, exact counters by namespace since the start), one per batch."""

    def rulesets(self) -> Iterator[tuple[int, str]]:
        """(namespace, its rules as text)."""

    def measurements(self) -> Iterator[tuple[str, Perf]]:
        """(host, what conntrack cost there): the last measurement of each host, over all the
        time."""

    def notes(self) -> Iterator[str]:
        """Remarks of the recorder."""


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
        for host, perf in source.measurements():
            writer.measurement(host, perf)
        for text in source.notes():
            writer.note(text)
        if source.missing:
            writer.note(f"the original was incomplete: {source.missing}")
    return writer
