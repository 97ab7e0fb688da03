"""Walks over the table meet its entries as conntrack lists them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from vm_kit import Net, Watch

from ctrace.batch import TableReading
from ctrace.capture.chains import Walker
from ctrace.capture.family import Capture
from ctrace.capture.survey import ENOUGH, Survey
from ctrace.host import ctnetlink
from ctrace.lab import traffic
from ctrace.record import Events, Kind, Status, empty

pytestmark = pytest.mark.kernel
BUCKETS = Path("/proc/sys/net/netfilter/nf_conntrack_buckets")


@pytest.fixture
def entries(net: Net, capture: Capture) -> Iterator[Events]:
    """Some ASSURED entries and some that are not, as their inserts were seen."""
    if capture.info.family == "netlink":
        pytest.skip("tells no addresses, and has no programs")
    for node in net.nodes:
        node.run(["conntrack", "-F"])
    target = net.server.addresses["client"][0]
    with Watch(capture, net.nodes) as watch, traffic.tcp_server(net.server, 8063):
        traffic.tcp_connections(net.client, (target, 8063), 300)
        traffic.udp_flows(net.client, (target, 9), 500)
    yield watch.of(net.client, Kind.INSERT)
    for node in net.nodes:
        node.run(["conntrack", "-F"])


def truth(net: Net) -> dict[int, tuple[int, int]]:
    """Entries of each namespace and how many are ASSURED, by a dump."""
    found = {}
    for node in net.nodes:
        rows = ctnetlink.dump(node.path)
        assured = np.count_nonzero(rows["status"] & np.uint32(int(Status.ASSURED)))
        found[node.inum] = len(rows), int(assured)
    return found


def test_a_walk_over_all_meets_every_entry_once(net: Net, entries: Events) -> None:
    buckets = int(BUCKETS.read_text())
    mine = [node.inum for node in net.nodes]
    with Walker() as walker:
        bases = walker.bases(0, entries["ct"][:8].tolist())
        assert bases
        before = walker.met()
        assert not before
        for _ in range(20):  # another's entry may move while its bucket is walked
            expected = truth(net)
            walked = walker.walk(bases[0], 0, 1, buckets)
            assert walked.next >= buckets
            met = walker.met()
            new = {
                inum: (met[inum][0] - before.get(inum, (0, 0))[0],
                       met[inum][1] - before.get(inum, (0, 0))[1])
                for inum in mine if inum in met
            }  # fmt: skip
            before = met
            if not walked.disturbed and new == {k: v for k, v in expected.items() if v[0]}:
                break
            time.sleep(0.2)
        assert new == {k: v for k, v in expected.items() if v[0]}
        assert expected[net.client.inum] == (800, 300)


def test_a_survey_goes_round_and_counts_each_bucket_as_often(net: Net, entries: Events) -> None:
    """Exact after a round: what it met, less what it would meet twice."""
    buckets = int(BUCKETS.read_text())
    reading = (TableReading(net.client.inum, 800, 1000, buckets),)
    survey = Survey()
    try:
        assert survey.take(reading, entries)[0].met == 0  # only from here on it knows where
        met = 0
        for _ in range(buckets // 64):
            (now,) = survey.take(reading, empty())
            assert now.met > met or now.met - met < ENOUGH
            met = now.met
            if met >= 8 * 800:  # eight rounds
                break
        assert met >= 8 * 800
        assert now.met_assured / now.met == pytest.approx(300 / 800, abs=0.04)
    finally:
        survey.close()
    (after,) = survey.take(reading, empty())
    assert (after.met, after.met_assured) == (now.met, now.met_assured)


def test_what_is_not_the_table_is_not_counted(net: Net, entries: Events) -> None:
    """A table of another size lies elsewhere; memory of something else says nothing."""
    buckets = int(BUCKETS.read_text())
    survey = Survey()
    try:
        wrong = (TableReading(net.client.inum, 800, 1000, 2 * buckets),)
        survey.take(wrong, entries)
        for _ in range(buckets // 4096):
            survey.take(wrong, empty())
        (met,) = survey.take(wrong, empty())
        # up to the table's own end it was the table
        assert met.met_assured / met.met == pytest.approx(300 / 800, abs=0.05)
        gone = entries[:4].copy()
        gone["ct"] = np.uint64(0xFFFF888000000000)
        blind = Survey()
        blind.take(wrong, gone)
        assert blind.take(wrong, empty())[0].met == 0
        blind.close()
    finally:
        survey.close()
