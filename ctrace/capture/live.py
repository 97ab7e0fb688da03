"""The live source: one attached hook family, joined with what the host says of itself."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, Optional, Protocol

import numpy as np

from ctrace.batch import (
    Batch,
    Clock,
    Counts,
    HookInfo,
    Names,
    Netns,
    Owner,
    SelfCost,
    TableReading,
)
from ctrace.capture.assured import LOOK_MET, Survey
from ctrace.capture.dumps import Dumps
from ctrace.capture.family import Capture
from ctrace.capture.lives import Lives
from ctrace.capture.poller import LOOK, Poller
from ctrace.capture.recount import Recount
from ctrace.capture.seed import seed as seed_rows
from ctrace.capture.young import Sampler
from ctrace.errors import CtraceError, UsageError
from ctrace.filters import Filter
from ctrace.host import ctnetlink, netns, process
from ctrace.host.netns import Namespace
from ctrace.host.tables import TableReader
from ctrace.kernel.rings import one_piece
from ctrace.record import Events, Kind, by_time, empty, join

ADDRESSES: Final = 30.0
"""Seconds between two looks at a namespace's addresses."""
NEAR: Final = 0.05
"""Seconds by which a look may come early, when a batch is due then."""
OWNERS_KNOWN: Final = 65536
LATE: Final = 0.1
"""Seconds until an entry that a dump has is surely told of, also by a sender that a busy
host interrupted between the entry and its event."""

DUMPS: Final = 5
"""Paths by which a namespace's entries are sought."""

NO_FILTER: Final = Filter()


class _Opener(Protocol):
    def __call__(self, wanted: Filter, ring_bytes: int) -> Capture: ...


def _fentry(wanted: Filter, ring_bytes: int) -> Capture:
    from ctrace.capture import fentry

    fentry.probe()  # nothing need be compiled to learn that it does not hold
    return fentry.FentryCapture(wanted, ring_bytes=ring_bytes)


def _kprobe(wanted: Filter, ring_bytes: int) -> Capture:
    from ctrace.capture import kprobe

    if not kprobe.PMU.exists():
        raise CtraceError("this kernel has no kprobes (CONFIG_KPROBE_EVENTS)")
    kprobe.probe()
    return kprobe.KprobeCapture(wanted, ring_bytes=ring_bytes)


def _netfilter(wanted: Filter, ring_bytes: int) -> Capture:
    from ctrace.capture.netfilter import NetfilterCapture

    return NetfilterCapture(wanted, ring_bytes=ring_bytes)


def _netlink(wanted: Filter, ring_bytes: int) -> Capture:  # noqa: ARG001
    from ctrace.capture.netlink import NetlinkCapture

    return NetlinkCapture()


FAMILIES: Final[dict[str, _Opener]] = {
    "fentry": _fentry,
    "kprobe": _kprobe,
    "netfilter": _netfilter,
    "netlink": _netlink,
}
"""The ladder, from the top."""


def open_capture(wanted: Filter, hooks: Optional[str], ring_bytes: int) -> tuple[Capture, str]:
    """The first family of the ladder that holds, or the one asked for.

    With what stood against the families above it, as one sentence; empty when none is
    better or this one was asked for. Raises UsageError for an unknown name, CtraceError
    when nothing holds.
    """
    if hooks is not None and hooks not in FAMILIES:
        raise UsageError(f"unknown hook family {hooks!r}: one of {', '.join(FAMILIES)}")
    against: dict[str, list[str]] = {}
    for name in [hooks] if hooks else FAMILIES:
        try:
            return FAMILIES[name](wanted, ring_bytes), _against(against)
        except (CtraceError, ImportError) as error:
            if hooks:
                raise CtraceError(f"--hooks {name} does not work here: {error}") from error
            against.setdefault(str(error), []).append(name)
    if os.geteuid() != 0:
        raise CtraceError("tracing needs root: run it with sudo")
    raise CtraceError(f"no hook family works here: {_against(against)}")


def _against(reasons: dict[str, list[str]]) -> str:
    """The reason nearest to the family in use first: it is the one to mend."""
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in reversed(reasons.items()))


