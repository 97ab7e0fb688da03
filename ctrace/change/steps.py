"""The commands that apply a plan, in order; also as text, and as a dry run."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Final, Optional

from ctrace.change import shell_lines
from ctrace.change.undo import nft_objects
from ctrace.dropping import Drop
from ctrace.errors import CtraceError
from ctrace.host import commands
from ctrace.plan.plan import CtTimeout, Lever, Plan
from ctrace.ruleset import notrack, notrack_iptables, notrack_nft
from ctrace.ruleset.installed import XT_TOOLS

LONGEST_S: Final = 3600
"""Seconds that a trial may last at most."""
UNDO: Final = "# to undo it: "
"""The prefix of the last line of a :func:`block`."""
BACKSTOP_S: Final = 3
"""How long after a trial's end the kernel disarms the rules by itself, if nobody has taken them
back: time for the guard to do that first, which also makes the open connections' entries."""


def named(lever: Lever) -> str:
    """``tcp/80``, ``drop-source 192.0.2.1``: a lever in a list."""
    return str(lever) if isinstance(lever, Drop) else f"{lever.proto}/{lever.port}"


def describe(plan: Plan, seconds: Optional[int], enter: Sequence[str] = ()) -> str:
    """The whole plan as text: what it is for, everything that is run, and how to undo it.

    ``enter`` begins a command that has to run in the plan's namespace.
    """
    lines = [f"Plan for network namespace {plan.netns_name} (netns:{plan.netns}):"]
    for lever in plan.levers:
        what = "take out of connection tracking"
        if isinstance(lever, CtTimeout):
            what = ", ".join(f"{state} {value} s" for state, value in lever.policy)
        elif isinstance(lever, Drop):
            what = lever.effect
        roles = f" ({', '.join(lever.roles)})" if lever.roles else ""
        lines.append(f"  {named(lever)}{roles}: {what}")
    for step in steps(plan, seconds):
        lines += ["", f"# {' '.join(step.argv)}", step.stdin.rstrip()]
    flush = [commands.inside(enter, " ".join(argv)) for argv in shell_lines.flush_commands(plan)]
    if flush:
        lines += ["", "# old entries, once confirmed and only if asked (--flush)", *flush]
    undo = commands.inside(enter, shell_lines.undo_line(plan))
    lines += ["", f"# undo: ctrace undo, or by hand: {undo}"]
    return "\n".join(lines) + "\n"


def block(plan: Plan, enter: Sequence[str] = ()) -> str:
    """Commands to paste into a root shell: they put a plan in place for good, or undo that.

    Made of the very texts that apply runs. Where one fails, the next does not run: the accepts come
    first, and without them untracked packets would be dropped. ``enter`` as for :func:`describe`.
    """
    lines = ["# as root: nothing watches it, and no deadline takes it back; ctrace apply does both"]
    todo = steps(plan, None)
    for step in todo:
        # A shell that is typed into takes a tab for a question.
        text, then = step.stdin.rstrip().expandtabs(2), "" if step is todo[-1] else " &&"
        lines += [f"{' '.join((*enter, *step.argv))} <<'CTRACE'{then}", text, "CTRACE"]
    return "\n".join([*lines, f"{UNDO}{commands.inside(enter, shell_lines.undo_line(plan))}"])


def steps(plan: Plan, seconds: Optional[int]) -> list[notrack.Step]:
    """The commands in order: accepts of other tools first, the untracking rules last.

    They hold for ``seconds`` (None: for good); the kernel disarms them :data:`BACKSTOP_S` later.
    """
    late = None if seconds is None else seconds + BACKSTOP_S
    found = []
    for tool in XT_TOOLS:
        for family in families():
            text = notrack_iptables.accepts(plan, tool, family)
            if text:
                found.append(notrack.Step(notrack_iptables.restore_argv(tool, family), text))
    if plan.backend == "nft":
        found.append(notrack.Step(("nft", "-f", "-"), notrack_nft.script(plan, late)))
        return found
    accepts = notrack_nft.accepts(plan)
    if accepts:
        found.append(notrack.Step(("nft", "-f", "-"), "\n".join(accepts) + "\n"))
    until = None if seconds is None else backstop(seconds)
    for family in families():
        text = notrack_iptables.restore(plan, family, until)
        found.append(notrack.Step(notrack_iptables.restore_argv(plan.backend, family), text))
    return found


def carry_out(plan: Plan, seconds: int, lock: int) -> None:
    """Run them. Each has the lock: if this process is killed just now, it leaves none behind that
    acts when the guard has put everything right. Raises CtraceError."""
    for step in steps(plan, seconds):
        commands.run(step.argv, step.stdin, keep=(lock,))


def backstop(seconds: float) -> datetime:
    """When iptables' rules of a trial stop to match that has so long to go."""
    return datetime.fromtimestamp(time.time() + seconds + BACKSTOP_S, timezone.utc)


def check(plan: Plan) -> None:
    """Let the tools themselves say whether the kernel would take it; changes nothing."""
    for step in steps(plan, LONGEST_S):
        program, *rest = step.argv
        extra = "-c" if program == "nft" else "--test"
        try:
            commands.run((program, extra, *rest), step.stdin)
        except CtraceError as error:
            raise CtraceError(f"the plan can't be applied here: {error}") from None


def families() -> tuple[str, ...]:
    """The families that this kernel has (ipv6.disable=1 leaves one)."""
    return ("ip", "ip6") if os.path.exists("/proc/sys/net/ipv6") else ("ip",)


def to_be_made(plan: Plan) -> set[str]:
    """nft's names for what iptables-nft will make in ``raw`` and leave behind when emptied."""
    if plan.backend != "iptables-nft" or not commands.have("nft"):
        return set()
    made = set()
    for family in families():
        there = nft_objects(family, "raw")
        names = (f"{family} raw", f"{family} raw PREROUTING", f"{family} raw OUTPUT")
        made |= {name for name in names if name not in there}
    return made
