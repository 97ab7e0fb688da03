"""The answers to "who" for a model, one for each measure and scope."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from ctrace.model.composition import error
from ctrace.model.groups import Group, unit_number
from ctrace.model.scope import Scope
from ctrace.model.snapshot import Composition, Culprit
from ctrace.model.who.answer import Answer, Who
from ctrace.model.who.names import Names
from ctrace.model.who.rows import culprits, rest, several
from ctrace.model.who.weigh import Weighed, weighed

KEPT: Final = 8
"""Answers that are kept from second to second."""
ESTIMATED: Final = 10
"""Services with an estimated number of sources, where those are too many to have rows."""
FEW: Final = 5
"""Rows shown at least, if there are that many keys."""
SMALL: Final = 0.01
"""Share of what is held below which a pair beside the keys gets no row of its own."""

Groups = Callable[[str, Scope], Group]


class Asked:
    """Answers of one model, found once for each moment."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._who: dict[tuple[str, Scope], Who] = {}

    def answer(self, measure: str, scope: Scope, until: int, names: Names) -> Answer:
        """Who has most of ``held``, ``drops`` or ``table_seconds`` of these flows."""
        where = (measure, scope)
        while len(self._who) >= KEPT and where not in self._who:
            self._who.pop(next(iter(self._who)))
        who = self._who.setdefault(where, Who())
        if who.at == until:
            return who.answer
        who.at = until

        def far() -> Weighed:
            target, dst = self._groups("target", scope), self._groups("dst", scope)
            return weighed(target, self._groups("service", scope), dst, measure, far=True)

        if scope.dst:
            return who.look(far(), names)
        near = weighed(
            self._groups("pair", scope),
            self._groups("service", scope),
            self._groups("src", scope),
            measure,
            sampled=self._sampled(measure, scope),
        )
        return who.look(near, names, None if scope.src else far)

    def _sampled(self, measure: str, scope: Scope) -> tuple[dict[str, float], dict[str, float]]:
        """TCP states and zones by their share of what is held, less two standard errors."""
        if measure != "held" or scope != scope.of_namespace:
            return {}, {}
        space = self._groups("netns", scope)
        alone = space.n == 1  # the zones of different namespaces have nothing in common
        if not alone:
            space = space.regrouped("all", np.zeros(space.n, np.intp), space.key[:1], ("all",))
        made_of = space.composition(0) if space.n else Composition()
        if not made_of.n:
            return {}, {}

        def shares(found: tuple[tuple[str, int], ...]) -> dict[str, float]:
            each = {name: n / made_of.n for name, n in found}
            return {name: share - error(share, made_of.n) for name, share in each.items()}

        return shares(made_of.states), shares(made_of.zones if alone else ())

    def several(self, scope: Scope, until: int, names: Names) -> tuple[tuple[Culprit, str], ...]:
        """Of the keys that hold most, those of several services of one protocol, in words."""
        answer = self.answer("held", scope, until, names)
        return tuple(several(answer, lambda name: self._groups(name, scope), names))

    def rows(
        self, measure: str, scope: Scope, until: int, names: Names
    ) -> tuple[list[Culprit], int]:
        """The keys that explain most, then single pairs that hold much; and how many have none."""
        answer = self.answer(measure, scope, until, names)
        found = list(culprits(answer, lambda name: self._groups(name, scope), names))
        if scope.dst:
            return found, 0
        pair = self._groups("pair", scope)
        weight = pair.measure(measure)
        others = rest(answer, weight)
        total = float(weight.sum()) or 1.0
        shown = [
            at for n, at in enumerate(others) if weight[at] >= SMALL * total or n + len(found) < FEW
        ]
        return [*found, *(pair.culprit(int(at)) for at in shown)], len(others) - len(shown)


def names_of(
    netns: Mapping[int, str], pods: Mapping[str, str], pair: Group, service: Group
) -> Names:
    """The names of keys at this moment."""

    def process(key: int) -> str:
        one = pair.owner_of(key)
        return f"{one.comm or '?'}[{one.pid}]" if one else ""

    return Names(
        netns=netns,
        pods=pods,
        process=process,
        unit=lambda number: next((one for one in pair.units() if unit_number(one) == number), ""),
        scattered={
            int(service.key[at, 2]): service.sources(int(at)) or 0
            for at in (service.order("held", ESTIMATED) if pair.floor else ())
        },
    )
