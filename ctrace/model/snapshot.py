"""Everything that a view may show, as frozen dataclasses.

Times are seconds, rates are per second, shares are 0..1, memory is bytes, unless
a name says otherwise. ``None`` means unknown, and views show it as ``-``. What every
field means, with its unit, stands in share/snapshot.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from ctrace.batch import HookInfo, Logged, SelfCost

GROUPS = (
    "who", "src", "prefix", "dst", "direction", "ports", "proto", "service", "pair", "process",
    "container", "pod", "pod-namespace", "netns",
)  # fmt: skip
"""Of culprits. ``pair`` is source to service, ``who`` the few keys of all that explain most."""

SORTS = ("held", "new", "life", "residence", "drops")
OVER_TIME = "table_seconds"  # how reports sort: not by what is held at the end


@dataclass(frozen=True)
class Counted:
    """Exact event counts by what happened."""

    insert: int = 0
    destroy: int = 0
    drop: int = 0
    insert_failed: int = 0
    early_drop: int = 0
    """Entries evicted to make room (part of ``destroy``)."""
    expired: int = 0
    deleted: int = 0
    clash_resolved: int = 0


@dataclass(frozen=True)
class Rates:
    """The same as :class:`Counted` per second, over the last interval."""

    insert: float = 0.0
    destroy: float = 0.0
    drop: float = 0.0
    insert_failed: float = 0.0
    early_drop: float = 0.0


@dataclass(frozen=True)
class Reconciliation:
    """Our counts against the kernel's own, since attaching. All zero when all agree."""

    count: int = 0
    """(inserts - destroys) minus the change of ``conntrack -C``; the kernel's count also
    holds entries that are not yet confirmed, so a few are normal under load."""
    drop: int = 0
    early_drop: int = 0
    insert_failed: int = 0


@dataclass(frozen=True)
class Percentiles:
    """p50, p90, p99 in seconds, from a histogram; None where nothing was measured."""

    p50: Optional[float] = None
    p90: Optional[float] = None
    p99: Optional[float] = None
    n: int = 0
    """How many were measured."""
    living: int = 0
    """For a residence: living entries whose age counted as well."""
    at_least: Optional[float] = None
    """For a residence with an unknown median: half of the entries have stayed this long already."""
    by_load: Optional[float] = None
    """Of a residence, as a check: held over new a second, the mean stay of a steady load."""
    by: str = ""
    """Of a residence: ``ends`` (measured, the living counted) or ``timeout`` (closed ones')."""
    error: Optional[float] = None
    """Of a residence: seconds that the median may be off by, either way."""


@dataclass(frozen=True)
class Composition:
    """What is held now is made of, by looks at an even sample of it: never by what has ended.

    Shares are None where too few were looked at; errors are two standard ones, and what changed.
    """

    n: int = 0
    """Entries looked at; 0: nothing is known."""
    assured: Optional[float] = None
    assured_error: Optional[float] = None
    unreplied: Optional[float] = None
    unreplied_error: Optional[float] = None
    closed: Optional[float] = None
    """Share of the TCP entries that wait out TIME_WAIT or CLOSE."""
    closed_error: Optional[float] = None
    states: tuple[tuple[str, int], ...] = ()
    """TCP states with how many of the entries looked at were in each, most frequent first."""
    left: Percentiles = Percentiles()
    """Seconds until they expire if nothing renews them."""
    waited: tuple[float, ...] = ()
    """Seconds since the last packet, of those in TIME_WAIT (of closed ones, if few are) or without
    a reply: quantiles at even steps, from the least to the most; empty where that is not known."""
    idle: tuple[float, ...] = ()
    """The same of the others."""
    once: Optional[float] = None
    """Of entries old enough to tell: the share whose last packet came within 2 s of their first."""
    other_timeout: Optional[float] = None
    """Share with another timeout than the setting's: a ``ct timeout`` policy's, or older."""

    def state(self, *names: str) -> Optional[float]:
        """The share of TCP entries in any of these states; None while unknown."""
        total = sum(count for _, count in self.states)
        return sum(count for name, count in self.states if name in names) / total if total else None


