"""A table under pressure, beyond being full: long chains, lack of memory, the collector.

Each is counted under its own reason, and none under another's. All of this changes the whole
machine, so it only runs in an emulated one.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import traffic
from kit.machines import Net, Seen, Watch, families, flows, note

from ctrace.capture.family import Capture
from ctrace.capture.hooks import netfilter
from ctrace.capture.live import FAMILIES
from ctrace.errors import CtraceError
from ctrace.filters import Filter
from ctrace.host import ctnetlink, netns
from ctrace.record import Kind, Reason, Status

KERNEL = os.environ.get("CTRACE_VM", "")
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not KERNEL, reason="changes the whole machine: in scripts/vm only"),
]
SETTINGS = Path("/proc/sys/net/netfilter")


@pytest.fixture
def machine(net: Net) -> Iterator[Path]:
    """The machine's limits, put back afterwards."""
    kept = {
        name: (SETTINGS / name).read_text() for name in ("nf_conntrack_buckets", "nf_conntrack_max")
    }
    for node in net.nodes:
        node.run(["conntrack", "-F"])
    yield SETTINGS
    for name, value in kept.items():
        (SETTINGS / name).write_text(value)
    for node in net.nodes:
        node.run(["conntrack", "-F"])


def test_a_chain_too_long_is_no_clash(
    family: str, net: Net, capture: Capture, machine: Path, seen: Seen
) -> None:
    """In the smallest hash table chains hold 50 to 80 entries, chosen anew each time (5.15)."""
    client = net.client
    (machine / "nf_conntrack_buckets").write_text("512")
    assert (machine / "nf_conntrack_buckets").read_text().strip() == "512"
    with contextlib.suppress(CtraceError):  # it ends with the first chain that is too long
        for first in range(0, 20_000, 500):
            ctnetlink.fill(client.path, 500, first=first)
    assert client.count() > 3000
    with Watch(capture, net.nodes) as watch:
        target = net.server.addresses["client"][0]
        sent = traffic.udp_flows(client, (target, 9), 1500, first_port=30000)
    watch.reconcile()
    counts, stats = watch.counts[client.inum], watch.stats[client.inum]
    too_long = int(counts[Reason.CHAIN_TOO_LONG])
    assert too_long == stats["insert_failed"]
    assert counts[Reason.CLASH] == counts[Reason.TABLE_FULL] == stats["drop"] == 0
    assert len(sent.refused) == too_long  # EPERM
    if KERNEL == "5.10":
        assert too_long == 0  # chains have no limit there
        note(seen, family, "chain", "no limit")
        return
    assert too_long > 0
    if capture.info.drop_tuples:
        assert flows(watch.of(client, Kind.INSERT_FAILED)) == Counter(sent.refused)
    note(seen, family, "chain", "tuple" if capture.info.drop_tuples else "counted")


def test_a_refusal_below_the_limit_is_none_of_a_full_table(
    family: str, net: Net, capture: Capture, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The netfilter hooks compare with the limit; here they are shown a larger one."""
    if family != "netfilter":
        pytest.skip("tells the two by another way")
    path = "/proc/sys/net/netfilter/nf_conntrack_"
    monkeypatch.setattr(netfilter, "_TABLE", (path + "count", path + "buckets"))
    (machine / "nf_conntrack_buckets").write_text("65536")
    misled = netfilter.NetfilterCapture(Filter())
    try:
        misled.follow(netns.find())
        ctnetlink.fill(net.client.path, 100)
        (machine / "nf_conntrack_max").write_text("100")
        with Watch(misled, net.nodes) as watch:
            target = net.server.addresses["client"][0]
            refused = traffic.udp_flows(net.client, (target, 9), 10, first_port=30000).refused
    finally:
        (machine / "nf_conntrack_max").write_text("262144")
        misled.close()
    assert len(refused) == 10
    drops = watch.of(net.client, Kind.DROP)
    assert flows(drops) == Counter(refused)
    assert set(drops["reason"].tolist()) == {int(Reason.NO_MEMORY)}


def test_the_collector_near_the_limit_is_told_from_deletions(
    net: Net, machine: Path, seen: Seen
) -> None:
    """gc_worker takes closing connections, though they are ASSURED, above 95 % of the limit.

    It runs once a minute or less, so all families watch the same run.
    """
    client, server = net.client, net.server
    made = {family: FAMILIES[family](Filter(), 1 << 20) for family in families()}
    try:
        for capture in made.values():
            capture.follow(netns.find())
        watches = {family: Watch(capture, net.nodes) for family, capture in made.items()}
        target = server.addresses["client"][0]
        with contextlib.ExitStack() as stack:
            for watch in watches.values():
                stack.enter_context(watch)
            with traffic.tcp_server(server, 8063):
                sent = traffic.tcp_connections(client, (target, 8063), 200).flows
            assert client.count() >= 200
            (machine / "nf_conntrack_max").write_text(str(client.count()))
            deadline = time.monotonic() + 240
            size = client.count()
            # an unsuccessful search of a few buckets calls the collector for its next run
            while client.count() > size * 0.96 and time.monotonic() < deadline:
                traffic.udp_flows(client, (target, 9), 3, first_port=31000)
                time.sleep(1)
            (machine / "nf_conntrack_max").write_text("262144")
    finally:
        for capture in made.values():
            capture.close()
    for family, watch in watches.items():
        watch.reconcile()
        taken = [e for e in watch.of(client, Kind.DESTROY) if int(e["proto"]) == 6]
        assert len(taken) >= 8, family
        told = family in ("fentry", "kprobe", "netfilter")
        reason = Reason.GC_PRESSURE if told else Reason.GONE
        assert {int(e["reason"]) for e in taken} == {int(reason)}, family
        assert all(int(e["status"]) & int(Status.ASSURED) for e in taken)
        assert {int(e["sport"]) for e in taken} <= {flow.sport for flow in sent}
        note(seen, family, "collector", "distinguished" if told else "as plain deletions")
