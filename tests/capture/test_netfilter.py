"""The netfilter family against the kernel's own account, with real traffic."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kit import traffic
from kit.nfqueue import Queue

from ctrace.capture.hooks.netfilter import NetfilterCapture, without_retracted
from ctrace.filters import Filter, parse_network
from ctrace.host import ctnetlink
from ctrace.host.netns import Namespace
from ctrace.kernel import programs
from ctrace.kernel.objects import NEAR_PLACES
from ctrace.lab import Lab, Node
from ctrace.record import Direction, Events, Kind, Reason, Status, address_text, empty, join, words

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


def spaces(*nodes: Node) -> list[Namespace]:
    return [Namespace(node.inum, node.name, node.path) for node in nodes]


RING = 1 << 25
"""Bytes of each CPU's ring: what others' tables lose at once, a quarter of a million entries,
comes between two polls of ours."""


class Trace:
    """A capture of some nodes, polled until it is quiet."""

    def __init__(self, *nodes: Node, wanted: Filter | None = None) -> None:
        self.nodes = nodes
        self.capture = NetfilterCapture(wanted or Filter(), ring_bytes=RING)
        self.capture.follow(spaces(*nodes))
        self.seen = empty()
        self.lost = 0

    def take(self, quiet: float = 0.12) -> Events:
        """Everything since the last call, of our nodes."""
        began = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        parts, until = [], time.monotonic() + quiet
        inums = [node.inum for node in self.nodes]
        last = False
        while not last:
            # on a busy machine the time may pass between two polls: one more settles it
            last = time.monotonic() >= until
            events, lost = self.capture.poll()
            self.lost += lost
            if np.isin(events["netns"], inums).any():
                parts.append(events)
                until, last = time.monotonic() + quiet, False
            elif len(events) and int(events["ts"].min()) < began:
                last = False  # what happened elsewhere before is still on its way
            time.sleep(0.013)
        events = join(parts)
        fresh = events[np.isin(events["netns"], inums)]
        self.seen = join([self.seen, fresh])
        return fresh

    def total(self, node: Node, reason: Reason) -> int:
        counts = self.capture.counts().get(node.inum)
        return 0 if counts is None else int(counts[reason])


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@pytest.fixture
def pair(lab: Lab) -> tuple[Node, Node]:
    a, b = lab.namespace("a", track=True), lab.namespace("b", track=True)
    lab.link(a, b)
    # neighbours resolved, so that no first packet waits; then empty tables
    with traffic.tcp_server(b, 0) as port:
        for address in b.addresses["a"]:
            traffic.tcp_connections(a, (address, port), 1)
    for node in (a, b):
        ctnetlink.flush(node.path)
    return a, b


@pytest.fixture
def trace(pair: tuple[Node, Node]) -> Iterator[Trace]:
    made = Trace(*pair)
    yield made
    made.capture.close()


@pytest.fixture
def alone(pair: tuple[Node, Node]) -> Iterator[Trace]:
    """Of the first node only: no room in its rings goes to what others delete meanwhile."""
    made = Trace(*pair, wanted=Filter(netns=pair[0].inum))
    yield made
    made.capture.close()


def of(events: Events, kind: Kind, node: Node) -> Events:
    chosen: Events = events[(events["kind"] == kind) & (events["netns"] == node.inum)]
    return chosen


def flows(events: Events) -> Counter[tuple[int, str, int, str, int]]:
    """Original tuples as the traffic generators write them."""
    return Counter(
        (int(e["proto"]), address_text(e["src"]), int(e["sport"]), address_text(e["dst"]),
         int(e["dport"]))
        for e in events
    )  # fmt: skip


def both_tuples(events: Events) -> set[bytes]:
    """Original and reply tuple, protocol and zone of each row."""
    columns = words(events)
    return {
        bytes(row[2:11]) + bytes(event["proto"]) + bytes(event["zone"])
        for row, event in zip(columns, events, strict=True)
    }


# -- inserts and deletions --------------------------------------------------------------


def test_every_flow_of_both_families_in_two_namespaces(
    pair: tuple[Node, Node], trace: Trace
) -> None:
    a, b = pair
    v4, v6 = b.addresses["a"]
    sent: list[traffic.Flow] = []
    with traffic.tcp_server(b, 7000) as port, traffic.udp_server(b, 7001):
        for address in (v4, v6):
            sent += traffic.tcp_connections(a, (address, port), 150).flows
            sent += traffic.udp_flows(a, (address, 7001), 300).flows
    events = trace.take()
    for node, way in ((a, Direction.OUT), (b, Direction.IN)):
        inserts = of(events, Kind.INSERT, node)
        assert flows(inserts) == Counter(sent)
        assert both_tuples(inserts) == both_tuples(ctnetlink.dump(node.path))
        assert node.count() == len(sent) == trace.total(node, Reason.NEW)
        assert set(inserts["direction"].tolist()) == {int(way)}
        assert (inserts["status"] & int(Status.CONFIRMED)).all()
    assert trace.lost == 0
    assert (np.diff(events["ts"].astype(np.int64)) >= 0).all()

    ours = of(events, Kind.INSERT, a)
    pids = set((ours["owner"] >> np.uint64(32)).tolist())
    assert pids == {os.getpid()}
    assert not of(events, Kind.INSERT, b)["owner"].any()
    comms = trace.capture.owner_comms({int(ours["owner"][0])})
    with open("/proc/self/comm") as file:
        assert comms[int(ours["owner"][0])][0] == file.read().strip()


def test_deletions_by_d_f_rst_and_expiry(pair: tuple[Node, Node], trace: Trace) -> None:
    a, b = pair
    v4, _ = b.addresses["a"]
    a.sysctl("net.netfilter.nf_conntrack_udp_timeout", 1)
    with traffic.tcp_server(b, 7000) as port:
        traffic.tcp_connections(a, (v4, port), 40)
    traffic.udp_flows(a, (v4, 9), 30)
    before = trace.take()
    born = {int(e["ct"]): bytes(words(e.reshape(1))[0, 2:6]) for e in of(before, Kind.INSERT, a)}
    assert len(born) == 70

    # one by conntrack -D, the expired ones found by a table walk, the rest by -F
    time.sleep(1.6)
    first = of(before, Kind.INSERT, a)[0]
    a.run(["conntrack", "-D", "-p", "tcp", "--sport", str(first["sport"])])
    a.run(["conntrack", "-L"])
    trace.take()
    deleted = of(trace.seen, Kind.DESTROY, a)  # some expire while a busy machine looks
    reasons = Counter((int(e["proto"]), int(e["reason"])) for e in deleted)
    assert reasons == {(6, Reason.DELETED): 1, (17, Reason.EXPIRED): 30}
    udp = deleted[deleted["proto"] == 17]
    assert (udp["timeout_ms"] == 1000).all()
    # any walk over the shared hash may have found them before ours
    assert (udp["idle_ms"] == udp["overdue_ms"] + 1000).all()

    a.run(["conntrack", "-F"])
    flushed = of(trace.take(), Kind.DESTROY, a)
    assert len(flushed) == 39
    assert set(flushed["reason"].tolist()) == {int(Reason.DELETED)}
    assert (flushed["state"] == 7).all()  # TIME_WAIT
    assert (flushed["timeout_ms"] == 120_000).all()
    assert (np.abs(flushed["idle_ms"] + flushed["overdue_ms"] * -1 - 120_000) <= 8).all()
    ended = of(trace.seen, Kind.DESTROY, a)
    assert {int(e["ct"]): bytes(words(e.reshape(1))[0, 2:6]) for e in ended} == born
    assert a.count() == 0


def test_a_reset_connection_dies_at_once(pair: tuple[Node, Node], trace: Trace) -> None:
    a, b = pair
    with traffic.tcp_server(b, 7000) as port:
        # nobody listens on port + 1: the RST kills the unreplied entry on both sides
        for _ in range(20):
            with b.enter(), pytest.raises(ConnectionRefusedError):
                socket.create_connection((a.addresses["b"][0], port + 1), timeout=60)
    events = trace.take()
    for node in (a, b):
        assert len(of(events, Kind.INSERT, node)) == 20
        ended = of(events, Kind.DESTROY, node)
        assert len(ended) == 20 - node.count()


def test_the_end_of_a_namespace_ends_its_entries(lab: Lab) -> None:
    a, b = lab.namespace("a", track=True), lab.namespace("b", track=True)
    lab.link(a, b)
    trace = Trace(a, b)
    try:
        traffic.udp_flows(a, (b.addresses["a"][0], 9), 25)
        assert len(of(trace.take(), Kind.INSERT, a)) == 25
        a.close()
        lab.nodes.remove(a)
        trace.capture.follow(spaces(b))
        deadline = time.monotonic() + 60
        while len(of(trace.seen, Kind.DESTROY, a)) < 25 and time.monotonic() < deadline:
            trace.take()
        assert len(of(trace.seen, Kind.DESTROY, a)) == 25
    finally:
        trace.capture.close()


def test_inserts_minus_deletions_is_the_change_of_the_count(
    pair: tuple[Node, Node], trace: Trace
) -> None:
    """Several senders at once while another keeps flushing."""
    a, b = pair
    v4, v6 = b.addresses["a"]
    stop = threading.Event()

    def flush() -> None:
        while not stop.is_set():
            a.run(["conntrack", "-F"])
            b.run(["conntrack", "-F"])

    flusher = threading.Thread(target=flush)
    flusher.start()
    senders = [
        threading.Thread(
            target=traffic.udp_flows, args=(a, (v4 if i % 2 else v6, 9), 1500),
            kwargs={"first_port": 10000 + 2000 * i},
        )
        for i in range(4)
    ]  # fmt: skip
    for sender in senders:
        sender.start()
    while any(sender.is_alive() for sender in senders):
        trace.take(0.01)
    stop.set()
    flusher.join()
    trace.take()
    events = trace.seen
    assert trace.lost == 0
    for node in (a, b):
        inserts, ends = len(of(events, Kind.INSERT, node)), len(of(events, Kind.DESTROY, node))
        assert inserts >= 6000
        assert inserts - ends == node.count()
        assert trace.total(node, Reason.NEW) == inserts


# -- NAT --------------------------------------------------------------


def test_nat_shows_both_tuples(lab: Lab) -> None:
    """client -> router (DNAT to the server, masquerade) -> server."""
    client, router, server = (lab.namespace(n, track=True) for n in ("client", "router", "server"))
    lab.link(client, router)
    lab.link(router, server)
    inside, outside = router.addresses["client"][0], server.addresses["router"][0]
    for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
        router.sysctl(key, 1)
    client.run(["ip", "route", "add", "default", "via", inside])
    router.run(
        ["nft", "-f", "-"],
        stdin=f"""table ip nat {{
            chain pre {{ type nat hook prerouting priority -100;
                ip daddr {inside} tcp dport 80 dnat to {outside}:7000; }}
            chain post {{ type nat hook postrouting priority 100; masquerade; }}
        }}""",
    )
    trace = Trace(client, router, server)
    try:
        with traffic.tcp_server(server, 7000):
            sent = traffic.tcp_connections(client, (inside, 80), 60).flows
        events = trace.take()
    finally:
        trace.capture.close()
    assert len(sent) == 60
    translated = of(events, Kind.INSERT, router)
    assert flows(translated) == Counter(sent)
    assert both_tuples(translated) == both_tuples(ctnetlink.dump(router.path))
    assert set(translated["direction"].tolist()) == {int(Direction.FORWARD)}
    bits = int(Status.SRC_NAT | Status.DST_NAT)
    assert ((translated["status"] & bits) == bits).all()
    assert {address_text(e["reply_src"]) for e in translated} == {outside}
    assert set(translated["reply_sport"].tolist()) == {7000}
    assert {address_text(e["reply_dst"]) for e in translated} == {router.addresses["server"][0]}
    assert not (of(events, Kind.INSERT, client)["status"] & bits).any()
    assert len(of(events, Kind.INSERT, server)) == 60


# -- what must not be seen --------------------------------------------------------------

DROPS = {
    "nft drop before conntrack": (
        "nft", "table inet t { chain c { type filter hook output priority -300; "
        "udp dport 4444 drop; }; }"),
    "nft drop after conntrack": (
        "nft", "table inet t { chain c { type filter hook output priority 0; "
        "udp dport 4444 drop; }; }"),
    "nft reject": (
        "nft", "table inet t { chain c { type filter hook output priority 0; "
        "udp dport 4444 reject; }; }"),
    "iptables drop": ("iptables", "-A OUTPUT -p udp --dport 4444 -j DROP"),
    "iptables raw drop": ("iptables", "-t raw -A OUTPUT -p udp --dport 4444 -j DROP"),
    "iptables drop at the end": (
        "iptables", "-t mangle -A POSTROUTING -p udp --dport 4444 -j DROP"),
}  # fmt: skip


@pytest.mark.parametrize("how", list(DROPS))
def test_packets_that_rules_drop_are_no_events(
    how: str, pair: tuple[Node, Node], trace: Trace
) -> None:
    a, b = pair
    tool, rules = DROPS[how]
    if tool == "nft":
        a.run(["nft", "-f", "-"], stdin=rules)
    else:
        a.run(["iptables", *rules.split()])
    traffic.udp_flows(a, (b.addresses["a"][0], 4444), 100)
    assert not len(trace.take())
    assert all(trace.total(a, reason) == 0 for reason in Reason)
    assert a.count() == 0


def test_tcp_reject_and_invalid_packets_are_no_events(
    pair: tuple[Node, Node], trace: Trace
) -> None:
    a, b = pair
    v4 = b.addresses["a"][0]
    b.run(
        ["nft", "-f", "-"],
        stdin="table inet t { chain c { type filter hook input priority 0; "
        "tcp dport 4444 reject with tcp reset; ct state invalid drop; }; }",
    )
    for _ in range(30):
        with a.enter(), pytest.raises(ConnectionRefusedError):
            socket.create_connection((v4, 4444), timeout=60)
    inside = trace.take()
    assert not len(of(inside, Kind.INSERT, b))
    assert not len(of(inside, Kind.DROP, b))

    # TCP packets without a connection and with an impossible set of flags
    b.sysctl("net.netfilter.nf_conntrack_tcp_loose", 0)
    with a.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for port in range(50):
            raw.sendto(_tcp_packet(a.addresses["b"][0], v4, 20000 + port, 5555, 0x3F), (v4, 0))
    events = trace.take()
    assert b.stats()["invalid"] >= 50
    assert not len(of(events, Kind.INSERT, b))
    assert not len(of(events, Kind.DROP, b))
    assert trace.total(b, Reason.TABLE_FULL) == 0


def _udp_packet(src: str, dst: str, sport: int, dport: int) -> bytes:
    udp = struct.pack("!HHHH", sport, dport, 8, 0)  # without a checksum
    source, target = socket.inet_aton(src), socket.inet_aton(dst)
    return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 64, 17, 0, source, target) + udp


def _tcp_packet(src: str, dst: str, sport: int, dport: int, flags: int) -> bytes:
    def checksum(data: bytes) -> int:
        total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
        total = (total >> 16) + (total & 0xFFFF)
        return ~(total + (total >> 16)) & 0xFFFF

    source, target = socket.inet_aton(src), socket.inet_aton(dst)
    tcp = struct.pack("!HHIIBBHHH", sport, dport, 1, 1, 0x50, flags, 1024, 0, 0)
    tcp = tcp[:16] + struct.pack("!H", checksum(source + target + b"\0\6\0\x14" + tcp)) + tcp[18:]
    return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 0, 0, 64, 6, 0, source, target) + tcp


# -- a full table --------------------------------------------------------------


@pytest.mark.machine
@pytest.mark.usefixtures("few_places")
def test_a_full_table_refuses_with_the_packets_own_tuple(
    pair: tuple[Node, Node], alone: Trace
) -> None:
    """The table of one private namespace is filled up to the host's own maximum."""
    (a, b), trace = pair, alone
    v4, v6 = b.addresses["a"]
    limit = int(a.sysctl("net.netfilter.nf_conntrack_max"))
    made = ctnetlink.fill(a.path, limit)
    assert not len(trace.take())  # by ctnetlink: no packet, no event
    before, count = a.stats(), a.count()
    assert made == count == limit
    # rules still drop: those are no refusals
    a.run(
        ["nft", "-f", "-"],
        stdin="table inet t { chain c { type filter hook output priority -300; "
        "udp dport 4444 drop; }; }",
    )
    traffic.udp_flows(a, (v4, 4444), 40)
    refused: list[traffic.Flow] = []
    for address in (v4, v6):
        refused += traffic.udp_flows(a, (address, 9), 150).refused
        traffic.tcp_connections(a, (address, 80), 3, timeout=0.05)
    events = trace.take(0.4)
    after = a.stats()
    drops = of(events, Kind.DROP, a)
    assert not trace.lost
    assert after["drop"] - before["drop"] == len(drops) == trace.total(a, Reason.TABLE_FULL)
    assert len(refused) == 300
    udp = drops[drops["proto"] == 17]
    assert flows(udp) == Counter(refused)
    assert len(drops) - len(udp) >= 6
    assert set(drops["reason"].tolist()) == {int(Reason.TABLE_FULL)}
    assert set(drops["direction"].tolist()) == {int(Direction.OUT)}
    # a SYN sent again by a timer is nobody's
    assert set((udp["owner"] >> np.uint64(32)).tolist()) == {os.getpid()}
    reply = drops[drops["family"] == 10][0]
    assert address_text(reply["reply_src"]) == v6
    assert not len(of(events, Kind.INSERT, a))

    # packets that arrive are refused as well, and have no owner
    counted = a.stats()["drop"]
    traffic.udp_flows(b, (a.addresses["b"][0], 53), 80)
    arrived = of(trace.take(), Kind.DROP, a)
    assert a.stats()["drop"] - counted == len(arrived) == 80
    assert not arrived["owner"].any()
    ctnetlink.flush(a.path)
    trace.take()