def open_live(
    wanted: Filter = NO_FILTER,
    *,
    hooks: Optional[str] = None,
    ring_bytes: Optional[int] = None,
    seed: bool = True,
    sample: bool = False,
) -> LiveSource:
    """Attach to the running kernel.

    ``hooks`` forces a family; ``seed`` starts with the entries that are already there;
    ``sample`` adds SAMPLED records of a few young entries each second.
    Raises CtraceError (UsageError for an unknown family).
    """
    capture, note = open_capture(wanted, hooks, ring_bytes or _ring_bytes())
    try:
        return LiveSource(capture, wanted, seed=seed, sample=sample, note=note)
    except BaseException:
        capture.close()
        raise


class LiveSource:
    """Implements :class:`ctrace.batch.Source` over a :class:`Capture`."""

    def __init__(
        self,
        capture: Capture,
        wanted: Filter = NO_FILTER,
        *,
        seed: bool = True,
        sample: bool = False,
        note: str = "",
    ) -> None:
        self._capture = capture
        self._note = note
        looks = sample and not wanted.kinds and capture.looks
        sampler = Sampler(capture) if looks else None
        self._wanted = wanted
        # with only some kinds the window between attaching and the dump tells too little
        self._seed = seed and not wanted.kinds
        self._hold = capture.hold
        self._tables = TableReader()
        self._samples = bool(looks)
        self._survey = Survey(wanted.netns or 0) if capture.looks else None
        self._dumps = Dumps() if sample and not wanted.kinds and not self._survey else None
        same_ids = capture.info.family == "netlink"
        self._recount = Recount(wanted, same_ids=same_ids) if sample and self._seed else None
        self._names = _NameBook(capture)
        self._namespaces: dict[int, Namespace] = {}
        self._lives = Lives()
        self._ended: list[int] = []
        """Lives that have ended, not told yet."""
        self.unseen = 0
        """Entries that were in tables of namespaces when these were found, after the start:
        nobody saw them made."""
        self._cost = _CostMeter(capture)
        self.clock = Clock(time.time_ns() - _boot())
        self._follow()
        self._unseeded = list(self._namespaces.values()) if self._seed else []
        self.started = _boot()
        self._poller = Poller(capture, self._newcomers, sampler, self._survey)

    @property
    def hooks(self) -> HookInfo:
        """The family in use; its blind spots may grow as namespaces appear."""
        return replace(self._capture.info, note=self._note)

    def batches(self, interval: float) -> Iterator[Batch]:
        """A batch every ``interval`` seconds; the first brings the entries already there.

        In a flood, and each second for the readings of tables, they come earlier:
        ``Batch.more`` says of each but the last that it is a part of what the interval brings.
        """
        due = time.monotonic() + interval
        look_due = min(due, time.monotonic() + LOOK)
        window, lost = self._window() if self._unseeded else ([], 0)
        while not self._poller.wait_for_many(min(due, look_due) - time.monotonic()):
            now = time.monotonic()
            more, look = now < due, now >= look_due - NEAR
            taken = self._poller.take()
            events = in_order([*window, *taken.parts])
            if look:
                look_due = max(look_due + LOOK, now)
            with self._poller.lock:
                if self._poller.stopped:
                    return  # closed meanwhile
                spaces = list(self._namespaces.values())
                # one right after the other: what happens between them looks like a difference
                tables = self._tables.read(spaces) if look else ()
                raw = self._counts()
                counts = self._lives.counts(raw)
                names = self._lives.names(self._names.learn(events, spaces, look))
                if tables and self._survey:
                    tables = self._survey.take(tables)
                    self._look(self._survey.found())
                if tables and self._dumps:
                    events = join([events, self._dumps.take(spaces, taken.until)])
                tables = self._lives.tables(tables)
                if look:
                    tables += self._last_readings()
                events = self._matching(events)
                if self._recount:
                    self._recount.note(lost + taken.lost, raw, self._namespaces.keys())
                    events = self._recount.take(events, taken.until, spaces, look)
                events = self._lives.events(events)
            yield Batch(
                events=events,
                until=max(taken.until, int(events["ts"][-1]) if len(events) else 0),
                lost=lost + taken.lost,
                counts=counts,
                tables=tables,
                names=names,
                cost=SelfCost() if more else self._cost.read(),
                more=more,
            )
            window, lost = [], 0
            if not more:
                due = max(due + interval, time.monotonic())

    def existing(self) -> Events:
        """Every entry that matches, by a dump of all tables; seconds where they are large.

        From any thread, while batches go on being taken.
        """
        return self._lives.dumped(self._matching(_dump(list(self._namespaces.values()))))

    def seeded(self, existing: Events, events: Events, at: int) -> Events:
        """Which of a dump's entries were there at ``at`` (boot clock, ns) already.

        ``events`` is everything captured since, up to after the dump. ctnetlink's DESTROY
        carries the identity of its own dump.
        """
        return seed_rows(existing, events, at, same_ids=self.hooks.family == "netlink")

    def close(self) -> None:
        """Detach; safe to call twice, and while another thread waits for a batch."""
        self._poller.stop()
        with self._poller.lock:
            self._capture.close()
            self._tables.close()
            if self._recount:
                self._recount.close()
            if self._survey:
                self._survey.close()

    # -- inside ------------------------------------------------------------------------------

    def _look(self, entries: Sequence[int]) -> None:
        """Have MET records made of what a walk over the table met: they come with a later poll."""
        if not self._samples:
            return
        try:
            self._capture.look([entry | LOOK_MET for entry in entries])
        except CtraceError:
            self._samples = False  # refused here: nothing else is lost

    def _follow(self) -> list[Namespace]:
        """Look which of the namespaces asked for exist; those that are new."""
        only = self._wanted.netns
        found = {space.inum: space for space in netns.find() if only is None or space.inum == only}
        fresh = [space for inum, space in found.items() if inum not in self._namespaces]
        gone = self._namespaces.keys() - found.keys()
        self._ended += self._lives.left(gone, _boot())
        self._lives.came(fresh, self._capture.counts() if self._namespaces else {})
        self._namespaces = found
        self._capture.follow(list(found.values()))
        return fresh

    def _last_readings(self) -> tuple[TableReading, ...]:
        """A last reading of each life that has ended.

        One whose table went is looked for anew: its number may be another's by now.
        """
        died = self._tables.died & self._namespaces.keys()
        self._tables.died.clear()
        self._ended += self._lives.left(died, _boot())
        for inum in died:
            del self._namespaces[inum]
        ended, self._ended = self._ended, []
        return tuple(TableReading(one, 0, 0, 0, at=_boot(), gone=True) for one in ended)

    def _counts(self) -> Mapping[int, Counts]:
        """Exact counters of the namespaces asked for; hooks count the others', too."""
        only, counts = self._wanted.netns, self._capture.counts()
        return counts if only is None else {at: c for at, c in counts.items() if at == only}

    def _matching(self, events: Events) -> Events:
        """Only netlink leaves filtering to us; an existing entry always needs it."""
        if self._wanted.is_empty:
            return events
        return events[self._wanted.mask(events)]

    def _window(self) -> tuple[list[Events], int]:
        """The entries older than the hooks, then everything since, up to after the dump.

        What came while the hooks were still being attached, one after another, is left
        out: the dump, taken later, has its outcome.
        """
        spaces, self._unseeded = self._unseeded, []
        existing = _dump(spaces)
        self._poller.wait(max(LATE, self._hold))
        taken = self._poller.take()
        window = in_order(taken.parts)
        window = window[window["ts"] >= self.started]
        return [self.seeded(existing, window, self.started), window], taken.lost

    def _newcomers(self) -> tuple[list[Events], int]:
        """Follow the namespaces; what was in the tables of new ones before we came.

        With what had to be polled to know that, and how many records were lost in it.
        """
        at = _boot()
        fresh = self._follow()
        global_hooks = self.hooks.family in ("fentry", "kprobe")
        if not fresh or global_hooks:
            return [], 0
        if not self._seed:
            with TableReader() as reader:
                self.unseen += sum(table.count for table in reader.read(fresh))
            return [], 0
        existing = _dump(fresh)
        if not len(existing):
            return [], 0
        parts, lost, until = [], 0, time.monotonic() + max(LATE, self._hold)
        while time.monotonic() < until:
            time.sleep(self._hold)
            events, missed = self._capture.poll()
            parts.append(events)
            lost += missed
        events = join(parts)
        inside = np.isin(events["netns"], [space.inum for space in fresh])
        rows = self.seeded(existing, events[inside & (events["ts"] >= at)], at)
        self.unseen += len(rows)
        return [rows, events], lost


