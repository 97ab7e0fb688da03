"""What a snapshot says: groups, owners, victims, and the events that go wrong."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
from kit.loads.modelled import DAEMON, OFFSET, PID, feed, feed_events, model, only
from kit.shapes import NETNS, SECOND, START, SYN_SENT, Trace, cut, joined, steady

from ctrace.batch import Batch, Clock, HookInfo, Names, Netns, Owner
from ctrace.model.intake import FLOOD
from ctrace.model.model import Model
from ctrace.model.snapshot import GROUPS, SORTS
from ctrace.record import RECORD, Kind, Reason, Status, address_text, empty

# -- groups and owners ---------------------------------------------------------


def test_keys_as_shown() -> None:
    trace = Trace()
    trace.flows(np.array([0.1]), 1, 1, proto=6, dport=8063)
    trace.flows(np.array([0.2]), 1, 1, proto=1, dport=0x0800, src="10.0.0.8")
    m = feed(model(), trace, 1)
    shown = {group: {c.key for c in m.snapshot(group).culprits} for group in GROUPS}
    assert shown["pair"] == {"10.0.0.7 -> tcp/8063", "10.0.0.8 -> icmp"}
    assert shown["service"] == {"tcp/8063", "icmp"}
    assert shown["src"] == {"10.0.0.7", "10.0.0.8"}
    assert shown["dst"] == {"10.0.0.9"}
    icmp = next(c for c in m.snapshot("service").culprits if c.proto == "icmp")
    assert icmp.port is None


def test_ipv6_and_ipv4_side_by_side() -> None:
    trace = Trace()
    trace.flows(np.array([0.1, 0.2]), 1, 1)
    trace.flows(np.array([0.3]), 1, 1, src="fd00::1", dst="fd00::2")
    trace.drops(np.array([0.4]), src="fd00::1", dst="fd00::2", dport=53, proto=17)
    m = feed(model(), trace, 1)
    assert {c.src: c.held for c in m.snapshot("src").culprits} == {"10.0.0.7": 2, "fd00::1": 1}
    assert m.snapshot().victims[0].key == "udp fd00::1 -> [fd00::2]:53"


def test_same_address_in_two_namespaces_is_two_keys() -> None:
    trace = Trace()
    trace.flows(np.array([0.1, 0.2]), 1, 1)
    trace.flows(np.array([0.3]), 1, 1, netns=77)
    m = feed(model(), trace, 1)
    assert sorted((c.netns, c.held) for c in m.snapshot("src").culprits) == [(77, 1), (NETNS, 2)]
    assert {c.key: c.held for c in m.snapshot("netns").culprits} == {
        f"netns:{NETNS}": 2, "netns:77": 1,
    }  # fmt: skip


def test_processes_that_opened_and_those_that_listen() -> None:
    trace = Trace()
    trace.flows(np.linspace(0, 0.5, 10), 0.1, 60, direction=2, owner=PID, cgroup=9)
    trace.flows(np.linspace(0, 0.5, 4), 0.1, 60, direction=1, dport=80, src="10.0.0.50")
    trace.flows(np.linspace(0, 0.5, 2), 0.1, 60, direction=3, dport=22, src="10.0.0.60")
    m = model()
    names = Names(
        owners={PID: Owner(PID, "php-fpm", 9, "shop/php-fpm", "php-fpm: pool www")},
        cgroups={9: "shop/php-fpm"},
        listeners={(NETNS, 6, 80): Owner(DAEMON, "nginx", 12, "nginx.service")},
        netns={NETNS: Netns(NETNS, "init")},
    )
    m.update(Batch(empty(), START, names=names))
    feed(m, trace, 1)
    by_process = {c.key: c for c in m.snapshot("process").culprits}
    assert {key: c.held for key, c in by_process.items()} == {
        "php-fpm[4242]": 10, "nginx[812] listens": 4, "(forwarded in init)": 2,
    }  # fmt: skip
    opener = by_process["php-fpm[4242]"].owner
    assert opener is not None
    assert (opener.pid, opener.role, opener.unit) == (4242, "opened", "shop/php-fpm")
    listener = by_process["nginx[812] listens"].owner
    assert listener is not None
    assert listener.role == "listens"
    containers = {c.key: c.held for c in m.snapshot("container").culprits}
    assert containers == {"shop/php-fpm": 10, "nginx.service": 4, "init": 2}
    pair = next(c for c in m.snapshot("pair").culprits if c.port == 8063)
    assert pair.owner is not None
    assert pair.owner.comm == "php-fpm"


def test_two_containers_of_one_control_group_stay_two() -> None:
    """With version 1 of control groups every process is in the root of version 2."""
    trace = Trace()
    trace.flows(np.linspace(0, 0.5, 10), 0.1, 60, direction=2, owner=PID, cgroup=1)
    trace.flows(np.linspace(0, 0.5, 3), 0.1, 60, direction=2, owner=DAEMON, cgroup=1)
    m = model()
    names = Names(
        owners={
            PID: Owner(PID, "php-fpm", 1, "docker:shop"),
            DAEMON: Owner(DAEMON, "nginx", 1, "docker:web"),
        },
        cgroups={1: "docker:web"},
    )
    m.update(Batch(empty(), START, names=names))
    feed(m, trace, 1)
    containers = {c.key: c.held for c in m.snapshot("container").culprits}
    assert containers == {"docker:shop": 10, "docker:web": 3}


def test_ended_entries_leave_their_opener_too() -> None:
    """A destroy carries no process: pairing brings it back."""
    trace = Trace()
    trace.flows(np.linspace(0, 2, 100), 0.1, 1.0, direction=2, owner=PID)
    m = feed(model(), trace, 6)
    c = only(m, "process")
    assert (c.inserts, c.destroys, c.held) == (100, 100, 0)
    assert c.life.p50 == pytest.approx(0.1, rel=0.125)


def test_directions_and_loopback() -> None:
    trace = Trace()
    trace.flows(np.array([0.1, 0.2]), 1, 1, src="127.0.0.1", dst="127.0.0.1", direction=2)
    assert only(feed(model(), trace, 1)).direction == "loopback"
    trace = Trace()
    trace.flows(np.array([0.1, 0.2]), 1, 1, direction=1)
    trace.flows(np.array([0.3, 0.4]), 1, 1, direction=2)
    assert only(feed(model(), trace, 1)).direction == "mixed"


def test_nat_is_never_missed() -> None:
    trace = Trace()
    trace.flows(np.linspace(0, 1, 5000), 0.01, 0.5)
    rows = trace.events()
    assert only(feed_events(model(), rows, 3)).nat == "no"
    one = np.flatnonzero(rows["kind"] == Kind.INSERT)[3333]
    rows["status"][one] |= int(Status.DST_NAT)
    assert only(feed_events(model(), rows, 3)).nat == "dst"
    rows["status"][one] |= int(Status.SRC_NAT)
    assert only(feed_events(model(), rows, 3)).nat == "src,dst"


def test_ends_and_states() -> None:
    trace = Trace()
    for n, reason in ((5, Reason.EXPIRED), (4, Reason.EVICTED), (3, Reason.DELETED),
                      (2, Reason.GC_PRESSURE), (1, Reason.GONE)):  # fmt: skip
        trace.flows(np.linspace(0, 1, n), 0.1, 0.5, reason=reason)
    c = only(feed(model(), trace, 3))
    assert (c.ends.expired, c.ends.evicted, c.ends.deleted, c.ends.other) == (5, 6, 3, 1)
    assert c.ended_states == (("TIME_WAIT", 15),)
    assert (c.held, c.closed, c.states) == (0, 1.0, ())
    assert c.samples


def test_sorts() -> None:
    trace = Trace()
    trace.flows(steady(20, 10, trace.rng), 2.0, 300, dport=1)  # long life, held
    trace.flows(steady(60, 10, trace.rng), 0.01, 0.5, dport=2)  # many, short
    trace.flows(steady(5, 10, trace.rng), 1.0, 6.0, dport=3)
    trace.drops(steady(5, 10, trace.rng), dport=4)
    m = feed(model(), trace, 10)
    first = {sort: m.snapshot("service", sort).culprits[0].port for sort in SORTS}
    assert first == {"held": 1, "new": 2, "life": 2, "residence": 1, "drops": 4}


def test_distinct_sources_are_estimated() -> None:
    trace = Trace()
    n = 20_000
    trace.flows(steady(2000, 10, trace.rng), 0, 5.0, src=0x0B000000 + np.arange(n))
    m = feed(model(), trace, 10)
    assert m.snapshot("service").culprits[0].distinct_src == pytest.approx(n, rel=0.12)
    assert m.snapshot("dst").culprits[0].distinct_src == pytest.approx(n, rel=0.12)


def test_history_and_trend() -> None:
    trace = Trace()
    trace.flows(np.arange(0.5, 10, 1.0), 0, 600)
    m = feed(model(), trace, 8)
    s = m.snapshot()
    assert s.history.count == tuple(range(1, 9))
    assert s.history.ts[-1] == pytest.approx((OFFSET + START) / 1e9 + 8)
    assert s.culprits[0].trend == tuple(float(n) for n in range(1, 9))
    assert s.culprits[0].new_per_s == pytest.approx(1.0)
    name, rate = s.top["service"][0]
    assert name == "tcp/8063"
    assert rate == pytest.approx(1.0)


@pytest.mark.slow
def test_a_flood_is_counted_whole_though_few_of_its_entries_are_timed() -> None:
    """Beside it: a local process, whose entries are all paired; and what was there before."""
    trace = Trace()
    n = 4 * FLOOD
    at = np.linspace(0, 4, n)
    trace.existing(2000, dport=22)
    trace.flows(at, 0.05, 1.0, src=0x0B000000 + np.arange(n) % 5000, dport=80)
    trace.flows(steady(500, 4, trace.rng), 0.2, 0.5, dport=53, direction=2, owner=PID)
    rows = trace.events(until=4)
    gone = (rows["kind"] == Kind.DESTROY) & (rows["dport"] == 80)
    late = rows["ts"] > START + 2 * SECOND
    strangers = np.flatnonzero(gone & late)[:8000]  # older entries end under the flood
    ended = rows[strangers].copy()
    ended["ct"] += np.uint64(64)
    ended["dport"] = 22
    rows = joined([rows, ended[:1000]])
    rows = rows[np.argsort(rows["ts"], kind="stable")]
    m = model()
    for batch in cut(rows, 4):
        m.update(batch)
    services = {c.port: c for c in m.snapshot("service").culprits}
    for port in (80, 53):
        mine = rows[rows["dport"] == port]
        inserts, destroys = (int((mine["kind"] == kind).sum()) for kind in (1, 2))
        c = services[port]
        assert (c.inserts, c.destroys, c.held) == (inserts, destroys, inserts - destroys)
        assert c.error == 0
    flood = services[80]
    assert flood.residence.n < flood.destroys / 4
    assert flood.residence.p50 == pytest.approx(1.05, rel=0.125)
    assert flood.life.p50 == pytest.approx(0.05, rel=0.125, abs=0.002)
    process = next(c for c in m.snapshot("process").culprits if c.key.startswith("?[4242]"))
    assert (process.inserts, process.destroys) == (services[53].inserts, services[53].destroys)
    assert process.life.p50 == pytest.approx(0.2, rel=0.125)
    ssh = services[22]
    assert ssh.held == 1000
    assert ssh.older == pytest.approx(1000, rel=0.2)


# -- victims -------------------------------------------------------------------


def test_a_culprit_that_comes_in_the_midst_of_a_flood_is_named() -> None:
    """The flood's forged sources have taken every row; the newcomer is busier than one window."""
    trace = Trace()
    rng = np.random.default_rng(8)
    scan = np.sort(rng.random(150_000)) * 6
    trace.flows(scan, 30, 0, src=rng.integers(1 << 24, 3 << 24, len(scan)), dport=80,
                status=0, state=SYN_SENT)  # fmt: skip
    late = 3 + np.sort(rng.random(9_000)) * 3
    trace.flows(late, 0.01, 60, src="10.9.9.9", dport=8063)
    m = feed(model(memory=4 << 20), trace, 6)
    for group, key in (("pair", "10.9.9.9 -> tcp/8063"), ("src", "10.9.9.9")):
        first = m.snapshot(group).culprits[0]
        assert first.key == key
        assert first.held <= 9_000 <= first.held + first.error
        assert first.error < 100


