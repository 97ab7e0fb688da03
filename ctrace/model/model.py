"""The model: batches in, snapshots out, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Final, Optional

import numpy as np

from ctrace.errors import UsageError
from ctrace.model import causes
from ctrace.model.groups import Context, Group
from ctrace.model.intake import Intake
from ctrace.model.keys.columns import NETNS_MASK, TIME_SHIFT
from ctrace.model.scope import Scope
from ctrace.model.snapshot import (
    GROUPS,
    OVER_TIME,
    SORTS,
    Counted,
    Culprit,
    Memory,
    Rates,
    Snapshot,
    Table,
    Victim,
)
from ctrace.model.tables import NOTHING, Known
from ctrace.model.who.answer import Answer
from ctrace.model.who.ask import Asked, names_of
from ctrace.model.who.names import Names
from ctrace.model.who.pods import told as with_pods
from ctrace.model.who.rows import BASE, COARSER, coarser
from ctrace.record import Kind, Reason

EVERYTHING: Final = Scope()
VICTIMS_SHOWN: Final = 50
TOP: Final = 10
NEVER: Final = float("inf")
ORDERS: Final[dict[str, Callable[[Culprit], float]]] = {
    "new": lambda c: -c.new_per_s,
    "life": lambda c: NEVER if c.life.p50 is None else c.life.p50,
    "residence": lambda c: -(c.residence.p50 or c.residence.at_least or 0.0),
    "drops": lambda c: -c.drops,
    OVER_TIME: lambda c: -c.table_seconds,
}
"""How rows that exist already are sorted."""


class Model(Intake):
    """Who fills the table, who is refused, and why: snapshots of what was taken in."""

    @cached_property
    def _asked(self) -> Asked:
        return Asked(self._group)

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
    ) -> Snapshot:
        """The answer at this moment, for any group and sort. Raises UsageError.

        A sort with a leading ``-`` turns the order round, over all keys. Of ``scope`` the
        culprits are those of its flows; everything else is that of its namespace. Sorted by
        ``table_seconds``, the group ``who`` is of what was held all the time, not of what is now.
        """
        _check(group, sort, scope)
        chosen, here = self._base(group, scope), scope.of_namespace
        told = self._by_netns()
        every = self._tables.view(told, self._stale)
        tables = tuple(table for table in every if scope.netns in (None, table.netns))
        if group == "who":
            measure = OVER_TIME if sort == OVER_TIME else "held"
            culprits, rest = self._who_rows(measure, sort, limit, scope)
            keys = len(culprits) + rest
        else:
            culprits, keys = chosen.culprits(sort, limit), chosen.distinct
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
        rows, rest = self._asked.rows(measure, scope, self._until, self._who_names(scope))
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
            uptime, since = (self._until - self._started) / 1e9, self._tables.shrunk()
            if self._looks is None:
                self._looks = self._sample.latest(self._births, self._until, since)
            context = Context(
                self._owners, self._cgroups, self._listeners, self._tables.name, self._clock,
                self._until, uptime, self._looks, gone, self._recounts.missed, self._stale,
                self._passes, self._ticks - 1, self._tick_at, self._interval,
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
                Rates(insert=float(group.rate[at]), drop=float(group.drop_rate[at]),
                      destroy=self._event_rates.destroy if group.n == 1 else 0.0),
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
            several=self._asked.several(scope, self._until, self._who_names(scope)),
            failed_dns=self._victims.failed(53, scope.netns),
            failed=self._victims.failed(None, scope.netns),
            portless=self._ports.view(scope.netns),
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


def _check(group: str, sort: str, scope: Scope) -> None:
    """Raises UsageError where there is no such answer."""
    if group not in GROUPS:
        raise UsageError(f"unknown group {group!r}: use one of {', '.join(GROUPS)}")
    if sort.removeprefix("-") not in (*SORTS, OVER_TIME):
        raise UsageError(f"unknown sort {sort!r}: use one of {', '.join(SORTS)}")
    if refusal := scope.refusal(group):
        raise UsageError(refusal)
