"""Drops before tracking that somebody asks for: what they would have dropped of what was seen.

None is ever chosen by ctrace: it can't tell wanted connections from others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Optional

from ctrace.advice.advise import made_plan
from ctrace.advice.facts import Facts
from ctrace.advice.result import Advice, Asked
from ctrace.dropping import LEAST_BURST, Drop
from ctrace.errors import CtraceError, UsageError
from ctrace.model.causes.words import percent
from ctrace.model.snapshot import Culprit, Snapshot, Table
from ctrace.plan.plan import Plan

OWN: Final = ("out", "loopback")
"""Directions of connections that this host opens."""


@dataclass(frozen=True)
class Views:
    """What was seen, grouped in three ways."""

    services: Snapshot
    pairs: Snapshot
    sources: Snapshot


def include(
    advice: Advice,
    drops: Sequence[Drop],
    views: Views,
    facts: Mapping[int, Facts],
    netns: Optional[int] = None,
) -> Advice:
    """The advice with these drops in its plans. Raises CtraceError where one can't be planned."""
    asked: list[Asked] = []
    plans = {plan.netns: plan for plan in advice.plans}
    for drop in drops:
        table = _where(drop, views, netns)
        about = facts.get(table.netns, Facts())
        _refuse(drop, table, about)
        plans[table.netns] = _with(plans.get(table.netns), drop, views.services, table, about)
        asked.append(_judged(drop, views, table, about))
    return replace(advice, asked=tuple(asked), plans=tuple(plans.values()))


def _where(drop: Drop, views: Views, netns: Optional[int]) -> Table:
    """The namespace that was named, or the only one that saw it. Raises CtraceError."""
    tables = [table for table in views.services.tables if netns in (None, table.netns)]
    if len(tables) > 1:
        met = {one.netns for one in _met(drop, views)}
        tables = [table for table in tables if table.netns in met]
    if not tables:
        raise CtraceError(f"no traffic of {drop} was seen: name the namespace with --netns")
    if len(tables) > 1:
        names = ", ".join(table.name or str(table.netns) for table in tables)
        raise CtraceError(f"several namespaces saw {drop}: choose one with --netns ({names})")
    return tables[0]


def _met(drop: Drop, views: Views) -> Iterator[Culprit]:
    """The rows that it concerns, in any namespace."""
    if drop.sources:
        yield from (one for one in views.sources.culprits if drop.comes_from(one.src))
        return
    for one in views.services.culprits:
        if (one.proto, one.port) == (drop.proto, drop.port):
            yield one


def _refuse(drop: Drop, table: Table, about: Facts) -> None:
    name = table.name or str(table.netns)
    if about.ruleset is None:
        raise CtraceError(f"{drop} can't be planned: the rules of {name} are not known")
    if not about.has_nft:
        raise CtraceError(f"{drop} can't be planned: it needs nft, which this host does not have")
    for address in about.addresses:
        if drop.comes_from(address):
            raise UsageError(f"{address} is an address of {name} itself: stop what sends from it")


def _with(plan: Optional[Plan], drop: Drop, services: Snapshot, table: Table, about: Facts) -> Plan:
    """A plan with one more drop, and with what ctrace has applied there already."""
    made = plan or made_plan(services, table, (), about)
    for old in made.levers:
        if isinstance(old, Drop) and (old.proto, old.port) == (drop.proto, drop.port):
            sources = tuple(dict.fromkeys((*old.sources, *drop.sources)))
            drop = replace(drop, sources=sources)
            made = replace(made, levers=tuple(one for one in made.levers if one is not old))
    return replace(made, levers=(drop, *made.levers))


def _judged(drop: Drop, views: Views, table: Table, about: Facts) -> Asked:
    watched = views.services.uptime_s
    rows = [one for one in _met(drop, views) if one.netns == table.netns]
    pairs = [
        one
        for one in views.pairs.culprits
        if one.netns == table.netns and (one.proto, one.port) == (drop.proto, drop.port)
    ]
    held = f"it holds {sum(one.held for one in rows):,} of {table.count:,} entries now"
    if not views.services.hooks.changes:
        text = f"{held}; one dump does not tell how many come a second"
        return Asked(table.netns, drop, None, None, text)
    spared = () if drop.sources else OWN if drop.rate else ("out",)
    mine = [one for one in rows if one.direction not in spared]
    own = sum(one.inserts for one in pairs if one.direction in spared)
    seen = max(0, sum(one.inserts for one in mine) - own) if mine else 0
    dropped = _above(drop, seen, pairs, about, watched) if drop.rate else seen
    what = "new connections" if drop.proto == "tcp" else "new flows"
    if not seen:
        text = f"none of the {what} seen in {watched:.0f} s is of that kind"
    elif drop.rate and not dropped:
        text = f"none of {seen:,} {what} seen in {watched:.0f} s would have been dropped for sure"
    else:
        least = "at least " if drop.rate else ""
        text = (
            f"of {seen:,} {what} seen in {watched:.0f} s it would have dropped "
            f"{least}{dropped:,} ({percent(dropped / seen)})"
        )
    return Asked(table.netns, drop, seen, dropped, f"{text}; {held}")


def _above(drop: Drop, seen: int, pairs: Sequence[Culprit], about: Facts, watched: float) -> int:
    """How many new entries were certainly above the rate: any bursts were more."""
    let = round(drop.rate * watched) + max(drop.rate, LEAST_BURST)
    by_source: Counter[str] = Counter()
    for one in pairs:
        if one.direction not in OWN and one.src not in about.addresses:
            by_source[one.src] += one.inserts
    if drop.each:
        return min(seen, sum(max(0, n - let) for n in by_source.values()))
    mixed = any(one.direction in OWN for one in pairs)
    return max(0, (min(seen, sum(by_source.values())) if mixed else seen) - let)
