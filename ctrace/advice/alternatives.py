"""What helps besides NOTRACK: what each remedy frees, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final, Optional

from ctrace.advice.facts import Facts
from ctrace.advice.roles import Seen
from ctrace.model import remedies
from ctrace.model.causes.room import short
from ctrace.model.snapshot import Cause, Remedy, Table
from ctrace.plan.plan import CtTimeout, Lever, Notrack, alone
from ctrace.record import PROTO_NUMBERS
from ctrace.ruleset import notrack_nft
from ctrace.ruleset.notrack import TABLE
from ctrace.whatif.growth import Range
from ctrace.whatif.predict import Outlook
from ctrace.whatif.settings import POLICY_UDP, Levers, Timeout

POLICY: Final = {
    "tcp": (("fin_wait", 10), ("close_wait", 10), ("last_ack", 5), ("time_wait", 5), ("close", 2)),
    "udp": (("unreplied", 5), ("replied", 15)),
}
"""A per-port timeout policy: closed connections and answered requests go after seconds."""
MOSTLY: Final = 0.5
_SETTING: Final = "net.netfilter.nf_conntrack_"


def ct_timeout(
    seen: Seen, roles: tuple[str, ...], facts: Facts, outlook: Outlook
) -> Optional[tuple[CtTimeout, Range]]:
    """A timeout policy for the service with what it frees, if shorter timeouts would free much."""
    culprit = seen.culprit
    if culprit.proto not in POLICY or not culprit.port or not roles or not facts.has_nft:
        return None
    policy = CtTimeout(culprit.proto, culprit.port, roles, POLICY[culprit.proto])
    freed = outlook.frees(levers_of(policy))
    return (policy, freed) if freed.high and freed.high >= MOSTLY * culprit.held else None


def levers_of(*chosen: Lever) -> Levers:
    """NOTRACK and timeout policies of a plan, as a what-if takes them."""
    return Levers(
        tuple((PROTO_NUMBERS[one.proto], one.port) for one in chosen if isinstance(one, Notrack)),
        tuple(
            Timeout(POLICY_UDP.get(state, f"tcp_{state}"), s, PROTO_NUMBERS[one.proto], one.port)
            for one in chosen
            if isinstance(one, CtTimeout)
            for state, s in one.policy
        ),
    )


def alternatives(
    table: Table, facts: Facts, target: float, outlook: Outlook, causes: Sequence[Cause] = ()
) -> Iterator[Remedy]:
    """Everything else that helps one namespace's table, the most freeing first.

    ``causes`` are those of all tables, whose remedies these are; NOTRACK is not among them, as
    it has a verdict of its own. Of ordinary traffic nothing is told while the table has room.
    """
    found = list(_larger(table, facts, target, outlook))
    needed = in_need(table, target, outlook)
    if needed:
        found += _time_wait(table, facts, outlook)
    taken = {_same(one) for one in found}
    helps = (one for c in causes for one in (*c.remedies, *(c.at_need if needed else ())))
    for remedy in helps:
        if remedy.netns not in (0, table.netns) or remedy.id == "notrack":
            continue
        here = _as_it_is(remedy, facts)
        if here is not None and not _judged(here) and _same(here) not in taken:
            taken.add(_same(here))
            found.append(_with_fill(here, table))
    found.sort(key=lambda one: (-one.now, -(one.frees[1] if one.frees else 0)))
    yield from (placed(one, facts) for one in found)


def in_need(table: Table, target: float, outlook: Outlook) -> bool:
    """Whether a table has, will have, or had since the start, less room than it should."""
    refused = table.totals.drop > 0
    return refused or max(table.count, outlook.most) > target * table.max or short(table)


def _judged(remedy: Remedy) -> bool:
    """Whether it was reported already, with what it frees, or left out because it frees nothing."""
    setting = f"{_SETTING}tcp_timeout_time_wait="
    return remedy.id == "sysctl-timeout" and setting in remedy.commands[0]


def _same(remedy: Remedy) -> tuple[str, ...]:
    return (remedy.id, *(remedy.commands or (remedy.text,)))


def _as_it_is(remedy: Remedy, facts: Facts) -> Optional[Remedy]:
    """A remedy based on the timeout now in force in the namespace; None where that is short
    already."""
    if remedy.id == "larger-table":
        return None  # the target states its size
    if remedy.id != "sysctl-timeout":
        return remedy
    name = remedy.commands[0].partition(_SETTING)[2].partition("=")[0]
    made = remedies.timeout(name, remedy.netns, old=facts.timeouts.get(name), frees=remedy.frees)
    return replace(made, service=remedy.service) if made else None


def _with_fill(remedy: Remedy, table: Table) -> Remedy:
    if remedy.frees is None or remedy.fill_after is not None:
        return remedy
    low, high = remedy.frees
    return replace(remedy, fill_after=fill_after(table, Range(low, high)))


def placed(remedy: Remedy, facts: Facts) -> Remedy:
    """The remedy with commands that run in the right namespace from any shell."""
    if not facts.has_nft:
        remedy = replace(remedy, option="")  # what apply would put in place needs it
    enter = () if remedy.initial else facts.enter

    def typed(commands: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(" ".join(("sudo", *enter, one)) for one in commands)

    if remedy.id == "ct-timeout":  # a script behind its first line
        first, *rest = remedy.commands or ("",)
        commands = (*typed((first,)), *rest) if first else ()
        return replace(remedy, commands=commands, undo=typed(remedy.undo))
    return replace(remedy, commands=typed(remedy.commands), undo=typed(remedy.undo))


def fill_after(table: Table, freed: Range) -> Optional[tuple[float, float]]:
    """The fill once ``freed`` entries are gone, lowest first."""
    if not table.max:
        return None
    low, high = (max(0.0, table.count - amount) / table.max for amount in (freed.high, freed.low))
    return round(low, 4), round(high, 4)


def policies(
    table: Table,
    made: Iterable[tuple[CtTimeout, Range]],
    chosen: Sequence[Lever],
    least: float,
    outlook: Outlook,
    facts: Facts,
) -> Iterator[Remedy]:
    """Timeout policies as remedies: those in the plan, and others without NOTRACK in the plan that
    free ``least`` entries or more."""
    offered = {(one.proto, one.port) for one in chosen if isinstance(one, Notrack)}
    for policy, freed in made:
        planned = policy in chosen
        if (planned or freed.high >= least) and (policy.proto, policy.port) not in offered:
            yield policy_alternative(table, policy, freed, outlook, facts, planned)


def policy_alternative(
    table: Table, policy: CtTimeout, freed: Range, outlook: Outlook, facts: Facts, planned: bool
) -> Remedy:
    """A ct timeout lever as a remedy; ``planned``: a plan has it already."""
    table_name = f"{TABLE}_timeout_{policy.proto}_{policy.port}"
    script = notrack_nft.by_hand(alone(policy), table_name)
    states = ", ".join(f"{state} {seconds} s" for state, seconds in policy.policy)
    made = Remedy(
        "ct-timeout",
        f"shorter timeouts for {policy.proto}/{policy.port} only ({states})",
        table.netns,
        f"{policy.proto}/{policy.port}",
        "tracking, NAT and stateful rules keep working; existing connections never get them",
        frees=(round(freed.low), round(freed.high)),
        fill_after=outlook.fill(levers_of(policy)),
        rising=outlook.rising(levers_of(policy)),
        commands=() if planned else ("nft -f - <<'EOF'", *script.splitlines(), "EOF"),
        undo=() if planned else (f"nft delete table inet {table_name}",),
    )
    return placed(made, facts)


def _time_wait(table: Table, facts: Facts, outlook: Outlook) -> Iterator[Remedy]:
    name = "tcp_timeout_time_wait"
    old, new = facts.timeouts.get(name), remedies.SHORTER[name]
    if old is None:
        return
    shorter = Levers(timeouts=(Timeout("tcp_time_wait", new),))
    freed = outlook.frees(shorter)
    if freed.high < 0.05 * table.count or freed.high < 1:
        return
    made = remedies.timeout(
        name,
        table.netns,
        old=old,
        frees=(round(freed.low), round(freed.high)),
        fill_after=outlook.fill(shorter),
    )
    if made is not None:
        yield replace(made, rising=outlook.rising(shorter))


def _larger(table: Table, facts: Facts, target: float, outlook: Outlook) -> Iterator[Remedy]:
    growth = outlook.most
    need = max(table.count, growth) / target
    low, high = facts.entry_bytes
    known = "" if low != high else " (read from this kernel's slab)"
    where = "" if facts.initial else "; both are set in the host's first namespace, for all"
    made = remedies.larger(table, need, facts.entry_bytes, known + where)
    if made is None:
        return
    size = made.memory[0] // (facts.entry_bytes[0] + remedies.BUCKET_BYTES) if made.memory else 1
    yield replace(
        made,
        fill_after=(round(table.count / size, 4), round(max(table.count, growth) / size, 4))
        if outlook.known
        else None,
        rising=outlook.rising(Levers(limit=size)),
    )
