"""Each namespace's table: fill, rates, forecast, and our counts against the kernel's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.batch import INVALID, Clock, Counts, Netns, TableReading
from ctrace.model.forecast import Reading, Staying, forecast
from ctrace.model.history import Points
from ctrace.model.sample import Dumped, PinnedSample
from ctrace.model.snapshot import Composition, Counted, Rates, Reconciliation, Table
from ctrace.record import N_REASONS, REASONS_OF, Kind, Reason

READINGS: Final = 60
"""Readings that a forecast uses, at most."""
FULL_NS: Final = 5_000_000_000
"""ns after the last refusal or eviction for which a table still counts as full."""
UNFOUND_NS: Final = 5_000_000_000
"""ns after the last event of a namespace that no look ever found: those that live for less than a
second are known by the hooks' counters only."""
SHRUNK: Final = 1.25
"""Factor: a table that held more than this times what it holds now held something else."""
_WRAP: Final = 1 << 32
CHART: Final = 240
"""Intervals in the chart of one namespace: as many as a wide screen shows."""

_EVICTED: Final = [int(Reason.EVICTED), int(Reason.GC_PRESSURE)]


Known = tuple[int, Counted, Rates, Composition, Callable[[], Optional[Staying]]]
"""What events and looks show of a namespace: entries held, totals, rates, composition, and, on
request, how long they stay."""
NOTHING: Final[Known] = (0, Counted(), Rates(), Composition(), lambda: None)


def counted(counts: npt.NDArray[np.generic]) -> Counted:
    """Counters indexed by Reason, summed up as views show them."""

    def total(reasons: list[int]) -> int:
        return int(sum(int(counts[reason]) for reason in reasons))

    return Counted(
        insert=total(REASONS_OF[Kind.INSERT]),
        destroy=total(REASONS_OF[Kind.DESTROY]),
        drop=total(REASONS_OF[Kind.DROP]),
        insert_failed=total(REASONS_OF[Kind.INSERT_FAILED]),
        early_drop=total(_EVICTED),
        expired=int(counts[Reason.EXPIRED]),
        deleted=int(counts[Reason.DELETED]),
        clash_resolved=int(counts[Reason.CLASH_RESOLVED]),
    )


def _looked_at(events: Known, count: int) -> Optional[tuple[float, float]]:
    """The share of ASSURED entries and its standard error, by looks; None where they do not tell,
    or stand for flows of a filter only.

    Unlike what walks met, looks know what has changed since: an entry counts as it was last seen,
    and how young it was then.
    """
    made_of, apart = events[3], abs(count - events[0])
    if made_of.assured is None or made_of.assured_error is None or apart > 0.1 * count:
        return None
    return made_of.assured, min(1.0, made_of.assured_error / 2 + apart / max(count, 1))


def add(one: Counted, other: Counted) -> Counted:
    """The sum of two."""
    return Counted(*(a + b for a, b in zip(_values(one), _values(other))))


def per_second(now: Counted, before: Counted, seconds: float) -> Rates:
    """What was added between two readings, per second."""
    if seconds <= 0:
        return Rates()
    return Rates(
        *(
            (getattr(now, name) - getattr(before, name)) / seconds
            for name in ("insert", "destroy", "drop", "insert_failed", "early_drop")
        )
    )


def _values(c: Counted) -> tuple[int, ...]:
    return (c.insert, c.destroy, c.drop, c.insert_failed, c.early_drop, c.expired, c.deleted,
            c.clash_resolved)  # fmt: skip


@dataclass
class Rising:
    """A counter that may wrap at 32 bits or restart, as a sum of its steps.

    A step down of more than half the range is a wrap of a 32-bit kernel counter; any other step
    down means that it restarted.
    """

    total: int = 0
    last: Optional[int] = None

    def see(self, value: int) -> None:
        """Take a new reading of the counter."""
        if self.last is not None:
            step = value - self.last
            if step < 0:
                step = step + _WRAP if -step > _WRAP // 2 else value
            self.total += step
        self.last = value


