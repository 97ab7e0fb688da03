"""Every hook family against real traffic and the kernel's own account of it.

Nothing here knows which kernel it runs on: scripts/test runs it natively and, through
scripts/vm, on stock Debian kernels. What changes the whole machine (a small
nf_conntrack_max) only runs in such an emulated one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from kit import traffic
from kit.machines import (
    ASSURED,
    EMULATED,
    OTHERS,
    UDP_TIMEOUT,
    Net,
    Seen,
    Watch,
    flows,
    followed,
    listed,
    note,
    rungs,
)

from ctrace.capture.family import Capture
from ctrace.capture.hooks.fentry import FentryCapture
from ctrace.capture.hooks.kprobe import KprobeCapture
from ctrace.capture.live import FAMILIES
from ctrace.errors import CtraceError
from ctrace.filters import Filter
from ctrace.host import ctnetlink, netns
from ctrace.kernel import bpf
from ctrace.kernel.chains import Walker
from ctrace.record import Direction, Events, Kind, Reason, Status, address_text

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
N = 20 if EMULATED else 60
KERNEL = os.environ.get("CTRACE_VM", "")
"""Set by scripts/vm: this machine is ours alone."""
alone = pytest.mark.skipif(not KERNEL, reason="changes the whole machine: in scripts/vm only")

FUNCTIONS = ("fentry", "kprobe")


@pytest.mark.skipif(not KERNEL, reason="what a stock Debian kernel offers")
def test_the_ladder_finds_what_these_kernels_have() -> None:
    expected = {
        "5.10": {"kprobe", "netlink"},
        "6.1": {"fentry", "kprobe", "netlink"},
        "6.12": {"fentry", "kprobe", "netfilter", "netlink"},
        "7.2": {"fentry", "kprobe", "netfilter", "netlink"},
        "arm64-6.1": {"kprobe", "netlink"},
        "arm64-6.12": {"fentry", "kprobe", "netfilter", "netlink"},
        "rt-6.12": {"fentry", "kprobe", "netfilter", "netlink"},
    }
    statuses = rungs()
    assert {one.family for one in statuses if one.holds} == expected[KERNEL]
    assert all(one.why for one in statuses)


# -- what is there ----------------------------------------------------------------------------


def test_a_walk_over_all_meets_every_entry_once(net: Net, entries: Events) -> None:
    buckets = int(Path("/proc/sys/net/netfilter/nf_conntrack_buckets").read_text())
    for _ in range(20):  # another namespace's entry may come or go while its bucket is walked
        with Walker() as walker:
            (base, *_) = walker.bases(0, entries["ct"][:8].tolist())
            expected = assured(net)
            walked = walker.walk(base, 0, 1, buckets)
            met = walker.met()
        assert walked.next >= buckets
        found = {inum: met.get(inum, (0, 0)) for inum in expected}
        if found == expected and not walked.disturbed:
            break
        time.sleep(0.2)
    assert found == expected
    assert found[net.client.inum] == (ASSURED + OTHERS, ASSURED)


def assured(net: Net) -> dict[int, tuple[int, int]]:
    """Entries of each namespace and how many are ASSURED, by a dump."""
    found = {}
    for node in net.nodes:
        rows = ctnetlink.dump(node.path)
        known = np.count_nonzero(rows["status"] & np.uint32(int(Status.ASSURED)))
        found[node.inum] = len(rows), int(known)
    return found


# -- inserts --------------------------------------------------------------------------------


def test_every_flow_is_one_insert(family: str, net: Net, capture: Capture, seen: Seen) -> None:
    client, server = net.client, net.server
    sent: list[traffic.Flow] = []
    with (
        Watch(capture, net.nodes) as watch,
        traffic.tcp_server(server, 8063),
        traffic.udp_server(server, 53),
    ):
        for address in server.addresses["client"]:
            sent += traffic.tcp_connections(client, (address, 8063), N).flows
            sent += traffic.udp_flows(client, (address, 53), N).flows
    assert len(sent) == 4 * N
    watch.reconcile()
    for node, direction in ((client, Direction.OUT), (server, Direction.IN)):
        inserts = watch.of(node, Kind.INSERT)
        assert flows(inserts) == Counter(sent)
        assert listed(node) == Counter(sent)
        if family != "netlink":
            assert set(inserts["direction"].tolist()) == {int(direction)}
        assert (inserts["ts"][1:] >= inserts["ts"][:-1]).all()
    note(seen, family, "inserts")


def test_translated_connections_show_both_tuples(
    family: str, net: Net, capture: Capture, seen: Seen
) -> None:
    with Watch(capture, net.nodes) as watch, traffic.tcp_server(net.server, 7000):
        sent = traffic.tcp_connections(net.client, (net.front, 80), N).flows
    assert len(sent) == N
    watch.reconcile()
    inserts = watch.of(net.router, Kind.INSERT)
    assert flows(inserts) == Counter(sent)
    bits = int(Status.SRC_NAT | Status.DST_NAT)
    assert ((inserts["status"] & bits) == bits).all()
    assert {address_text(e["reply_src"]) for e in inserts} == {net.back}
    assert set(inserts["reply_sport"].tolist()) == {7000}
    assert {address_text(e["reply_dst"]) for e in inserts} == {net.router.addresses["server"][0]}
    if family != "netlink":
        assert set(inserts["direction"].tolist()) == {int(Direction.FORWARD)}
    assert not (watch.of(net.client, Kind.INSERT)["status"] & bits).any()
    note(seen, family, "nat")


_SENDER = """
import json, os, socket, sys
comm = open("/proc/self/comm").read().strip()
for port in range(31000, 31020):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind(("", port))
    s.sendto(b"x", (sys.argv[1], 9))
