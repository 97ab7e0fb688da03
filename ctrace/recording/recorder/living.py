"""The entries alive now, from the events alone: the start of each segment.

They take a fifth of the memory that their records would.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from ctrace.batch import Batch
from ctrace.losses import Losses
from ctrace.record import OF_THEN, RECORD, WORDS, Events, Kind, Reason, identity, join, words

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

CHUNK: Final = 1 << 14
"""Entries unpacked together (2 MB)."""
OFTEN: Final = 1 << 16
"""Events, at least, before the entries they replaced are discarded."""
NETNS: Final = RECORD.fields["netns"][1] // 4 if RECORD.fields else 0
"""Index of the namespace's number in a record seen as half words."""
_LIVES: Final = (int(Kind.INSERT), int(Kind.EXISTING), int(Kind.DESTROY), int(Kind.FOUND))
_NONE: Final[U64] = np.zeros(0, np.uint64)
"""Not an empty part of another array: that would keep all of it."""
_MARKS: Final = (int(Kind.RECOUNT), int(Kind.RECOUNTED))


class Living:
    """Follows every entry by its tuples, because ``ct`` is unknown for those from a dump.

    After losses, what a recount finds replaces the entries that were thought to live. When a
    namespace ends, so do its entries.
    """

    def __init__(self) -> None:
        self._chunks: list[_Chunk] = []
        self._touched = 0
        self._begun: set[int] = set()
        self._losses = Losses()
        self._lacks: dict[int, int] = {}

    def __len__(self) -> int:
        """How many are stored; some may have ended."""
        return sum(len(chunk.key) for chunk in self._chunks)

    @property
    def lacks(self) -> int:
        """Records lost and not yet covered by a recount: the living may be wrong by this many."""
        return sum(self._lacks.values())

    def take(self, batch: Batch) -> None:
        """Follow this batch."""
        lost = self._losses.of(batch.lost, batch.counts, batch.counts or (0,))
        for netns, missed in lost.items():
            self._lacks[netns] = self._lacks.get(netns, 0) + missed
            self._begun.discard(netns)
        events, first = batch.events, 0
        for at in np.flatnonzero(np.isin(events["kind"], _MARKS)).tolist():
            self._follow(events[first:at])
            self._mark(int(events["kind"][at]), int(events["netns"][at]))
            first = at + 1
        self._follow(events[first:])
        gone = [table.netns for table in batch.tables if table.gone]
        if gone:
            self._forget(gone)

    def rows(self, now: int) -> Iterator[Events]:
        """The living as EXISTING at ``now``, in parts."""
        self._bury()
        for chunk in self._chunks:
            for first in range(0, len(chunk.key), CHUNK):
                rows = chunk.rows(slice(first, first + CHUNK))
                rows["ts"] = now
                yield rows

    def _follow(self, events: Events) -> None:
        """Apply the events: the last one of each entry decides."""
        tracked = events[np.isin(events["kind"], _LIVES)]
        if not len(tracked):
            return
        key = identity(words(tracked))
        order = np.argsort(key, kind="stable")
        last = order[np.append(np.diff(key[order]) != 0, True)]
        begun = np.sort(last[tracked["kind"][last] != int(Kind.DESTROY)])
        self._chunks.append(_Chunk(tracked[begun], key[begun], key[last]))
        self._touched += len(last)
        if self._touched > max(OFTEN, len(self) // 4):
            self._bury()

    def _mark(self, kind: int, netns: int) -> None:
        """Where a recount begins, and where it ends."""
        self._bury()
        if kind == int(Kind.RECOUNT):
            self._begun.add(netns)
            for chunk in self._chunks:
                chunk.old |= chunk.of(netns)
        elif netns in self._begun:
            self._begun.discard(netns)
            self._lacks.pop(netns, None)
            for chunk in self._chunks:
                chunk.keep(~(chunk.old & chunk.of(netns)))

    def _forget(self, gone: list[int]) -> None:
        """Namespaces that have gone hold nothing, even where the ends of their entries were
        lost."""
        for netns in gone:
            self._begun.discard(netns)
            self._lacks.pop(netns, None)
            for chunk in self._chunks:
                chunk.keep(~chunk.of(netns))
        self._bury()

    def _bury(self) -> None:
        """Drop entries that a later chunk reported."""
        later = _NONE
        kept: list[_Chunk] = []
        for chunk in reversed(self._chunks):
            touched, chunk.touched = chunk.touched, _NONE
            if len(later):
                at = np.searchsorted(later, chunk.key).clip(max=len(later) - 1)
                chunk.keep(later[at] != chunk.key)
            if len(touched):
                later = np.concatenate([later, touched])
                later.sort()  # in place: there may be many, and some of them twice do no harm
            if len(chunk.key):
                kept.append(chunk)
        self._touched = 0
        self._chunks = []
        small: list[_Chunk] = []
        for chunk in reversed(kept):
            if small and sum(len(one.key) for one in small) + len(chunk.key) > CHUNK:
                self._chunks.append(_together(small))
                small = []
            small.append(chunk)
        if small:
            self._chunks.append(_together(small))


class _Chunk:
    """Some entries as half words; values that are the same in all of them are stored once."""

    def __init__(self, rows: Events, key: U64, touched: U64) -> None:
        """``rows``, which become these entries, and their identities. ``touched``, sorted: whose
        earlier rows these events have replaced."""
        self.key, self.touched = key, touched
        self.old = np.zeros(len(rows), bool)
        """Entries from before the recount of their namespace that is in progress."""
        rows["kind"], rows["reason"], rows["ts"] = Kind.EXISTING, Reason.NONE, 0
        # A destroy has no owner; an entry that existed keeps none either.
        rows["owner"], rows["cgroup"] = 0, 0
        rows["status"] |= OF_THEN
        halves = _mirrored(words(rows)).view(np.uint32).reshape(-1, 2 * WORDS)
        self._common: U32 = halves[0].copy() if len(halves) else np.zeros(2 * WORDS, np.uint32)
        self._at = np.flatnonzero((halves != self._common).any(axis=0))
        self._own: U32 = halves[:, self._at].copy()

    def keep(self, chosen: npt.NDArray[np.bool_]) -> None:
        """Only these."""
        if not chosen.all():
            self.key, self.old, self._own = self.key[chosen], self.old[chosen], self._own[chosen]

    def of(self, netns: int) -> npt.NDArray[np.bool_]:
        """Which are in this namespace."""
        at = np.flatnonzero(self._at == NETNS)
        column = self._own[:, at[0]] if len(at) else np.full(len(self.key), self._common[NETNS])
        found: npt.NDArray[np.bool_] = column == netns
        return found

    def rows(self, part: slice = slice(None)) -> Events:
        """As records, all or a part of them."""
        own = self._own[part]
        halves = np.tile(self._common, (len(own), 1))
        halves[:, self._at] = own
        out: Events = _mirrored(halves.view(np.uint64)).view(RECORD).reshape(-1)
        return out


def _together(chunks: list[_Chunk]) -> _Chunk:
    if len(chunks) == 1:
        return chunks[0]
    key = np.concatenate([chunk.key for chunk in chunks])
    whole = _Chunk(join([chunk.rows() for chunk in chunks]), key, _NONE)
    whole.old = np.concatenate([chunk.old for chunk in chunks])
    return whole


def _mirrored(rows: U64) -> U64:
    """The reply's tuple as what differs from the original's turned round, and back."""
    rows[:, 6:8] ^= rows[:, 4:6]
    rows[:, 8:10] ^= rows[:, 2:4]
    ports = rows[:, 10]
    turned = (ports << np.uint64(16) & np.uint64(0xFFFF0000)) | (
        ports >> np.uint64(16) & np.uint64(0xFFFF)
    )
    rows[:, 10] ^= turned << np.uint64(32)
    return rows
