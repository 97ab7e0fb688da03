"""Records from a source to a file, until a condition or a signal ends it."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Final, Optional, Protocol

from ctrace import files
from ctrace.batch import Batch, Source
from ctrace.cost.result import Perf
from ctrace.errors import CtraceError, for_later
from ctrace.record import boot_ns
from ctrace.recording.format.layout import SIGNATURE

LAST: Final = 5_000_000_000
"""Nanoseconds to wait, at most, for the batch with the events from before the end."""


class Sink(Protocol):
    """Where batches are written to: a file, or a flight recorder."""

    events: int
    lost: int

    @property
    def stored(self) -> int:
        """Bytes on disk now."""

    def write(self, batch: Batch) -> None:
        """Take a batch."""

    def ruleset(self, netns: int, text: str) -> None:
        """Take a namespace's rules."""

    def measurement(self, host: str, perf: Perf) -> None:
        """Take a measurement of what conntrack cost so far."""

    def close(self, reason: str = "") -> None:
        """End cleanly."""


class Beside(Protocol):
    """Work that goes on during a recording, and adds its results to it."""

    def take(self, batch: Batch, sink: Sink) -> None:
        """After each batch."""

    def end(self, sink: Sink) -> None:
        """Before the recording is closed."""


@dataclass(frozen=True)
class Until:
    """When to stop; unset conditions never do."""

    duration: Optional[float] = None
    """Seconds."""
    events: Optional[int] = None
    command: Optional[str] = None
    """A shell command: recording lasts as long as it runs."""


@dataclass(frozen=True)
class Ended:
    """How a recording ended."""

    reason: str
    status: int = 0
    """The exit status of the command that was recorded, as a shell has it."""


@dataclass(frozen=True)
class Progress:
    """The progress of a recording, for display."""

    seconds: float
    events: int
    size: int
    lost: int


def record(
    source: Source,
    sink: Sink,
    until: Until,
    interval: float,
    show: Callable[[Progress], None],
    beside: Optional[Beside] = None,
) -> Ended:
    """Record until a condition holds or SIGINT or SIGTERM comes. Returns how it ended.

    The rules of the namespaces are read beside it, so that capture is not held up, and what
    they and the tables show together.
    Raises CtraceError when the file can no longer be written; everything before it is
    kept. The source is left open, the sink is closed.
    """
    from ctrace.advice.beside import Reader

    reason = ""
    taken = 0
    child: Optional[subprocess.Popen[bytes]] = None
    reader: Optional[RulesetReader] = None
    try:
        with _stops() as stop:
            first, over = source.started, _Over(until, stop)
            for batch in Reader().along(source.batches(interval)):
                # Before all hooks are in place and the first batch is here, nothing would
                # be seen of the command.
                if until.command and child is None:
                    child = subprocess.Popen(until.command, shell=True)
                if until.events is not None:
                    batch = _first(batch, until.events - taken)  # noqa: PLW2901
                taken += len(batch.events)
                sink.write(batch)
                if beside is not None:
                    beside.take(batch, sink)
                reader = reader or RulesetReader(batch.counts)
                for netns, text in reader.done():
                    sink.ruleset(netns, text)
                seconds = (batch.until - first) / 1e9
                show(Progress(seconds, taken, sink.stored, sink.lost))
                # a part of an interval may lack entries that were there before
                past = 0 if batch.more else seconds
                reason = over.reason(batch.until, past, taken, child)
                if reason:
                    break
            else:
                reason = "the source ended"
            for netns, text in reader.done(wait=5.0) if reader else ():
                sink.ruleset(netns, text)
            if beside is not None:
                beside.end(sink)
    finally:
        if child is not None and child.poll() is None:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5.0)
        sink.close(reason or "interrupted")
    # One that we ended had no say in it.
    status = child.returncode if child is not None and "command" in reason else 0
    return Ended(reason, 128 - status if status < 0 else status)


def _first(batch: Batch, events: int) -> Batch:
    """At most the first events of a batch; what was read after the last of them goes, too."""
    if len(batch.events) <= events:
        return batch
    kept = batch.events[:events]
    return Batch(kept, int(kept["ts"][-1]), lost=batch.lost, names=batch.names)


class _Over:
    """Decides when a recording has all that was asked for.

    A signal, or the end of a command, comes between two batches: what happened before it is in the
    batch after it.
    """

    def __init__(self, until: Until, stop: threading.Event) -> None:
        self._until = until
        self._stop = stop
        self._asked: Optional[int] = None
        """Boot clock, ns: when the end was first seen."""

    def reason(
        self, at: int, seconds: float, events: int, child: Optional[subprocess.Popen[bytes]]
    ) -> str:
        """Why it is over after a batch that covers everything up to ``at``; empty while it
        isn't."""
        until = self._until
        if until.duration is not None and seconds >= until.duration:
            return f"after {until.duration:g} s"
        if until.events is not None and events >= until.events:
            return f"after {until.events:,} events"
        ended = child is not None and child.poll() is not None
        if not ended and not self._stop.is_set():
            return ""
        now = boot_ns()
        if self._asked is None:
            self._asked = now
        # a source that reports another time than now is not waited for
        if at < self._asked and now - self._asked < LAST:
            return ""
        if self._stop.is_set() or child is None:
            return "stopped by a signal"
        return f"the command ended with status {child.returncode}"


@contextlib.contextmanager
def _stops() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM ask for an end, as does a terminal that goes (unless nohup keeps that
    from us); a second one does not ask."""
    stop = threading.Event()

    def ask(_number: int, _frame: Optional[FrameType]) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    asking = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        asking.append(signal.SIGHUP)
    old = {number: signal.signal(number, ask) for number in asking}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class RulesetReader:
    """Reads every namespace's rules once, in a thread: first of those that are recorded."""

    def __init__(self, recorded: Collection[int]) -> None:
        self._recorded = frozenset(recorded)
        self._found: list[tuple[int, str]] = []
        self._thread = threading.Thread(target=self._read, name="ctrace-rules", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        from ctrace.host import netns
        from ctrace.recording.recorder.host_facts import rulesets

        with for_later():
            spaces = [(space.inum, space.path) for space in netns.find()]
            spaces.sort(key=lambda space: space[0] not in self._recorded)
            for one in rulesets(spaces):
                self._found.append(one)

    def done(self, wait: float = 0.0) -> list[tuple[int, str]]:
        """What was read since the last call; waits for the rest, at most this many seconds."""
        self._thread.join(wait)
        found = self._found[:]
        del self._found[: len(found)]
        return found


def make_way(path: str) -> str:
    """Rename an earlier recording at ``path`` to the first free number; its new name, or empty.

    Nothing is ever overwritten. Raises CtraceError when what is there is no recording.
    """
    if not os.path.lexists(path):
        return ""
    with contextlib.suppress(OSError):
        head = files.content(path, len(SIGNATURE))
        if head == SIGNATURE and not os.path.islink(path):
            number = next(n for n in itertools.count(1) if not os.path.lexists(f"{path}.{n}"))
            os.rename(path, f"{path}.{number}")
            return f"{path}.{number}"
    raise CtraceError(f"{path} exists and is not a recording: give another name with -o")
