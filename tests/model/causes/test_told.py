"""What is told beside a cause's name: shares, sentences, namespaces, timeouts."""

from __future__ import annotations

import re

import numpy as np
import pytest
from kit.loads.causes import (
    CLOSE_WAIT,
    OTHER,
    ROOMY,
    SEEN_REPLY,
    UNREPLIED,
    Shape,
    dns,
    flood,
    legitimate,
    no_keepalive,
    one_way,
    run,
    told,
    tunnel,
    udp_flood,
)
from kit.shapes import ESTABLISHED, NETNS, TIME_WAIT, Trace, steady


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


def test_what_is_in_one_zone_is_named_and_deleted_with_it() -> None:
    trace = Trace(seed=7)
    trace.flows(steady(40, 20, trace.rng), 0, 3600.0, dport=8443, state=CLOSE_WAIT, zone=5)
    trace.walks(19)
    why = run(trace, 19).why
    assert why[0].id == "half-closed", why
    assert "tcp/8443 from 10.0.0.7 in zone 5:" in why[0].text
    commands = [line for one in why[0].remedies for line in one.commands]
    assert [line for line in commands if line.startswith("conntrack -D") and " -w 5" in line]


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
