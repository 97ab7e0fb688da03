"""The netfilter family at a full table, and where packets of one tuple or one place meet."""

from __future__ import annotations

import os
import socket
import threading
from collections import Counter

import numpy as np
import pytest
from kit import traffic
from kit.nfqueue import Queue
from kit.running.tracing import Trace, flows, of, tcp_packet, udp_packet

from ctrace.capture.hooks.netfilter import without_retracted
from ctrace.host import ctnetlink
from ctrace.kernel import programs
from ctrace.kernel.objects import NEAR_PLACES
from ctrace.lab import Lab, Node
from ctrace.record import Direction, Kind, Reason, address_text, empty

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


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
    drops = of(events, a, Kind.DROP)
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
    assert not len(of(events, a, Kind.INSERT))

    # packets that arrive are refused as well, and have no owner
    counted = a.stats()["drop"]
    traffic.udp_flows(b, (a.addresses["b"][0], 53), 80)
    arrived = of(trace.take(), a, Kind.DROP)
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
    ended = of(events, a, Kind.DESTROY)
    assert evicted > 0
    assert int((ended["reason"] == int(Reason.EVICTED)).sum()) == evicted
    assert trace.total(a, Reason.EVICTED) == evicted
    assert after["drop"] - before["drop"] == len(of(events, a, Kind.DROP)) == len(sent.refused)
    assert len(of(events, a, Kind.INSERT)) == len(sent.flows)
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
                tcp_packet(source, target, port, 4444, 2)
                if proto == "tcp"
                else udp_packet(source, target, port, 4444)
            )
            for _ in range(2):
                raw.sendto(packet, (target, 0))
            queue.accept(queue.wait(2))
        events, after = trace.take(), a.stats()
    since = {name: after[name] - before[name] for name in after}
    inserts, failed = of(events, a, Kind.INSERT), of(events, a, Kind.INSERT_FAILED)
    assert len(inserts) == a.count() + len(of(events, a, Kind.DESTROY)) == 10
    assert sorted(inserts["sport"].tolist()) == list(range(20000, 20010))
    assert trace.total(a, Reason.NEW) == 10
    assert since["insert_failed"] == len(failed) == (10 if proto == "tcp" else 0)
    assert since["clashres"] == trace.total(a, Reason.CLASH_RESOLVED)
    assert since["clashres"] == (0 if proto == "tcp" else 10)
    assert trace.total(a, Reason.CLASH) == since["drop"] == len(failed)
    assert set(failed["reason"].tolist()) <= {int(Reason.CLASH)}
    assert sorted(failed["sport"].tolist()) == ([] if proto == "udp" else list(range(20000, 20010)))
    assert not len(of(events, a, Kind.DROP))


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
                    raw.sendto(udp_packet(source, target, port, 4444), (target, 0))
                queue.accept(queue.wait(2))
        while any(sender.is_alive() for sender in senders):
            trace.take(0.01)
        trace.take()
        resolved = a.stats()["clashres"] - before["clashres"]
        inserts = of(trace.seen, a, Kind.INSERT)
        assert trace.lost == 0
        assert resolved == trace.total(a, Reason.CLASH_RESOLVED) == 40
        assert len(inserts) == trace.total(a, Reason.NEW)
        assert len(inserts) == a.count() + len(of(trace.seen, a, Kind.DESTROY)) == 10040
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
            assert len(of(trace.seen, node, Kind.INSERT)) == n
            ctnetlink.flush(node.path)
        trace.take()
        for node, n in sent:
            assert trace.total(node, Reason.DELETED) == n
            assert node.count() == 0
    finally:
        trace.capture.close()