print(json.dumps([os.getpid(), comm]))
"""


def test_owners_are_the_sending_process_and_never_the_interrupted_one(
    family: str, net: Net, capture: Capture, seen: Seen
) -> None:
    if family == "netlink":
        assert not capture.info.owners
        note(seen, family, "owners", "no")
        return
    with Watch(capture, net.nodes) as watch:
        out = net.client.run([sys.executable, "-c", _SENDER, net.server.addresses["client"][0]])
    pid, comm = json.loads(out)
    watch.reconcile()
    sent = watch.of(net.client, Kind.INSERT)
    assert len(sent) == 20
    assert set((sent["owner"] >> np.uint64(32)).tolist()) == {pid}
    owners = capture.owner_comms(set(sent["owner"].tolist()))
    assert {name for name, _ in owners.values()} == {comm}
    received = watch.of(net.server, Kind.INSERT)
    assert len(received) == 20
    assert not received["owner"].any()
    note(seen, family, "owners", "process")


def test_an_insert_by_hand(family: str, net: Net, capture: Capture, seen: Seen) -> None:
    if family == "netfilter":
        assert any("conntrack -I" in sentence for sentence in capture.info.blind)
        note(seen, family, "conntrack -I", "only when destroyed")
        return
    with Watch(capture, net.nodes) as watch:
        net.client.run(
            [
                "conntrack",
                "-I",
                "-p",
                "udp",
                "-s",
                "192.0.2.1",
                "-d",
                "192.0.2.2",
                "--sport",
                "7",
                "--dport",
                "9",
                "-t",
                "60",
            ]
        )
    watch.reconcile()
    inserts = watch.of(net.client, Kind.INSERT)
    assert flows(inserts) == {(17, "192.0.2.1", 7, "192.0.2.2", 9): 1}
    if family in FUNCTIONS:
        assert set(inserts["reason"].tolist()) == {int(Reason.USER)}
        assert [comm for comm, _ in capture.owner_comms(inserts["owner"].tolist()).values()] == [
            "conntrack"
        ]
    note(seen, family, "conntrack -I")


# -- ends -----------------------------------------------------------------------------------


def test_deletions(family: str, net: Net, capture: Capture, seen: Seen) -> None:
    client = net.client
    target = net.server.addresses["client"][0]
    for node in net.nodes:
        node.run(["conntrack", "-F"])
    with Watch(capture, net.nodes) as watch:
        sent = traffic.udp_flows(client, (target, 9), 30, first_port=21000).flows
        client.run(["conntrack", "-D", "-p", "udp", "--sport", "21003"])
        watch.settle()
        one = watch.of(client, Kind.DESTROY)
        assert flows(one) == {sent[3]: 1}
        client.run(["conntrack", "-F"])
    watch.reconcile()
    gone = watch.of(client, Kind.DESTROY)
    assert flows(gone) == Counter(sent)
    assert set(gone["reason"].tolist()) == {int(Reason.DELETED)}
    if family != "netlink":
        inserted = watch.of(client, Kind.INSERT)
        assert Counter(gone["ct"].tolist()).keys() == set(inserted["ct"].tolist())
        # the state they died in still had most of its timeout to run
        assert (gone["timeout_ms"] == UDP_TIMEOUT * 1000).all()
        assert (gone["overdue_ms"] < 0).all()
    note(seen, family, "deletions")


def test_expiry_found_by_a_listing(family: str, net: Net, capture: Capture, seen: Seen) -> None:
    client = net.client
    client.run(["conntrack", "-F"])
    kept = client.sysctl("net.netfilter.nf_conntrack_udp_timeout")
    client.sysctl("net.netfilter.nf_conntrack_udp_timeout", 1)
    try:
        with Watch(capture, net.nodes) as watch:
            target = net.server.addresses["client"][0]
            sent = traffic.udp_flows(client, (target, 9), 30, first_port=22000).flows
            time.sleep(1.5)
            client.run(["conntrack", "-L"])  # evicts what has expired
    finally:
        client.sysctl("net.netfilter.nf_conntrack_udp_timeout", kept)
    watch.reconcile()
    gone = watch.of(client, Kind.DESTROY)
    assert flows(gone) == Counter(sent)
    if family != "netlink":
        assert set(gone["reason"].tolist()) == {int(Reason.EXPIRED)}
        assert (gone["timeout_ms"] == 1000).all()
        assert (gone["overdue_ms"] >= 0).all()
        assert (gone["idle_ms"] >= 1000).all()
    note(seen, family, "expiry")


def test_the_end_of_a_namespace_ends_its_entries(family: str, net: Net, capture: Capture) -> None:
    if family == "netlink":
        pytest.skip("a namespace that ends has no listener any more")
    gone = net.lab.namespace("gone", track=True)
    capture.follow(followed(*net.nodes, gone))
    with gone.enter():
        for port in range(23000, 23020):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.bind(("127.0.0.1", port))
                client.sendto(b"x", ("127.0.0.1", 9))
    watch = Watch(capture, ())
    before = watch.drain()
    mine = before[before["netns"] == gone.inum]
    inserted = set(mine["ct"][mine["kind"] == Kind.INSERT].tolist())
    assert len(inserted) == 20
    net.lab.nodes.remove(gone)
    gone.close()
    capture.follow(followed(*net.nodes))
    ended: set[int] = set()
    deadline = time.monotonic() + 60
    while ended != inserted and time.monotonic() < deadline:
        events, _ = capture.poll()
        mine = events[(events["netns"] == gone.inum) & (events["kind"] == Kind.DESTROY)]
        ended |= set(mine["ct"].tolist())
        time.sleep(0.05)
    assert ended == inserted


# -- what is no event -----------------------------------------------------------------------

# Each for a port of its own.
RULES = """
table inet t {
 chain before { type filter hook output priority -300; udp dport 4444 drop; }
 chain after { type filter hook output priority 0; udp dport 4445 drop; udp dport 4446 reject; }
}
"""
LEGACY = {"filter": 4447, "raw": 4448}


def test_packets_that_rules_drop_are_no_events(family: str, net: Net, capture: Capture) -> None:
    """Before conntrack and after it, by nft and by iptables, with an answer and without."""
    client = net.client
    client.run(["nft", "-f", "-"], stdin=RULES)
    for table, port in LEGACY.items():
        client.run(["iptables", "-t", table, "-A", "OUTPUT", *_dropped(port)])
    try:
        with Watch(capture, net.nodes) as watch:
            target = net.server.addresses["client"][0]
            for n, port in enumerate(range(4444, 4449)):
                traffic.udp_flows(client, (target, port), 40, first_port=24000 + 40 * n)
    finally:
        client.run(["nft", "delete", "table", "inet", "t"])
        for table, port in LEGACY.items():
            client.run(["iptables", "-t", table, "-D", "OUTPUT", *_dropped(port)])
    watch.reconcile()
    for node in net.nodes:
        assert not len(watch.of(node, Kind.INSERT))
        assert not len(watch.of(node, Kind.DROP))
        assert not len(watch.of(node, Kind.INSERT_FAILED))
        assert not any(watch.counts[node.inum][int(r)] for r in (Reason.NEW, Reason.TABLE_FULL))


def _dropped(port: int) -> list[str]:
    return ["-p", "udp", "--dport", str(port), "-j", "DROP"]


def test_rejected_connections_are_no_events(family: str, net: Net, capture: Capture) -> None:
    server = net.server
    server.run(
        ["nft", "-f", "-"],
        stdin="table inet t { chain c { type filter hook input priority 0; "
        "tcp dport 4444 reject with tcp reset; }; }",
    )
    try:
        with Watch(capture, net.nodes) as watch:
            for _ in range(20):
                with net.client.enter(), pytest.raises(ConnectionRefusedError):
                    socket.create_connection((server.addresses["client"][0], 4444), timeout=60)
    finally:
        server.run(["nft", "delete", "table", "inet", "t"])
    watch.reconcile()
    assert not len(watch.of(server, Kind.INSERT))
    assert len(watch.of(net.client, Kind.INSERT)) == 20


# -- a full table ---------------------------------------------------------------------------


@pytest.fixture
def small_table(net: Net) -> Iterator[Path]:
    """The machine's nf_conntrack_max, and few buckets, put back afterwards."""
    folder = Path("/proc/sys/net/netfilter")
    kept = {
        name: (folder / name).read_text() for name in ("nf_conntrack_buckets", "nf_conntrack_max")
    }
    for node in net.nodes:
        node.run(["conntrack", "-F"])
    (folder / "nf_conntrack_buckets").write_text("512")
    yield folder / "nf_conntrack_max"
    for name, value in kept.items():
        (folder / name).write_text(value)