@dataclass(frozen=True)
class Table:
    """One namespace's table."""

    netns: int
    name: str
    count: int
    max: int
    buckets: int
    active: bool = True
    read: bool = True
    """Whether its count was read; else events tell it, and ``max`` and ``buckets`` are unknown."""
    pinned: Optional[float] = None
    """Share of entries that are ASSURED, which early_drop never evicts: of a sample."""
    pinned_error: Optional[float] = None
    """Standard error of that, where the table itself was sampled."""
    totals: Counted = Counted()
    rates: Rates = Rates()
    seconds_to_full: Optional[float] = None
    """Until it is full, by its new entries and their stay; None where it may never fill."""
    seconds_to_full_error: Optional[float] = None
    """What that may be off by, either way."""
    levels_off: Optional[float] = None
    """Entries that it levels off at while it rises; None where that is not known."""
    levels_off_error: Optional[float] = None
    composition: Composition = Composition()
    """What the table is made of."""
    full_since: Optional[float] = None
    """UTC seconds since when it has been refusing or evicting; None when it does not."""
    off_by: Reconciliation = Reconciliation()
    chain_too_long: int = 0
    """Inserts that failed since attaching because a hash chain was too long (since Linux 5.15)."""
    invalid: int = 0
    """Packets that the kernel called INVALID since attaching; 0 where it does not tell."""
    stale: bool = False
    """Events of it were lost, and are still to be made good: what its keys hold may be off."""
    hashed: int = 0
    """Entries of all namespaces that are known: the hash table is one for all."""
    max_known: bool = True
    """Whether its limit was read; else ``max`` is 0, which does not mean that there is none."""

    @property
    def fill(self) -> float:
        """count / max; 0 when there is no limit, or it is unknown."""
        return self.count / self.max if self.max else 0.0

    @property
    def load(self) -> float:
        """Expected hash chain length: each entry is hashed twice, once per direction.

        The buckets are shared by all namespaces (one nf_conntrack_hash since Linux 4.7).
        """
        return 2 * max(self.hashed, self.count) / self.buckets if self.buckets else 0.0


@dataclass(frozen=True)
class Histogram:
    """Counts between log-spaced edges (seconds); len(edges) == len(counts) + 1."""

    edges: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tuple5:
    """One flow, original direction, with its reply tuple as text when known."""

    proto: str
    src: str
    dst: str
    sport: int
    dport: int
    reply_src: str = ""
    reply_dst: str = ""
    reply_sport: int = 0
    reply_dport: int = 0
    status: int = 0
    state: str = ""


@dataclass(frozen=True)
class Ends:
    """How this key's entries ended, since the start."""

    expired: int = 0
    evicted: int = 0
    deleted: int = 0
    other: int = 0


@dataclass(frozen=True)
class OwnerView:
    """A process as a view shows it."""

    pid: int
    comm: str
    unit: str = ""
    cmdline: str = ""
    role: str = ""
    """``opened`` (captured in the kernel at the first packet) or ``listens``."""


@dataclass(frozen=True)
class Culprit:
    """One key's part of the table."""

    key: str
    """As shown: ``10.0.0.7``, ``tcp/8063``, ``10.0.0.7 -> tcp/8063``, ``nginx[812]``..."""
    words: str = ""
    """Of a key of ``who``: with what it is scattered over, ``tcp/443 from 1,204 sources``."""
    proto: str = ""
    port: Optional[int] = None
    src: str = ""
    dst: str = ""
    pod: str = ""
    """Pod, container or named namespace whose address ``src`` is or, without one, ``dst``."""
    netns: int = 0
    netns_name: str = ""
    direction: str = ""
    """``in``, ``out``, ``forward``, ``loopback``, ``mixed`` or empty."""
    held: int = 0
    """Entries in the table now."""
    held_error: Optional[int] = None
    """Two standard errors of that where it is reckoned, by status; None where it is counted."""
    share: float = 0.0
    """Its part of all entries held now, over the tables shown."""
    table_seconds: float = 0.0
    """Integral of ``held`` over the time observed."""
    inserts: int = 0
    new_per_s: float = 0.0
    destroys: int = 0
    drops: int = 0
    drop_per_s: float = 0.0
    error: int = 0
    """Upper bound of what ``inserts`` may lack, its namespace's lost events included; 0: exact."""
    stale: bool = False
    """What it holds may be off: events were lost, and the entries are still to be counted anew
    from the table. Of a process it stays so: who opened an entry is told once."""
    older: int = 0
    """Of ``held``, entries that were there before ctrace (age unknown); estimated from one end
    of sixteen while more than 200,000 events come each second."""
    life: Percentiles = Percentiles()
    """First to last packet that renewed the entry, or to the close; of ended entries, and of
    closed ones that were looked at before they end. One entry of sixteen is timed while more than
    200,000 events come each second."""
    residence: Percentiles = Percentiles()
    """From insert to destroy, of ended and living entries whose insert was seen."""
    ends: Ends = Ends()
    nat: str = ""
    """``src``, ``dst``, ``src,dst`` when seen on its entries; ``no`` otherwise."""
    composition: Composition = Composition()
    """Of entries held; ``assured`` to ``closed`` and ``states`` come from it. Where no table can
    be read, they are of ended entries once these outnumber those held, and ``n`` is 0."""
    assured: Optional[float] = None
    """Share of the entries held that are ASSURED."""
    unreplied: Optional[float] = None
    """Share of the entries held that never saw a reply."""
    closed: Optional[float] = None
    """Share of the TCP entries held that wait out TIME_WAIT or CLOSE."""
    distinct_src: Optional[int] = None
    """Estimated number of distinct sources (3 % standard error)."""
    owner: Optional[OwnerView] = None
    trend: tuple[float, ...] = ()
    """``held`` over the last minute, oldest first, one value per interval."""
    first_seen: Optional[float] = None
    """UTC seconds."""
    life_histogram: Histogram = Histogram()
    residence_histogram: Histogram = Histogram()
    states: tuple[tuple[str, int], ...] = ()
    """TCP states of those held that were looked at, with counts, most frequent first."""
    ended_states: tuple[tuple[str, int], ...] = ()
    """TCP state at the end, with counts, most frequent first."""
    samples: tuple[Tuple5, ...] = ()


