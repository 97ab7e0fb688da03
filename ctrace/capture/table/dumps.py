"""What is in each table, from an occasional dump through ctnetlink, where walking is impossible.

A dump carries each entry's remaining time. How long an ESTABLISHED connection has been idle follows
from the setting that gives it its time; a setting shorter than :data:`SHORTEST` may be confused
with another timeout (nf_conntrack_tcp_timeout_unacknowledged, _max_retrans), and shows nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Final, Optional

import numpy as np

from ctrace.batch import TableReading
from ctrace.errors import for_later
from ctrace.host import ctnetlink, netns
from ctrace.host.netns import Namespace
from ctrace.record import TCP, TCP_STATES, Events, Kind, boot_ns, empty, join

EVERY: Final = 5.0
"""Seconds between two readings, or more:"""
COST: Final = 50.0
"""readings take at most one part in this many of one processor."""
SHORTEST: Final = 3600
"""Seconds: shorter settings do not show how long a connection was idle."""
_SETTING: Final = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established"
WAIT: Final = 0.1
"""Seconds that a batch waits for a reading: small tables are read by then."""
KEPT: Final = 512
"""Entries of a reading that are reported at most, an even sample of each table."""


class Dumps:
    """Reads the tables when it is due, in a thread: large ones take seconds, and batches go on."""

    def __init__(self, *, left: bool = True) -> None:
        """``left``: also report the remaining time of entries whose timeout is not known."""
        self._left = left
        self._due = time.monotonic() + 1.0
        self._reading: Optional[threading.Thread] = None
        self._found = empty()

    def take(
        self, spaces: Sequence[Namespace], readings: Sequence[TableReading], now: int
    ) -> Events:
        """MET records of up to ``now`` (boot clock, ns), mostly none, dated when their part of
        a table was read. ``readings`` are the tables'."""
        if self._reading is None:
            if time.monotonic() < self._due:
                return empty()
            held = {reading.netns: reading.count for reading in readings}
            self._reading = threading.Thread(
                target=self._read, args=(tuple(spaces), held), name="ctrace-dumps", daemon=True
            )
            self._reading.start()
        self._reading.join(WAIT)
        if self._reading.is_alive():
            return empty()
        self._reading = None
        there = [space.inum for space in spaces]
        found: Events = self._found[np.isin(self._found["netns"], there)]
        self._found = empty()
        np.minimum(found["ts"], np.uint64(now), out=found["ts"])
        return found

    def _read(self, spaces: Sequence[Namespace], held: Mapping[int, int]) -> None:
        begin = time.monotonic()
        with for_later():
            self._found = self._sample(spaces, held)
        end = time.monotonic()
        self._due = end + max(EVERY, COST * (end - begin))

    def _sample(self, spaces: Sequence[Namespace], held: Mapping[int, int]) -> Events:
        step = max(1, -(-sum(held.values()) // KEPT))
        parts = []
        for space in spaces:
            first = int(time.monotonic_ns() >> 10) % step
            # The kernel walks all namespaces' entries to dump one: not for those with none to take.
            if first >= held.get(space.inum, step):
                continue
            with for_later():
                established = _established(space.path)
                for table in ctnetlink.slices(space.path):
                    if table.netns != space.inum:
                        break
                    parts.append(_met(table, slice(first, None, step), established))
                    parts[-1]["ts"] = boot_ns()
                    first = (first - len(table.events)) % step
        found = join(parts)
        if not self._left:
            found["overdue_ms"][found["idle_ms"] < 0] = 0
        return found


def _established(path: str) -> int:
    """Seconds that the namespace gives an ESTABLISHED connection; 0 where unknown."""
    with netns.enter(path), open(_SETTING) as file:
        return int(file.read())


def _met(table: ctnetlink.Table, at: slice, established: int) -> Events:
    """An even part of the entries; the order of a dump is the hash table's."""
    found: Events = table.events[at].copy()
    left = table.left[at].astype(np.int64) * 1000
    found["kind"] = Kind.MET
    found["idle_ms"] = -1
    found["timeout_ms"] = 0
    found["overdue_ms"] = np.where(left > 0, -left, 0).clip(-(1 << 31), 0)
    found["mark"] = table.mark[at]
    if established >= SHORTEST:
        whole = established * 1000
        open_ = (found["proto"] == TCP) & (found["state"] == TCP_STATES.index("ESTABLISHED"))
        open_ &= (left > SHORTEST * 100) & (left <= whole)
        found["idle_ms"][open_] = (whole - left[open_]).clip(0, (1 << 31) - 1)
    return found
