"""Applying a plan: checked, armed, one transaction, watched, kept only when confirmed.

The order of things, so that a crash or kill at any point is harmless:

1. everything that can be refused is refused first, and nothing has changed;
2. the note is written and the guard started (:mod:`ctrace.change.guard`);
3. accepts go in first: they match untracked packets only, of which there are none;
4. the untracking rules go in, in one transaction, behind a switch inside the
   kernel that opens by itself (set elements with a timeout; an end date in
   iptables): if everything of ours dies, tracking is back at the deadline;
5. the namespace's counters are compared with the second before, and the change
   is taken back when something got worse.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from math import ceil
from typing import Final, Optional

from ctrace import interpreter
from ctrace.change import health, notes, shell_lines
from ctrace.change import plan as plans
from ctrace.change.plan import CtTimeout, Notrack, Plan
from ctrace.change.undo import nft_objects, remove
from ctrace.errors import CtraceError
from ctrace.host import commands, netns
from ctrace.host.commands_in import inside as inside_of
from ctrace.host.commands_in import prefix
from ctrace.host.netns import Namespace
from ctrace.record import Events
from ctrace.ruleset import notrack, notrack_iptables, notrack_nft
from ctrace.ruleset.installed import (
    EXPIRED,
    NOTHING,
    PERMANENT,
    TRIAL,
    XT_TOOLS,
    listing,
    nft_ruleset,
    read_installed,
    saved_rules,
)
from ctrace.ruleset.reader import fingerprint

BASELINE_S: Final = 1.0
CHECK_S: Final = 1.0
"""The first verdict is reached this long after the change, and a bad one undone at once."""
SHORTEST_S, LONGEST_S = 5, 3600
FLUSH_S: Final = 600
"""Longest wait for ``conntrack -D``: it deletes some 50 000 entries a second."""


@dataclass(frozen=True)
class Prepared:
    """A plan that this host can carry out; nothing has changed yet."""

    plan: Plan
    namespace: Namespace
    warnings: tuple[str, ...]
    present: str
    """What of ours is there already: ``nothing``, ``trial``, ``expired`` or ``permanent``."""

    @property
    def enter(self) -> tuple[str, ...]:
        """What a command begins with to run in the namespace."""
        return prefix(self.namespace)


@dataclass
class Trial:
    """A change that is in place and not confirmed."""

    prepared: Prepared
    deadline: float
    """UTC seconds at which the kernel disarms the rules."""
    before: tuple[health.Sample, health.Sample]
    start: health.Sample
    table: Events
    local: tuple[str, ...]

    @property
    def seconds_left(self) -> float:
        """Until the change reverts by itself."""
        return max(0.0, self.deadline - time.time())


def prepare(plan: Plan) -> Prepared:
    """Check everything that can be checked without changing anything.

    Raises CtraceError in one line: another host, a namespace that is gone, a ruleset
    that changed since the plan was made, a tool that is missing, rules that the
    kernel refuses, or another plan applied there.
    """
    if os.geteuid() != 0:
        raise CtraceError("changing rules needs root: run it with sudo")
    here = plans.clean_text(os.uname().nodename)
    if plan.host != here:
        raise CtraceError(f"the plan is for host {plan.host!r}, this is {here!r}: run advise here")
    namespace = locate(plan)
    with inside(namespace):
        installed = read_installed(time.time())
        present = installed.state
        note = notes.read(namespace.inum)
        if present == PERMANENT and not (
            note and note.plan == plans.to_json(plan) and note.listing == listing()
        ):
            raise CtraceError(
                f"ctrace has {', '.join(installed.services) or 'rules'} applied in "
                f"{namespace.name} already: run ctrace undo first"
            )
        if fingerprint(namespace.path) != plan.fingerprint:
            raise CtraceError(
                f"the rules in {namespace.name} changed since the plan was made: run advise again"
            )
        _check(plan)
        warnings = tuple(_rollback_hazards(plan))
    return Prepared(plan, namespace, warnings, present)


def describe(plan: Plan, seconds: Optional[int], enter: Sequence[str] = ()) -> str:
    """The whole plan as text: what it is for, everything that is run, and how to undo it.

    ``enter`` begins a command that has to run in the plan's namespace.
    """
    lines = [f"Plan for network namespace {plan.netns_name} (netns:{plan.netns}):"]
    for lever in plan.levers:
        what = "take out of connection tracking"
        if isinstance(lever, CtTimeout):
            what = ", ".join(f"{state} {value} s" for state, value in lever.policy)
        lines.append(f"  {lever.proto}/{lever.port} ({', '.join(lever.roles)}): {what}")
    deadline = time.time() + (seconds or 0)
    for step in _steps(plan, seconds, deadline):
        lines += ["", f"# {' '.join(step.argv)}", step.stdin.rstrip()]
    flush = [inside_of(enter, " ".join(argv)) for argv in shell_lines.flush_commands(plan)]
    if flush:
        lines += ["", "# old entries, once confirmed and only if asked (--flush)", *flush]
    lines += [
        "",
        f"# undo: ctrace undo, or by hand: {inside_of(enter, shell_lines.undo_line(plan))}",
    ]
    return "\n".join(lines) + "\n"


def start(prepared: Prepared, confirm_within: int, *, flush: bool = False) -> Trial:
    """Put the plan in place for ``confirm_within`` seconds. Takes the baseline first.

    Raises CtraceError, with everything as it was, when the kernel refuses a step.
    """
    if not SHORTEST_S <= confirm_within <= LONGEST_S:
        raise CtraceError(
            f"the time to confirm must be from {SHORTEST_S} to {LONGEST_S} seconds, "
            f"not {confirm_within}"
        )
    plan, namespace = prepared.plan, prepared.namespace
    local = netns.local_addresses(namespace.path)
    with notes.locked(), inside(namespace):
        installed = read_installed(time.time())
        if installed.state == PERMANENT:
            raise CtraceError(f"rules are applied in {namespace.name} already: run ctrace undo")
        old = notes.read(namespace.inum)
        remove(installed, old)  # a trial that was left behind
        baseline = _baseline()
        if fingerprint(namespace.path) != plan.fingerprint:
            raise CtraceError("the rules changed just now: run advise again")
        now = int(time.time())
        note = notes.Note(
            netns=namespace.inum,
            boot=notes.boot_id(),
            plan=plans.to_json(plan),
            applied=now,
            deadline=now + confirm_within,
            flush=flush,
            made=tuple(sorted(_to_be_made(plan))),
        )
        notes.write(note)
        _start_guard(namespace.inum)
        try:
            # What the baseline and the guard's start took is not added to the trial.
            left = max(1, ceil(note.deadline - time.time()))
            for step in _steps(plan, left, note.deadline):
                commands.run(step.argv, step.stdin)
        except BaseException:
            _take_back(namespace, note)
            raise
        first = health.sample(read_installed(time.time()).rules)
    return Trial(prepared, note.deadline, baseline, first, health.entries(namespace.path), local)


def check(trial: Trial) -> health.Verdict:
    """Wait until a second after the change, then say whether anything got worse.

    Called again later it judges the last second.
    """
    wait = trial.start.at + CHECK_S - time.monotonic()
    if wait > 0:
        time.sleep(wait)
    plan, namespace = trial.prepared.plan, trial.prepared.namespace
    with inside(namespace):
        installed = read_installed(time.time())
        second = health.sample(installed.rules)
    verdict = health.compare(trial.before, (trial.start, second), plan.levers)
    table = health.entries(namespace.path)
    fresh = health.new_entries(trial.table, table, plan.levers, trial.local)
    trial.start, trial.table = second, table
    if installed.state == NOTHING:
        worse = "the rules are gone: something else removed them"
    elif len(fresh) and installed.state != EXPIRED:
        worse = f"{len(fresh)} new entries of the services: the rules do not take"
    else:
        return verdict
    return health.Verdict((*verdict.worse, worse), False, verdict.seen)


def revert(trial: Trial) -> None:
    """Take the change back, whatever state it is in."""
    namespace = trial.prepared.namespace
    with notes.locked(), inside(namespace):
        _take_back(namespace, notes.read(namespace.inum))


def confirm(inum: int, *, flush: Optional[bool] = None) -> tuple[Plan, list[str]]:
    """Keep the change on trial in a namespace; then flush old entries if that was asked.

    Returns the plan and what the flush did, one line each. Raises CtraceError when
    there is no trial, or when it has expired already.
    """
    note = notes.read(inum)
    if note is None:
        raise CtraceError(f"no trial is running in netns:{inum}: ctrace applied lists what is")
    plan = plans.from_json(note.plan)
    namespace = locate(plan)
    with notes.locked(), inside(namespace):
        installed = read_installed(time.time())
        if installed.state == PERMANENT and not note.deadline:
            raise CtraceError(f"what is applied in {namespace.name} is confirmed already")
        if installed.state != TRIAL:
            raise CtraceError("the trial is over and its rules are off: apply the plan again")
        if plan.backend == "nft":
            commands.run(["nft", "-f", "-"], notrack_nft.confirm())
        else:
            for family in _families():
                text = notrack_iptables.restore(plan, family, None, jumps=False)
                commands.run(notrack_iptables.restore_argv(plan.backend, family), text)
        if read_installed(time.time()).state != PERMANENT:
            raise CtraceError("the rules did not stay: they expired meanwhile, apply again")
        notes.write(note.confirmed(listing()))
        done = flush_old(plan) if (note.flush if flush is None else flush) else []
    return plan, done


def flush_old(plan: Plan) -> list[str]:
    """Delete the entries that the plan's services left, in the namespace that we are in."""
    if not commands.have("conntrack"):
        return ["conntrack is not installed: old entries go as they time out"]
    lines = []
    for argv in shell_lines.flush_commands(plan):
        # conntrack -D exits with 1 when there was nothing to delete.
        try:
            _, _, said = commands.output(argv, timeout=FLUSH_S)
        except CtraceError as error:  # the rules are in place all the same
            said = str(error)
        lines.append(f"{' '.join(argv)}: {said.split(': ', 1)[-1] or 'nothing to delete'}")
    return lines


