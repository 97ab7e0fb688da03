"""Lengths of time as people type them; times and shares as all views and sentences show them."""

from __future__ import annotations

import re
from typing import Final, Optional

_UNITS: Final = {
    **{"": 1.0, "ms": 0.001},
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), 86400.0),
}
_PART: Final = r"([0-9]{1,12}(?:\.[0-9]{1,9})?)\s*([a-z]{0,7})"


def seconds(text: str) -> Optional[float]:
    """``30``, ``500ms``, ``5m``, ``2 hours``, ``1h30m`` in seconds; None when it is no time."""
    text = text.strip().lower()
    parts = re.findall(_PART, text)
    if not re.fullmatch(rf"(?:{_PART}\s*){{1,4}}", text) or any(
        unit not in _UNITS or (not unit and len(parts) > 1) for _, unit in parts
    ):
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in parts) or None


_DURATIONS: Final = (
    (999.5, 1e-6, "µs"),
    (999.5, 1e-3, "ms"),
    (599.5, 1, "s"),
    (119.5, 60, "min"),
    (47.5, 3600, "h"),
)
"""Up to how many of each unit: a timeout of 120 s stays 120 s."""


def duration(seconds: float) -> str:
    """``350 µs``, ``4 ms``, ``1.5 s``, ``120 s``, ``12 min``, ``3 h``, ``4 d``."""
    if seconds < 0:
        return "-" + duration(-seconds)
    if seconds == 0:
        return "0 s"
    for below, unit, name in _DURATIONS:
        if seconds < below * unit:
            return f"{figures(seconds / unit)} {name}"
    return f"{seconds / 86400:.0f} d"


def share(part: float) -> str:
    """``83 %``, ``2.7 %``, ``<0.1 %``; never ``100 %`` for less than all."""
    percent = part * 100
    if percent <= 0:
        return "0 %"
    if percent < 0.05:
        return "<0.1 %"
    if percent < 9.95:
        return f"{percent:.1f} %"
    if 99.5 <= percent < 100:
        return ">99 %"
    return f"{percent:.0f} %"


def figures(number: float) -> str:
    """One decimal below ten unless it is zero, otherwise none."""
    text = f"{number:.1f}" if number < 9.95 else f"{number:.0f}"
    return text[:-2] if text.endswith(".0") else text
