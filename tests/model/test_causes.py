"""Each cause is named on its own shape, and stays silent on its look-alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from kit.shapes import ESTABLISHED, NETNS, SECOND, START, SYN_SENT, TIME_WAIT, Trace, steady

from ctrace.batch import Batch, Clock, HookInfo, Names, Netns
from ctrace.beside import Beside, Stray
from ctrace.model.model import Model
from ctrace.model.snapshot import Snapshot
from ctrace.record import Direction, Kind, Reason, empty
from ctrace.view.verdict import verdict

UNREPLIED, SEEN_REPLY = 0, 2
FIN_WAIT, CLOSE_WAIT, CLOSE = 4, 5, 8
OTHER = 4026532500


ROOMY = 262_144


def run(trace: Trace, until: float, limit: int = 0, invalid: int = 0) -> Snapshot:
    """What is told at the end. Without a ``limit`` the table is short of room by then.
    ``invalid``: packets that are INVALID each second."""
    batches = trace.batches(until, limit=limit)
    if not limit:
        limit = max(one.tables[0].count for one in batches) * 5 // 4
        batches = [
            replace(one, tables=tuple(replace(table, max=limit) for table in one.tables))
            for one in batches
        ]
    if invalid:
        batches = [
            replace(one, tables=tuple(
                replace(table, stats={**table.stats, "invalid": invalid * second})
                for table in one.tables))
            for second, one in enumerate(batches)
        ]  # fmt: skip
    m = Model(HookInfo("fentry"), Clock(0), START)
    seen = {int(n) for part in trace.parts for n in np.unique(part["netns"])}
    known = {NETNS: Netns(NETNS, "init"), OTHER: Netns(OTHER, "web")}
    names = Names(netns={k: v for k, v in known.items() if k in seen})
    m.update(Batch(empty(), START, names=names))
    for batch in batches:
        m.update(batch)
    return m.snapshot()


Shape = Callable[[Trace], None]


@cache
def told(shape: Shape, until: float, limit: int = 0) -> Snapshot:
    """What is told of this shape: once, for it is frozen."""
    trace = Trace(seed=7)
    shape(trace)
    return run(trace, until, limit)


def no_keepalive(t: Trace) -> None:
    t.flows(steady(300, 60, t.rng), 0.004, 20.0)
    t.flows(steady(10, 60, t.rng), 9.0, 20.0, dport=443, src="10.0.0.8")


def kept_alive(t: Trace) -> None:
    """The same service over few, long connections."""
    t.flows(steady(12, 60, t.rng), 15.0, 5.0)


def one_way(t: Trace) -> None:
    t.flows(steady(200, 60, t.rng), 0, 10.0, proto=17, dport=8125, status=UNREPLIED)


def answered_udp(t: Trace) -> None:
    t.flows(steady(200, 60, t.rng), 0.02, 10.0, proto=17, dport=5060)


def dns(t: Trace) -> None:
    n = 300 * 60
    src = 0x0A2A0000 + t.rng.integers(1, 64, n)
    t.flows(steady(300, 60, t.rng), 0.002, 10.0, proto=17, dport=53, src=src)


def tunnel(t: Trace) -> None:
    t.flows(steady(200, 60, t.rng), 0, 10.0, proto=17, dport=4789, status=UNREPLIED)


def loopback(t: Trace) -> None:
    t.flows(steady(60, 60, t.rng), 0.001, 20.0, src="127.0.0.1", dst="127.0.0.1", dport=10248)


def probes_from_outside(t: Trace) -> None:
    t.flows(steady(60, 60, t.rng), 0.001, 20.0, src="10.0.0.3", dport=10248)


def flood(t: Trace) -> None:
    n = 1000 * 40
    src = t.rng.integers(0x0B000000, 0xDF000000, n)
    t.flows(steady(1000, 40, t.rng), 0, 15.0, src=src, dport=80, status=UNREPLIED, state=SYN_SENT)


def popular(t: Trace) -> None:
    """As many sources, but they are answered and stay a while."""
    n = 500 * 40
    src = t.rng.integers(0x0B000000, 0xDF000000, n)
    t.flows(steady(500, 40, t.rng), t.rng.uniform(6, 12, n), 5.0, src=src, dport=80)


def clash(t: Trace) -> None:
    t.flows(steady(50, 30, t.rng), 0.01, 10.0, proto=17, dport=53)
    t.failures(steady(1, 30, t.rng), proto=17, dport=53)


def clash_when_full(t: Trace) -> None:
    """The same failures, but the table is full: there is a simpler reason."""
    t.flows(steady(50, 30, t.rng), 0.01, 40.0, proto=17, dport=53)
    t.failures(steady(1, 30, t.rng), proto=17, dport=53)
    t.drops(steady(20, 30, t.rng), proto=17, dport=53)


def leak(t: Trace) -> None:
    t.existing(3000, dport=5432)
    t.flows(steady(2, 60, t.rng), 5.0, 5.0, dport=443)


def busy_established(t: Trace) -> None:
    """Old entries too, but they end and are replaced."""
    t.existing(500, dport=5432)
    t.flows(steady(50, 60, t.rng), 8.0, 4.0, dport=5432)


def other_full(t: Trace) -> None:
    t.flows(steady(100, 40, t.rng), 0.2, 60.0, netns=OTHER, dport=8080)
    t.drops(20 + steady(30, 20, t.rng), netns=OTHER, dport=8080)
    t.flows(steady(2, 40, t.rng), 1.0, 5.0, dport=22)


def both_roomy(t: Trace) -> None:
    t.flows(steady(10, 40, t.rng), 0.2, 5.0, netns=OTHER, dport=8080)
    t.flows(steady(2, 40, t.rng), 1.0, 5.0, dport=22)


def legitimate(t: Trace) -> None:
    """Many services and clients, connections that last: just more than fits."""
    for port in range(9000, 9012):
        at = steady(100 / 12, 60, t.rng)
        src = 0x0A010000 + t.rng.integers(1, 3000, len(at))
        t.flows(at, t.rng.uniform(10, 20, len(at)), 2.0, src=src, dport=port)


def udp_flood(t: Trace) -> None:
    src = t.rng.integers(0x0B000000, 0xDF000000, 500 * 40)
    t.flows(steady(500, 40, t.rng), 0, 10.0, src=src, proto=17, dport=1900, status=UNREPLIED)


def agents(t: Trace) -> None:
    """As many sources of unanswered datagrams, but each sends on from where it is."""
    src = 0x0A010000 + t.rng.permutation(3000)
    t.flows(np.linspace(0, 5, 3000), 60.0, 30.0, src=src, proto=17, dport=8125, status=UNREPLIED)


def refused(t: Trace) -> None:
    """Connections that are reset at once: nothing is held."""
    t.flows(steady(300, 40, t.rng), 0, 0.0005, status=SEEN_REPLY, state=CLOSE, dport=7777)


def no_answer(t: Trace) -> None:
    t.flows(steady(100, 40, t.rng), 0, 120.0, status=UNREPLIED, state=SYN_SENT, dport=7777,
            direction=int(Direction.OUT))  # fmt: skip
    t.walks(40)


def exchanges(t: Trace) -> None:
    """Answered requests, none of which has ended by the end."""
    t.flows(steady(200, 12, t.rng), 0.02, 30.0, proto=17, dport=123, status=SEEN_REPLY)
    t.walks(12)


def streams(t: Trace) -> None:
    t.flows(np.linspace(0, 3, 800), 100.0, 120.0, proto=17, dport=443)
    t.walks(12)


def old_streams(t: Trace) -> None:
    """Those that were there before: nobody saw how long they have gone on."""
    t.existing(800, proto=17, dport=443)
    t.walks(12)


def old_time_wait(t: Trace) -> None:
    """Closed before anybody looked: how long they lived is not known."""
    t.existing(800, state=TIME_WAIT, dport=9443)
    t.walks(12)


def old_leak(t: Trace) -> None:
    """It began long ago; some come now, and none goes."""
    t.existing(2000, dport=9200)
    t.flows(steady(80, 12, t.rng), 0.01, 432000.0, dport=9200, state=ESTABLISHED)
    t.walks(12)


def unused(t: Trace) -> None:
    """Connections that carry nothing once they are open, and are never closed."""
    t.flows(steady(80, 12, t.rng), 0.01, 432000.0, dport=9200, state=ESTABLISHED)
    t.walks(12)


def rising(t: Trace) -> None:
    """As many that come, all in use."""
    t.flows(steady(80, 12, t.rng), 600.0, 432000.0, dport=9200, state=ESTABLISHED)
    t.walks(12)


def burst(t: Trace, since: float = 30.0) -> None:
    """Connections that have just been opened, by the hundred, and carry nothing yet."""
    t.flows(steady(2, since, t.rng), 0.004, 20.0, dport=443)
    t.flows(since + steady(120, 4, t.rng), 0.01, 432000.0, dport=9200, state=ESTABLISHED)
    t.walks(since + 4)


def first_burst(t: Trace) -> None:
    burst(t, since=5.0)


def opened_and_closed(t: Trace) -> None:
    """Most are open and carry nothing, but the first of them have been closed."""
    unused(t)
    t.flows(steady(4, 12, t.rng), 0.01, 120.0, dport=9200)
    t.walks(12)


def quiet(t: Trace, idle: float = 400.0) -> None:
    """Old connections of which looks tell how long they had no packet."""
    rows = t.existing(2000, dport=5432)
    for second in range(2, 12, 5):
        met = rows.copy()
        met["ts"], met["kind"] = START + second * SECOND, int(Kind.MET)
        met["idle_ms"] = int(1000 * idle)
        met["timeout_ms"], met["overdue_ms"] = 0, int(-1000 * (432000 - idle))
        t.parts.append(met)


def in_use(t: Trace) -> None:
    quiet(t, idle=0.5)


def one_way_tcp(t: Trace) -> None:
    """Open connections whose answers pass elsewhere: picked up by their first packet."""
    t.flows(steady(90, 12, t.rng), 0.0, 300.0, dport=5432, status=UNREPLIED, state=ESTABLISHED)
    t.walks(12)


def ack_flood(t: Trace) -> None:
    """Lone packets of ever new sources, each taken up as an open connection."""
    src = t.rng.integers(0x0B000000, 0xDF000000, 300 * 12)
    t.flows(steady(300, 12, t.rng), 0.0, 300.0, src=src, dport=443, status=UNREPLIED,
            state=ESTABLISHED)  # fmt: skip
    t.walks(12)


def udp_scan(t: Trace) -> None:
    ports = t.rng.integers(1, 65535, 200 * 40)
    t.flows(steady(200, 40, t.rng), 0, 10.0, src="10.6.6.6", dport=ports, proto=17,
            status=UNREPLIED)  # fmt: skip


def few_lookups(t: Trace) -> None:
    t.flows(steady(3, 60, t.rng), 0.002, 10.0, proto=17, dport=53)


SHAPES: list[tuple[str, Shape, float, int]] = [
    ("no-keepalive", no_keepalive, 50, 262_144),
    ("one-way-udp", one_way, 50, 262_144),
    ("dns-storm", dns, 50, 262_144),
    ("tunnel", tunnel, 50, 262_144),
    ("loopback-probes", loopback, 50, 262_144),
    ("syn-flood", flood, 35, 262_144),
    ("clash", clash, 30, 262_144),
    ("idle-established", leak, 60, 4096),
    ("other-netns", other_full, 40, 4000),
    ("too-small", legitimate, 50, 1500),
    ("udp-flood", udp_flood, 35, 262_144),
    ("unanswered", no_answer, 38, 262_144),
    ("answered-udp", exchanges, 12, 262_144),
    ("leak", unused, 12, 262_144),
    ("idle-established", quiet, 12, 262_144),
    ("udp-streams", old_streams, 12, 262_144),
    ("time-wait", old_time_wait, 12, 262_144),
    ("leak", old_leak, 12, 262_144),
    ("one-way-tcp", one_way_tcp, 12, 262_144),
    ("ack-flood", ack_flood, 12, 262_144),
    ("scan", udp_scan, 35, 262_144),
]

LOOKALIKES: list[tuple[str, Shape, float, int]] = [
    ("no-keepalive", kept_alive, 50, 262_144),
    ("one-way-udp", answered_udp, 50, 262_144),
    ("one-way-udp", tunnel, 50, 262_144),
    ("dns-storm", one_way, 50, 262_144),
    ("tunnel", one_way, 50, 262_144),
    ("loopback-probes", probes_from_outside, 50, 262_144),
    ("syn-flood", popular, 35, 262_144),
    ("clash", clash_when_full, 30, 1000),
    ("idle-established", busy_established, 60, 262_144),
    ("other-netns", both_roomy, 40, 4000),
    ("too-small", legitimate, 50, 262_144),
    ("too-small", flood, 35, 10_000),
    ("udp-flood", agents, 35, 262_144),
    ("syn-flood", refused, 35, 262_144),
    ("syn-flood", no_answer, 38, 262_144),
    ("answered-udp", streams, 12, 262_144),
    ("leak", rising, 12, 262_144),
    ("leak", burst, 33, 262_144),
    ("leak", first_burst, 9, 262_144),
    ("leak", opened_and_closed, 12, 262_144),
    ("idle-established", in_use, 12, 262_144),
    ("dns-storm", few_lookups, 50, 262_144),
    ("syn-flood", one_way_tcp, 12, 262_144),
    ("one-way-tcp", flood, 35, 262_144),
    ("one-way-tcp", unused, 12, 262_144),
    ("ack-flood", one_way_tcp, 12, 262_144),
    ("ack-flood", flood, 35, 262_144),
    ("scan", one_way, 50, 262_144),
]


@pytest.mark.parametrize(("cause", "shape", "until", "limit"), SHAPES)
def test_recognised(cause: str, shape: Shape, until: float, limit: int) -> None:
    why = told(shape, until, limit).why
    assert why[0].id == cause, why
    assert why[0].evidence
    assert why[0].remedies or (why[0].load and why[0].at_need)
    assert any(char.isdigit() for char in why[0].text)


@pytest.mark.parametrize("shape", [no_keepalive, one_way, tunnel, dns, loopback])
def test_ordinary_traffic_is_helped_only_where_room_is_short(shape: Shape) -> None:
    """As the verdict says: a table that is HEALTHY needs no help, and one without room does."""
    roomy = told(shape, 50, ROOMY)
    count = roomy.tables[0].count
    assert verdict(roomy).word == "HEALTHY"
    assert roomy.why[0].load
    assert not [one.remedy for one in roomy.why if one.remedy]
    for limit in (round(count * 1.2), count // 2):
        short = told(shape, 50, limit)
        assert verdict(short).word in ("HIGH", "FILLING", "RISING", "FULL")
        assert short.why[0].id == roomy.why[0].id
        assert short.why[0].remedy


def test_a_table_that_has_recovered_needs_no_help_any_more() -> None:
    """It was full for a while; then most of what held it was gone."""
    trace = Trace(seed=7)
    trace.flows(steady(300, 20, trace.rng), 0.004, 10.0)
    trace.drops(np.linspace(18, 20, 50))
    trace.flows(steady(5, 60, trace.rng), 0.004, 10.0)
    full = run(trace, 20, limit=3000)
    assert verdict(full).word == "FULL"
    assert full.why[0].remedy
    after = run(trace, 55, limit=3000)
    assert verdict(after).word == "HEALTHY"
    assert after.totals.drop == 50
    assert [one.id for one in after.why if one.load]
    assert not [one.remedy for one in after.why if one.remedy]


@pytest.mark.parametrize(
    ("shape", "until"), [(udp_flood, 35), (no_answer, 38), (unused, 12), (one_way_tcp, 12)]
)
def test_what_is_wrong_is_helped_however_much_room_there_is(shape: Shape, until: float) -> None:
    s = told(shape, until, 1 << 24)
    assert s.tables[0].fill < 0.001
    assert not s.why[0].load
    assert s.why[0].remedy


@pytest.mark.parametrize(("reply", "load"), [(UNREPLIED, False), (SEEN_REPLY, True)])
def test_look_ups_and_pings_without_an_answer_are_wrong(reply: int, load: bool) -> None:
    for proto, port, cause in ((17, 53, "dns-storm"), (1, 0, "pings")):
        trace = Trace(seed=7)
        trace.flows(steady(100, 40, trace.rng), 0.002, 10.0, proto=proto, dport=port, status=reply)
        first = run(trace, 38, limit=ROOMY).why[0]
        assert first.id == cause
        assert (first.load, bool(first.remedy)) == (load, not load)
        assert ("nobody answers" in first.text or "unanswered" in first.text) != load or proto == 1


@pytest.mark.parametrize(("status", "proto", "cause"), [
    (UNREPLIED, 6, "syn-flood"), (UNREPLIED, 17, "udp-flood"), (SEEN_REPLY | 4, 6, "unknown"),
])  # fmt: skip
def test_more_sources_than_can_be_named_are_a_flood_only_if_nothing_is_completed(
    status: int, proto: int, cause: str
) -> None:
    """To many services; a popular site's visitors look the same until their entries are seen."""
    trace = Trace(seed=7)
    n = 60_000
    trace.flows(np.linspace(0.1, 5.9, n), 0.01, 60, proto=proto, status=status,
                state=TIME_WAIT if status else SYN_SENT, dport=trace.rng.integers(1, 60_000, n),
                src=trace.rng.integers(1 << 24, 3 << 24, n))  # fmt: skip
    trace.walks(6)
    m = Model(HookInfo("fentry"), Clock(0), START, memory=4 << 20)
    for batch in trace.batches(6):
        m.update(batch)
    why = m.snapshot().why
    if cause == "unknown":
        assert not {"syn-flood", "udp-flood", "scan"} & {one.id for one in why}, why
    else:
        assert why[0].id == cause, why
        assert [one for one in why[0].remedies if proto == 6 or "udp_timeout" in one.text]


