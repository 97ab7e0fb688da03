"""What is rare or looks alike, for every hook family: other protocols, packets that make
no entry, clashes. Each is counted under its own reason.

As test_families.py: nothing here knows which kernel it runs on.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kit import traffic
from kit.machines import Net, Seen, Watch, first_packet, flows, listed, note
from kit.nfqueue import Queue

from ctrace.capture.family import Capture
from ctrace.errors import CtraceError
from ctrace.host import process
from ctrace.lab import Node
from ctrace.record import Kind, Reason, Status

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
KERNEL = os.environ.get("CTRACE_VM", "")
CLASHES = range(27000, 27010)


@contextlib.contextmanager
def rules(node: Node, text: str) -> Iterator[None]:
    """A table ip t of the node for as long as the block runs."""
    node.run(["nft", "-f", "-"], stdin=text)
    try:
        yield
    finally:
        node.run(["nft", "delete", "table", "ip", "t"])


@contextlib.contextmanager
def rule(node: Node, *words: str) -> Iterator[None]:
    """A rule of iptables for as long as the block runs."""
    node.run(["iptables", "-A", *words])
    try:
        yield
    finally:
        node.run(["iptables", "-D", *words])


# -- other protocols ------------------------------------------------------------------------


@pytest.mark.parametrize("proto", ["icmp", "sctp"])
def test_flows_without_tcp_or_udp(
    proto: str, family: str, net: Net, capture: Capture, seen: Seen
) -> None:
    client, server = net.client, net.server
    for node in (client, server):
        node.sysctl("net.netfilter.nf_conntrack_sctp_timeout_cookie_wait", 100)
        node.run(["conntrack", "-F"])
    sent: list[traffic.Flow] = []
    with Watch(capture, net.nodes) as watch:
        for address in server.addresses["client"]:
            if proto == "icmp":
                sent += traffic.pings(client, address, 40).flows
            else:
                sent += traffic.sctp_flows(client, server, address, 40).flows
    watch.reconcile()
    assert len(sent) == 80
    for node in (client, server):
        inserts = watch.of(node, Kind.INSERT)
        assert flows(inserts) == listed(node) == Counter(sent)
        # the reply tuple: addresses and ports change places, an echo becomes its reply
        assert (inserts["reply_src"] == inserts["dst"]).all()
        assert (inserts["reply_dst"] == inserts["src"]).all()
        if proto == "sctp":
            assert (inserts["reply_sport"] == inserts["dport"]).all()
            assert (inserts["reply_dport"] == inserts["sport"]).all()
        else:
            answer = np.where(inserts["family"] == 2, 0 << 8, 129 << 8)
            assert (inserts["reply_dport"] == answer).all()
            assert (inserts["reply_sport"] == inserts["sport"]).all()
    with Watch(capture, net.nodes) as watch:
        for node in (client, server):
            node.run(["conntrack", "-F"])
    watch.reconcile()
    for node in (client, server):
        gone = watch.of(node, Kind.DESTROY)
        assert flows(gone) == Counter(sent)
        assert (gone["status"] & int(Status.SEEN_REPLY)).all()
    note(seen, family, proto)


# -- whose ----------------------------------------------------------------------------------

_INSIDE = """
import os, socket, sys
with open(sys.argv[1] + "/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.bind(("", 32000))
    s.sendto(b"x", (sys.argv[2], 9))
"""


def test_a_container_that_is_gone_is_still_known(
    family: str, net: Net, capture: Capture, seen: Seen
) -> None:
    """Its cgroup went with its last process, before anybody looked."""
    if family == "netlink":
        assert not capture.info.owners
        return
    name = f"docker-{'3f' * 32}.scope"
    parent = Path(process.cgroup_root()) / f"ctrace-{os.getpid()}"
    group = parent / name
    group.mkdir(parents=True)
    try:
        with Watch(capture, net.nodes) as watch:
            target = net.server.addresses["client"][0]
            net.client.run([sys.executable, "-c", _INSIDE, str(group), target])
            deadline = time.monotonic() + 60
            while group.exists() and time.monotonic() < deadline:
                with contextlib.suppress(OSError):  # its process is not reaped yet
                    group.rmdir()
                    break
                time.sleep(0.01)
    finally:
        parent.rmdir()
    (sent,) = [e for e in watch.of(net.client, Kind.INSERT) if int(e["sport"]) == 32000]
    number = int(sent["cgroup"])
    assert process.cgroup_label(number) == ""  # too late to ask the kernel
    path = capture.cgroup_names([number])[number]
    assert path == f"/{parent.name}/{name}"
    key = int(sent["owner"])
    comm, _ = capture.owner_comms([key])[key]
    found = process.owner(key, comm, number, path)
    assert (found.comm, found.unit) == (comm, "docker:3f3f3f3f3f3f")
    note(seen, family, "container", "also when gone")


# -- what is no event -----------------------------------------------------------------------


def test_invalid_packets_are_no_events(family: str, net: Net, capture: Capture) -> None:
    """TCP in the middle of nothing, and with flags that exclude each other."""
    client, server = net.client, net.server
    source, target = client.addresses["server"][0], server.addresses["client"][0]
    for node in (client, server):
        node.sysctl("net.netfilter.nf_conntrack_tcp_loose", 0)
    with (
        rules(server, "table ip t { chain c { type filter hook input priority 0;"
              " ct state invalid drop; }; }"),
        Watch(capture, net.nodes) as watch,
        client.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw,
    ):  # fmt: skip
        for port in range(29000, 29020):
            for flags in (0x10, 0x3F):  # ACK; all at once
                packet = first_packet("tcp", source, target, port, 5555, flags=flags)
                raw.sendto(packet, (target, 0))
    for node in (client, server):
        node.sysctl("net.netfilter.nf_conntrack_tcp_loose", 1)
    watch.reconcile()
    for node in (client, server):
        assert watch.stats[node.inum]["invalid"] >= 40
        for kind in (Kind.INSERT, Kind.DROP, Kind.INSERT_FAILED):
            assert not len(watch.of(node, kind))
        assert not any(watch.counts[node.inum][int(r)] for r in (Reason.NEW, Reason.TABLE_FULL))


@pytest.fixture
def empty(net: Net) -> None:
    """Tables without what earlier tests left: a clash is about who came first."""
    for node in net.nodes:
        node.run(["conntrack", "-F"])


# -- clashes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "proto"), [("filter OUTPUT", "udp"), ("mangle POSTROUTING", "tcp")]
)
@pytest.mark.usefixtures("empty")
def test_two_packets_of_one_tuple(
    where: str, proto: str, family: str, net: Net, capture: Capture, seen: Seen
) -> None:
    """The second is merged into the first's entry (UDP) or dropped (TCP).

    Before 6.8 nothing is left to clash: the queue itself gives it the first's entry.
    """
    client, server = net.client, net.server
    source, target = client.addresses["server"][0], server.addresses["client"][0]
    to = ["-p", proto, "--dport", "4444", "-j"]
    table, chain = where.split()
    with (
        rule(client, chain, "-t", table, *to, "NFQUEUE", "--queue-num", "7"),
        # an answer would end the first entry before the second packet comes
        rule(server, "INPUT", *to, "DROP"),
        Watch(capture, net.nodes) as watch,
        Queue(client, 7) as queue,
        client.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw,
    ):
        for port in CLASHES:
            for _ in range(2):
                raw.sendto(first_packet(proto, source, target, port, 4444), (target, 0))
            queue.accept(queue.wait(2))
    watch.reconcile()
    inserts = watch.of(client, Kind.INSERT)
    assert sorted(inserts["sport"].tolist()) == list(CLASHES)
    counts, stats = watch.counts[client.inum], watch.stats[client.inum]
    failed = stats["insert_failed"]
    assert failed == counts[Reason.CLASH] == (len(CLASHES) if failed else 0)
    assert stats["clashres"] == counts[Reason.CLASH_RESOLVED]
    if KERNEL not in ("5.10", "6.1"):
        assert failed + stats["clashres"] == len(CLASHES)
        assert bool(failed) == (proto == "tcp")
    if failed and capture.info.drop_tuples:
        losers = watch.of(client, Kind.INSERT_FAILED, Reason.CLASH)
        assert sorted(losers["sport"].tolist()) == list(CLASHES)
    assert not len(watch.of(client, Kind.DROP))
    if failed:
        note(seen, family, "clashes", "tuple" if capture.info.drop_tuples else "counted")
    if stats["clashres"]:
        note(seen, family, "merged", "counted")


@pytest.mark.parametrize("proto", ["udp", "tcp"])
@pytest.mark.usefixtures("empty")
def test_two_flows_that_masquerade_as_one(
    proto: str, family: str, net: Net, capture: Capture, seen: Seen
) -> None:
    """Both get one translated tuple while neither is in the table: the second is dropped."""
    client, server = net.client, net.server
    source, target = client.addresses["server"][0], server.addresses["client"][0]
    queued = (
        f"chain c {{ type filter hook postrouting priority 300; {proto} dport 4444 queue num 7; }}"
    )
    if not KERNEL:
        try:
            with rules(client, f"table ip t {{ {queued}; }}"):
                pass
        except CtraceError:
            pytest.skip("this kernel has no nft_queue to hold packets after translation")
    with (
        rules(client, f"table ip t {{ {queued};"
              " chain post { type nat hook postrouting priority 100;"
              f" {proto} dport 4444 snat to {source}; }}; }}"),
        rule(server, "INPUT", "-p", proto, "--dport", "4444", "-j", "DROP"),
        Watch(capture, net.nodes) as watch,
        Queue(client, 7) as queue,
        client.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw,
    ):  # fmt: skip
        for port in CLASHES:
            for address in (source, "10.99.0.1"):
                raw.sendto(first_packet(proto, address, target, port, 4444), (target, 0))
            queue.accept(queue.wait(2))
    watch.reconcile()
    inserts = watch.of(client, Kind.INSERT)
    number = socket.IPPROTO_UDP if proto == "udp" else socket.IPPROTO_TCP
    assert flows(inserts) == {(number, source, port, target, 4444): 1 for port in CLASHES}
    assert watch.stats[client.inum]["insert_failed"] == len(CLASHES)
    assert watch.counts[client.inum][Reason.CLASH] == len(CLASHES)
    assert watch.counts[client.inum][Reason.TABLE_FULL] == 0
    assert not len(watch.of(client, Kind.DROP))
    if capture.info.drop_tuples:
        losers = watch.of(client, Kind.INSERT_FAILED, Reason.CLASH)
        assert flows(losers) == {(number, "10.99.0.1", port, target, 4444): 1 for port in CLASHES}
    note(seen, family, "clashes", "tuple" if capture.info.drop_tuples else "counted")


@pytest.mark.usefixtures("empty")
def test_a_clash_that_enters_beside_the_winner(
    family: str, net: Net, capture: Capture, seen: Seen
) -> None:
    """One tuple, translated to two destinations: both entries stay, one of them for a second."""
    client, server = net.client, net.server
    source, target = client.addresses["server"][0], server.addresses["client"][0]

    def dnat(port: int) -> str:
        return f"flush chain ip t n; add rule ip t n udp dport 4445 dnat to {target}:{port}"

    to = ["-p", "udp", "--dport", "5000:5001", "-j"]
    with Watch(capture, net.nodes) as watch:
        with (
            # it stays: a hook that goes takes every queued packet with it
            rules(client, "table ip t { chain n { type nat hook output priority -100; }; }"),
            rule(client, "OUTPUT", *to, "NFQUEUE", "--queue-num", "7"),
            rule(server, "INPUT", *to, "DROP"),
            Queue(client, 7) as queue,
            client.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw,
        ):
            held: list[int] = []
            for port in (5000, 5001):
                client.run(["nft", dnat(port)])
                for sport in CLASHES:
                    raw.sendto(first_packet("udp", source, target, sport, 4445), (target, 0))
                held += queue.wait(len(CLASHES))
            queue.accept(held)
        watch.settle()
        beside = watch.stats[client.inum]["clashres"]
        # those beside have a second to live, which may be over
        assert len(CLASHES) <= watch.growth[client.inum] <= len(CLASHES) + beside
        time.sleep(1.5)
        client.run(["conntrack", "-L"])  # collects what has expired
        client.run(["conntrack", "-F"])
    if KERNEL not in ("5.10", "6.1"):  # there the queue lets the second join the first
        assert beside == len(CLASHES)
    watch.reconcile()
    inserts, gone = (watch.of(client, kind) for kind in (Kind.INSERT, Kind.DESTROY))
    wanted = {(socket.IPPROTO_UDP, source, port, target, 4445): 1 for port in CLASHES}
    assert flows(inserts) == flows(gone)
    assert flows(inserts) == Counter(wanted) + (Counter(wanted) if beside else Counter())
    double = gone["status"] & int(Status.NAT_CLASH) != 0
    assert int(double.sum()) == beside
    if beside:
        named = int((inserts["reason"] == int(Reason.NAT_CLASH)).sum())
        words = ("beside a clashing", "NAT clashes")
        told = any(word in sentence for sentence in capture.info.blind for word in words)
        assert named == (0 if family == "netfilter" else beside)
        assert told == (family in ("netfilter", "netlink"))
        how = {"netfilter": "as an insert", "netlink": "only when destroyed"}.get(family, "exact")
        note(seen, family, "beside", how)


_RACER = """
import mmap, os, socket, sys
target, first, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
shared = mmap.mmap(-1, 4096)
child = os.fork()
me = 1 if child == 0 else 0
sockets = []
for turn in range(rounds):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    s.bind((sys.argv[4], first + turn))
    s.connect((target, 4444))
    shared[me] = (turn + 1) & 255
    while shared[1 - me] != (turn + 1) & 255 and shared[1 - me] != (turn + 2) & 255:
        pass
    s.send(b"x")
    sockets.append(s)
if child:
    os.waitpid(child, 0)
"""


@pytest.mark.usefixtures("empty")
def test_two_senders_race_for_one_tuple(
    family: str, net: Net, capture: Capture, seen: Seen
) -> None:
    """Whoever wins, how often ever they meet: the books balance, and no flow counts twice."""
    client, server = net.client, net.server
    source, target = client.addresses["server"][0], server.addresses["client"][0]
    silent = ["INPUT", "-p", "udp", "--dport", "4444", "-j", "DROP"]
    server.run(["iptables", "-A", *silent])
    rounds = 200
    try:
        with Watch(capture, net.nodes) as watch:
            argv = [sys.executable, "-c", _RACER, target, "40000", str(rounds), source]
            client.run(argv)
    finally:
        server.run(["iptables", "-D", *silent])
    watch.reconcile()
    inserts = watch.of(client, Kind.INSERT)
    wanted = {(socket.IPPROTO_UDP, source, 40000 + i, target, 4444): 1 for i in range(rounds)}
    assert flows(inserts) == wanted
    resolved = watch.counts[client.inum][Reason.CLASH_RESOLVED]
    assert resolved == watch.stats[client.inum]["clashres"]
    if resolved:
        note(seen, family, "merged", "counted")