@dataclass
class _State:
    reading: Optional[TableReading] = None
    readings: deque[Reading] = field(default_factory=lambda: deque(maxlen=READINGS))
    counts: Counts = field(default_factory=lambda: np.zeros(N_REASONS, np.uint64))
    base: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(N_REASONS, np.int64))
    at_first: Optional[npt.NDArray[np.int64]] = None
    at_last: Optional[npt.NDArray[np.int64]] = None
    first_count: int = 0
    stats: dict[str, Rising] = field(default_factory=dict)
    tick: Counted = field(default_factory=Counted)
    rates: Rates = field(default_factory=Rates)
    full_since: Optional[int] = None
    full_last: int = 0
    dumped: Dumped = field(default_factory=Dumped)
    met: PinnedSample = field(default_factory=PinnedSample)
    points: Points = field(default_factory=lambda: Points(CHART))
    gone_at: int = 0
    """Boot clock, ns, at which its namespace was seen to be gone; 0: it exists."""
    counted_at: int = 0
    """Boot clock, ns, at which its counters last rose."""

    def count(self) -> int:
        """Entries now: the last reading, plus what came and minus what went since, by the
        counters."""
        if self.reading is None or self.at_last is None:
            return 0
        since = counted(self.totals() - self.at_last)
        return max(0, self.reading.count + since.insert - since.destroy)

    def totals(self) -> npt.NDArray[np.int64]:
        return self.base + self.counts.astype(np.int64)

    def shrunk(self) -> float:
        """Seconds, boot clock: since when it has held about as many as now, or fewer."""
        most = SHRUNK * self.readings[-1].count if self.readings else 0
        since = 0.0
        for one in reversed(self.readings):
            if one.count > most:
                return since
            since = one.at
        return 0.0