def test_a_flood_to_a_name_server_is_not_told_as_its_answers() -> None:
    trace = Trace(seed=7)
    src = trace.rng.integers(0x0B000000, 0xDF000000, 200 * 40)
    trace.flows(steady(200, 40, trace.rng), 0, 10.0, src=src, proto=17, dport=53, status=UNREPLIED)
    assert run(trace, 35).why[0].id == "udp-flood"


@pytest.mark.parametrize(("cause", "shape", "until", "limit"), LOOKALIKES)
def test_not_mistaken(cause: str, shape: Shape, until: float, limit: int) -> None:
    assert cause not in {c.id for c in told(shape, until, limit).why}


def test_the_share_is_of_what_is_spoken_of() -> None:
    """Of 3,000 entries of one service two in three wait out TIME_WAIT."""
    trace = Trace(seed=7)
    trace.existing(2000, state=TIME_WAIT)
    trace.existing(1000)
    trace.walks(12)
    cause = run(trace, 12).why[0]
    assert cause.id == "time-wait"
    found = re.search(r": ([0-9]+) % of 3,000 entries are closed", cause.text)
    assert found, cause.text
    assert int(found[1]) == pytest.approx(67, abs=7)


def test_what_no_cause_explains_stands_beside_one_that_explains_little() -> None:
    """Honest connections of many services, and some hundreds that wait out TIME_WAIT."""
    trace = Trace(seed=7)
    trace.existing(300, state=TIME_WAIT, dport=9443)
    legitimate(trace)
    trace.walks(50)
    s = run(trace, 50)
    assert [one.id for one in s.why] == ["time-wait", "unknown"]
    left = 100 - 30000 / s.tables[0].count
    found = re.fullmatch(
        r"([0-9]+) % of ([0-9,]+) entries fit no known cause; no service has more than ([0-9.]+) %",
        s.why[1].text,
    )
    assert found, s.why[1].text
    assert int(found[1]) == pytest.approx(left, abs=3)
    assert float(found[3]) == pytest.approx(left / 12, abs=1)


