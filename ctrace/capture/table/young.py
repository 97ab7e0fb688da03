"""How young connections fare, by sampling: most entries outlive their connection.

A closed TCP connection's entry stays for 120 s of TIME_WAIT, so its end tells its
life two minutes late. A look at a few recent inserts, one second and again some
seconds after they began, tells it now: bounded work, about a microsecond each.
"""

from __future__ import annotations

from random import Random
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from ctrace.errors import CtraceError
from ctrace.record import PART, Events, Kind, in_part, join, words

SAMPLE: Final = 128
"""New entries taken into the sample for each second."""
AGES: Final = (1.0, 4.0, 16.0)
"""Seconds after the insert at which an entry is looked at, until it is found closed."""
CLOSED: Final = (7, 8)
"""TCP states TIME_WAIT and CLOSE."""
TUPLE: Final = slice(2, 11)
"""The words of a record that hold both tuples and the ports."""


class Looks(Protocol):
    """A capture that can look at entries by their ``ct``."""

    def look(self, entries: list[int]) -> None:
        """SAMPLED records of them come with the next poll."""


class Sampler:
    """Chooses recent inserts and asks for a look when each is due."""

    def __init__(self, capture: Looks, seed: int = 1) -> None:
        self._capture = capture
        self._random = Random(seed)  # numpy's would cost the start its import
        self._waiting: list[list[Events]] = [[] for _ in AGES]
        self._asked: Events | None = None
        self._room = SAMPLE
        self._works = True

    def take(self, events: Events) -> Events:
        """The events without SAMPLED rows of other entries; new inserts join the sample.

        A row belongs to another entry when the address that was asked for has been reused.
        """
        sampled = events["kind"] == int(Kind.SAMPLED)
        if sampled.any():
            good = self._matching(events, np.flatnonzero(sampled))
            keep = ~sampled
            keep[good] = True
            events = events[keep]
        if self._room <= 0 or not self._works:
            return events
        inserts = np.flatnonzero(events["kind"] == int(Kind.INSERT))
        if len(inserts):
            if len(inserts) > PART * self._room:  # a flood, of which only these are timed
                inserts = inserts[in_part(events["ct"][inserts])]
            count = min(self._room, len(inserts))
            self._room -= count
            chosen = sorted(self._random.sample(range(len(inserts)), count))
            self._waiting[0].append(events[inserts[chosen]])
        return events

    def look(self, now: int) -> None:
        """Look at what is due; call it about once a second. ``now``: boot clock, ns."""
        self._room = SAMPLE
        due = []
        for stage, age in reversed(list(enumerate(AGES))):  # none twice in one look
            rows = join(self._waiting[stage])
            ready = rows["ts"] <= now - int(age * 1e9)
            self._waiting[stage] = [rows[~ready]]
            due.append(rows[ready])
            if stage + 1 < len(AGES):
                self._waiting[stage + 1].append(rows[ready])
        asked = join(due)
        self._asked = asked
        if not len(asked) or not self._works:
            return
        try:
            self._capture.look(asked["ct"].tolist())
        except CtraceError:
            # BPF_PROG_TEST_RUN of this kind is refused here: no sample, nothing else is lost
            self._works = False

    def _matching(self, events: Events, at: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        asked = self._asked
        if asked is None or not len(asked):
            return at[:0]
        found = events[at]
        order = np.argsort(asked["ct"], kind="stable")
        place = order[
            np.searchsorted(asked["ct"], found["ct"], sorter=order).clip(max=len(asked) - 1)
        ]
        same = (words(asked[place])[:, TUPLE] == words(found)[:, TUPLE]).all(axis=1)
        same &= (asked["ct"][place] == found["ct"]) & (asked["netns"][place] == found["netns"])
        self._forget(found[same & np.isin(found["state"], CLOSED)])
        mine: npt.NDArray[np.intp] = at[same]
        return mine

    def _forget(self, closed: Events) -> None:
        """A closed connection need not be looked at again."""
        for stage, parts in enumerate(self._waiting):
            rows = join(parts)
            self._waiting[stage] = [rows[~np.isin(rows["ct"], closed["ct"])]]