@dataclass(frozen=True)
class Victim:
    """A flow that was refused, or whose entries were evicted."""

    key: str
    """``udp 10.0.0.2 -> 10.0.0.1:53``."""
    proto: str
    src: str
    dst: str
    port: int
    netns: int
    netns_name: str = ""
    drops: int = 0
    """New flows refused because the table was full."""
    drop_per_s: float = 0.0
    share_of_new: Optional[float] = None
    """Share of the source's new flows, to any service, that was refused; each packet counts."""
    share_of_service: Optional[float] = None
    """The same of its new flows to this service."""
    evicted: int = 0
    """Its entries that early_drop removed."""
    failed: int = 0
    """Its entries that lost an insertion race."""
    error: int = 0
    owner: Optional[OwnerView] = None
    """The local process that got EPERM; None for packets received or forwarded."""
    sample: Optional[Tuple5] = None
    pod: str = ""
    """As for a culprit: the owner of address ``src``."""


@dataclass(frozen=True)
class Rising:
    """A table that keeps rising."""

    per_s: tuple[float, float]
    """Entries a second, lowest and highest."""
    full_s: Optional[tuple[float, float]]
    """Seconds until it is full, soonest and latest; None without a limit, or a week away."""


@dataclass(frozen=True)
class Remedy:
    """One thing to do, with when it applies, what it frees, and what to type for it."""

    id: str
    """``notrack``, ``keep-alive``, ``sysctl-timeout``, ``ct-timeout``, ``delete``, ``limit``,
    ``drop-source``, ``drop-service``, ``syn-proxy``, ``larger-table``, ``buckets``, ``look``,
    ``change`` (of the program or set-up that makes the traffic)."""
    text: str
    """A clause for one line: what to do."""
    netns: int = 0
    """Where its commands have to run."""
    service: str = ""
    """``tcp/8063`` where it is for one service."""
    detail: str = ""
    """What it is based on, and what it costs."""
    now: int = 0
    """Entries that it frees at once."""
    frees: Optional[tuple[int, int]] = None
    """Entries that it frees in time, of a young load also of those to come; None: unknown."""
    fill_after: Optional[tuple[float, float]] = None
    rising: Optional[Rising] = None
    """With it, where the table goes on rising; None where it does not, or that is not known."""
    commands: tuple[str, ...] = ()
    """Shell lines, to be run as root inside the namespace."""
    undo: tuple[str, ...] = ()
    """Commands that undo it, likewise; empty where they change no setting."""
    memory: Optional[tuple[int, int]] = None
    """Bytes that it takes when the table is full."""
    initial: bool = False
    """Whether its commands have to run in the host's first namespace, wherever it helps."""
    option: str = ""
    """What ``ctrace advise`` takes to plan it, so that apply can try it; empty: nothing."""


