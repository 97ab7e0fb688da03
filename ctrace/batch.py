"""What a source yields: the same for live capture, netlink and a recorded file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Optional, Protocol

import numpy as np
import numpy.typing as npt

from ctrace.beside import Beside
from ctrace.record import REASONS_OF, Events, Kind, empty

DUMP: Final = "dump"
"""``HookInfo.family`` of a source made of text: nothing was hooked."""

Counts = npt.NDArray[np.uint64]
"""Exact cumulative counters of one namespace since attaching, indexed by Reason."""


def made_and_ended(counts: Optional[Counts]) -> tuple[int, int]:
    """Entries that came into the table and that left it, by counters; none without any."""
    if counts is None:
        return 0, 0
    made, ended = (counts[REASONS_OF[kind]] for kind in (Kind.INSERT, Kind.DESTROY))
    return int(made.sum()), int(ended.sum())


@dataclass(frozen=True)
class HookInfo:
    """The hook family in use and what it can and cannot see."""

    family: str
    """``fentry``, ``kprobe``, ``netfilter``, ``netlink`` or, made of text, ``dump``."""
    attached: tuple[str, ...] = ()
    """What is hooked."""
    blind: tuple[str, ...] = ()
    """One plain sentence per thing that this family, here, cannot show."""
    drop_tuples: bool = True
    """bool: whether a refused packet's own tuple is seen."""
    evictions: bool = True
    """bool: whether early_drop's evictions are distinguished from other deletions."""
    owners: bool = True
    """bool: whether the process that opened a local flow is captured."""
    changes: bool = True
    """bool: whether entries are seen to come and go at all: not in a single dump. What depends on
    it is unknown then."""
    refusals: bool = True
    """bool: whether refused flows are counted at all: not in dumps of the table."""
    note: str = ""
    """What ruled out the families above this one; empty when none is, or it was asked for."""


@dataclass(frozen=True)
class Moment:
    """The time that a log gives for an event."""

    utc: Optional[float] = None
    """s: UTC, since 1970; None where the log lacks the year or the zone."""
    boot: Optional[float] = None
    """s: since the host's start."""
    text: str = ""
    """As written in the log."""


@dataclass(frozen=True)
class Logged:
    """What a host's own log says about a full table, if a source has that log."""

    full: int
    """messages: that the table was full; ``logged`` is None without such a log."""
    refused: int
    """packets: refused at least: one for each message, also for those that were suppressed."""
    first: Moment = field(default_factory=Moment)
    last: Moment = field(default_factory=Moment)
    netns: tuple[int, ...] = ()
    """Inodes of the namespaces whose tables were full; empty where the first namespace's was, or
    the kernel is too old to tell."""


TYPED_IN: Final = 1
"""Number of the namespace in which texts were made: the host itself, as far as they tell."""
LOWEST_INODE: Final = 0xEFFFFFF0
"""PROC_IPC_INIT_INO: the lowest inode number of a namespace (include/linux/proc_ns.h)."""
_DYNAMIC: Final = 0xF0000000
"""PROC_DYNAMIC_FIRST: lower numbers are the boot's own, which never go."""
_LIVES: Final = 14
"""Lives of one number that can be distinguished; the 15th gets the id of the second."""


def life(inode: int, number: int) -> int:
    """The id in records of a namespace whose number ``number`` earlier namespaces had.

    The first is known by its inode number, later ones by numbers that no inode has.
    """
    if not number or inode < _DYNAMIC:
        return inode
    return (1 + (number - 1) % (_LIVES - 1)) << 28 | inode & 0xFFFFFFF


def inode_of(netns: int) -> int:
    """The inode number of a namespace with the id ``netns``."""
    if netns >= LOWEST_INODE or netns < 1 << 28:
        return netns
    return _DYNAMIC | netns & 0xFFFFFFF


INVALID: Final = ("invalid", "icmp_error")
"""The kernel's counters of INVALID packets: those of ICMP have one of their own
(nf_conntrack_handle_icmp in nf_conntrack_core.c). Before Linux 5.10 both counted them: then
readings leave the second out."""


def invalid(stats: Mapping[str, int]) -> int:
    """How many packets were INVALID, by the kernel's counters."""
    return sum(stats.get(name, 0) for name in INVALID)