@alone
def test_a_full_table_refuses_with_the_packets_own_tuple(
    family: str, net: Net, capture: Capture, small_table: Path, seen: Seen
) -> None:
    client, server = net.client, net.server
    held = []
    with traffic.tcp_server(server, 8063, handle=_answer):
        for _ in range(30):
            one = client.socket(socket.AF_INET, socket.SOCK_STREAM)
            one.connect((server.addresses["client"][0], 8063))
            one.sendall(b"hi\n")
            one.recv(8)  # answered: the entry is ASSURED, nothing may evict it
            held.append(one)
        small_table.write_text(str(client.count()))
        refused: list[traffic.Flow] = []
        with Watch(capture, net.nodes) as watch:
            for address in server.addresses["client"]:
                refused += traffic.udp_flows(client, (address, 9), N, first_port=25000).refused
            arrived = traffic.udp_flows(
                server, (client.addresses["server"][0], 9), 10, first_port=25500
            )
        small_table.write_text("262144")
        # both ends, or a later connection from the same port would meet the old one
        for one in (*held, *_held):
            one.close()
        _held.clear()
    watch.reconcile()
    assert len(refused) == 2 * N
    assert watch.stats[client.inum]["drop"] == 2 * N
    assert len(arrived.refused) == 10  # the server's own table is as full
    assert watch.counts[client.inum][Reason.TABLE_FULL] == 2 * N
    if not capture.info.drop_tuples:
        note(seen, family, "refused", "counted")
        return
    drops = watch.of(client, Kind.DROP)
    assert flows(drops) == Counter(refused)
    assert set(drops["reason"].tolist()) == {int(Reason.TABLE_FULL)}
    assert set((drops["owner"] >> np.uint64(32)).tolist()) == {os.getpid()}
    assert set(drops["direction"].tolist()) == {int(Direction.OUT)}
    assert flows(watch.of(server, Kind.DROP)) == Counter(arrived.refused)
    note(seen, family, "refused", "tuple and process")


