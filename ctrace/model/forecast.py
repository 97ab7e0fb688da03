"""When a table is full, or where it levels off: from the rate of new entries and their stay.

A straight line through the past says nothing of entries that leave: a steady load of entries that
stay for 30 s rises for 30 s and then no more. What is known: how many come a second, how long
those stay that were watched, and that entries that wait out a timeout cannot expire before it.
Beyond that, both are reckoned: that all that is older than was ever watched stays, and that it
goes. A time is told only where the table fills either way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.model.histogram import EDGES
from ctrace.model.stays import Survival

F64 = npt.NDArray[np.float64]

WINDOW: Final = 60.0
"""Seconds that the rate of new entries is taken from, at most: less where it has changed."""
LEAST: Final = 4
"""Readings without which nothing is said."""
HORIZON: Final = 7 * 86400.0
"""Seconds: a table that would be full later than this is not filling."""
GROWTH: Final = 0.5
"""Entries that were watched for so long are trusted to stay for half as long again, if their
timeout allows: one that has twice the room would be told of loads that level off."""
BURSTS: Final = 3.0
"""Times the variance that chance has, from which on entries come in bursts."""
SETTLED: Final = 0.05
"""Share that stays longer than was watched, below which it is known where a table levels off."""
_TIMES: Final = np.concatenate([[0.0], np.geomspace(0.5, HORIZON, 240)])


@dataclass(frozen=True)
class Reading:
    """The kernel's count at one moment, and what was inserted up to then."""

    at: float
    """Seconds."""
    count: int
    inserted: int


@dataclass(frozen=True)
class Staying:
    """How long a table's entries stay."""

    curve: Survival
    ages: F64
    """Of some living entries, seconds; at least one."""
    left: float
    """Seconds that nearly all have left of their timeout: before, none expires."""
    waiting: bool
    """Whether nearly all are closed and wait for nothing but that."""


@dataclass(frozen=True)
class Forecast:
    """Seconds to full and entries in the end, each with what it may be off by."""

    full: Optional[float] = None
    full_error: Optional[float] = None
    level: Optional[float] = None
    level_error: Optional[float] = None


def forecast(  # noqa: PLR0911 - each way of not knowing by itself
    readings: list[Reading], limit: int, stays: Callable[[], Optional[Staying]]
) -> Forecast:
    """From readings of about a second, oldest first; nothing where they do not rise.

    ``stays`` is asked only where they do: most of many tables stand still.
    """
    if not limit or len(readings) < LEAST:
        return Forecast()
    counts = [reading.count for reading in readings[-LEAST:]]
    if counts[-1] < counts[-2] or counts[-1] <= counts[0]:
        return Forecast()
    if counts[-1] >= limit:
        return Forecast(0.0, 0.0)
    rates = _rates(readings)
    if len(rates) < LEAST - 1:  # a host that stood still for long
        return Forecast()
    staying = stays()
    if staying is None or staying.curve.until <= 0:
        return Forecast()
    low, high = _between(rates)
    if high[0] <= 0:
        return Forecast()
    least, most = _survivals(staying)
    now = counts[-1]
    fewest = _course(now, low, least, staying.ages)
    many = _course(now, high, most, staying.ages)
    early, late = _reaches(many, limit), _reaches(fewest, limit)
    if early is not None and late is not None:
        sooner, later = _uneven(rates, limit - now)
        early, late = max(0.0, early - sooner), late + later
        return Forecast((early + late) / 2, (late - early) / 2)
    if early is None and staying.curve.share[-1] < SETTLED:
        ends = [float(low[0] * _area(least)[-1]), float(high[0] * _area(most)[-1])]
        return Forecast(level=sum(ends) / 2, level_error=max((ends[1] - ends[0]) / 2, 1.0))
    return Forecast()


def _rates(readings: list[Reading]) -> F64:
    """New entries a second, between readings, as far back as they were about as many as now."""
    some = [reading for reading in readings if reading.at >= readings[-1].at - WINDOW]
    at = np.array([reading.at for reading in some])
    steps = np.maximum(np.diff(at), 1e-3)
    rates = np.diff([reading.inserted for reading in some]) / steps
    if len(rates) <= 3:
        return rates
    back, n = rates[::-1], np.arange(1, len(rates) + 1)
    mean = np.cumsum(back) / n
    variance = np.maximum(np.cumsum(back**2) / n - mean**2, np.maximum(mean, 1.0))
    apart = np.flatnonzero(np.abs(mean - mean[2]) > np.sqrt(3 * variance))
    apart = apart[apart >= 3]
    return rates[-int(apart[0]) :] if apart.size else rates


