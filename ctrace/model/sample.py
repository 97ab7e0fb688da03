"""An even sample of the entries in the tables, as looks at them found them.

Entries that ended say little about those that are held: while entries outlive the time observed,
those that ended are the odd ones. So shares of what is held, the ages of the living and the time
that they have left come from here: from entries that a walk over the hash table met
(:data:`~ctrace.record.Kind.MET`), and from those of the dump at the start.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.model.composition import Looks
from ctrace.model.keys.columns import I64, OWNED, TICK_MS, U64, Window, service_hash, spread
from ctrace.model.keys.pairing import EXISTING, UNKNOWN, Births
from ctrace.model.keys.scatter import Rows
from ctrace.model.keys.timeouts import Timeouts

ROW: Final = np.dtype(
    [
        *(
            (name, np.uint64)
            for name in ("ident", "pair", "target", "src", "dst", "service", "space", "ct", "meta")
        ),
        ("ts", np.int64),
        *((name, np.float32) for name in ("age", "now", "left", "idle", "timeout")),
        ("walk", np.uint32),
        ("opener", np.uint16),
        ("status", np.uint16),
        ("zone", np.uint16),
        ("state", np.uint8),
        ("proto", np.uint8),
        ("older", np.bool_),
        ("other", np.bool_),
        ("gone", np.bool_),
    ]
)
"""``age``, ``left``, ``idle`` and ``timeout`` are seconds, NaN: unknown; ``now``: the age of what
still lives, at the time that one asks. ``older``: of the dump at the start; ``other``: that its
timeout is not the setting's of now; ``gone``: that it has ended since. The hashes are those of the
levels' keys."""

ROWS: Final = 8192
GAP_NS: Final = 300_000_000
"""ns. The looks of one walk come within milliseconds; the next walk is a second later."""
WALKS: Final = 16
"""Walks that a share reaches back, at most."""
RECENT_NS: Final = 20_000_000_000
"""ns. A look older than this, compared with the latest, says nothing about now."""
AGAIN: Final = 0.5
"""Share. If this much of a walk has been met again since, the walk belongs to an earlier round of
the table."""
ENOUGH: Final = 400
"""Entries met after which a pinned share reaches back no further: its standard error is below
2.5 %."""
FEW: Final = 30
"""Entries. With fewer, no pinned share is reported."""
YOUNG: Final = 0.05
"""Share of newer entries above which those of the first dump no longer represent all."""
DUMPED: Final = 1024
"""Entries kept from one window of a dump."""