def in_order(parts: Sequence[Events]) -> Events:
    """The parts as one array by time; existing entries first among equals."""
    whole = one_piece(parts)
    if whole is None:
        return by_time(join(parts))
    # each is in order; after one that held back for too long an earlier record may follow
    met = all(one["ts"][-1] <= other["ts"][0] for one, other in zip(parts, parts[1:]))
    return whole if met else by_time(whole)


class _NameBook:
    """Which names the batches have told already, and the new ones."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._listeners = process.Listeners()
        self._owners: OrderedDict[int, None] = OrderedDict()
        self._netns: dict[int, Netns] = {}
        self._addresses_at: dict[int, float] = {}

    def learn(self, events: Events, spaces: Sequence[Namespace], look: bool) -> Names:
        """Names not told before; namespaces and listeners only when ``look``."""
        owners = self._new_owners(events)
        if not look:
            return Names(owners=owners, cgroups=_units(owners))
        return Names(
            netns=self._new_netns(spaces),
            owners=owners,
            cgroups=_units(owners),
            listeners=self._listeners.look(spaces),
        )

    def _new_owners(self, events: Events) -> dict[int, Owner]:
        kinds = events["kind"]
        packets = (kinds != int(Kind.DESTROY)) & (kinds != int(Kind.EXISTING))
        keys = np.unique(events["owner"][packets])
        fresh = [key for key in keys.tolist() if key and key not in self._owners]
        found = {}
        captured = self._capture.owner_comms(fresh)
        paths = self._capture.cgroup_names({cgroup for _, cgroup in captured.values()})
        for key, (comm, cgroup) in captured.items():
            found[key] = process.owner(key, comm, cgroup, paths.get(cgroup, ""))
            self._owners[key] = None
        while len(self._owners) > OWNERS_KNOWN:
            self._owners.popitem(last=False)
        return found

    def _new_netns(self, spaces: Sequence[Namespace]) -> dict[int, Netns]:
        now = time.monotonic()
        fresh = {}
        for space in spaces:
            if now - self._addresses_at.get(space.inum, -ADDRESSES) < ADDRESSES:
                continue
            self._addresses_at[space.inum] = now
            try:
                addresses = netns.local_addresses(space.path)
            except (OSError, CtraceError):
                addresses = ()
            told, name = self._netns.get(space.inum), space.name
            if told and name == f"netns:{space.inum}":
                name = told.name  # it lost its mount, not its name
            known = Netns(space.inum, name, addresses)
            if told != known:
                fresh[space.inum] = self._netns[space.inum] = known
        gone = self._addresses_at.keys() - {space.inum for space in spaces}
        for inum in gone:
            del self._addresses_at[inum]
            self._netns.pop(inum, None)
        return fresh


class _CostMeter:
    """What this process, and its programs in the kernel, used since the last reading."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture if _measures_programs() else None
        self._at, self._cpu = time.monotonic(), _cpu_seconds()
        self._kernel = self._capture.run_time() if self._capture else 0

    def read(self) -> SelfCost:
        """Since the previous call."""
        at, cpu = time.monotonic(), _cpu_seconds()
        kernel = self._capture.run_time() if self._capture else 0
        seconds = max(at - self._at, 1e-6)
        cost = SelfCost(
            cpu=(cpu - self._cpu) / seconds,
            rss=_rss(),
            kernel=(kernel - self._kernel) / 1e9 / seconds,
        )
        self._at, self._cpu, self._kernel = at, cpu, kernel
        return cost


