"""When a recording stops: after exactly so many events, or with a command and its status."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ctrace.batch import Batch, Clock, HookInfo
from ctrace.record import Kind, empty
from ctrace.recording.format.meta import Header
from ctrace.recording.reader import Recording
from ctrace.recording.recorder.run import Until, record
from ctrace.recording.writer import Writer

pytestmark = pytest.mark.slow

STARTED = 1_000_000_000


class Steady:
    """A source that has ``size`` events in each of its batches, for ever."""

    hooks = HookInfo("netlink")
    clock = Clock(0)
    started = STARTED

    def __init__(self, size: int) -> None:
        self.size = size

    def batches(self, interval: float) -> Iterator[Batch]:
        del interval
        at = STARTED
        while True:
            events = empty(self.size)
            events["kind"] = int(Kind.INSERT)
            events["ts"] = at + 1
            at += 1_000_000 + self.size
            yield Batch(events, at)

    def close(self) -> None:
        pass


def recorded(path: Path, source: Steady, until: Until) -> tuple[int, str, int]:
    """How many events the file holds, why it ended, and the status."""
    sink = Writer(str(path), Header(source.hooks, source.clock, source.started))
    ended = record(source, sink, until, 0.01, lambda _: None)
    with contextlib.closing(Recording(str(path))) as recording:
        assert not recording.missing
        held = sum(len(batch.events) for batch in recording.batches(1.0))
    return held, ended.reason, ended.status


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("wanted", [1, 7, 1000, 1001])
def test_it_stops_after_exactly_so_many_events(tmp_path: Path, size: int, wanted: int) -> None:
    held, reason, status = recorded(tmp_path / "a", Steady(size), Until(events=wanted))
    assert (held, status) == (wanted, 0)
    assert reason == f"after {wanted:,} events"


@pytest.mark.parametrize(
    ("command", "status"), [("true", 0), ("exit 7", 7), ("kill -9 $$", 128 + 9)]
)
def test_the_status_is_the_commands(tmp_path: Path, command: str, status: int) -> None:
    _, reason, got = recorded(tmp_path / "a", Steady(0), Until(command=command))
    assert got == status
    assert "the command ended" in reason


def test_a_command_that_was_ended_for_another_reason_has_no_say(tmp_path: Path) -> None:
    held, _, status = recorded(tmp_path / "a", Steady(10), Until(events=100, command="sleep 600"))
    assert (held, status) == (100, 0)


def test_a_terminal_that_goes_ends_it_whole(tmp_path: Path) -> None:

    class Signalled(Steady):
        def batches(self, interval: float) -> Iterator[Batch]:
            for at, batch in enumerate(super().batches(interval)):
                if at == 3:
                    os.kill(os.getpid(), signal.SIGHUP)
                yield replace(batch, until=time.clock_gettime_ns(time.CLOCK_BOOTTIME))

    held, reason, _ = recorded(tmp_path / "a", Signalled(1), Until())
    assert held >= 4
    assert reason == "stopped by a signal"


def test_nohup_keeps_it_going(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        command = f"kill -HUP {os.getpid()}; exit 3"
        _, _, status = recorded(tmp_path / "a", Steady(0), Until(command=command))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert status == 3
