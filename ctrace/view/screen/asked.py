"""What the screen has asked its feed for, and the rates of rows that it has seen."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Final, Optional

from ctrace.live.protocol import Feed
from ctrace.model.snapshot import Culprit, Snapshot
from ctrace.view.screen.state import State

END: Final = 1_000_000
"""The cursor's place for: the last row."""
MORE: Final = 16
"""Rows that are asked for at once: one more at a time would be a snapshot for each key."""
OTHERS: Final = 10
"""Lines of every screen that are no rows."""
KEPT: Final = 120
"""Snapshots whose rates are remembered."""
ROWS: Final = 200
"""Rows of each."""


class Asked:
    """The feed's orders. Each row takes time in every interval: no more than can be scrolled to."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._rows = 0
        self._due = False
        self.to_end = False
        """Whether the last key sent the cursor to the last row."""

    def view(self, state: State, height: int) -> None:
        """Another grouping, sort or filter: a screenful of its rows is enough for now."""
        self._rows = 0
        self.rows(state, height)
        self._feed.set_view(state.group, state.order, state.filter)
        self._due = True

    def rows(self, state: State, height: int) -> None:
        """Rows enough for the cursor and a screenful below it; never fewer for the same view."""
        needed = state.cursor + max(height - OTHERS, MORE)
        if needed > self._rows:
            self._rows = -(-needed // MORE) * MORE
            self._feed.set_rows(self._rows)
            self._due = True

    def answered(self, snapshot: Snapshot, state: State) -> bool:
        """Whether it is what was asked for since the last one that was: a screen that stands still
        shows nothing else."""
        due = self._due and (snapshot.group, snapshot.sort) == (state.group, state.order)
        self._due = self._due and not due
        return due

    def placed(self, state: State, old: Optional[Snapshot], new: Snapshot) -> State:
        """The cursor on the last row, where it was to go there and more rows have come since."""
        if not self.to_end or old is None or len(new.culprits) <= len(old.culprits):
            return state
        return replace(state, cursor=END, held=("", 0))


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
