"""Recordings of real traffic, held against the kernel's own counters and the live screen."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from kit.command import command, said
from kit.traffic import tcp_connections, tcp_server, udp_flows, udp_server

import ctrace
from ctrace.advice.again import facts_of
from ctrace.capture import open_live
from ctrace.demo.scene import Scene, SmallTable
from ctrace.errors import CtraceError
from ctrace.filters import Filter
from ctrace.host import ctnetlink
from ctrace.lab import Lab, Node
from ctrace.live.adviser import FeedAdviser, recorded_facts
from ctrace.live.feed import LiveFeed
from ctrace.live.replay import ReplayFeed
from ctrace.model.model import Model
from ctrace.model.snapshot import GROUPS, Snapshot
from ctrace.record import Events, Kind, Reason, join, words
from ctrace.recording.recorder import host_facts
from ctrace.recording.writer import Writer

pytestmark = pytest.mark.kernel
CTRACE = [sys.executable, "-m", "ctrace"]
ROOM = 400
"""Places that the tests leave free in a table."""


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


def pair(lab: Lab) -> tuple[Node, Node, str]:
    """Two namespaces, the first of them tracked, and the second's address."""
    here, there = lab.namespace("here", track=True), lab.namespace("there")
    _, target = lab.link(here, there)
    outlive(here)
    return here, there, target


def outlive(node: Node) -> None:
    """No entry expires while a test runs, however busy the machine is."""
    for name in ("udp_timeout", "udp_timeout_stream", "tcp_timeout_time_wait"):
        node.sysctl(f"net.netfilter.nf_conntrack_{name}", 600)


def fill_up(node: Node, room: int) -> None:
    """Leave this many places in the namespace's table."""
    limit = int(node.sysctl("net.netfilter.nf_conntrack_max"))
    assert limit, "no limit, so no table can be full"
    ctnetlink.fill(node.path, limit - room - node.count(), timeout=3600)


class Running:
    """A command, and what it says."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            **command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self.process.stderr is not None
        assert self.process.stdout is not None
        self.said = b""

    def until(self, words: bytes, timeout: float = 60.0) -> None:
        """Wait until it has said this on standard error."""
        deadline = time.monotonic() + timeout
        assert self.process.stderr is not None
        while words not in self.said:
            assert time.monotonic() < deadline, self.said
            if select.select([self.process.stderr], [], [], 0.1)[0]:
                more = os.read(self.process.stderr.fileno(), 1 << 16)
                assert more, self.said
                self.said += more

    def frame(self) -> dict[str, Any]:
        """The next JSON line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self, how: signal.Signals = signal.SIGINT) -> int:
        """Send a signal; the exit status."""
        self.process.send_signal(how)
        self.said += self.process.communicate(timeout=60)[1]
        return self.process.returncode


@contextmanager
def running(*arguments: object) -> Iterator[Running]:
    one = Running(*arguments)
    try:
        yield one
    finally:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def report(path: Path, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        said("report", path, "-o", "json", "--limit", "1000", *options)
    )
    return found


def table(data: dict[str, Any], node: Node) -> dict[str, Any]:
    """What is said of the namespace's table: counters are kept for the whole host."""
    found: dict[str, Any] = next(one for one in data["tables"] if one["netns"] == node.inum)
    return found


def kinds(path: Path) -> Counter[int]:
    """How many records of each kind are in the file."""
    found: Counter[int] = Counter()
    with ctrace.open(str(path)) as recording:
        for batch in recording:
            found.update(batch.events["kind"].tolist())
    return found


