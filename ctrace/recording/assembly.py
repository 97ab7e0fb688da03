"""Blocks back into batches, exactly as they were captured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final, Optional, cast

import numpy as np
import numpy.typing as npt

from ctrace.batch import Batch, Counts, Names, SelfCost, TableReading
from ctrace.record import N_REASONS, Events, Kind, empty, join
from ctrace.recording.budget import Budget, Spent, latest
from ctrace.recording.format import beside_block, meta
from ctrace.recording.format.columns import Columns
from ctrace.recording.format.events import Rows
from ctrace.recording.format.layout import LIMIT_BATCH, LIMIT_BLOB, LIMIT_TIME, Column, Damaged
from ctrace.recording.format.window import IMAGE, Ring

LISTED: Final = 20
"""Sentences on damage that are kept."""


@dataclass
class Missing:
    """What is missing from a recording, as far as it has been read. All zero: it is complete."""

    bytes: int = 0
    """Bytes of the file that could not be used."""
    events: int = 0
    """Events known to have been recorded but not readable: each counts in some batch's ``lost``."""
    truncated: bool = False
    """The end is cut off: how many events were there is not known."""
    spent: list[str] = field(default_factory=list)
    """Limits of a whole file that were reached, as sentences: the rest of it is left out."""
    damage: list[str] = field(default_factory=list)
    """What was found broken, the first few."""

    seen: set[tuple[str, int]] = field(default_factory=set, repr=False, compare=False)
    """What has been counted already: reading twice finds the same again."""

    def add(self, what: str, size: int, at: tuple[str, int]) -> None:
        """Count a stretch of a file that cannot be used; ``at`` says which."""
        if at in self.seen:
            return
        self.seen.add(at)
        self.bytes += size
        if len(self.damage) < LISTED:
            self.damage.append(what)

    def exceed(self, what: str) -> None:
        """A limit of the whole file was reached."""
        if what not in self.spent:
            self.spent.append(what)

    def lose(self, events: int, at: tuple[str, int]) -> None:
        """Count events of a file that are missing before its row ``at``."""
        if events and at not in self.seen:
            self.seen.add(at)
            self.events += events

    def take(self, other: Missing) -> None:
        """Add what is missing from another file of the same recording."""
        self.bytes += other.bytes
        self.events += other.events
        self.truncated |= other.truncated
        self.spent += [what for what in other.spent if what not in self.spent]
        self.damage = [*self.damage, *other.damage][:LISTED]
        self.seen |= other.seen

    def __bool__(self) -> bool:
        return bool(self.bytes or self.events or self.truncated or self.spent)

    def __str__(self) -> str:
        if not self:
            return "nothing is missing"
        parts = [f"{self.bytes:,} bytes cannot be read"] if self.bytes else []
        if self.events:
            parts.append(f"{self.events:,} recorded events are missing")
        if self.truncated:
            parts.append("the end is cut off")
        return "; ".join([*parts, *self.spent])


class Told:
    """What a BATCHES block holds besides its events. Raises Damaged."""

    def __init__(self, columns: Columns, budget: Budget, *, named: bool = True) -> None:
        """Names are left out unless ``named``."""
        head = columns.block.head
        n = head.batches
        self.ends = meta.ends(columns.blob(Column.BATCHES, LIMIT_BLOB), n, head.rows)
        if n and int(self.ends["until"][-1]) > head.until:
            raise Damaged("a batch ends after its block")
        self._counts = meta.counts(columns.blob(Column.COUNTS, LIMIT_BLOB), n)
        self._first = np.searchsorted(self._counts["batch"], np.arange(n + 1))
        self.tables: dict[int, tuple[TableReading, ...]] = {}
        self.names: dict[int, Names] = {}
        self.spent = ""
        """Why there are no names although the block has some."""
        blob = columns.blob(Column.TABLES, LIMIT_BLOB)
        for i, data in meta.indexed(blob, n):
            self.tables[i] = meta.parse_tables(data)
        budget.spaces(self._counts["netns"].tolist())
        budget.spaces(t.netns for tables in self.tables.values() for t in tables)
        blob = columns.blob(Column.BESIDE, LIMIT_BLOB)
        self.beside = {i: beside_block.parse(data) for i, data in meta.indexed(blob, n)}
        if named:
            try:
                self.names = dict(_names(columns, budget))
            except Spent as error:
                self.spent = str(error)

    def counts(self, i: int) -> npt.NDArray[Any]:
        """The counters told at the end of batch ``i``."""
        rows: npt.NDArray[Any] = self._counts[self._first[i] : self._first[i + 1]]
        return rows


class Tally:
    """Tracks the counters: a block holds all of them once, then only changes."""

    def __init__(self, header: meta.Header) -> None:
        self._base = header.base
        self._now: dict[int, Counts] = {}

    def at(self, told: Told, i: int) -> dict[int, Counts]:
        """The counters in batch ``i`` of a block; empty when it has none."""
        kind = int(told.ends["counts"][i])
        if kind == meta.NO_COUNTS:
            return {}
        rows = told.counts(i)
        changed: dict[int, Counts] = {}
        for netns, values in zip(rows["netns"].tolist(), rows["counts"]):
            base = self._base.get(netns)
            since = values.copy() if base is None else values - np.minimum(base, values)
            since.flags.writeable = False
            changed[netns] = since
        self._now = changed if kind == meta.ALL_COUNTS else {**self._now, **changed}
        return self._now


