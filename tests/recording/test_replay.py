"""A replay shows what live showed, at every moment and in every file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kit import synthetic
from kit.command import run
from kit.synthetic import at, model, write

import ctrace
from ctrace.batch import Batch
from ctrace.live.replay import ReplayFeed
from ctrace.model.snapshot import GROUPS
from ctrace.record import Kind
from ctrace.recording.merge import open_several
from ctrace.recording.redact import Redacted

pytestmark = pytest.mark.slow
SECOND = synthetic.SECOND


def test_replay_gives_the_snapshots_that_live_gave(file: Path, truth: list[Batch]) -> None:
    """Field by field, in one grouping after another as time goes on, and in each at the end."""
    live, again = model(), model()
    with ctrace.open(str(file)) as recording:
        for n, (a, b) in enumerate(zip(truth, recording, strict=True)):
            live.update(a)
            again.update(b)
            if n % 3 == 0:
                group = GROUPS[n // 3 % len(GROUPS)]
                assert live.snapshot(group=group) == again.snapshot(group=group)
    for group in GROUPS:
        assert live.snapshot(group=group) == again.snapshot(group=group)


@pytest.fixture
def feed(file: Path) -> Iterator[ReplayFeed]:
    with ctrace.open(str(file)) as recording:
        feed = ReplayFeed(recording, paused=True)
        yield feed
        feed.close()
        assert feed.error is None


def test_time_travel_shows_what_live_showed_then(feed: ReplayFeed, truth: list[Batch]) -> None:
    """Forwards, backwards, by steps and by bursts of drops."""
    clock = synthetic.header().clock
    for batch in (truth[40], truth[12], truth[60], truth[59], truth[0], truth[-1]):
        feed.seek(clock.utc(batch.until) / 1e9)
        assert feed.settle()
        assert feed.latest() == at(truth, batch.until)
    feed.seek(clock.utc(truth[20].until) / 1e9)
    assert feed.settle()
    feed.step(-1)
    assert feed.settle()
    assert feed.latest() == at(truth, truth[20].until - SECOND)
    first = next(b.until for b in truth if (b.events["kind"] == Kind.DROP).any())
    feed.seek(0)
    assert feed.next_drop()
    assert feed.settle()
    assert feed.latest() == at(truth, first)
    assert not feed.next_drop()
    feed.seek(9e9)
    assert feed.prev_drop()
    assert feed.settle()
    assert feed.position.now == clock.utc(first) / 1e9
    assert feed.position.drops == (clock.utc(first) / 1e9,)


def test_a_step_reaches_the_next_batch_however_far_it_is(tmp_path: Path) -> None:
    sparse = synthetic.incident()[::20]
    file = synthetic.write(tmp_path / "sparse.data", sparse)
    with ctrace.open(str(file)) as recording:
        feed = ReplayFeed(recording, paused=True)
        assert feed.settle()
        ends = [recording.clock.utc(batch.until) / 1e9 for batch in sparse]
        for end in ends:
            if feed.position.now < end:
                feed.step(1)
                assert feed.settle()
                assert feed.position.now == end
        feed.step(-1)
        assert feed.settle()
        assert feed.position.now == ends[-2]
        feed.close()


def test_a_view_can_change_while_paused(feed: ReplayFeed) -> None:
    feed.seek(feed.position.start + 9)
    assert feed.settle()
    feed.set_view("service", "new", "dport=53")
    assert feed.settle()
    latest = feed.latest()
    assert latest is not None
    assert latest.group == "service"
    assert [culprit.port for culprit in latest.culprits] == [53]


def test_playing_at_speed_reaches_the_end(file: Path, truth: list[Batch]) -> None:
    with ctrace.open(str(file)) as recording:
        feed = ReplayFeed(recording, speed=1024)
        deadline = time.monotonic() + 60
        while feed.phase.name == "replay" and time.monotonic() < deadline:
            time.sleep(0.02)
        assert feed.phase.name == "ended"
        assert feed.latest() == at(truth, truth[-1].until)
        feed.close()


def test_replay_without_a_terminal_prints_frames(file: Path) -> None:
    lines = run("replay", str(file), "--step", "5s", "-o", "json").splitlines()
    assert [json.loads(line)["totals"]["insert"] > 0 for line in lines] == [True] * len(lines)
    assert len(lines) >= 3
    assert "tcp/8063" in run("replay", str(file), "--once", "--at", "50%")
    run("replay", str(file), "--at", "yesterday", code=1)


def later(batches: list[Batch], seconds: int) -> list[Batch]:
    """The same a while later, as another host's recording might have it."""
    moved = []
    for batch in batches:
        events = batch.events.copy()
        events["ts"] += np.uint64(seconds * SECOND)
        moved.append(replace(batch, events=events, until=batch.until + seconds * SECOND))
    return moved


@pytest.mark.parametrize("redact", [False, True])
def test_bursts_of_drops_are_found_in_whatever_is_replayed(
    tmp_path: Path, file: Path, truth: list[Batch], redact: bool
) -> None:
    """Of two hosts, the second of which is refused nine seconds later."""
    other = write(tmp_path / "b", later(truth, 9), host="db1")
    first = next(b.until for b in truth if (b.events["kind"] == Kind.DROP).any())
    source = open_several([str(file), str(other)])
    if redact:
        source = Redacted(source)
    clock = source.clock
    feed = ReplayFeed(source, paused=True)
    feed.seek(0)
    for moment, drops in ((first, 0), (first + 9 * SECOND, 200)):
        assert feed.next_drop()
        assert feed.settle()
        latest = feed.latest()
        assert feed.position.now == clock.utc(moment) / 1e9
        assert latest is not None
        assert latest.totals.drop > drops
    assert not feed.next_drop()
    assert feed.prev_drop()
    assert feed.settle()
    assert feed.position.now == clock.utc(first) / 1e9
    assert len(feed.position.drops) == 2
    feed.close()
    source.close()
