"""The live source: one attached hook family, combined with what is read from the host."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, Optional, Protocol

from ctrace.batch import Batch, Clock, Counts, HookInfo, SelfCost, TableReading
from ctrace.capture.cost_meter import CostMeter
from ctrace.capture.family import Capture
from ctrace.capture.lives import Lives
from ctrace.capture.namebook import NameBook
from ctrace.capture.poller import LOOK, Poller, Taken, in_order
from ctrace.capture.table.assured import LOOK_MET, Survey
from ctrace.capture.table.dumps import Dumps
from ctrace.capture.table.first_dump import Older, must_wait
from ctrace.capture.table.instant import Instant
from ctrace.capture.table.recount import Recount
from ctrace.capture.table.seed import Seeding
from ctrace.capture.table.young import Sampler
from ctrace.errors import CtraceError, UsageError
from ctrace.filters import Filter
from ctrace.host import kernel, memory, netns
from ctrace.host.kernel import Module
from ctrace.host.netns import Namespace
from ctrace.host.tables import TableReader, held_now
from ctrace.kernel import bpf
from ctrace.record import Events, Reason, boot_ns, by_time, join

NEAR: Final = 0.05
"""Seconds by which a look may come early when a batch is due at that time."""
NO_FILTER: Final = Filter()


def _all(rows: Events) -> Events:
    return rows


class _Opener(Protocol):
    def __call__(self, wanted: Filter, ring_bytes: int) -> Capture: ...


def _fentry(wanted: Filter, ring_bytes: int) -> Capture:
    from ctrace.capture.hooks import fentry

    fentry.probe()  # nothing need be compiled to find that it does not work
    return fentry.FentryCapture(wanted, ring_bytes=ring_bytes)


def _kprobe(wanted: Filter, ring_bytes: int) -> Capture:
    from ctrace.capture.hooks import kprobe

    if not kprobe.PMU.exists():
        raise CtraceError("this kernel has no kprobes (CONFIG_KPROBE_EVENTS)")
    kprobe.probe()
    return kprobe.KprobeCapture(wanted, ring_bytes=ring_bytes)


def _netfilter(wanted: Filter, ring_bytes: int) -> Capture:
    from ctrace.capture.hooks.netfilter import NetfilterCapture

    return NetfilterCapture(wanted, ring_bytes=ring_bytes)


def _netlink(wanted: Filter, ring_bytes: int) -> Capture:  # noqa: ARG001
    from ctrace.capture.netlink.listener import NetlinkCapture

    return NetlinkCapture()


FAMILIES: Final[dict[str, _Opener]] = {
    "fentry": _fentry,
    "kprobe": _kprobe,
    "netfilter": _netfilter,
    "netlink": _netlink,
}
"""The ladder, best family first."""


def open_capture(wanted: Filter, hooks: Optional[str], ring_bytes: int) -> tuple[Capture, str]:
    """The first family of the ladder that works, or the one asked for.

    Also returns what ruled out the families above it, as one sentence; empty when none is better or
    this one was asked for. Raises UsageError for an unknown name, CtraceError when nothing works.
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
    """The reason closest to the family in use comes first: it is the one to fix."""
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
    memory.give_back()
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
        self._unseen = kernel.unseen("CAP_NET_RAW")
        looks = sample and not wanted.kinds and capture.looks
        sampler = Sampler(capture) if looks else None
        self._wanted = wanted
        # with only some kinds the window between attaching and the dump tells too little
        self._seed = seed and not wanted.kinds
        self._hold = capture.hold
        self._tables = TableReader()
        self._samples = bool(looks)
        self._survey = Survey(wanted.netns or 0) if capture.looks else None
        self._dumps = None if wanted.kinds or not sample else Dumps(left=not self._survey)
        same_ids = capture.info.family == "netlink"
        self._recount = Recount(wanted, same_ids=same_ids) if sample and self._seed else None
        self._names = NameBook(capture)
        self._namespaces: dict[int, Namespace] = {}
        self._lives = Lives()
        self._module = Module("nf_conntrack")
        self._ended: list[int] = []
        """Lives that have ended and are not reported yet."""
        self.unseen = 0
        """Entries that were already in the tables of namespaces found after the start: nobody saw
        them inserted."""
        self._cost = CostMeter(capture)
        self.clock = Clock(time.time_ns() - boot_ns())
        self._follow()
        self.started = boot_ns()
        self._told_until = self.started
        """Boot clock, ns: later events have not been reported yet."""
        self._seedings: list[Older] = []
        """For namespaces with older entries still to be yielded."""
        self._entries = 0
        """In all tables, when they were last read."""
        self._first = self._older(list(self._namespaces.values()))
        if self._seed:
            self._seedings.append(self._first)
        self._poller = Poller(capture, self._newcomers, sampler, self._survey)
        self._instant = Instant(self._tables.read, self._counts, self._poller.catch_up)

    @property
    def hooks(self) -> HookInfo:
        """The family in use; its blind spots may grow as namespaces appear."""
        info = self._capture.info
        return replace(info, note=self._note, blind=(*info.blind, *self._unseen))

    def batches(self, interval: float) -> Iterator[Batch]:
        """A batch every ``interval`` seconds; the first ones bring the entries already there.

        In a flood, and once a second for the readings of tables, batches come earlier:
        ``Batch.more`` marks every batch of an interval but the last.
        """
        due = time.monotonic() + interval
        look_due = min(due, time.monotonic() + LOOK)
        while not self._poller.wait_for_many(self._next(min(due, look_due)) - time.monotonic()):
            if self._read_older():
                continue  # and it was the last part: it waits for its events
            now = time.monotonic()
            more, look = now < due, now >= look_due - NEAR
            taken = self._poller.take()
            if look:
                look_due = max(look_due + LOOK, now)
            with self._poller.lock:
                if self._poller.stopped:
                    return  # closed meanwhile
                events = self._with_older(in_order(taken.parts), now)
                rest = taken.more and now < due + LOOK  # a reader too slow for all of it gets on
                more = more or must_wait(self._seedings, self._entries) or rest
                batch = self._batch(events, taken, look=look, more=more)
            self._told_until = batch.until
            yield batch
            if not more:
                due = max(due + interval, time.monotonic())

    def older(self, keep: Callable[[Events], Events] = _all) -> Older:
        """The matching entries that are older than the next batch, for a reader that starts there.

        ``keep`` may leave some of them out.
        """
        with self._poller.lock:
            spaces = list(self._namespaces.values())
            ids = {space.inum: self._lives.id_of(space.inum) for space in spaces}
        return self._older(spaces, ids, lambda rows: keep(self._lives.dumped(self._matching(rows))))

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

    def _next(self, due: float) -> float:
        """When (monotonic) to wake: the next due time, or sooner for older entries."""
        with self._poller.lock:
            if any(older.reading for older in self._seedings):
                return 0.0
            return max([due, *(older.due for older in self._seedings)])

    def _read_older(self) -> bool:
        """Read more of the tables; whether the end was reached."""
        with self._poller.lock:
            reading = [older for older in self._seedings if older.reading]
        for older in reading:
            older.read()
        return bool(reading) and not any(older.reading for older in reading)

    def _look(self, entries: Sequence[int]) -> None:
        """Ask for MET records of the entries that the table walk met; they come with a later
        poll."""
        if not self._samples:
            return
        try:
            self._capture.look([entry | LOOK_MET for entry in entries])
        except CtraceError:
            self._samples = False  # refused here: only this is lost

    def _follow(self) -> list[Namespace]:
        """Follow the namespaces asked for that exist; returns the new ones.

        Raises CtraceError once nf_conntrack was unloaded: its hooks went with it.
        """
        if self._module.changed():
            raise CtraceError("nf_conntrack was unloaded, and its hooks with it: restart ctrace")
        only = self._wanted.netns
        self._every = netns.find()
        found = {one.inum: one for one in self._every if only is None or one.inum == only}
        fresh = [space for inum, space in found.items() if inum not in self._namespaces]
        gone = self._namespaces.keys() - found.keys()
        self._ended += self._lives.left(gone, boot_ns())
        self._lives.came(fresh, self._capture.counts() if self._namespaces else {})
        self._names.came(fresh)
        self._namespaces = found
        self._capture.follow(list(found.values()))
        return fresh

    def _last_readings(self) -> tuple[TableReading, ...]:
        """A final reading of each life that has ended; its number may be in use again."""
        died = self._tables.died & self._namespaces.keys()
        self._tables.died.clear()
        self._ended += self._lives.left(died, boot_ns())
        for inum in died:
            del self._namespaces[inum]
        ended, self._ended = self._ended, []
        return tuple(TableReading(one, 0, 0, 0, at=boot_ns(), gone=True) for one in ended)

    def _counts(self) -> Mapping[int, Counts]:
        """Exact counters of the namespaces asked for; the hooks count the others too."""
        only, counts = self._wanted.netns, self._capture.counts()
        return counts if only is None else {at: c for at, c in counts.items() if at == only}

    def _matching(self, events: Events) -> Events:
        """Only netlink leaves filtering to us; existing entries always need it."""
        if self._wanted.is_empty:
            return events
        return events[self._wanted.mask(events)]

    def _newcomers(self) -> bool:
        """Follow the namespaces; whether any are new and had tables before we came."""
        fresh = self._follow()
        global_hooks = self.hooks.family in ("fentry", "kprobe")
        if not fresh or global_hooks:
            return False
        if not self._seed:
            self.unseen += sum(held_now(fresh).values())
            return False
        self._seedings.append(self._older(fresh))
        return True

    def _older(
        self,
        spaces: Sequence[Namespace],
        ids: Optional[Mapping[int, int]] = None,
        named: Callable[[Events], Events] = _all,
    ) -> Older:
        ids = ids or {space.inum: space.inum for space in spaces}
        held = held_now(spaces)
        self._entries = max(self._entries, sum(held.values()))
        # ctnetlink's DESTROY carries the identity of its own dump
        seeding = Seeding(ids.values(), same_ids=self.hooks.family == "netlink")
        return Older(spaces, seeding, ids, held=held, late=self._hold, named=named)

    def _with_older(self, events: Events, taken: float) -> Events:
        """What came until ``taken`` (monotonic), plus those older entries that are certain by now.

        Events from while the hooks were still being attached, one after another, are left out: the
        dump, taken later, already has their outcome.
        """
        if self._seed and len(events) and int(events["ts"][0]) < self.started:
            events = events[events["ts"] >= self.started]
        for older in self._seedings:
            rows = older.with_events(events, taken, self._told_until)
            if older is not self._first:
                self.unseen += len(rows)
                rows["reason"] = Reason.NEW
            if len(rows):
                events = by_time(join([rows, events]))
        self._seedings = [older for older in self._seedings if not older.done]
        return events

    def _batch(self, events: Events, taken: Taken, *, look: bool, more: bool) -> Batch:
        """A batch, with the current readings of the kernel and the host."""
        spaces = list(self._namespaces.values())
        tables, raw = self._instant.take(spaces) if look else ((), self._counts())
        counts = self._lives.counts(raw)
        names = self._lives.names(self._names.learn(events, spaces, self._every, look))
        if tables and self._survey:
            tables = self._survey.take(tables)
            self._look(self._survey.found())
        if tables and self._dumps and (self._survey is None or self._survey.lost):
            met = self._dumps.take(spaces, tables, taken.until)
            events = by_time(join([events, met])) if len(met) else events
        if tables:
            self._entries = sum(table.count for table in tables)
            missing = {inum for older in self._seedings for inum in older.missing}
            tables = tuple(replace(t, unread=t.netns in missing) for t in tables)
        tables = self._lives.tables(tables)
        if look:
            tables += self._last_readings()
        events = self._matching(events)
        if self._recount:
            self._recount.note(taken.lost, raw, self._namespaces.keys())
            events = self._recount.take(events, taken.until, spaces, look)
        events = self._lives.events(events)
        return Batch(
            events=events,
            until=max(taken.until, int(events["ts"][-1]) if len(events) else 0),
            lost=taken.lost,
            counts=counts,
            tables=tables,
            names=names,
            cost=SelfCost() if more else self._cost.read(),
            more=more,
        )


def _ring_bytes() -> int:
    """Bytes of each CPU's ring: with few CPUs each takes more of a burst, so needs more room.

    8 MiB in total, 512 KiB to 4 MiB each; with more than 64 CPUs, 32 MiB in total.
    """
    cpus = len(bpf.online_cpus())
    return max(1 << 16, min(1 << 22, max((1 << 23) // cpus, min(1 << 19, (1 << 25) // cpus))))
