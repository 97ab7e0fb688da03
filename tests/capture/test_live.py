"""The live source: what was there before, what comes, and the families it may use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from kit import traffic
from kit.running.tracing import identity, linked, of

from ctrace.batch import LOWEST_INODE, Batch
from ctrace.capture import open_live, poller
from ctrace.capture.live import LiveSource
from ctrace.capture.table import dumps
from ctrace.capture.table.first_dump import slices
from ctrace.errors import UsageError
from ctrace.filters import Filter
from ctrace.host import ctnetlink
from ctrace.host.netns import Namespace
from ctrace.lab import Lab
from ctrace.record import Events, Kind, Reason, empty, join

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def batches(source: LiveSource, seconds: float) -> list[Batch]:
    found, until = [], time.monotonic() + seconds
    for batch in source.batches(0.1):
        found.append(batch)
        if time.monotonic() >= until and not batch.more:
            break  # (a part of an interval may lack entries that were there before)
    return found


def until(source: LiveSource, met: Callable[[Events], object]) -> Events:
    """The events of batches until they meet a condition, or a minute has passed."""
    parts, end = [empty()], time.monotonic() + 60
    for batch in source.batches(0.1):
        parts.append(batch.events)
        if not batch.more and (met(join(parts)) or time.monotonic() > end):
            break
    return join(parts)


@root
@pytest.mark.kernel
def test_what_was_there_before_and_what_came_since_is_the_table(lab: Lab) -> None:
    a, b = linked(lab)
    target = b.addresses["a"][0]
    traffic.udp_flows(a, (target, 9), 80)
    source = open_live(Filter(netns=a.inum))  # of all namespaces a busy reader may lose some
    try:
        traffic.udp_flows(a, (target, 9), 40, first_port=30000)
        a.run(["conntrack", "-D", "-p", "udp", "--sport", "20005"])
        found, end = [], time.monotonic() + 60
        for batch in source.batches(0.1):
            found.append(batch)
            ended = sum(len(of(one.events, a, Kind.DESTROY)) for one in found)
            known = sum(len(of(one.events, a, Kind.EXISTING, Kind.INSERT)) for one in found)
            counts = [r.count for r in batch.tables if r.netns == a.inum]
            settled = not batch.more and (known, ended, counts) == (120, 1, [119])
            if settled or time.monotonic() > end:
                break
        table = ctnetlink.dump(a.path)
    finally:
        source.close()
    events = join([batch.events for batch in found])
    before = of(events, a, Kind.EXISTING)
    assert len(before) == 80
    assert (before["ts"] >= source.started).all()
    born = identity(join([before, of(events, a, Kind.INSERT)]))
    born.subtract(identity(of(events, a, Kind.DESTROY)))
    assert +born == identity(table)
    assert not -born
    times = events["ts"].astype(np.int64)
    assert (np.diff(times) >= 0).all()
    for batch in found:
        assert not len(batch.events) or int(batch.events["ts"][-1]) <= batch.until
    readings = [r for batch in found for r in batch.tables if r.netns == a.inum]
    assert readings[-1].count == len(table)
    assert readings[-1].max > 0
    names = {i: n for batch in found for i, n in batch.names.netns.items()}
    assert set(a.addresses["b"]) <= set(names[a.inum].addresses)
    if source.hooks.owners:
        owners = {k: o for batch in found for k, o in batch.names.owners.items()}
        assert os.getpid() in {owner.pid for owner in owners.values()}
    assert sum(batch.lost for batch in found) == 0
    assert found[-1].cost.rss > 0


@root
@pytest.mark.kernel
def test_a_namespace_that_appears_is_followed_and_seeded(lab: Lab) -> None:
    source = open_live(ring_bytes=1 << 25)  # others may lose a whole table meanwhile
    try:
        batches(source, 0.2)  # may tell of one that had the number of the next, and has gone
        a, b = linked(lab)
        traffic.udp_flows(a, (b.addresses["a"][0], 9), 30)
        known = (a, Kind.EXISTING, Kind.INSERT)
        events = until(source, lambda events: len(of(events, *known)) >= 30)
        assert identity(of(events, *known)) == identity(ctnetlink.dump(a.path))
        traffic.udp_flows(a, (b.addresses["a"][0], 9), 30, first_port=30000)
        later = until(source, lambda events: len(of(events, a, Kind.INSERT)) >= 30)
        assert len(of(later, a, Kind.INSERT)) == 30
    finally:
        source.close()
        source.close()


@root
@pytest.mark.kernel
def test_a_flood_is_read_before_the_interval_is_over(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that is: what comes in it need not wait, nor be lost."""
    monkeypatch.setattr(poller, "MANY", 2_500)
    a, b = linked(lab)
    source = open_live(Filter(netns=a.inum), seed=False, ring_bytes=1 << 25)  # others are busy, too
    try:
        reading = source.batches(600)
        for port in (9, 10):
            traffic.udp_flows(a, (b.addresses["a"][0], port), 6_000, first_port=1024)
        first = next(reading)
        assert first.more
        assert len(first.events) >= poller.MANY
        assert first.events["ts"].max() <= first.until
        assert first.counts[a.inum][Reason.NEW] >= len(first.events)
        rest = batches(source, 0.3)
        assert not rest[-1].more
        assert any(batch.tables for batch in rest)
        events = join([batch.events for batch in (first, *rest)])
        assert np.count_nonzero(events["kind"] == Kind.INSERT) == 12_000
        assert rest[-1].counts[a.inum][Reason.NEW] == 12_000
        assert sum(batch.lost for batch in (first, *rest)) == 0
    finally:
        source.close()