def locate(plan: Plan) -> Namespace:
    """The plan's namespace as it is now. Raises CtraceError when it is gone."""
    for namespace in netns.find():
        if namespace.inum == plan.netns:
            return namespace
    raise CtraceError(
        f"the plan's network namespace {plan.netns_name} (netns:{plan.netns}) is gone: "
        "run advise again"
    )


@contextmanager
def inside(namespace: Namespace) -> Iterator[None]:
    """This thread inside the namespace, and only if the path still leads to it."""
    with netns.enter(namespace.path):
        if os.stat("/proc/thread-self/ns/net").st_ino != namespace.inum:
            raise CtraceError(f"network namespace {namespace.name} is gone: run advise again")
        yield


def _steps(plan: Plan, seconds: Optional[int], deadline: float) -> list[notrack.Step]:
    """What is run, in order: accepts of other tools first, the untracking rules last."""
    steps = []
    for tool in XT_TOOLS:
        for family in _families():
            text = notrack_iptables.accepts(plan, tool, family)
            if text:
                steps.append(notrack.Step(notrack_iptables.restore_argv(tool, family), text))
    if plan.backend == "nft":
        steps.append(notrack.Step(("nft", "-f", "-"), notrack_nft.script(plan, seconds)))
        return steps
    accepts = notrack_nft.accepts(plan)
    if accepts:
        steps.append(notrack.Step(("nft", "-f", "-"), "\n".join(accepts) + "\n"))
    until = datetime.fromtimestamp(deadline, timezone.utc)
    for family in _families():
        text = notrack_iptables.restore(plan, family, until)
        steps.append(notrack.Step(notrack_iptables.restore_argv(plan.backend, family), text))
    return steps


