"""Who floods and who scans, told from those that are only many or only unanswered."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from kit.loads.causes import FIN_WAIT, ROOMY, UNREPLIED, flood, run
from kit.shapes import NETNS, START, SYN_SENT, Trace, steady

from ctrace.batch import Clock, HookInfo
from ctrace.beside import Beside, Stray
from ctrace.model.model import Model
from ctrace.record import Direction

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
