"""The netfilter family against the kernel's own accounting: entries that come and go."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter

import numpy as np
import pytest
from kit import traffic
from kit.running.tracing import Trace, both_tuples, flows, of, spaces, tcp_packet

from ctrace.filters import Filter, parse_network
from ctrace.host import ctnetlink
from ctrace.lab import Lab, Node
from ctrace.record import Direction, Kind, Reason, Status, address_text, words

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


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
        inserts = of(events, node, Kind.INSERT)
        assert flows(inserts) == Counter(sent)
        assert both_tuples(inserts) == both_tuples(ctnetlink.dump(node.path))
        assert node.count() == len(sent) == trace.total(node, Reason.NEW)
        assert set(inserts["direction"].tolist()) == {int(way)}
        assert (inserts["status"] & int(Status.CONFIRMED)).all()
    assert trace.lost == 0
    assert (np.diff(events["ts"].astype(np.int64)) >= 0).all()

    ours = of(events, a, Kind.INSERT)
    pids = set((ours["owner"] >> np.uint64(32)).tolist())
    assert pids == {os.getpid()}
    assert not of(events, b, Kind.INSERT)["owner"].any()
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
    born = {int(e["ct"]): bytes(words(e.reshape(1))[0, 2:6]) for e in of(before, a, Kind.INSERT)}
    assert len(born) == 70

    # one by conntrack -D, the expired ones found by a table walk, the rest by -F
    time.sleep(1.6)
    first = of(before, a, Kind.INSERT)[0]
    a.run(["conntrack", "-D", "-p", "tcp", "--sport", str(first["sport"])])
    a.run(["conntrack", "-L"])
    trace.take()
    deleted = of(trace.seen, a, Kind.DESTROY)  # some expire while a busy machine looks
    reasons = Counter((int(e["proto"]), int(e["reason"])) for e in deleted)
    assert reasons == {(6, Reason.DELETED): 1, (17, Reason.EXPIRED): 30}
    udp = deleted[deleted["proto"] == 17]
    assert (udp["timeout_ms"] == 1000).all()
    # any walk over the shared hash may have found them before ours
    assert (udp["idle_ms"] == udp["overdue_ms"] + 1000).all()

    a.run(["conntrack", "-F"])
    flushed = of(trace.take(), a, Kind.DESTROY)
    assert len(flushed) == 39
    assert set(flushed["reason"].tolist()) == {int(Reason.DELETED)}
    assert (flushed["state"] == 7).all()  # TIME_WAIT
    assert (flushed["timeout_ms"] == 120_000).all()
    assert (np.abs(flushed["idle_ms"] + flushed["overdue_ms"] * -1 - 120_000) <= 8).all()
    ended = of(trace.seen, a, Kind.DESTROY)
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
        assert len(of(events, node, Kind.INSERT)) == 20
        ended = of(events, node, Kind.DESTROY)
        assert len(ended) == 20 - node.count()


def test_the_end_of_a_namespace_ends_its_entries(lab: Lab) -> None:
    a, b = lab.namespace("a", track=True), lab.namespace("b", track=True)
    lab.link(a, b)
    trace = Trace(a, b)
    try:
        traffic.udp_flows(a, (b.addresses["a"][0], 9), 25)
        assert len(of(trace.take(), a, Kind.INSERT)) == 25
        a.close()
        lab.nodes.remove(a)
        trace.capture.follow(spaces(b))
        deadline = time.monotonic() + 60
        while len(of(trace.seen, a, Kind.DESTROY)) < 25 and time.monotonic() < deadline:
            trace.take()
        assert len(of(trace.seen, a, Kind.DESTROY)) == 25
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
        inserts, ends = len(of(events, node, Kind.INSERT)), len(of(events, node, Kind.DESTROY))
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
    translated = of(events, router, Kind.INSERT)
    assert flows(translated) == Counter(sent)
    assert both_tuples(translated) == both_tuples(ctnetlink.dump(router.path))
    assert set(translated["direction"].tolist()) == {int(Direction.FORWARD)}
    bits = int(Status.SRC_NAT | Status.DST_NAT)
    assert ((translated["status"] & bits) == bits).all()
    assert {address_text(e["reply_src"]) for e in translated} == {outside}
    assert set(translated["reply_sport"].tolist()) == {7000}
    assert {address_text(e["reply_dst"]) for e in translated} == {router.addresses["server"][0]}
    assert not (of(events, client, Kind.INSERT)["status"] & bits).any()
    assert len(of(events, server, Kind.INSERT)) == 60


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
    assert not len(of(inside, b, Kind.INSERT))
    assert not len(of(inside, b, Kind.DROP))

    # TCP packets without a connection and with an impossible set of flags
    b.sysctl("net.netfilter.nf_conntrack_tcp_loose", 0)
    with a.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for port in range(50):
            raw.sendto(tcp_packet(a.addresses["b"][0], v4, 20000 + port, 5555, 0x3F), (v4, 0))
    events = trace.take()
    assert b.stats()["invalid"] >= 50
    assert not len(of(events, b, Kind.INSERT))
    assert not len(of(events, b, Kind.DROP))
    assert trace.total(b, Reason.TABLE_FULL) == 0


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