@pytest.mark.slow
def test_what_has_no_row_counts_where_shares_are_taken() -> None:
    """Sources, destinations and ports at random: no table of keys can hold them."""
    trace = Trace()
    rng = np.random.default_rng(9)
    n = 120_000
    for netns, flows in ((NETNS, n), (NETNS + 1, n // 4)):
        trace.flows(np.sort(rng.random(flows)) * 6, rng.choice([0.2, 30], flows), 0,
                    src=rng.integers(1 << 24, 3 << 24, flows), status=0, state=SYN_SENT,
                    dst=rng.integers(3 << 24, 4 << 24, flows), netns=netns,
                    dport=rng.integers(1, 60_000, flows))  # fmt: skip
    trace.flows(np.linspace(0.1, 5.9, 5_000), 0.01, 60, src="10.9.9.9", dst="10.8.8.8")
    trace.walks(6)
    m = feed(model(memory=4 << 20), trace, 6)
    events = trace.events(6)
    events = events[events["kind"] != Kind.MET]
    steps = np.where(events["kind"] == Kind.INSERT, 1, -1)
    whole = int(steps.sum())
    spaces = {c.netns: c for c in m.snapshot("netns").culprits}
    for netns in (NETNS, NETNS + 1):
        mine, kind = events["netns"] == netns, events["kind"]
        assert spaces[netns].held == int(steps[mine].sum())
        assert spaces[netns].inserts == int((mine & (kind == Kind.INSERT)).sum())
        assert spaces[netns].ends.expired == int((mine & (kind == Kind.DESTROY)).sum())
        assert spaces[netns].error == 0
        assert spaces[netns].trend
    for group in GROUPS:
        snapshot = m.snapshot(group)
        assert snapshot.held_total == whole
        for c in snapshot.culprits:
            assert c.share == pytest.approx(c.held / whole)
    busy = m.snapshot("pair").culprits[0]
    assert busy.src == "10.9.9.9"
    assert busy.held <= 5_000 <= busy.held + busy.error
    assert busy.error < 50
    why = m.snapshot().why[0]
    assert why.id == "syn-flood"
    assert "hardly an entry each" in why.text
    assert why.share == pytest.approx(1 - 5_000 / whole, abs=0.05)


def test_victims_and_their_share() -> None:
    trace = Trace()
    trace.flows(np.linspace(0, 1, 75), 0.1, 60)
    trace.drops(np.linspace(0, 1, 25), direction=2, owner=PID)
    trace.failures(np.array([0.5]), proto=17, dport=53)
    trace.flows(np.linspace(0, 1, 100), 0.1, 60, dport=443, dst="10.0.0.8")
    m = model()
    m.update(Batch(empty(), START, names=Names(owners={PID: Owner(PID, "curl")})))
    feed(m, trace, 1)
    first, second = m.snapshot().victims
    assert first.key == "tcp 10.0.0.7 -> 10.0.0.9:8063"
    assert first.drops == 25
    assert first.drop_per_s == pytest.approx(25, rel=0.1)
    assert first.share_of_new == pytest.approx(25 / 200)  # of all that the source tried
    assert first.share_of_service == pytest.approx(25 / 100)
    assert first.owner is not None
    assert first.owner.comm == "curl"
    assert (second.failed, second.drops) == (1, 0)
    culprit = next(c for c in m.snapshot().culprits if c.port == 8063)
    assert culprit.drops == 25
    assert culprit.held == 75


def test_victims_of_both_directions_are_two() -> None:
    trace = Trace()
    trace.drops(np.linspace(0, 1, 30), src="10.0.0.1", dst="10.0.0.4", proto=17, dport=53)
    trace.drops(np.linspace(0, 1, 20), src="10.0.0.4", dst="10.0.0.1", proto=17, dport=53)
    trace.drops(np.linspace(0, 1, 10), src="10.0.0.2", dst="10.0.0.3", proto=17, dport=53)
    shown = {(v.src, v.dst): v.drops for v in feed(model(), trace, 1).snapshot().victims}
    assert shown == {
        ("10.0.0.1", "10.0.0.4"): 30, ("10.0.0.4", "10.0.0.1"): 20, ("10.0.0.2", "10.0.0.3"): 10,
    }  # fmt: skip


def test_a_storm_of_victims_stays_bounded() -> None:
    trace = Trace()
    n = 60_000
    trace.drops(steady(10_000, 6, trace.rng), src=0x0B000000 + np.arange(n))
    trace.drops(steady(100, 6, trace.rng), src="10.0.0.7")
    m = feed(model(), trace, 6, step=0.5)
    s = m.snapshot()
    assert s.victims[0].src == "10.0.0.7"
    assert s.victims[0].drops <= 600 <= s.victims[0].drops + s.victims[0].error
    assert s.memory.used <= s.memory.limit


def test_refusals_stay_within_their_error_when_victims_are_too_many() -> None:
    trace = Trace()
    n = 80_000
    sources = (1 << 24) + trace.rng.zipf(1.2, n) % 30_000
    trace.drops(steady(n / 20, 20, trace.rng), src=sources)
    s = feed(model(memory=4 << 20), trace, 20, step=0.5).snapshot()
    assert s.memory.pruned
    rows = trace.events()
    refused = Counter(address_text(src) for src in rows["src"])
    heaviest = [src for src, _ in refused.most_common(5)]
    assert [v.src for v in s.victims[:5]] == heaviest
    for v in s.victims:
        assert v.drops <= refused[v.src] <= v.drops + v.error
    assert s.victims[0].error < 100


# -- the contract --------------------------------------------------------------


def test_a_snapshot_holds_plain_values_only() -> None:
    """Views turn it into JSON: no numpy scalar may leak out."""
    trace = Trace()
    trace.flows(steady(50, 5, trace.rng), 0.1, 1.0, owner=PID)
    trace.drops(np.array([0.5]))
    m = feed(model(), trace, 5)

    def plain(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        assert value is None or type(value) in (int, float, str, bool), (type(value), value)
        return value

    for group in GROUPS:
        json.dumps(plain(m.snapshot(group)))


def test_joined_keeps_the_record_layout() -> None:
    trace = Trace()
    trace.flows(np.array([0.1]), 1, 1)
    assert joined(trace.parts).dtype == RECORD


def test_rates_are_over_the_interval_asked_for_however_many_batches_it_has() -> None:
    trace = Trace()
    trace.flows(np.linspace(0.1, 0.9, 600), 0.01, 600.0)
    m = Model(HookInfo("fentry"), Clock(0), START, interval=6.0)
    for batch in trace.batches(6, step=0.5):
        m.update(batch)
    snapshot = m.snapshot()
    assert snapshot.interval_s == pytest.approx(6.0)
    assert snapshot.rates.insert == pytest.approx(100)
    assert snapshot.culprits[0].new_per_s == pytest.approx(100)
