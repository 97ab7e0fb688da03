"""Facts of a host whose rules were given as texts, and a copy of it to rehearse on."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Final, Optional

from ctrace.advice.facts import Facts
from ctrace.errors import CtraceError
from ctrace.given import from_line
from ctrace.record import Events, Kind, empty, join
from ctrace.rehearsal.given.rebuild import Rebuilt, rebuild
from ctrace.ruleset.reader import load

MOST: Final = 50_000
"""Entries of a dump that are kept, evenly spread."""


class Kept:
    """Entries that a dump shows, as those of a living table are at hand: their flows have to pass
    in a rehearsal without any rules of ours, or it is not faithful."""

    def __init__(self) -> None:
        self._every, self._n = 1, 0
        self._parts: list[Events] = []

    def add(self, events: Events) -> None:
        """Take the entries of a batch."""
        shown = events[(events["kind"] == Kind.EXISTING) | (events["kind"] == Kind.INSERT)]
        self._parts.append(shown[:: self._every])
        self._n += len(self._parts[-1])
        while self._n > MOST:
            self._every *= 2
            self._parts = [join(self._parts)[::2]]
            self._n = len(self._parts[0])

    def of(self, netns: int) -> Events:
        """Those of a namespace."""
        every = join(self._parts) if self._parts else empty()
        found: Events = every[every["netns"] == netns]
        return found


def copied(about: Facts) -> tuple[Facts, Optional[Rebuilt]]:
    """The facts with snapshot and rules of the copy, and what to know of it; None: no texts."""
    if not about.given or about.snapshot is not None:
        return about, None
    made = _made(about.given)
    if made.ruleset is None:
        return about, made
    return replace(about, snapshot=made.snapshot, ruleset=load(made.ruleset)), made


@lru_cache(maxsize=8)
def _made(line: str) -> Rebuilt:
    try:
        return rebuild(from_line(line))
    except (CtraceError, OSError, ValueError, LookupError) as error:
        return Rebuilt(
            None, None, f"its rules were given as text, which could not be made again: {error}"
        )
