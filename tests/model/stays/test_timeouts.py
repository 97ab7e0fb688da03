"""Lives and stays under timeouts that change, and in shares that collections put off."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.loads import entries
from kit.loads.packets import call
from kit.shapes import START, Trace

from ctrace.batch import Clock, HookInfo
from ctrace.model import stays
from ctrace.model.composition import by_settings
from ctrace.model.model import Model
from ctrace.model.snapshot import Culprit
from ctrace.record import Kind


def lowered(trace: Trace, lives: npt.NDArray[np.float64]) -> Culprit:
    """The service once all have ended, of which TIME_WAIT was lowered from 25 to 5 s meanwhile."""
    ends = trace.flows(np.linspace(0, 2, len(lives)), lives, 25.0)
    trace.looks()
    met = ends[:100].copy()
    met["ts"], met["kind"], met["reason"] = START + 10_000_000_000, int(Kind.MET), 0
    met["idle_ms"], met["timeout_ms"], met["overdue_ms"] = -1, 0, -17_000  # more than is in force
    trace.parts.append(met)
    ends["idle_ms"] = 5000  # as the timeout in force tells
    model = Model(HookInfo("fentry"), Clock(0), START)
    for batch in trace.batches(60):
        model.update(batch)
        if batch.until == START + 11_000_000_000:
            made_of = model.snapshot("service").culprits[0].composition
            assert (made_of.other_timeout, by_settings(made_of)) == (1.0, False)
    row = model.snapshot("service").culprits[0]
    assert (row.held, row.destroys) == (0, len(lives))
    return row


@pytest.mark.parametrize(("old", "late"), [(12.0, 4.0), (4.0, 12.0)])
def test_a_timeout_that_changed_while_nobody_looked_gives_no_life(old: float, late: float) -> None:
    """One datagram each; the recorder gets no processor, so it has only what the kernel noted."""
    packets = [
        entries.Packet(at, 17, 1024 + n, 53, entries.ANY, 0, "udp")
        for n, at in enumerate(np.linspace(0, 60, 3000).tolist())
    ]
    later = (30.0, {"udp": late})
    table = entries.Table({"udp": old}, 70, looks=0, later=later)
    model, told = Model(HookInfo("fentry"), Clock(0), 0), []
    for batch in table.run(packets):
        model.update(batch)
        told += [one.life.p50 for one in model.snapshot("service").culprits]
    assert all(life is None or life < 0.01 for life in told), max(x or 0.0 for x in told)


def test_lives_under_a_timeout_that_was_lowered_are_told_by_looks_at_young_ones() -> None:
    trace = Trace(seed=11)
    row = lowered(trace, np.full(400, 0.004))
    assert row.life.p50 == pytest.approx(0.004, rel=0.125, abs=0.001)
    assert row.life.p99 is not None
    assert row.life.p99 < 0.01
    assert 0 < row.life.n <= 400


@pytest.mark.parametrize(("short", "known"), [(0.7, True), (0.3, False)])
def test_those_that_lived_on_when_they_were_looked_at_are_the_longer_ones(
    short: float, known: bool
) -> None:
    trace = Trace(seed=12)
    lives = np.where(trace.rng.random(400) < short, 0.004, 6.0)
    life = lowered(trace, lives).life
    assert (life.p50 is not None, life.p90) == (known, None)
    assert life.p50 is None or life.p50 < 0.01


def test_what_is_left_of_a_timeout_is_told_by_fresh_looks() -> None:
    trace = Trace(seed=9)
    trace.flows(np.linspace(0, 1, 300), 0.0, 60.0, proto=17, dport=53, status=0)
    trace.walks(10)
    model = Model(HookInfo("fentry"), Clock(0), START)
    for batch in trace.batches(30):  # nothing was looked at after the tenth second
        model.update(batch)
        made_of = model.snapshot("service").culprits[0].composition
        left = made_of.left.p50
        passed = (int(batch.until) - START) / 1e9
        assert left is None or left == pytest.approx(60.5 - passed, abs=3)
        assert (left is None) == (made_of.left.n == 0)
    assert (left, made_of.unreplied) == (None, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("raised", [80.0, 0.0])
def test_streams_under_a_timeout_that_was_raised_do_not_seem_to_live_shorter(raised: float) -> None:
    """Streams of 60 s whose timeout is 40 s, and then 80 s: it may be unknown, but never 20 s."""
    packets = [
        entries.Packet(at + second, 17, 1024 + n, 53, entries.ANY, entries.ASSURED, "udp_stream")
        for n, at in enumerate(np.linspace(0, 20, 300).tolist())
        for second in range(0, 61, 4)
    ]
    later = (85.0, {"udp_stream": raised}) if raised else (math.inf, {})
    table = entries.Table({"udp_stream": 40.0}, 170, looks=60, later=later)
    model, told = Model(HookInfo("fentry"), Clock(0), 0), []
    for second, batch in enumerate(table.run(packets)):
        model.update(batch)
        if second >= 80 and second % 5 == 0:
            told.append(model.snapshot("service").culprits[0].life.p50)
    assert all(life is None or life == pytest.approx(60.0, rel=0.15) for life in told), told
    assert told[-1] is not None or raised


def test_shares_after_a_collection_are_of_what_it_left() -> None:
    """Closed connections that have expired go all at once, open ones stay: what was looked at in
    the seconds before is no sample of the rest."""
    closed, opened = (
        [
            entries.Packet(at, 6, 1024 + n, port, state, entries.ASSURED, timeout)
            for n, at in enumerate(np.linspace(0, 40, many).tolist())
        ]
        for many, port, state, timeout in (
            (1500, 8063, entries.TIME_WAIT, "tcp_time_wait"),
            (500, 8064, entries.ESTABLISHED, "tcp_established"),
        )
    )
    settings = {"tcp_time_wait": 30.0, "tcp_established": 432_000.0}
    table = entries.Table(settings, 60, looks=100, first_pass=58.0)
    model = Model(HookInfo("fentry"), Clock(0), 0)
    for batch in table.run([*closed, *opened])[:60]:
        model.update(batch)
    here = model.snapshot("netns")
    whole, (table_,) = here.culprits[0], here.tables
    truth = (whole.held - 500) / whole.held
    assert truth < 0.6, "most closed ones have gone"
    for made_of in (whole.composition, table_.composition):
        assert made_of.closed == pytest.approx(truth, abs=made_of.closed_error)


def test_what_is_known_of_a_key_outlives_a_collection_of_others() -> None:
    """Closed connections stay, more datagrams than these expire at once: few looks came since."""
    packets = [
        entries.Packet(at, proto, 1024 + n, port, state, entries.ASSURED, timeout)
        for many, proto, port, state, timeout in (
            (100, 6, 8063, entries.TIME_WAIT, "tcp_time_wait"),
            (150, 17, 53, entries.ANY, "udp"),
        )
        for n, at in enumerate(np.linspace(0, 5, many).tolist())
    ]
    table = entries.Table({"tcp_time_wait": 120.0, "udp": 15.0}, 32, looks=15, first_pass=25.5)
    model = Model(HookInfo("fentry"), Clock(0), 0)
    for batch in table.run(packets)[:27]:
        model.update(batch)
    (row,) = (one for one in model.snapshot("service").culprits if one.held)
    assert row.held == 100
    assert row.residence.p50 == pytest.approx(120, rel=0.05)
    assert row.closed == pytest.approx(1.0, abs=row.composition.closed_error)
    assert row.composition.n >= 30


@pytest.mark.parametrize("streams", [200, 0])
def test_the_few_short_ones_that_ended_do_not_tell_how_long_streams_live(streams: int) -> None:
    """Probes without an answer expire after 10 s; streams go on: none of them can have ended."""
    packets = [
        entries.Packet(float(at), 17, 1024 + n, 53, entries.ANY, entries.ASSURED, "udp_stream")
        for n in range(streams)
        for at in range(2, 100, 5)
    ]
    packets += [
        entries.Packet(float(n), 17, 30_000 + n, 53, entries.ANY, 0, "udp") for n in range(100)
    ]
    settings = {"udp": 10.0, "udp_stream": 120.0}
    table = entries.Table(settings, 100, looks=100, first_pass=15.0)
    model = Model(HookInfo("fentry"), Clock(0), 0)
    for batch in table.run(packets)[:90]:
        model.update(batch)
    life = model.snapshot("service").culprits[0].life
    assert life.n >= 10
    assert (life.p50 is None) == bool(streams)


@pytest.mark.slow
def test_closed_ones_under_a_shorter_timeout_do_not_seem_to_have_lived_until_now() -> None:
    """TIME_WAIT is lowered from 40 to 8 s under 300 connections of 2 ms, and no other comes."""
    packets = [
        one for n, at in enumerate(np.linspace(0, 10, 300).tolist()) for one in call(at, n, 0.0)
    ]
    settings = {"tcp_syn_sent": 120.0, "tcp_established": 432_000.0, "tcp_time_wait": 40.0}
    table = entries.Table(
        settings, 70, looks=60, first_pass=58.0, later=(15.0, {"tcp_time_wait": 8})
    )
    model, told = Model(HookInfo("fentry"), Clock(0), 0), []
    for batch in table.run(packets):
        model.update(batch)
        told.append(model.snapshot("service").culprits[0].life.p50)
    assert all(life is None or life < 0.1 for life in told), told


@pytest.mark.slow
def test_ends_with_the_age_of_an_earlier_entry_tell_no_life() -> None:
    """One-way flows of 7 s under a setting of 30 s, which the kernel's settings would have idle for
    30 s; addresses are used again at once, and events of 40 s are lost."""
    trace = Trace(seed=14)
    at = np.arange(0, 80, 0.05)
    ends = trace.flows(at, 0.0, 7.0, proto=17, dport=53, status=0)
    for part in trace.parts:
        part["ct"] = part["ct"][np.arange(len(at)) % 150]
    ends["idle_ms"] = 30_000
    trace.parts = [
        part[(part["ts"] < START + 15 * 10**9) | (part["ts"] > START + 55 * 10**9)]
        for part in trace.parts
    ]
    model = Model(HookInfo("fentry"), Clock(0), START)
    for batch in trace.batches(80):
        model.update(batch)
        assert model.snapshot("service").culprits[0].life.p50 is None


@pytest.mark.parametrize("shortest", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("passes", [8, 20, 60])
def test_how_far_so_many_collections_put_a_share_off(passes: int, shortest: float) -> None:
    """Not by a model of a table: entries expire evenly, and each waits for the end of its pause."""
    rng = np.random.default_rng(passes)
    off, middle = [], _middle_wait(shortest)
    for _ in range(1000):
        pauses = rng.uniform(shortest, 1.0, passes)
        waited_less = np.minimum(pauses, middle).sum() / pauses.sum()
        off.append(abs(waited_less - 0.5) * math.sqrt(len(pauses)))
    assert np.mean(np.array(off) <= stays.TOGETHER) > 0.92


def _middle_wait(shortest: float) -> float:
    """The time that half of all wait for less, of pauses from ``shortest`` to 1."""
    pauses = np.linspace(shortest, 1.0, 1001)
    tries = np.linspace(0.0, 1.0, 2001)
    shares = np.minimum(pauses[:, None], tries).sum(axis=0) / pauses.sum()
    return float(np.interp(0.5, shares, tries))


@pytest.mark.slow
def test_flows_first_looked_at_after_their_timeout_was_lowered_do_not_seem_to_live_on() -> None:
    """One packet each; the timeout is lowered from 30 to 8 s before the first look."""
    packets = [
        entries.Packet(float(at), 17, 1024 + n, 53, entries.ANY, 0, "udp")
        for n, at in enumerate(np.linspace(0, 55, 600))
    ]
    table = entries.Table({"udp": 30.0}, 60, looks=60, later=(20.0, {"udp": 8.0}))
    model, told = Model(HookInfo("fentry"), Clock(0), 0), []
    for second, batch in enumerate(table.run(packets)):
        rows = batch.events
        rows = rows[(rows["kind"] != int(Kind.MET)) | (second > 21)]
        model.update(replace(batch, events=rows))
        told.append(model.snapshot("service").culprits[0].life.p50)
    assert all(life is None or life < 0.1 for life in told), told


@given(*[st.just(0.0) | st.floats(1e-3, 1e6)] * 4)
def test_a_pace_is_between_the_last_rate_and_the_mean(
    rate: float, came: float, seconds: float, interval: float
) -> None:
    """Also in the first moment of a ring, when no time has passed."""
    told, even = stays.pace(rate, came, seconds, interval)
    assert not even or told == rate
    assert 0 <= told <= max(rate, came / max(seconds, interval, 1e-9)) * 1.001