class Tables:
    """Every namespace seen."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._states: dict[int, _State] = {}
        self._names: dict[int, Netns] = {}

    def __len__(self) -> int:
        return len(self._states)

    def name(self, netns: int) -> str:
        """A namespace's name, ``netns:<inum>`` while unknown."""
        known, state = self._names.get(netns), self._states.get(netns)
        name = known.name if known else f"netns:{netns}"
        return f"{name} (gone)" if state and state.gone_at else name

    def known(self) -> set[int]:
        """Every namespace seen that still exists."""
        return {netns for netns, one in self._states.items() if not one.gone_at}

    def names(self, netns: Optional[int] = None) -> dict[int, str]:
        """The names of all namespaces that are there, or of one."""
        return {
            one: self.name(one)
            for one, state in self._states.items()
            if not state.gone_at and netns in (None, one)
        }

    def gone(self) -> dict[int, int]:
        """Namespaces that have gone, and when that was seen (boot clock, ns)."""
        return {netns: one.gone_at for netns, one in self._states.items() if one.gone_at}

    def find(self, text: str) -> int:
        """The number of the namespace with that name or number; 0, which none has, if unknown."""
        names = {n: known.name for n, known in self._names.items()}
        named = (n for n in sorted(self._states) if text in (self.name(n), names.get(n), str(n)))
        return next(named, 0)

    def shrunk(self) -> dict[int, int]:
        """Namespaces whose tables shrank much within the last minute, and when (boot clock, ns).

        Looks from before that are no sample of what is left.
        """
        found = {netns: round(one.shrunk() * 1e9) for netns, one in self._states.items()}
        return {netns: at for netns, at in found.items() if at}

    def points(self, netns: int) -> Points:
        """The last intervals of one namespace."""
        state = self._states.get(netns)
        return state.points if state else Points()

    def dumped(self, netns: int) -> Dumped:
        """What remains of a namespace's first dump."""
        return self._state(netns).dumped

    def _state(self, netns: int) -> _State:
        return self._states.setdefault(netns, _State())

    def update(
        self,
        until: int,
        counts: Mapping[int, Counts],
        readings: tuple[TableReading, ...],
        names: Mapping[int, Netns],
    ) -> None:
        """Take a batch's counters, readings and names."""
        self._names.update(names)
        for netns in names:
            if names[netns].active:
                self._state(netns)
        for netns, new in counts.items():
            state = self._state(netns)
            if (new < state.counts).any():  # attached anew: it counts from zero again
                state.base += state.counts.astype(np.int64)
            if (new != state.counts).any():
                state.counts, state.counted_at = np.array(new, np.uint64), until
        for reading in readings:
            self._read(until, reading)

    def _read(self, until: int, reading: TableReading) -> None:
        state = self._state(reading.netns)
        state.gone_at = (reading.at or until) if reading.gone else 0
        if reading.gone:
            state.reading, state.full_since, state.points = None, None, Points(CHART)
            state.readings.clear()
            return
        before, state.reading = state.reading, reading
        inserted = counted(state.totals()).insert
        state.readings.append(Reading((reading.at or until) / 1e9, reading.count, inserted))
        if reading.met:
            shrunk = before is not None and before.count > SHRUNK * reading.count
            state.met.see(reading.met, reading.met_assured, shrunk)
        for name, value in reading.stats.items():
            state.stats.setdefault(name, Rising()).see(value)
        if state.at_first is None:
            state.at_first, state.first_count = state.totals(), reading.count
        state.at_last = state.totals()

    def tick(self, until: int, seconds: float) -> None:
        """Close an interval."""
        for state in self._states.values():
            now = counted(state.totals())
            if state.at_first is None and state.counted_at:
                idle = until - state.counted_at > UNFOUND_NS and 0 < now.insert <= now.destroy
                state.gone_at = state.counted_at if idle else 0
            state.rates = per_second(now, state.tick, seconds)
            refused = now.drop > state.tick.drop or now.early_drop > state.tick.early_drop
            state.tick = now
            if refused:
                state.full_last = until
                if state.full_since is None:
                    state.full_since = until - round(seconds * 1e9)
            elif until - state.full_last > FULL_NS:
                state.full_since = None
            if state.reading is not None:
                utc = self._clock.utc(until) / 1e9
                state.points.add(utc, state.reading.count, state.rates)

    def totals(self) -> Counted:
        """Summed over namespaces, from the kernel's exact counters."""
        total = Counted()
        for state in self._states.values():
            total = add(total, counted(state.totals()))
        return total

    def entries(self) -> Optional[int]:
        """Entries as the kernel counts them, over all namespaces; None before a reading."""
        known = [state.reading.count for state in self._states.values() if state.reading]
        return sum(known) if known else None

    def unread(self) -> set[int]:
        """Namespaces whose entries from before ctrace have not all come yet."""
        return {n for n, state in self._states.items() if state.reading and state.reading.unread}

    def counted(self) -> bool:
        """Whether any namespace has exact counters."""
        return any(state.totals().any() for state in self._states.values())

    def view(self, events: Mapping[int, Known], stale: Collection[int] = ()) -> tuple[Table, ...]:
        """All tables, fullest first; ``stale`` are those that are not read to the end.

        ``events`` per namespace: its first three stand in for sources without counters or readings.
        """
        hashed = self.entries() or 0  # all namespaces' entries are in one hash table
        views = [replace(self._view(netns, state, events.get(netns, NOTHING)), hashed=hashed,
                         stale=netns in stale)
                 for netns, state in self._states.items() if not state.gone_at]  # fmt: skip
        return tuple(sorted(views, key=lambda t: (-t.fill, -t.count, t.netns)))

    def counts(self, told: Mapping[int, int]) -> dict[str, int]:
        """Entries by namespace name; ``told``: the events' count for one that was not read."""
        found: dict[str, int] = {}
        for netns, state in self._states.items():
            if not state.gone_at:
                count = state.count() if state.reading else told.get(netns, 0)
                found[self.name(netns)] = found.get(self.name(netns), 0) + count
        return found

    def _view(self, netns: int, state: _State, events: Known) -> Table:
        reading, known = state.reading, self._names.get(netns)
        totals, rates = counted(state.totals()), state.rates
        if not state.totals().any():
            totals, rates = events[1], events[2]
            if len(state.readings) > 1:
                before, last = state.readings[-2], state.readings[-1]
                more = (last.count - before.count) / max(last.at - before.at, 1e-9)
                rates = replace(rates, destroy=max(0.0, rates.insert - more))
        count = state.count() if reading else events[0]
        limit = reading.max if reading else 0
        ahead = forecast(list(state.readings), limit, events[4])
        full, sampled = state.full_since, state.met.share()
        if sampled:
            sampled = _looked_at(events, count) or sampled
        chains = state.stats.get("chaintoolong", Rising()).total
        return Table(
            netns=netns,
            name=self.name(netns),
            count=count,
            max=limit,
            buckets=reading.buckets if reading else 0,
            active=known.active if known else True,
            read=reading is not None,
            pinned=sampled[0] if sampled else state.dumped.share(count),
            pinned_error=sampled[1] if sampled else None,
            totals=totals,
            rates=rates,
            seconds_to_full=ahead.full,
            seconds_to_full_error=ahead.full_error,
            levels_off=ahead.level,
            levels_off_error=ahead.level_error,
            full_since=None if full is None else self._clock.utc(full) / 1e9,
            composition=events[3],
            off_by=self._off_by(state),
            chain_too_long=max(chains, int(state.totals()[Reason.CHAIN_TOO_LONG])),
            invalid=sum(state.stats.get(name, Rising()).total for name in INVALID),
            max_known=reading is not None and reading.max_known,
        )

    @staticmethod
    def _off_by(state: _State) -> Reconciliation:
        if state.at_first is None or state.at_last is None or state.reading is None:
            return Reconciliation()
        step = state.at_last - state.at_first
        if not state.at_last.any():
            return Reconciliation()  # no counters of ours to compare

        def ours(*reasons: Reason) -> int:
            return int(sum(int(step[reason]) for reason in reasons))

        def off(name: str, mine: int) -> int:
            rising = state.stats.get(name)
            return mine - rising.total if rising else 0

        change = counted(step)
        return Reconciliation(
            count=change.insert - change.destroy - (state.reading.count - state.first_count),
            # An unresolved clash counts in the kernel's drop and insert_failed both.
            drop=off("drop", ours(Reason.TABLE_FULL, Reason.NO_MEMORY, Reason.CLASH)),
            early_drop=off("early_drop", ours(Reason.EVICTED)),
            insert_failed=off(
                "insert_failed", ours(Reason.CLASH, Reason.CHAIN_TOO_LONG, Reason.FAILED)
            ),
        )