class Assembly:
    """Puts batches together from blocks, and counts what is missing between them.

    Give it blocks in the order of the file. Rows that no later block can complete
    come out of :meth:`rest`.
    """

    def __init__(self, header: meta.Header, missing: Missing, path: str, budget: Budget) -> None:
        self._missing, self._path, self._budget = missing, path, budget
        self._latest = latest(header)
        self._window = Ring(np.uint64, IMAGE)
        self._tally = Tally(header)
        self._row: Optional[int] = 0
        self._pending: list[Events] = []
        self._size = 0
        self._lost = 0
        self._until = 0
        self._names: Optional[Names] = None

    def start_late(self) -> None:
        """The first block to come is not the first of the file: names from before it go with its
        batch."""
        self._row = None
        self._names = Names({}, {}, {}, {})

    def warm_up(self, columns: Columns, tuples: bool) -> None:
        """Learn from a block before the first one wanted. Raises Damaged."""
        assert self._names is not None, "start_late comes first"
        try:
            for _, names in _names(columns, self._budget):
                _learn(self._names, names)
        except Spent as error:
            self._missing.exceed(str(error))
        if tuples and columns.block.head.tuples:
            self._window.append(columns.block.head.first_tuple, Rows(columns).tuples())

    def block(self, columns: Columns, start: int = 0) -> Iterator[Batch]:
        """The batches that end in this block, at ``start`` or later. Raises Damaged."""
        head = columns.block.head
        told = Told(columns, self._budget)
        if len(told.ends) and int(told.ends["until"][0]) < self._until:
            raise Damaged("time goes backwards")
        if self._row is not None and head.first_row < self._row:
            raise Damaged("rows go backwards")
        events, good = empty(), np.ones(0, bool)
        if head.rows:
            events, known = Rows(columns).events(self._window)
            good = plausible(events) if known is None else plausible(events) & known
        # From here on the block is sound.
        if told.spent:
            self._missing.exceed(told.spent)
        if self._row is not None:
            self._count_lost(head.first_row - self._row, "gap", self._row)
        self._row = head.first_row + head.rows
        done = 0
        for i, end in enumerate(told.ends.tolist()):
            row, _, until, lost, cpu, rss, kernel = end
            self._add(events[done:row], good[done:row], head.first_row + done)
            done, self._until = row, until
            batch = Batch(
                self._take(),
                until,
                lost + self._lost,
                self._tally.at(told, i),
                told.tables.get(i, ()),
                told.names.get(i, Names()),
                SelfCost(cpu, rss, kernel),
                told.beside.get(i, ()),
            )
            self._lost = 0
            if until < start:
                if self._names is not None:
                    _learn(self._names, batch.names)
                continue
            if self._names is not None:
                _learn(self._names, batch.names)
                batch, self._names = replace(batch, names=self._names), None
            yield batch
        self._add(events[done:], good[done:], head.first_row + done)

    def rest(self, written: int) -> Optional[Batch]:
        """Events of a batch that was cut off, up to the last of them, and how many are missing of
        those that were ``written``; None if neither."""
        if self._until and self._row is not None and written > self._row:
            self._count_lost(written - self._row, "end", self._row)
        events, until = self._take(), self._until
        lost, self._lost = self._lost, 0
        if len(events):
            until = max(until, min(self._latest, int(events["ts"].max())))
        return Batch(events, until, lost) if len(events) or (lost and until) else None

    def _add(self, events: Events, good: npt.NDArray[np.bool_], row: int) -> None:
        if not good.all():
            self._count_lost(len(events) - int(good.sum()), "bad", row)
            events = events[good]
        if self._size + len(events) > LIMIT_BATCH:
            self._count_lost(len(events), "long", row)
        elif len(events):
            self._pending.append(events)
            self._size += len(events)

    def _take(self) -> Events:
        pending, self._pending, self._size = self._pending, [], 0
        return pending[0] if len(pending) == 1 else join(pending)

    def _count_lost(self, n: int, why: str, row: int) -> None:
        self._lost += n
        self._missing.lose(n, (f"{why} {self._path}", row))


def plausible(events: Events) -> npt.NDArray[np.bool_]:
    """Rows that the rest of ctrace can take: a crafted file may hold anything."""
    kind, reason = events["kind"], events["reason"]
    good: npt.NDArray[np.bool_] = (kind >= 1) & (kind <= max(Kind)) & (reason < N_REASONS)
    return good & (events["ts"] <= LIMIT_TIME)


def _names(columns: Columns, budget: Budget) -> list[tuple[int, Names]]:
    """By index of the batch in its block. Raises Damaged, and Spent where they are too many."""
    block = columns.block
    budget.names(block)
    blob = columns.blob(Column.NAMES, LIMIT_BLOB)
    found = [(i, meta.parse_names(data)) for i, data in meta.indexed(blob, block.head.batches)]
    budget.learned(block, [names for _, names in found])
    return found


def _learn(names: Names, more: Names) -> None:
    for old, new in (
        (names.netns, more.netns),
        (names.owners, more.owners),
        (names.cgroups, more.cgroups),
        (names.listeners, more.listeners),
    ):
        cast("dict[Any, Any]", old).update(new)