@dataclass(frozen=True)
class Cause:
    """One recognised pattern, with its evidence."""

    id: str
    """As in share/snapshot.md; ``unknown`` where no shape fits."""
    text: str
    """The WHY line."""
    evidence: tuple[str, ...] = ()
    share: float = 0.0
    """Part of the table that it explains."""
    proto: str = ""
    port: Optional[int] = None
    netns: int = 0
    src: str = ""
    """The source behind it, where one source causes it with all its services."""
    load: bool = False
    """Ordinary traffic: nothing is wrong with it as long as its table has room."""
    remedies: tuple[Remedy, ...] = ()
    """What helps, best first; empty where nothing is wrong."""
    at_need: tuple[Remedy, ...] = ()
    """What would help if its table had no room; not shown, for advice with a lower target."""

    @property
    def remedy(self) -> str:
        """What helps, in one line; empty where nothing needs help."""
        return ", or ".join(one.text for one in self.remedies[:3])


@dataclass(frozen=True)
class Holder:
    """One of the few keys, of whatever grouping, that explain most of what is held or refused."""

    kind: str
    """``pair``, ``process``, ``service``, ``src``, ``unit``, ``ports``, ``prefix``, ``dst``,
    ``dst-prefix``, ``netns``, ``proto``, ``net``, ``direction`` or ``state``."""
    text: str
    """``tcp/8063 from 10.0.0.7``, ``udp/10000-10006 from 76,000 sources``, ``nginx[812]``."""
    share: float
    """What it adds to those before it, of all that is held or refused."""
    held: int = 0
    """The same as a number of entries, or of refusals."""
    netns: int = 0
    """0 where it spans several namespaces."""
    sources: int = 0
    """Its sources, as far as they have rows of their own."""


@dataclass(frozen=True)
class History:
    """The last minutes, one point per interval, oldest first; all tuples equally long."""

    ts: tuple[float, ...] = ()
    """UTC seconds."""
    count: tuple[int, ...] = ()
    """Entries, summed over the tables shown."""
    insert: tuple[float, ...] = ()
    destroy: tuple[float, ...] = ()
    drop: tuple[float, ...] = ()
    early_drop: tuple[float, ...] = ()


@dataclass(frozen=True)
class Memory:
    """What the model holds, against its fixed limit."""

    used: int = 0
    limit: int = 0
    tracked_keys: int = 0
    pruned: int = 0
    """Keys given up to stay within the limit; what they held is the stated error."""


@dataclass(frozen=True)
class Snapshot:
    """The whole answer at one instant."""

    ts: int
    """UTC, nanoseconds."""
    host: str
    interval_s: float
    uptime_s: float
    """Seconds observed so far."""
    hooks: HookInfo
    group: str
    sort: str
    lost: int = 0
    """Events lost since the start; totals stay exact, per-key numbers may lack these."""
    unseen: int = 0
    """Entries that were in new namespaces when these were found: nobody saw them made, and no
    total has their inserts."""
    tables: tuple[Table, ...] = ()
    totals: Counted = Counted()
    rates: Rates = Rates()
    culprits: tuple[Culprit, ...] = ()
    culprits_total: int = 0
    """How many keys there are, shown or not (estimated beyond the memory limit)."""
    held_total: int = 0
    """Entries that all keys hold, shown or not: what ``share`` is a share of."""
    held_total_error: Optional[int] = None
    """As ``held_error`` of a culprit, with all that was not looked at."""
    table_seconds_total: float = 0.0
    """Table-seconds of all keys, shown or not."""
    top: dict[str, tuple[tuple[str, float], ...]] = field(default_factory=dict)
    """For ``src``, ``dst``, ``service`` and ``pair``: the first keys by inserts per second."""
    victims: tuple[Victim, ...] = ()
    who: tuple[Holder, ...] = ()
    """The fewest keys that explain 80 % of what is held, or the few that explain most."""
    who_refused: tuple[Holder, ...] = ()
    """The same for what was refused."""
    why: tuple[Cause, ...] = ()
    """Best first; never empty once something was observed."""
    history: History = History()
    memory: Memory = Memory()
    cost: SelfCost = field(default_factory=SelfCost)
    """What ctrace costs; ``self`` in JSON."""
    filter: str = ""
    """The filter as the user gave it; empty for none."""
    logged: Optional[Logged] = None
    """What the host's own log says about a full table; None without such a log."""
