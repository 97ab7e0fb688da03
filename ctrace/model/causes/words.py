"""Numbers as causes and remedies say them."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Final, Optional

from ctrace import units
from ctrace.batch import Logged, Moment
from ctrace.model.snapshot import Residence

UNKNOWN: Final = "unknown"
DAY: Final = 86_400.0
AFTER: Final = " s after boot"


def duration(seconds: Optional[float]) -> str:
    """``4 ms``, ``2.5 s``, ``120 s``, ``41 min``, ``3 h``, ``5 d``; ``unknown`` for None."""
    return UNKNOWN if seconds is None else units.duration(seconds)


def percent(share: Optional[float]) -> str:
    """``83 %``; ``unknown`` for None."""
    return UNKNOWN if share is None else units.share(share)


def pace(rate: float, of: str) -> str:
    """``120 new/s``; empty where it would round to 0: a bursty load is not at a standstill."""
    each = f"{rate:,.0f}"
    return f"{each} {of}" if each != "0" else ""


def stay(residence: Residence) -> str:
    """How long half of the entries stay, or ``at least 20 s``; ``unknown`` where neither is
    known."""
    if residence.p50 is None and residence.at_least is not None:
        return f"at least {duration(residence.at_least)}"
    return duration(residence.p50)


def plural(n: int, noun: str) -> str:
    """``1 source``, ``76,000 sources``."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def entries(n: int) -> str:
    """``1 entry``, ``76,000 entries``."""
    return f"{n:,} {'entry' if n == 1 else 'entries'}"


def moment(when: Moment) -> str:
    """``2019-07-24 11:02:05 UTC``, ``5000.752270 s after boot``, or as the log has it."""
    if when.utc is not None:
        try:
            return f"{datetime.fromtimestamp(when.utc, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
        except (ValueError, OverflowError, OSError):
            return "an unknown time"
    if when.boot is not None:
        return f"{when.boot:.6f}{AFTER}"
    return when.text or "a time that the log does not show"


def where(log: Logged) -> str:
    """`` in netns 4026532999``; empty where the log does not speak of other namespaces alone."""
    if not log.netns:
        return ""
    others = f" and {plural(len(log.netns) - 1, 'other')}" if len(log.netns) > 1 else ""
    return f" in netns {log.netns[0]}{others}"


def when(log: Logged) -> str:
    """``at 11:02 UTC`` or ``from ... to ...``, by the log's messages."""
    first, last = moment(log.first), moment(log.last)
    boot = log.last.boot if log.last.utc is None else None
    days = f" (after {boot / DAY:.0f} days)" if boot and boot >= 2 * DAY else ""
    if first == last:
        return f"at {first}{days}"
    both = first.removesuffix(AFTER) if last.endswith(AFTER) else first
    return f"from {both} to {last}{days}"
