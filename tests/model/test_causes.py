"""Each cause is named on its own shape, and stays silent on its look-alike."""

from __future__ import annotations

import numpy as np
import pytest
from kit.loads.causes import (
    CLOSE,
    ROOMY,
    SEEN_REPLY,
    UNREPLIED,
    Shape,
    ack_flood,
    agents,
    answered_udp,
    both_roomy,
    burst,
    busy_established,
    clash,
    clash_when_full,
    dns,
    exchanges,
    few_lookups,
    first_burst,
    flood,
    in_use,
    kept_alive,
    leak,
    legitimate,
    loopback,
    no_answer,
    no_keepalive,
    old_leak,
    old_streams,
    old_time_wait,
    one_way,
    one_way_tcp,
    opened_and_closed,
    other_full,
    popular,
    probes_from_outside,
    quiet,
    refused,
    rising,
    run,
    streams,
    told,
    tunnel,
    udp_flood,
    udp_scan,
    unused,
)
from kit.shapes import ESTABLISHED, START, SYN_SENT, TIME_WAIT, Trace, steady

from ctrace.batch import Clock, HookInfo
from ctrace.model.model import Model
from ctrace.record import Direction, Reason
from ctrace.view.verdict import verdict

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
