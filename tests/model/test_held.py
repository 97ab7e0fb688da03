"""What is held, by looks at it; and how long it stays, with the living counted."""

from __future__ import annotations

from bisect import bisect, bisect_left

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.shapes import ASSURED, ESTABLISHED, SEEN_REPLY, Trace, steady

from ctrace.batch import Clock, HookInfo
from ctrace.model import stays
from ctrace.model.composition import error
from ctrace.model.histogram import EDGES
from ctrace.model.keys.columns import CLOSE
from ctrace.model.model import Model
from ctrace.model.snapshot import Culprit


def fed(trace: Trace, until: float) -> Model:
    batches = trace.batches(until)
    model = Model(HookInfo("fentry"), Clock(0), int(batches[0].until) - 1_000_000_000)
    for batch in batches:
        model.update(batch)
    return model


def service(trace: Trace, until: float, port: int) -> Culprit:
    (found,) = [c for c in fed(trace, until).snapshot("service").culprits if c.port == port]
    return found


def test_what_ended_is_no_witness_for_what_is_held() -> None:
    """Two hundred answered streams stay; fifty probes without an answer have come and gone."""
    trace = Trace()
    trace.flows(np.linspace(0, 1, 200), 600, 120, proto=17, dport=4433)
    trace.flows(np.linspace(1, 5, 50), 0, 5, proto=17, dport=4433, status=0)
    trace.walks(30)
    held = service(trace, 30, 4433)
    assert held.held == 200
    assert (held.unreplied, held.assured) == (0.0, 1.0)
    assert 190 <= held.composition.n <= 200
    assert held.destroys == 50
    assert held.residence.p50 is None
    assert held.residence.at_least is not None
    assert held.residence.at_least > 20


def test_the_few_that_were_reopened_do_not_tell_how_long_the_others_stay() -> None:
    trace = Trace()
    trace.flows(steady(60, 14, trace.rng), 0.001, 120)
    trace.flows(np.linspace(0, 14, 12), 0.001, 1.0)
    trace.walks(15)
    held = service(trace, 15, 8063)
    assert held.residence.by == "timeout"
    assert held.residence.p50 == pytest.approx(120, rel=0.05)
    assert held.closed == 1.0


def test_before_a_walk_nothing_is_said_of_what_is_held() -> None:
    trace = Trace()
    trace.flows(np.linspace(0, 1, 200), 600, 120)
    trace.flows(np.linspace(0, 1, 30), 0, 0.2, status=0, state=CLOSE)
    held = service(trace, 2, 8063)
    assert (held.closed, held.unreplied, held.assured, held.states) == (None, None, None, ())


def test_a_dump_tells_of_what_is_held_only_while_it_is_nearly_all() -> None:
    trace = Trace()
    trace.existing(500, dport=8063, state=ESTABLISHED)
    assert service(trace, 2, 8063).composition.state("ESTABLISHED") == 1.0
    trace.flows(np.linspace(0, 1, 100), 600, 120, status=0)
    assert service(trace, 2, 8063).assured is None


@given(st.integers(0, 400), st.integers(1, 400))
def test_an_error_is_never_nothing(part: int, n: int) -> None:
    assert 0 < error(min(part, n) / n, n) <= 1


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(one, marks=pytest.mark.slow) for one in (2, 3, 4))]
)
@pytest.mark.parametrize("watched", [5.0, 20.0, 60.0])
def test_a_steady_mix_stays_as_long_as_it_does_or_longer_than_was_said(
    watched: float, seed: int
) -> None:
    """Against the truth of the generator: residences between half a second and five minutes."""
    trace = Trace(seed=seed)
    at = steady(100, watched, trace.rng)
    stay = np.exp(trace.rng.uniform(np.log(0.5), np.log(300), len(at)))
    trace.flows(at, 0.0, stay, status=SEEN_REPLY | ASSURED, state=ESTABLISHED)
    trace.walks(watched)
    found = service(trace, watched, 8063).residence
    truth = float(np.sqrt(0.5 * 300))  # the median of what is even in logarithm
    if found.p50 is None:
        assert found.at_least is not None
        assert found.at_least < truth * 1.3
    else:
        assert found.p50 == pytest.approx(truth, rel=0.4)


@given(
    st.lists(st.floats(0.002, 900), min_size=12, max_size=60),
    st.lists(st.floats(0.002, 900), max_size=60),
)
def test_survival_is_the_textbooks(ends: list[float], ages: list[float]) -> None:
    """One bin at a time, in plain arithmetic."""
    histogram = np.histogram(ends, EDGES)[0].astype(np.int64)
    curve = stays.survival(histogram, len(ends), stays.Living(np.array(ages), len(ages)))
    share, wanted, edges = 1.0, [1.0], EDGES.tolist()
    living = [bisect(edges, x) - 1 for x in ages]
    places = sorted([*living, *(bisect(edges, x) - 1 for x in ends)])
    for at in range(len(EDGES) - 1):
        risk = len(places) - bisect_left(places, at)
        gone = int(histogram[at])
        stay = living.count(at) if gone else 0
        if risk >= stays.FEW and gone:
            share *= 1 - min(1.0, gone / (risk - stay / 2))
        wanted.append(share)
    shown: npt.NDArray[np.float64] = curve.share
    assert shown == pytest.approx(np.array(wanted))
    assert (np.diff(shown) <= 0).all()