def _check(plan: Plan) -> None:
    """Let the tools themselves say whether the kernel would take it; changes nothing."""
    for step in _steps(plan, LONGEST_S, time.time() + LONGEST_S):
        program, *rest = step.argv
        extra = "-c" if program == "nft" else "--test"
        try:
            commands.run((program, extra, *rest), step.stdin)
        except CtraceError as error:
            raise CtraceError(f"the plan can't be applied here: {error}") from None


def _baseline() -> tuple[health.Sample, health.Sample]:
    first = health.sample()
    time.sleep(BASELINE_S)
    return first, health.sample()


def _take_back(namespace: Namespace, note: Optional[notes.Note]) -> None:
    remove(read_installed(time.time()), note)
    notes.forget(namespace.inum)


def _families() -> tuple[str, ...]:
    """The families that this kernel has (ipv6.disable=1 leaves one)."""
    return ("ip", "ip6") if os.path.exists("/proc/sys/net/ipv6") else ("ip",)


def _to_be_made(plan: Plan) -> set[str]:
    """nft's names for what iptables-nft will make in ``raw`` and leave behind when emptied."""
    if plan.backend != "iptables-nft" or not commands.have("nft"):
        return set()
    made = set()
    for family in _families():
        there = nft_objects(family, "raw")
        names = (f"{family} raw", f"{family} raw PREROUTING", f"{family} raw OUTPUT")
        made |= {name for name in names if name not in there}
    return made


def _start_guard(inum: int) -> None:
    """A process of its own that tidies up at the deadline if nobody else has."""
    subprocess.Popen(
        interpreter.module("ctrace.change.guard", str(inum)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )


# ---- where taking it back would hurt -----------------------------------------

_XT_NOT_SYN = re.compile(r"! (--syn|--tcp-flags \S+ SYN)\b.*NEW.*-j (DROP|REJECT)"
                         r"|NEW.*! (--syn|--tcp-flags \S+ SYN)\b.*-j (DROP|REJECT)")  # fmt: skip


def _rollback_hazards(plan: Plan) -> Iterator[str]:
    """Where connections opened during the trial would not survive its end."""
    tcp = [lever for lever in plan.levers if isinstance(lever, Notrack) and lever.proto == "tcp"]
    if not tcp:
        return
    with open("/proc/sys/net/netfilter/nf_conntrack_tcp_loose") as file:
        if file.read().strip() == "0":
            yield (
                "nf_conntrack_tcp_loose is 0: TCP connections opened during the trial become "
                "INVALID if it is taken back"
            )
    saves = "".join(saved_rules(tool, family) for tool in XT_TOOLS for family in ("ip", "ip6"))
    if _XT_NOT_SYN.search(saves) or (commands.have("nft") and _nft_drops_new_without_syn()):
        yield (
            "a rule drops NEW packets without SYN: TCP connections opened during the trial are "
            "cut off if it is taken back"
        )
    if any("client" in lever.roles for lever in tcp):
        yield (
            "client role: if it is taken back, connections opened during the trial that wait "
            "for the server hang behind a stateful firewall until this host sends something"
        )


def _nft_drops_new_without_syn() -> bool:
    for item in nft_ruleset().get("nftables", ()):
        text = str(item.get("rule", {}).get("expr", "")) if isinstance(item, dict) else ""
        if "'new'" in text and "'flags'" in text and ("'drop'" in text or "'reject'" in text):
            return True
    return False
