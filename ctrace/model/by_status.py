"""How many of the held entries have some status: estimated, since a status changes while an entry
lives.

Counts by key are of births and ends, and at its birth no entry is ASSURED or has seen a reply.
Looks at a sample of the held entries show which share has the status; that share of what is held is
reported, with two standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Final, Optional

from ctrace.errors import UsageError
from ctrace.model.snapshot import Composition, Culprit, Snapshot

TOLD: Final = ("ASSURED", "SEEN_REPLY", "UNREPLIED")
"""Statuses that come and go while an entry lives, and that looks can show."""


def check(words: Iterable[str]) -> None:
    """Raises UsageError where no entry can have all of these, or nothing looks at entries."""
    asked = {word.upper() for word in words}
    for word in sorted(asked - {*TOLD}):
        raise UsageError(
            f"ctrace cannot tell which held entries are {word[:20]!r}: use "
            f"{', '.join(TOLD[:-1])} or {TOLD[-1]}, or conntrack -L -u"
        )
    if "UNREPLIED" in asked and len(asked) > 1:
        raise UsageError("no entry is UNREPLIED and has seen a reply: ask for one of them")


def share(made_of: Composition, words: Iterable[str]) -> tuple[Optional[float], float]:
    """The share that has all of these, and two standard errors of it; None while unknown."""
    asked = {word.upper() for word in words}
    if "UNREPLIED" in asked:
        return made_of.unreplied, made_of.unreplied_error or 0.0
    if "ASSURED" in asked:  # which comes after the first reply
        return made_of.assured, made_of.assured_error or 0.0
    without = made_of.unreplied
    return None if without is None else 1 - without, made_of.unreplied_error or 0.0


def narrowed(snapshot: Snapshot, words: tuple[str, ...], services: Iterable[Culprit]) -> Snapshot:
    """The snapshot reduced to entries with that status; ``services`` hold all of them.

    Keys without a single look are left out; the error of the total includes them.
    """
    check(words)
    total = unknown = 0
    squares = 0.0
    for one in services:
        part, error = share(one.composition, words)
        if part is None:
            unknown += one.held
            continue
        total += round(part * one.held)
        squares += (error * one.held) ** 2
    rows = [row for one in snapshot.culprits if (row := _row(one, words, total))]
    if snapshot.sort.removeprefix("-") == "held":
        rows.sort(key=lambda one: one.held, reverse=not snapshot.sort.startswith("-"))
    return replace(
        snapshot,
        culprits=tuple(rows),
        culprits_total=len(rows),
        held_total=total,
        held_total_error=math.ceil(math.sqrt(squares)) + unknown,
        victims=(),
    )


def _row(one: Culprit, words: tuple[str, ...], total: int) -> Optional[Culprit]:
    part, error = share(one.composition, words)
    held = round((part or 0.0) * one.held)
    if not held:
        return None
    return replace(
        one, held=held, held_error=math.ceil(error * one.held), share=held / max(total, held)
    )