class Sample:
    """The latest looks, at most ``rows`` of them."""

    def __init__(self, rows: int = ROWS) -> None:
        self._rows = np.zeros(rows, ROW)
        self._at = self._walk = 0
        self._last = -GAP_NS
        self._step = 1
        self._dumped_at = -GAP_NS

    def nbytes(self) -> int:
        """Memory held."""
        return self._rows.nbytes

    def met(
        self,
        w: Window,
        at: Rows,
        born: tuple[I64, npt.NDArray[np.uint16]],
        timeouts: Optional[Timeouts],
    ) -> None:
        """Take looks at living entries; ``born``: age in ns, and ``extra``, as their births tell.

        ``timeouts`` tells which are not the settings': where a look shows none, neither. None:
        looks never show any.
        """
        age, extra = born
        rows = _rows(w, at, extra)
        ts = rows["ts"]
        known = age != UNKNOWN
        rows["age"][known] = age[known] / 1e9
        idle = w.idle_ms(at)
        # idle for longer than it has existed is impossible: it has another timeout
        wrong = known & (idle > age / 1e6 + TICK_MS)
        if timeouts is not None:
            wrong |= timeouts.vague(w, at, age)
        sure = (idle >= 0) & ~wrong
        rows["idle"][sure] = idle[sure] / 1e3
        over = w.events["overdue_ms"][at]
        rows["left"][over < 0] = -over[over < 0] / 1e3
        timeout = w.events["timeout_ms"][at]
        told = (timeout > 0) & ~wrong
        rows["timeout"][told] = timeout[told] / 1e3
        rows["other"] = wrong | ((idle < 0) & (timeout == 0) & (over < 0) & (timeouts is not None))
        starts = np.diff(ts, prepend=self._last) > GAP_NS
        rows["walk"] = self._walk + np.cumsum(starts)
        self._walk, self._last = int(rows["walk"][-1]), int(ts[-1])
        self._put(rows)

    def dumped(self, w: Window, at: Rows) -> None:
        """Take some of the entries that were there at the start, evenly."""
        now = int(w.ts[at[0]])
        if now - self._dumped_at > GAP_NS:
            self._step = max(1, -(-at.size // DUMPED))
        self._dumped_at = now
        at = at[:: self._step]
        rows = _rows(w, at, np.zeros(at.size, np.uint16))
        rows["older"] = True
        rows["walk"] = self._walk
        self._put(rows)

    def remap(self, moved: npt.NDArray[np.uint16]) -> None:
        """Renumber the openers: ``moved[old]`` is the new number."""
        self._rows["opener"] = moved[self._rows["opener"]]

    def latest(self, births: Births, until: int, since: Mapping[int, int]) -> Looks:
        """The looks that represent ``until`` (ns), newest first: at most one round of the table,
        each entry once.

        ``since``: by namespace, from when on they do (ns), where a collection has emptied its
        table; while they are few, also earlier ones of entries that are known to live.
        """
        n = min(self._at, len(self._rows))
        order = (self._at - 1 - np.arange(n)) % len(self._rows)
        # by columns: a row is wide, and most are not chosen
        ts, older = self._rows["ts"][order], self._rows["older"][order]
        wanted = (ts >= int(ts.max(initial=0)) - RECENT_NS) | older
        for netns, at in since.items():
            late, here = ts < at, self._rows["meta"][order] >> np.uint64(32) == np.uint64(netns)
            if np.count_nonzero(here & ~late) < 4 * FEW:
                # too few: of those whose birth was seen it is known whether they are still there
                late &= np.isnan(self._rows["age"][order])
            wanted &= ~(here & late)
        order, older = order[wanted], older[wanted]
        walks = self._rows["walk"][order]
        _, first = np.unique(self._rows["ident"][order], return_index=True)
        fresh = np.zeros(len(order), bool)
        fresh[first] = True
        keep = np.ones(len(order), bool)
        for walk in np.unique(walks)[::-1].tolist():
            mine = walks == walk
            stale = np.count_nonzero(mine & ~fresh) > AGAIN * np.count_nonzero(mine)
            if stale or walk <= self._walk - WALKS:
                keep &= (walks > walk) | older
                break
        chosen: npt.NDArray[np.void] = self._rows[order[keep & fresh]]
        _grow(chosen, births, until)
        return Looks(chosen)

    def _put(self, rows: npt.NDArray[np.void]) -> None:
        rows = rows[-len(self._rows) :]
        at = (self._at + np.arange(len(rows))) % len(self._rows)
        self._rows[at] = rows
        self._at += len(rows)


def _grow(rows: npt.NDArray[np.void], births: Births, until: int) -> None:
    """Set how old those still living are by now, and which have ended."""
    ct, meta = (np.ascontiguousarray(rows[name]) for name in ("ct", "meta"))
    age, _ = births.peek(ct, meta, np.full(len(rows), until, np.uint64))
    grown = rows["age"] + (until - rows["ts"]) / 1e9
    same = (age != UNKNOWN) & (np.abs(age / 1e9 - grown) < _SAME)
    rows["now"] = np.where(same, grown, np.nan)
    rows["gone"] = ~same & ~np.isnan(rows["age"]) & (rows["ts"] > births.certain_since)


def _rows(w: Window, at: Rows, extra: npt.NDArray[np.uint16]) -> npt.NDArray[np.void]:
    """All fields but the times."""
    rows = np.zeros(at.size, ROW)
    opener = extra & np.uint16(EXISTING - 1)
    owned = np.flatnonzero(opener)
    meta, target = w.meta.take(at), w.target_hash.take(at)
    target[owned] = w.target_hash_owned(at[owned])
    owned_meta: U64 = meta.copy()
    owned_meta[owned] |= OWNED
    rows["pair"], rows["target"] = w.pair_hash.take(at), target
    rows["src"], rows["dst"] = w.src_only(at), w.dst_only(at)
    rows["service"], rows["space"] = service_hash(owned_meta), w.space_only(at)
    rows["zone"] = w.events["zone"][at]
    ends = rows["pair"] + w.dst_hash.take(at) + w.words[at, _PORTS]
    rows["ident"] = spread(ends + rows["zone"])  # the same tuple may be in several zones
    rows["ts"] = w.ts.take(at).view(np.int64)
    rows["ct"], rows["meta"] = w.ct.take(at), meta
    for name in ("age", "now", "left", "idle", "timeout"):
        rows[name] = np.nan
    rows["opener"] = opener
    rows["status"], rows["state"] = w.status.take(at), w.states(at)
    rows["proto"] = w.proto(at)
    return rows


_SAME: Final = 0.01
"""Seconds: if births differ by more, another entry has the same address."""
_PORTS: Final = 10
"""The word of a record that holds both ports of the original direction, and of the reply's."""


@dataclass
class PinnedSample:
    """The share of ASSURED entries, among those that recent walks over the table met."""

    walks: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=WALKS))
    """Entries met so far, and how many were ASSURED."""

    def see(self, met: int, assured: int, shrunk: bool = False) -> None:
        """The counters now; ``shrunk``: what was met before is no sample of what is held now."""
        if shrunk or (self.walks and met < self.walks[-1][0]):  # of another capture
            self.walks.clear()
        self.walks.append((met, assured))

    def share(self) -> Optional[tuple[float, float]]:
        """The share and its standard error; None where too few were met."""
        met = assured = 0
        for earlier in reversed(self.walks):
            met, assured = (now - was for now, was in zip(self.walks[-1], earlier))
            if met >= ENOUGH:
                break
        if met < FEW:
            return None
        likely = (assured + 2) / (met + 4)  # all or none of a few is not certainly all or none
        return assured / met, math.sqrt(likely * (1 - likely) / (met + 4))


@dataclass
class Dumped:
    """The same for the entries that were there at the start, while nothing walks the table.

    Later entries show nothing: an insert comes before ASSURED, and those that have ended are not
    like those that stay.
    """

    held: int = 0
    assured: int = 0

    def came(self, n: int, assured: int) -> None:
        """Entries of the first dump."""
        self.held += n
        self.assured += assured

    def went(self, n: int, assured: int) -> None:
        """Some of them ended, or other entries of unknown birth."""
        self.held = max(0, self.held - n)
        self.assured = max(0, self.assured - assured)  # they may have become so since

    def share(self, count: int) -> Optional[float]:
        """The share while they are nearly all of ``count`` entries, else None."""
        if self.held <= 0 or self.held < (1 - YOUNG) * count:
            return None
        return min(1.0, self.assured / self.held)
