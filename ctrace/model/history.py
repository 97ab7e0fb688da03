"""The last minutes, one point per interval."""

from __future__ import annotations

from collections import deque
from typing import Final

from ctrace.model.snapshot import History, Rates

POINTS: Final = 600


class Points:
    """A bounded series of what the whole machine did in each interval."""

    def __init__(self, points: int = POINTS) -> None:
        self._rows: deque[tuple[float, int, float, float, float, float]] = deque(maxlen=points)

    def add(self, utc: float, count: int, rates: Rates) -> None:
        """One interval."""
        self._rows.append((utc, count, rates.insert, rates.destroy, rates.drop, rates.early_drop))

    def view(self) -> History:
        """Oldest first."""
        if not self._rows:
            return History()
        ts, count, insert, destroy, drop, early = zip(*self._rows, strict=True)
        return History(ts, count, insert, destroy, drop, early)
