"""What is in each table, by reading it through ctnetlink now and then: where nothing walks it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Final

import numpy as np

from ctrace.batch import TableReading
from ctrace.errors import CtraceError
from ctrace.host import ctnetlink
from ctrace.host.netns import Namespace
from ctrace.record import Events, Kind, empty, join

EVERY: Final = 5.0
"""Seconds between two readings, or more:"""
COST: Final = 50.0
"""They take at most one part of so many of one processor."""
KEPT: Final = 512
"""Entries of a reading that are told, an even part of each table."""


class Dumps:
    """Reads the tables when it is due."""

    def __init__(self) -> None:
        self._due = time.monotonic() + 1.0

    def take(
        self, spaces: Sequence[Namespace], readings: Sequence[TableReading], now: int
    ) -> Events:
        """MET records as of ``now`` (boot clock, ns): mostly none. ``readings`` of the tables."""
        begin = time.monotonic()
        if begin < self._due:
            return empty()
        held = sum(reading.count for reading in readings)
        step = max(1, -(-held // KEPT))
        parts = []
        for space in spaces:
            with contextlib.suppress(CtraceError, OSError):
                for table in ctnetlink.slices(space.path):
                    if table.netns != space.inum:
                        break
                    parts.append(_met(table, step))
        found = join(parts)
        found["ts"] = now
        end = time.monotonic()
        self._due = end + max(EVERY, COST * (end - begin))
        return found


def _met(table: ctnetlink.Table, step: int) -> Events:
    """Every ``step``th entry; the order of a dump is the hash table's."""
    at = np.arange(int(time.monotonic_ns() >> 10) % step, len(table.events), step)
    found: Events = table.events[at]
    left = table.left[at].astype(np.int64) * 1000
    found["kind"] = Kind.MET
    found["idle_ms"] = -1
    found["timeout_ms"] = 0
    found["overdue_ms"] = np.where(left > 0, -left, 0).clip(-(1 << 31), 0)
    found["mark"] = table.mark[at]
    return found
