"""How long entries stay, including those that are still there.

While entries outlive the time observed, those that have ended are the odd ones: reset, reopened,
evicted. So this is Kaplan and Meier's estimator: at each age, the share that went of those that
were there at that age, whether they have ended or live on. Only entries whose insert was seen
count, ended or living.

How long they live, from the first packet to the last, is told alike: by those that have ended,
those that are closed and wait for their end, and those that are open, which live longer than they
have lived. Whether a flow without a close is over shows only once its timeout has passed: so those
have lived for as long as they had when that began.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.model import histogram
from ctrace.model.composition import Looks, closed
from ctrace.model.keys.columns import ESTABLISHED
from ctrace.model.snapshot import Percentiles, Residence
from ctrace.record import TCP

TOGETHER: Final = 0.4
"""Part of all entries by which the share that one collection left may be off: it took those that
had expired by then, at once. Two standard errors where pauses are of any length up to the longest,
and entries expire evenly: of a pause p of the longest 1, min(1, x / p) waited for less than the
median x = 1 - sqrt(1/2); 2 sqrt(mean(p^2 (min(1, x / p) - 1/2)^2)) / mean(p) is 0.402."""
VAGUE: Final = 0.5
"""Share of a median that it may be off by, at most, to be told: beyond that, one would act
on it as on a number, and it is none."""
FEW: Final = 10
"""Entries of an age. With fewer, nothing is said about that age."""
MOSTLY: Final = 0.75
"""Share of closed entries above which their timeout shows how long entries stay."""

SHORT: Final = 0.05
"""Seconds: a median that may be off by no more is told."""
NOTHING: Final = 0.05
"""Share of unknown entries up to which no quantile changes by more than chance."""
UNEVEN: Final = 0.25
"""Part by which the rates of a steady load differ: generators and the interval's ends jitter."""
ALIKE: Final = 1.25
"""Factor: stays that differ by less count as one."""

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Survival:
    """The share of entries that stays longer than each edge of :data:`histogram.EDGES`."""

    share: F64
    """(BINS + 1,); constant beyond ``until``."""
    until: float
    """Seconds: ages up to which it is known."""
    n: int
    """Number of ends that it is based on."""
    living: int
    """Number of living entries that it is based on."""
    at_least: Optional[float] = None
    """Seconds that half of the entries have stayed already."""
    at_most: Optional[float] = None
    """Seconds within which half of them have gone already."""

    def quantile(self, q: float) -> Optional[float]:
        """The time within which the first share ``q`` of entries has gone; None while unknown."""
        below = np.flatnonzero(self.share <= 1 - q)
        if not below.size or below[0] == 0:
            return None
        at = int(below[0])
        low, high = histogram.EDGES[at - 1], histogram.EDGES[at]
        before, after = self.share[at - 1], self.share[at]
        inside = (before - (1 - q)) / (before - after) if before > after else 1.0
        return float(low + (high - low) * inside)

    def off(self, ends: int) -> Optional[float]:
        """Seconds that the median may be off by, either way, if that many ``ends`` came by
        themselves; None where it may be any."""
        part = 1 / np.sqrt(max(self.n + self.living, 1)) + TOGETHER / np.sqrt(max(ends, 1))
        low, middle = self.quantile(max(0.5 - part, 0.0)) or 0.0, self.quantile(0.5)
        high = self.quantile(0.5 + part) if part < 0.5 else None
        high = min(high or np.inf, self.at_most or np.inf)
        if middle is None or math.isinf(high):
            return None
        low = max(low, self.at_least or 0.0)
        return max(middle - low, high - middle, 0.0) + histogram.RELATIVE_ERROR / 2 * middle


@dataclass(frozen=True)
class Living:
    """The living entries, of those inserted while ctrace watched."""

    ages: F64
    """Of some of them, seconds."""
    of: float
    """How many entries they represent."""
    young: float = 0.0
    """How many were inserted since those were looked at."""
    young_age: float = 0.0


def survival(ended: npt.NDArray[np.int64], born_ended: int, living: Living) -> Survival:
    """From ``ended``, a histogram of measured residences, and the ages of the living.

    ``born_ended`` is the number of ended entries whose insert was seen; the measured ones are
    a sample of them.
    """
    edges = histogram.EDGES
    ages = histogram.count(living.ages).astype(float)
    n, looked = int(ended.sum()), int(ages.sum())
    if not n and born_ended > NOTHING * (born_ended + living.of + living.young):
        return Survival(np.ones(len(edges)), 0.0, 0, looked)  # those left would speak for all
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
    until = float(edges[last]) if last >= 0 else 0.0
    total = max(float(at_risk[0]), 1e-9)
    at_least, at_most = (
        _stayed(at_risk / total, min(n + looked, round(total))),
        _went(gone / total, n < born_ended),
    )
    return Survival(share, until, n, looked, at_least, at_most)


