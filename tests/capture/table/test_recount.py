"""A table that is read again after losses, while it changes: against a set, and the kernel's."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import traffic
from kit.examples import examples

from ctrace.batch import Counts
from ctrace.capture.family import Capture
from ctrace.capture.hooks.netfilter import NetfilterCapture
from ctrace.capture.live import LiveSource
from ctrace.capture.netlink.listener import NetlinkCapture
from ctrace.capture.table import recount
from ctrace.capture.table.recount import Recount
from ctrace.errors import CtraceError
from ctrace.filters import Filter
from ctrace.host import ctnetlink
from ctrace.host.netns import Namespace
from ctrace.lab import Lab
from ctrace.model.model import Model
from ctrace.record import Events, Kind, empty, join

SPACE = Namespace(7, "seven", "/nowhere")
SECOND = 1_000_000_000
NONE: dict[int, Counts] = {}


def record(kind: Kind, flow: int, ts: int = 0) -> Events:
    row = empty(1)
    row["kind"], row["ct"], row["ts"], row["netns"] = kind, 100 + flow, ts, SPACE.inum
    row["proto"], row["family"], row["sport"] = 6, 2, flow
    return row


steps = st.lists(
    st.tuples(st.sampled_from(["toggle", "read", "batch"]), st.integers(0, 19)), max_size=60
)


@examples(200)
@given(st.sets(st.integers(0, 19)), steps)
def test_found_is_what_was_there_when_it_began(
    before: set[int], steps: list[tuple[str, int]]
) -> None:
    """The kernel's walk passes each flow's bucket once, at some moment of the story."""
    table, walked, pieces = set(before), set[int](), list[Events]()

    def read(path: str, inum: int) -> Iterator[Events]:
        while pieces:
            yield pieces.pop(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctnetlink, "pieces", read)
        patch.setattr(recount, "QUIET", 0.0)
        patch.setattr(time, "clock_gettime_ns", lambda _: 0)
        one = Recount(Filter(), same_ids=False)
        one.note(1, NONE, {SPACE.inum})
        out = [one.take(empty(), SECOND, [SPACE], look=True)]
        news: list[Events] = []
        for step, flow in steps:
            if step == "toggle":
                kind = Kind.DESTROY if flow in table else Kind.INSERT
                table ^= {flow}
                news.append(record(kind, flow))
            elif step == "read" and flow not in walked:
                walked.add(flow)
                if flow in table:
                    pieces.append(record(Kind.EXISTING, flow))
            elif step == "batch":  # nothing is read before the end: it is one pass
                out.append(one.take(join(news), 2 * SECOND, [SPACE], look=False))
                news = []
        pieces += [record(Kind.EXISTING, flow) for flow in sorted(table - walked)]
        for _ in range(3):
            out.append(one.take(join(news), 3 * SECOND, [SPACE], look=True))
            news = []
    whole = join(out)
    found = whole["sport"][whole["kind"] == int(Kind.FOUND)].tolist()
    assert sorted(found) == sorted(before)
    marks = whole["kind"][whole["kind"] >= int(Kind.RECOUNT)]
    assert (marks[0], marks[-1]) == (int(Kind.RECOUNT), int(Kind.RECOUNTED))
    again = one.take(record(Kind.INSERT, 3), 4 * SECOND, [SPACE], look=True)
    assert again["kind"].tolist() == [int(Kind.INSERT)]  # nothing more to do


def test_a_loss_or_a_failure_ends_the_reading_and_it_begins_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed = []

    def read(path: str, inum: int) -> Iterator[Events]:
        try:
            yield record(Kind.EXISTING, 1)
            yield record(Kind.EXISTING, 2)
            raise CtraceError("no more")
        finally:
            closed.append(True)

    monkeypatch.setattr(ctnetlink, "pieces", read)
    monkeypatch.setattr(recount, "QUIET", 0.0)
    monkeypatch.setattr(recount, "ENTRIES", 1)
    monkeypatch.setattr(time, "clock_gettime_ns", lambda _: 0)
    one = Recount(Filter(), same_ids=True)

    def kinds() -> list[int]:
        taken: list[int] = one.take(empty(), SECOND, [SPACE], look=True)["kind"].tolist()
        return taken

    one.note(5, NONE, {SPACE.inum})
    assert kinds() == [int(Kind.RECOUNT)]
    assert kinds() == []
    one.note(1, NONE, {SPACE.inum})
    assert closed == [True]
    assert kinds() == [int(Kind.RECOUNT)]
    assert kinds() == []
    assert kinds() == [int(Kind.FOUND)]
    assert kinds() == []  # it fails, and is tried again after a while
    assert closed == [True, True]
    assert kinds() == []
    one.close()


def test_no_reading_begins_before_the_backlog_of_a_loss_has_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A flow's birth comes long after it was captured; its end was lost: it is held by nobody."""
    monkeypatch.setattr(ctnetlink, "pieces", lambda *_: iter([]))
    monkeypatch.setattr(recount, "QUIET", 0.0)
    monkeypatch.setattr(time, "clock_gettime_ns", lambda _: 5 * SECOND)
    one = Recount(Filter(), same_ids=True)
    one.note(1, NONE, {SPACE.inum})
    for late in (2, 3, 4):
        birth = record(Kind.INSERT, late, late * SECOND)
        told = one.take(birth, late * SECOND, [SPACE], look=True)
        assert told["kind"].tolist() == [int(Kind.INSERT)]
    told = one.take(empty(), 6 * SECOND, [SPACE], look=True)
    assert told["kind"].tolist() == [int(Kind.RECOUNT)]