def test_the_shape_of_each_full_namespace_is_told() -> None:
    trace = Trace(seed=7)
    trace.flows(steady(80, 60, trace.rng), 0.2, 20.0, netns=OTHER, dport=8080)
    for port in range(9000, 9016):
        trace.existing(100, proto=132, dport=port)
    why = run(trace, 50, limit=1600).why
    assert [(one.id, one.netns) for one in why] == [("no-keepalive", OTHER), ("unknown", NETNS)]
    assert why[1].text.startswith("100 % of 1,600 entries in init fit no known cause; no service")


def test_a_namespace_that_holds_nothing_any_more_has_no_cause() -> None:
    trace = Trace(seed=9)
    trace.flows(steady(80, 60, trace.rng), 0.2, 20.0, dport=8080)
    trace.flows(steady(100, 20, trace.rng), 0.02, 10.0, proto=17, dport=5060, netns=OTHER)
    why = run(trace, 60).why
    assert {one.netns for one in why} == {NETNS}, [one.text for one in why]


def test_a_leak_that_pauses_for_a_second_is_one() -> None:
    trace = Trace(seed=7)
    trace.flows(steady(80, 11, trace.rng), 0.01, 432000.0, dport=9200, state=ESTABLISHED)
    trace.walks(12)
    snapshot = run(trace, 12)
    assert snapshot.culprits[0].new_per_s == 0
    assert snapshot.why[0].id == "leak"


