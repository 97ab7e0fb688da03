"""What a source reports only once, kept for recordings and segments that begin later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, cast

from ctrace.batch import Batch, Counts, Names, TableReading, made_and_ended
from ctrace.beside import Beside

NAMES: Final = 65_536
"""Names of each kind that are kept; the oldest go first."""


class Known:
    """What a source has reported so far and will not report again."""

    def __init__(self, started: int) -> None:
        """``started``: boot clock, ns."""
        self.batch = replace(Batch.idle(started), names=Names({}, {}, {}, {}))
        """All names, the last counters and tables, no events."""

    @property
    def counts(self) -> dict[int, Counts]:
        """The last counters."""
        return dict(self.batch.counts)

    def learn(self, batch: Batch) -> None:
        """Remember what this batch reports."""
        names = self.batch.names
        for old, new in (
            (names.netns, batch.names.netns),
            (names.owners, batch.names.owners),
            (names.cgroups, batch.names.cgroups),
            (names.listeners, batch.names.listeners),
        ):
            known = cast("dict[Any, Any]", old)
            known.update(new)
            while len(known) > NAMES:
                del known[next(iter(known))]
        counts = dict(batch.counts) or self.batch.counts
        self.batch = replace(
            self.batch,
            until=batch.until,
            counts=counts,
            tables=self._tables(batch, counts),
            beside=_holding((*self.batch.beside, *batch.beside)),
        )

    def _tables(self, batch: Batch, counts: Mapping[int, Counts]) -> tuple[TableReading, ...]:
        """The last readings, as of now, including those of namespaces that have gone: these come
        only once."""
        new = batch.tables
        if not new:
            return tuple(self._now(one, batch.until, counts) for one in self.batch.tables)
        here = {one.netns for one in new}
        gone = [one for one in self.batch.tables if one.gone and one.netns not in here]
        return (*gone[-NAMES:], *new)

    def _now(self, old: TableReading, until: int, counts: Mapping[int, Counts]) -> TableReading:
        """A reading, plus what came and less what went since, by the counters."""
        came, went = made_and_ended(self.batch.counts.get(old.netns))
        made, ended = made_and_ended(counts.get(old.netns))
        if old.gone or made < came or ended < went or (came, went) == (made, ended):
            return old
        return replace(old, count=max(old.count + made - came - (ended - went), 0), at=until)


def _holding(readings: tuple[Beside, ...]) -> tuple[Beside, ...]:
    """The last reading of each namespace, of those where anything was found."""
    return tuple(one for one in {one.netns: one for one in readings}.values() if one)
