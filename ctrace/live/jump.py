"""Where in a recording a person wants to go, from a few typed characters."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone

from ctrace.errors import UsageError
from ctrace.live.protocol import Position

_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?\Z")
_STRETCH = re.compile(r"([+-])(\d+(?:\.\d+)?)([smhd]?)\Z")
_SHARE = re.compile(r"(\d+(?:\.\d+)?)%\Z")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_jump(text: str, position: Position) -> float:
    """The UTC second meant by ``10:03:07``, ``+30``, ``-2m`` or ``50%``.

    A time of day means its first occurrence in the recording. Raises UsageError, also where it
    has none.
    """
    text = text.strip()
    if (share := _SHARE.match(text)) is not None:
        length = position.end - position.start
        return inside(position.start + float(share[1]) / 100 * length, text, position)
    if (stretch := _STRETCH.match(text)) is not None:
        length = float(stretch[2]) * _UNITS[stretch[3]]
        return position.now + (length if stretch[1] == "+" else -length)
    if (clock := _CLOCK.match(text)) is not None:
        hour, minute, second = (int(part or 0) for part in clock.groups())
        if hour < 24 and minute < 60 and second < 60:
            start = datetime.fromtimestamp(position.start, timezone.utc)
            when = start.replace(hour=hour, minute=minute, second=second, microsecond=0)
            if when < start.replace(microsecond=0):
                when += timedelta(days=1)
            return inside(when.timestamp(), text, position)
    raise UsageError(f"{text!r} is not a time: give 10:03:07 (UTC), +30, -2m or 50%")


def inside(moment: float, text: str, position: Position) -> float:
    """The moment, if the recording has it to within a second. Raises UsageError when not."""
    if position.start - 1 <= moment <= position.end + 1:
        return moment
    first, last = (
        datetime.fromtimestamp(at, timezone.utc) for at in (position.start, position.end)
    )
    day = "%H:%M:%S" if first.date() == last.date() else "%Y-%m-%d %H:%M:%S"
    raise UsageError(
        f"{text} is outside the recording, which goes from {first:%Y-%m-%d %H:%M:%S} "
        f"to {last.strftime(day)} UTC"
    )
