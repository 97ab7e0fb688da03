"""What makes a confirmed change stay, and what takes it off in an instant.

NOTRACK may hold only while its accepts do. Nothing in the packet path can see to that: the
decision falls in ``raw``, hooks before the chains that accept, and a rule there can't refer to
what lies in a table of others. Putting NOTRACK into their table would make both go together,
but iptables refuses a table with a chain that it did not make, and most reloads flush chains
and keep the table. So a small process looks (:mod:`ctrace.change.guard`), and the kernel makes
sure that it does: where a plan has accepts in chains of others, its confirmed rules have a
timeout of :data:`LEASE_S` that is renewed only while all accepts stand. A guard that is killed,
stopped or starved lets the services be tracked again. That costs entries; nobody makes those of
open connections then (:mod:`ctrace.change.carry`), so they are taken up in mid-stream, which a
firewall that wants a SYN first does not do.
iptables' own form of the rules has an end date that is put off instead. A plan without such
accepts stands in one table of ours, and needs no lease.
"""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone
from typing import Final, Optional

from ctrace.change import standing, steps
from ctrace.change.carry import carry_over
from ctrace.errors import CtraceError
from ctrace.host import commands
from ctrace.plan.plan import Notrack, Plan
from ctrace.ruleset import notrack_iptables, notrack_nft
from ctrace.ruleset.installed import read_own

LEASE_S: Final = 30
"""Seconds: long compared with a busy second of the guard, short compared with an outage."""
RENEW_S: Final = 10
CLOCK_SET_S: Final = 2
"""Seconds: more than rounding dates to whole seconds can explain."""


def make_lasting(plan: Plan) -> None:
    """Let a trial's rules stay, or renew them. Raises CtraceError when they are off already.

    This and the other functions act in the namespace that this thread is in.
    """
    if plan.backend == "nft":
        commands.run(["nft", "-f", "-"], notrack_nft.confirm(_lease(plan)))
        return
    lease = _lease(plan)
    until = None if lease is None else datetime.now(timezone.utc) + timedelta(seconds=lease)
    for family in steps.families():
        text = notrack_iptables.restore(plan, family, until, jumps=False, lease=True)
        commands.run(notrack_iptables.restore_argv(plan.backend, family), text)


def redate(plan: Plan, seconds: float) -> None:
    """Let iptables' rules of a trial match for so long from now, by the wall clock as it is."""
    until = steps.backstop(seconds)
    dates = {rule.until for rule in read_own(plan.backend, time.time()).rules if rule.until}
    if all(abs(date - until.timestamp()) < CLOCK_SET_S for date in dates):
        return
    for family in steps.families():
        text = notrack_iptables.restore(plan, family, until, jumps=False)
        commands.run(notrack_iptables.restore_argv(plan.backend, family), text)


def renew(plan: Plan) -> bool:
    """Renew the lease: the accepts are in place. False when the rules are off already."""
    if not standing.accepts(plan):
        return True
    try:
        make_lasting(plan)
    except CtraceError:
        return False
    return True


def stays(plan: Plan) -> str:
    """How long a confirmed plan stays, in one sentence."""
    if standing.accepts(plan):
        return (
            "It stays until ctrace undo, a reboot, or a flush of all rules. A reload that drops "
            "its accepts takes it off until it has been judged again (ctrace applied tells)."
        )
    if standing.Standing(plan).depends:
        return (
            "It stays until ctrace undo, a reboot, or a flush of all rules. When the rules around "
            "it change it is judged again, and taken off where it is not safe any more."
        )
    return "It stays until ctrace undo, a reboot, or a flush of all rules."


def off(plan: Plan) -> None:
    """Track its services again, at once; open connections of this host get their entries."""
    services = {
        (role, lever.proto, lever.port)
        for lever in plan.levers
        if isinstance(lever, Notrack)
        for role in lever.roles
    }
    carry_over(services)
    if plan.backend == "nft":
        commands.output(["nft", "-f", "-"], notrack_nft.disarm())
    else:
        for family in steps.families():
            argv = notrack_iptables.restore_argv(plan.backend, family)
            # One by one: some of it may be gone already.
            for line in notrack_iptables.remove().splitlines()[1:-1]:
                commands.output(argv, f"*raw\n{line}\nCOMMIT\n")
    carry_over(services)


def _lease(plan: Plan) -> Optional[int]:
    return LEASE_S if standing.accepts(plan) else None
