"""Who holds the table, and who is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from ctrace.model.snapshot.figures import Composition, Histogram, Percentiles, Residence


@dataclass(frozen=True)
class Tuple5:
    """One flow, original direction, with its reply tuple as text when known."""

    proto: str
    """One such flow; None when there is none."""
    src: str
    """address: original tuple."""
    dst: str
    """address."""
    sport: int
    """ICMP: id."""
    dport: int
    """ICMP: type * 256 + code."""
    reply_src: str = ""
    """address: reply tuple; None when unknown."""
    reply_dst: str = ""
    """address."""
    reply_sport: int = 0
    reply_dport: int = 0
    status: int = 0
    """IPS_* bits by conntrack's names: ``SEEN_REPLY``, ``ASSURED``, ..."""
    state: str = ""
    """TCP state."""


@dataclass(frozen=True)
class Ends:
    """How this key's entries ended, since the start."""

    expired: int = 0
    """entries: timed out."""
    evicted: int = 0
    """entries: ended to make room."""
    deleted: int = 0
    """entries: by a user, an RST, or with their namespace."""
    other: int = 0
    """entries: for a reason that this hook family can't tell."""


@dataclass(frozen=True)
class OwnerView:
    """A process as a view shows it."""

    pid: int
    """Process id; the owner is None when unknown."""
    comm: str
    """The process's name."""
    unit: str = ""
    """Container or systemd unit."""
    cmdline: str = ""
    """Command line, while the process lives."""
    role: str = ""
    """``opened`` (captured in the kernel at the first packet) or ``listens``."""


@dataclass(frozen=True)
class Culprit:
    """One key's part of the table."""

    key: str
    """``10.0.0.7``, ``tcp/8063``, ``10.0.0.7 -> tcp/8063``, ``nginx[812]`` (what it opened),
    ``nginx[812] listens``, ..."""
    words: str = ""
    """Of a key of ``who``: with what it is scattered over, ``tcp/443 from 1,204 sources``."""
    proto: str = ""
    """``tcp``, ``udp``, ... where the key has one."""
    port: Optional[int] = None
    """Service port where the key has one."""
    src: str = ""
    """address: where the key has one."""
    dst: str = ""
    """address: where the key has one."""
    pod: str = ""
    """Pod, container or named network namespace whose address ``src`` is or, without one, ``dst``;
    empty when none is known, or several have that address."""
    netns: int = 0
    """inode: the namespace; 0: several."""
    netns_name: str = ""
    direction: str = ""
    """``in``, ``out``, ``forward``, ``loopback``, ``mixed`` or empty."""
    held: int = 0
    """entries: in the table now."""
    held_error: Optional[int] = None
    """entries: with a filter by status: two standard errors of ``held``, which is reckoned then;
    None where it is counted."""
    share: float = 0.0
    """share: its part of all entries held now, over the tables shown."""
    table_seconds: float = 0.0
    """entries x s: integral of ``held`` over the time observed."""
    inserts: int = 0
    """entries: made since the start."""
    new_per_s: float = 0.0
    """per s: over the last interval."""
    destroys: int = 0
    """entries: gone."""
    drops: int = 0
    """packets: its new flows that were refused."""
    drop_per_s: float = 0.0
    """per s: over the last interval."""
    error: int = 0
    """entries: upper bound of what ``inserts`` may lack, lost events of its namespace included; 0:
    exact."""
    stale: bool = False
    """bool: what it holds may be off: its table has not been read to the end, or events were lost;
    after that rows of processes and containers stay so."""
    older: int = 0
    """entries: of ``held``, those that were there before ctrace; estimated while more than 200,000
    events come each second."""
    life: Percentiles = Percentiles()
    """s: real life: first to last packet, or to the close; of all entries seen made, of which the
    open ones live longer than they have lived (Kaplan-Meier): None while those may be the longer
    half; off by at most 12.5 % or 1 ms."""
    residence: Residence = Residence()
    """s: stay in the table: insert to destroy, of ended and living entries together (Kaplan-Meier);
    None while unknown."""
    ends: Ends = Ends()
    nat: str = ""
    """``src``, ``dst``, ``src,dst`` when its tuples were rewritten; ``no``."""
    composition: Composition = Composition()
    """As a table's, of entries held; ``assured`` to ``closed`` and ``states`` come from it. Where
    no table can be read, they are of ended entries once these outnumber those held, and ``n`` is
    0."""
    assured: Optional[float] = None
    """share: of the entries held that are ASSURED, as ``composition``'s; where nothing can look
    into the table, of those that ended, once they are more than those held."""
    unreplied: Optional[float] = None
    """share: the same of those that never saw a reply."""
    closed: Optional[float] = None
    """share: the same of TCP entries that wait out TIME_WAIT or CLOSE."""
    distinct_src: Optional[int] = None
    """addresses: estimated, 3 % standard error."""
    owner: Optional[OwnerView] = None
    trend: tuple[float, ...] = ()
    """entries: ``held`` over the last minute, oldest first, one value per interval."""
    first_seen: Optional[float] = None
    """UTC: when it was first seen."""
    life_histogram: Histogram = Histogram()
    residence_histogram: Histogram = Histogram()
    """As ``life_histogram``."""
    states: tuple[tuple[str, int], ...] = ()
    """entries: looked at, as ``composition``'s."""
    ended_states: tuple[tuple[str, int], ...] = ()
    """entries: TCP state at the end: ``TIME_WAIT``, ..."""
    samples: tuple[Tuple5, ...] = ()
    """Flows, as ``victims[].sample``."""


@dataclass(frozen=True)
class Victim:
    """A flow that was refused, or whose entries were evicted."""

    key: str
    """``udp 10.0.0.2 -> 10.0.0.1:53``."""
    proto: str
    src: str
    """address."""
    dst: str
    """address."""
    port: int
    """Service port."""
    netns: int
    """inode: the namespace."""
    netns_name: str = ""
    drops: int = 0
    """packets: new flows refused because the table was full."""
    drop_per_s: float = 0.0
    """per s: over the last interval."""
    share_of_new: Optional[float] = None
    """share: refused of the source's new flows, to any service; each packet counts."""
    share_of_service: Optional[float] = None
    """share: the same of its new flows to this service."""
    evicted: int = 0
    """entries: its entries that early_drop removed."""
    failed: int = 0
    """entries: its entries that lost an insertion race."""
    error: int = 0
    """packets: upper bound of what the numbers may lack."""
    owner: Optional[OwnerView] = None
    """The local process that got EPERM; None for packets received or forwarded."""
    sample: Optional[Tuple5] = None
    pod: str = ""
    """As for a culprit: the owner of address ``src``."""


@dataclass(frozen=True)
class Holder:
    """One of the few keys, of whatever grouping, that explain most of what is held or refused."""

    kind: str
    """``pair``, ``process``, ``service``, ``src``, ``unit``, ``ports``, ``prefix``, ``dst``,
    ``dst-prefix``, ``netns``, ``proto``, ``net``, ``direction`` or ``state``."""
    text: str
    """``tcp/8063 from 10.0.0.7``, ``udp/10000-10006 from 76,000 sources``, ``nginx[812]``."""
    share: float
    """share: what it adds to those before it, of all that is held or refused."""
    held: int = 0
    """entries: the same as a number of entries, or of refusals."""
    netns: int = 0
    """inode: 0 where it spans several namespaces."""
    sources: int = 0
    """addresses: of its sources, those that have rows of their own."""
