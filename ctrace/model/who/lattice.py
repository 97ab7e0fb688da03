"""The groupings that a pair belongs to, and which few keys of them explain most.

Every key of a pair (source and service, with the process behind it) belongs to one key of each
grouping: itself, its source, the source's prefix, its service, a range of ports, a process, a
unit, a protocol, a direction, a namespace; the same stands by destination. Keys are taken one
after the other, each the one that adds most, until :data:`ENOUGH` is explained: hierarchical
heavy hitters, with the levels of a lattice instead of one tree. A more specific key is preferred
to a wider one that adds hardly more (:data:`WORTH`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.model.keys.columns import MAPPED, U64
from ctrace.model.who.weigh import Weighed
from ctrace.record import TCP_STATES

ENOUGH: Final = 0.80
"""Share that the keys together should explain."""
MOST: Final = 4
"""Keys at most; if it takes more, the load is scattered."""
NEARLY: Final = 0.95
"""Share of a key above which it counts as one protocol."""
LARGER: Final = 1.1
"""How much larger a key must be to come before another."""
LEAST: Final = 0.05
"""Share. A key that adds less is not reported."""
GAP: Final = 8
"""Ports between two that still count as one range, at most."""
NARROW: Final = 256
"""Ports of a range that counts as one service, at most; wider ones are reported as a protocol."""
WORTH: Final[dict[str, float]] = {
    "pair": 1.0, "process": 0.99, "service": 0.97, "src": 0.97, "dst": 0.97, "unit": 0.94,
    "ports": 0.90, "prefix": 0.80, "dst-prefix": 0.80, "netns": 0.72, "proto": 0.60, "net": 0.55,
    "direction": 0.50,
}  # fmt: skip
"""Weight of what a key adds, by how specific its grouping is."""
NEAR: Final = ("pair", "process", "service", "src", "unit", "ports", "prefix")
RANGES: Final = ("ports", "prefix")
FAR: Final = ("process", "service", "dst", "unit", "ports", "dst-prefix")
NEAR_ONLY: Final = ("pair", "src", "prefix", "net")
FAR_ONLY: Final = ("dst", "dst-prefix")
SAMPLED: Final = ("state", "zone")
"""Kinds that only looks at the table tell: which pairs belong to them is not known."""
SPACE: Final = ("netns",)
WIDE: Final = (*SPACE, "proto", "net", "direction")
_S16, _S32, _S48, _S56 = (np.uint64(n) for n in (16, 32, 48, 56))
_MIX: Final = np.uint64(0x9E3779B97F4A7C15)
_BYTE, _PORT = np.uint64(0xFF), np.uint64(0xFFFF)

Codes = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Key:
    """One key of a grouping; equal ones are the same from second to second."""

    kind: str
    value: tuple[int, ...]

    @property
    def netns(self) -> int:
        """The key's namespace; 0: none in particular."""
        v = self.value
        if self.kind in ("src", "dst", "prefix", "net", "dst-prefix"):
            return v[2]
        if self.kind in ("pair", "service"):
            return v[-1] >> 32
        if self.kind in ("ports", "proto"):
            return v[0] >> 16
        return v[0] if self.kind == "netns" else 0


