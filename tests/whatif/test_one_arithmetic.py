"""Advice and what-if foretell the same: they share the table model."""

from __future__ import annotations

import numpy as np
import pytest
from kit.whatifs import NETNS, Kernel

from ctrace.advice.advise import advise
from ctrace.advice.facts import Facts
from ctrace.advice.result import Advice
from ctrace.batch import Clock, HookInfo
from ctrace.model import Model
from ctrace.model.remedies import TIMEOUTS
from ctrace.model.snapshot import Snapshot
from ctrace.whatif.flows import Recorded
from ctrace.whatif.gather import gather
from ctrace.whatif.predict import Outlook
from ctrace.whatif.run import of_recording
from ctrace.whatif.settings import parse_levers

LIMIT = 5000
LOAD = Kernel(rate=40, time_wait=40, seconds=900, udp_rate=20, udp_timeout=30, limit=LIMIT)
ABOUT = Facts(timeouts={**TIMEOUTS, "tcp_timeout_time_wait": 40, "udp_timeout": 30})


@pytest.fixture(scope="module")
def both() -> tuple[Recorded, Snapshot, Advice]:
    batches = LOAD.run()
    model = Model(HookInfo("fentry"), Clock(0), 0)
    for batch in batches:
        model.update(batch)
    services = model.snapshot(group="service", sort="held", limit=10)
    return gather(batches), services, advise(services, None, {NETNS: ABOUT}, target=0.2)


@pytest.mark.parametrize("port", [8063, 53])
def test_fill_after_notrack(both: tuple[Recorded, Snapshot, Advice], port: int) -> None:
    recorded, _, advice = both
    (candidate,) = [c for c in advice.candidates if c.port == port]
    assert candidate.fill_after is not None
    low, high = (LIMIT * fill for fill in candidate.fill_after)
    lever = parse_levers(notrack=[f"{candidate.proto}/{port}"])
    (place,) = of_recording(recorded, lever).places
    assert low <= place.changed.mean <= high
    assert (low + high) / 2 == pytest.approx(sum(place.changed.mean_range) / 2, rel=0.1)


@pytest.mark.parametrize("seconds", [5, 20])
def test_fill_after_a_shorter_timeout(
    both: tuple[Recorded, Snapshot, Advice], seconds: int
) -> None:
    recorded, services, _ = both
    outlook = Outlook(services.tables[0], services.culprits, ABOUT.timeouts)
    fill = outlook.fill(shorter={("tcp", 8063, True): float(seconds)})
    assert fill is not None
    low, high = (LIMIT * share for share in fill)
    lever = parse_levers(timeout=[f"tcp_time_wait={seconds}"])
    (place,) = of_recording(recorded, lever).places
    assert low <= place.changed.mean <= high
    assert (low + high) / 2 == pytest.approx(sum(place.changed.mean_range) / 2, rel=0.1)
    freed = outlook.frees({("tcp", 8063, True): float(seconds)})
    assert freed.low <= place.modelled.mean - place.changed.mean <= freed.high


def test_nothing_done_is_the_table_as_it_is(both: tuple[Recorded, Snapshot, Advice]) -> None:
    _, services, _ = both
    outlook = Outlook(services.tables[0], services.culprits, ABOUT.timeouts)
    settled = float(np.mean(LOAD.counts[100:]))
    assert outlook.expected() * LIMIT == pytest.approx(settled, rel=0.05)
