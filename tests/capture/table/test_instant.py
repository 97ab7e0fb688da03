"""A reading and counters that speak of one moment, however much comes between: made steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from kit.shapes import NETNS, START

from ctrace.batch import Batch, Clock, Counts, HookInfo, TableReading
from ctrace.capture.table.instant import Instant
from ctrace.host.netns import Namespace
from ctrace.model.model import Model
from ctrace.record import N_REASONS, Reason, empty
from ctrace.recording.recorder.told_once import Known

SECOND = 1_000_000_000
Step = tuple[int, int]
"""Entries that come, and that go."""


class Kernel:
    """A table, and a family that counts what comes and goes: as it happens, or once received."""

    def __init__(self, held: int, *, lags: bool) -> None:
        self.made = self.ended = 0
        self.first, self.lags = held, lags
        self.heard: Step = (0, 0)
        self.before_reading: Step = (0, 0)
        self.before_counts: Step = (0, 0)
        self.instant = Instant(self.read, self.counts, self.catch_up)

    @property
    def held(self) -> int:
        return self.first + self.made - self.ended

    def step(self, one: Step) -> None:
        self.made, self.ended = self.made + one[0], self.ended + min(one[1], self.held)

    def hear(self) -> None:
        self.heard = self.made, self.ended

    def read(self, _: Sequence[Namespace] = ()) -> tuple[TableReading, ...]:
        self.step(self.before_reading)
        found = TableReading(NETNS, self.held, 1 << 20, 1 << 18)
        self.step(self.before_counts)
        return (found,)

    def catch_up(self) -> bool:
        self.hear()
        return True

    def counts(self) -> Mapping[int, Counts]:
        if not self.lags:
            self.hear()
        found = np.zeros(N_REASONS, np.uint64)
        found[Reason.NEW], found[Reason.EXPIRED] = self.heard
        return {NETNS: found}

    def look(self, before_reading: Step = (0, 0), before_counts: Step = (0, 0)) -> int:
        """What is told after a reading, with this much before it and until the counters."""
        self.before_reading, self.before_counts = before_reading, before_counts
        (table,), _ = self.instant.take(())
        return table.count


steps = st.tuples(st.integers(0, 500), st.integers(0, 500))


@given(st.integers(0, 2000), st.booleans(), st.lists(st.tuples(steps, steps, steps), max_size=6))
def test_once_a_reading_had_nothing_beside_it_all_later_ones_are_exact(
    held: int, lags: bool, looks: list[tuple[Step, Step, Step]]
) -> None:
    """Before it, they are off by no more than what came and went while one was read."""
    kernel = Kernel(held, lags=lags)
    for between, before, after in looks[:3]:
        waited = (kernel.made - kernel.heard[0], kernel.ended - kernel.heard[1]) if lags else (0, 0)
        kernel.step(between)
        seam = [sum(one) for one in zip(waited, between if lags else (0, 0), before, after)]
        assert abs(kernel.look(before, after) - kernel.held) <= sum(seam)
    kernel.hear()
    assert kernel.look() == kernel.held
    for between, before, after in looks:
        kernel.step(between)
        assert kernel.look(before, after) == kernel.held


def test_ends_that_nobody_heard_are_known_by_the_next_reading() -> None:
    kernel = Kernel(500, lags=False)
    assert kernel.look() == 500
    kernel.first -= 100  # gone without an event
    assert 403 <= kernel.look((3, 0), (4, 0)) <= kernel.held == 407
    assert kernel.look() == 407


def test_counters_that_start_again_bound_nothing() -> None:
    kernel = Kernel(500, lags=False)
    kernel.step((300, 0))
    assert kernel.look() == 800
    kernel.first, kernel.made = kernel.held, 0  # attached anew
    assert kernel.look() == 800
    assert kernel.look((5, 0), (5, 0)) == 810


def test_a_reading_ahead_of_the_events_counts_no_entry_twice() -> None:
    """As ctnetlink has it: 126 of 3,000 were in the table, and not received, when it was read."""
    kernel = Kernel(199, lags=True)
    model, known = Model(HookInfo("netlink"), Clock(0), START), Known(START)

    def batch(second: float, *, look: bool) -> None:
        tables, counts = kernel.instant.take(()) if look else ((), kernel.counts())
        made = Batch(empty(), START + int(second * SECOND), counts=counts, tables=tables)
        model.update(made)
        known.learn(made)

    batch(1.0, look=True)
    kernel.step((2873, 0))
    kernel.hear()
    kernel.before_reading = (126, 0)
    batch(2.0, look=True)
    kernel.step((1, 1))
    kernel.hear()
    batch(2.3, look=False)
    assert model.snapshot().tables[0].count == kernel.held == 3198
    # a recording that begins now starts with the table as it is now
    kernel.step((50, 7))
    kernel.hear()
    batch(2.6, look=False)
    assert known.batch.tables[0].count == kernel.held == 3241
