"""The rates that a screen has seen of each row, for its page: a snapshot has only the last one."""

from __future__ import annotations

from collections import deque
from typing import Final, Optional

from ctrace.model.snapshot import Culprit, Snapshot

KEPT: Final = 120
"""Snapshots."""
ROWS: Final = 200
"""Rows of each."""

Row = tuple[str, str, Optional[int], int]


def row_of(culprit: Culprit) -> Row:
    """What identifies a row, also when a name takes the place of its address."""
    who = f"{culprit.src} {culprit.dst}" if culprit.src or culprit.dst else culprit.key
    return (who, culprit.proto, culprit.port, culprit.netns)


class Rates:
    """New entries per second of the rows shown, as far back as the screen has looked."""

    def __init__(self) -> None:
        self._seen: deque[dict[Row, float]] = deque(maxlen=KEPT)
        self._last: tuple[int, str] = (0, "")

    def take(self, snapshot: Snapshot) -> None:
        """Remember this snapshot; after a jump in time or another grouping, begin anew."""
        last, self._last = self._last, (snapshot.ts, snapshot.group)
        if snapshot.ts == last[0] and snapshot.group == last[1]:
            return
        gap = (snapshot.ts - last[0]) / 1e9
        if snapshot.group != last[1] or not 0 <= gap <= max(5.0, 5 * snapshot.interval_s):
            self._seen.clear()
        self._seen.append({row_of(one): one.new_per_s for one in snapshot.culprits[:ROWS]})

    def of(self, culprit: Culprit) -> tuple[float, ...]:
        """Oldest first; from the first snapshot that had the row."""
        row = row_of(culprit)
        found = [one.get(row) for one in self._seen]
        first = next((i for i, rate in enumerate(found) if rate is not None), len(found))
        return tuple(rate or 0.0 for rate in found[first:])