def _stayed(still: F64, seen: int) -> Optional[float]:
    """Seconds that half of the entries have stayed by now, beyond the chance of a sample."""
    error = 2 * np.sqrt(still * (1 - still) / max(seen, 1))
    sure = np.flatnonzero(still - error > 0.5)
    return float(histogram.EDGES[sure[-1]]) or None if sure.size else None


def _went(gone: npt.NDArray[np.floating[Any]], sampled: bool) -> Optional[float]:
    """Seconds within which half of the entries have gone; None where fewer have, or only some of
    those were measured."""
    sure = np.flatnonzero(np.cumsum(gone) >= 0.5)
    return float(histogram.EDGES[sure[0] + 1]) if sure.size and not sampled else None


@dataclass(frozen=True)
class Over:
    """Lives that are over."""

    ended: npt.NDArray[np.int64]
    """A histogram of those of entries that have ended."""
    gone: int
    """How many entries these represent, of those inserted while ctrace watched."""
    closed: npt.NDArray[np.int64]
    """A histogram of those of closed entries that were looked at while they were young."""


def lives(
    over: Over, born: int, looks: Looks, young: Mapping[str, int], even: Callable[[], F64]
) -> Percentiles:
    """How long entries live, as every view reports it.

    ``born``: entries held that were inserted while ctrace watched; ``looks`` are at some of them,
    ``young`` counts looks at young ones, and ``even`` gives their ages where there are too few
    looks.
    """
    looks = looks[~looks["older"]]
    ends = closed(looks) | (looks["idle"] >= looks["timeout"])  # closed, or expired
    if len(looks) >= min(FEW, max(born, 1)):
        share, open_ = float(ends.mean()), looks[~ends & ~np.isnan(looks["now"])]
        living, ended = lived(open_), waiting_lives(looks[ends], over.closed)
        odd = int(np.count_nonzero(_unlike(open_, looks) & (living <= 0)))
    else:
        share, living, odd = _closed_soon(young), even(), 0
        ended = over.closed
    n, looked = int(over.ended.sum()), int(ended.sum())
    gone, longer = _gone(over, young)
    gone = gone + ended * (share * born / max(looked, 1))
    each = (1 - share) * born / max(len(living), 1)
    on = histogram.count(living[living > 0]) * each
    on[-1] += longer
    exposed = np.maximum(np.cumsum((gone + on)[::-1])[::-1] - on / 2, 1e-9)
    left = np.concatenate([[1.0], np.cumprod(1 - np.minimum(gone / exposed, 1.0))])
    curve = Survival(left, 0.0, n, looked)
    unknown = odd * each + (0 if looked else share * born)
    unknown /= max(float(gone.sum() + on.sum()) + unknown, 1.0)
    p50, p90, p99 = (_sure(curve, q, unknown) for q in (0.5, 0.9, 0.99))
    return Percentiles(p50, p90, p99, max(n, looked))


def _sure(curve: Survival, q: float, unknown: float) -> Optional[float]:
    """A quantile. None if it would differ should the unknown entries (``unknown``: their share)
    have lived for long, or ended at once."""
    found = curve.quantile(q)
    if found is None or unknown <= NOTHING:
        return found
    before, after = np.interp((found / ALIKE, found * ALIKE), histogram.EDGES, curve.share)
    sure = before * (1 - unknown) >= 1 - q >= after * (1 - unknown) + unknown
    return found if sure else None


def _gone(over: Over, young: Mapping[str, int]) -> tuple[F64, float]:
    """How many ended entries had each life, and how many lived longer than any of those.

    Where a timeout was lowered under them, their ends do not tell how long they lived. Looks at
    them while they were young do: they were closed already, or lived on for an unknown time.
    """
    n, looked = int(over.ended.sum()), int(over.closed.sum())
    if n >= min(FEW, over.gone / 2) or young["young"] < FEW:
        return np.asarray(over.ended * (over.gone / max(n, 1)), np.float64), 0.0
    soon = _closed_soon(young)
    each = soon * over.gone / max(looked, 1)
    return np.asarray(over.closed * each, np.float64), (1 - soon) * over.gone


def _closed_soon(young: Mapping[str, int]) -> float:
    """The share of entries that looks at young ones found closed."""
    return min(1.0, young["closed"] / max(young["young"], 1))


def lived(looks: Looks) -> F64:
    """Seconds that each of these entries, which live on, was in use for at least, when it was
    looked at; 0: not known.

    Without a close, in use when its timeout began: it has had a packet since then.
    """
    timeout = np.where(np.isnan(looks["timeout"]), looks["age"], looks["timeout"])
    open_ = (looks["proto"] == TCP) & (looks["state"] == ESTABLISHED)
    age = looks["age"] - np.where(open_, 0.0, timeout)
    return np.asarray(np.maximum(age, 0.0), np.float64)


