"""The tables, and the whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from ctrace.batch import HookInfo, Logged, SelfCost
from ctrace.model.snapshot.causes import Cause
from ctrace.model.snapshot.figures import Composition, Counted, Rates, Reconciliation
from ctrace.model.snapshot.keys import Culprit, Holder, Victim


@dataclass(frozen=True)
class Table:
    """One namespace's table."""

    netns: int
    """inode: the namespace."""
    name: str
    """``init``, an ``ip netns`` name, a container, or ``netns:<inode>``."""
    count: int
    """entries: as the kernel counts them (``conntrack -C``); None where no text tells."""
    max: int
    """entries: ``nf_conntrack_max``, one number for all namespaces; 0: no limit."""
    buckets: int
    """Of the hash table, one for all namespaces; None where that was not read."""
    active: bool = True
    """bool: whether conntrack runs there."""
    read: bool = True
    """bool: whether its count was read; else ``count`` is what events tell, and ``max`` and
    ``fill`` are None."""
    pinned: Optional[float] = None
    """share: of entries that are ASSURED, which early_drop never evicts: of a sample of the table's
    entries, else of those that were there at the start while these are nearly all; None when
    neither tells."""
    pinned_error: Optional[float] = None
    """share: standard error of that, and what changed since; None where the table was not
    sampled."""
    totals: Counted = Counted()
    """events: as ``totals`` of the whole, of this namespace."""
    rates: Rates = Rates()
    """per s: as ``rates_per_s`` of the whole, of this namespace."""
    seconds_to_full: Optional[float] = None
    """s: until it is full, from the rate of new entries and how long they stay; None when it is
    full, does not rise, or may never fill."""
    seconds_to_full_error: Optional[float] = None
    """s: what that may be off by, either way."""
    levels_off: Optional[float] = None
    """entries: where it levels off, while it rises; None when that is not known."""
    levels_off_error: Optional[float] = None
    """entries: what that may be off by."""
    composition: Composition = Composition()
    full_since: Optional[float] = None
    """UTC: since when it refuses or evicts; None when it does not."""
    off_by: Reconciliation = Reconciliation()
    chain_too_long: int = 0
    """packets: new flows refused since attaching because a hash chain was too long (since Linux
    5.15)."""
    invalid: int = 0
    """packets: that the kernel called INVALID since attaching; 0 where it does not tell."""
    stale: bool = False
    """bool: what its keys hold is still to be read from the table: at the start, or anew after
    events were lost."""
    hashed: int = 0
    """entries: of all namespaces that are known: the hash table is one for all."""
    max_known: bool = True
    """bool: whether its limit was read; else ``max`` and ``fill`` are None."""

    @property
    def fill(self) -> float:
        """share: ``count`` of ``max``; 0 when there is no limit. Unknown where ``max`` is."""
        return self.count / self.max if self.max else 0.0

    @property
    def load(self) -> float:
        """entries: expected length of a hash chain. Each is hashed twice, once per direction, and
        all namespaces share the buckets (one nf_conntrack_hash since Linux 4.7)."""
        return 2 * max(self.hashed, self.count) / self.buckets if self.buckets else 0.0


@dataclass(frozen=True)
class History:
    """The last minutes, one point per interval, oldest first; all tuples equally long."""

    ts: tuple[float, ...] = ()
    """UTC: seconds since 1970, one point an interval, oldest first."""
    count: tuple[int, ...] = ()
    """entries: over all namespaces shown."""
    insert: tuple[float, ...] = ()
    """per s."""
    destroy: tuple[float, ...] = ()
    """per s."""
    drop: tuple[float, ...] = ()
    """per s."""
    early_drop: tuple[float, ...] = ()
    """per s."""


@dataclass(frozen=True)
class Memory:
    """What the model holds, against its fixed limit."""

    used: int = 0
    """bytes: what the statistics hold."""
    limit: int = 0
    """bytes: their fixed limit."""
    tracked_keys: int = 0
    """keys: that have a row of their own."""
    pruned: int = 0
    """keys: given up to stay within the limit."""


@dataclass(frozen=True)
class Snapshot:
    """The whole answer at one instant."""

    ts: int
    """UTC: the instant that it describes."""
    host: str
    """Host name."""
    interval_s: float
    """s: the interval that rates are of."""
    uptime_s: float
    """s: observed so far."""
    hooks: HookInfo
    group: str
    """What ``culprits`` are: ``who`` (the few keys of any kind that explain most), ``src``,
    ``prefix``, ``dst``, ``direction``, ``ports``, ``proto``, ``service``, ``pair``, ``process``,
    ``container``, ``pod``, ``pod-namespace``, ``netns``."""
    sort: str
    """What they are sorted by: ``held``, ``new``, ``life``, ``residence``, ``drops``."""
    lost: int = 0
    """events: lost on the way to user space since the start; totals stay exact, per-key numbers may
    lack these."""
    unseen: int = 0
    """entries: in namespaces that were found after the start, made before that: no ``inserts`` and
    no total has them."""
    tables: tuple[Table, ...] = ()
    totals: Counted = Counted()
    rates: Rates = Rates()
    culprits: tuple[Culprit, ...] = ()
    culprits_total: int = 0
    """keys: how many there are, shown or not (estimated beyond the memory limit)."""
    held_total: int = 0
    """entries: that all keys hold, shown or not: what ``share`` is a share of; unknown where no
    text tells."""
    held_total_error: Optional[int] = None
    """entries: with a filter by status, two standard errors of ``held_total``, and all that was not
    looked at; None where it is counted."""
    table_seconds_total: float = 0.0
    """s: table-seconds of all of them, shown or not."""
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
