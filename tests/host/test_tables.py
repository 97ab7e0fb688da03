"""Fill and counters, against conntrack(8)."""

from __future__ import annotations

import re
import time

import pytest
from kit.traffic import udp_flows

from ctrace.batch import TableReading
from ctrace.host import ctnetlink
from ctrace.host.netns import Namespace
from ctrace.host.tables import TableReader, parse_stats
from ctrace.lab import Lab, Node


def space(node: Node) -> Namespace:
    return Namespace(node.inum, node.name, node.path)


def listed(node: Node) -> dict[str, int]:
    """``conntrack -S``, summed."""
    total: dict[str, int] = {}
    for name, value in re.findall(r"(\w+)=(\d+)", node.run(["conntrack", "-S"])):
        if name != "cpu":
            total[name] = total.get(name, 0) + int(value)
    total["icmp_error"] = total.pop("error")
    return total


@pytest.mark.kernel
def test_counts_and_counters_are_the_kernels() -> None:
    with Lab() as lab, TableReader() as reader:
        nodes = [lab.namespace(name, track=True) for name in ("a", "b")]
        spaces = [space(node) for node in nodes]
        reader.read(spaces)
        udp_flows(nodes[0], ("127.0.0.1", 9), 70)
        ctnetlink.fill(nodes[1].path, 500)
        nodes[1].run(["conntrack", "-D", "-p", "tcp", "--orig-port-src", "1030"])
        readings = {reading.netns: reading for reading in reader.read(spaces)}
        for node, n in zip(nodes, (70, 499), strict=True):
            reading = readings[node.inum]
            assert reading.count == node.count() == n
            assert dict(reading.stats) == listed(node) == ctnetlink.statistics(node.path)
            assert reading.max == int(node.sysctl("net.netfilter.nf_conntrack_max"))
            assert reading.buckets == int(node.sysctl("net.netfilter.nf_conntrack_buckets"))
        assert readings[nodes[1].inum].stats["insert"] == 500
        assert all(not reading.stats for reading in reader.read(spaces, stats=False))


@pytest.mark.kernel
def test_a_reader_does_not_keep_a_namespace_alive() -> None:
    with Lab() as lab, TableReader() as reader:
        here, gone = lab.namespace("here"), lab.namespace("gone")
        lab.link(here, gone)
        spaces = [space(here), space(gone)]
        assert len(reader.read(spaces)) == 2
        gone.close()
        until = time.monotonic() + 60
        # The far end of the pair goes with the namespace that holds it.
        while time.monotonic() < until and (
            len(reader.read(spaces)) == 2 or "to-gone" in here.run(["ip", "link"])
        ):
            time.sleep(0.05)
        assert "to-gone" not in here.run(["ip", "link"])
        assert [reading.netns for reading in reader.read(spaces)] == [here.inum]
        assert reader.read([]) == ()
        assert [reading.netns for reading in reader.read([space(here)])] == [here.inum]


def test_columns_by_name_whatever_their_order() -> None:
    old = (
        "entries  searched found new invalid ignore delete delete_list insert insert_failed drop "
        "early_drop icmp_error  expect_new expect_create expect_delete search_restart\n"
        + "0000000a  00000001 00000002 00000003 00000004 00000005 00000006 00000007 00000008 "
        "00000009 0000000a 0000000b 0000000c  0000000d 0000000e 0000000f 00000010 \n" * 2
    )
    names, rows = parse_stats(old)
    assert rows.shape == (2, 17)
    assert dict(zip(names, rows.sum(axis=0).tolist(), strict=True))["early_drop"] == 22


@pytest.mark.kernel
def test_a_counter_that_wraps_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        "drop insert\nfffffffe 00000001\n00000005 00000001\n",
        "drop insert\n00000003 00000001\n00000006 00000001\n",
        "drop insert\n00000004 00000000\n00000006 00000000\n",
    ]
    monkeypatch.setattr("ctrace.host.tables._stat_file", lambda _: texts.pop(0))
    with Lab() as lab, TableReader() as reader:
        spaces = [space(lab.namespace("w"))]
        first, second, reset = (reader.read(spaces)[0] for _ in range(3))
    assert isinstance(first, TableReading)
    assert second.stats["drop"] - first.stats["drop"] == 5 + 1
    assert second.stats["insert"] == 2
    assert reset.stats["drop"] - second.stats["drop"] == 1
    assert reset.stats["insert"] == 0  # the module was loaded anew
