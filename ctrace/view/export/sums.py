"""Counters of the tables that share a label: what has gone goes on counting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Generic, TypeVar

Name = TypeVar("Name")


class Sums(Generic[Name]):
    """Sums that never fall, for a counter that falls looks like one that began anew.

    Held are the labels seen, of which a budget allows so many, and the tables of now.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[str, int], Mapping[Name, int]] = {}
        self._gone: dict[str, Counter[Name]] = {}

    def of(self, told: Mapping[tuple[str, int], Mapping[Name, int]]) -> dict[str, Counter[Name]]:
        """Counters by label, those of tables that have gone included.

        ``told`` holds the current counters by label and namespace. A label without a table is
        left out.
        """
        for place, was in list(self._last.items()):
            now = told.get(place)
            if now is None or any(now.get(name, 0) < value for name, value in was.items()):
                self._gone.setdefault(place[0], Counter()).update(was)
                del self._last[place]
        self._last.update(told)
        sums: dict[str, Counter[Name]] = {}
        for (label, _), values in told.items():
            if label not in sums:
                sums[label] = Counter(self._gone.get(label, {}))
            sums[label].update(values)
        return sums
