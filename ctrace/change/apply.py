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
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from typing import Final, Optional

from ctrace import interpreter
from ctrace.change import health, keep, notes, shell_lines, standing, steps
from ctrace.change.carry import HERE, cut_off, cuts_caller
from ctrace.change.steps import LONGEST_S, describe
from ctrace.change.undo import remove
from ctrace.change.watch import LISTEN_S, Watch, answering, targets
from ctrace.errors import CtraceError
from ctrace.host import commands, netns, rawlink
from ctrace.host.commands import prefix
from ctrace.host.netns import Namespace
from ctrace.plan import plan as plans
from ctrace.plan.plan import Plan
from ctrace.ruleset.installed import PERMANENT, TRIAL, listing, read_installed
from ctrace.ruleset.reader import fingerprint

__all__ = ["LONGEST_S", "describe"]

BASELINE_S: Final = 1.0
CHECK_S: Final = 1.0
"""Seconds after the change at which it is first judged; a bad one is undone at once."""
SHORTEST_S = 5
FLUSH_S: Final = 600
"""Seconds of a processor for ``conntrack -D``: it deletes some 50 000 entries a second."""


Judge = Callable[[Plan, Namespace], Plan]
Objection = Callable[[Plan, Namespace], str]
"""Judges a plan by the rules as they are now: the plan with what they need. Raises CtraceError
when it is not safe any more."""


@dataclass(frozen=True)
class Prepared:
    """A plan that this host can carry out; nothing has been changed yet."""

    plan: Plan
    namespace: Namespace
    warnings: tuple[str, ...]
    present: str
    """What exists of ours already: ``nothing``, ``trial``, ``expired`` or ``permanent``."""
    judge: Optional[Judge] = None

    @property
    def enter(self) -> tuple[str, ...]:
        """The prefix of a command that makes it run in the namespace."""
        return prefix(self.namespace)


@dataclass
class Trial:
    """A change that is in place and not confirmed; its guard watches it."""

    prepared: Prepared
    deadline: float
    """Seconds of :func:`notes.now` at which it ends."""
    watch: Watch

    @property
    def seconds_left(self) -> float:
        """Until the change reverts by itself."""
        return max(0.0, self.deadline - notes.now())