def test_a_namespace_that_ends_while_it_is_read_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ctnetlink, "pieces", lambda *_: iter([record(Kind.EXISTING, 1)]))
    monkeypatch.setattr(recount, "QUIET", 0.0)
    monkeypatch.setattr(time, "clock_gettime_ns", lambda _: 0)
    one = Recount(Filter(), same_ids=True)
    one.note(1, NONE, {SPACE.inum})
    assert len(one.take(empty(), SECOND, [SPACE], look=True)) == 1
    for turn in (2, 3):
        assert not len(one.take(empty(), turn * SECOND, [], look=True))
    one.note(1, NONE, {SPACE.inum})  # its number is used again
    assert len(one.take(empty(), 4 * SECOND, [SPACE], look=True)) == 1


FAMILIES: dict[str, Callable[[Filter], Capture]] = {
    "netfilter": lambda wanted: NetfilterCapture(wanted, ring_bytes=1 << 17),
    "netlink": lambda _: NetlinkCapture(queue=4096),
}


@contextmanager
def on_one_processor() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.kernel
@pytest.mark.parametrize("family", FAMILIES)
def test_after_an_overrun_services_hold_what_conntrack_lists(family: str) -> None:
    with Lab() as lab:
        node = lab.namespace("n", track=True)
        node.run(["ip", "link", "set", "lo", "up"])
        node.sysctl("net.netfilter.nf_conntrack_udp_timeout", 600)
        wanted = Filter(netns=node.inum)
        try:
            capture = FAMILIES[family](wanted)
        except CtraceError as error:
            pytest.skip(str(error))
        source = LiveSource(capture, wanted, sample=True)
        try:
            model = Model(source.hooks, source.clock, source.started)
            batches = source.batches(0.2)
            model.update(next(batches))
            # nobody reads meanwhile, and all goes into one ring
            with source._poller.lock, on_one_processor():
                for port in (9, 10, 11):
                    traffic.udp_flows(node, ("127.0.0.1", port), 2000, first_port=20_000)
                node.run(["conntrack", "-D", "-p", "udp", "--dport", "10"])
            traffic.udp_flows(node, ("127.0.0.1", 12), 50, first_port=20_000)
            until = time.monotonic() + 60
            for batch in batches:
                model.update(batch)
                if (batch.events["kind"] == int(Kind.RECOUNTED)).any():
                    break
                assert time.monotonic() < until
            listed = node.run(["conntrack", "-L", "-p", "udp"])
        finally:
            source.close()
        snapshot = model.snapshot("service", limit=1000)
        (table,) = [one for one in snapshot.tables if one.netns == node.inum]
        held = {
            c.port: c.held for c in snapshot.culprits if c.netns == node.inum and c.proto == "udp"
        }
        ports = Counter(int(line.split("dport=")[1].split()[0]) for line in listed.splitlines())
    assert snapshot.lost > 0
    assert not table.stale
    assert {port: n for port, n in held.items() if n} == ports
    assert ports == {9: 2000, 11: 2000, 12: 50}
    assert not any(c.stale for c in snapshot.culprits)
