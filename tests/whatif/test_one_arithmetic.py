"""Advice and what-if foretell the same: they share the table model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from kit.loads import packets
from kit.loads.entries import Packet, Table
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

pytestmark = pytest.mark.slow
LIMIT = 5000
LOAD = Kernel(rate=40, time_wait=40, seconds=900, udp_rate=20, udp_timeout=30, limit=LIMIT)
SET = {
    name: int(packets.SETTINGS.get(name.replace("_timeout", ""), default))
    for name, default in TIMEOUTS.items()
}
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
    lever = parse_levers(timeout=[f"tcp_time_wait={seconds}"])
    fill = outlook.fill(lever)
    assert fill is not None
    low, high = (LIMIT * share for share in fill)
    (place,) = of_recording(recorded, lever).places
    assert low <= place.changed.mean <= high
    assert (low + high) / 2 == pytest.approx(sum(place.changed.mean_range) / 2, rel=0.1)
    freed = outlook.frees(lever)
    assert freed.low <= place.modelled.mean - place.changed.mean <= freed.high


def test_nothing_done_is_the_table_as_it_is(both: tuple[Recorded, Snapshot, Advice]) -> None:
    _, services, _ = both
    outlook = Outlook(services.tables[0], services.culprits, ABOUT.timeouts)
    settled = float(np.mean(LOAD.counts[100:]))
    assert outlook.expected() * LIMIT == pytest.approx(settled, rel=0.05)


def outlook(model: Model) -> Outlook:
    """What levers would free of what the model shows now."""
    shown = model.snapshot("service", limit=10)
    return Outlook(shown.tables[0], shown.culprits, SET, shown.uptime_s)


@pytest.mark.parametrize(
    ("load", "timeout", "seconds"),
    [
        (packets.closes_and_resets, "tcp_time_wait", 5),
        (packets.long_tail, "tcp_time_wait", 8),
        (packets.used_again, "tcp_time_wait", 15),
        (packets.one_way, "udp", 5),
        (packets.talks, "udp_stream", 8),
    ],
)
def test_a_lever_and_a_what_if_tell_the_same_of_a_settled_load(
    load: Callable[[packets.Random], Iterator[Packet]], timeout: str, seconds: int
) -> None:
    """Both from one recording; the middle of each is inside the other's range."""
    table = Table(packets.SETTINGS, packets.SECONDS, since=60, looks=100, first_pass=29.0)
    batches = table.run(load(np.random.default_rng(2)))
    model = Model(HookInfo("fentry"), Clock(0), 60 * 10**9)
    for batch in batches:
        model.update(batch)
    lever = parse_levers(timeout=[f"{timeout}={seconds}"])
    freed = outlook(model).frees(lever)
    (place,) = of_recording(gather(batches), lever).places
    low, high = (place.modelled.mean - mean for mean in reversed(place.changed.mean_range))
    assert low <= freed.middle <= high
    assert freed.low - 1 <= place.modelled.mean - place.changed.mean <= freed.high + 1


@pytest.mark.parametrize(
    ("load", "timeout", "seconds"),
    [
        (packets.closes_and_resets, "tcp_time_wait", 5),
        (packets.half_closed, "tcp_close_wait", 10),
        (packets.echoes, "icmp", 6),
        (packets.unanswered, "tcp_syn_sent", 5),
    ],
)
def test_a_lever_and_a_what_if_do_not_exclude_each_other_in_the_first_minute(
    load: Callable[[packets.Random], Iterator[Packet]], timeout: str, seconds: int
) -> None:
    """Nothing has settled, so a lever tells of what will be and a what-if of what was: the ranges
    of what is freed overlap."""
    table = Table(packets.SETTINGS, 45, looks=100, first_pass=28.0)
    batches = table.run(load(np.random.default_rng(3)))
    model = Model(HookInfo("fentry"), Clock(0), 0)
    lever = parse_levers(timeout=[f"{timeout}={seconds}"])
    for second, batch in enumerate(batches[:-1], 1):
        model.update(batch)
        if second not in (15, 30, 44):
            continue
        freed = outlook(model).frees(lever)
        (place,) = of_recording(gather(batches[:second]), lever).places
        low, high = (place.modelled.peak - peak for peak in reversed(place.changed.peak_range))
        assert freed.low - 1 <= high
        assert max(low, 0.0) <= freed.high + 1