class Lattice:
    """Each pair's key in every grouping."""

    def __init__(self, weighed: Weighed) -> None:
        self.w = weighed
        self._columns: dict[str, npt.NDArray[np.uint64]] = {}
        self._codes: dict[str, tuple[Codes, npt.NDArray[np.uint64]]] = {}

    def codes(self, kind: str) -> tuple[Codes, npt.NDArray[np.uint64]]:
        """Each pair's code in a grouping, -1 where it has none; and the keys of the codes."""
        if kind not in self._codes:
            column = self._column(kind)
            _, first, inverse = np.unique(mixed(column.T), return_index=True, return_inverse=True)
            code = np.where(column.any(axis=1), inverse.ravel(), -1)
            self._codes[kind] = code, column[first]
        return self._codes[kind]

    def _column(self, kind: str) -> npt.NDArray[np.uint64]:
        if kind not in self._columns:
            self._columns[kind] = column(self.w, kind)
        return self._columns[kind]

    def narrow(self) -> tuple[Key, ...]:
        """The few keys that explain most, from groupings that name somebody."""
        return self._choose(FAR if self.w.far else NEAR)

    def named(self) -> tuple[Key, ...]:
        """The first two keys of those that name somebody or something alone."""
        return self._choose(tuple(kind for kind in NEAR if kind not in RANGES))[:2]

    def wide(self, kinds: tuple[str, ...]) -> tuple[Key, ...]:
        """The same, including wide groupings: where one namespace is everything, it says
        nothing."""
        several = len(np.unique(self.w.meta[self.w.weight > 0] >> _S32)) > 1
        return self._choose((*NEAR, *(kind for kind in kinds if several or kind != "netns")))

    def state(self) -> tuple[Key, ...]:
        """The state that most entries are in, by a sample of them."""
        states = self.w.states
        found = max(states, key=lambda name: states[name], default="")
        return (Key("state", (TCP_STATES.index(found),)),) if found else ()

    def zone(self) -> tuple[Key, ...]:
        """The conntrack zone that most entries are in, by the same sample."""
        zones = self.w.zones
        found = max(zones, key=lambda name: zones[name], default="")
        return (Key("zone", (int(found),)),) if found else ()

    def _choose(self, kinds: tuple[str, ...]) -> tuple[Key, ...]:
        left = self.w.weight.copy()
        chosen: list[Key] = []
        covered = 0.0
        while len(chosen) < MOST and covered < ENOUGH * self.w.total:
            best: Optional[tuple[float, float, Key]] = None
            for kind in kinds:
                code, keys = self.codes(kind)
                known = code >= 0
                if not known.any():
                    continue
                gains = np.bincount(code[known], left[known], len(keys))
                at = int(gains.argmax())
                worth = float(gains[at]) * WORTH[kind]
                if best is None or worth > best[0]:
                    best = worth, float(gains[at]), Key(kind, tuple(int(x) for x in keys[at]))
            if best is None or best[1] < LEAST * self.w.total:
                break
            chosen.append(best[2])
            covered += best[1]
            left[self.members(best[2])] = 0.0
        return tuple(chosen)

    def grown(self, key: Key) -> Key:
        """The same key; for a range of ports, with its present width."""
        if key.kind != "ports":
            return key
        inside = self._column("ports")[self.members(key)]
        ranges = np.unique(inside[inside.any(axis=1)], axis=0)
        if len(ranges) != 1 or ranges[0][1] > key.value[1] or ranges[0][2] < key.value[2]:
            return key
        return Key("ports", tuple(int(x) for x in ranges[0]))

    def members(self, key: Key) -> npt.NDArray[np.bool_]:
        """Which pairs belong to a key; none of them to what only samples tell."""
        if key.kind in SAMPLED or key.kind in (NEAR_ONLY if self.w.far else FAR_ONLY):
            return np.zeros(len(self.w.weight), bool)
        column = self._column(key.kind)
        same: npt.NDArray[np.bool_] = (column == np.array(key.value, np.uint64)).all(axis=1)
        if key.kind == "ports":  # a range may have grown by a port
            netns_proto, low, high = key.value
            meta = self.w.meta
            port = meta & _PORT
            same = (meta >> _S16 == np.uint64(netns_proto)) & (port >= low) & (port <= high)
        return same

    def inside(self, keys: tuple[Key, ...]) -> npt.NDArray[np.bool_]:
        """Which pairs belong to any of these keys."""
        some = np.zeros(len(self.w.weight), bool)
        for key in keys:
            some |= self.members(key)
        return some

    def ordered(self, keys: tuple[Key, ...]) -> tuple[Key, ...]:
        """The same keys, the larger ones first; hardly larger ones stay where they are."""
        found: list[Key] = []
        shares = {key: self.covered((key,)) for key in keys if len(keys) > 1}
        for key in keys:
            at = len(found)
            while at and shares[key] > LARGER * shares[found[at - 1]]:
                at -= 1
            found.insert(at, key)
        return tuple(found)

    def covered(self, keys: tuple[Key, ...]) -> float:
        """The share that keys explain together."""
        sampled = [self._sampled(key) for key in keys if key.kind in SAMPLED]
        counted = float(self.w.weight[self.inside(keys)].sum()) / self.w.total
        return max(counted, *sampled, 0.0)

    def _sampled(self, key: Key) -> float:
        if key.kind == "zone":
            return self.w.zones.get(str(key.value[0]), 0.0)
        return self.w.states.get(TCP_STATES[key.value[0]], 0.0)

    def told(self, keys: tuple[Key, ...]) -> Iterator[tuple[Key, Parts]]:
        """What each key adds to those before it, and how many addresses and services it has."""
        left = self.w.weight.copy()
        for key in keys:
            mine = self.members(key) & (self.w.weight > 0)
            held = float(left[mine].sum())
            if key.kind in SAMPLED:
                held = self._sampled(key) * self.w.total
            left[mine] = 0.0
            known = mine & ((self.w.high != 0) | (self.w.low != 0))
            ends = len(np.unique(mixed((self.w.high[known], self.w.low[known]))))
            served = mine & ((self.w.meta >> _S16) & _BYTE != 0)
            of, code = np.unique(self.w.meta[served] & ~np.uint64(1 << 24), return_inverse=True)
            services = len(of)
            more = int(np.count_nonzero(served)) < int(np.count_nonzero(mine))
            sources = 0 if self.w.far else ends
            weight = np.bincount(code.ravel(), self.w.weight[served], services)
            most = int(weight.argmax()) if services else 0
            mostly = services and weight[most] >= NEARLY * self.w.weight[mine].sum()
            only = int(of[most]) if mostly else 0
            yield (
                key,
                Parts(
                    round(held),
                    round(held) / self.w.total,
                    sources,
                    services,
                    more,
                    only,
                    *self._one_proto(mine),
                ),
            )

    def _one_proto(self, mine: npt.NDArray[np.bool_]) -> tuple[int, int]:
        """Namespace and protocol that nearly all of these pairs' weight is of, and what is of it;
        else 0."""
        of = self.w.meta[mine] >> _S16 & ~np.uint64(1 << 8)
        found, code = np.unique(of, return_inverse=True)
        weight = np.bincount(code.ravel(), self.w.weight[mine], len(found))
        first = int(weight.argmax()) if len(found) else 0
        alone = len(found) > 0 and weight[first] >= NEARLY * weight.sum()
        return (int(found[first]), round(float(weight[first]))) if alone else (0, 0)


