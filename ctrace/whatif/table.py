"""A model of the connection tracking table: who gets in, who stays, who is refused.

What the kernel does (net/netfilter/nf_conntrack_core.c, 6.12):

* an entry is made while ``count <= nf_conntrack_max``; above that ``early_drop``
  looks at 8 buckets for unassured entries of the namespace, deletes those of the
  first bucket that has any, and the packet is refused when none has;
* an expired entry stays, and counts, until ``gc_worker`` comes by. It runs again
  after the mean of the remaining timeouts (each clamped to 1..300 s, beginning
  with 100 imaginary ones of 60 s), at least 1 s and at most 60 s later;
* after a refusal the next ``gc_worker`` pass also deletes unassured and closing
  TCP entries of namespaces above 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.model.groups.passes import GC_SCAN_INTERVAL_MAX
from ctrace.record import TCP
from ctrace.whatif.flows import F64, I64, Bool, Flows

GC_SCAN_INTERVAL_MIN: Final = 1.0
GC_SCAN_INTERVAL_CLAMP: Final = 300.0
GC_SCAN_INITIAL_COUNT: Final = 100
NF_CT_EVICTION_RANGE: Final = 8
STEPS: Final = 3000
SHORTEST_STEP: Final = 0.02
CLOSING: Final = (4, 5, 6, 7, 8)
"""FIN_WAIT, CLOSE_WAIT, LAST_ACK, TIME_WAIT, CLOSE: tcp_can_early_drop."""


@dataclass(frozen=True)
class Setting:
    """The table's size."""

    limit: int
    """nf_conntrack_max; 0: none."""
    buckets: int


@dataclass(frozen=True)
class Known:
    """Facts of a recording about a run, besides its flows."""

    measured: bool
    """Entries leave when they were really seen to (evicted and refused ones: their timeout
    plus ``lag``); otherwise collection is modelled."""
    lag: float = 0.0
    """Seconds."""
    passes: Optional[F64] = None
    """When gc_worker ran: all of them if ``measured``, else only the first counts."""
    extra: Mapping[int, int] = field(default_factory=dict)
    """Entries that are always there, by namespace."""
    netns: tuple[int, ...] = ()
    """The namespaces, in this order; empty: those of the flows and of ``extra``."""
    limits: Mapping[int, tuple[F64, I64]] = field(default_factory=dict)
    """By namespace, what nf_conntrack_max was at some times (s); else it is the setting's."""


@dataclass(frozen=True)
class Course:
    """What the model's table did: one row a namespace, one column a step."""

    ts: F64
    """Seconds, the end of each step."""
    netns: tuple[int, ...]
    count: npt.NDArray[np.float64]
    expired: npt.NDArray[np.float64]
    """The part of ``count`` whose timeout has expired, waiting for collection."""
    drops: npt.NDArray[np.float64]
    evictions: npt.NDArray[np.float64]
    interval: float
    """Mean time between two collections."""
    longest: float
    """Longest time between two."""
    expiring: F64
    """Entries that expire per second, mean, per namespace."""
    limits: npt.NDArray[np.float64]
    """nf_conntrack_max; inf: none."""


def refusal(count: float, unassured: float, buckets: int) -> tuple[float, float]:
    """(chance that early_drop finds nothing, entries that it deletes when it does).

    Each entry hangs in two of ``buckets`` chains; the number of unassured ones in a
    bucket is Poisson with mean 2 * unassured / buckets.
    """
    if count <= 0 or unassured <= 0:
        return 1.0, 0.0
    mean = 2.0 * unassured / max(buckets, 1)
    if mean < 1e-9:  # in the limit, one
        return 1.0, 1.0
    chance = math.exp(-NF_CT_EVICTION_RANGE * mean)
    return chance, mean / -math.expm1(-mean)


def next_interval(remaining: F64, weights: Optional[F64] = None) -> float:
    """Seconds until gc_worker runs again, from the living entries' remaining timeouts.

    ``weights``: how many entries each stands for; 1 by default.
    """
    clamped = np.clip(remaining, GC_SCAN_INTERVAL_MIN, GC_SCAN_INTERVAL_CLAMP)
    many = np.ones(len(remaining)) if weights is None else weights
    total = GC_SCAN_INITIAL_COUNT * GC_SCAN_INTERVAL_MAX + float((clamped * many).sum())
    mean = total / (GC_SCAN_INITIAL_COUNT + float(many.sum()))
    return min(max(mean, GC_SCAN_INTERVAL_MIN), GC_SCAN_INTERVAL_MAX)


def collected(
    prompt: float, expiring: float, interval: float, limit: float = math.inf
) -> tuple[float, float]:
    """Entries held when ``prompt`` of them have not expired and ``expiring`` expire each second.

    Returns the lowest (each is collected at once) and the highest (only after a whole
    ``interval``); the truth lies between.
    """
    return min(prompt, limit), min(prompt + expiring * interval, limit)