def prepare(plan: Plan, judge: Optional[Judge] = None) -> Prepared:
    """Check everything that can be checked without changing anything.

    Where the rules changed since the plan was made, ``judge`` says whether it still
    holds; without one that is refused. Raises CtraceError in one line: another host, a
    namespace that is gone, a plan that is not safe any more, a tool that is missing,
    rules that the kernel refuses, or another plan applied there.
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
        wanted = plan
        plan = _as_rules_are(plan, namespace, judge, "since the plan was made")
        if present == PERMANENT and not (
            note
            and note.plan in (plans.to_json(plan), plans.to_json(wanted))
            and note.listing == listing()
        ):
            raise CtraceError(
                f"ctrace has {', '.join(installed.services) or 'rules'} applied in "
                f"{namespace.name} already: run ctrace undo first"
            )
        steps.check(plan)
        warnings = (*cuts_caller(plan), *cut_off(plan))
        if plan != wanted:
            warnings = (
                "the rules changed since the plan was made, and were judged again: it "
                "is as safe with them",
                *warnings,
            )
    return Prepared(plan, namespace, warnings, present, judge)


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
    with notes.locked(namespace.inum) as lock, inside(namespace):
        installed = read_installed(time.time())
        if installed.state == PERMANENT:
            raise CtraceError(f"rules are applied in {namespace.name} already: run ctrace undo")
        old = notes.read(namespace.inum)
        remove(installed, old, lock)  # a trial that was left behind
        before = _baseline(plan)
        works = answering(targets(plan, netns.local_addresses(HERE)))
        plan = _as_rules_are(plan, namespace, prepared.judge, "just now")
        note = notes.Note(
            netns=namespace.inum,
            boot=notes.boot_id(),
            plan=plans.to_json(plan),
            applied=int(time.time()),
            deadline=notes.now() + confirm_within,
            flush=flush,
            made=tuple(sorted(steps.to_be_made(plan))),
            before=tuple(before.rates.items()),
            waiting=before.waiting,
            probes=tuple(sorted(works)),
        )
        notes.write(note)
        try:
            start_guard(namespace.inum)
            # What the baseline and the guard's start took is not added to the trial.
            left = max(1, ceil(note.deadline - notes.now()))
            steps.carry_out(plan, left, lock)
            way = netns.Way(namespace.inum, namespace)
            watch = Watch(plan, way, before, note.probes)
            notes.write(replace(note, placed=True))
        except BaseException:
            _take_back(namespace, note, lock)
            raise
    return Trial(replace(prepared, plan=plan), note.deadline, watch)


def check(trial: Trial) -> health.Verdict:
    """Wait until a second after the change, then report whether anything got worse.

    A later call judges the last second. The guard does the same by itself.
    """
    until = trial.watch.last.at + CHECK_S
    verdict = trial.watch.look(max(LISTEN_S, until - time.monotonic()))
    told = fate(trial)
    return health.Verdict((told,), False, verdict.seen) if told else verdict


def fate(trial: Trial) -> str:
    """Why the change is no longer on trial; empty while it is."""
    note = notes.read(trial.prepared.namespace.inum)
    if note is None:
        return "the trial is over: its rules were removed"
    if note.deadline == trial.deadline:
        return ""
    if note.deadline:
        return "another trial has taken its place"
    return note.said or "another ctrace confirmed it meanwhile: it stays"


def revert(trial: Trial) -> bool:
    """Take the change back; False where somebody else has confirmed or replaced it."""
    namespace = trial.prepared.namespace
    with notes.locked(namespace.inum) as lock, inside(namespace):
        note = notes.read(namespace.inum)
        if note is not None and not note.over and note.deadline != trial.deadline:
            return False
        _take_back(namespace, note, lock)
    return True


def confirm(inum: int, *, flush: Optional[bool] = None) -> tuple[Plan, list[str]]:
    """Keep the change on trial in a namespace; then flush old entries if that was requested.

    Returns the plan and what the flush did, one line each. Raises CtraceError when
    there is no trial, or when it has expired already.
    """
    note = notes.read(inum)
    if note is None:
        raise CtraceError(
            f"no trial is running in netns:{inum}: ctrace applied lists what is there"
        )
    plan = plans.from_json(note.plan)
    namespace = locate(plan)
    with notes.locked(inum), inside(namespace):
        installed = read_installed(time.time())
        if installed.state == PERMANENT and not note.deadline:
            raise CtraceError(f"what is applied in {namespace.name} is confirmed already")
        if installed.state != TRIAL:
            why = f" ({note.said})" if note.said else ""
            raise CtraceError(f"the trial is over and its rules are off{why}: apply it again")
        keep.make_lasting(plan)
        if read_installed(time.time()).state != PERMANENT:
            raise CtraceError("the rules did not stay: they expired meanwhile, apply again")
        notes.write(note.confirmed(listing()))
    if standing.Standing(plan).depends and not notes.guarded(inum):
        start_guard(inum)
    with inside(namespace):
        done = flush_old(plan) if (note.flush if flush is None else flush) else []
    return plan, done


def look_again(inum: int, judge: Judge, objection: Objection) -> None:
    """A confirmed change among rules that are others than it was judged by: off, if it is not
    safe any more; one that is off already: put back. Raises CtraceError, also where it could not be
    judged: then it stays as it is."""
    note = notes.read(inum)
    if note is None or note.off:
        put_back(inum, judge)
        return
    plan = plans.from_json(note.plan)
    namespace = locate(plan)
    with inside(namespace):
        now = fingerprint(HERE)
    if now == plan.fingerprint:
        return
    why = objection(plan, namespace)
    with notes.locked(inum), inside(namespace):
        if notes.read(inum) != note:
            return
        if why:
            keep.off(plan)
            said = f"off since {time.strftime('%H:%M:%S')}: {why}"
            notes.write(replace(note, said=said, off=True))
        else:
            plan = replace(plan, fingerprint=now)
            notes.write(replace(note, plan=plans.to_json(plan)))


def put_back(inum: int, judge: Judge) -> None:
    """Judge a confirmed change that is off by the present rules, and put it back in place.

    Raises CtraceError, and the note says why, when it is not safe now.
    """
    note = notes.read(inum)
    if note is None or not note.off:
        return
    plan = plans.from_json(note.plan)
    try:
        namespace = locate(plan)
        plan = judge(plan, namespace)
        with notes.locked(inum) as lock, inside(namespace):
            if notes.read(inum) != note:
                return
            plan = _as_rules_are(plan, namespace, judge, "just now")
            remove(read_installed(time.time()), note, lock)
            steps.carry_out(plan, keep.LEASE_S, lock)
            keep.make_lasting(plan)
            kept = replace(note.confirmed(listing()), plan=plans.to_json(plan))
            was = note.said.split("; ")[0].split(": its services")[0]
            again = f"put back at {time.strftime('%H:%M:%S')}; it was {was}"
            notes.write(replace(kept, said=again))
    except CtraceError as error:
        with notes.locked(inum):
            if notes.read(inum) == note:
                said = f"{note.said.split('; ')[0]}; it was not put back: {error}"
                notes.write(replace(note, said=said))
        raise


def flush_old(plan: Plan) -> list[str]:
    """Delete the old entries of the plan's services, in the namespace that this thread is in."""
    if not commands.have("conntrack"):
        return ["conntrack is not installed: old entries go as they time out"]
    lines = []
    for argv in shell_lines.flush_commands(plan):
        # conntrack -D exits with 1 when there was nothing to delete.
        try:
            _, _, said = commands.output(argv, patience=FLUSH_S)
        except CtraceError as error:  # the rules are in place all the same
            said = str(error)
        lines.append(f"{' '.join(argv)}: {said.split(': ', 1)[-1] or 'nothing to delete'}")
    return lines


