"""What a shorter timeout frees, as advice tells it at several moments, against a table that really
had it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pytest
from kit.loads.entries import Packet, Table
from kit.loads.packets import (
    SECONDS,
    SETTINGS,
    Random,
    closes_and_resets,
    long_tail,
    one_way,
    talks,
    used_again,
)

from ctrace.batch import Clock, HookInfo
from ctrace.model import Model
from ctrace.model.remedies import TIMEOUTS
from ctrace.whatif.predict import Outlook
from ctrace.whatif.settings import parse_levers

MOMENTS = (10, 30, 60, 119)
SETTLED = 70
"""Second from which these loads hold as many as ever."""
CASES: dict[str, tuple[Callable[[Random], Iterator[Packet]], str, int]] = {
    "half end by RST": (closes_and_resets, "tcp_time_wait", 5),
    "some live long": (long_tail, "tcp_time_wait", 8),
    "ports are used again": (used_again, "tcp_time_wait", 15),
    "nobody answers": (one_way, "udp", 5),
    "streams": (talks, "udp_stream", 8),
}  # fmt: skip


def known_as() -> dict[str, int]:
    """The settings by the names of sysctls."""
    return {
        name: int(SETTINGS.get(name.replace("_timeout", ""), default))
        for name, default in TIMEOUTS.items()
    }


def held_in_the_end(packets: Sequence[Packet], changed: Mapping[str, float] = {}) -> float:
    """On average, over time and over the moments at which collections may fall."""
    held = []
    for first_pass in range(5, 50, 15):
        table = Table({**SETTINGS, **changed}, SECONDS, looks=0, first_pass=first_pass)
        table.run(packets)
        held.append(np.mean(table.counts[SETTLED:]))
    return float(np.mean(held))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_is_freed_in_the_end_was_inside_each_range(name: str) -> None:
    load, timeout, new = CASES[name]
    packets = list(load(np.random.default_rng(1)))
    recorded = Table(SETTINGS, SECONDS, looks=100, seed=1)
    batches = recorded.run(packets)
    freed = held_in_the_end(packets) - held_in_the_end(packets, {timeout: float(new)})
    model = Model(HookInfo("fentry"), Clock(0), 0)
    for second, batch in enumerate(batches):
        model.update(batch)
        if second not in MOMENTS:
            continue
        services = model.snapshot(group="service", limit=10)
        outlook = Outlook(services.tables[0], services.culprits, known_as(), services.uptime_s)
        told = outlook.frees(parse_levers(timeout=[f"{timeout}={new}"]))
        assert told.low - 1 <= freed <= told.high + 1, (second, told, freed)
