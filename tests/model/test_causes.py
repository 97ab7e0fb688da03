"""Each cause is named on its own shape, and stays silent on its look-alike."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from kit.shapes import ESTABLISHED, NETNS, START, SYN_SENT, Trace, steady

from ctrace.batch import Batch, Clock, HookInfo, Names, Netns
from ctrace.model.model import Model
from ctrace.model.snapshot import Snapshot
from ctrace.record import Reason

UNREPLIED = 0
OTHER = 4026532500


def run(trace: Trace, until: float, limit: int = 262_144) -> Snapshot:
    m = Model(HookInfo("fentry"), Clock(0), START)
    names = Names(netns={NETNS: Netns(NETNS, "init"), OTHER: Netns(OTHER, "web")})
    seen = {int(n) for n in np.unique(trace.events()["netns"])}
    names = Names(netns={k: v for k, v in names.netns.items() if k in seen})
    m.update(Batch(trace.events(0)[:0], START, names=names))
    for batch in trace.batches(until, limit=limit):
        m.update(batch)
    return m.snapshot()


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


SHAPES: list[tuple[str, Callable[[Trace], None], float, int]] = [
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
]

LOOKALIKES: list[tuple[str, Callable[[Trace], None], float, int]] = [
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
]


@pytest.mark.parametrize(("cause", "shape", "until", "limit"), SHAPES)
def test_recognised(cause: str, shape: Callable[[Trace], None], until: float, limit: int) -> None:
    trace = Trace(seed=7)
    shape(trace)
    why = run(trace, until, limit=limit).why
    assert why[0].id == cause, why
    assert why[0].evidence
    assert why[0].remedy
    assert any(char.isdigit() for char in why[0].text)


@pytest.mark.parametrize(("cause", "shape", "until", "limit"), LOOKALIKES)
def test_not_mistaken(cause: str, shape: Callable[[Trace], None], until: float, limit: int) -> None:
    trace = Trace(seed=7)
    shape(trace)
    assert cause not in {c.id for c in run(trace, until, limit=limit).why}


def test_the_why_line() -> None:
    trace = Trace(seed=7)
    no_keepalive(trace)
    assert re.fullmatch(
        r"tcp/8063 from 10\.0\.0\.7: 95 % of 6,[0-9]{3} entries are closed connections waiting "
        r"out TIME_WAIT \(they live 4 ms, their entries stay (19|20) s\)",
        run(trace, 50).why[0].text,
    )


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


def test_looks_at_living_connections_name_nothing() -> None:
    trace = Trace(seed=7)
    trace.flows(steady(20, 12, trace.rng), 60.0, 120.0)
    trace.looks((1.0, 4.0))
    snapshot = run(trace, 12)
    assert [c.id for c in snapshot.why] == ["unknown"]
    assert snapshot.culprits[0].life.n == 0
    assert snapshot.culprits[0].held == snapshot.culprits[0].inserts


def test_a_scan_by_one_source() -> None:
    trace = Trace(seed=7)
    n = 200 * 40
    ports = trace.rng.integers(1, 65535, n)
    trace.flows(steady(200, 40, trace.rng), 0, 10.0, src="10.6.6.6", dport=ports,
                status=UNREPLIED, state=SYN_SENT)  # fmt: skip
    why = run(trace, 35).why
    assert why[0].id == "scan"
    assert "10.6.6.6" in why[0].text


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