@dataclass(frozen=True)
class Parts:
    """What a key has."""

    held: int
    share: float
    sources: int
    services: int
    more: bool
    """Whether it has services that are too many to be kept."""
    only: int = 0
    """The service that it has alone, or nearly so, as the last word of a key; else 0."""
    proto: int = 0
    """Namespace and protocol of nearly all of it, as a key's last word without its port; else 0."""
    of_proto: int = 0
    """What of it is of these: a process or a unit may hold entries in other namespaces, too."""


def column(w: Weighed, kind: str) -> npt.NDArray[np.uint64]:
    """A grouping's keys, aligned with the pairs; a row of zeros: it has none there."""
    meta = w.meta & ~np.uint64(1 << 24)
    netns, proto = meta >> _S32, meta >> _S16
    src = (w.high != 0) | (w.low != 0)
    served = (proto & _BYTE) != 0
    parts: tuple[U64, ...] = (w.high, w.low, netns)
    keep = src
    if kind == "pair":
        keep, parts = src & served, (w.high, w.low, meta)
    elif kind in ("prefix", "dst-prefix"):
        parts = (*narrowed(w.high, w.low), netns)
    elif kind == "net":
        parts = (*widened(w.high, w.low), netns)
    elif kind == "ports":
        low, high, keep = port_ranges(meta)
        parts = (proto, low, high)
    elif kind not in ("src", "dst"):
        keep, alone = {
            "process": (w.process != 0, w.process),
            "unit": (w.unit != 0, w.unit),
            "service": (served, meta),
            "netns": (netns != 0, netns),
            "proto": (served, proto),
            "direction": (w.way != 0, w.way),
        }[kind]
        parts = (alone,)
    found: npt.NDArray[np.uint64] = np.stack(parts, axis=1) * keep[:, None].astype(np.uint64)
    return found


def mixed(words: Iterable[U64]) -> U64:
    """One number for each row of these columns: quicker to sort than rows are."""
    found: U64 = np.zeros(1, np.uint64)
    for word in words:
        found = (found ^ word) * _MIX
        found ^= found >> _S32
    return found


def narrowed(high: U64, low: U64) -> tuple[U64, U64]:
    """Both words of addresses' prefixes: 24 bits of IPv4, 64 of IPv6."""
    v4 = (high == 0) & (low & np.uint64(0xFFFFFFFF) == MAPPED)
    return np.where(v4, 0, high), np.where(v4, low & ~(_BYTE << _S56), 0)


def widened(high: U64, low: U64) -> tuple[U64, U64]:
    """The same with 16 bits of IPv4, 48 of IPv6."""
    v4 = (high == 0) & (low & np.uint64(0xFFFFFFFF) == MAPPED)
    high48 = high & np.uint64(0x0000FFFFFFFFFFFF)
    return np.where(v4, 0, high48), np.where(v4, low & ~(np.uint64(0xFFFF) << _S48), 0)


def port_ranges(meta: U64) -> tuple[U64, U64, npt.NDArray[np.bool_]]:
    """The range of ports that each pair's is in: lowest, highest, and whether it is one."""
    order = np.argsort(meta, kind="stable")
    port, group = meta[order] & _PORT, meta[order] >> _S16
    step = np.diff(port.astype(np.int64), prepend=port[:1].astype(np.int64))
    new = np.ones(len(order), bool)
    new[1:] = (group[1:] != group[:-1]) | (step[1:] > GAP)
    run = np.cumsum(new) - 1
    starts = np.flatnonzero(new)
    ends = np.append(starts[1:], len(order))[: len(starts)] - 1
    low, high = port[starts][run], port[ends][run]
    some = (high > low) & (high - low < NARROW) & (port > 0)
    back = np.empty(len(order), np.intp)
    back[order] = np.arange(len(order))
    return low[back], high[back], some[back]