def test_the_why_line() -> None:
    assert re.fullmatch(
        r"tcp/8063 from 10\.0\.0\.7: 95 % of 6,[0-9]{3} entries are closed connections waiting "
        r"out TIME_WAIT \(they live 4\.[0-9] ms, their entries stay (19|20) s\)",
        told(no_keepalive, 50).why[0].text,
    )


@pytest.mark.parametrize(
    ("shape", "until"), [(dns, 63), (one_way, 63), (tunnel, 63), (flood, 43), (udp_flood, 43)]
)
def test_what_came_in_a_burst_is_not_said_to_come_at_none_a_second(
    shape: Shape, until: float
) -> None:
    snapshot = told(shape, until)
    assert snapshot.tables[0].rates.insert == 0
    said = "; ".join(one for cause in snapshot.why for one in (cause.text, *cause.evidence))
    assert not re.search(r"(?<![0-9,.])0 (new|a second|come)", said), said


def test_a_table_that_is_too_small_says_how_long_its_entries_stay_as_the_rows_do() -> None:
    """They live for 10 to 20 s, and stay for 2 s more."""
    text = told(legitimate, 50, 1500).why[0].text
    found = re.fullmatch(
        r"init: 1,500 entries are too few for this load "
        r"\([0-9]+ new/s, their entries stay ([0-9]+) s\)",
        text,
    )
    assert found, text
    assert int(found[1]) == pytest.approx(17, abs=2)