@root
@pytest.mark.kernel
def test_tables_are_read_each_second_of_a_long_interval(lab: Lab) -> None:
    a, b = linked(lab)
    source = open_live(Filter(netns=a.inum))
    try:
        parts = []
        traffic.udp_flows(a, (b.addresses["a"][0], 9), 300)
        for batch in source.batches(3.5):
            parts.append(batch)
            if not batch.more:
                break
        # on a busy machine two of them may be one
        early = parts[:-1]
        assert 1 <= len(early) <= 3
        assert all(batch.more and batch.tables for batch in early)
        assert [batch.cost.rss > 0 for batch in parts] == [False] * len(early) + [True]
        (last,) = early[-1].tables
        assert last.count == 300
        if hasattr(source._capture, "look"):
            assert 0 < last.met <= 300
            assert last.met_assured == 0
    finally:
        source.close()


@root
@pytest.mark.kernel
def test_a_path_that_leads_elsewhere_by_now_costs_no_entries(lab: Lab) -> None:
    """The process that it leads through ended, or is in another namespace for a moment."""
    a, b = linked(lab)
    ctnetlink.fill(a.path, 50)
    ctnetlink.fill(b.path, 7)
    for path in (a.path, b.path, "/proc/999999999/ns/net"):
        (part,) = slices([Namespace(a.inum, "a", path)])
        assert (len(part.rows), set(part.rows["netns"].tolist())) == (50, {a.inum})
        assert part.ended == (a.inum,)
    (part,) = slices([Namespace(LOWEST_INODE - 1, "gone", b.path)])
    assert not len(part.rows)


@root
def test_unknown_families_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown hook family"):
        open_live(hooks="magic")


def test_without_root_one_line_says_what_to_do() -> None:
    argv = [sys.executable, "-m", "ctrace", "trace"]
    if os.geteuid() == 0:
        argv = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", *argv]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "ctrace: tracing needs root: run it with sudo\n"


CHANGED = (
    "import sys; from ctrace.host import kernel; from ctrace.kernel import programs; "
    "python = sys.argv.pop(1); missing = '' if python else 'bcc is missing: install it'; "
    "kernel.bcc = lambda: kernel.Bcc('1', '/', python, missing); "
    "programs.digest = lambda source: 'of other sources'; "
    "from ctrace.cli import main; main()"
)
"""ctrace after a change of the programs' sources: they must be compiled, by this interpreter."""
BROKEN = {
    "missing": ("", "there is no compiler: bcc is missing"),
    "another": (
        "echo \"ModuleNotFoundError: No module named 'bcc'\" >&2; exit 1",
        "BCC cannot compile the hooks: ModuleNotFoundError",
    ),
    "old": ("echo 'x.c:1: error: unknown argument' >&2; exit 1", "BCC cannot compile"),
    "killed": ("kill -9 $$", "BCC was killed by signal 9"),
}


