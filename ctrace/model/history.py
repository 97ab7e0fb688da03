"""The last minutes, one point per interval."""

from __future__ import annotations

from array import array
from typing import Final

from ctrace.model.snapshot import History, Rates

POINTS: Final = 600
_WIDTH: Final = 6
"""Numbers of a point: UTC seconds, entries, and four rates."""


class Points:
    """A bounded series: what a namespace, or the whole machine, did in each interval."""

    def __init__(self, points: int = POINTS) -> None:
        self._most = points * _WIDTH
        self._flat = array("d")

    def add(self, utc: float, count: int, rates: Rates) -> None:
        """One interval."""
        if len(self._flat) >= 2 * self._most:
            del self._flat[: -self._most]
        self._flat.extend((utc, count, rates.insert, rates.destroy, rates.drop, rates.early_drop))

    def view(self) -> History:
        """Oldest first."""
        flat = self._flat[-self._most :]
        ts, count, insert, destroy, drop, early = (tuple(flat[at::_WIDTH]) for at in range(_WIDTH))
        return History(ts, tuple(int(n) for n in count), insert, destroy, drop, early)
