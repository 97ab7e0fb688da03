"""From what was seen to what to do: the fewest levers that bring each table below a target."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Final, Optional, Union

from ctrace.advice import alternatives as other
from ctrace.advice import persist
from ctrace.advice.facts import Facts
from ctrace.advice.findings import WHEN_THEY_GO
from ctrace.advice.hazards import Judge
from ctrace.advice.in_place import OURS, InPlace, in_place
from ctrace.advice.result import GOOD, Advice, Candidate, Choice, TableAdvice
from ctrace.advice.roles import Seen, half_tracked, subject, unmatched, within
from ctrace.advice.texts import copied
from ctrace.batch import DUMP
from ctrace.model.causes.beside import with_stale
from ctrace.model.causes.words import when, where
from ctrace.model.remedies import POINTLESS, WHOLE
from ctrace.model.snapshot import Cause, Culprit, Remedy, Snapshot, Table
from ctrace.plan.plan import CtTimeout, Lever, Notrack, Plan, clean_text
from ctrace.whatif.growth import Range
from ctrace.whatif.predict import Outlook, Part, Service

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
    tables: list[TableAdvice] = []
    candidates: list[Candidate] = []
    others: list[Remedy] = []
    plans: list[Plan] = []
    notes = _notes(services)
    there: list[tuple[int, InPlace]] = []
    for table in services.tables:
        if not table.max and (table.max_known or services.hooks.family != DUMP):
            continue  # no limit, or it went away before that was read
        about = known.get(table.netns, Facts())
        about, texts = copied(about)
        judge = Judge(about.ruleset, about.snapshot, _backend(about), texts)
        done = list(in_place(about.ruleset, judge.room)) if about.ruleset else []
        there += [(table.netns, one) for one in done]
        if about.condition:
            name = table.name or str(table.netns)
            notes.append(f"{name}: what ctrace applied there: {about.condition}")
        seen = _seen(services, pairs, table)
        full = table.fill > target or table.totals.drop > 0
        if not seen or not (full or every):
            continue
        outlook = Outlook(
            table,
            [item.culprit for item in seen],
            about.timeouts,
            services.uptime_s if services.hooks.changes else None,
        )
        judged = [
            _candidate(table, item, seen, about, judge, done, outlook)
            for item in seen
            if item.culprit.port
        ]
        shown = sum(item.culprit.held for item in seen)
        if not services.hooks.changes and shown < WHOLE * table.count:
            judged = [_of_some(one, shown, table) for one in judged]
        judged = [
            _as_it_frees(_of_a_flood(one, services.why), item.culprit, table)
            for one, item in zip(judged, [i for i in seen if i.culprit.port])
        ]
        policies = _policies(judged, seen, about, done, outlook)
        choice = _choose(table, judged, policies, target, outlook) if full else Choice()
        chosen = choice.levers
        judged = [replace(c, chosen=c.lever in chosen) for c in judged]
        candidates += judged
        least = POINTLESS * table.max if other.in_need(table, target, outlook) else float("inf")
        made = [(policy, freed) for policy, freed, _ in policies]
        others += other.policies(table, made, chosen, least, outlook, about)
        causes = with_stale(services.why, table, about.left)
        others += other.alternatives(table, seen, about, target, outlook, causes)
        tables.append(
            TableAdvice(
                table.netns,
                table.name,
                table.count,
                table.max or None,
                round(table.fill, 4) if table.max else None,
                table.totals.drop if services.hooks.refusals else None,
                max(0, round(table.count - target * table.max)) if table.max else None,
                chosen,
                choice.fill_after,
                choice.reached and bool(table.max),
                choice.rising,
            )
        )
        notes += [
            f"{c.proto}/{c.port}: {reason}"
            for c in judged
            if c.chosen
            for reason in c.reasons
            if reason.startswith(WHEN_THEY_GO)
        ]
        if chosen and about.ruleset is not None:
            plans.append(made_plan(services, table, chosen, about))
            if any(one.by == OURS for one in done):
                name = clean_text(table.name or str(table.netns))
                notes.append(_once_undone(name, about))
    candidates.sort(key=lambda c: -c.frees)
    return Advice(
        services.host,
        services.ts // 10**9 or int(time.time()),
        target,
        tuple(tables),
        tuple(candidates),
        tuple(others),
        tuple(notes),
        _persist(known, candidates),
        tuple(there),
        tuple(plans),
    )


def _policies(
    judged: list[Candidate], seen: list[Seen], about: Facts, done: list[InPlace], outlook: Outlook
) -> list[tuple[CtTimeout, Range, Culprit]]:
    """Timeout policies that would free much, with what they free, where nothing is in place."""
    found = []
    for item, candidate in zip([i for i in seen if i.culprit.port], judged):
        made = other.ct_timeout(item, candidate.role, about, outlook)
        if made is None or candidate.in_place:
            continue
        policy, freed = made
        there = (one.covers(policy.proto, policy.port, ()) for one in done if one.kind == "timeout")
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
        notes.append(
            f"{snapshot.lost} events were lost: the numbers of each service may be too low"
        )
    if (log := snapshot.logged) is not None:
        other = "" if log.netns else ": it held more then than when it was read"
        notes.append(
            f"the host's own log says that the table was full{where(log)} {when(log)}{other}"
        )
    if not snapshot.hooks.changes:
        notes.append(
            "one dump shows one moment: rates, stays and what a change would lead to are not known"
        )
    elif snapshot.uptime_s < 30:
        notes.append(
            f"only {snapshot.uptime_s:.0f} s were observed: residences are longer than that, so "
            "rates and predictions are rough; watch longer with --duration, or use a recording"
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


def _candidate(
    table: Table,
    item: Seen,
    everything: list[Seen],
    about: Facts,
    judge: Judge,
    done: list[InPlace],
    outlook: Outlook,
) -> Candidate:
    culprit = item.culprit
    if culprit.proto not in ("tcp", "udp"):
        lever = Notrack("tcp", culprit.port or 1, ())
        reason = f"NOTRACK by port is for TCP and UDP, not {culprit.proto}"
        return _made(table, culprit, (), "unsafe", (reason,), lever, outlook)
    who = subject(
        item,
        about.addresses,
        about.ephemeral,
        about.forwarding,
        [one for seen in everything for one in seen.samples if one.proto == culprit.proto],
        picked=about.picks(culprit.proto, culprit.port or 0),
        entries=about.entries,
    )
    judgement = judge.judge(who)
    verdict, reasons, remarks = judgement.verdict, list(judgement.reasons), list(judgement.remarks)
    if half_tracked(item, about.addresses):
        reasons.append("its entries are the wrong way round: one direction is already untracked")
    if about.untold:
        reasons.append(f"not in the texts: {', '.join(about.untold)}")
    if culprit.held < POINTLESS * table.max:
        remarks.append(f"pointless: it holds {culprit.held:,} of {table.max:,} entries")
    elif _lasting(culprit):
        remarks.append("mostly long-lived connections: existing ones would keep their entries")
    inside = within(item, about.addresses, about.ephemeral) if "client" in who.roles else None
    if inside is not None and inside < WHOLE:
        remarks.append(unmatched(inside, about.ephemeral))
        if not inside and who.roles == ("client",) and verdict in GOOD:
            verdict = "cannot-say"  # no connection that was seen shows how one fares untracked
    made = [
        one
        for one in done
        if one.kind == "notrack" and who.roles and one.covers(who.proto, who.port, who.roles)
    ]
    for one in made[:1]:
        reasons.insert(0, f"{one}: the {culprit.held} entries that it holds are from before")
    reasons += [one for one in remarks if one not in reasons]
    lever = judgement.lever
    candidate = _made(table, culprit, who.roles, verdict, tuple(reasons), lever, outlook)
    if inside is not None and inside < WHOLE:
        freed = round(culprit.held * inside)
        candidate = replace(candidate, frees=freed, fill_after=None)
    return replace(
        candidate,
        in_place=bool(made),
        enter=about.enter,
        backend=_backend(about),
        evidence=judgement.evidence,
        remarks=tuple(remarks),
    )


def _of_a_flood(candidate: Candidate, why: tuple[Cause, ...]) -> Candidate:
    """NOTRACK lets a flood through to the service, without an entry: it comes after the rest."""
    here = (candidate.netns, candidate.proto, candidate.port)
    floods = (c for c in why if c.id in ("syn-flood", "ack-flood"))
    if all((c.netns, c.proto, c.port) != here for c in floods):
        return candidate
    return candidate.held_back(
        "its entries come from a flood: without tracking, all of it reaches the service; see below"
    )


def _of_some(candidate: Candidate, shown: int, table: Table) -> Candidate:
    """The candidate from a dump that shows only part of the table: nothing is known of the rest."""
    part = f"the texts show {shown:,} of its table's {table.count:,} entries: it may free more"

    def told(found: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(part if one.startswith("pointless: it holds") else one for one in found)

    reasons = tuple(dict.fromkeys([*told(candidate.reasons), part]))
    return replace(candidate, reasons=reasons, remarks=told(candidate.remarks), fill_after=None)


def _lasting(culprit: Culprit) -> bool:
    """Whether its entries are open connections, which keep them whatever the rules."""
    return culprit.proto == "tcp" and (culprit.closed or 0.0) < 0.2 and culprit.new_per_s < 1


def _as_it_frees(candidate: Candidate, culprit: Culprit, table: Table) -> Candidate:
    """The candidate with the entries that stay: those of open connections go only with ``conntrack
    -D``."""
    if not _lasting(culprit):
        return candidate
    return replace(candidate, frees=0, fill_after=other.fill_after(table, Range(0.0, 0.0)))


def _made(
    table: Table,
    culprit: Culprit,
    role: tuple[str, ...],
    verdict: str,
    reasons: tuple[str, ...],
    lever: Notrack,
    outlook: Outlook,
) -> Candidate:
    return Candidate(
        table.netns,
        table.name,
        culprit.proto,
        culprit.port or 0,
        role,
        verdict,
        reasons,
        culprit.held,
        culprit.held / table.count if table.count else 0.0,
        outlook.fill([(culprit.proto, culprit.port or 0)]),
        lever,
        rising=outlook.rising([(culprit.proto, culprit.port or 0)]),
    )


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
    gone: list[Service] = []
    short: dict[Part, float] = {}
    for lever, _ in options:
        if outlook.expected(gone, short) <= target:
            break
        chosen.append(lever)
        if isinstance(lever, Notrack):
            gone.append((lever.proto, lever.port))
        else:
            short.update(other.shorter(lever))
    rising = outlook.rising(gone, short)
    reached = outlook.expected(gone, short) <= target and (rising is None or not rising.full_s)
    return Choice(tuple(chosen), outlook.fill(gone, short), reached, rising)


def made_plan(services: Snapshot, table: Table, levers: tuple[Lever, ...], about: Facts) -> Plan:
    """The plan for a namespace with known rules, including what ctrace has applied there."""
    assert about.ruleset is not None
    return Plan(
        created=int(time.time()),
        host=clean_text(services.host),
        netns=table.netns,
        netns_name=clean_text(table.name),
        fingerprint=about.ruleset.fingerprint,
        backend=_backend(about),
        levers=_with_applied(levers, about.applied),
    )


def _with_applied(levers: tuple[Lever, ...], applied: tuple[Lever, ...]) -> tuple[Lever, ...]:
    """A plan replaces the one before it, so it must do what that one does as well."""
    new = {(lever.kind, lever.proto, lever.port) for lever in levers}
    kept = (one for one in applied if (one.kind, one.proto, one.port) not in new)
    return (*levers, *kept)


def _backend(about: Facts) -> str:
    if about.has_nft:
        return "nft"
    tools = {chain.tool for chain in about.ruleset.chains} if about.ruleset else set()
    return "iptables-nft" if "iptables-nft" in tools else "iptables-legacy"