def _answer(connection: socket.socket) -> None:
    connection.settimeout(60)
    connection.recv(8)
    connection.sendall(b"ok\n")
    _held.append(connection.dup())


_held: list[socket.socket] = []


@alone
def test_evictions_are_told_from_refusals(
    family: str, net: Net, capture: Capture, small_table: Path, seen: Seen
) -> None:
    client = net.client
    small_table.write_text("80")
    with Watch(capture, net.nodes) as watch:
        target = net.server.addresses["client"][0]
        sent = traffic.udp_flows(client, (target, 9), 300, first_port=26000)
    watch.reconcile()
    assert len(sent.flows) + len(sent.refused) == 300
    assert watch.stats[client.inum]["early_drop"] > 50
    assert watch.counts[client.inum][Reason.TABLE_FULL] == len(sent.refused)
    if capture.info.evictions:
        evicted = watch.of(client, Kind.DESTROY, Reason.EVICTED)
        assert len(evicted) == watch.stats[client.inum]["early_drop"]
        assert set(flows(evicted)) <= set(sent.flows)
        assert flows(watch.of(client, Kind.DROP)) == Counter(sent.refused)
        note(seen, family, "evictions", "distinguished")
    else:
        note(seen, family, "evictions", "counted")


# -- a kernel with less -----------------------------------------------------------------------


