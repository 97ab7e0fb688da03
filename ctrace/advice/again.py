"""A plan judged again, by the rules and the table of its namespace as they are now.

As a process of its own (the guard starts it) it puts a confirmed change back whose accepts a
reload dropped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from ctrace.advice.facts import facts
from ctrace.advice.hazards import Judge
from ctrace.advice.roles import flows_of, of_service
from ctrace.advice.subject import Flow, Subject
from ctrace.change.plan import Lever, Notrack, Plan
from ctrace.errors import CtraceError
from ctrace.host.netns import Namespace
from ctrace.record import Status

GOOD: Final = ("safe", "safe-with-rules")
NAT: Final = int(Status.SRC_NAT | Status.DST_NAT)


def judge_plan(plan: Plan, namespace: Namespace) -> Plan:
    """The plan with the accepts that its levers need now, for the rules that are there now.

    The same judge as of advise. Raises CtraceError, with the gravest reason, for a lever
    that is not safe any more.
    """
    about = facts(namespace.path)
    if about.ruleset is None:
        raise CtraceError(f"the rules of {namespace.name} cannot be read: run advise again")
    judge = Judge(about.ruleset, about.snapshot, plan.backend)

    def levers() -> Iterator[Lever]:
        for lever in plan.levers:
            if not isinstance(lever, Notrack):
                yield lever
                continue
            table, nat = about.entries, False
            flows: tuple[Flow, ...] = ()
            if table is not None:
                here = of_service(table, lever.proto, lever.port)
                nat = bool((here["status"] & NAT).any())
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
                shared_now=lever.shared,
                forwarding=about.forwarding,
                flows=flows,
            )
            judged = judge.judge(subject)
            if judged.verdict not in GOOD:
                raise CtraceError(
                    f"the rules in {namespace.name} changed since the plan was made, and with "
                    f"them {lever.proto}/{lever.port} is {judged.verdict}: "
                    f"{(judged.reasons or ('no reason was found',))[0]}"
                )
            yield judged.lever

    return replace(plan, fingerprint=about.ruleset.fingerprint, levers=tuple(levers()))


if __name__ == "__main__":
    from ctrace.change.apply import put_back

    try:
        put_back(int(sys.argv[1]), judge_plan)
    except CtraceError:
        sys.exit(1)
