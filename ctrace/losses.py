"""Whose the records were that a stream lost: each namespace's counters tell."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ctrace.batch import Counts
from ctrace.record import Reason


class Losses:
    """Follows the counters of what was lost."""

    def __init__(self) -> None:
        self._told: dict[int, int] = {}

    def of(self, lost: int, counts: Mapping[int, Counts], known: Collection[int]) -> dict[int, int]:
        """How many of ``lost`` records were each namespace's; where no counter tells, any of
        ``known`` may lack all of them."""
        if not lost:
            return {}
        found = {}
        for netns, its in counts.items():
            now = int(its[Reason.RING_FULL])
            if now > self._told.get(netns, 0):
                found[netns] = now - self._told.get(netns, 0)
                self._told[netns] = now
        if found.keys() - {0}:
            found.pop(0, None)  # of namespaces beyond those that are counted apart
            return found
        return dict.fromkeys(known, lost)
