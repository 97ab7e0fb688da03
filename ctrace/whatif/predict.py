"""How many entries a load holds: rate times residence, plus the kernel's lazy collection.

Expired entries stay until gc_worker (nf_conntrack_core.c) or a lookup finds them, and
count. How long is the table model's arithmetic (:mod:`ctrace.whatif.table`), the
same as a what-if's; here it is applied to a load that goes on as it was seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Optional

import numpy as np

from ctrace.model.snapshot import Culprit, Percentiles, Table
from ctrace.whatif.table import (
    GC_SCAN_INTERVAL_CLAMP,
    GC_SCAN_INTERVAL_MAX,
    collected,
    next_interval,
)

GC_MEAN: Final = 35.0
"""Seconds that expired entries wait on average at most: half the interval, and a little
for passes that give up early (measured: 32 with 120 s timeouts)."""
LASTING: Final = 3600.0
"""Seconds: entries with longer timeouts do not expire while anybody looks on."""
POINTS: Final = (np.arange(16) + 0.5) / 16
"""Remaining timeouts of a steady load are spread evenly over its timeout."""

Service = tuple[str, int]
"""Protocol and port."""
Part = tuple[str, int, bool]
"""A service's closed (TCP) or unanswered (UDP) entries if True, else its others."""


@dataclass(frozen=True)
class Range:
    """A number of entries that is not known more closely than this."""

    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)


def load(rate: float, timeout: float) -> Range:
    """Entries held by ``rate`` new ones a second that live ``timeout`` seconds each.

    The lag of collection depends on every namespace's entries, so the range is as
    wide as its longest interval makes it.
    """
    return Range(*collected(rate * timeout, rate, GC_SCAN_INTERVAL_MAX))


def shortened(culprit: Culprit, share: float, old: float, new: float) -> Range:
    """Entries freed when ``share`` of a key's entries wait ``new`` instead of ``old`` seconds."""
    if new >= old or not culprit.held:
        return Range(0.0, 0.0)
    affected = culprit.held * share
    # Without and with the full lag on both sides of the comparison.
    bare = affected * (1 - new / old)
    lagged = affected * (1 - (new + GC_MEAN) / (old + GC_MEAN))
    return _by_timeout(culprit.residence, new, Range(min(bare, lagged), max(bare, lagged)))


def _by_timeout(stays: Percentiles, new: float, freed: Range) -> Range:
    """Less, where something else than the timeout ends entries: a port that is used again, an RST.

    Those that go before the new timeout anyway are not freed by it.
    """
    if stays.by == "timeout":
        return freed
    if stays.p90 is not None and stays.p90 <= new:
        return Range(0.0, 0.1 * freed.high)
    if stays.p50 is None or stays.p50 > new:
        return freed
    return Range(0.0, freed.high)


@dataclass(frozen=True)
class _Stream:
    """Part of a table: entries that come at a rate and wait out one timeout."""

    part: Part
    held: float
    rate: float
    timeout: float
    refused: float
    """Packets a second that found the table full: what comes in once there is room, at most."""

    @property
    def expiring(self) -> float:
        """Entries a second whose timeout passes."""
        return self.rate if self.timeout < LASTING else 0.0

    @property
    def living(self) -> float:
        """Entries whose timeout has not passed, as far as the rate tells."""
        return min(self.held, self.rate * self.timeout) if self.expiring else self.held


class Outlook:
    """One namespace's table if everything goes on as it was seen, with and without levers."""

    def __init__(
        self, table: Table, culprits: Iterable[Culprit], timeouts: Mapping[str, int]
    ) -> None:
        self.max = table.max
        self.streams = [s for one in culprits for s in _streams(one, timeouts)]
        self.rest = max(0.0, table.count - sum(stream.held for stream in self.streams))
        """Entries of services that are not among ``culprits``: they stay."""

    def fill(
        self, untrack: Iterable[Service] = (), shorter: Optional[Mapping[Part, float]] = None
    ) -> Optional[tuple[float, float]]:
        """Mean fill without some services and with other timeouts, lowest first."""
        if not self.max:
            return None
        low, high = self._after(set(untrack), shorter or {})
        return round(low / self.max, 4), round(high / self.max, 4)

    def expected(
        self, untrack: Iterable[Service] = (), shorter: Optional[Mapping[Part, float]] = None
    ) -> float:
        """The middle of that: expired entries wait half an interval on average."""
        low, high = self._after(set(untrack), shorter or {}, growing=False)
        return (low + high) / 2 / self.max if self.max else 0.0

    @property
    def most(self) -> float:
        """Entries that it holds in the end if nothing is done, at most; the limit aside."""
        return self._after(set(), {}, limited=False)[1]

    def _after(
        self,
        untrack: set[Service],
        shorter: Mapping[Part, float],
        *,
        growing: bool = True,
        limited: bool = True,
    ) -> tuple[float, float]:
        before = _interval((stream.timeout, stream.living) for stream in self.streams)
        expiring, refused, prompt, most = 0.0, 0.0, self.rest, self.rest
        left: list[tuple[float, float]] = []
        for stream in self.streams:
            if stream.part[:2] in untrack:
                continue
            timeout = min(stream.timeout, shorter.get(stream.part, stream.timeout))
            # What it holds now depends on when the last collection was; its rate does not.
            alive = max(stream.living, stream.held - stream.expiring * before)
            alive = max(0.0, alive - stream.expiring * (stream.timeout - timeout))
            left.append((timeout, alive))
            prompt += alive
            # Where it has not yet held them for a whole timeout, it is still growing.
            most += max(alive, stream.expiring * timeout) if growing else alive
            most += stream.refused * min(timeout, LASTING) if growing else 0.0
            expiring += stream.expiring
            refused += stream.refused if growing else 0.0
        after = _interval(left)
        limit = float(self.max) if self.max and limited else float("inf")
        return (
            collected(prompt, expiring, after, limit)[0],
            collected(most, expiring + refused, after, limit)[1],
        )


def _streams(culprit: Culprit, timeouts: Mapping[str, int]) -> Iterator[_Stream]:
    if culprit.proto == "tcp":
        share, first, other = (
            1.0 if culprit.closed is None else culprit.closed,
            timeouts["tcp_timeout_time_wait"],
            timeouts["tcp_timeout_established"],
        )
    elif culprit.proto == "udp":
        # Only flows with more than two packets over two seconds reach the longer timeout.
        share, first = culprit.unreplied or 0.0, timeouts["udp_timeout"]
        other = first
    else:
        share, first, other = 0.0, timeouts["icmp_timeout"], timeouts["icmp_timeout"]
    for closed, part, timeout in ((True, share, first), (False, 1 - share, other)):
        yield _Stream(
            (culprit.proto, culprit.port or 0, closed),
            culprit.held * part,
            culprit.new_per_s * part,
            float(timeout),
            culprit.drop_per_s * part,
        )


def _interval(living: Iterable[tuple[float, float]]) -> float:
    """gc_worker's pause, from (timeout, entries) of what is in the table and not expired."""
    parts = list(living)
    left = [min(timeout, GC_SCAN_INTERVAL_CLAMP) * POINTS for timeout, _ in parts]
    many = np.repeat([n / len(POINTS) for _, n in parts], len(POINTS))
    return next_interval(np.concatenate(left) if left else np.zeros(0), many)
