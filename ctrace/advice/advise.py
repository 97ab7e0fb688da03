"""From what was seen to what to do: the fewest levers that bring each table below a target."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Optional, Union

from ctrace.advice import alternatives as other
from ctrace.advice import persist
from ctrace.advice.candidates import backend, candidate, held_to_the_table
from ctrace.advice.facts import Facts
from ctrace.advice.findings import WHEN_THEY_GO
from ctrace.advice.hazards import Judge
from ctrace.advice.in_place import OURS, InPlace, in_place
from ctrace.advice.result import Advice, Candidate, Choice, TableAdvice
from ctrace.advice.roles import Seen
from ctrace.advice.texts import copied
from ctrace.batch import DUMP
from ctrace.model.causes.beside import with_stale
from ctrace.model.causes.words import when, where
from ctrace.model.remedies import POINTLESS
from ctrace.model.snapshot import Culprit, Remedy, Snapshot, Table
from ctrace.plan.plan import CtTimeout, Lever, Notrack, Plan, clean_text
from ctrace.whatif.growth import Range
from ctrace.whatif.predict import Outlook

TARGET: Final = 0.6
MOST: Final = 20
"""Services that are judged, at most, by entries held."""


def advise(
    services: Snapshot,
    pairs: Optional[Snapshot] = None,
    facts: Optional[Mapping[int, Facts]] = None,
    *,
    target: float = TARGET,
    every: bool = True,
) -> Advice:
    """Advice from a snapshot grouped by service (and one by pair, for sources).

    ``facts`` are by namespace; a namespace without any is judged on its entries
    alone, and nothing in it is called safe. ``every`` lists candidates also for
    tables below the target.
    """
    known = facts or {}
    found = _Found(notes=_notes(services))
    for table in services.tables:
        if table.max or not (table.max_known or services.hooks.family != DUMP):
            _add(found, table, known.get(table.netns, Facts()), services, pairs, target, every)
    found.candidates.sort(key=lambda c: -c.frees)
    return Advice(
        services.host,
        services.ts // 10**9 or int(time.time()),
        target,
        tuple(found.tables),
        tuple(found.candidates),
        tuple(found.others),
        tuple(found.notes),
        _persist(known, found.candidates),
        tuple(found.there),
        tuple(found.plans),
    )


@dataclass
class _Found:
    """The advice so far, table by table."""

    notes: list[str]
    tables: list[TableAdvice] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    others: list[Remedy] = field(default_factory=list)
    there: list[tuple[int, InPlace]] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)


def _add(
    found: _Found,
    table: Table,
    about: Facts,
    services: Snapshot,
    pairs: Optional[Snapshot],
    target: float,
    every: bool,
) -> None:
    """The advice for one table."""
    about, texts = copied(about)
    judge = Judge(about.ruleset, about.snapshot, backend(about), texts)
    done = list(in_place(about.ruleset, judge.room)) if about.ruleset else []
    found.there += [(table.netns, one) for one in done]
    if about.condition:
        name = table.name or str(table.netns)
        found.notes.append(f"{name}: what ctrace applied there: {about.condition}")
    seen = _seen(services, pairs, table)
    full = table.fill > target or table.totals.drop > 0
    if not seen or not (full or every):
        return
    outlook = Outlook(
        table,
        [item.culprit for item in seen],
        about.timeouts,
        services.uptime_s if services.hooks.changes else None,
    )
    with_port = [item for item in seen if item.culprit.port]
    judged = [candidate(table, item, seen, about, judge, done, outlook) for item in with_port]
    judged = held_to_the_table(judged, seen, table, services)
    policies = _policies(judged, with_port, about, done, outlook)
    choice = _choose(table, judged, policies, target, outlook) if full else Choice()
    judged = [replace(c, chosen=c.lever in choice.levers) for c in judged]
    found.candidates += judged
    least = POINTLESS * table.max if other.in_need(table, target, outlook) else float("inf")
    made = [(policy, freed) for policy, freed, _ in policies]
    found.others += other.policies(table, made, choice.levers, least, outlook, about)
    causes = with_stale(services.why, table, about.left)
    found.others += other.alternatives(table, about, target, outlook, causes)
    found.tables.append(_told(table, choice, services, target))
    found.notes += [
        f"{c.proto}/{c.port}: {reason}"
        for c in judged
        if c.chosen
        for reason in c.reasons
        if reason.startswith(WHEN_THEY_GO)
    ]
    if choice.levers and about.ruleset is not None:
        found.plans.append(made_plan(services, table, choice.levers, about))
        if any(one.by == OURS for one in done):
            name = clean_text(table.name or str(table.netns))
            found.notes.append(_once_undone(name, about))


def _told(table: Table, choice: Choice, services: Snapshot, target: float) -> TableAdvice:
    """The table and what is chosen for it. What has no limit, or was not seen, is None."""
    return TableAdvice(
        table.netns,
        table.name,
        table.count,
        table.max or None,
        round(table.fill, 4) if table.max else None,
        table.totals.drop if services.hooks.refusals else None,
        max(0, round(table.count - target * table.max)) if table.max else None,
        choice.levers,
        choice.fill_after,
        choice.reached and bool(table.max),
        choice.rising,
        table.read,
    )


def _policies(
    judged: list[Candidate], seen: list[Seen], about: Facts, done: list[InPlace], outlook: Outlook
) -> list[tuple[CtTimeout, Range, Culprit]]:
    """Timeout policies that would free much, with what they free, where nothing is in place."""
    found = []
    for item, one in zip(seen, judged):
        made = other.ct_timeout(item, one.role, about, outlook)
        if made is None or one.in_place:
            continue
        policy, freed = made
        there = (put.covers(policy.proto, policy.port, ()) for put in done if put.kind == "timeout")
        if not any(there):
            found.append((policy, freed, item.culprit))
    return found


def _once_undone(name: str, about: Facts) -> str:
    """What to do about changes that ctrace has applied there, before another plan."""
    if about.applied:
        return (
            f"{name}: the plan includes what ctrace has applied there already: run ctrace undo, "
            "then apply the plan"
        )
    return (
        f"{name}: ctrace has rules there whose plan is lost, so the new plan does not include "
        "them: note their services before you run ctrace undo and apply it"
    )


def _persist(known: Mapping[int, Facts], candidates: list[Candidate]) -> tuple[str, ...]:
    """Hints for the host's own namespace; other namespaces are rebuilt by whatever made them."""
    for netns, about in known.items():
        if about.initial and any(c.netns == netns and c.proposed for c in candidates):
            found = persist.managers(about.ruleset)
            return tuple(persist.hint(manager) for manager in found or [""])
    return ()


