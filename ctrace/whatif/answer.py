"""The answer of a what-if: numbers for each namespace, and how far they can be trusted."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Final, Optional

from ctrace.model.snapshot import Rising
from ctrace.whatif.settings import Levers

TRUST: Final = 0.05
"""Share. If the events explain the kernel's own counts no better than this, predictions are not
trusted."""
FORETOLD: Final = 0.15
"""Share. If the second half is missed by more than this, it was not predicted."""
VAGUE: Final = 1.5
"""Times the levers' effect. A wider range is reported as vague. The effect itself is only an
estimate, so the report comes before the range is twice as wide."""
ENTRY_BYTES: Final = (256, 384)
"""struct nf_conn's slab object, without and with the optional extensions, x86-64."""
BUCKET_BYTES: Final = 8


@dataclass(frozen=True)
class Outcome:
    """One course of the table, in numbers. Ranges are (lowest, highest)."""

    mean: float
    peak: float
    drops: Optional[int]
    """New flows' packets refused; None, as evictions: texts do not tell."""
    evictions: Optional[int]
    full_s: float
    """Seconds at 99 % full or above."""
    mean_range: tuple[float, float] = (math.nan, math.nan)
    peak_range: tuple[float, float] = (math.nan, math.nan)


@dataclass(frozen=True)
class Series:
    """Entries over time, at most 600 points."""

    ts: tuple[float, ...]
    """UTC seconds."""
    count: tuple[float, ...]


@dataclass(frozen=True)
class Place:
    """One namespace's answer."""

    netns: int
    name: str
    limit: int
    new_limit: int
    recorded: Outcome
    """As the kernel counted it."""
    modelled: Outcome
    """From the model, with nothing changed."""
    changed: Outcome
    """From the model, with the levers."""
    error: Optional[float]
    """By how much the second half of the recording is missed when it is predicted from the first:
    mean distance from the kernel's count, relative; None: it can't be predicted."""
    drop_error: Optional[float]
    """Predicted minus real refusals in that half, as a share of all attempts."""
    replay_error: Optional[float]
    """Mean distance from the kernel's count when every entry leaves as recorded. It shows how well
    the events explain the counts, and proves nothing about other settings. None without counts."""
    rising: Optional[Rising]
    """With the levers, at the end of the recording; None: it does not keep rising."""
    series_recorded: Series
    series_modelled: Series
    series_changed: Series

    @property
    def vague(self) -> tuple[str, ...]:
        """Those of ``mean`` and ``peak`` whose range is, or may be, wider than twice the levers'
        effect. If the range includes the value without levers, they may have no effect."""
        figures = (
            ("mean", self.modelled.mean, self.changed.mean, self.changed.mean_range),
            ("peak", self.modelled.peak, self.changed.peak, self.changed.peak_range),
        )
        return tuple(
            name
            for name, was, would, (low, high) in figures
            if high - low > VAGUE * abs(was - would) or low < was < high
        )

    @property
    def trusted(self) -> bool:
        """Whether the events explain the counts, and the first half predicts the second."""
        if self.error is None or self.replay_error is None or self.replay_error > TRUST:
            return False
        return self.error <= FORETOLD and abs(self.drop_error or 0.0) <= TRUST


@dataclass(frozen=True)
class WhatIf:
    """The whole answer."""

    levers: Levers
    seconds: float
    places: tuple[Place, ...]
    interval_s: float
    """Mean time between two collections with the levers."""
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data; NaN is null."""
        answer: dict[str, Any] = {
            "levers": str(self.levers),
            "seconds": self.seconds,
            "collection_interval": self.interval_s,
            "notes": list(self.notes),
            "namespaces": [
                {
                    **asdict(place),
                    "trusted": place.trusted,
                    "vague": place.vague,
                    "memory": memory_of(place.new_limit, self.levers.buckets),
                }
                for place in self.places
            ],
        }
        cleaned: dict[str, Any] = _clean(answer)
        return cleaned


def memory_of(limit: int, buckets: Optional[int] = None) -> tuple[int, int]:
    """Bytes that a full table of this size takes, without and with extensions."""
    table = BUCKET_BYTES * (buckets or limit)
    return limit * ENTRY_BYTES[0] + table, limit * ENTRY_BYTES[1] + table


def _clean(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
