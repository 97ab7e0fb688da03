"""The ranges of a what-if hold what they say: loads that end in every way, foretold at several
moments, against a table that really had the change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from kit.loads.entries import Packet, Table
from kit.loads.packets import (
    SECONDS,
    SETTINGS,
    Random,
    call,
    closes_and_resets,
    echoes,
    half_closed,
    leaks,
    long_tail,
    stops,
    talks,
    unanswered,
    used_again,
)

from ctrace.whatif.gather import gather
from ctrace.whatif.run import of_recording
from ctrace.whatif.settings import parse_levers

MOMENTS = (30, 60, 120)


@dataclass(frozen=True)
class Situation:
    load: Callable[[Random], Iterator[Packet]]
    timeout: str = ""
    seconds: int = 0
    notrack: tuple[int, int] = (0, 0)
    since: int = 0


SITUATIONS = (
    Situation(closes_and_resets, "tcp_time_wait", 5),
    Situation(long_tail, "tcp_time_wait", 8),
    Situation(talks, "udp_stream", 8),
    Situation(used_again, "tcp_time_wait", 15),
    Situation(leaks, notrack=(17, 53)),
    Situation(half_closed, "tcp_close_wait", 10),
    Situation(unanswered, "tcp_syn_sent", 5),
    Situation(echoes, "icmp", 6),
    Situation(stops, "tcp_time_wait", 90),
    Situation(closes_and_resets, "tcp_time_wait", 12, since=50),
)


def outcomes(one: Situation, seed: int) -> Iterator[tuple[int, str, bool, bool]]:
    """(moment, figure, whether the truth is inside, whether a wide range is not said to be)."""
    first_pass = 1.0 + seed * 17 % 58
    recorded = Table(SETTINGS, SECONDS, one.since, seed=seed, first_pass=first_pass)
    batches = recorded.run(one.load(np.random.default_rng(seed)))
    changed = {**SETTINGS, one.timeout: float(one.seconds)}
    truth = Table(changed, SECONDS, one.since, 0, frozenset([one.notrack]), first_pass=first_pass)
    truth.run(one.load(np.random.default_rng(seed + 100)))
    name = {6: "tcp", 17: "udp"}.get(one.notrack[0])
    levers = parse_levers(
        [f"{name}/{one.notrack[1]}"] if name else [],
        [f"{one.timeout}={one.seconds}"] if one.timeout else [],
    )
    for moment in MOMENTS:
        some = batches[: moment + 1]
        (place,) = of_recording(gather(some), levers).places
        was, real = (np.array(table.counts[: len(some)], float) for table in (recorded, truth))
        for figure, (low, high), of in (
            ("mean", place.changed.mean_range, np.mean),
            ("peak", place.changed.peak_range, np.max),
        ):
            wide = high - low > 2 * abs(float(of(was)) - float(of(real)))
            said = figure in place.vague or not place.trusted
            yield moment, figure, bool(low - 0.5 <= of(real) <= high + 0.5), wide and not said


@pytest.mark.slow
def test_the_truth_is_inside_the_ranges_and_wide_ones_say_so() -> None:
    told = [
        (one.load.__name__, *outcome)
        for seed, one in enumerate(SITUATIONS, 1)
        for outcome in outcomes(one, seed)
    ]
    outside = [one[:3] for one in told if not one[3]]
    wide = [one[:3] for one in told if one[4]]
    assert len(outside) <= 0.05 * len(told), outside
    assert len(wide) <= 0.02 * len(told), wide


@pytest.mark.parametrize("first_pass", [58.0, 28.8])
def test_what_a_lookup_collects_is_no_pass_of_the_collector(first_pass: float) -> None:
    """Some ports are used again when their entries have expired, so lookups collect these; hundreds
    of others wait on."""

    def load() -> Iterator[Packet]:
        for n in range(580):
            yield from call(n / 20, n, 0.0, reset=n % 2 == 0)
        for n in range(0, 24, 2):
            yield from call(12 + n / 4, n, 0.0, reset=True)

    tables = [
        Table({**SETTINGS, "tcp_time_wait": wait}, 30, looks=100, first_pass=first_pass)
        for wait in (40.0, 5.0)
    ]
    batches, _ = (table.run(load()) for table in tables)
    recorded = gather(batches)
    assert recorded.collections.round(1).tolist() == [at for at in (28.8,) if at == first_pass]
    (place,) = of_recording(recorded, parse_levers(timeout=["tcp_time_wait=5"])).places
    low, high = place.changed.peak_range
    assert low <= max(tables[1].counts) <= high