@root
@pytest.mark.kernel
@pytest.mark.parametrize("how", BROKEN)
def test_without_a_compiler_it_says_that_netlink_is_left_and_why(
    how: str, lab: Lab, tmp_path: Path
) -> None:
    a, b = linked(lab)
    code, why = BROKEN[how]
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{code}\n")
    python.chmod(0o755)

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", CHANGED, str(python) if code else "", *args],
            capture_output=True, text=True, check=True,
        )  # fmt: skip

    here = ("--netns", str(a.inum))
    traffic.udp_flows(a, (b.addresses["a"][0], 9), 5)
    told = json.loads(run("top", "1", "--once", "-o", "json", *here).stdout)
    assert told["hooks"]["family"] == "netlink"
    assert why in told["hooks"]["note"]
    assert not told["hooks"]["drop_tuples"]
    if how != "another":
        return  # the screen and the remark tell the same note, whatever it is
    screen = run("top", "1", "--once", *here).stdout
    assert "only netlink, for " in screen
    assert "netlink hooks cannot name who is" in screen
    assert why in run("trace", "--duration", "0.2", *here).stderr


@root
@pytest.mark.kernel
def test_netlink_pairs_the_end_of_an_older_entry_with_its_row(lab: Lab) -> None:
    a, b = linked(lab)
    traffic.udp_flows(a, (b.addresses["a"][0], 9), 25)
    source = open_live(Filter(netns=a.inum), hooks="netlink")
    try:
        first = batches(source, 0.5)
        # the listener's namespace is known: these ends are told, or found missing in 5 s
        a.run(["conntrack", "-D", "-p", "udp", "--sport", "20007"])
        a.run(["conntrack", "-F"])
        ended = empty()
        deadline = time.monotonic() + 60
        while len(of(ended, a, Kind.DESTROY)) < 25 and time.monotonic() < deadline:
            ended = join([ended, *(batch.events for batch in batches(source, 0.5))])
    finally:
        source.close()
    assert source.hooks.note == ""  # asked for
    rows = of(join([batch.events for batch in first]), a, Kind.EXISTING)
    gone = of(ended, a, Kind.DESTROY)
    assert len(rows) == len(gone) == 25
    assert (rows["ct"] != 0).all()
    assert sorted(rows["ct"].tolist()) == sorted(gone["ct"].tolist())


@root
@pytest.mark.kernel
def test_closing_ends_the_batches_that_another_thread_waits_for(lab: Lab) -> None:
    only = Filter(netns=lab.namespace("a", track=True).inum)  # others' tables take long to read
    for attempt in range(60):  # without a lock between them one in a dozen failed
        source = open_live(only, hooks="netlink")
        failed: list[BaseException] = []

        def consume(source: LiveSource = source, failed: list[BaseException] = failed) -> None:
            try:
                for _ in source.batches(0.0):
                    pass
            except BaseException as error:
                failed.append(error)

        reader = threading.Thread(target=consume)
        reader.start()
        time.sleep(0.01 + attempt / 5000)
        source.close()
        reader.join(60)
        assert not reader.is_alive()
        assert not failed, traceback.format_exception(failed[0])


def test_a_batch_does_not_wait_for_the_dump_of_large_tables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on, rows = threading.Event(), np.zeros(3, empty().dtype)
    rows["netns"] = (7, 7, 8)

    def slow(path: str) -> Iterator[ctnetlink.Table]:
        assert go_on.wait(60), path
        left, mark, made = np.zeros(3, np.int32), np.zeros(3, np.uint32), np.zeros(3, np.uint64)
        yield ctnetlink.Table(rows, left, mark, made, 7)

    monkeypatch.setattr(ctnetlink, "slices", slow)
    monkeypatch.setattr(dumps, "_established", lambda _: 0)
    reads, spaces = dumps.Dumps(), [Namespace(7, "a", "/nowhere")]
    reads._due = 0.0
    assert not len(reads.take(spaces, (), 1))  # it is being read
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    go_on.set()
    assert reads._reading is not None
    reads._reading.join(60)
    after, later = time.clock_gettime_ns(time.CLOCK_BOOTTIME), 1 << 60
    found = reads.take(spaces, (), later)
    assert found["netns"].tolist() == [7, 7]  # of the namespaces that are there
    assert all(before <= at <= after for at in found["ts"].tolist()), "when they were read"