def by_key(data: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    names = ("inserts", "destroys", "held", "drops")
    return {one["key"]: tuple(one[name] for name in names) for one in data["culprits"]}


def refusals(data: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {one["key"]: (one["drops"], one["evicted"]) for one in data["victims"]}


def incident(here: Node, there: Node, target: str) -> tuple[int, int]:
    """Connections, look-ups, deletions, then one-way flows until the table refuses them; how many
    were refused, and deleted."""
    with tcp_server(there, 8063), udp_server(there, 53):
        tcp_connections(here, (target, 8063), 60)
        udp_flows(here, (target, 53), 80, first_port=30000)
        # it ends at one that expired meanwhile
        gone = here.run(["conntrack", "-D", "-p", "udp", "--dport", "53"], check=False)
        refused = udp_flows(here, (target, 8125), 800, first_port=40000).refused
        return len(refused), len(gone.splitlines())


@pytest.mark.machine
@pytest.mark.usefixtures("few_places")
@pytest.mark.parametrize("hooks", [[], ["--hooks", "netlink"]], ids=["best", "netlink"])
def test_a_recording_beside_the_screen_says_what_the_kernel_and_the_screen_say(
    lab: Lab, tmp_path: Path, hooks: list[str]
) -> None:
    """A table that fills up and refuses, recorded and watched at the same time."""
    here, there, target = pair(lab)
    fill_up(here, ROOM)
    path, only = tmp_path / "a.data", ["--netns", str(here.inum), *hooks]
    with (
        running("record", "-o", path, *only) as record,
        running("top", "0.5", "-o", "json", "--limit", "1000", *only) as top,
    ):
        record.until(b"recording to")
        top.frame()
        before, held = here.stats(), here.count()
        refused, deleted = incident(here, there, target)
        after, kept = here.stats(), here.count()
        live = top.frame()  # refusals are read from counters, entries that came have to be heard
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            seen = table(live, here)["totals"]
            if seen["drop"] >= refused and seen["insert"] - seen["destroy"] == kept - held:
                break
            live = top.frame()
        live = top.frame()
        assert top.end(signal.SIGTERM) == 143
        assert record.end() == 0
        assert b"stopped by a signal" in record.said
    again = report(path)
    assert refused > 100
    assert after["drop"] - before["drop"] == refused
    with ctrace.open(str(path)) as recording:
        reasons = [one.events["reason"] == Reason.GC_PRESSURE for one in recording.batches()]
    given_up = sum(int(one.sum()) for one in reasons)
    for data in (live, again):
        told = table(data, here)
        totals = told["totals"]
        assert data["lost"] == 0
        assert totals["drop"] == refused
        # the kernel does not count what its collector gives up
        assert totals["early_drop"] == after["early_drop"] - before["early_drop"] + given_up
        assert totals["insert"] - totals["destroy"] == kept - held
        assert totals["deleted"] == deleted
        assert told["count"] == kept
    assert table(again, here)["totals"] == table(live, here)["totals"]
    assert by_key(again) == by_key(live)
    assert refusals(again) == refusals(live)
    assert sum(drops for drops, _ in refusals(live).values()) == (0 if hooks else refused)
    found = kinds(path)
    assert found[Kind.INSERT] == table(live, here)["totals"]["insert"]
    assert found[Kind.DESTROY] == table(live, here)["totals"]["destroy"]
    assert found[Kind.DROP] == (0 if hooks else refused)


@pytest.mark.machine
@pytest.mark.usefixtures("few_places")
def test_a_replay_shows_what_the_screen_showed_at_every_moment(lab: Lab, tmp_path: Path) -> None:
    """Field by field: one source through a model and into a file, and the file replayed."""
    here, there, target = pair(lab)
    fill_up(here, ROOM)
    path = str(tmp_path / "a.data")
    source = open_live(Filter(netns=here.inum), sample=True)
    live: list[tuple[int, list[Snapshot]]] = []
    try:
        head = host_facts.header(source)
        model = Model(head.hooks, head.clock, head.started, host=head.host)
        traffic = threading.Thread(target=incident, args=(here, there, target))
        with Writer(path, head) as writer:
            traffic.start()
            for batch in source.batches(0.25):
                writer.write(batch)
                model.update(batch)
                live.append((batch.until, [model.snapshot(group=group) for group in GROUPS]))
                if not traffic.is_alive() and len(live) > 20:
                    break
        traffic.join()
    finally:
        source.close()
    assert sum(victim.drops for victim in live[-1][1][0].victims) > 100
    with ctrace.open(path) as recording:
        again = Model(head.hooks, head.clock, head.started, host=head.host)
        for (until, shown), batch in zip(live, recording, strict=True):
            again.update(batch)
            assert batch.until == until
            assert [again.snapshot(group=group) for group in GROUPS] == shown
    with ctrace.open(path) as recording:
        feed = ReplayFeed(recording, paused=True)
        pair_at = GROUPS.index("pair")
        for until, shown in (live[-1], live[3], live[len(live) // 2]):
            feed.seek(head.clock.utc(until) / 1e9)
            assert feed.settle()
            latest = feed.latest()
            assert latest is not None
            assert replace(latest, culprits=latest.culprits[:5]) == replace(
                shown[pair_at], culprits=shown[pair_at].culprits[:5]
            )
        feed.close()
        assert feed.error is None


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


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_however_it_ends_the_file_is_readable_and_nothing_is_left(
    lab: Lab, tmp_path: Path, how: str
) -> None:
    here, _, target = pair(lab)
    path = tmp_path / "a.data"
    with running("record", "-o", path, "--netns", here.inum) as record:
        record.until(b"recording to")
        sent = len(udp_flows(here, (target, 8125), 500).flows)
        deadline = time.monotonic() + 60
        seen = 0
        while seen < sent:  # also while it is being written
            assert time.monotonic() < deadline
            time.sleep(0.2)
            with ctrace.open(str(path)) as recording:
                assert recording.writing
                seen = sum(int((b.events["kind"] == Kind.INSERT).sum()) for b in recording)
        udp_flows(here, (target, 8125), 50, first_port=50000)
        status = record.end(signal.Signals[how])
    assert status == (-signal.SIGKILL if how == "SIGKILL" else 0)
    assert b"Traceback" not in record.said
    with ctrace.open(str(path)) as recording:
        assert not recording.writing
        found = join([batch.events for batch in recording])
        assert recording.ended == (None if how == "SIGKILL" else "stopped by a signal")
        assert recording.missing.truncated == (how == "SIGKILL")
        assert not recording.missing.events
    inserted = int((found["kind"] == Kind.INSERT).sum())
    assert inserted >= sent if how == "SIGKILL" else inserted == sent + 50, (inserted, sent)
    assert [one.name for one in tmp_path.iterdir()] == ["a.data"]
    assert "udp/8125" in said("report", path)


def identity(events: Events) -> Counter[bytes]:
    """Entries by what tells them apart: both tuples, the ports and the protocol."""
    return Counter(
        bytes(row[2:11]) + bytes(event["proto"])
        for row, event in zip(words(events), events, strict=True)
    )


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


def rules_in(path: Path) -> dict[int, str]:
    """Rules of each namespace that the file has by now."""
    with ctrace.open(str(path)) as recording:
        return dict(recording.rulesets())


def test_a_recording_is_advised_on_by_the_rules_that_were_there(lab: Lab, tmp_path: Path) -> None:
    """As the replay's page does: a chain that accepts by state alone needs an accept rule."""
    here, there, target = pair(lab)
    here.run(
        ["nft", "-f", "-"],
        stdin="table inet guard { chain in { type filter hook input priority 0; policy drop; "
        "ct state established,related accept; icmpv6 type 133-137 accept; }; }",
    )
    path = tmp_path / "a.data"
    with running("record", "-o", path, "--netns", here.inum) as record:
        record.until(b"recording to")
        with tcp_server(there, 8063):
            assert len(tcp_connections(here, (target, 8063), 300).flows) == 300
        until = time.monotonic() + 120
        while here.inum not in rules_in(path) and time.monotonic() < until:
            time.sleep(0.2)
        assert record.end() == 0
    then = facts_of(here.inum)
    here.run(["nft", "delete", "table", "inet", "guard"])
    with ctrace.open(str(path)) as recording:
        rules = rules_in(path)
        feed = ReplayFeed(recording, paused=True)
        feed.seek(feed.position.end)
        assert feed.settle()
        snapshot = feed.latest()
        assert snapshot is not None
        adviser = FeedAdviser(feed, recorded_facts(rules))
        advice = adviser.advise(snapshot)
        remedy = adviser.about(advice, "tcp", 8063, here.inum)
        live = FeedAdviser(feed, {here.inum: then}.get)
        other = live.about(live.advise(snapshot), "tcp", 8063, here.inum)
        assert other is not None
        assert remedy is not None
        # The table itself is there only live: how many flows were tried is told in the reasons.
        assert replace(other, reasons=()) == replace(remedy, reasons=())
        assert other.reasons[0] == remedy.reasons[0]
        feed.close()
    assert remedy is not None
    assert remedy.text.startswith("NOTRACK tcp/8063: ")
    assert "unsafe" not in remedy.text
    assert "notrack" in remedy.rules
    assert "guard" in remedy.rules
    assert adviser.about(advice, "tcp", 8063, 1) is None
    with pytest.raises(CtraceError, match="nothing can be applied over a recording"):
        adviser.offer(advice)


def grown_or_over(file: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until more is written: what is sent faster than that may be lost before it."""
    size, until = written(file), time.monotonic() + 120
    while process.poll() is None and written(file) == size:
        assert time.monotonic() < until
        time.sleep(0.02)


def written(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # it is over
        return 0


def test_a_full_disk_ends_it_with_one_line(lab: Lab, tmp_path: Path) -> None:
    """A file system of its own, in a mount namespace of its own."""
    here, _, target = pair(lab)
    where, kept = tmp_path / "disk", tmp_path / "kept.data"
    where.mkdir()
    command = " ".join([*CTRACE, "record", "-o", f"{where}/a.data", "--netns", str(here.inum)])
    script = (
        f"mount -t tmpfs -o size=96k none {where} && {command}; status=$?; "
        f"cp {where}/a.data {kept}; exit $status"
    )
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    try:
        said = [process.stderr.readline().decode()]  # once the hooks are there
        turn = 0
        file = Path(f"/proc/{process.pid}/root{where}/a.data")
        while process.poll() is None and turn < 1000:
            udp_flows(here, (target, 8125 + turn), 300)  # all new: none is reopened
            turn += 1
            grown_or_over(file, process)
        said += process.communicate(timeout=60)[1].decode().splitlines()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 1, said
    line = said[-1]
    assert "No space left on device; the recording ends here and keeps its" in line
    assert not any("Traceback" in one for one in said)
    found = kinds(kept)
    assert f"keeps its {sum(found.values()):,} events" in line.replace("\u202f", ",")
    assert found[Kind.INSERT] > 0
    assert list(where.iterdir()) == []


UNIT = Path(ctrace.__file__).parent / "share" / "systemd" / "ctrace-recorder.service"
SANDBOX = """
set -e
mount --make-rprivate /
mount --bind "$1" "$1"
for kept in /proc/sys /sys/fs/cgroup /sys / ; do
    mountpoint -q $kept || mount --bind $kept $kept
    mount -o remount,bind,ro $kept
done
umask 077
shift
exec "$@"
"""
"""ProtectSystem=strict, ProtectKernelTunables, ProtectControlGroups and UMask, as systemd makes
them: everything is read-only but the unit's own directory."""


def test_the_recorders_unit_records_within_its_limits(lab: Lab, tmp_path: Path) -> None:
    """Its own command, with its capabilities only, on a read-only system; and its end."""
    here, _, target = pair(lab)
    unit = UNIT.read_text()
    command = re.search(
        r"^ExecStart=/usr/bin/env ctrace (.*) -o /var/lib/ctrace/recorder$", unit, re.M
    )
    capabilities = re.search(r"^CapabilityBoundingSet=(.*)$", unit, re.M)
    ending = re.search(r"^KillSignal=(.*)$", unit, re.M)
    assert command
    assert capabilities
    assert ending
    names = ",".join("+" + n.removeprefix("CAP_").lower() for n in capabilities[1].split())
    where = tmp_path / "state" / "recorder"
    where.parent.mkdir(mode=0o700)
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", SANDBOX, "sh", str(where.parent),
         "setpriv", "--bounding-set", f"-all,{names}", "--no-new-privs",
         *CTRACE, *command[1].split(), "-o", str(where)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not list(where.glob("*.ctrace")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        sent, seen, deadline = 0, 0, deadline + 120
        while seen < 100 or here.inum not in rules_in(where):  # of one namespace after another
            assert time.monotonic() < deadline
            sent += len(udp_flows(here, (target, 8125), 50, first_port=20000 + sent).flows)
            time.sleep(1.0)  # all of it is read again
            with ctrace.open(str(where)) as recording:
                parts = [b.events[b.events["netns"] == here.inum] for b in recording]
            seen = sum(int((part["kind"] == Kind.INSERT).sum()) for part in parts)
        process.send_signal(signal.Signals[ending[1]])
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
    assert said == b""
    with ctrace.open(str(where)) as recording:
        assert recording.ended == "stopped by a signal"
        assert recording.hooks.family != "netlink"
        names_of = {i: n.name for batch in recording for i, n in batch.names.netns.items()}
        assert here.inum in dict(recording.rulesets())
    assert here.inum in names_of
    (file,) = where.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert where.stat().st_mode & 0o777 == 0o700
