"""The answer to "who", kept stable from second to second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.model.snapshot import Holder
from ctrace.model.who.lattice import ENOUGH, SPACE, WIDE, Key, Lattice, Parts
from ctrace.model.who.names import Names
from ctrace.model.who.weigh import Weighed

STILL: Final = 0.72
"""Share above which an earlier answer stays."""
KNOWN: Final = 0.5
"""Share of what is held whose processes or zone became known, from which it is answered anew."""
PATIENCE: Final = 5
"""Consecutive times that a shorter answer must be found before it replaces the present one."""


@dataclass(frozen=True)
class Answer:
    """The keys that explain most, most telling first."""

    keys: tuple[Key, ...] = ()
    holders: tuple[Holder, ...] = ()
    """Each with what it adds to those before it."""
    words: tuple[str, ...] = ()
    """Each in words, without its namespace."""
    parts: tuple[Parts, ...] = ()
    """Each with what it is made of."""
    beyond: Optional[npt.NDArray[np.bool_]] = None
    """Which of the pairs that hold anything, in order, belong to no key; None: unknown."""


@dataclass
class Who:
    """The answer for one measure."""

    at: int = -1
    """When it was found."""
    answer: Answer = field(default_factory=Answer)
    _kept: tuple[Key, ...] = ()
    _far: bool = False
    _shorter: int = 0
    _known: float = 0.0
    """Share of what is held whose processes were known when it was chosen, or since then, and of
    the largest zone."""

    def look(
        self, near: Weighed, names: Names, far: Optional[Callable[[], Weighed]] = None
    ) -> Answer:
        """The keys that explain most now; none if nothing is held.

        ``far`` provides the same by destination, for when sources and services do not explain
        enough.
        """
        if near.total <= 0 or not len(near.weight):
            self._kept, self.answer = (), Answer()
            return self.answer
        lattices = {False: Lattice(near)}

        def lattice(of_far: bool) -> Lattice:
            if of_far not in lattices:
                lattices[of_far] = Lattice(far() if far else near)
            return lattices[of_far]

        kept = tuple(lattice(self._far).grown(key) for key in self._kept)
        known = float(near.weight[near.process != 0].sum()) / near.total
        known += max(near.zones.values(), default=0.0)
        if known > self._known + KNOWN:
            kept = ()  # chosen while hardly a process, or no zone, was known
        self._known = min(self._known, known) if kept else known
        if not kept or lattice(self._far).covered(kept) < STILL:
            self._kept, self._far = choose(lattice, far is not None)
            self._shorter = 0
        else:
            self._kept = kept  # none is shorter than one
            other, of_far = choose(lattice, far is not None) if len(kept) > 1 else (kept, False)
            better = len(other) < len(kept) and lattice(of_far).covered(other) >= ENOUGH
            self._shorter = self._shorter + 1 if better else 0
            if self._shorter >= PATIENCE:
                self._kept, self._far, self._shorter = other, of_far, 0
        self._kept = lattice(self._far).ordered(self._kept)
        chosen = lattice(self._far)
        parts = list(chosen.told(self._kept))
        told = [names.holder(*one) for one in parts]
        words = tuple(names.text(*one) for one in parts)
        beyond = None if self._far else ~chosen.inside(self._kept)
        self.answer = Answer(self._kept, tuple(told), words, tuple(one for _, one in parts), beyond)
        return self.answer


def choose(lattice: Callable[[bool], Lattice], has_far: bool) -> tuple[tuple[Key, ...], bool]:
    """The keys that together explain :data:`ENOUGH`, and whether they are by destination.

    Destinations are tried where sources and services do not explain enough, then zones, then
    namespaces, then states, then wider keys; failing all, the few keys that explain most.
    """
    near = lattice(False)
    chosen, zone = near.narrow(), near.zone()
    if near.covered(chosen) >= ENOUGH:
        network = chosen[0].kind == "prefix"
        # a tenant's zone tells more than a network that several tenants have
        if (network or len(chosen) > 1) and near.covered(zone) >= ENOUGH:
            return zone, False
        few = near.named() if network and len(chosen) == 1 else ()
        return few if few and near.covered(few) >= ENOUGH else chosen, False
    if has_far:
        others = lattice(True).narrow()
        if lattice(True).covered(others) >= ENOUGH:
            return others, True
    for wider in (zone, near.wide(SPACE), near.state(), near.wide(WIDE)):
        if near.covered(wider) >= ENOUGH:
            return wider, False
    return chosen, False