@dataclass(frozen=True)
class TableReading:
    """One namespace's table as the kernel itself counts it, at one instant."""

    netns: int
    count: int
    max: int
    """``nf_conntrack_max``; 0 means unlimited before 7.2, or unknown (``max_known``)."""
    buckets: int
    stats: Mapping[str, int] = field(default_factory=dict)
    """/proc/net/stat/nf_conntrack (``conntrack -S``) summed over CPUs, cumulative:
    found, invalid, insert, insert_failed, drop, early_drop, icmp_error,
    search_restart, clash_resolve, chaintoolong; absent where it can't be read."""
    at: int = 0
    """Boot clock, ns, at which ``count`` was read; 0 in recordings that do not tell."""
    met: int = 0
    """Entries met by walks over parts of the table, cumulative: an even sample."""
    met_assured: int = 0
    """How many of them were ASSURED then."""
    gone: bool = False
    """The last reading of a namespace that has gone; ``count`` is 0."""
    max_known: bool = True
    """False where only the count was read, as of texts that do not give the limit."""
    unread: bool = False
    """Whether its entries from before ctrace have not all come yet."""


@dataclass(frozen=True)
class Netns:
    """A network namespace, with what is known of it."""

    inum: int
    """Its inode number; of a later one with the same number, :func:`life`."""
    name: str
    """``init``, an ``ip netns`` name, a container, or ``netns:<inum>``."""
    addresses: tuple[str, ...] = ()
    """Local addresses, in text form, to tell served from called from forwarded."""
    active: bool = True
    """Whether conntrack's hooks are known to be on there."""


@dataclass(frozen=True)
class Owner:
    """The process that opened a flow, as captured in the kernel at its first packet."""

    key: int
    """``owner`` of the record: pid << 32 | low 32 bits of start time in ms."""
    comm: str
    cgroup: int = 0
    unit: str = ""
    """Container or systemd unit, from the cgroup's path; empty when unknown."""
    cmdline: str = ""

    @property
    def pid(self) -> int:
        """Process id in the init pid namespace."""
        return self.key >> 32


@dataclass(frozen=True)
class Names:
    """Names learned since the previous batch."""

    netns: Mapping[int, Netns] = field(default_factory=dict)
    owners: Mapping[int, Owner] = field(default_factory=dict)
    cgroups: Mapping[int, str] = field(default_factory=dict)
    """cgroup id to container or unit."""
    listeners: Mapping[tuple[int, int, int], Owner] = field(default_factory=dict)
    """(netns, protocol number, port) to the process that listens there."""


@dataclass(frozen=True)
class SelfCost:
    """What ctrace itself costs the host."""

    cpu: float = 0.0
    """cores: user and system time over the last interval; 0.02 is 2 % of one core."""
    rss: int = 0
    """bytes: resident memory."""
    kernel: float = 0.0
    """cores: spent inside the BPF programs, where the kernel measures it, else 0."""


@dataclass(frozen=True)
class Batch:
    """Events in time order, and the kernel's own numbers at the end of them."""

    events: Events
    until: int
    """Boot clock, ns: every event of this batch happened at or before it."""
    lost: int = 0
    """Records lost since the previous batch (ring full, or netlink overrun)."""
    counts: Mapping[int, Counts] = field(default_factory=dict)
    """Per namespace; cumulative since attaching, exact also when records are lost."""
    tables: tuple[TableReading, ...] = ()
    """Read about once a second; empty in batches between."""
    names: Names = field(default_factory=Names)
    cost: SelfCost = field(default_factory=SelfCost)
    beside: tuple[Beside, ...] = ()
    """What rules and tables show together, as read lately; of a namespace in few of its batches."""
    more: bool = False
    """Whether this is only a part of the interval's events; ``cost`` comes with the last part."""

    @classmethod
    def idle(cls, until: int) -> Batch:
        """A batch in which nothing happened."""
        return cls(empty(), until)


@dataclass(frozen=True)
class Clock:
    """How boot-clock times map to wall-clock times, fixed at attach."""

    offset: int
    """CLOCK_REALTIME minus CLOCK_BOOTTIME, ns, when the source was opened."""

    def utc(self, boot: int) -> int:
        """Nanoseconds since the epoch for a boot-clock time."""
        return boot + self.offset


class Source(Protocol):
    """Anything that yields batches. Closing it leaves nothing behind."""

    @property
    def hooks(self) -> HookInfo:
        """The hook family that made (or, for a file, had made) the records."""

    @property
    def clock(self) -> Clock:
        """Boot clock to UTC."""

    @property
    def started(self) -> int:
        """Boot clock, ns, at which all hooks were in place."""

    def batches(self, interval: float) -> Iterator[Batch]:
        """Yield a batch every ``interval`` seconds until closed or exhausted.

        A source may give an interval's events in several (``Batch.more``).
        """

    def close(self) -> None:
        """Detach; safe to call twice and from a signal handler's exception."""