def test_a_missing_function_narrows_what_is_said(family: str, net: Net, capture: Capture) -> None:
    if family not in FUNCTIONS:
        pytest.skip("attaches to no function")
    opened: type[FentryCapture | KprobeCapture] = (
        FentryCapture if family == "fentry" else KprobeCapture
    )
    with pytest.raises(CtraceError, match="nf_conntrack_free"):
        opened(without={"nf_conntrack_free"})
    narrow = opened(without={"early_drop", "__nf_conntrack_confirm"})
    try:
        assert not narrow.info.evictions
        assert len(narrow.info.blind) == len(capture.info.blind) + 2
        with Watch(narrow, net.nodes) as watch:
            target = net.server.addresses["client"][0]
            sent = traffic.udp_flows(net.client, (target, 9), 20, first_port=28000).flows
            net.client.run(["conntrack", "-F"])
    finally:
        narrow.close()
    watch.reconcile()
    assert flows(watch.of(net.client, Kind.INSERT)) == Counter(sent)
    gone = [e for e in watch.of(net.client, Kind.DESTROY) if int(e["sport"]) >= 28000]
    assert {int(e["reason"]) for e in gone} == {int(Reason.GONE)}  # evicted or deleted: unknown


# -- nothing stays ----------------------------------------------------------------------------


def _programs() -> set[int]:
    found: set[int] = set()
    last = 0
    while True:
        result, after = bpf.bpf(bpf.Cmd.PROG_GET_NEXT_ID, last.to_bytes(4, "little") + bytes(8))
        if result < 0:
            return found
        last = int.from_bytes(after[4:8], "little")
        found.add(last)


def _hold(family: str, ready: int) -> NoReturn:
    """A process that traces, and says so, until it is killed."""
    try:
        made = FAMILIES[family](Filter(), 1 << 16)
        made.follow(netns.find())
        os.write(ready, b"!")
        signal.pause()
    finally:
        os._exit(1)


@alone
def test_kill_9_leaves_nothing(family: str, net: Net, capture: Capture) -> None:
    before = _programs()
    told, ready = os.pipe()
    child = os.fork()
    if child == 0:
        _hold(family, ready)
    os.close(ready)
    try:
        assert os.read(told, 1) == b"!"
        during = _programs()
    finally:
        os.close(told)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert family == "netlink" or during > before
    deadline = time.monotonic() + 60
    while _programs() != before and time.monotonic() < deadline:
        time.sleep(0.1)  # programs are freed after a grace period
    assert _programs() == before
