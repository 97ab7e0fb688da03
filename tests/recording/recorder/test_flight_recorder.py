"""A flight recorder beside real traffic: it keeps what surrounds a full table, and no more."""

from __future__ import annotations

import signal
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest
from kit.running.recorder import fill_up, pair, report, running, table
from kit.traffic import udp_flows

import ctrace
from ctrace.host import ctnetlink
from ctrace.lab import Lab, Node
from ctrace.record import Kind

pytestmark = pytest.mark.kernel


@pytest.mark.machine
@pytest.mark.usefixtures("few_places")
def test_a_flight_recorder_keeps_what_surrounds_a_full_table(lab: Lab, tmp_path: Path) -> None:
    """Calm, refusals, calm: the calm far from the refusals leaves the disk."""
    here, _, target = pair(lab)
    where = tmp_path / "ring"
    with running(
        "record", "-o", where, "--netns", here.inum, "--ring", "64M", "--trigger", "drop",
        "--before", "3s", "--after", "2s",
    ) as record:  # fmt: skip
        record.until(b"recording to")
        begun = time.time()
        calm = 0
        while time.time() < begun + 8:
            calm += len(udp_flows(here, (target, 53), 10, first_port=20000 + calm).flows)
            time.sleep(0.2)
        early = sum(path.stat().st_size for path in where.iterdir())
        fill_up(here, 30)
        # filling takes a busy machine longer than what is kept before
        calm += len(udp_flows(here, (target, 53), 10, first_port=20000 + calm).flows)
        before, first = here.stats()["drop"], time.time()
        refused = len(udp_flows(here, (target, 8125), 300, first_port=40000).refused)
        last = time.time()
        ctnetlink.flush(here.path)
        while time.time() < last + 12:
            calm += len(udp_flows(here, (target, 53), 10, first_port=20000 + calm).flows)
            time.sleep(0.2)
        assert record.end() == 0
    assert early < 64 << 20
    assert refused == here.stats()["drop"] - before > 200
    kept = sorted(where.iterdir())
    assert kept
    assert all(path.name.endswith(".kept.ctrace") for path in kept)
    data = report(where)
    assert table(data, here)["totals"]["drop"] == refused
    bursts = [datetime.fromisoformat(text.rstrip("Z") + "+00:00") for text in data["drop_bursts"]]
    assert any(first - 1 < burst.timestamp() < last + 1 for burst in bursts)
    with ctrace.open(str(where)) as recording:
        start, end = (recording.clock.utc(t) / 1e9 for t in (recording.started, recording.until))
        ports = Counter[int]()
        for batch in recording:
            fresh = batch.events[batch.events["kind"] == Kind.INSERT]
            ports.update(fresh["dport"].tolist())
    # All that was asked for, and a segment of a second more at most at either end, and the
    # time that filling the table and the recorder's own clockwork take.
    assert begun + 1 < start < first - 2
    assert last + 1 < end < last + 10
    assert 0 < ports[53] < calm


@pytest.mark.machine
@pytest.mark.usefixtures("few_places")
def test_drops_outside_the_filter_neither_trigger_nor_count(lab: Lab, tmp_path: Path) -> None:
    """Refusals in another namespace, then to another port, then those that were asked for."""
    here, _, target = pair(lab)
    other, beyond = lab.namespace("other", track=True), lab.namespace("beyond")
    _, elsewhere = lab.link(other, beyond)
    of_netns, of_flows = tmp_path / "netns", tmp_path / "flows"
    common = ("--netns", here.inum, "--trigger", "drop", "--before", "5s", "--after", "3s")

    def refuse(node: Node, where: tuple[str, int], n: int) -> int:
        fill_up(node, 20)
        before = node.stats()["drop"]
        refused = len(udp_flows(node, where, n, first_port=40000).refused)
        assert refused == node.stats()["drop"] - before > n // 2
        time.sleep(4.0)  # more than the time kept after one
        return refused

    def keeps(where: Path) -> bool:
        until = time.monotonic() + 120
        while not kept(where) and time.monotonic() < until:
            time.sleep(0.2)
        return bool(kept(where))

    with (
        running("record", "-o", of_netns, *common) as first,
        running("record", "-o", of_flows, *common, "-p", "udp", "--dport", 53) as second,
    ):
        first.until(b"recording to")
        second.until(b"recording to")
        refuse(other, (elsewhere, 53), 300)
        ctnetlink.flush(other.path)
        assert kept(of_netns) == kept(of_flows) == []
        at = time.time()
        others = refuse(here, (target, 8125), 300)
        assert keeps(of_netns)
        assert kept(of_flows) == []
        wanted = refuse(here, (target, 53), 200)
        assert first.end() == second.end() == 0
    assert kept(of_flows)
    whole, some = report(of_netns), report(of_flows)
    assert table(whole, here)["totals"]["drop"] == whole["totals"]["drop"] == others + wanted
    assert some["totals"]["drop"] == wanted == sum(v["drops"] for v in some["victims"])
    assert len(some["drop_bursts"]) == 1
    bursts = [datetime.fromisoformat(b.rstrip("Z") + "+00:00") for b in whole["drop_bursts"]]
    assert min(burst.timestamp() for burst in bursts) > at


def kept(where: Path) -> list[str]:
    return sorted(path.name for path in where.iterdir() if path.name.endswith(".kept.ctrace"))


def test_a_calm_flight_recorder_leaves_nothing(lab: Lab, tmp_path: Path) -> None:
    here, _, target = pair(lab)
    where = tmp_path / "ring"
    with running(
        "record", "-o", where, "--netns", here.inum, "--trigger", "fill=90", "--before", "2s"
    ) as record:
        record.until(b"recording to")
        for turn in range(8):
            udp_flows(here, (target, 53), 10, first_port=20000 + turn * 10)
            time.sleep(0.5)
        assert record.end(signal.SIGTERM) == 0
    assert b"nothing was kept, as no trigger fired" in record.said
    assert list(where.iterdir()) == []


def started(where: Path) -> float:
    """When what is kept begins (UTC)."""
    with ctrace.open(str(where)) as recording:
        return recording.clock.utc(recording.started) / 1e9


@pytest.mark.slow
def test_keep_forgets_what_is_older(lab: Lab, tmp_path: Path) -> None:
    here, _, target = pair(lab)
    where = tmp_path / "ring"
    with running("record", "-o", where, "--netns", here.inum, "--keep", "4s") as record:
        record.until(b"recording to")
        begun = time.time()
        sent = 0
        while time.time() < begun + 12 or started(where) <= begun + 4:
            assert time.time() < begun + 180
            sent += len(udp_flows(here, (target, 53), 10, first_port=20000 + sent).flows)
            time.sleep(0.2)
        assert record.end() == 0
    assert started(where) > begun + 4
    with ctrace.open(str(where)) as recording:
        old = [int((batch.events["kind"] == Kind.EXISTING).sum()) for batch in recording]
    # What was alive when the oldest segment began is told, though its insert is forgotten.
    assert old[0] > 0
