"""A plan judged again, by the rules and the table of its namespace as they are now.

The guard runs it as a process of its own when the rules around a confirmed change have changed. It
takes off a change that is no longer safe, and puts back one whose accepts a reload dropped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Final, Optional

from ctrace.advice.facts import Facts, facts
from ctrace.advice.hazards import Judge
from ctrace.advice.roles import flows_of, is_shared_now, of_service
from ctrace.advice.subject import Flow, Subject
from ctrace.batch import inode_of
from ctrace.change import condition
from ctrace.errors import CtraceError, TryAgain, passes
from ctrace.host.commands import prefix
from ctrace.host.netns import Namespace, Way, find
from ctrace.plan.plan import Lever, Notrack, Plan
from ctrace.record import Status
from ctrace.rehearsal.snapshot import take

GOOD: Final = ("safe", "safe-with-rules")
NAT: Final = int(Status.SRC_NAT | Status.DST_NAT)


def judge_plan(plan: Plan, namespace: Namespace) -> Plan:
    """The plan with the accepts that its levers need under the present rules.

    Judged as in advise. Raises CtraceError, with the gravest reason, for a lever that is not safe
    any more; TryAgain when there was no time or memory to judge it.
    """
    return _judged(plan, namespace)


def _judged(plan: Plan, namespace: Namespace, *, in_place: bool = False) -> Plan:
    """``in_place``: its rules are in force, so they spare the connections of others already."""
    with Way(namespace.inum, namespace).held() as there:
        if there is None:
            raise CtraceError(f"network namespace {namespace.name} is gone: run advise again")
        return _judged_there(plan, there, in_place=in_place)


def _judged_there(plan: Plan, namespace: Namespace, *, in_place: bool) -> Plan:
    about = facts(namespace.path)
    if about.ruleset is None:
        raise CtraceError(f"the rules of {namespace.name} cannot be read: run advise again")
    snapshot = about.snapshot or take(namespace.path)  # whose error tells why there is none
    judge = Judge(about.ruleset, snapshot, plan.backend)

    def levers() -> Iterator[Lever]:
        for lever in plan.levers:
            if not isinstance(lever, Notrack):
                yield lever
                continue
            table, nat, shared_now = about.entries, False, False
            flows: tuple[Flow, ...] = ()
            if table is not None:
                here = of_service(table, lever.proto, lever.port)
                nat = bool((here["status"] & NAT).any())
                shared_now = not in_place and is_shared_now(table, lever.proto, lever.port)
                flows = flows_of(table, lever.proto, lever.port, set(about.addresses))
            subject = Subject(
                proto=lever.proto,
                port=lever.port,
                roles=lever.roles,
                local=about.addresses,
                peers=lever.peers,
                only_peers=bool(lever.peers),
                nat="src,dst" if nat else "no",  # none was seen when the plan was made
                ephemeral=about.ephemeral,
                picked=about.picks(lever.proto, lever.port),
                shared_now=shared_now,
                forwarding=about.forwarding,
                flows=flows,
            )
            judged = judge.judge(subject)
            if judged.verdict not in GOOD:
                raised = TryAgain if judged.not_now else CtraceError
                raise raised(
                    f"the rules in {namespace.name} changed since the plan was made, and "
                    f"{lever.proto}/{lever.port} is {judged.verdict} now: "
                    f"{(judged.reasons or ('no reason was found',))[0]}"
                )
            yield judged.lever

    return replace(plan, fingerprint=about.ruleset.fingerprint, levers=tuple(levers()))


def objection(plan: Plan, namespace: Namespace) -> str:
    """Why a plan in place would not be made like this with the present rules; empty: it would.

    Raises TryAgain when there was no time or memory to judge it.
    """
    try:
        now = _judged(plan, namespace, in_place=True)
    except CtraceError as error:
        if passes(error):
            raise TryAgain(str(error)) from error
        return str(error)
    for old, new in zip_longest(plan.levers, now.levers):
        if not isinstance(old, Notrack) or not isinstance(new, Notrack):
            continue
        have = {replace(accept, position=0) for accept in old.accepts}
        lacking = [one for one in new.accepts if replace(one, position=0) not in have]
        if lacking:
            where = f"{lacking[0].family} {lacking[0].table} {lacking[0].chain}"
            why = f"{old.proto}/{old.port} would need an accept in {where}"
        elif _meant(old) != _meant(new):
            why = f"the rules for {old.proto}/{old.port} would be different"
        else:
            continue
        return (
            f"the rules in {namespace.name} changed since the plan was made, and now {why}: run "
            "ctrace undo, then advise and apply again"
        )
    return ""


def _meant(lever: Notrack) -> tuple[object, ...]:
    return lever.roles, lever.icmp, lever.shared, sorted(lever.peers)


def facts_of(inum: int) -> Optional[Facts]:
    """The facts of a namespace as recorded, with the condition of what ctrace applied there; None
    when it has gone or cannot be read."""
    for space in find():
        if space.inum == inode_of(inum):
            try:
                with Way(space.inum, space).held() as there:
                    if there is None:
                        return None
                    about = replace(facts(there.path), enter=prefix(space))
            except CtraceError:
                return None
            try:
                told = condition.of(space, objection)
            except CtraceError as error:  # its note cannot be read: the rules were
                told = str(error)
            return replace(about, condition=told)
    return None


if __name__ == "__main__":
    from ctrace.change.apply import look_again

    try:
        look_again(int(sys.argv[1]), judge_plan, objection)
    except CtraceError:
        sys.exit(1)
