"""Why a table fills, and what helps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class Rising:
    """A table that keeps rising."""

    per_s: tuple[float, float]
    """entries/s: by how much, lowest and highest."""
    full_s: Optional[tuple[float, float]]
    """s: until it is full, soonest and latest; None without a limit, or where it takes more than a
    week."""


@dataclass(frozen=True)
class Remedy:
    """One thing to do, with when it applies, what it frees, and what to type for it."""

    id: str
    """``notrack``, ``keep-alive``, ``sysctl-timeout``, ``delete``, ``limit``, ``drop-source``,
    ``drop-service``, ``syn-proxy``, ``untrack-echo``, ``larger-table``, ``buckets``, ``look``,
    ``change`` (of the program or set-up)."""
    text: str
    """A clause for one line: what to do."""
    netns: int = 0
    """inode: where it helps, and where its commands have to run."""
    service: str = ""
    """``tcp/8063`` where it is for one service."""
    detail: str = ""
    """What it rests on, and what it costs."""
    now: int = 0
    """entries: that it frees at once."""
    frees: Optional[tuple[int, int]] = None
    """entries: that it frees in time, lowest and highest, of a young load also of those to come;
    empty: unknown."""
    fill_after: Optional[tuple[float, float]] = None
    """share: how full the table is then, lowest and highest; empty: unknown."""
    rising: Optional[Rising] = None
    """With it, where the table goes on rising; None where it does not, or that is not known."""
    commands: tuple[str, ...] = ()
    """Shell lines, to be run as root inside the namespace."""
    undo: tuple[str, ...] = ()
    """Commands that undo it, likewise; empty where they change no setting."""
    memory: Optional[tuple[int, int]] = None
    """bytes: that it takes when the table is full, lowest and highest; empty: none."""
    initial: bool = False
    """bool: whether its commands have to run in the host's first namespace instead."""
    option: str = ""
    """What ``ctrace advise`` takes to plan it, so that apply can try it; empty: nothing."""


@dataclass(frozen=True)
class Cause:
    """One recognised pattern, with its evidence."""

    id: str
    """``no-keepalive``, ``loopback-probes``, ``time-wait``, ``half-closed``, ``lasting-state``,
    ``leak``, ``idle-established``, ``established``, ``one-way-udp``, ``answered-udp``,
    ``udp-streams``, ``dns-storm``, ``tunnel``, ``pings``, ``one-way-tcp``, ``syn-flood``,
    ``udp-flood``, ``unanswered``, ``scan``, ``clash``, ``source-ports``, ``chains-too-long``,
    ``stale-nat``, ``rule-limit``, ``cloud-limit``, ``expectations``, ``invalid``, ``other-netns``,
    ``too-small``, ``logged-full``, ``unknown``."""
    text: str
    """The WHY line."""
    evidence: tuple[str, ...] = ()
    """What it was recognised by."""
    share: float = 0.0
    """share: of what its namespace holds."""
    proto: str = ""
    port: Optional[int] = None
    netns: int = 0
    """inode: 0: not of one namespace."""
    src: str = ""
    """The source behind it, where one source causes it with all its services."""
    load: bool = False
    """bool: ordinary traffic, so nothing is wrong with it as long as its table has room."""
    remedies: tuple[Remedy, ...] = ()
    """What helps, best first; empty where nothing is wrong."""
    at_need: tuple[Remedy, ...] = ()
    """As ``remedies``: what would help if its table had no room; views do not show it."""

    @property
    def remedy(self) -> str:
        """What helps, in one line; empty where nothing needs help."""
        return ", or ".join(one.text for one in self.remedies[:3])
