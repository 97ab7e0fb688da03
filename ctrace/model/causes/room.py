"""Whether a table has room, and goes on having it: verdicts and help both go by this."""

from __future__ import annotations

from typing import Final

from ctrace.model.snapshot import Table

LOADS: Final = {
    *("no-keepalive", "time-wait", "loopback-probes", "established", "idle-established"),
    *("dns-storm", "one-way-udp", "answered-udp", "udp-streams", "tunnel", "pings"),
}
"""Causes that are ordinary traffic; what else is told is wrong however much room there is."""
NEARLY_FULL: Final = 0.90
LOW_FILL: Final = 0.50
HIGH: Final = 0.75
"""Share of the limit from which a table that refuses nothing is called HIGH: one burst away."""
SOON: Final = 3600.0
"""Seconds: a table that would be full later than that is not called FILLING while it is
nearly empty, for no load stays as it is for so long."""
CLOSE: Final = 60.0
"""Seconds: a table that its last interval's rise would fill sooner is not called HEALTHY."""
FILLED: Final = 0.25
"""Share of the limit from which a forecast of any length is shown first."""


def short(table: Table) -> bool:
    """Whether it refuses, evicts or did so a moment ago, is nearly full, or will be.

    Of a table whose limit is not known nobody can say that it has room.
    """
    if table.full_since is not None:
        return True
    if not table.max:
        return not table.max_known
    return table.fill >= HIGH or filling(table) or rising(table) > 0


def filling(table: Table) -> bool:
    """Whether a forecast tells when it is full, and that is not far away."""
    soon = table.seconds_to_full
    return soon is not None and (table.fill >= FILLED or soon < SOON)


def rising(table: Table) -> float:
    """Net entries gained per second, where that would fill the table within :data:`CLOSE`; else 0.
    Counted, not predicted: for a table with no forecast yet."""
    more = table.rates.insert - table.rates.destroy
    known = table.seconds_to_full is not None or table.levels_off is not None
    if known or not table.max or table.fill < FILLED or more <= 0:
        return 0.0
    return more if table.max - table.count <= more * CLOSE else 0.0