def _as_rules_are(plan: Plan, namespace: Namespace, judge: Optional[Judge], when: str) -> Plan:
    """The plan, judged again where the rules are others, from inside. Raises CtraceError."""
    if fingerprint(HERE) == plan.fingerprint:
        return plan
    if judge is None:
        raise CtraceError(f"the rules in {namespace.name} changed {when}: run advise again")
    return judge(plan, namespace)


def locate(plan: Plan) -> Namespace:
    """The plan's namespace as it is now. Raises CtraceError when it has gone."""
    for namespace in netns.find():
        if namespace.inum == plan.netns:
            return namespace
    raise CtraceError(
        f"the plan's network namespace {plan.netns_name} (netns:{plan.netns}) is gone: "
        "run advise again"
    )


@contextmanager
def inside(namespace: Namespace) -> Iterator[None]:
    """This thread inside the namespace."""
    with netns.Way(namespace.inum, namespace).held() as there:
        if there is None:
            raise CtraceError(f"network namespace {namespace.name} is gone: run advise again")
        with netns.enter(there.path):
            yield


def _baseline(plan: Plan) -> health.Before:
    first = health.sample(plan.levers)
    time.sleep(BASELINE_S)
    return health.usual(first, health.sample(plan.levers), plan.levers)


def _take_back(namespace: Namespace, note: Optional[notes.Note], lock: int) -> None:
    remove(read_installed(time.time()), note, lock)
    notes.forget(namespace.inum)


def start_guard(inum: int) -> None:
    """A process of its own that watches the change (:mod:`ctrace.change.guard`).

    It is the guard as soon as this returns, or once that of an earlier change has ended. In the
    change's own namespace it would keep that alive. Raises CtraceError.
    """
    lock = notes.claim(inum)
    locks = () if lock is None else (lock,)
    argv = interpreter.module("ctrace.change.guard", str(inum), *map(str, locks))

    def begin() -> None:
        subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            pass_fds=locks,
            start_new_session=True,
        )

    try:
        try:
            rawlink.aside(begin, "/proc/1/ns/net")
        except PermissionError:  # no CAP_SYS_ADMIN: there is no other namespace then
            begin()
    except (OSError, RuntimeError) as error:  # no process, thread, memory or descriptor left
        why = getattr(error, "strerror", error)
        raise CtraceError(f"the change's guard cannot be started: {why}") from None
    finally:
        for fd in locks:
            os.close(fd)
