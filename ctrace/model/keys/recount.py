"""What keys hold, set right after events were lost: by what the table itself was found to hold.

Between a :data:`~ctrace.record.Kind.RECOUNT` and the RECOUNTED of the same namespace a source
tells every entry that was there at the first (FOUND). A key's sum of those, less what it was
thought to hold then, is what the lost events would have changed.

Who opened an entry is told once, when it is made, so of the found ones it is not known. A
service that local processes used keeps as many as theirs as before, if so many were found; and
what the processes hold is changed in that proportion, and stays an estimate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Union

import numpy as np
import numpy.typing as npt

from ctrace.batch import Batch
from ctrace.losses import Losses
from ctrace.model.keys.columns import OWNED, TIME_SHIFT, Window, key_hash
from ctrace.model.keys.heavy import HeavyTable
from ctrace.model.keys.levels import Levels
from ctrace.model.keys.scatter import Rows
from ctrace.model.keys.window import window
from ctrace.record import Kind

MARKS: Final = (int(Kind.RECOUNT), int(Kind.RECOUNTED))
MOST: Final = 64
_S32: Final = np.uint64(32)


def between_marks(w: Window) -> Iterator[Union[Window, np.void]]:
    """The window, parted where it holds the marks of recounts; these by themselves.

    No source makes many of them: where there are, they are junk, and part nothing.
    """
    if not 0 < int(w.counts[:, MARKS].sum()) <= MOST:
        yield w
        return
    first = 0
    for at in np.flatnonzero(np.isin(w.events["kind"], MARKS)).tolist():
        if at > first:
            yield window(w.events[first:at])
        yield w.events[at]
        first = at + 1
    if first < w.n:
        yield window(w.events[first:])


class Recounts:
    """Which namespaces lost events, and what was found there since."""

    def __init__(self, levels: Levels) -> None:
        self._levels = levels
        self._losses = Losses()
        self._begun: set[int] = set()
        self.stale: set[int] = set()
        """Namespaces whose held counts may be wrong."""
        self.missed: dict[int, int] = {}
        """Records lost since the start, by namespace."""

    def lost(self, batch: Batch, known: set[int]) -> None:
        """Note a batch's losses: of the namespaces whose counters show them, otherwise of every
        one."""
        if not batch.lost:
            return
        here = np.unique(batch.events["netns"]).tolist()
        fresh = self._losses.of(batch.lost, batch.counts, {*known, *batch.counts, *here} - {0})
        for netns, missed in fresh.items():
            self.missed[netns] = self.missed.get(netns, 0) + missed
        self.stale |= fresh.keys()
        self._begun -= fresh.keys()

    def mark(self, record: np.void) -> None:
        """Begin or end a recount."""
        netns = int(record["netns"])
        if record["kind"] == int(Kind.RECOUNT):
            self._begun.add(netns)
            for level in self._levels.all():
                _begin(level.table, netns)
        elif netns in self._begun:
            self._begun.discard(netns)
            self.stale.discard(netns)
            self._end(netns, int(record["ts"]) >> TIME_SHIFT)

    def _end(self, netns: int, now: int) -> None:
        before = after = 0
        levels = self._levels
        for level in (levels.target, levels.service):
            was, kept = _leave_to_openers(level.table, netns)
            before, after = before + was, after + kept
        opened = levels.process.table
        mine = _rows(opened, netns)
        begun = opened.counters["begun"][mine]
        opened.counters["found"][mine] = np.rint(begun * (after / before if before else 0.0))
        for level in levels.all():
            _correct(level.table, netns, now)


def _rows(table: HeavyTable, netns: int) -> Rows:
    return 1 + np.flatnonzero(table.key[1 : table.used + 1, 2] >> _S32 == np.uint64(netns))


def _begin(table: HeavyTable, netns: int) -> None:
    """Remember what is held now; negative where more ends than births came."""
    table.drain()
    mine, c = _rows(table, netns), table.counters
    net: npt.NDArray[np.int64] = c["inserts"] + c["existing"] - c["destroys"]
    c["begun"][mine], c["found"][mine] = net[mine], 0


def _leave_to_openers(table: HeavyTable, netns: int) -> tuple[int, int]:
    """Give the processes behind a service their part of what was found of it, which counts as
    nobody's.

    Returns what they held before, and after.
    """
    mine, c = _rows(table, netns), table.counters
    owned = mine[(table.key[mine, 2] & OWNED) != 0]
    key = table.key[owned]
    other = table.find_rows(key_hash(key[:, 0], key[:, 1], key[:, 2] & ~OWNED))
    before = np.maximum(c["begun"][owned], 0)
    kept = np.where(other > 0, np.minimum(before, c["found"][other]), 0)
    c["found"][owned] += kept.astype(np.int32)
    np.subtract.at(c["found"], other[other > 0], kept[other > 0].astype(np.int32))
    return int(before.sum()), int(kept.sum())


def _correct(table: HeavyTable, netns: int, now: int) -> None:
    """Count the lost births as entries of unknown age; what ended unseen was of any age."""
    table.drain()
    mine, c = _rows(table, netns), table.counters
    missing = c["found"][mine].astype(np.int64) - c["begun"][mine]
    came, went = np.maximum(missing, 0), np.maximum(-missing, 0)
    older, begun = np.maximum(c["older"][mine], 0), np.maximum(c["begun"][mine], 1)
    c["existing"][mine] += missing
    c["older"][mine] += came - np.rint(went * np.minimum(older / begun, 1.0)).astype(np.int64)
    c["births"][mine] += missing * now
    c["begun"][mine] = c["found"][mine] = 0
