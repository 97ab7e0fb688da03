"""What did not end in a recording ends as others did that had lived longer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.whatifs import Kernel

from ctrace.batch import Batch
from ctrace.record import Kind
from ctrace.whatif.answer import Outcome
from ctrace.whatif.ends import like
from ctrace.whatif.flows import Basis
from ctrace.whatif.gather import gather
from ctrace.whatif.run import of_recording
from ctrace.whatif.settings import parse_levers

TIMES = st.floats(0, 100, allow_nan=False)


@given(st.lists(TIMES, min_size=1, max_size=50), st.lists(TIMES, max_size=50))
def test_nobody_is_given_an_end_that_its_age_excludes(ends: list[float], ages: list[float]) -> None:
    stayed, age = np.array(ends), np.array(ages)
    chosen = like(stayed, np.append(stayed, age), age, np.random.default_rng(0))
    for at, old in zip(chosen.tolist(), ages):
        assert (at == -1) == (old >= max(ends))
        assert at == -1 or ends[at] > old


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_those_that_ended_are_no_witness_for_the_young(part: float) -> None:
    """Entries stay 10 or 40 seconds; after 50 nearly all that ended stayed 10."""
    random = np.random.default_rng(7)
    began = random.uniform(0, 50, 20_000)
    stays = np.where(random.random(20_000) < part, 40.0, 10.0)
    ended = began + stays <= 50
    age = 50 - began[~ended]
    chosen = like(stays[ended], 50 - began, age, random)
    given_end = stays[ended][chosen]
    young = (age < 10) & (chosen >= 0)
    assert np.mean(stays[ended] == 40) < 0.7 * part
    assert np.mean(given_end[young] == 40) == pytest.approx(part, abs=0.05)
    assert set(given_end[age > 10].tolist()) == {40.0}


SHORT = Kernel(rate=60, time_wait=120, seconds=90, udp_rate=20, udp_timeout=5)
"""Recorded for less than its TIME_WAIT: no connection's entry has ended."""


def mean_under(load: Kernel, timeout: int) -> tuple[float, Outcome]:
    """(the mean that really was, what is foretold) with that TIME_WAIT."""
    truth = replace(load, counts=[], seed=load.seed + 1, time_wait=timeout, looks=0)
    truth.run()
    recorded = gather(replace(load, counts=[]).run())
    lever = parse_levers(timeout=[f"tcp_time_wait={timeout}"])
    return float(np.mean(truth.counts)), of_recording(recorded, lever).places[0].changed


@pytest.mark.slow
@pytest.mark.parametrize("timeout", [5, 30])
def test_a_recording_shorter_than_the_timeout_has_a_range_as_wide_as_what_is_not_known(
    timeout: int,
) -> None:
    truth, told = mean_under(SHORT, timeout)
    low, high = told.mean_range
    assert low <= truth <= high
    assert high - low > 0.5 * truth


@pytest.mark.slow
@pytest.mark.parametrize("timeout", [5, 30])
def test_looks_at_the_living_tell_what_they_wait_for(timeout: int) -> None:
    truth, told = mean_under(replace(SHORT, looks=40), timeout)
    _, blind = mean_under(SHORT, timeout)
    low, high = told.mean_range
    assert low <= truth <= high
    assert abs(told.mean - truth) < 0.4 * abs(blind.mean - truth)


def under_policy(load: Kernel, setting: int) -> list[Batch]:
    """The load, whose TIME_WAIT a ct timeout policy gave, as it is recorded where the setting is
    another: ends tell the setting's, and looks that they do not know."""
    batches = []
    for batch in replace(load, counts=[]).run():
        events = batch.events.copy()
        ends, looks = (events["kind"] == kind for kind in (Kind.DESTROY, Kind.MET))
        events["timeout_ms"][ends] = setting * 1000
        events["idle_ms"][ends] = events["overdue_ms"][ends] + setting * 1000
        events["timeout_ms"][looks], events["idle_ms"][looks] = 0, -1
        batches.append(replace(batch, events=events))
    return batches


@pytest.mark.slow
@pytest.mark.parametrize("setting", [120, 12], ids=["shorter", "longer than the setting"])
def test_a_setting_changes_nothing_for_sure_of_what_a_policy_gave_its_timeout(setting: int) -> None:
    load = Kernel(rate=60, time_wait=30, seconds=90, looks=20)
    recorded = gather(under_policy(load, setting))
    assert not recorded.flows.sure.any()
    assert gather(under_policy(load, setting), texts=True).flows.sure.all()
    answer = of_recording(recorded, parse_levers(timeout=["tcp_time_wait=5"]))
    told = answer.places[0]
    low, high = told.changed.mean_range
    assert told.changed.mean == pytest.approx(told.modelled.mean)
    assert low <= 5 * load.rate < told.recorded.mean <= high
    assert "mean" in told.vague
    assert any("ct timeout policy" in note for note in answer.notes)


def test_each_flow_says_what_its_end_is_known_by() -> None:
    flows = gather(replace(SHORT, looks=10, time_wait=20, udp_rate=0, counts=[]).run()).flows
    assert {Basis.SEEN, Basis.LOOKED, Basis.LIKE} == set(np.unique(flows.basis).tolist())
    waiting = np.isin(flows.basis, [Basis.LOOKED, Basis.LIKE])
    assert (flows.timeout[waiting] == 20).all()
    assert np.allclose((flows.expire - flows.arrive)[flows.basis == Basis.LOOKED], 20, atol=0.01)
