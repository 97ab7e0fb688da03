"""What the model takes from batches: counts by key, births, samples, tables; in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.batch import DUMP, Batch, Clock, HookInfo, Logged, Owner, SelfCost
from ctrace.beside import Beside
from ctrace.errors import UsageError
from ctrace.model.composition import Looks
from ctrace.model.groups import Group
from ctrace.model.groups.passes import Passes
from ctrace.model.history import Points
from ctrace.model.keys.columns import I64, WINDOW, Window
from ctrace.model.keys.levels import Levels, needed
from ctrace.model.keys.pairing import EXISTING, UNKNOWN, Births
from ctrace.model.keys.recount import Recounts, between_marks
from ctrace.model.keys.scatter import Rows
from ctrace.model.keys.window import by_netns, sorted_from, window
from ctrace.model.ports import SourcePorts
from ctrace.model.sample import ROWS, Sample
from ctrace.model.scope import Scope
from ctrace.model.snapshot import Counted, Rates
from ctrace.model.tables import Tables, counted, per_second
from ctrace.model.victims import Victims
from ctrace.model.who.pods import Pods
from ctrace.record import N_REASONS, OF_THEN, PART, Kind

EARLY_NS: Final = 50_000_000
"""ns by which an interval may end early, with a batch."""
PACE_NS: Final = 950_000_000
"""ns, about a second: the time over which the rate of events is measured."""
FLOOD: Final = 200_000
"""Events per second above which one entry in :data:`~ctrace.record.PART` is timed, until the rate
falls below a quarter of it."""
NAMES_LIMIT: Final = 65_536
SAME_MS: Final = 1000
"""ms by which the start of one process may differ, as captured and as /proc tells it."""
_KEY_BYTES: Final = 22 << 20
"""Bytes, about: what the tables of keys take at scale 1."""


class Intake:
    """Batches in: what has come, by key and by time.

    ``memory`` is a fixed limit in bytes for everything that grows with traffic; half of
    it holds birth times of entries, half the tables of keys. Rates are over ``interval``
    seconds (at least one), whatever the pace of batches. Raises UsageError when the limit
    is below 4 MiB.
    """

    def __init__(
        self,
        hooks: HookInfo,
        clock: Clock,
        started: int,
        *,
        host: str = "",
        memory: int = 32 << 20,
        interval: float = 1.0,
        logged: Optional[Logged] = None,
    ) -> None:
        if memory < 4 << 20:
            raise UsageError(f"a memory limit of {memory} bytes is too small: give at least 4 MiB")
        self._hooks, self._clock, self._started, self._host = hooks, clock, started, host
        self._limit, self._logged = memory, logged
        self._every = round(max(interval, 1.0) * 1e9) - EARLY_NS
        slots = 1 << 10
        while slots * 2 * 10 <= memory * 0.4:
            slots *= 2
        self._births = Births(slots)
        scale = (memory - self._births.nbytes()) / _KEY_BYTES
        self._sample = Sample(min(max(512, memory >> 12), ROWS))
        self._victims = Victims(max(256, min(4096, memory // 8192)))
        taken = self._births.nbytes() + self._victims.most_bytes() + self._sample.nbytes()
        while needed(scale) > memory - taken:
            scale *= 0.95
        self._levels = Levels(scale)
        self._ports = SourcePorts()
        self._passes = Passes()
        self._recounts = Recounts(self._levels)
        self._tables = Tables(clock)
        self._pods = Pods()
        self._points = Points()
        self._until = started
        self._tick_at = self._paced_at = started
        self._ticks, self._lost, self._interval = 0, 0, 0.0
        self._cost = SelfCost()
        self._events = np.zeros((16, N_REASONS), np.int64)
        """Events seen, by kind and reason."""
        self._events_paced = 0
        self._totals_at_tick = self._events_at_tick = Counted()
        self._rates = self._event_rates = Rates()
        self._owners: dict[int, Owner] = {}
        self._cgroups: dict[int, str] = {}
        self._listeners: dict[tuple[int, int, int], Owner] = {}
        self._beside: dict[int, Beside] = {}
        self._groups: dict[tuple[str, Scope], Group] = {}
        """Worked out of what has come, until more comes; the looks likewise."""
        self._looks: Optional[Looks] = None

    def update(self, batch: Batch) -> None:
        """Take a batch."""
        self._groups.clear()
        self._looks = None
        self._name(batch)
        self._recounts.lost(batch, self._tables.known())
        events, latest = batch.events, 0
        for at in range(0, len(events), WINDOW):
            w = window(events[at : at + WINDOW])
            if int(w.ts[0]) < latest or not w.ordered:
                events = sorted_from(events, at)
                w = window(events[at : at + WINDOW])
            latest = int(w.ts[-1])
            for part in between_marks(w):
                if isinstance(part, Window):
                    self._window(part)
                else:
                    self._recounts.mark(part)
        self._lost += batch.lost
        if batch.cost != SelfCost():
            self._cost = batch.cost
        self._until = max(self._until, batch.until)
        self._tables.update(self._until, batch.counts, batch.tables, batch.names.netns)
        self._pods.update(batch.names.netns)
        if self._until - self._paced_at >= PACE_NS:
            self._pace()
        if self._until - self._tick_at >= self._every:
            self._tick()

    @property
    def _stale(self) -> set[int]:
        """Namespaces whose keys may hold more than is known."""
        return self._recounts.stale | self._tables.unread()

    def _name(self, batch: Batch) -> None:
        for known, new in (
            (self._owners, batch.names.owners),
            (self._cgroups, batch.names.cgroups),
            (self._listeners, batch.names.listeners),
            (self._beside, {one.netns: one for one in batch.beside}),
        ):
            known.update(new)  # type: ignore[arg-type]
            while len(known) > NAMES_LIMIT:
                known.pop(next(iter(known)))  # type: ignore[call-overload]
        if batch.names.owners or batch.names.listeners:
            self._one_process(self._owners if batch.names.listeners else batch.names.owners)

    def _one_process(self, opened: Mapping[int, Owner]) -> None:
        """A process that listens and opens connections is one: its start is read in ticks for the
        one, and in milliseconds for the other."""
        keys = {key >> 32: key for key in opened}
        for place, one in self._listeners.items():
            key = keys.get(one.pid, one.key)
            if key != one.key and abs(key - one.key) <= SAME_MS:
                self._listeners[place] = replace(one, key=key)

    def _window(self, w: Window) -> None:
        owned, extra, moved = self._levels.owners(w)
        if moved is not None:
            self._births.remap(moved.astype(np.uint16))
            self._sample.remap(moved.astype(np.uint16))
        ends, age = self._pair(w, extra)
        part = PART if self._births.thin else 1
        self._levels.feed(w, ends, age, extra, owned, part)
        self._look(w)
        self._victims.feed(w)
        self._ports.feed(w)
        self._passes.see(w)
        self._events += w.counts.T
        self._note_dumped(w, ends.take(np.flatnonzero(age == UNKNOWN)), extra, part)

    def _pair(self, w: Window, extra: npt.NDArray[np.uint16]) -> tuple[Rows, I64]:
        """The ends that were looked up and their ages; ``extra`` becomes that of their birth."""
        at = w.entries()
        if at is None:
            ends, age, found = self._births.step(w.ct, w.meta, w.ts, w.ended, extra)
            if found is not extra:
                extra[:] = found
            return ends, age
        ends, age, extra[at] = self._births.step(
            w.ct[at], w.meta[at], w.ts[at], w.ended[at], extra[at]
        )
        ends = at[ends]
        nameless = np.flatnonzero(w.ended & (w.ct == 0))
        if nameless.size:
            ends = np.concatenate((ends, nameless))
            age = np.concatenate((age, np.full(nameless.size, UNKNOWN)))
            order = np.argsort(ends)
            ends, age = ends[order], age[order]
        return ends, age

    def _look(self, w: Window) -> None:
        """What looks at living entries showed: lives that are over before their entries are."""
        at = _as_of_now(w)
        if at.size:
            self._sample.dumped(w, at)
        at = w.where(Kind.MET)
        if at.size:
            # netlink and dumps never know the timeout in force
            known = self._hooks.family not in ("netlink", DUMP)
            timeouts = self._levels.timeouts if known else None
            if timeouts is not None:
                timeouts.learn(w, at)
            births = self._births.peek(w.ct[at], w.meta[at], w.ts[at])
            self._sample.met(w, at, births, timeouts)
        at = w.where(Kind.SAMPLED)
        if not at.size:
            return
        age, extra = self._births.peek(w.ct[at], w.meta[at], w.ts[at])
        self._levels.look(w, at, age, extra)

    def _note_dumped(
        self, w: Window, unpaired: Rows, extra: npt.NDArray[np.uint16], part: int
    ) -> None:
        """Entries of the first dump, as they come and as they end.

        ``unpaired`` has all of those known by their identity, and one in ``part`` of the others.
        """
        for netns, at in by_netns(w, _as_of_now(w)):
            self._tables.dumped(netns).came(len(at), int(w.assured(at).sum()))
        for netns, at in by_netns(w, unpaired):
            weight = np.where(extra.take(at) & EXISTING, 1, part)
            self._tables.dumped(netns).went(int(weight.sum()), int(weight[w.assured(at)].sum()))

    def _pace(self) -> None:
        """In a flood, time fewer entries."""
        events = int(self._events.sum())
        rate = (events - self._events_paced) / (self._until - self._paced_at) * 1e9
        self._births.thin_out(rate > (FLOOD / 4 if self._births.thin else FLOOD), self._until)
        self._events_paced, self._paced_at = events, self._until

    def _tick(self) -> None:
        seconds = (self._until - self._tick_at) / 1e9
        self._levels.tick(self._ticks, seconds)
        self._victims.tick(seconds)
        self._tables.tick(self._until, seconds)
        totals, seen = self._tables.totals(), self._seen()
        self._rates = per_second(totals, self._totals_at_tick, seconds)
        self._event_rates = per_second(seen, self._events_at_tick, seconds)
        self._totals_at_tick, self._events_at_tick = totals, seen
        self._interval, self._tick_at = seconds, self._until
        self._ticks += 1
        rates = self._rates if self._tables.counted() else self._event_rates
        entries = self._tables.entries()
        if entries is None:
            entries = seen.insert - seen.destroy + int(self._events[Kind.EXISTING].sum())
        self._points.add(self._clock.utc(self._until) / 1e9, entries, rates)

    def _seen(self) -> Counted:
        return counted(self._events[1:5].sum(axis=0))


def _as_of_now(w: Window) -> Rows:
    """Entries of a dump whose state and status were read with them."""
    at = w.where(Kind.EXISTING)
    found: Rows = at[w.events["status"][at] & np.uint32(OF_THEN) == 0]
    return found
