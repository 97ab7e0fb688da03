"""The kernel's count of a table, brought to the instant of our counters.

The count and the counters of what came and went are read one after the other, and with ctnetlink
the counters know of an event only once it was received. What comes between is in one of the two
alone, and would be counted twice, or not at all, until the next reading.

Entries less those that came, plus those that went, is a number that stays the same. Counters from
before and after a reading bound it; the bounds of all readings together hold it more closely, and
exactly once nothing came while one was read. Where they contradict each other, events were not
heard: then the last reading alone is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ctrace.batch import Counts, TableReading, made_and_ended
from ctrace.host.netns import Namespace

_Tables = tuple[TableReading, ...]


class Instant:
    """Readings of tables and counters that speak of one moment."""

    def __init__(
        self,
        read: Callable[[Sequence[Namespace]], _Tables],
        counts: Callable[[], Mapping[int, Counts]],
        catch_up: Callable[[], bool],
    ) -> None:
        """``catch_up`` brings the counters up to now; whether it could."""
        self._read, self._counts, self._catch_up = read, counts, catch_up
        self._bounds: dict[int, tuple[int, int]] = {}
        """By namespace: what its table has more than came less went, at least and at most."""

    def take(self, spaces: Sequence[Namespace]) -> tuple[_Tables, Mapping[int, Counts]]:
        """Counters, and the tables as of when these were read."""
        before, tables = self._counts(), self._read(spaces)
        whole, counts = self._catch_up(), self._counts()
        old, self._bounds = self._bounds, {}
        if not whole:
            return tables, counts
        return tuple(self._at(one, before, counts, old) for one in tables), counts

    def _at(
        self,
        table: TableReading,
        before: Mapping[int, Counts],
        after: Mapping[int, Counts],
        old: Mapping[int, tuple[int, int]],
    ) -> TableReading:
        netns = table.netns
        came, went = made_and_ended(before.get(netns))
        made, ended = made_and_ended(after.get(netns))
        if made < came or ended < went:  # attached anew: they count from zero again
            return table
        low, high = table.count - made + went, table.count - came + ended
        known = old.get(netns, (low, high))
        if max(low, known[0]) <= min(high, known[1]):
            low, high = max(low, known[0]), min(high, known[1])
        self._bounds[netns] = low, high
        more = min(max(table.count - made + ended, low), high)
        return replace(table, count=max(more + made - ended, 0))