def test_looks_name_the_cause_before_any_entry_ends() -> None:
    """Twelve seconds are enough, though TIME_WAIT keeps every entry for 120."""
    trace = Trace(seed=7)
    trace.flows(steady(20, 12, trace.rng), 0.004, 120.0)
    trace.looks()
    snapshot = run(trace, 12)
    assert snapshot.culprits[0].destroys == 0
    assert snapshot.culprits[0].closed == 1.0
    assert snapshot.culprits[0].life.p50 == pytest.approx(0.004, rel=0.125, abs=0.001)
    assert snapshot.why[0].id == "no-keepalive"
    assert "their entries stay 120 s" in snapshot.why[0].text


def test_looks_at_young_entries_name_the_cause_before_any_other_looks() -> None:
    """A second after the load began, with the table itself not looked at yet."""
    trace = Trace(seed=7)
    trace.flows(steady(200, 3, trace.rng), 0.004, 120.0)
    trace.looks()
    why = run(trace, 3).why
    assert why[0].id == "no-keepalive", why
    assert "(they live 3.9 ms, their entries stay 120 s)" in why[0].text
    trace = Trace(seed=7)
    trace.flows(steady(200, 3, trace.rng), 0.02, 30.0, proto=17, dport=1812, status=SEEN_REPLY)
    trace.looks()
    assert run(trace, 3).why[0].id == "answered-udp"


def test_looks_at_living_connections_name_nothing() -> None:
    trace = Trace(seed=7)
    trace.flows(steady(20, 12, trace.rng), 60.0, 120.0)
    trace.looks((1.0, 4.0))
    snapshot = run(trace, 12)
    assert [c.id for c in snapshot.why] == ["unknown"]
    assert snapshot.culprits[0].life.n == 0
    assert snapshot.culprits[0].held == snapshot.culprits[0].inserts


ONE_WAY = Stray("10.0.0.1", "tcp", 80, "one-way", 40)


@pytest.mark.parametrize(
    ("each", "looked_at", "cause"),
    [
        (5, (), "one-way-tcp"),
        (0, (), "syn-flood"),
        (0, (ONE_WAY,), "one-way-tcp"),
        (5, (replace(ONE_WAY, why="syn-ack"),), "syn-flood"),
        (5, (replace(ONE_WAY, port=443),), "syn-flood"),
    ],
)
def test_a_host_that_sees_one_direction_is_not_flooded(
    each: int, looked_at: tuple[Stray, ...], cause: str
) -> None:
    """What follows a SYN whose answer passes elsewhere is INVALID; ``each``: of every entry."""
    trace = Trace(seed=7)
    flood(trace)
    m = Model(HookInfo("fentry"), Clock(0), START)
    for number, batch in enumerate(trace.batches(35, limit=40_000)):
        tables = tuple(
            replace(one, stats={**one.stats, "invalid": each * 1000 * number})
            for one in batch.tables
        )
        m.update(replace(batch, tables=tables, beside=(Beside(NETNS, strays=looked_at),)))
    why = m.snapshot().why
    assert why[0].id == cause
    assert any("SYN proxy" in one.text for one in why[0].remedies) == (cause == "syn-flood")


