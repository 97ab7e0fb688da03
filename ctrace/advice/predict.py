"""How many entries a load holds: rate times residence, plus the kernel's lazy collection.

Expired entries stay until gc_worker (nf_conntrack_core.c) or a lookup finds them.
Its interval is the running mean of the remaining timeouts, from 1 to 60 seconds,
and the count includes them: the mean is about r (T + g/2), the peak r (T + g).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ctrace.model.snapshot import Culprit

GC_MAX: Final = 60.0
"""Seconds: GC_SCAN_INTERVAL_MAX."""
GC_MEAN: Final = 35.0
"""Seconds that expired entries wait on average at most: half the interval, and a little
for passes that give up early (measured: 32 with 120 s timeouts)."""


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
    return Range(rate * timeout, rate * (timeout + GC_MAX))


def peak(rate: float, timeout: float) -> float:
    """The most that such a load can hold at once."""
    return rate * (timeout + GC_MAX)


def held(culprit: Culprit) -> Range:
    """Mean entries that a key will hold if it goes on as it is.

    What it holds now includes today's lag of collection, between nothing and 35
    seconds on average, which changes with what else is in the table. Where it is
    still growing, its measured residence says where it will end.
    """
    slack = culprit.new_per_s * GC_MEAN
    low, high = max(0.0, culprit.held - slack), culprit.held + slack
    residence = culprit.residence
    if residence.n and residence.p50 is not None:
        steady = culprit.new_per_s * residence.p50
        high = max(high, steady)
        low = min(low, steady)
    return Range(low, high)


def shortened(culprit: Culprit, share: float, old: float, new: float) -> Range:
    """Entries freed when ``share`` of a key's entries wait ``new`` instead of ``old`` seconds."""
    if new >= old or not culprit.held:
        return Range(0.0, 0.0)
    affected = culprit.held * share
    # Without and with the full lag on both sides of the comparison.
    bare = affected * (1 - new / old)
    lagged = affected * (1 - (new + GC_MEAN) / (old + GC_MEAN))
    return Range(min(bare, lagged), max(bare, lagged))
