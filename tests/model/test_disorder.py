"""Losses, events out of order, clocks that jump, and junk: what goes wrong harms no number."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from kit.loads.modelled import OFFSET, feed, feed_events, model, only
from kit.shapes import SECOND, START, Trace, steady

from ctrace.batch import Batch
from ctrace.errors import UsageError
from ctrace.model.snapshot import GROUPS, SORTS
from ctrace.record import RECORD, Kind, Reason

# -- what goes wrong -----------------------------------------------------------


def test_entries_older_than_the_tracer() -> None:
    trace = Trace()
    rows = trace.existing(10)
    gone = rows[:4].copy()
    gone["kind"], gone["reason"] = int(Kind.DESTROY), int(Reason.EXPIRED)
    gone["ct"] = np.uint64(0xFFFF888012340000) + np.arange(4, dtype=np.uint64) * np.uint64(320)
    gone["ts"] = START + 2 * SECOND
    trace.parts.append(gone)
    trace.flows(np.array([0.5]), 1, 60)
    c = only(feed(model(), trace, 4))
    assert (c.held, c.older, c.inserts, c.destroys) == (7, 6, 1, 4)
    assert c.residence.n == 0


def test_a_lost_insert_does_not_go_below_zero() -> None:
    trace = Trace()
    trace.flows(np.array([0.1, 0.2, 0.3]), 0.1, 0.5)
    rows = trace.events()
    rows = rows[rows["kind"] == Kind.DESTROY]
    c = only(feed_events(model(), rows, 3))
    assert (c.held, c.older, c.destroys) == (0, 0, 3)
    assert c.table_seconds == 0


def test_a_lost_destroy_is_healed_by_reuse() -> None:
    trace = Trace()
    trace.flows(np.array([0.0, 10.0]), 0.1, 2.0)
    rows = trace.events()
    rows["ct"] = rows["ct"][0]
    rows = rows[[0, 2, 3]]  # the first entry's end was lost
    c = only(feed_events(model(), rows, 20))
    assert c.residence.n == 1
    assert c.residence.p50 == pytest.approx(2.1, rel=0.125)


def test_events_out_of_order_between_cpus() -> None:
    trace = Trace()
    trace.flows(steady(100, 10, trace.rng), 0.2, 1.0)
    rows = trace.events()
    expected = only(feed_events(model(), rows, 20))
    shuffled = rows[trace.rng.permutation(len(rows))]
    assert only(feed_events(model(), shuffled, 20)) == expected


def test_an_end_in_an_earlier_batch_than_its_birth() -> None:
    trace = Trace()
    trace.flows(np.array([0.99]), 0.005, 0.0)
    rows = trace.events()
    m = model()
    m.update(Batch(rows[1:], START + SECOND))
    m.update(Batch(rows[:1], START + 2 * SECOND))
    c = only(m)
    assert (c.held, c.inserts, c.destroys, c.residence.n) == (0, 1, 1, 0)


def test_wall_clock_changes_do_not_matter() -> None:
    """Only boot-clock times and the offset of the start are used."""
    trace = Trace()
    trace.flows(steady(50, 10, trace.rng), 0.2, 1.0)
    m = feed(model(), trace, 10)
    assert m.snapshot().ts == OFFSET + START + 10 * SECOND
    assert m.snapshot().uptime_s == pytest.approx(10)


def test_suspend_is_time_like_any_other() -> None:
    """The boot clock goes on in suspend: entries are held, rates spread over the gap."""
    trace = Trace()
    trace.flows(np.linspace(0, 1, 100), 0.1, 3600.0)
    trace.flows(np.array([3000.5]), 0.1, 3600.0)
    m = model()
    m.update(Batch(trace.events(1.0), START + SECOND))
    rest = trace.events(3001.0)[len(trace.events(1.0)) :]
    m.update(Batch(rest, START + 3001 * SECOND))
    s = m.snapshot()
    assert s.interval_s == pytest.approx(3000)
    assert s.rates.insert == pytest.approx(1 / 3000)
    assert s.culprits[0].table_seconds == pytest.approx(100 * 3000, rel=0.01)


def test_a_batch_that_ends_before_the_last_one_does_not_turn_time_back() -> None:
    m = model()
    m.update(Batch.idle(START + 5 * SECOND))
    m.update(Batch.idle(START + 4 * SECOND))
    assert m.snapshot().uptime_s == pytest.approx(5)


def test_an_offloaded_or_unknown_life_stays_unknown() -> None:
    trace = Trace()
    trace.flows(np.linspace(0, 1, 30), 0.1, 1.0)
    rows = trace.events()
    rows["idle_ms"][rows["kind"] == Kind.DESTROY] = -1
    c = only(feed_events(model(), rows, 5))
    assert c.life.p50 is None
    assert c.residence.n == 30


@pytest.mark.slow
def test_junk_does_not_raise() -> None:
    rng = np.random.default_rng(3)
    raw = rng.integers(0, 256, 120 * 1000, np.uint8).view("V120").view(RECORD)
    m = model()
    m.update(Batch(raw, START + SECOND))
    asked = {(group, "held") for group in GROUPS} | {("service", sort) for sort in SORTS}
    for group, sort in sorted(asked | {("who", sort) for sort in SORTS}):
        m.snapshot(group, sort, limit=5)


def test_arguments_are_checked() -> None:
    with pytest.raises(UsageError, match="unknown group 'colour'"):
        model().snapshot("colour")
    with pytest.raises(UsageError, match="unknown sort"):
        model().snapshot("src", "size")
    with pytest.raises(UsageError, match="too small"):
        model(memory=1 << 20)


@pytest.mark.parametrize("memory", [4 << 20, 8 << 20, 32 << 20, 128 << 20])
def test_memory_limit_is_kept(memory: int) -> None:
    used = model(memory=memory).snapshot().memory
    assert used.limit == memory
    assert 0.5 * memory < used.used <= memory


def test_memory_does_not_grow_with_sources() -> None:
    trace = Trace()
    n = 200_000
    src = trace.rng.integers(0x0B000000, 0xDF000000, n)
    trace.flows(steady(20_000, 10, trace.rng), 0, 2.0, src=src, dport=80)
    batches = trace.batches(12, step=0.5)
    m = model(memory=8 << 20)
    for batch in batches[:8]:
        m.update(batch)
    tracemalloc.start()
    for batch in batches[8:]:
        m.update(batch)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 2 << 20
    s = m.snapshot("service")
    assert s.memory.used <= 8 << 20
    assert s.culprits[0].inserts == n
