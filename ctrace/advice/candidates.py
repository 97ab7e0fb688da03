"""One service of a table as a candidate for NOTRACK: what is said of it, and what it would free."""

from __future__ import annotations

from dataclasses import replace

from ctrace.advice import alternatives as other
from ctrace.advice.facts import Facts
from ctrace.advice.hazards import Judge
from ctrace.advice.in_place import InPlace
from ctrace.advice.result import GOOD, Candidate
from ctrace.advice.roles import Seen, half_tracked, subject, unmatched, within
from ctrace.advice.subject import Subject
from ctrace.model.remedies import POINTLESS, WHOLE
from ctrace.model.snapshot import Cause, Culprit, Snapshot, Table
from ctrace.plan.plan import Notrack
from ctrace.record import PROTO_NUMBERS
from ctrace.whatif.growth import Range
from ctrace.whatif.predict import Outlook
from ctrace.whatif.settings import Levers


def candidate(
    table: Table,
    item: Seen,
    everything: list[Seen],
    about: Facts,
    judge: Judge,
    done: list[InPlace],
    outlook: Outlook,
) -> Candidate:
    """NOTRACK for one service: the verdict, why, and what it frees."""
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
    made = [one for one in done if one.kind == "notrack" and _covers(one, who)]
    for one in made[:1]:
        reasons.insert(0, f"{one}: the {culprit.held} entries that it holds are from before")
    reasons += [one for one in remarks if one not in reasons]
    lever = judgement.lever
    found = _made(table, culprit, who.roles, verdict, tuple(reasons), lever, outlook)
    if inside is not None and inside < WHOLE:
        found = replace(found, frees=round(culprit.held * inside), fill_after=None)
    return replace(
        found,
        in_place=bool(made),
        enter=about.enter,
        backend=backend(about),
        evidence=judgement.evidence,
        remarks=tuple(remarks),
    )


def _covers(one: InPlace, who: Subject) -> bool:
    """Whether what is there leaves all of its packets untracked."""
    return bool(who.roles) and one.covers(who.proto, who.port, who.roles)


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
    gone = Levers(notrack=((PROTO_NUMBERS.get(culprit.proto, 0), culprit.port or 0),))
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
        outlook.fill(gone),
        lever,
        rising=outlook.rising(gone),
    )


def held_to_the_table(
    judged: list[Candidate], seen: list[Seen], table: Table, services: Snapshot
) -> list[Candidate]:
    """The candidates of these services, as far as the whole table lets them free entries."""
    shown = sum(item.culprit.held for item in seen)
    if not services.hooks.changes and shown < WHOLE * table.count:
        judged = [_of_some(one, shown, table) for one in judged]
    return [
        _as_it_frees(_of_a_flood(one, services.why), item.culprit, table)
        for one, item in zip(judged, [item for item in seen if item.culprit.port])
    ]


def backend(about: Facts) -> str:
    """The tool whose rules a plan for this namespace is made of."""
    if about.has_nft:
        return "nft"
    tools = {chain.tool for chain in about.ruleset.chains} if about.ruleset else set()
    return "iptables-nft" if "iptables-nft" in tools else "iptables-legacy"