@pytest.mark.machine
@pytest.mark.usefixtures("few_places")
def test_evictions_by_early_drop_are_told_from_deletions(
    pair: tuple[Node, Node], alone: Trace
) -> None:
    """A table full of entries that are not ASSURED makes room by evicting some."""
    (a, b), trace = pair, alone
    limit = int(a.sysctl("net.netfilter.nf_conntrack_max"))
    ctnetlink.fill(a.path, limit, state=None)
    before = a.stats()
    sent = traffic.udp_flows(a, (b.addresses["a"][0], 9), 400)
    events, after = trace.take(0.3), a.stats()
    evicted = after["early_drop"] - before["early_drop"]
    ended = of(events, Kind.DESTROY, a)
    assert evicted > 0
    assert int((ended["reason"] == int(Reason.EVICTED)).sum()) == evicted
    assert trace.total(a, Reason.EVICTED) == evicted
    assert after["drop"] - before["drop"] == len(of(events, Kind.DROP, a)) == len(sent.refused)
    assert len(of(events, Kind.INSERT, a)) == len(sent.flows)
    ctnetlink.flush(a.path)
    trace.take()


# -- clashes --------------------------------------------------------------


def test_a_merged_or_refused_clash_is_no_insert() -> None:
    """The order of records decides: arrays as the hooks leave them."""
    rows = empty(9)
    rows["ts"] = np.arange(9)
    rows["ct"] = [1, 2, 3, 1, 2, 2, 3, 1, 1]
    rows["kind"] = [
        Kind.INSERT, Kind.INSERT, Kind.INSERT, 0, Kind.INSERT_FAILED, 0, Kind.DESTROY,
        Kind.INSERT, Kind.DESTROY,
    ]  # fmt: skip
    kept = without_retracted(rows)
    assert kept["ts"].tolist() == [2, 4, 6, 7, 8]


