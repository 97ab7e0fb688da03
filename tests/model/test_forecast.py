"""Forecasts against loads that go on as the generator has it: the truth is in the stated range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import numpy as np
import numpy.typing as npt
import pytest
from kit.shapes import ASSURED, ESTABLISHED, SEEN_REPLY, Trace

from ctrace.batch import Clock, HookInfo
from ctrace.model.forecast import Forecast, Reading, _rates, forecast
from ctrace.model.model import Model
from ctrace.record import Kind

F64 = npt.NDArray[np.float64]
RUNS = 5
Load = Callable[[np.random.Generator], tuple[F64, F64, int]]
"""When entries come, how long each stays, and the limit."""


def arrivals(rate: npt.NDArray[Any], rng: np.random.Generator) -> F64:
    """Poisson arrivals, from so many a second in each second."""
    second = np.repeat(np.arange(len(rate)), rng.poisson(rate))
    return np.sort(second + rng.random(len(second)))


def constant(rng: np.random.Generator) -> tuple[F64, F64, int]:
    """So many a second that stay for good: it fills."""
    at = arrivals(np.full(200, rng.uniform(20, 60)), rng)
    return at, np.full(len(at), 1e5), int(len(at) * rng.uniform(0.4, 0.9))


def growing(rng: np.random.Generator) -> tuple[F64, F64, int]:
    """More from second to second, for good."""
    at = arrivals(rng.uniform(10, 20) + np.arange(200) * rng.uniform(0.1, 0.4), rng)
    return at, np.full(len(at), 1e5), int(len(at) * rng.uniform(0.4, 0.9))


def bursty(rng: np.random.Generator) -> tuple[F64, F64, int]:
    """In bursts of some seconds, for good."""
    rate = np.where(np.arange(200) % 10 < rng.integers(3, 7), rng.uniform(40, 100), 5)
    at = arrivals(rate, rng)
    return at, np.full(len(at), 1e5), int(len(at) * rng.uniform(0.4, 0.9))


def levelling(rng: np.random.Generator) -> tuple[F64, F64, int]:
    """Each stays for so many seconds: it never fills."""
    at = arrivals(np.full(200, rng.uniform(20, 60)), rng)
    stay = rng.uniform(10, 40)
    return at, np.full(len(at), stay), int(len(at) / 200 * stay * rng.uniform(1.5, 4))


def ending(rng: np.random.Generator) -> tuple[F64, F64, int]:
    """It stops after so many seconds: from then on no time is told."""
    stop = int(rng.integers(40, 100))
    rate = np.zeros(200)
    rate[:stop] = rng.uniform(20, 60)
    at = arrivals(rate, rng)
    return at, np.full(len(at), rng.uniform(20, 60)), int(len(at) * 1.5)


def told(
    load: Load, seed: int, moments: tuple[int, ...]
) -> list[tuple[float, Optional[float], float, Optional[float]]]:
    """(moment, seconds to full, their error, the truth or None for never) of each moment."""
    rng = np.random.default_rng(seed)
    at, stay, limit = load(rng)
    trace = Trace(seed=seed)
    trace.flows(at, stay, 0.0, status=SEEN_REPLY | ASSURED, state=ESTABLISHED,
                src=0x0A000000 + np.arange(len(at)))  # fmt: skip
    steps = np.concatenate([at, at + stay])
    order = np.argsort(steps)
    held = np.cumsum(np.where(order < len(at), 1, -1))
    over = np.flatnonzero(held >= limit)
    full = float(steps[order][over[0]]) if over.size else None
    last = max(moments)
    trace.walks(last)
    for part in trace.parts:  # an ESTABLISHED connection never expires while anybody looks on
        part["overdue_ms"][part["kind"] == Kind.MET] = -400_000_000
    found = []
    batches = trace.batches(last, limit=limit)
    model = Model(HookInfo("fentry"), Clock(0), int(batches[0].until) - 1_000_000_000)
    for second, batch in enumerate(batches, 1):
        model.update(batch)
        if second in moments and (full is None or second < full):
            table = model.snapshot("netns").tables[0]
            truth = None if full is None else full - second
            error = table.seconds_to_full_error or 0.0
            found.append((float(second), table.seconds_to_full, error, truth))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("load", [constant, growing, bursty, levelling, ending])
def test_the_truth_is_in_the_stated_range(load: Load) -> None:
    runs = [one for seed in range(RUNS) for one in told(load, seed, (10, 20, 40, 60, 80, 120))]
    if load is ending:  # what ends later cannot be known before
        runs = [one for one in runs if one[0] > 100]
    said = [(full, error, truth) for _, full, error, truth in runs if full is not None]
    wrong = [one for one in said if one[2] is None or not abs(one[0] - one[2]) <= one[1]]
    print(load.__name__, len(runs), "moments,", len(said), "told,", len(wrong), "wrong", wrong)
    assert len(wrong) <= 0.1 * max(1, len(said))
    if load in (levelling, ending):
        assert not said
    else:
        assert said


def test_a_rate_goes_back_as_far_as_it_was_about_as_high() -> None:
    rng = np.random.default_rng(5)
    lengths = []
    for _ in range(200):
        n = int(rng.integers(1, 60))
        high = np.where(np.arange(n) < rng.integers(0, n + 1), 10 ** rng.uniform(0, 4), 50.0)
        rates = rng.poisson(high).astype(float)
        readings = [Reading(float(second), 0, int(inserted))
                    for second, inserted in enumerate(np.cumsum([0.0, *rates]))]  # fmt: skip
        chosen = rates[-3:]
        for wider in (rates[-n:] for n in range(4, len(rates) + 1)):
            spread = max(float(wider.std()), float(np.sqrt(max(wider.mean(), 1.0))))
            if abs(wider.mean() - rates[-3:].mean()) > 3 * spread / np.sqrt(3):
                break
            chosen = wider
        assert _rates(readings).tolist() == chosen.tolist()
        lengths.append(len(chosen) / n)
    assert 0 < sum(length < 1 for length in lengths) < 200


def test_a_host_that_stood_still_forecasts_nothing() -> None:
    """Three readings are older than what a rate is taken from: one rate is none."""
    readings = [Reading(at, n, n) for at, n in ((0.0, 10), (1.0, 20), (2.0, 30), (90.0, 600))]
    assert forecast(readings, 1000, lambda: pytest.fail("asked")) == Forecast()


@pytest.mark.parametrize("limit", [60, 40])
def test_a_table_at_its_limit_or_above_a_lowered_one_is_not_still_filling(limit: int) -> None:
    readings = [Reading(float(n), 10 * n, 10 * n) for n in range(7)]
    assert forecast(readings, limit, lambda: pytest.fail("asked")) == Forecast()


def test_a_table_that_falls_is_not_filling() -> None:
    trace = Trace()
    trace.flows(np.linspace(0, 1, 400), np.linspace(2, 20, 400), 0.0)
    model = Model(HookInfo("fentry"), Clock(0), 1)
    for batch in trace.batches(10, limit=100):
        model.update(batch)
    table = model.snapshot().tables[0]
    assert (table.count > 100, table.seconds_to_full) == (True, None)


@pytest.mark.slow
def test_where_it_levels_off_is_told_once_entries_have_gone() -> None:
    trace = Trace(seed=3)
    at = arrivals(np.full(60, 50.0), trace.rng)
    trace.flows(at, 0.0, 5 + 25 * trace.rng.random(len(at)))
    trace.walks(60)
    levels = []
    model = Model(HookInfo("fentry"), Clock(0), 1)
    for batch in trace.batches(60):
        model.update(batch)
        table = model.snapshot().tables[0]
        if table.levels_off is not None and table.levels_off_error is not None:
            levels.append((table.levels_off, table.levels_off_error))
    assert levels
    inside = [abs(level - 50 * 17.5) <= error + 50 for level, error in levels]
    assert sum(inside) >= 0.9 * len(levels), levels
