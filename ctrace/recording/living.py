"""The entries alive now, from the events alone: what a segment begins with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ctrace.batch import Batch
from ctrace.losses import Losses
from ctrace.record import Events, Kind, Reason, empty, identity, join, words

_LIVES = (int(Kind.INSERT), int(Kind.EXISTING), int(Kind.DESTROY), int(Kind.FOUND))
_MARKS = (int(Kind.RECOUNT), int(Kind.RECOUNTED))


class Living:
    """Follows every entry by its tuples: of those that a dump found ``ct`` is not known.

    After losses, what a recount finds takes the place of what was thought to live.
    """

    def __init__(self) -> None:
        self._alive = empty()
        self._ids = np.zeros(0, np.uint64)
        self._old = np.zeros(0, bool)
        """Of the living, those from before the recount that is under way."""
        self._news: list[Events] = []
        self._size = 0
        self._begun: set[int] = set()
        self._losses = Losses()
        self._lacks: dict[int, int] = {}

    @property
    def lacks(self) -> int:
        """Records lost that no recount made good yet: the living may be wrong by so many."""
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

    def rows(self, now: int) -> Events:
        """The living as EXISTING at ``now``."""
        self._settle()
        out = words(self._alive).copy().view(self._alive.dtype).reshape(-1)
        out["kind"], out["reason"], out["ts"] = Kind.EXISTING, Reason.NONE, now
        # A destroy has no owner; an entry that existed keeps none either.
        out["owner"], out["cgroup"] = 0, 0
        return out

    def _follow(self, events: Events) -> None:
        tracked = events[np.isin(events["kind"], _LIVES)]
        if len(tracked):
            self._news.append(tracked)
            self._size += len(tracked)
        if self._size > max(1 << 16, len(self._alive)):
            self._settle()

    def _mark(self, kind: int, netns: int) -> None:
        """Where a recount begins, and where it ends."""
        self._settle()
        mine = self._alive["netns"] == netns
        if kind == int(Kind.RECOUNT):
            self._begun.add(netns)
            self._old |= mine
        elif netns in self._begun:
            self._begun.discard(netns)
            self._lacks.pop(netns, None)
            self._keep(~(self._old & mine))

    def _settle(self) -> None:
        """Take in what is new: an entry's last event tells."""
        if not self._news:
            return
        news = join(self._news)
        self._news, self._size = [], 0
        whole = join([self._alive, news])
        ids = np.concatenate([self._ids, identity(words(news))])
        order = np.argsort(ids, kind="stable")
        last = order[np.append(np.diff(ids[order]) != 0, True)]
        self._old = np.append(self._old, np.zeros(len(news), bool))
        self._alive, self._ids = whole, ids
        chosen = np.sort(last)
        self._keep(chosen[whole["kind"][chosen] != int(Kind.DESTROY)])

    def _keep(self, which: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> None:
        self._alive, self._ids = self._alive[which], self._ids[which]
        self._old = self._old[which]
