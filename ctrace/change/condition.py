"""How an applied change fares: what `applied`, `advise`, `doctor` and `metrics` report.

It comes from the change's note and a few messages to the kernel, so it can be read at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Optional

from ctrace.change import notes
from ctrace.change.standing import Standing
from ctrace.change.steps import named
from ctrace.errors import CtraceError, TryAgain
from ctrace.host import netns
from ctrace.host.netns import Namespace
from ctrace.plan import plan as plans
from ctrace.ruleset.reader import fingerprint
from ctrace.ruleset.tags import Reader

ON_TRIAL, HOLDS, OFF, BROKEN, OVER = "on-trial", "holds", "off", "broken", "over"
UNWATCHED: Final = "unwatched"
UNNOTED: Final = (
    "ctrace has no note of its rules, so nothing watches them (a saved firewall that was loaded "
    "again, or an emptied /run/ctrace): run ctrace undo, then advise and apply"
)
STATES: Final = (ON_TRIAL, HOLDS, UNWATCHED, OFF, BROKEN, OVER)


@dataclass(frozen=True)
class Condition:
    """The condition of one namespace's change."""

    netns: int
    name: str
    state: str
    """``on-trial``; ``holds``: confirmed and whole; ``unwatched``: the same, but its guard has
    ended, so nothing sees to it when the rules around it change; ``off``: confirmed, but its
    services are tracked for now; ``broken``: NOTRACK without the accepts that it needs, or among
    rules with which it is not safe, so its services may be cut off; ``over``: taken away by
    something else than ctrace undo."""
    services: tuple[str, ...]
    """``tcp/80``; for what is dropped, ``drop-source 192.0.2.1``."""
    told: str
    """What to know, in one sentence; empty: nothing."""


Objection = Callable[[plans.Plan, Namespace], str]
"""Why a plan in place would not be made like this with the present rules; empty: it would. Raises
TryAgain when it could not be judged."""


def conditions(objection: Optional[Objection] = None) -> list[Condition]:
    """The condition of every change, by namespace. Reads only.

    With ``objection``, a change that was judged by other rules than the present ones is judged
    again, and rules that have no note are looked for everywhere; without, in init alone, which
    is where a firewall that was saved is loaded.
    """
    with suppress(CtraceError):
        noted = {note.netns: note for note in (notes.every() if notes.any_yet() else [])}
        found = []
        for at, space in enumerate(netns.find()):
            note = noted.get(space.inum)
            if note is not None:
                found.append(_held(note, space, objection))
            elif objection is not None or at == 0:
                found.append(_unnoted(space))
        return sorted((one for one in found if one is not None), key=lambda one: one.netns)
    return []


def of(space: Namespace, objection: Optional[Objection] = None) -> str:
    """What to know of the change in a namespace; empty: nothing."""
    note = notes.read(space.inum) if notes.any_yet() else None
    found = _unnoted(space) if note is None else _held(note, space, objection)
    return "" if found is None else found.told


def _unnoted(space: Namespace) -> Optional[Condition]:
    """Rules of ours without a note; None: there are none, or they cannot be read."""
    with suppress(CtraceError, OSError), netns.Way(space.inum, space).held() as there:
        if there is not None:
            with Reader(there.path) as reader:
                if reader.has_ours():
                    return Condition(space.inum, space.name, UNWATCHED, (), UNNOTED)
    return None


def _held(
    note: notes.Note, space: Namespace, objection: Optional[Objection]
) -> Optional[Condition]:
    """None where the namespace has gone."""
    try:
        with netns.Way(space.inum, space).held() as there:
            return None if there is None else _of(note, there, objection)
    except CtraceError as error:
        told = f"its rules cannot be read: {error}"
        return Condition(note.netns, space.name, BROKEN, (), told)


def _of(note: notes.Note, space: Namespace, objection: Optional[Objection]) -> Condition:
    try:
        plan = plans.from_json(note.plan)
    except CtraceError:
        told = "another version of ctrace wrote its plan: run ctrace undo, then apply it anew"
        return Condition(note.netns, space.name, UNWATCHED, (), told)
    services = tuple(named(lever) for lever in plan.levers)
    state, told = _state(note, plan, space)
    if state in (HOLDS, UNWATCHED) and objection is not None:
        state, told = _judged((state, told), plan, space, objection)
    return Condition(note.netns, space.name, state, services, told)


def _judged(
    found: tuple[str, str], plan: plans.Plan, space: Namespace, objection: Objection
) -> tuple[str, str]:
    """Whether a change that is in place is still right."""
    try:
        if fingerprint(space.path) == plan.fingerprint:
            return found
    except CtraceError as error:
        return BROKEN, f"its rules cannot be read: {error}"
    try:
        why = objection(plan, space)
    except TryAgain as error:
        later = f"the rules around it changed since it was judged; judging it again failed: {error}"
        return found[0], "; ".join(part for part in (later, found[1]) if part)
    if why:
        return BROKEN, f"{why}; ctrace undo tracks its services again"
    again = "the rules around it changed since it was judged: judged again now, it is safe"
    return found[0], "; ".join(part for part in (again, found[1]) if part)


def _state(note: notes.Note, plan: plans.Plan, space: Namespace) -> tuple[str, str]:
    if note.over:
        return OVER, note.said
    standing = Standing(plan)
    try:
        there, missing = standing.look(space.path)
    except CtraceError as error:
        return BROKEN, f"its rules cannot be read: {error}"
    if note.deadline and not note.placed:
        found = ON_TRIAL, ""
    elif note.off and (there or plan.backend != "nft"):  # iptables' rules go while it is off
        found = OFF, note.said
    elif not there:
        found = OVER, "something else removed its rules"
    elif missing:
        found = (
            BROKEN,
            (
                f"its accepts are missing ({', '.join(missing)}): its services may be cut off, "
                "ctrace undo tracks them again"
            ),
        )
    elif note.deadline:
        found = ON_TRIAL, note.said
    elif standing.needs and not notes.guarded(note.netns):
        found = (
            OFF,
            (
                "nothing watches its accepts any more, so its services are tracked again: run "
                "ctrace undo, then apply the plan"
            ),
        )
    elif standing.depends and not notes.guarded(note.netns):
        found = (
            UNWATCHED,
            (
                "nothing sees whether it stays right when the rules around it change: run ctrace "
                "undo, then apply the plan"
            ),
        )
    else:
        found = HOLDS, note.said
    return found
