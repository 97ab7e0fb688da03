"""The netlink family against what the traffic's makers know and the kernel counts."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from kit.running.tracing import spaces
from kit.traffic import Flow, tcp_connections, tcp_server, udp_flows, udp_server
from kit.turns import lowered

from ctrace.capture.netlink.listener import NetlinkCapture, Receiver
from ctrace.capture.netlink.reasons import merge
from ctrace.host import ctnetlink
from ctrace.lab import Lab, Node
from ctrace.record import N_REASONS, Events, Kind, Reason, Status, address_text, join

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


@contextmanager
def capturing(*nodes: Node, queue: int = 32 << 20) -> Iterator[NetlinkCapture]:
    capture = NetlinkCapture(queue=queue)
    try:
        capture.follow(spaces(*nodes))
        yield capture
    finally:
        capture.close()


def drain(capture: NetlinkCapture) -> tuple[Events, int]:
    """Everything that has arrived: events are queued before what caused them returns."""
    parts: list[Events] = []
    lost = 0
    while True:
        events, missed = capture.poll()
        lost += missed
        if not len(events):
            return join(parts), lost
        parts.append(events)


def flow_of(row: np.void) -> Flow:
    return Flow(
        int(row["proto"]),
        address_text(row["src"]),
        int(row["sport"]),
        address_text(row["dst"]),
        int(row["dport"]),
    )


def of(events: Events, node: Node, kind: Kind) -> Events:
    rows: Events = events[(events["netns"] == node.inum) & (events["kind"] == kind)]
    return rows


def test_every_flow_of_several_namespaces_once_and_in_order() -> None:
    with Lab() as lab:
        a, b, c = (lab.namespace(name, track=True) for name in "abc")
        lab.link(a, b)
        with capturing(a, b, c) as capture:
            sent: Counter[Flow] = Counter()
            with tcp_server(b, 8063), udp_server(b, 8125):
                for target in b.addresses["a"]:
                    sent.update(tcp_connections(a, (target, 8063), 300).flows)
                    sent.update(tcp_connections(a, (target, 8063), 100, reset=True).flows)
                    sent.update(udp_flows(a, (target, 8125), 800).flows)
            alone = Counter(udp_flows(c, ("127.0.0.1", 9), 1500).flows)
            before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            events, lost = drain(capture)
            assert lost == 0
            service = np.isin(events["dport"], (8063, 8125, 9))  # not neighbour discovery
            assert (events["ts"][:-1] <= events["ts"][1:]).all()
            assert events["ts"][-1] >= before
            for node, flows in ((a, sent), (b, sent), (c, alone)):
                rows = of(events[service], node, Kind.INSERT)
                assert Counter(map(flow_of, rows)) == flows
                assert (rows["reason"] == Reason.NEW).all()
                listed = ctnetlink.dump(node.path)["ct"]
                assert set(listed.tolist()) <= set(of(events, node, Kind.INSERT)["ct"].tolist())
                assert capture.counts()[node.inum][Reason.NEW] == len(of(events, node, Kind.INSERT))


def test_inserts_less_destroys_are_the_table() -> None:
    with Lab() as lab:
        a, b = lab.namespace("a", track=True), lab.namespace("b", track=True)
        lab.link(a, b)
        with capturing(a, b) as capture:
            with tcp_server(b, 8063):
                tcp_connections(a, (b.addresses["a"][0], 8063), 200)
                tcp_connections(a, (b.addresses["a"][1], 8063), 200, reset=True)
            udp_flows(a, (b.addresses["a"][0], 9), 500)
            a.run(["conntrack", "-D", "-p", "udp", "--orig-port-src", "20007"])
            b.run(["conntrack", "-F"])
            events, lost = drain(capture)
            assert lost == 0
            for node in (a, b):
                made, gone = of(events, node, Kind.INSERT), of(events, node, Kind.DESTROY)
                assert len(made) - len(gone) == node.count()
                assert set(gone["ct"].tolist()) <= set(made["ct"].tolist())
            gone = of(events, a, Kind.DESTROY)
            one = gone[gone["sport"] == 20007]
            assert len(one) == 1
            assert one["reason"][0] == Reason.DELETED
            if capture.tells_left:
                assert -30_000 <= one["overdue_ms"][0] < 0
            flushed = of(events, b, Kind.DESTROY)
            assert set(flushed["reason"].tolist()) == {Reason.DELETED}
            assert len(flushed) >= 900


def test_who_made_and_how_it_ended() -> None:
    with Lab() as lab:
        node = lab.namespace("n", track=True)
        node.sysctl("net.netfilter.nf_conntrack_udp_timeout", 1)
        with capturing(node) as capture:
            ctnetlink.fill(node.path, 40)
            udp_flows(node, ("127.0.0.1", 9), 30)
            time.sleep(2.1)
            ctnetlink.dump(node.path)  # it collects what it finds expired
            events, _ = drain(capture)
            made, gone = of(events, node, Kind.INSERT), of(events, node, Kind.DESTROY)
            reasons = Counter(made["reason"].tolist())
            assert reasons == {int(Reason.USER): 40, int(Reason.NEW): 30}
            assert (made["status"][made["reason"] == Reason.USER] & Status.ASSURED).all()
            assert len(gone) == 30
            wanted = Reason.EXPIRED if capture.tells_left else Reason.GONE
            assert (gone["reason"] == wanted).all()
            assert (gone["idle_ms"] == -1).all()


def test_times_stay_in_order_with_the_kernels_timestamps_on() -> None:
    with Lab() as lab:
        node = lab.namespace("n", track=True)
        node.sysctl("net.netfilter.nf_conntrack_timestamp", 1)
        with capturing(node) as capture:
            for _ in range(3):  # the same tuples again and again, between two polls
                udp_flows(node, ("127.0.0.1", 9), 20)
                node.run(["conntrack", "-F"])
            events, _ = drain(capture)
            assert len(events) == 120
            assert (events["ts"][:-1] <= events["ts"][1:]).all()
            for port in range(20000, 20020):
                kinds = events["kind"][events["sport"] == port].tolist()
                assert kinds == [Kind.INSERT, Kind.DESTROY] * 3


def test_losses_are_counted_exactly_and_said() -> None:
    with Lab() as lab:
        node = lab.namespace("n", track=True)
        with capturing(node, queue=64 << 10) as capture:
            ctnetlink.fill(node.path, 5000)
            events, lost = drain(capture)
            assert lost > 1000
            assert len(events) + lost == 5000
            assert capture.counts()[node.inum][Reason.RING_FULL] == lost
            assert any(f"{lost} events were lost" in line for line in capture.info.blind)
            udp_flows(node, ("127.0.0.1", 9), 10)
            assert len(drain(capture)[0]) == 10  # it goes on


@pytest.mark.machine  # its table has few places
def test_refusals_are_the_kernels_count() -> None:
    with lowered(), Lab() as lab:
        node = lab.namespace("n", track=True)
        limit = int(node.sysctl("net.netfilter.nf_conntrack_max"))
        if limit > 1 << 19:
            pytest.skip("the table is too large to fill")
        ctnetlink.fill(node.path, limit)
        with capturing(node) as capture:
            refused = len(udp_flows(node, ("127.0.0.1", 9), 50).refused)
            assert refused == 50
            counts = capture.counts()[node.inum]
            assert counts[Reason.TABLE_FULL] == refused
            assert counts[Reason.CLASH] == counts[Reason.EVICTED] == 0
            assert not capture.info.drop_tuples
            late = [line for line in capture.info.blind if "nf_conntrack_events=2" in line]
            mode = node.sysctl("net.netfilter.nf_conntrack_events")
            assert len(late) == (mode == "2")
            assert all("n" in line for line in late)


@pytest.mark.machine  # whoever listens for the events of all namespaces has older ends told
def test_the_end_of_older_entries_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctrace.capture.netlink.ends.SOONEST", 0.2)
    with Lab() as lab:
        node = lab.namespace("n", track=True)
        if node.sysctl("net.netfilter.nf_conntrack_events") != "2":
            pytest.skip("this kernel reports the end of every entry")
        node.sysctl("net.netfilter.nf_conntrack_udp_timeout", 600)
        udp_flows(node, ("127.0.0.1", 9), 100)
        with capturing(node) as capture:
            udp_flows(node, ("127.0.0.1", 9), 50, first_port=30000)
            for port in (20005, 20006, 30005):
                node.run(["conntrack", "-D", "-p", "udp", "--orig-port-src", str(port)])
            parts: list[Events] = []
            until = time.monotonic() + 120
            while time.monotonic() < until and len(of(join(parts), node, Kind.DESTROY)) < 3:
                time.sleep(0.05)
                parts.append(drain(capture)[0])
            node.run(["conntrack", "-F"])
            while time.monotonic() < until and len(of(join(parts), node, Kind.DESTROY)) < 150:
                time.sleep(0.05)
                parts.append(drain(capture)[0])
            time.sleep(0.5)  # a second look finds nothing more
            parts.append(drain(capture)[0])
            gone = of(join(parts), node, Kind.DESTROY)
            assert Counter(gone["sport"].tolist()) == Counter(
                [*range(20000, 20100), *range(30000, 30050)]
            )
            older = gone["sport"] < 30000
            assert (gone["reason"][older] == Reason.GONE).all()
            assert (gone["reason"][~older] == Reason.DELETED).all()
            counts = capture.counts()[node.inum]
            assert (counts[Reason.GONE], counts[Reason.DELETED]) == (100, 50)


def test_a_namespace_without_events_is_named() -> None:
    with Lab() as lab:
        node = lab.namespace("quiet", track=True)
        node.sysctl("net.netfilter.nf_conntrack_events", 0)
        with capturing(node) as capture:
            udp_flows(node, ("127.0.0.1", 9), 10)
            assert len(drain(capture)[0]) == 0
            assert any("events=0" in line and "quiet" in line for line in capture.info.blind)


def test_it_lets_go_of_a_namespace() -> None:
    with Lab() as lab:
        here, gone = lab.namespace("here", track=True), lab.namespace("gone", track=True)
        lab.link(here, gone)
        with capturing(here, gone) as capture:
            gone.close()
            time.sleep(0.3)
            assert "to-gone" in here.run(["ip", "link"])  # our socket is inside
            capture.follow(spaces(here))
            until = time.monotonic() + 60
            while "to-gone" in here.run(["ip", "link"]) and time.monotonic() < until:
                time.sleep(0.05)
            assert "to-gone" not in here.run(["ip", "link"])
            assert set(capture.counts()) == {here.inum}
            udp_flows(here, ("127.0.0.1", 9), 5)
            assert len(of(drain(capture)[0], here, Kind.INSERT)) == 5
        capture.close()  # twice is safe


def test_a_message_longer_than_its_slot_counts_as_lost() -> None:
    with Lab() as lab:
        node = lab.namespace("n", track=True)
        with capturing(node) as capture:
            capture._receiver = Receiver(16, slot=128)
            udp_flows(node, ("127.0.0.1", 9), 5)
            events, lost = drain(capture)
            assert (len(events), lost) == (0, 5)


def test_counters_tell_clashes_from_refusals() -> None:
    counts, received = np.zeros(N_REASONS, np.uint64), np.zeros(N_REASONS, np.uint64)
    received[Reason.GONE], received[Reason.NEW] = 12, 90
    since = {"drop": 9, "insert_failed": 7, "chaintoolong": 3, "early_drop": 5, "clash_resolve": 2}
    merge(counts, received, since)
    assert {Reason(i): int(n) for i, n in enumerate(counts) if n} == {
        Reason.NEW: 90,
        Reason.EVICTED: 5,
        Reason.GONE: 7,
        Reason.TABLE_FULL: 5,
        Reason.CLASH: 4,
        Reason.CHAIN_TOO_LONG: 3,
        Reason.CLASH_RESOLVED: 2,
    }
    # A counter read early must not make a cumulative number go back.
    merge(counts, received, since | {"early_drop": 8})
    assert counts[Reason.GONE] == 7