def _dump(spaces: Sequence[Namespace]) -> Events:
    return join([_existing(space) for space in spaces])


def _existing(space: Namespace) -> Events:
    """The entries of one namespace; none where it has gone, or conntrack is not loaded.

    A path through a process leads elsewhere once that ends or enters another namespace,
    if only for a moment: then through another process.
    """
    found: Optional[Namespace] = space
    for _ in range(DUMPS):
        if found is None:
            break
        with contextlib.suppress(CtraceError, OSError):
            table = ctnetlink.read_table(found.path)
            if table.netns == space.inum:
                return table.events
        found = next((one for one in netns.find() if one.inum == space.inum), None)
    return empty()


def _units(owners: dict[int, Owner]) -> dict[int, str]:
    return {owner.cgroup: owner.unit for owner in owners.values() if owner.cgroup and owner.unit}


def _ring_bytes() -> int:
    """Few CPUs share a burst, so each needs more room: 32 MiB over all, 1 to 8 MiB each."""
    return max(1 << 20, min(1 << 23, (1 << 25) // (os.cpu_count() or 1)))


def _boot() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _rss() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _measures_programs() -> bool:
    """kernel.bpf_stats_enabled: we leave it as it is, for it costs every program time."""
    try:
        with open("/proc/sys/kernel/bpf_stats_enabled", encoding="ascii") as file:
            return file.read().strip() != "0"
    except OSError:
        return False
