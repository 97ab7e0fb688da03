"""How long entries stay, with those that are still there counted.

While entries outlive the time observed, those that have ended are the odd ones: reset, reopened,
evicted. So this is Kaplan and Meier's estimator: at each age, the share that went of those that
were there at that age, whether they have ended or live on. Only entries whose insert was seen
count, ended or living.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.model import histogram
from ctrace.model.composition import Looks, closed
from ctrace.model.snapshot import Percentiles

FEW: Final = 10
"""Below so many entries of an age nothing is said of that age."""
MOSTLY: Final = 0.75
"""Share of closed entries from which on their timeout tells how long entries stay."""

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Survival:
    """Which share of entries stays longer than each edge of :data:`histogram.EDGES`."""

    share: F64
    """(BINS + 1,); constant beyond ``until``."""
    until: float
    """Seconds: ages up to which it is known."""
    n: int
    """Ends that it rests on."""
    living: int
    """Living entries that it rests on."""

    def quantile(self, q: float) -> Optional[float]:
        """How long the first share ``q`` of entries stays at most; None while unknown."""
        below = np.flatnonzero(self.share <= 1 - q)
        if not below.size or below[0] == 0:
            return None
        at = int(below[0])
        low, high = histogram.EDGES[at - 1], histogram.EDGES[at]
        before, after = self.share[at - 1], self.share[at]
        inside = (before - (1 - q)) / (before - after) if before > after else 1.0
        return float(low + (high - low) * inside)

    def at_least(self) -> Optional[float]:
        """Seconds that surely half of the entries stay, while their median is unknown."""
        return self.until if self.until > 0 and self.quantile(0.5) is None else None


@dataclass(frozen=True)
class Living:
    """The entries that live, of those whose insert was seen."""

    ages: F64
    """Of some of them, seconds."""
    of: float
    """How many they stand for."""
    young: float = 0.0
    """How many were made since those were looked at."""
    young_age: float = 0.0


def survival(ended: npt.NDArray[np.int64], born_ended: int, living: Living) -> Survival:
    """From ``ended``, a histogram of measured residences, and the ages of the living.

    ``born_ended``: how many entries have ended of those whose insert was seen; what was measured
    stands for them.
    """
    edges = histogram.EDGES
    ages = np.histogram(np.clip(living.ages, 0, edges[-1]), edges)[0].astype(float)
    n, looked = int(ended.sum()), int(ages.sum())
    raw = ended + ages
    gone = ended * (max(born_ended, 0) / n if n else 0.0)
    stay = ages * (max(living.of, 0.0) / looked if looked else 0.0)
    stay[np.searchsorted(edges, living.young_age, side="right") - 1] += living.young
    at_risk = np.cumsum((gone + stay)[::-1])[::-1]
    known = np.cumsum(raw[::-1])[::-1] >= FEW
    # who was last seen inside a bin was there for half of it
    exposed = np.maximum(at_risk - stay / 2, 1e-9)
    step = np.where(known, 1 - np.minimum(gone / exposed, 1.0), 1.0)
    share = np.concatenate([[1.0], np.cumprod(step)])
    last = int(np.flatnonzero(known)[-1]) if known.any() else -1
    return Survival(share, float(edges[last]) if last >= 0 else 0.0, n, looked)


def told(
    curve: Survival, looks: Looks, held: int, rate: float, young: Optional[float] = None
) -> Percentiles:
    """What is said of how long entries stay, wherever it is said.

    Measured, or, for closed connections that nothing but their timeout ends, by that; ``looks``
    are at those ``held``, and ``rate`` new ones come a second. ``young``: the timeout of closed
    ones, where looks at young entries found most of them closed already.
    """
    found = _told(curve, looks)
    if found.p50 is None and young is not None and curve.until > 0 and _lasts(curve, young):
        found = replace(found, p50=young, at_least=None, by="timeout")
    return replace(found, by_load=held / rate if held and rate > 0 else None)


def _told(curve: Survival, looks: Looks) -> Percentiles:
    p50, p90, p99 = (curve.quantile(q) for q in (0.5, 0.9, 0.99))
    if p50 is not None:
        return Percentiles(p50, p90, p99, curve.n, living=curve.living, by="ends")
    known = looks[~np.isnan(looks["age"]) & ~np.isnan(looks["left"])]
    waiting = known[closed(known)]
    if len(waiting) >= max(FEW, MOSTLY * len(looks)) and curve.until > 0:
        timeout = float(np.median(waiting["age"] + waiting["left"]))
        if _lasts(curve, timeout):
            return Percentiles(timeout, None, None, curve.n, living=curve.living, by="timeout")
    return Percentiles(n=curve.n, living=curve.living, at_least=curve.at_least())


def _lasts(curve: Survival, seconds: float) -> bool:
    """Whether half would still be there by then if they go on to end as they did."""
    share = float(curve.share[-1])
    return seconds <= curve.until or share ** (seconds / curve.until) > 0.5
