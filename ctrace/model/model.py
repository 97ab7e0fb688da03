"""The model: batches in, snapshots out, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.batch import Batch, Clock, HookInfo, Logged, Owner, SelfCost
from ctrace.beside import Beside
from ctrace.errors import UsageError
from ctrace.model import causes
from ctrace.model.composition import Looks
from ctrace.model.groups import Context, Group
from ctrace.model.history import Points
from ctrace.model.keys.columns import I64, NETNS_MASK, TIME_SHIFT, WINDOW, Window
from ctrace.model.keys.levels import Levels, needed
from ctrace.model.keys.pairing import EXISTING, UNKNOWN, Births
from ctrace.model.keys.recount import Recounts, between_marks
from ctrace.model.keys.scatter import Rows
from ctrace.model.keys.window import by_netns, sorted_from, window
from ctrace.model.ports import SourcePorts
from ctrace.model.sample import ROWS, Sample
from ctrace.model.scope import Scope
from ctrace.model.snapshot import (
    GROUPS,
    SORTS,
    Counted,
    Culprit,
    Memory,
    Rates,
    Snapshot,
    Table,
    Victim,
)
from ctrace.model.tables import NOTHING, Known, Tables, counted, per_second
from ctrace.model.victims import Victims
from ctrace.model.who.answer import Answer
from ctrace.model.who.ask import Asked, names_of
from ctrace.model.who.names import Names
from ctrace.model.who.pods import Pods
from ctrace.model.who.pods import told as with_pods
from ctrace.model.who.rows import BASE, COARSER, coarser
from ctrace.record import N_REASONS, PART, Kind, Reason

EARLY_NS: Final = 50_000_000
"""ns by which an interval may end early, with a batch."""
PACE_NS: Final = 950_000_000
"""ns, about a second: the time over which the rate of events is measured."""
FLOOD: Final = 200_000
"""Events per second above which one entry in :data:`~ctrace.record.PART` is timed, until the rate
falls below a quarter of it."""
NAMES_LIMIT: Final = 65_536
EVERYTHING: Final = Scope()
VICTIMS_SHOWN: Final = 50
TOP: Final = 10
NEVER: Final = float("inf")
ORDERS: Final[dict[str, Callable[[Culprit], float]]] = {
    "new": lambda c: -c.new_per_s,
    "life": lambda c: NEVER if c.life.p50 is None else c.life.p50,
    "residence": lambda c: -(c.residence.p50 or c.residence.at_least or 0.0),
    "drops": lambda c: -c.drops,
}
"""How rows that exist already are sorted."""
_KEY_BYTES: Final = 22 << 20
"""Bytes, about: what the tables of keys take at scale 1."""


class Model:
    """Who fills the table, who is refused, and why.

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
        self._recounts = Recounts(self._levels)
        self._asked = Asked(self._group)
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
        self._looks: Optional[Looks] = None

    # -- in -------------------------------------------------------------------

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
        at = w.where(Kind.EXISTING)
        if at.size:
            self._sample.dumped(w, at)
        at = w.where(Kind.MET)
        if at.size:
            settings = self._hooks.family != "netlink"  # which never knows the timeout in force
            if settings:
                self._levels.timeouts.learn(w, at)
            births = self._births.peek(w.ct[at], w.meta[at], w.ts[at])
            self._sample.met(w, at, *births, settings)
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
        for netns, at in by_netns(w, w.where(Kind.EXISTING)):
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

    # -- out ------------------------------------------------------------------

    def netns(self, name: str) -> int:
        """The number of a namespace known by name or number; 0, which none has, if unknown."""
        return self._tables.find(name)

    def snapshot(
        self,
        group: str = "pair",
        sort: str = "held",
        limit: int = 50,
        filter_text: str = "",
        scope: Scope = EVERYTHING,
        over_time: bool = False,
    ) -> Snapshot:
        """The answer at this moment, for any group and sort. Raises UsageError.

        A sort with a leading ``-`` turns the order round, over all keys. Of ``scope`` the
        culprits are those of its flows; everything else is that of its namespace. With
        ``over_time`` the group ``who`` is of what was held all the time, not of what is now.
        """
        if group not in GROUPS:
            raise UsageError(f"unknown group {group!r}: use one of {', '.join(GROUPS)}")
        if sort.removeprefix("-") not in SORTS:
            raise UsageError(f"unknown sort {sort!r}: use one of {', '.join(SORTS)}")
        if refusal := scope.refusal(group):
            raise UsageError(refusal)
        chosen, here = self._base(group, scope), scope.of_namespace
        told = self._by_netns()
        every = self._tables.view(told, self._recounts.stale)
        tables = tuple(table for table in every if scope.netns in (None, table.netns))
        if group == "who":
            measure = "table_seconds" if over_time else "held"
            culprits, rest = self._who_rows(measure, sort, limit, scope)
            keys = len(culprits) + rest
        else:
            culprits, keys = chosen.culprits(sort, limit, self._ticks - 1), chosen.distinct
        totals, rates = self._sums(scope.netns, tables, told, bool(filter_text))
        return Snapshot(
            ts=self._clock.utc(self._until),
            host=self._host,
            interval_s=self._interval,
            uptime_s=(self._until - self._started) / 1e9,
            hooks=self._hooks,
            group=group,
            sort=sort,
            lost=self._lost,
            unseen=int(self._events[Kind.EXISTING, Reason.NEW]),
            tables=tables,
            totals=totals,
            rates=rates,
            culprits=with_pods(culprits, self._pods.known),
            culprits_total=keys,
            held_total=chosen.total_held,
            table_seconds_total=chosen.total_seconds,
            top={name: self._top(name, here) for name in ("src", "dst", "service", "pair")},
            victims=self._refused_ones(scope.netns),
            who=self._answer("held", here).holders,
            who_refused=self._answer("drops", here).holders,
            why=causes.explain(self._facts(tables, totals, rates, here)),
            history=(
                self._points if scope.netns is None else self._tables.points(scope.netns)
            ).view(),
            memory=self._memory(),
            cost=self._cost,
            filter=filter_text,
            logged=self._logged,
        )

    def held_by(self, name: str, limit: int) -> list[tuple[str, str, int]]:
        """(key, its namespace's name, entries) of those that hold most: cheaper than rows."""
        if name == "who":
            rows, _ = self._who_rows("held", "held", limit, EVERYTHING)
            return [(row.key, row.netns_name, row.held) for row in rows]
        group, where = self._group(name), self._tables.name
        found = {int(at): int(group.key[at, 2]) >> 32 for at in group.order("held", limit)}
        return [(group.label(at), where(netns) if netns else "", int(group.held[at]))
                for at, netns in found.items()]  # fmt: skip

    def counts(self) -> dict[str, int]:
        """Entries by namespace name, as its table reports."""
        return self._tables.counts(self._group("netns").by_netns())

    def _sums(
        self,
        netns: Optional[int],
        tables: tuple[Table, ...],
        told: dict[int, Known],
        some_flows: bool,
    ) -> tuple[Counted, Rates]:
        """Totals and rates of everything, or of one namespace; under a scope, only of its flows."""
        counted_here = self._tables.counted() and not some_flows
        if netns is None:
            if counted_here:
                return self._tables.totals(), self._rates
            return self._seen(), self._event_rates
        if counted_here and tables:
            return tables[0].totals, tables[0].rates
        _, totals, rates, *_ = told.get(netns, NOTHING)
        return totals, rates

    def _base(self, name: str, scope: Scope) -> Group:
        """The grouping that totals are computed from; ``who`` has none of its own."""
        return self._group(("service" if scope.dst else "pair") if name == "who" else name, scope)

    def _who_rows(
        self, measure: str, sort: str, limit: int, scope: Scope
    ) -> tuple[tuple[Culprit, ...], int]:
        """The few keys that explain most, most telling first unless sorted otherwise."""
        rows, rest = self._asked.rows(
            measure, scope, self._until, self._who_names(scope), self._ticks - 1
        )
        turned, by = sort.startswith("-"), sort.removeprefix("-")
        if by != "held":
            rows.sort(key=ORDERS[by])
        rows = rows[::-1] if turned else rows
        return tuple(rows[:limit]), rest + max(0, len(rows) - limit)

    def _group(self, name: str, scope: Scope = EVERYTHING) -> Group:
        if name in COARSER and (name, scope) not in self._groups:
            self._groups[name, scope] = coarser(
                name, self._group(BASE[name], scope), self._pods.known
            )
        if (name, scope) not in self._groups:
            gone = {netns: at >> TIME_SHIFT for netns, at in self._tables.gone().items()}
            uptime = (self._until - self._started) / 1e9
            if self._looks is None:
                self._looks = self._sample.latest(self._births, self._until)
            context = Context(
                self._owners, self._cgroups, self._listeners, self._tables.name, self._clock,
                self._until, uptime, self._looks, gone, self._recounts.missed,
                self._recounts.stale,
            )  # fmt: skip
            now = self._until >> TIME_SHIFT
            self._groups[name, scope] = Group(name, self._levels, context, now, scope)
        return self._groups[name, scope]

    def _top(self, name: str, scope: Scope) -> tuple[tuple[str, float], ...]:
        group = self._group(name, scope)
        return tuple(
            (group.label(int(at)), float(group.rate[at]))
            for at in group.order("new", TOP)
            if group.rate[at] > 0
        )

    def _by_netns(self) -> dict[int, Known]:
        group = self._group("netns")
        found: dict[int, Known] = {}
        for at in range(group.n):
            s = {name: int(column[at]) for name, column in group.sums.items()}
            found[int(group.key[at, 2]) >> 32] = (
                int(group.held[at]),
                Counted(
                    insert=s["inserts"], destroy=s["destroys"], drop=s["drops"],
                    insert_failed=s["failed"], early_drop=s["evicted"], expired=s["expired"],
                    deleted=s["deleted"],
                ),
                Rates(insert=float(group.rate[at]), drop=float(group.drop_rate[at])),
                group.composition(at),
                partial(group.staying, at),
            )  # fmt: skip
        return found

    def _refused_ones(self, netns: Optional[int]) -> tuple[Victim, ...]:
        rows = self._victims.view(
            VICTIMS_SHOWN, self._owners, self._tables.name, self._refused, netns
        )
        return with_pods(rows, self._pods.known)

    def _refused(self, key: bytes) -> tuple[Optional[float], Optional[float]]:
        """Share of a victim's new flows that was refused: of all, and of those to the service."""
        high, low, _, _, meta = np.frombuffer(key, np.uint64)
        return (
            self._group("src").refused(high, low, meta & NETNS_MASK),
            self._group("pair").refused(high, low, meta),
        )

    def _facts(self, tables: tuple[Table, ...], totals: Counted, rates: Rates, scope: Scope
               ) -> causes.Facts:  # fmt: skip
        return causes.Facts(
            tables=tables,
            totals=totals,
            rates=rates,
            uptime=(self._until - self._started) / 1e9,
            service=self._group("service", scope),
            pair=self._group("pair", scope),
            src=self._group("src", scope),
            dst=self._group("dst", scope),
            space=self._group("netns", scope),
            several=self._asked.several(
                scope, self._until, self._who_names(scope), self._ticks - 1
            ),
            failed_dns=self._victims.failed(53, scope.netns),
            failed=self._victims.failed(None, scope.netns),
            portless=self._ports.view(scope.netns),
            ticks=self._ticks - 1,
            gone=self._tables.gone(),
            changes=self._hooks.changes,
            logged=self._logged,
            beside=self._beside,
        )

    def _answer(self, measure: str, scope: Scope) -> Answer:
        """Who holds, or was refused, most: computed once per interval."""
        return self._asked.answer(measure, scope, self._until, self._who_names(scope))

    def _who_names(self, scope: Scope) -> Names:
        here = scope.of_namespace
        return names_of(
            self._tables.names(scope.netns),
            self._pods.known,
            self._group("pair", here),
            self._group("service", here),
        )

    def _memory(self) -> Memory:
        levels = self._levels
        return Memory(
            used=levels.nbytes()
            + self._births.nbytes()
            + self._victims.nbytes()
            + self._sample.nbytes(),
            limit=self._limit,
            tracked_keys=sum(level.table.used for level in levels.all()),
            pruned=sum(level.table.given_up() for level in levels.all()) + self._victims.pruned,
        )
