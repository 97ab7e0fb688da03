"""The live feed: capture never waits for the screen, and says why it ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ctrace.batch import Batch, Clock, HookInfo, TableReading
from ctrace.errors import CtraceError
from ctrace.live.feed import LiveFeed
from ctrace.live.protocol import Feed, Records
from ctrace.record import Events, Kind, Reason, address_bytes, empty, join


def flows(n: int, at: int, *, port: int = 80, proto: int = 6) -> Events:
    """``n`` inserts from one source."""
    events = empty(n)
    events["ts"] = at + np.arange(n)
    events["ct"] = at + np.arange(n) + 1
    events["src"] = np.frombuffer(address_bytes("10.0.0.1"), np.uint8)
    events["dst"] = np.frombuffer(address_bytes("10.0.0.2"), np.uint8)
    events["sport"] = 1024 + np.arange(n) % 60_000
    events["dport"] = port
    events["reply_src"], events["reply_dst"] = events["dst"], events["src"]
    events["reply_sport"], events["reply_dport"] = port, events["sport"]
    events["netns"], events["proto"], events["family"] = 1, proto, 2
    events["kind"], events["reason"] = int(Kind.INSERT), int(Reason.NEW)
    return events


class Script:
    """A source that yields batches as fast as it is asked, or as it is told."""

    def __init__(self, n: int, *, pace: float = 0.0, fail: str = "") -> None:
        self.hooks = HookInfo("netfilter")
        self.clock = Clock(10**18)
        self.started = 10**9
        self.n, self.pace, self.fail = n, pace, fail
        self.made = 0
        self.closed = threading.Event()

    def batches(self, interval: float) -> Iterator[Batch]:  # noqa: ARG002
        while self.made < self.n and not self.closed.is_set():
            self.made += 1
            if self.pace:
                self.closed.wait(self.pace)
            at = self.started + self.made * 10**9
            table = TableReading(1, self.made * 10, 1000, 1024)
            both = join([flows(5, at - 100), flows(5, at - 50, port=53, proto=17)])
            yield Batch(both, until=at, tables=(table,))
        if self.fail:
            raise CtraceError(self.fail)

    def close(self) -> None:
        self.closed.set()


def until(true: object, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_it_is_a_feed_and_records() -> None:
    feed: Feed = LiveFeed(lambda: Script(1))
    assert isinstance(feed, Records)
    feed.close()
    feed.close()


@pytest.mark.slow
def test_every_batch_is_counted_however_seldom_anyone_looks() -> None:
    source = Script(200)
    feed = LiveFeed(lambda: source, early=False)
    until(lambda: feed.phase.name == "ended")
    snapshot = feed.latest()
    assert snapshot is not None
    assert snapshot.totals.insert == 2_000
    feed.close()


class Flood(Script):
    """Each interval's events come in several batches."""

    def batches(self, interval: float) -> Iterator[Batch]:
        for batch in super().batches(interval):
            yield replace(batch, tables=(), more=self.made % 4 != 0)
            if self.made == self.n - 1:
                self.closed.wait()


def test_a_part_of_an_interval_is_counted_but_not_shown() -> None:
    source = Flood(7)
    feed = LiveFeed(lambda: source, interval=5.0)
    first = feed.wait(None, 20)
    assert first is not None
    assert first.totals.insert == 40
    until(lambda: source.made == 6)
    assert feed.wait(first, 0.3) is None
    assert feed.latest() is first
    feed.set_view("service", "new", "")
    asked = feed.wait(first, 20)
    assert asked is not None
    assert asked.totals.insert == 60
    feed.close()


class Large(Script):
    """What was in the table is read in three parts before the first interval ends."""

    def __init__(self) -> None:
        super().__init__(1)
        self.turn = threading.Semaphore(0)

    def batches(self, interval: float) -> Iterator[Batch]:
        for part in range(1, 4):
            rows = flows(2000, part * 10_000)
            rows["kind"], rows["reason"] = int(Kind.EXISTING), 0
            table = TableReading(1, 6000, 65536, 1024)
            yield Batch(rows, until=self.started + part, tables=(table,), more=True)
            self.turn.acquire()
        yield from super().batches(interval)
        self.closed.wait()


def test_until_a_large_table_is_read_it_says_how_far() -> None:
    source = Large()
    feed = LiveFeed(lambda: source, early=False)
    for read in ("2,000 of about 6,000", "4,000 of about 6,000", "6,000 so far"):
        until(lambda words=read: words in feed.phase.text)
        assert (feed.phase.name, feed.latest()) == ("reading", None)
        source.turn.release()
    assert feed.wait(None, 60) is not None
    assert feed.phase.name == "live"
    feed.close()


def test_before_the_first_batch_it_is_attaching() -> None:
    ready = threading.Event()

    def slow() -> Script:
        ready.wait(60)
        return Script(3)

    feed = LiveFeed(slow)
    assert feed.phase.name == "attaching"
    assert feed.latest() is None
    assert feed.wait(None, 0.05) is None
    with pytest.raises(CtraceError, match="still attaching"):
        feed.record("never.data")
    ready.set()
    assert feed.wait(None, 20) is not None
    feed.close()


def test_a_new_view_follows_at_once() -> None:
    source = Script(1_000, pace=0.3)
    feed = LiveFeed(lambda: source, interval=0.3, early=False)
    assert feed.wait(None, 20) is not None
    feed.set_view("service", "new", "dport=53")
    until(lambda: feed.latest().group == "service")  # type: ignore[union-attr]
    snapshot = feed.latest()
    assert snapshot is not None
    assert [one.key for one in snapshot.culprits] == ["udp/53"]
    assert snapshot.filter == "dport=53"
    feed.set_view("service", "new", "")
    until(lambda: len(feed.latest().culprits) == 2)  # type: ignore[union-attr]
    feed.close()
    assert source.closed.is_set()


def test_why_it_failed_is_kept() -> None:
    feed = LiveFeed(lambda: Script(2, fail="the ring has gone"), early=False)
    until(lambda: feed.phase.name == "failed")
    assert feed.phase.text == "the ring has gone"
    assert isinstance(feed.error, CtraceError)
    assert feed.latest() is not None
    feed.close()


def test_advice_sees_this_moment_by_another_grouping() -> None:
    feed = LiveFeed(lambda: Script(5), early=False)
    until(lambda: feed.phase.name == "ended")
    assert {one.key for one in feed.at("service", 10).culprits} == {"tcp/80", "udp/53"}
    feed.close()


@pytest.mark.slow
def test_what_is_recorded_can_be_opened(tmp_path: Path) -> None:
    import ctrace

    source = Script(1_000, pace=0.02)
    feed = LiveFeed(lambda: source, interval=0.02, early=False)
    assert feed.wait(None, 20) is not None
    path = str(tmp_path / "now.data")
    feed.record(path)
    assert feed.recording == path
    made = source.made
    until(lambda: source.made > made + 10)
    assert feed.stop_recording() == path
    assert feed.recording == ""
    feed.close()
    with ctrace.open(path) as recording:
        events = join([batch.events for batch in recording.batches(1.0)])
    assert len(events) >= 80
    assert set(events["dport"].tolist()) == {53, 80}


def test_the_kernels_filter_is_shown() -> None:
    feed = LiveFeed(lambda: Script(2), early=False, shown_filter="proto=tcp")
    until(lambda: feed.latest() is not None)
    snapshot = feed.latest()
    assert snapshot is not None
    assert replace(snapshot).filter == "proto=tcp"
    feed.close()
