"""The stated error is that of the second half of a recording, foretold from the first."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from kit.whatifs import Kernel

from ctrace.view.report.whatif_text import whatif_text
from ctrace.whatif.gather import gather
from ctrace.whatif.run import of_recording
from ctrace.whatif.settings import Levers, parse_levers

pytestmark = pytest.mark.slow

LOAD = Kernel(rate=60, time_wait=30, seconds=200, udp_rate=20)


def test_a_load_that_goes_on_alike_is_foretold() -> None:
    (place,) = of_recording(gather(replace(LOAD, counts=[]).run()), Levers()).places
    assert place.error is not None
    assert place.error < 0.05
    assert place.trusted


@pytest.mark.parametrize("longer", [2.0, 5.0])
def test_entries_that_suddenly_stay_longer_are_a_stated_error(longer: float) -> None:
    """A replay of the true ends would be off by nothing; the second half can't be foretold."""
    batches = replace(LOAD, counts=[], udp_rate=0).run()
    later = replace(LOAD, counts=[], udp_rate=0, time_wait=LOAD.time_wait * longer).run()
    half = len(batches) // 2
    # From the half on, the table of a kernel whose timeout is longer: no entry is in both.
    offset = max(int(batch.events["src"][:, 12].max(initial=0)) for batch in batches) + 1
    second = []
    for batch in later[half:]:
        events = batch.events.copy()
        events["src"][:, 12] += offset
        second.append(replace(batch, events=events))
    recorded = gather([*batches[:half], *second])
    truth = np.mean([batch.tables[0].count for batch in second])
    (place,) = of_recording(recorded, Levers()).places
    assert place.error is not None
    assert truth > 1.5 * LOAD.rate * LOAD.time_wait
    assert place.error > 0.15
    assert not place.trusted
    assert "do not trust it" in whatif_text(of_recording(recorded, Levers()))


def test_of_too_little_nothing_is_foretold() -> None:
    few = Kernel(rate=1, time_wait=5, seconds=8)
    answer = of_recording(gather(few.run()), Levers())
    assert answer.places[0].error is None
    assert not answer.places[0].trusted
    assert "too short" in whatif_text(answer)


@pytest.mark.parametrize(("timeout", "seed"), [(5, 1), (20, 2), (60, 3)])
def test_mean_and_peak_are_inside_their_ranges(timeout: int, seed: int) -> None:
    recorded = gather(replace(LOAD, counts=[], seed=seed).run())
    truth = replace(LOAD, counts=[], seed=seed + 10, time_wait=timeout)
    truth.run()
    (place,) = of_recording(recorded, parse_levers(timeout=[f"tcp_time_wait={timeout}"])).places
    low, high = place.changed.mean_range
    assert low <= np.mean(truth.counts) <= high
    least, most = place.changed.peak_range
    assert least <= max(truth.counts) <= most