def _notes(snapshot: Snapshot) -> list[str]:
    notes = []
    if snapshot.lost:
        notes.append("events were lost: the numbers of each service may be too low")
    if (log := snapshot.logged) is not None:
        other = "" if log.netns else ": it held more then than when it was read"
        notes.append(
            f"the host's own log says that the table was full{where(log)} {when(log)}{other}"
        )
    if not snapshot.hooks.changes:
        notes.append(
            "one dump shows one moment: rates, how long entries stay, and what a change would do, "
            "are not known"
        )
    elif snapshot.uptime_s < 30:
        notes.append(
            f"only {snapshot.uptime_s:.0f} s were observed, and entries may stay longer: rates "
            "and predictions are rough. Watch for longer (advise --duration 2m), or use a recording"
        )
    return notes


def _seen(services: Snapshot, pairs: Optional[Snapshot], table: Table) -> list[Seen]:
    parts: dict[tuple[str, Optional[int]], list[Culprit]] = {}
    for part in pairs.culprits if pairs else ():
        if part.netns == table.netns:
            parts.setdefault((part.proto, part.port), []).append(part)
    mine = [c for c in services.culprits if c.netns == table.netns and c.held]
    mine.sort(key=lambda culprit: -culprit.held)
    return [Seen(c, tuple(parts.get((c.proto, c.port), ()))) for c in mine[:MOST]]


def _choose(
    table: Table,
    candidates: list[Candidate],
    policies: list[tuple[CtTimeout, Range, Culprit]],
    target: float,
    outlook: Outlook,
) -> Choice:
    """The levers, largest first: the smallest number of them that reaches the target."""
    options: list[tuple[Union[Notrack, CtTimeout], float]] = [
        (c.lever, float(c.frees)) for c in candidates if c.proposed and not c.in_place
    ]
    safe = {(c.proto, c.port) for c in candidates if c.proposed}
    options += [
        (policy, freed.low)
        for policy, freed, culprit in policies
        if (policy.proto, policy.port) not in safe and culprit.held >= POINTLESS * table.max
    ]
    options.sort(key=lambda option: -option[1])
    chosen: list[Lever] = []
    for lever, _ in options:
        if outlook.expected(other.levers_of(*chosen)) <= target:
            break
        chosen.append(lever)
    levers = other.levers_of(*chosen)
    rising = outlook.rising(levers)
    reached = outlook.expected(levers) <= target and (rising is None or not rising.full_s)
    return Choice(tuple(chosen), outlook.fill(levers), reached, rising)


def made_plan(services: Snapshot, table: Table, levers: tuple[Lever, ...], about: Facts) -> Plan:
    """The plan for a namespace with known rules, including what ctrace has applied there."""
    assert about.ruleset is not None
    return Plan(
        created=int(time.time()),
        host=clean_text(services.host),
        netns=table.netns,
        netns_name=clean_text(table.name),
        fingerprint=about.ruleset.fingerprint,
        backend=backend(about),
        levers=_with_applied(levers, about.applied),
    )


def _with_applied(levers: tuple[Lever, ...], applied: tuple[Lever, ...]) -> tuple[Lever, ...]:
    """A plan replaces the one before it, so it must do what that one does as well."""
    new = {(lever.kind, lever.proto, lever.port) for lever in levers}
    kept = (one for one in applied if (one.kind, one.proto, one.port) not in new)
    return (*levers, *kept)
