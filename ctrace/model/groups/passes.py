"""When expired entries went: most go together, as gc_worker comes by (nf_conntrack_core.c).

Entries that one collection took say together no more than one entry: how long they stayed depends
on when that came.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

import numpy as np

from ctrace.model.keys.columns import Window
from ctrace.record import Kind, Reason

_EXPIRED: Final = int(Kind.DESTROY) | int(Reason.EXPIRED) << 8
APART_NS: Final = 1_000_000_000
"""ns: within a second is one moment, whether a collection or lookups took them."""
GC_SCAN_INTERVAL_MAX: Final = 60.0
"""Seconds (nf_conntrack_core.c)."""
KEPT: Final = 1024
LOOKED_AT: Final = 4096
"""Ends of a window that are looked at, about."""


class Passes:
    """The latest moments at which expired entries went."""

    def __init__(self) -> None:
        self._at: list[int] = []

    def see(self, w: Window) -> None:
        """Take a window's ends."""
        some = w.ends[:: max(1, len(w.ends) // LOOKED_AT)]
        some = some[w.code.take(some) == _EXPIRED]
        if some.size:
            seconds = np.unique(w.ts.take(some) // np.uint64(APART_NS)).astype(np.int64)
            last = self._at[-1] if self._at else -1
            self._at.extend(one for one in seconds.tolist() if one > last)
            del self._at[:-KEPT]

    def since(self, at: int) -> int:
        """How many there were since a time (boot clock, ns); at most :data:`KEPT`."""
        return len(self._at) - bisect_left(self._at, at // APART_NS)

    def pause(self) -> float:
        """Seconds between the latest two; the longest that gc_worker makes while fewer are
        known."""
        few = len(self._at) < 2
        return GC_SCAN_INTERVAL_MAX if few else float(self._at[-1] - self._at[-2])
