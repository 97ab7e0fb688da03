"""What did not end in a recording ends as others did that had lived longer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrace.whatif.flows import _like

TIMES = st.floats(0, 100, allow_nan=False)


@given(st.lists(TIMES, min_size=1, max_size=50), st.lists(TIMES, max_size=50))
def test_nobody_is_given_an_end_that_its_age_excludes(ends: list[float], ages: list[float]) -> None:
    stayed, age = np.array(ends), np.array(ages)
    chosen = _like(stayed, np.append(stayed, age), age, np.random.default_rng(0))
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
    chosen = _like(stays[ended], 50 - began, age, random)
    given_end = stays[ended][chosen]
    young = (age < 10) & (chosen >= 0)
    assert np.mean(stays[ended] == 40) < 0.7 * part
    assert np.mean(given_end[young] == 40) == pytest.approx(part, abs=0.05)
    assert set(given_end[age > 10].tolist()) == {40.0}