@pytest.mark.parametrize("proto", ["udp", "tcp"])
def test_two_packets_of_one_tuple_meet_at_confirm(
    proto: str, pair: tuple[Node, Node], trace: Trace
) -> None:
    """The second is merged into the first's entry (UDP), or dropped (TCP)."""
    a, b = pair
    target, source = b.addresses["a"][0], a.addresses["b"][0]
    before = a.stats()
    a.run(f"iptables -A OUTPUT -p {proto} --dport 4444 -j NFQUEUE --queue-num 7".split())
    # an answer would end the first entry before the second packet comes
    b.run(f"iptables -A INPUT -p {proto} --dport 4444 -j DROP".split())
    with Queue(a, 7) as queue, a.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for port in range(20000, 20010):
            packet = (
                _tcp_packet(source, target, port, 4444, 2)
                if proto == "tcp"
                else _udp_packet(source, target, port, 4444)
            )
            for _ in range(2):
                raw.sendto(packet, (target, 0))
            queue.accept(queue.wait(2))
        events, after = trace.take(), a.stats()
    since = {name: after[name] - before[name] for name in after}
    inserts, failed = of(events, Kind.INSERT, a), of(events, Kind.INSERT_FAILED, a)
    assert len(inserts) == a.count() + len(of(events, Kind.DESTROY, a)) == 10
    assert sorted(inserts["sport"].tolist()) == list(range(20000, 20010))
    assert trace.total(a, Reason.NEW) == 10
    assert since["insert_failed"] == len(failed) == (10 if proto == "tcp" else 0)
    assert since["clashres"] == trace.total(a, Reason.CLASH_RESOLVED)
    assert since["clashres"] == (0 if proto == "tcp" else 10)
    assert trace.total(a, Reason.CLASH) == since["drop"] == len(failed)
    assert set(failed["reason"].tolist()) <= {int(Reason.CLASH)}
    assert sorted(failed["sport"].tolist()) == ([] if proto == "udp" else list(range(20000, 20010)))
    assert not len(of(events, Kind.DROP, a))


