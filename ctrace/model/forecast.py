"""When a table will be full, or where it levels off: from the rate of new entries and how long they
stay.

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
"""Seconds over which the rate of new entries is measured, at most; less where it changed."""
LEAST: Final = 4
"""Readings. With fewer, nothing is predicted."""
HORIZON: Final = 7 * 86400.0
"""Seconds: a table that would be full later than this is not filling."""
GROWTH: Final = 0.5
"""Share of the time watched by which entries are trusted to stay longer, if their timeout allows.
Twice as much would announce full tables for loads that level off."""
BURSTS: Final = 3.0
"""Times the variance of random arrivals, from which entries are said to come in bursts."""
SETTLED: Final = 0.05
"""Share that stays longer than was watched, below which the level is known."""
_TIMES: Final = np.concatenate([[0.0], np.geomspace(0.5, HORIZON, 240)])


@dataclass(frozen=True)
class Reading:
    """The kernel's count at one moment, and the inserts up to then."""

    at: float
    """Seconds."""
    count: int
    inserted: int


@dataclass(frozen=True)
class Staying:
    """How long a table's entries stay."""

    curve: Survival
    ages: F64
    """Seconds, of some living entries; at least one."""
    left: float
    """Seconds of timeout that nearly all have left: none expires before that."""
    waiting: bool
    """Whether nearly all are closed and only wait for their timeout."""


@dataclass(frozen=True)
class Forecast:
    """Seconds until full and the final number of entries, each with its possible error."""

    full: Optional[float] = None
    full_error: Optional[float] = None
    level: Optional[float] = None
    level_error: Optional[float] = None


def forecast(  # noqa: PLR0911 - each way of not knowing by itself
    readings: list[Reading], limit: int, stays: Callable[[], Optional[Staying]]
) -> Forecast:
    """The forecast from readings about a second apart, oldest first; none where they do not rise,
    or where the table is at its limit already, or above a limit that was lowered.

    ``stays`` is called only where they do: most of many tables stand still.
    """
    if not limit or len(readings) < LEAST:
        return Forecast()
    counts = [reading.count for reading in readings[-LEAST:]]
    if counts[-1] < counts[-2] or counts[-1] <= counts[0] or counts[-1] >= limit:
        return Forecast()
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
    """New entries a second, between readings, as far back as the rate was about what it is now."""
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
    """Seconds by which this many entries may come sooner or later: by chance, or because they come
    in bursts with gaps."""
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
    """Change of the rate per second, with two standard errors."""
    n = len(rates)
    if n < 8:
        return 0.0, 0.0
    t = np.arange(n) - (n - 1) / 2
    square = float((t**2).sum())
    slope = float((t * rates).sum() / square)
    rest = rates - rates.mean() - slope * t
    return slope, 2 * float(np.sqrt((rest**2).sum() / (n - 2) / square))


def _survivals(staying: Staying) -> tuple[F64, F64]:
    """The share that stays longer than each of ``_TIMES``: at least, and at most."""
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
    """Entries at each of ``_TIMES``: of those there now, and of those still to come.

    A falling rate is assumed to stay as low as it is now, a rising one as high.
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