def most_of(setting: Setting, peak: float) -> float:
    """What a table of this size holds at most: not its maximum, if it is lowered below what is
    there, which stays until it expires."""
    return setting.limit if setting.limit and peak <= setting.limit else math.inf


def run(flows: Flows, seconds: float, setting: Setting, known: Known) -> Course:
    """Run the flows through a table of this setting."""
    return _Run(flows, seconds, setting, known).course()


class _Run:
    """One run's state: arrays over flows, counters over namespaces."""

    def __init__(self, flows: Flows, seconds: float, setting: Setting, known: Known) -> None:
        self.flows, self.setting = flows, setting
        self.random = np.random.default_rng(1)
        self.netns = known.netns or tuple(
            sorted({int(n) for n in np.unique(flows.netns)} | set(known.extra))
        )
        index = {inum: i for i, inum in enumerate(self.netns)}
        self.ns: I64 = (
            np.array([index[int(n)] for n in np.unique(flows.netns)], np.int64)[
                np.unique(flows.netns, return_inverse=True)[1]
            ]
            if len(flows)
            else np.zeros(0, np.int64)
        )
        self.places = len(self.netns)
        self.step = max(seconds / STEPS, SHORTEST_STEP)
        self.steps = max(1, math.ceil(seconds / self.step))
        self.ends: F64 = np.arange(1.0, self.steps + 1) * self.step
        self.seconds = seconds
        limits = np.full((self.places, self.steps), float(setting.limit))
        for inum, (at, limit) in known.limits.items():
            if inum in index:
                limits[index[inum]] = limit[np.searchsorted(at, self.ends, "right").clip(1) - 1]
        self.limits: npt.NDArray[np.float64] = np.where(limits > 0, limits, np.inf)
        self.limit: F64 = self.limits[:, 0]
        # When each leaves by itself: as seen, or deleted; expiry then needs a collection.
        natural = np.where(np.isnan(flows.leave), flows.expire + known.lag, flows.leave)
        self.leave: F64 = np.minimum(natural, flows.end) if known.measured else flows.end.copy()
        self.expire: F64 = flows.expire.copy()
        self.collects = not known.measured
        self.alive: Bool = np.zeros(len(flows), bool)
        self.entered: Bool = np.zeros(len(flows), bool)
        self.count: F64 = np.zeros(self.places)
        self.unassured: F64 = np.zeros(self.places)
        for inum, n in known.extra.items():
            self.count[index[inum]] += n
        self.loose = np.flatnonzero(~flows.assured)
        self.loose = self.loose[np.argsort(flows.arrive[self.loose], kind="stable")]
        self.trimmed = 0
        self.pressed = False
        passes = [] if known.passes is None else [float(at) for at in known.passes]
        self.next_pass = passes[0] if passes else next_interval(np.zeros(0))
        self.given = passes[1:] if known.measured else []
        self.passes: list[float] = []

    def course(self) -> Course:
        flows = self.flows
        shape = (self.places, self.steps)
        count, drops, evictions, expired = (np.zeros(shape) for _ in range(4))
        # Entries that were there at the start need no attempt.
        tried = np.zeros(len(flows), bool)
        tried[flows.attempt_of] = True
        self._admit(np.flatnonzero(~tried))
        by_leave = np.argsort(self.leave, kind="stable")
        leave_sorted = self.leave[by_leave]
        ends = self.ends
        leave_at = np.searchsorted(leave_sorted, ends, "right")
        tries_at = np.searchsorted(flows.attempt_at, ends, "right")
        went = tried_up_to = 0
        for k in range(self.steps):
            now, self.limit = ends[k], self.limits[:, k]
            self._remove(by_leave[went : leave_at[k]])
            went = leave_at[k]
            if now >= self.next_pass:
                self._collect(now, evictions[:, k])
            fresh = flows.attempt_of[tried_up_to : tries_at[k]]
            if len(fresh):
                when = flows.attempt_at[tried_up_to : tries_at[k]]
                self._arrive(fresh, when, drops[:, k], evictions[:, k])
            tried_up_to = tries_at[k]
            count[:, k] = self.count
        self._expired(expired, ends)
        pauses = np.diff([0.0, *self.passes]) if self.passes else np.array([self.next_pass])
        return Course(
            ends,
            self.netns,
            count,
            np.minimum(expired, count),
            drops,
            evictions,
            float(pauses.mean()),
            float(pauses.max()),
            self._expiring(),
            self.limits,
        )

    def _admit(self, flow: I64) -> None:
        self.alive[flow] = True
        self.entered[flow] = True
        self.count += np.bincount(self.ns[flow], minlength=self.places)
        loose = flow[~self.flows.assured[flow]]
        self.unassured += np.bincount(self.ns[loose], minlength=self.places)

    def _remove(self, flow: I64) -> None:
        flow = flow[self.alive[flow]]
        if len(flow):
            self.alive[flow] = False
            self.count -= np.bincount(self.ns[flow], minlength=self.places)
            loose = flow[~self.flows.assured[flow]]
            self.unassured -= np.bincount(self.ns[loose], minlength=self.places)

    def _arrive(self, flow: I64, when: F64, drops: F64, evictions: F64) -> None:
        """Attempts of one step: those of flows already in the table need no entry."""
        new = ~self.entered[flow]
        flow, when = flow[new], when[new]
        if (self.count + np.bincount(self.ns[flow], minlength=self.places) <= self.limit).all():
            self._enter(flow, when)
            return
        for place in range(self.places):
            here = self.ns[flow] == place
            mine, at = flow[here], when[here]
            room = int(np.clip(self.limit[place] - self.count[place], 0, len(mine)))
            self._enter(mine[:room], at[:room])
            mine, at = mine[room:], at[room:]
            if not len(mine):
                continue
            chance, each = refusal(self.count[place], self.unassured[place], self.setting.buckets)
            lucky = self.random.random(len(mine)) >= chance
            gone = self._evict(place, round(each * np.count_nonzero(lucky)))
            evictions[place] += gone
            self._enter(mine[lucky], at[lucky])
            refused = int(np.count_nonzero(~lucky))
            drops[place] += refused
            self.pressed |= refused > 0

    def _enter(self, flow: I64, when: F64) -> None:
        if not len(flow):
            return
        flow, first = np.unique(flow, return_index=True)
        self._admit(flow)
        # Let in earlier (or at last) than recorded: everything after shifts with it.
        shift = when[first] - self.flows.arrive[flow]
        late = np.abs(shift) > self.step
        if late.any():
            moved = flow[late]
            self.expire[moved] += shift[late]

    def _evict(self, place: int, n: int) -> int:
        """Delete ``n`` unassured entries of a namespace, at random."""
        if n <= 0:
            return 0
        pool = self.loose[self.trimmed :]
        living = self.alive[pool]
        # Skip for good what has entered and gone at the front.
        front = np.argmax(living | ~self.entered[pool]) if len(pool) else 0
        self.trimmed += int(front)
        mine = pool[living & (self.ns[pool] == place)]
        chosen = self.random.choice(mine, min(n, len(mine)), replace=False)
        self._remove(chosen)
        return len(chosen)

    def _collect(self, now: float, evictions: F64) -> None:
        """One pass of gc_worker."""
        living = np.flatnonzero(self.alive)
        over = self.expire[living] <= now
        if self.collects:
            self._remove(living[over])
        living = living[~over]
        if self.pressed:
            self._press(living, now, evictions)
            self.pressed = False
            living = living[self.alive[living]]
        self.passes.append(now)
        pause = next_interval(self._remaining(living, now))
        self.next_pass = self.given.pop(0) if self.given else now + pause

    def _press(self, living: I64, now: float, evictions: F64) -> None:
        """Above 95 %: unassured and closing TCP entries go until it is below."""
        flows = self.flows
        closing = (flows.proto[living] == TCP) & np.isin(flows.state[living], CLOSING)
        closing &= self.expire[living] - flows.timeout[living] <= now
        usable = living[closing | ~flows.assured[living]]
        for place in range(self.places):
            surplus = self.count[place] - self.limit[place] * 0.95
            mine = usable[self.ns[usable] == place]
            if surplus >= 1 and len(mine):
                chosen = self.random.choice(mine, min(int(surplus), len(mine)), replace=False)
                self._remove(chosen)
                evictions[place] += len(chosen)

    def _remaining(self, living: I64, now: float) -> F64:
        """Remaining timeouts: of the last state once that is reached, before it of a live one."""
        flows = self.flows
        left = self.expire[living] - now
        before = left > flows.timeout[living]
        live = np.where(flows.proto[living] == TCP, GC_SCAN_INTERVAL_CLAMP, flows.timeout[living])
        return np.where(before, live, left)

    def _expired(self, out: npt.NDArray[np.float64], ends: F64) -> None:
        """Entries past their timeout in the table, by step: known after the run."""
        gone = np.minimum(self.leave, self.seconds * 2)
        if self.collects:
            passes = np.array([*self.passes, np.inf])
            gone = np.minimum(
                gone, passes[np.searchsorted(passes, self.expire, "left").clip(max=len(passes) - 1)]
            )
        for place in range(self.places):
            mine = self.entered & (self.ns == place) & (self.expire < gone)
            began = np.searchsorted(np.sort(self.expire[mine]), ends, "right")
            over = np.searchsorted(np.sort(gone[mine]), ends, "right")
            out[place] = began - over

    def _expiring(self) -> F64:
        mine = self.entered & (self.expire <= self.seconds)
        return np.bincount(self.ns[mine], minlength=self.places) / max(self.seconds, 1e-9)
