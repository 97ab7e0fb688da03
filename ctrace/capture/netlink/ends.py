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
from ctrace.host.netns import Namespace
from ctrace.record import Events, Kind, Reason, boot_ns, empty

SOONEST: Final = 5.0
"""Seconds between two readings of a small table."""
SHARE: Final = 0.02
"""Share of the time spent reading, at most: a dump costs some 4 us an entry."""


class OlderEntries:
    """The entries of one namespace that are older than its listener."""

    def __init__(self, space: Namespace) -> None:
        """The listener in ``space`` must be in place already. Raises CtraceError."""
        self._rows = self._read(space)

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

    def look(self, space: Namespace) -> Events:
        """Read the table (in any thread); returns the older entries that are missing from it.

        ``space``: with the path by which it is found now. Messages waiting in the listener's
        socket may still report some of them: take those first, then call :meth:`take`.
        """
        try:
            now = self._read(space)
        except (CtraceError, OSError):
            return empty()  # it has gone, or is found by another path by the next time
        missing: Events = self._rows[~np.isin(self._rows["ct"], now["ct"])]
        return missing

    def take(self, missing: Events) -> Events:
        """DESTROY records for those ``missing`` entries that nothing else has reported."""
        gone = np.isin(self._rows["ct"], missing["ct"])
        rows: Events = self._rows[gone]
        self._rows = self._rows[~gone]
        rows["ts"] = boot_ns()
        rows["kind"], rows["reason"] = Kind.DESTROY, Reason.GONE
        rows["idle_ms"] = -1
        return rows

    def _read(self, space: Namespace) -> Events:
        began = time.monotonic()
        self._next = began + SOONEST
        table = ctnetlink.read_table(space.path)
        if table.netns != space.inum:  # its process has ended, or moved to another one
            raise CtraceError(f"namespace {space.name} is no longer at {space.path}")
        now = time.monotonic()
        self._next = now + max(SOONEST, (now - began) / SHARE)
        return table.events
