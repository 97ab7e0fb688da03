"""One computation of how long entries stay: WHY, the table of keys and JSON say the same."""

from __future__ import annotations

import numpy as np
import pytest

from ctrace.model import histogram, stays
from ctrace.model.sample import ROW

NO_LOOKS = np.zeros(0, ROW)


@pytest.mark.parametrize(("rate", "stay"), [(10.0, 8.0), (200.0, 30.0)])
def test_the_check_by_load_agrees_with_a_steady_load(rate: float, stay: float) -> None:
    """Held over new is Little's mean; it comes from other counts than the percentiles."""
    held = round(rate * stay)
    ended = np.zeros(histogram.BINS, np.int64)
    ended[np.searchsorted(histogram.EDGES, stay, "right") - 1] = 1000
    ages = np.linspace(0, stay, 64)
    curve = stays.survival(ended, 1000, stays.Living(ages, held))
    told = stays.told(curve, NO_LOOKS, held, rate)
    assert told.p50 is not None
    assert told.by_load is not None
    assert told.by_load == pytest.approx(told.p50, rel=0.2)


def test_without_new_entries_there_is_no_check() -> None:
    curve = stays.survival(np.zeros(histogram.BINS, np.int64), 0, stays.Living(np.zeros(0), 0))
    assert stays.told(curve, NO_LOOKS, 50, 0.0).by_load is None


def test_closed_young_ones_tell_their_timeout_unless_half_has_gone_before() -> None:
    living = stays.Living(np.linspace(0, 9, 64), 300)
    none = np.zeros(histogram.BINS, np.int64)
    told = stays.told(stays.survival(none, 0, living), NO_LOOKS, 300, 30.0, young=120.0)
    assert (told.p50, told.by, told.at_least) == (120.0, "timeout", None)
    many = none.copy()
    many[np.searchsorted(histogram.EDGES, 2.0) - 1] = 400
    told = stays.told(stays.survival(many, 2000, living), NO_LOOKS, 300, 30.0, young=120.0)
    assert told.p50 is not None
    assert told.p50 < 9