def test_contexts_that_share_a_place_keep_their_candidates_apart(
    pair: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged packets while others insert without pause, with two places for all of them."""
    a, b = pair
    target, source = b.addresses["a"][0], a.addresses["b"][0]
    monkeypatch.setattr(programs, "SLOT_BITS", 1)
    trace = Trace(a, b)
    try:
        before = a.stats()
        match = ["-p", "udp", "--dport", "4444", "-j"]
        a.run(["iptables", "-A", "OUTPUT", *match, "NFQUEUE", "--queue-num", "7"])
        b.run(["iptables", "-A", "INPUT", *match, "DROP"])
        senders = [
            threading.Thread(
                target=traffic.udp_flows, args=(a, (target, 9), 2500),
                kwargs={"first_port": 30000 + 3000 * i},
            )
            for i in range(4)
        ]  # fmt: skip
        for sender in senders:
            sender.start()
        with (
            Queue(a, 7) as queue,
            a.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw,
        ):
            for port in range(20000, 20040):
                for _ in range(2):
                    raw.sendto(_udp_packet(source, target, port, 4444), (target, 0))
                queue.accept(queue.wait(2))
        while any(sender.is_alive() for sender in senders):
            trace.take(0.01)
        trace.take()
        resolved = a.stats()["clashres"] - before["clashres"]
        inserts = of(trace.seen, Kind.INSERT, a)
        assert trace.lost == 0
        assert resolved == trace.total(a, Reason.CLASH_RESOLVED) == 40
        assert len(inserts) == trace.total(a, Reason.NEW)
        assert len(inserts) == a.count() + len(of(trace.seen, Kind.DESTROY, a)) == 10040
        owners = inserts["owner"][inserts["dport"] == 9] >> np.uint64(32)
        assert set(owners.tolist()) == {os.getpid()}
    finally:
        trace.capture.close()


# -- counts ---------------------------------------------------------------


def test_namespaces_that_share_a_place_are_counted_apart(lab: Lab) -> None:
    """Of those whose numbers tell the same place one is counted there, the other in a hash."""
    by_place: dict[int, list[Node]] = {}
    while all(len(sharing) < 2 for sharing in by_place.values()):
        node = lab.namespace(f"n{len(by_place)}", track=True)
        by_place.setdefault(node.inum % NEAR_PLACES, []).append(node)
    sharing = next(nodes for nodes in by_place.values() if len(nodes) == 2)
    trace = Trace(*sharing)
    try:
        sent = [(node, 300 + 100 * i) for i, node in enumerate(sharing)]
        senders = [
            threading.Thread(target=traffic.udp_flows, args=(node, ("127.0.0.1", 9), n))
            for node, n in sent
        ]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        trace.take()
        for node, n in sent:
            assert trace.total(node, Reason.NEW) == node.count() == n
            assert len(of(trace.seen, Kind.INSERT, node)) == n
            ctnetlink.flush(node.path)
        trace.take()
        for node, n in sent:
            assert trace.total(node, Reason.DELETED) == n
            assert node.count() == 0
    finally:
        trace.capture.close()


# -- filters --------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Filter(proto=17), 60),
        (Filter(dport=9), 40),
        (Filter(family=10), 30),
        (Filter(dst=parse_network("10.77.0.0/16"), proto=17), 30),
        (Filter(src=parse_network("fd77::/16")), 30),
        (Filter(sport=20003), 4),
        (Filter(kinds=frozenset({Kind.DESTROY})), 0),
        (Filter(dst_nat=True), 0),
    ],
)
def test_filters_in_the_kernel_agree_with_the_mask(
    wanted: Filter, expected: int, pair: tuple[Node, Node]
) -> None:
    a, b = pair
    # the compiler runs before the hooks of the unfiltered one fill its rings
    filtered, everything = Trace(a, wanted=wanted), Trace(a)
    try:
        for address in b.addresses["a"]:
            traffic.udp_flows(a, (address, 9), 20)
            traffic.udp_flows(a, (address, 10), 10)
        full, some = everything.take(), filtered.take()
        assert filtered.total(a, Reason.NEW) == 60  # counts know no filter
    finally:
        everything.capture.close()
        filtered.capture.close()
    assert flows(full[wanted.mask(full)]) == flows(some)
    assert len(some) == expected


# -- leaving nothing behind --------------------------------------------------------------


def _programs(pid: int) -> set[int]:
    """Ids of the BPF programs that a process holds."""
    found = set()
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        found |= {int(one) for one in re.findall(r"^prog_id:\s*(\d+)", info.read_text(), re.M)}
    return found


def _loaded(ids: set[int]) -> set[int]:
    """Those of these that are loaded."""
    told = subprocess.run(["bpftool", "-j", "prog"], capture_output=True, text=True, check=True)
    return ids & {program["id"] for program in json.loads(told.stdout)}


def test_kill_9_leaves_nothing(pair: tuple[Node, Node]) -> None:
    a, _ = pair
    code = (
        "import time\n"
        "from ctrace.capture.hooks.netfilter import NetfilterCapture\n"
        "from ctrace.filters import Filter\n"
        "from ctrace.host.netns import Namespace\n"
        "c = NetfilterCapture(Filter())\n"
        f"c.follow([Namespace({a.inum}, 'a', {a.path!r})])\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    with os.scandir(f"/proc/{child.pid}/fd") as descriptors:
        kinds = Counter(os.readlink(entry.path) for entry in descriptors)
    assert kinds["anon_inode:bpf_link"] >= 4
    ours = _programs(child.pid)
    assert _loaded(ours) == ours
    assert len(ours) >= 4
    child.kill()
    child.wait()
    child.stdout.close()
    deadline = time.monotonic() + 60
    while _loaded(ours) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _loaded(ours)


def test_a_deleted_namespace_is_let_go(lab: Lab) -> None:
    """Links keep a namespace alive; its veth peer disappears once we let go."""
    a, b = lab.namespace("a", track=True), lab.namespace("b", track=True)
    lab.link(a, b)
    trace = Trace(a, b)
    try:
        b.close()
        lab.nodes.remove(b)
        time.sleep(0.3)
        assert "to-b" in a.run(["ip", "link"])
        trace.capture.follow(spaces(a))
        deadline = time.monotonic() + 60
        while "to-b" in a.run(["ip", "link"]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "to-b" not in a.run(["ip", "link"])
    finally:
        trace.capture.close()


def test_two_tracers_at_once_see_the_same(pair: tuple[Node, Node]) -> None:
    a, b = pair
    first, second = Trace(a, b), Trace(a, b)
    try:
        traffic.udp_flows(a, (b.addresses["a"][0], 9), 50)
        one, two = first.take(), second.take()
        assert both_tuples(one) == both_tuples(two)
        assert len(one) == len(two) == 100
    finally:
        first.capture.close()
        second.capture.close()