def _uneven(rates: F64, entries: int) -> tuple[float, float]:
    """Seconds by which so many entries may come sooner, or later: they come by chance, or in
    bursts with gaps between."""
    mean = max(float(rates.mean()), 1e-9)
    spread = max(1.0, float(rates.var()) / mean)
    chance = 2 * float(np.sqrt(entries * spread)) / mean + 1.0
    if spread < BURSTS:
        return chance, chance
    gap = longest = 0
    for rate in rates:
        gap = gap + 1 if rate < mean / 2 else 0
        longest = max(longest, gap)
    return chance + longest, chance + longest


def _between(chosen: F64) -> tuple[F64, F64]:
    """New entries a second at each of ``_TIMES``: at least, and at most."""
    mean, n = float(chosen.mean()), len(chosen)
    noise = max(float(chosen.std(ddof=1)), float(np.sqrt(max(mean, 1.0)))) / np.sqrt(n)
    half = abs(float(chosen[: n // 2].mean()) - float(chosen[n // 2 :].mean())) / 2
    error = 2 * max(noise, half)
    slope, slope_error = _slope(chosen)
    rising = slope + slope_error if slope > 0 else 0.0
    falling = slope - slope_error if slope < -slope_error else 0.0
    low = np.maximum(mean - error + falling * _TIMES, 0.0)
    return low, np.maximum(mean + error + rising * _TIMES, 0.0)


def _slope(rates: F64) -> tuple[float, float]:
    """Change of the rate in a second, with two standard errors."""
    n = len(rates)
    if n < 8:
        return 0.0, 0.0
    t = np.arange(n) - (n - 1) / 2
    square = float((t**2).sum())
    slope = float((t * rates).sum() / square)
    rest = rates - rates.mean() - slope * t
    return slope, 2 * float(np.sqrt((rest**2).sum() / (n - 2) / square))


def _survivals(staying: Staying) -> tuple[F64, F64]:
    """Which share stays longer than each of ``_TIMES``: at least, and at most."""
    curve = staying.curve
    most = np.interp(_TIMES, EDGES, curve.share)
    most[curve.until < _TIMES] = curve.share[-1]
    trusted = curve.until + min(staying.left, np.inf if staying.waiting else GROWTH * curve.until)
    least = most.copy()
    beyond = curve.until < _TIMES
    # those that end otherwise than by their timeout go on to do so
    tail = max(float(curve.share[-1]), 1e-9)
    least[beyond] = tail * tail ** ((_TIMES[beyond] - curve.until) / curve.until)
    least[trusted < _TIMES] = 0.0
    return least, most


def _area(share: F64) -> F64:
    """The integral of a share over time, up to each of ``_TIMES``."""
    parts = (share[1:] + share[:-1]) / 2 * np.diff(_TIMES)
    return np.concatenate([[0.0], np.cumsum(parts)])


def _course(now: int, rate: F64, share: F64, ages: F64) -> F64:
    """Entries at each of ``_TIMES``: of those that are there now, and of those that come.

    A rate that falls is reckoned as if it had been so low from now on, one that rises as so high.
    """
    at_age = np.maximum(np.interp(ages, _TIMES, share), 1e-9)
    later = np.interp(ages[:, None] + _TIMES[None, :], _TIMES, share, right=float(share[-1]))
    stay = np.minimum(later / at_age[:, None], 1.0).mean(axis=0)
    course: F64 = now * stay + rate * _area(share)
    return course


def _reaches(course: F64, limit: int) -> Optional[float]:
    """When a course first reaches the limit, between two of ``_TIMES``."""
    at = np.flatnonzero(course >= limit)
    if not at.size:
        return None
    first = int(at[0])
    if not first:
        return 0.0
    part = (limit - course[first - 1]) / (course[first] - course[first - 1])
    return float(_TIMES[first - 1] + part * (_TIMES[first] - _TIMES[first - 1]))