def test_who_asks_ever_other_name_servers_is_told_of_no_caching_resolver() -> None:
    for servers, words in ((4000, "a larger cache"), (1, "a caching resolver on the host")):
        trace = Trace(seed=7)
        dst = 0x0C000000 + np.arange(100 * 40) % servers
        trace.flows(steady(100, 40, trace.rng), 0.01, 30.0, dst=dst, proto=17, dport=53,
                    direction=int(Direction.OUT))  # fmt: skip
        assert words in run(trace, 35).why[0].remedy


def test_connections_that_were_reset_do_not_wait_out_time_wait() -> None:
    trace = Trace(seed=7)
    trace.flows(steady(90, 12, trace.rng), 0.001, 10.0, dport=3389, state=CLOSE)
    trace.walks(12)
    why = run(trace, 12).why
    assert "were reset" in why[0].text
    assert "TIME_WAIT" not in why[0].text


def test_a_scan_by_one_source() -> None:
    trace = Trace(seed=7)
    n = 200 * 40
    ports = trace.rng.integers(1, 65535, n)
    trace.flows(steady(200, 40, trace.rng), 0, 10.0, src="10.6.6.6", dport=ports,
                status=UNREPLIED, state=SYN_SENT)  # fmt: skip
    why = run(trace, 35).why
    assert why[0].id == "scan"
    assert "10.6.6.6" in why[0].text
    assert "limit" not in {one.id for one in why[0].remedies}, "no port stands out"


@pytest.mark.parametrize("rate", [200, 40])
def test_a_scan_of_a_few_ports_can_be_slowed_down(rate: int) -> None:
    """By rules that can stand beside each other: the scanner may be one's own. Not by a limit that
    it keeps anyway."""
    trace = Trace(seed=7)
    dst = trace.rng.integers(0xC6120000, 0xC613FFFF, rate * 40)
    ports = trace.rng.choice([22, 3389, 8080, 8080], rate * 40)
    trace.flows(steady(rate, 40, trace.rng), 0, 120.0, src="10.6.6.6", dst=dst, dport=ports,
                status=UNREPLIED, state=SYN_SENT, direction=int(Direction.FORWARD))  # fmt: skip
    trace.walks(38)
    why = run(trace, 38).why
    assert why[0].id == "scan", why
    stop, slower = why[0].remedies[:2]
    assert (stop.id, slower.id == "limit") == ("drop-source", rate > 50)
    if rate < 50:
        return
    assert "tcp/8080" in slower.text
    assert len({one.split("add chain")[0] for one in slower.commands}) == 3
    assert slower.option.split()[::2] == ["--limit-source"] * 3


def test_who_asks_the_same_dead_hosts_again_and_again_does_not_scan() -> None:
    trace = Trace(seed=7)
    dst = 0xC6120000 + np.arange(60 * 40) % 60
    trace.flows(steady(60, 40, trace.rng), 0, 120.0, dst=dst, dport=9100, status=UNREPLIED,
                state=SYN_SENT, direction=int(Direction.OUT))  # fmt: skip
    trace.walks(38)
    why = run(trace, 38).why
    assert why[0].id == "unanswered", why
    assert "nobody answers" in why[0].text


def test_what_goes_at_once_is_no_part_of_nothing() -> None:
    trace = Trace(seed=7)
    trace.flows(steady(200, 20, trace.rng), 0, 0.0005, dport=8080, status=UNREPLIED,
                state=SYN_SENT, reason=Reason.DELETED, direction=int(Direction.OUT))  # fmt: skip
    (why,) = run(trace, 20, limit=ROOMY).why
    assert why.id == "unknown"
    assert "nothing held now, most of what was is tcp/8080 from 10.0.0.7" in why.text


