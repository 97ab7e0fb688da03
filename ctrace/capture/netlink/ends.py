"""How entries older than a ctnetlink listener end, where the kernel does not report it.

With nf_conntrack_events=2, the default since 5.19, an entry made while nobody listened
has no event cache, and its end makes no message. So the table is read again now and
then: what is missing has ended since the last time.
"""

from __future__ import annotations

import time
from typing import Final

import numpy as np

from ctrace.errors import CtraceError
from ctrace.host import ctnetlink
from ctrace.record import Events, Kind, Reason, empty

SOONEST: Final = 5.0
"""Seconds between two readings of a small table."""
SHARE: Final = 0.02
"""Share of the time spent reading, at most: a dump costs some 4 us an entry."""


class OlderEntries:
    """The entries of one namespace that are older than its listener."""

    def __init__(self, path: str) -> None:
        """``path`` opens the namespace; the listener must be in place already."""
        self._path = path
        self._rows = self._read()

    def __len__(self) -> int:
        return len(self._rows)

    def ended(self, events: Events) -> None:
        """Forget entries whose DESTROY did arrive (another listener was there when they were
        made)."""
        if len(self._rows) and len(events):
            gone = events["ct"][events["kind"] == Kind.DESTROY]
            if len(gone):
                self._rows = self._rows[~np.isin(self._rows["ct"], gone)]

    @property
    def due(self) -> bool:
        """Whether the table should be read again."""
        return len(self._rows) > 0 and time.monotonic() >= self._next

    def look(self) -> Events:
        """Read the table (in any thread); returns the older entries that are missing from it.

        Messages waiting in the listener's socket may still report some of them: take those first,
        then call :meth:`take`.
        """
        try:
            now = self._read()
        except CtraceError:
            return empty()  # the namespace has gone, and all of this with it
        missing: Events = self._rows[~np.isin(self._rows["ct"], now["ct"])]
        return missing

    def take(self, missing: Events) -> Events:
        """DESTROY records for those ``missing`` entries that nothing else has reported."""
        gone = np.isin(self._rows["ct"], missing["ct"])
        rows: Events = self._rows[gone]
        self._rows = self._rows[~gone]
        rows["ts"] = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        rows["kind"], rows["reason"] = Kind.DESTROY, Reason.GONE
        rows["idle_ms"] = -1
        return rows

    def _read(self) -> Events:
        began = time.monotonic()
        rows = ctnetlink.dump(self._path)
        took = time.monotonic() - began
        self._next = time.monotonic() + max(SOONEST, took / SHARE)
        return rows
