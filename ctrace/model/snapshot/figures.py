"""Counts, times and shares that the parts of a snapshot are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class Counted:
    """Exact event counts by what happened."""

    insert: int = 0
    """entries: made since the start."""
    destroy: int = 0
    """entries: that left since then."""
    drop: int = 0
    """packets: refused because the table was full."""
    insert_failed: int = 0
    """entries: lost an insertion race (clash, chain too long)."""
    early_drop: int = 0
    """entries: evicted to make room (part of ``destroy``)."""
    expired: int = 0
    """entries: timed out (part of ``destroy``)."""
    deleted: int = 0
    """entries: deleted by a user, an RST or a namespace's end (part of ``destroy``)."""
    clash_resolved: int = 0
    """entries: losers of a race that were merged without harm."""


@dataclass(frozen=True)
class Rates:
    """The same as :class:`Counted` per second, over the last interval."""

    insert: float = 0.0
    """per s: over the last interval."""
    destroy: float = 0.0
    """per s."""
    drop: float = 0.0
    """per s."""
    insert_failed: float = 0.0
    """per s."""
    early_drop: float = 0.0
    """per s."""


@dataclass(frozen=True)
class Reconciliation:
    """Our counts against the kernel's own, since attaching. All zero when all agree."""

    count: int = 0
    """entries: our inserts minus destroys, minus the change of ``conntrack -C``; the kernel's also
    counts unconfirmed entries, so a few are normal under load."""
    drop: int = 0
    """packets: our drops minus the kernel's counter."""
    early_drop: int = 0
    """entries: the same for evictions."""
    insert_failed: int = 0
    """entries: the same for failed inserts."""


@dataclass(frozen=True)
class Percentiles:
    """p50, p90 and p99 of some times; None where nothing was measured."""

    p50: Optional[float] = None
    p90: Optional[float] = None
    p99: Optional[float] = None
    n: int = 0
    """entries: that were measured."""


@dataclass(frozen=True)
class Residence(Percentiles):
    """How long entries stay in the table."""

    n: int = 0
    """entries: ends that it rests on: all of them, or one of sixteen while more than 200,000 events
    come each second."""
    living: int = 0
    """entries: living ones whose age counted as well."""
    at_least: Optional[float] = None
    """s: while the median is unknown: half of the entries have stayed so long already."""
    by_load: Optional[float] = None
    """s: ``held`` over ``new_per_s``, the mean stay of a steady load: a check, from other
    counts. Unknown where they do not come evenly."""
    by: str = ""
    """``ends`` (measured), ``timeout`` (closed connections by what is left of their timeout, before
    enough have ended), or empty."""
    error: Optional[float] = None
    """s: what the median may be off by, either way: entries that one collection took count as one,
    and those that wait out a timeout stay until they are collected; None while it is unknown."""


@dataclass(frozen=True)
class Histogram:
    """Counts between log-spaced edges (seconds); len(edges) == len(counts) + 1."""

    edges: tuple[float, ...] = ()
    """s: bounds of the classes, one more than classes."""
    counts: tuple[int, ...] = ()
    """entries: in each class."""


@dataclass(frozen=True)
class Composition:
    """What is held now is made of, by looks at an even sample of it: never by what has ended.

    Shares are None where too few were looked at; errors are two standard ones, and what changed.
    """

    n: int = 0
    """entries: looked at by walks over the table, of those held now: what its shares are of; 0:
    nothing is known."""
    assured: Optional[float] = None
    """share: of them that are ASSURED; None where too few were looked at."""
    assured_error: Optional[float] = None
    """share: what that may be off by: two standard errors, and what came or went since they were
    looked at."""
    unreplied: Optional[float] = None
    """share: that never saw a reply."""
    unreplied_error: Optional[float] = None
    """share."""
    closed: Optional[float] = None
    """share: of the TCP ones that wait out TIME_WAIT or CLOSE."""
    closed_error: Optional[float] = None
    """share."""
    states: tuple[tuple[str, int], ...] = ()
    """entries: looked at, by TCP state."""
    zones: tuple[tuple[str, int], ...] = ()
    """entries: looked at, by conntrack zone; none where all are in zone 0, the default."""
    left: Percentiles = Percentiles()
    """s: until they expire if nothing renews them, by looks of the last 2.5 s; None where too few
    are so new."""
    waited: tuple[float, ...] = ()
    """s: since their last packet, of the TCP ones in TIME_WAIT (of all closed ones where few are)
    and of others that saw no reply."""
    idle: tuple[float, ...] = ()
    """s: the same of the rest."""
    once: Optional[float] = None
    """share: of those that are some seconds old, whose last packet came within two seconds of their
    first; None where too few tell."""
    other_timeout: Optional[float] = None
    """share: whose timeout is not the setting's of now: a ``ct timeout`` policy gave it, or the
    setting was changed since; None where looks do not tell."""

    @property
    def zone(self) -> int:
        """The zone that all looked at are in; 0: the default one, or several."""
        return int(self.zones[0][0]) if len(self.zones) == 1 else 0

    @property
    def timeout(self) -> Optional[float]:
        """s: of its entries, where they have one: what half have waited, and have left. None where
        they wait for two, or looks do not tell."""
        idle = () if self.idle and self.waited else self.idle or self.waited
        if not idle or self.left.p50 is None:
            return None
        return float(idle[len(idle) // 2] + self.left.p50)

    def state(self, *names: str) -> Optional[float]:
        """The share of TCP entries in any of these states; None while unknown."""
        total = sum(count for _, count in self.states)
        return sum(count for name, count in self.states if name in names) / total if total else None
