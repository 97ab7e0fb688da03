"""Log-binned histograms of durations: eight bins in each octave from 1 ms to 49 days.

Bins are the exponent and the three top bits of the mantissa of a float, so that
a bin is at most 1/8 of its lower edge wide; a percentile is interpolated inside
its bin and is off by at most that: 12.5 % (the first bin, below 1.125 ms, by all of it).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from ctrace.model.snapshot import Histogram, Percentiles

PER_OCTAVE: Final = 8
BINS: Final = 256
RELATIVE_ERROR: Final = 1 / PER_OCTAVE
"""Upper bound of a percentile's relative error."""
ABSOLUTE_ERROR: Final = 0.001125
"""Seconds: everything below shares the first bin."""

_ONE: Final = int(np.float32(1.0).view(np.int32)) >> 20
Counts = npt.NDArray[np.int64]


def bins(milliseconds: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The bin of each duration; 0 takes everything below 1.125 ms."""
    exponent = (milliseconds.view(np.int32) >> 20) - np.int32(_ONE)
    np.maximum(exponent, 0, out=exponent)
    np.minimum(exponent, BINS - 1, out=exponent)
    return exponent.astype(np.int64)


def count(seconds: npt.NDArray[np.float64]) -> Counts:
    """A histogram of durations."""
    at = np.searchsorted(EDGES, seconds, side="right") - 1
    return np.bincount(np.minimum(np.maximum(at, 0), BINS - 1), minlength=BINS)


def _edges() -> npt.NDArray[np.float64]:
    steps = np.arange(BINS + 1)
    low = 2.0 ** (steps // PER_OCTAVE) * (1 + (steps % PER_OCTAVE) / PER_OCTAVE)
    low[0] = 0.0
    return low / 1000


EDGES: Final = _edges()
"""Edges in seconds."""


def quantile(counts: Counts, q: float) -> float | None:
    """The q-quantile in seconds, interpolated inside its bin; None if it is empty."""
    total = int(counts.sum())
    if not total:
        return None
    rank = q * total
    upto = np.cumsum(counts)
    at = int(np.searchsorted(upto, rank, side="left"))
    at = min(at, BINS - 1)
    before = int(upto[at]) - int(counts[at])
    inside = (rank - before) / int(counts[at]) if counts[at] else 0.0
    low, high = float(EDGES[at]), float(EDGES[at + 1])
    return low + (high - low) * min(max(inside, 0.0), 1.0)


def percentiles(counts: Counts) -> Percentiles:
    """p50, p90 and p99 with the number measured."""
    return Percentiles(
        quantile(counts, 0.5), quantile(counts, 0.9), quantile(counts, 0.99), int(counts.sum())
    )


def view(counts: Counts) -> Histogram:
    """The non-empty range with its edges, as views show it."""
    filled = np.flatnonzero(counts)
    if not filled.size:
        return Histogram()
    first, last = int(filled[0]), int(filled[-1])
    return Histogram(
        tuple(float(edge) for edge in EDGES[first : last + 2]),
        tuple(int(count) for count in counts[first : last + 1]),
    )