@pytest.mark.parametrize(
    ("first", "ports", "words"),
    [
        (69, 1, "TFTP requests, whose answers come from another port"),
        (33434, 30, "probes of traceroute, which only ICMP errors answer"),
    ],
)
def test_datagrams_that_nothing_answers_as_such(first: int, ports: int, words: str) -> None:
    trace = Trace(seed=7)
    n = np.arange(90 * 30)
    trace.flows(steady(90, 30, trace.rng), 0, 30.0, src=0x0A2A0000 + n % 40, proto=17,
                dport=first + n // 40 % ports, status=UNREPLIED)  # fmt: skip
    trace.walks(29)
    why = run(trace, 30).why
    assert why[0].id == "one-way-udp"
    assert words in why[0].text
    assert not [one for one in why[0].remedies if "fixed source port" in one.text]


def test_peers_of_a_tunnel_expire_as_streams() -> None:
    trace = Trace(seed=7)
    src = 0x0AC80000 + np.arange(10 * 30)
    trace.flows(steady(10, 30, trace.rng), 0, 120.0, proto=17, dport=51820, src=src)
    trace.walks(29)
    why = run(trace, 29).why
    assert why[0].id == "tunnel"
    assert [one for one in why[0].remedies if "nf_conntrack_udp_timeout_stream" in one.text]


def test_a_resolver_is_not_told_to_have_one() -> None:
    """It answers its clients, and asks ever other servers."""
    trace = Trace(seed=7)
    n = 60 * 40
    trace.flows(steady(60, 40, trace.rng), 0.002, 30.0, proto=17, dport=53,
                src=0x0A2A0000 + np.arange(n) % 60)  # fmt: skip
    dst = 0xC6120000 + np.arange(90 * 40) % 200
    trace.flows(steady(90, 40, trace.rng), 0.002, 30.0, proto=17, dport=53, src="10.0.0.9",
                direction=int(Direction.OUT), dst=dst)  # fmt: skip
    why = run(trace, 38).why
    assert why[0].id == "dns-storm"
    assert "those that it answers and its own" in why[0].text
    assert "a caching resolver" not in why[0].remedy
    assert "a larger cache" in why[0].remedy


def test_what_is_in_one_zone_is_named_and_deleted_with_it() -> None:
    trace = Trace(seed=7)
    trace.flows(steady(40, 20, trace.rng), 0, 3600.0, dport=8443, state=CLOSE_WAIT, zone=5)
    trace.walks(19)
    why = run(trace, 19).why
    assert why[0].id == "half-closed", why
    assert "tcp/8443 from 10.0.0.7 in zone 5:" in why[0].text
    commands = [line for one in why[0].remedies for line in one.commands]
    assert [line for line in commands if line.startswith("conntrack -D") and " -w 5" in line]


def test_answers_that_miss_their_zone_are_no_scan() -> None:
    """Rules put requests into a zone and forget their answers, which are INVALID, or taken up."""
    trace = Trace(seed=7)
    trace.flows(steady(80, 30, trace.rng), 0, 120.0, dport=8000, status=UNREPLIED, state=SYN_SENT,
                direction=int(Direction.FORWARD), zone=7)  # fmt: skip
    ports = 32768 + np.arange(80 * 30) % 20000
    trace.flows(steady(80, 30, trace.rng), 0, 120.0, src="10.0.0.9", dst="10.0.0.7", dport=ports,
                status=UNREPLIED, state=FIN_WAIT, direction=int(Direction.FORWARD))  # fmt: skip
    trace.walks(29)
    why = run(trace, 29, limit=ROOMY, invalid=200).why
    assert not {"scan", "syn-flood"} & {one.id for one in why}
    (one,) = (one for one in why if one.id == "one-way-tcp")
    assert "zone 7 sees one direction only" in one.text


def test_a_few_sources_of_half_open_connections_are_counted_not_named() -> None:
    trace = Trace(seed=7)
    src = 0x0A060600 + np.arange(200 * 40) % 30
    trace.flows(steady(200, 40, trace.rng), 0, 15.0, src=src, dport=2049, status=UNREPLIED,
                state=SYN_SENT)  # fmt: skip
    why = run(trace, 35).why
    assert why[0].id == "syn-flood"
    assert "half-open connections from 30 sources" in why[0].text


def test_unknown_is_an_answer() -> None:
    trace = Trace(seed=7)
    trace.flows(steady(5, 30, trace.rng), 12.0, 3.0, state=ESTABLISHED)
    why = run(trace, 30).why
    assert [c.id for c in why] == ["unknown"]
    assert "tcp/8063" in why[0].text


def test_nothing_yet() -> None:
    m = Model(HookInfo("fentry"), Clock(0), START)
    assert [c.id for c in m.snapshot().why] == ["unknown"]


def test_evicted_floods_are_still_floods() -> None:
    trace = Trace(seed=7)
    n = 1000 * 30
    src = trace.rng.integers(0x0B000000, 0xDF000000, n)
    trace.flows(steady(1000, 30, trace.rng), 0, 4.0, src=src, dport=80, status=UNREPLIED,
                state=SYN_SENT, reason=Reason.EVICTED)  # fmt: skip
    s = run(trace, 30, limit=5000)
    assert s.why[0].id == "syn-flood"
    assert s.tables[0].totals.early_drop > 0
    assert sum(v.evicted for v in s.victims) > 0


def test_streams_in_use_are_named_and_not_shortened() -> None:
    why = told(streams, 12).why
    assert why[0].id == "udp-streams", why
    helps = (*why[0].remedies, *why[0].at_need)
    assert not [one for one in helps if one.id == "sysctl-timeout"]


def test_who_asks_a_server_is_not_told_to_cache() -> None:
    trace = Trace(seed=7)
    src = 0x0A2A0000 + trace.rng.integers(1, 6000, 300 * 40)
    trace.flows(steady(300, 40, trace.rng), 0.002, 10.0, proto=17, dport=53, src=src)
    why = run(trace, 38).why
    assert why[0].id == "dns-storm"
    assert "it answers" in why[0].text
    assert not [one for one in why[0].at_need if "resolver" in one.text]


def test_a_scanner_of_this_host_is_stopped_where_it_runs() -> None:
    """A rule before routing does not meet what the host itself sends."""
    trace = Trace(seed=7)
    dst = trace.rng.integers(0x0B000000, 0xDF000000, 200 * 40)
    trace.flows(steady(200, 40, trace.rng), 0, 60.0, src="10.6.6.6", dst=dst, dport=443,
                status=UNREPLIED, state=SYN_SENT, direction=int(Direction.OUT))  # fmt: skip
    trace.walks(38)
    why = run(trace, 38).why
    assert why[0].id == "scan", why
    assert [one.id for one in why[0].remedies] == ["change", "sysctl-timeout"]
    assert "syn-flood" not in {one.id for one in why}


def test_tunnels_have_timeouts_of_their_own() -> None:
    trace = Trace(seed=7)
    trace.flows(steady(100, 40, trace.rng), 0, 30.0, proto=47, dport=0, status=UNREPLIED)
    why = run(trace, 38, limit=ROOMY).why
    assert why[0].id == "tunnel", why
    assert [one for one in why[0].at_need if "nf_conntrack_gre_timeout" in one.text]


def test_why_names_what_who_names() -> None:
    """Seven ports of one load are one cause, and not one of them, second after second."""
    trace = Trace(seed=7)
    n = 350 * 40
    src = trace.rng.integers(0x0A010000, 0x0A010FA0, n)
    ports = trace.rng.integers(10000, 10007, n)
    trace.flows(steady(350, 40, trace.rng), 0, 10.0, src=src, proto=17, dport=ports,
                status=UNREPLIED)  # fmt: skip
    for until in (30, 33, 36):
        snapshot = run(trace, until)
        assert snapshot.who[0].text.startswith("udp/10000-10006")
        assert [one.id for one in snapshot.why] == ["one-way-udp"], snapshot.why
        assert snapshot.why[0].text.startswith(f"{snapshot.who[0].text}: ")


def test_of_many_namespaces_the_fullest_are_explained() -> None:
    trace = Trace(seed=7)
    for number in range(60):
        trace.flows(np.linspace(0, 5, 40), 1.0, 60.0, netns=NETNS + 1 + number, dport=8080)
    trace.flows(steady(100, 60, trace.rng), 0.004, 20.0, netns=OTHER, dport=8063)
    why = run(trace, 50).why
    assert (why[0].id, why[0].netns, why[0].port) == ("no-keepalive", OTHER, 8063)


def test_many_services_of_one_namespace_leave_room_for_another_ones() -> None:
    trace = Trace(seed=7)
    for port in range(9000, 9040):
        trace.flows(np.linspace(0, 5, 200), 100.0, 60.0, netns=OTHER, dport=port)
    trace.flows(steady(5, 60, trace.rng), 0.004, 20.0)
    found = {(one.id, one.netns, one.port) for one in run(trace, 50).why}
    assert ("no-keepalive", NETNS, 8063) in found, found


def test_the_timeout_in_force_is_the_one_that_looks_tell() -> None:
    """Somebody has raised it: what is proposed, and what takes it back, begin from there."""
    trace = Trace(seed=7)
    trace.flows(steady(100, 12, trace.rng), 0, 3600.0, dport=8080, state=5)  # CLOSE_WAIT
    trace.walks(12)
    why = run(trace, 12).why
    assert why[0].id == "half-closed", why
    (shorter,) = [one for one in why[0].remedies if one.id == "sysctl-timeout"]
    setting = "net.netfilter.nf_conntrack_tcp_timeout_close_wait"
    assert shorter.commands == (f"sysctl -w {setting}=60",)
    assert shorter.undo == (f"sysctl -w {setting}=3600",)


def test_a_timeout_that_something_raised_is_told() -> None:
    trace = Trace(seed=7)
    trace.flows(steady(40, 20, trace.rng), 3.0, 3600.0, proto=17, dport=5683)
    trace.walks(19)
    why = run(trace, 19).why
    assert why[0].id in ("answered-udp", "udp-streams"), why
    assert "nf_conntrack_udp_timeout_stream is 3,600 s here, 120 s by default" in why[0].text
    (helps,) = (one for one in why[0].remedies if one.id == "sysctl-timeout")
    assert "from 3600 s to 30 s" in helps.text
    assert helps.undo == ("sysctl -w net.netfilter.nf_conntrack_udp_timeout_stream=3600",)


@pytest.mark.parametrize(("sources", "flood"), [(1 << 28, True), (200, False)])
def test_pings_of_ever_new_sources_are_a_flood(sources: int, flood: bool) -> None:
    trace = Trace(seed=7)
    src = trace.rng.integers(0x0B000000, 0x0B000000 + sources, 100 * 30)
    trace.flows(steady(100, 30, trace.rng), 0, 30.0, proto=1, dport=0, src=src)
    why = run(trace, 29).why
    assert why[0].id == "pings"
    assert ("(ping flood)" in why[0].text) == flood
    assert any("ping less often" in one.text for one in why[0].remedies) != flood
