"""Which tables the keys of a grouping are summed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Optional

import numpy as np

from ctrace.model.keys.columns import NETNS_MASK, SERVICE_MASK
from ctrace.model.keys.level import Level
from ctrace.model.keys.levels import Levels
from ctrace.model.scope import Scope

_ALL: Final = ~np.uint64(0)


@dataclass(frozen=True)
class Part:
    """One table's contribution to a group: which words of its keys make the group's key."""

    level: Level
    address: bool
    meta: np.uint64
    hash: str
    """The field of a look that finds its row in ``level``."""
    owned: Optional[bool] = None
    """Only rows of flows that a local process opened (True) or did not (False)."""
    counted: bool = True
    """Whether its numbers are summed; otherwise it has only detail."""


def narrow_part(name: str, levels: Levels, scope: Scope) -> Optional[Part]:
    """The one table that can resolve a scope for this grouping; None: the usual ones can."""
    masks = {"src": NETNS_MASK, "dst": NETNS_MASK, "pair": _ALL, "netns": NETNS_MASK}
    one = {"target": "dst"}.get(name, name)
    mask = masks.get(name, SERVICE_MASK)
    if scope.src or (scope.by_service and name == "src"):
        return Part(levels.pair, name in ("src", "pair"), mask, "pair")
    if scope.dst or (scope.by_service and name == "dst"):
        return Part(levels.target, one == "dst", mask, "target")
    return None


def beyond(parts: tuple[Part, ...], levels: Levels, scope: Scope) -> Optional[int]:
    """For a narrowed group: flows that have no row in its table, so may be any key's."""
    rest = {id(levels.pair): levels.source, id(levels.target): levels.destination}
    if len(parts) > 1 or not (scope.src or scope.dst or scope.by_service):
        return None
    coarse = rest[id(parts[0].level)].table
    coarse.drain()
    mine = scope.of_namespace.rows(coarse.key)
    return int((coarse.counters["inserts"] + coarse.counters["existing"])[mine].sum())


def parts_of(name: str, levels: Levels) -> tuple[Part, ...]:
    """The tables that a grouping is summed up from: together they have every flow once."""
    pair, target = levels.pair, levels.target
    service, space = levels.service, levels.space
    found = {
        "pair": (Part(pair, True, _ALL, "pair"),),
        "target": (Part(target, True, SERVICE_MASK, "target"),),
        "src": (Part(pair, True, NETNS_MASK, "pair"), Part(levels.source, True, NETNS_MASK, "src")),
        "dst": (
            Part(target, True, NETNS_MASK, "target"),
            Part(levels.destination, True, NETNS_MASK, "dst"),
        ),
        "service": (
            Part(target, False, SERVICE_MASK, "target"),
            Part(service, False, SERVICE_MASK, "service"),
        ),
        "netns": (
            Part(target, False, NETNS_MASK, "target", counted=False),
            Part(service, False, NETNS_MASK, "service", counted=False),
            Part(space, False, NETNS_MASK, "space"),
        ),
    }
    return found.get(name) or (
        Part(levels.process, True, NETNS_MASK, "opener"),
        Part(target, False, SERVICE_MASK, "target", owned=False),
        Part(service, False, SERVICE_MASK, "service", owned=False),
    )
