"""What every pair holds or had refused, plus what no pair accounts for."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ctrace.model.groups import Group
from ctrace.model.keys.columns import NETNS_MASK, U64

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Weighed:
    """Pairs with what each holds; ``total`` includes what no pair accounts for."""

    high: U64
    low: U64
    """Words of the address, the source's or (``far``) the destination's; 0 and 0: not known."""
    meta: U64
    """Namespace, protocol and port, as in a key; the service is 0 where it is not known."""
    process: U64
    """Who opened it, or listens for it; 0: nobody known."""
    unit: U64
    """A number for that process' container or unit; 0: none."""
    weight: F64
    total: float
    way: U64
    """The direction that its flows take, as a bit; 0: several, or not known."""
    far: bool = False
    states: dict[str, float] = field(default_factory=dict)
    """TCP states by the share of all entries that is in each: of a sample, less its error."""
    zones: dict[str, float] = field(default_factory=dict)
    """Conntrack zones by the same, where there are several."""


def weighed(
    pair: Group,
    service: Group,
    end: Group,
    measure: str,
    *,
    far: bool = False,
    sampled: tuple[dict[str, float], dict[str, float]] = ({}, {}),
) -> Weighed:
    """Pairs with what each holds (``held``, ``table_seconds``) or had refused (``drops``).

    ``pair`` are the keys by address and service, ``end`` those by that address alone (``far``:
    the destination's). What a service, or an address, has beyond its pairs (they are too many to
    have rows) comes as rows that know only that; of the two, the ones that are more concentrated.
    ``sampled``: the shares of states, and of zones.
    """
    weight, whole = pair.measure(measure), service.measure(measure)
    theirs = end.measure(measure)
    total = max(float(weight.sum()), float(whole.sum()), float(theirs.sum()))
    if measure == "held":
        total = max(total, float(pair.total_held))
    if total <= 0:
        none, nothing = np.zeros(0, np.uint64), np.zeros(0)
        return Weighed(none, none, none, none, none, nothing, 0.0, none, far)
    some = np.flatnonzero(weight > 0)
    key, held = pair.key[some], weight[some]
    by_service = _beyond(whole, service.key[:, 2], held, key[:, 2])
    by_end = _beyond(theirs, _named(end.key), held, _named(key))
    parts = [(key, held, _way(pair)[some])]
    if max(by_service.max(initial=0.0), by_end.max(initial=0.0)) > 0.01 * total:
        of_end = by_end.max(initial=0.0) > by_service.max(initial=0.0)
        beyond, group = (by_end, end) if of_end else (by_service, service)
        more = np.flatnonzero(beyond > 0)
        key = group.key[more].copy()
        if of_end:
            key[:, 2] &= NETNS_MASK
        else:
            key[:, :2] = 0
        parts.append((key, beyond[more], _way(group)[more]))
    keys = np.concatenate([key for key, _, _ in parts])
    owners = np.zeros((len(keys), 2), np.uint64)
    owners[: some.size] = pair.processes(some)
    return Weighed(
        keys[:, 0],
        keys[:, 1],
        keys[:, 2],
        owners[:, 0],
        owners[:, 1],
        np.concatenate([w for _, w, _ in parts]),
        total,
        np.concatenate([way for _, _, way in parts]),
        far,
        *sampled,
    )


def _way(group: Group) -> U64:
    """The one direction of each key's flows."""
    ways = group.ways().astype(np.uint64)
    alone: U64 = ways * (ways & (ways - np.uint64(1)) == 0)
    return alone


def _named(key: U64) -> U64:
    """A number for address and namespace."""
    found: U64 = (key[:, 0] * np.uint64(31) + key[:, 1]) ^ (key[:, 2] >> np.uint64(32))
    return found


def _beyond(whole: F64, key: U64, weight: F64, of_pair: U64) -> F64:
    """What each key has that none of its pairs has."""
    order = np.argsort(key)
    at = np.minimum(np.searchsorted(key[order], of_pair), max(len(key) - 1, 0))
    if not len(key):
        return np.zeros(0)
    found = key[order][at] == of_pair
    sums = np.bincount(order[at[found]], weight[found], len(key))
    return np.maximum(whole - sums, 0.0)