def _unlike(some: Looks, every: Looks) -> npt.NDArray[np.bool_]:
    """Which looks show a timeout that no ended entry can have had: longer than others', or than the
    oldest entry's age. Ended entries say nothing about these."""
    if not len(some):
        return np.zeros(0, bool)
    shortest = np.nanmin(np.append(every["timeout"], np.inf))
    oldest = np.nanmax(np.append(every["now"], 0.0))
    found: npt.NDArray[np.bool_] = ~(some["timeout"] <= min(shortest, ALIKE * oldest))
    return found


def waiting_lives(waiting: Looks, looked: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A histogram of the lives of closed entries that are held: an even sample of them, else of
    those that were ``looked`` at while they were young."""
    life = (waiting["age"] - waiting["idle"])[~np.isnan(waiting["age"] - waiting["idle"])]
    if len(life) < FEW:
        return looked
    return np.bincount(histogram.bins(np.maximum(life * 1000, 0)), minlength=histogram.BINS)


@dataclass(frozen=True)
class Going:
    """How entries went, beside how long they stayed."""

    ends: int
    """How many went by themselves, or together with others at one time."""
    pause: float
    """Seconds that expired ones may wait for their collection."""
    young: Optional[float] = None
    """The timeout of closed ones, where looks at young entries found most of them closed
    already."""
    early: float = 0.0
    """Share of those held that goes each second before its timeout, at least: those from before the
    start, too, whose ages nobody knows."""


def told(curve: Survival, looks: Looks, held: int, rate: float, going: Going) -> Residence:
    """How long entries stay, as every view reports it.

    Measured, or, for closed connections that only their timeout ends, taken from that; ``looks``
    are at those ``held``, and ``rate`` new ones come a second.
    """
    found, young = _told(curve, looks, going), going.young
    if found.p50 is None and young is not None and _lasts(curve, young, going.early):
        found = replace(found, p50=young, at_least=None, by="timeout", error=going.pause)
    return replace(found, by_load=held / rate if held and rate > 0 else None)


def pace(rate: float, came: float, seconds: float, interval: float = 1.0) -> tuple[float, bool]:
    """Entries a second of which ``came`` in so many seconds, and whether they come evenly.

    Evenly: the ``rate`` of the last ``interval`` is, but for chance, the mean. Not so of bursts,
    and of a load that stops or falls: of these the rate is the mean.
    """
    if seconds <= 0 or interval <= 0:
        return rate, True  # at the very beginning, as of a ring's first moment
    last, mean = rate * interval, came * interval / max(seconds, interval)
    chance = 2 * (math.sqrt(last) + math.sqrt(mean)) + 3
    even = abs(last - mean) <= max(chance, UNEVEN * max(last, mean))
    return (rate if even else mean / interval), even


def _told(curve: Survival, looks: Looks, going: Going) -> Residence:
    p50, p90, p99 = (curve.quantile(q) for q in (0.5, 0.9, 0.99))
    off = curve.off(going.ends)
    if p50 is not None and off is not None and off <= max(VAGUE * p50, SHORT):
        return Residence(p50, p90, p99, curve.n, living=curve.living, by="ends", error=off)
    known = looks[~np.isnan(looks["age"]) & ~np.isnan(looks["left"])]
    waiting = known[closed(known)]
    if len(waiting) >= max(FEW, MOSTLY * len(looks)):
        timeout = _middle(waiting["age"] + waiting["left"], len(looks))
        if timeout is not None and _lasts(curve, timeout, going.early):
            of = Residence(n=curve.n, living=curve.living)
            return replace(of, p50=timeout, by="timeout", error=going.pause)
    return Residence(n=curve.n, living=curve.living, at_least=curve.at_least)


def _middle(stay: npt.NDArray[np.float32], of: int) -> Optional[float]:
    """The median stay of this many entries, some of which stay longer than these show; None where
    the luck of the sample decides it, as between a reset's timeout and TIME_WAIT."""
    half, chance = of / 2 / len(stay), 1 / np.sqrt(len(stay))
    low, middle, high = np.quantile(stay, np.clip((half - chance, half, half + chance), 0, 1))
    return float(middle) if high <= ALIKE * low else None


def _lasts(curve: Survival, seconds: float, early: float) -> bool:
    """Whether half would still be there by then if they go on to end as they did."""
    if curve.until <= 0 or np.exp(-early * seconds) <= 0.5:
        return False
    share = float(curve.share[-1])
    return seconds <= curve.until or share ** (seconds / curve.until) > 0.5
