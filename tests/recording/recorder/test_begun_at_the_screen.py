"""A recording that is begun while the screen is up holds what one from the start would."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Optional

import numpy as np
import pytest
from kit.running.recorder import outlive, pair, report, table
from kit.running.tracing import identity
from kit.traffic import udp_flows

import ctrace
from ctrace.capture import open_live
from ctrace.demo.scene import Scene, SmallTable
from ctrace.filters import Filter
from ctrace.host import ctnetlink
from ctrace.lab import Lab, Node
from ctrace.live.feed import LiveFeed
from ctrace.model.snapshot import Snapshot
from ctrace.record import Kind, join

pytestmark = pytest.mark.kernel


@pytest.mark.machine
@pytest.mark.usefixtures("few_places")
def test_a_recording_begun_in_the_demo_knows_its_table_but_for_the_ballast(tmp_path: Path) -> None:
    path = str(tmp_path / "now.data")
    with Scene() as scene:
        assert scene.ballast
        outlive(scene.host)
        wanted = Filter(netns=scene.host.inum)
        feed = LiveFeed(lambda: SmallTable(open_live(wanted, seed=False), scene), interval=0.3)
        try:
            assert feed.wait(None, 60) is not None
            udp_flows(scene.host, (scene.address, 53), 100)
            seen = feed.wait(feed.latest(), 60)
            assert feed.wait(seen, 60) is not None  # so the batch that has them is over
            # What the screen shows is what the kernel counts, but for the ballast.
            entries = scene.host.count() - scene.ballast
            feed.record(path)
            udp_flows(scene.host, (scene.address, 53), 30, first_port=30000)
            writer, deadline = feed._writer, time.monotonic() + 240
            assert writer is not None
            while not writer.complete:  # a large table takes a while to read
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert feed.stop_recording() == path
        finally:
            feed.close()
        assert feed.error is None
    with ctrace.open(path) as recording:
        events = join([batch.events for batch in recording])
        assert not list(recording.notes())
    there = events[events["kind"] == Kind.EXISTING]
    assert 100 <= len(there) <= entries
    assert set(there["sport"][there["dport"] == 53].tolist()) >= set(range(20000, 20100))
    assert int(((events["kind"] == Kind.INSERT) & (events["sport"] >= 30000)).sum()) >= 30


def counted(seen: Snapshot, node: Node) -> int:
    """Entries in the namespace's table, as the screen has it."""
    return sum(one.count for one in seen.tables if one.netns == node.inum)


@pytest.mark.parametrize("hooks", [None, "netlink"], ids=["best", "netlink"])
def test_a_recording_begun_at_the_screen_holds_what_record_would(
    lab: Lab, tmp_path: Path, hooks: Optional[str]
) -> None:
    """Facts, rules, names and the entries alive when it began, while traffic goes on."""
    here, _, target = pair(lab)
    here.sysctl("net.netfilter.nf_conntrack_icmp_timeout", 17)
    path = str(tmp_path / "now.data")
    feed = LiveFeed(lambda: open_live(Filter(netns=here.inum), hooks=hooks), interval=0.3)
    try:
        assert feed.wait(None, 60) is not None
        udp_flows(here, (target, 53), 200)
        here.run(["conntrack", "-D", "-p", "udp", "--orig-port-src", "20007"])
        seen = feed.latest()
        # The kernel's counters know of the end before its event has come: until then the entry
        # was there when the recording began.
        while seen is None or (seen.totals.deleted, seen.held_total) != (1, 199):
            seen = feed.wait(seen, 60)  # the suite's own time limit ends it otherwise
        sending = threading.Thread(
            target=udp_flows, args=(here, (target, 8125), 3000), kwargs={"first_port": 30000}
        )
        sending.start()
        feed.record(path)
        assert feed.recording == path
        sending.join()
        here.run(["conntrack", "-D", "-p", "udp", "--orig-port-src", "20008"])
        # The kernel's count may be of a moment whose events come later: until it is read again.
        while seen is None or (seen.totals.deleted, seen.held_total, counted(seen, here)) != (
            2,
            3198,
            3198,
        ):
            seen = feed.wait(seen, 60)
        assert feed.stop_recording() == path
        entries = ctnetlink.dump(here.path)
    finally:
        feed.close()
    with ctrace.open(path) as recording:
        assert recording.ended == "ended at the screen"
        got = list(recording)
        events = join([batch.events for batch in got])
        header, rules = recording.header, dict(recording.rulesets())
        assert list(recording.notes()) == []
    assert "net.netfilter.nf_conntrack_max" in header.facts
    assert header.facts["net.netfilter.nf_conntrack_icmp_timeout"] == "17"
    assert '\\"prerouting\\"' in rules[here.inum]
    names = {inum: n for batch in got for inum, n in batch.names.netns.items()}
    assert set(here.addresses["there"]) <= set(names[here.inum].addresses)
    if header.hooks.owners:
        owners = {owner.pid for batch in got for owner in batch.names.owners.values()}
        assert os.getpid() in owners
    before = events[events["kind"] == Kind.EXISTING]
    assert (before["ts"] >= header.started).all()
    assert (before["dport"] == 53).sum() == 199
    live = identity(events[np.isin(events["kind"], (Kind.EXISTING, Kind.INSERT))])
    live.subtract(identity(events[events["kind"] == Kind.DESTROY]))
    assert +live == identity(entries)
    assert not -live
    told = table(report(Path(path)), here)
    assert told["count"] == len(entries)
    # The counters that it begins with are read after the events before them: of the first ones
    # some are counted there already.
    inserts = [int((batch.events["kind"] == Kind.INSERT).sum()) for batch in got]
    first = next(n for n in inserts if n)
    assert sum(inserts) - first <= told["totals"]["insert"] <= sum(inserts)
    assert told["totals"]["deleted"] == 1
