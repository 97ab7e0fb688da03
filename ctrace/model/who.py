"""Who: the fewest keys, of whatever grouping, that explain most of what is held.

Every key of a pair (source and service, with the process behind it) belongs to one key of each
grouping: itself, its source, the source's prefix, its service, a range of ports, a process, a
unit, a protocol, a namespace. Keys are taken one after the other, each the one that adds most,
until :data:`ENOUGH` is explained: hierarchical heavy hitters, with the levels of a lattice
instead of one tree. A more specific key is preferred to a wider one that adds hardly more
(:data:`WORTH`). What was chosen stays while it still explains :data:`STILL`, so that the answer
does not change from second to second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.model.groups import Group
from ctrace.model.keys import MAPPED, U64, has_port
from ctrace.model.snapshot import Holder
from ctrace.record import address_text, proto_name

ENOUGH: Final = 0.80
"""Share that is to be explained."""
STILL: Final = 0.72
"""Share above which an earlier answer stays."""
MOST: Final = 4
"""Keys; what takes more is scattered."""
LEAST: Final = 0.05
"""A key that adds less is not told."""
PATIENCE: Final = 5
"""Times in a row that a shorter answer has to be found before it takes the place of another."""
GAP: Final = 8
"""Ports between two of one range at most."""
NARROW: Final = 256
"""Ports of a range that is one service's; wider ones are told as a protocol."""
WORTH: Final[dict[str, float]] = {
    "pair": 1.0, "process": 0.99, "service": 0.97, "src": 0.97, "unit": 0.94, "ports": 0.90,
    "prefix": 0.80, "netns": 0.72, "proto": 0.60, "net": 0.55,
}  # fmt: skip
"""How much of what a key adds counts, by how specific its grouping is."""
WIDE: Final = ("netns", "proto", "net")
_S16, _S32, _S48, _S56 = (np.uint64(n) for n in (16, 32, 48, 56))
_BYTE, _PORT = np.uint64(0xFF), np.uint64(0xFFFF)

F64 = npt.NDArray[np.float64]
Codes = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Weighed:
    """Pairs with what each holds; ``total`` also has what no pair is known of."""

    high: U64
    low: U64
    """Words of the source's address; 0 and 0 where it is not known."""
    meta: U64
    """Namespace, protocol and port, as in a key; the service is 0 where it is not known."""
    process: U64
    """Who opened it, or listens for it; 0: nobody known."""
    unit: U64
    """A number for that process' container or unit; 0: none."""
    weight: F64
    total: float


@dataclass(frozen=True)
class Key:
    """One key of a grouping; equal ones are the same from second to second."""

    kind: str
    value: tuple[int, ...]


@dataclass
class Who:
    """The answer for one measure, kept from second to second."""

    _kept: tuple[Key, ...] = ()
    _shorter: int = 0

    def look(self, weighed: Weighed, names: Names) -> tuple[Holder, ...]:
        """The keys that explain most now, each with what it adds; empty if nothing is held."""
        if weighed.total <= 0 or not len(weighed.weight):
            self._kept = ()
            return ()
        lattice = Lattice(weighed)
        before = lattice.covered(self._kept)
        if not self._kept or before < STILL:
            self._kept, self._shorter = lattice.choose(), 0
        else:
            other = lattice.choose()
            better = len(other) < len(self._kept) and lattice.covered(other) >= ENOUGH
            self._shorter = self._shorter + 1 if better else 0
            if self._shorter >= PATIENCE:
                self._kept, self._shorter = other, 0
        return lattice.told(self._kept, names)


@dataclass
class Told:
    """An answer with when it was found."""

    who: Who = field(default_factory=Who)
    at: int = -1
    holders: tuple[Holder, ...] = ()


class Lattice:
    """Each pair's key in every grouping."""

    def __init__(self, weighed: Weighed) -> None:
        self.w = weighed
        self._columns = dict(columns(weighed))
        self._codes: dict[str, tuple[Codes, npt.NDArray[np.uint64]]] = {}

    def codes(self, kind: str) -> tuple[Codes, npt.NDArray[np.uint64]]:
        """Each pair's code in a grouping, -1 where it has none; and the keys of the codes."""
        if kind not in self._codes:
            column = self._columns[kind]
            has = column.any(axis=1)
            packed = np.ascontiguousarray(column).view([("", np.uint64)] * column.shape[1]).ravel()
            keys, inverse = np.unique(packed, return_inverse=True)
            code = np.where(has, inverse.ravel(), -1)
            self._codes[kind] = code, keys.view(np.uint64).reshape(len(keys), -1)
        return self._codes[kind]

    def choose(self) -> tuple[Key, ...]:
        """The keys that together explain :data:`ENOUGH`, or the few that explain most.

        Wide groupings count only where the others don't get so far.
        """
        chosen = self._choose([kind for kind in WORTH if kind not in WIDE])
        if self.covered(chosen) >= ENOUGH:
            return chosen
        several = len(np.unique(self.w.meta[self.w.weight > 0] >> _S32)) > 1
        wide = self._choose([kind for kind in WORTH if several or kind != "netns"])
        return wide if self.covered(wide) >= ENOUGH else chosen

    def _choose(self, kinds: list[str]) -> tuple[Key, ...]:
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

    def members(self, key: Key) -> npt.NDArray[np.bool_]:
        """Which pairs belong to a key."""
        column = self._columns[key.kind]
        same: npt.NDArray[np.bool_] = (column == np.array(key.value, np.uint64)).all(axis=1)
        if key.kind == "ports":  # a range may have grown by a port
            netns_proto, low, high = key.value
            meta = self.w.meta
            port = meta & _PORT
            same = (meta >> _S16 == np.uint64(netns_proto)) & (port >= low) & (port <= high)
        return same

    def covered(self, keys: tuple[Key, ...]) -> float:
        """The share that keys explain together."""
        some = np.zeros(len(self.w.weight), bool)
        for key in keys:
            some |= self.members(key)
        return float(self.w.weight[some].sum()) / self.w.total

    def told(self, keys: tuple[Key, ...], names: Names) -> tuple[Holder, ...]:
        """What each key adds to those before it, and how many sources and services it has."""
        left = self.w.weight.copy()
        found = []
        for key in keys:
            mine = self.members(key) & (self.w.weight > 0)
            held = float(left[mine].sum())
            left[mine] = 0.0
            known = mine & ((self.w.high != 0) | (self.w.low != 0))
            pairs = np.stack((self.w.high[known], self.w.low[known]), axis=1)
            sources = len(np.unique(pairs.view([("", np.uint64)] * 2))) if len(pairs) else 0
            served = self.w.meta[mine & ((self.w.meta >> _S16) & _BYTE != 0)]
            services = len(np.unique(served & ~np.uint64(1 << 24)))
            more = len(served) < int(np.count_nonzero(mine))
            parts = Parts(round(held), held / self.w.total, sources, services, more)
            found.append(names.holder(key, parts))
        return tuple(found)


@dataclass(frozen=True)
class Parts:
    """What a key has."""

    held: int
    share: float
    sources: int
    services: int
    more: bool
    """Whether it has services that are too many to be kept."""

    @property
    def to(self) -> str:
        """``1,204 services``, ``more than 80 services``."""
        return ("more than " if self.more else "") + _many(self.services, "service")


@dataclass(frozen=True)
class Names:
    """What keys are called."""

    netns: Mapping[int, str]
    """Of every namespace shown; with one only, it needs no name."""
    process: Mapping[int, str]
    unit: Mapping[int, str]
    scattered: Mapping[int, int]
    """Estimated sources of a service, by its meta word, where they are too many to keep."""

    def holder(self, key: Key, parts: Parts) -> Holder:
        """A key in words."""
        text, netns = self._text(key, parts)
        where = f" in {self.netns.get(netns, netns)}" if netns and len(self.netns) > 1 else ""
        return Holder(key.kind, f"{text}{where}", parts.share, parts.held, netns, parts.sources)

    def _text(self, key: Key, parts: Parts) -> tuple[str, int]:
        """The key's words, and its namespace (0: not one's)."""
        v = key.value
        if key.kind in ("process", "unit"):
            names = self.process if key.kind == "process" else self.unit
            return names.get(v[0], "a process that has ended"), 0
        if key.kind == "netns":
            return f"namespace {self.netns.get(v[0], v[0])}", 0
        if key.kind in ("src", "prefix", "net"):
            return _of_sources(key, parts), v[2]
        if key.kind == "pair":
            return f"{service(v[2])} from {_address(v[0], v[1])}", v[2] >> 32
        return self._of_services(key, parts)

    def _of_services(self, key: Key, parts: Parts) -> tuple[str, int]:
        v = key.value
        if key.kind == "proto":
            return f"{proto_name(v[0] & 0xFF)} to {parts.to}", v[0] >> 16
        if key.kind == "service":
            sources = max(parts.sources, self.scattered.get(v[0], 0))
            return f"{service(v[0])} from {_many(sources, 'source')}", v[0] >> 32
        guesses = [n for meta, n in self.scattered.items()
                   if meta >> 16 == v[0] and v[1] <= meta & 0xFFFF <= v[2]]  # fmt: skip
        sources = max(parts.sources, *guesses, 0)
        name = proto_name(v[0] & 0xFF)
        return f"{name}/{v[1]}-{v[2]} from {_many(sources, 'source')}", v[0] >> 16


def _of_sources(key: Key, parts: Parts) -> str:
    address = _address(key.value[0], key.value[1])
    if key.kind == "src":
        return f"{address} to {parts.to}"
    v4 = "." in address
    bits = {"prefix": 24 if v4 else 64, "net": 16 if v4 else 48}[key.kind]
    return f"{address}/{bits} ({_many(parts.sources, 'source')}) to {parts.to}"


def service(meta: int) -> str:
    """``tcp/8063``, ``icmp``."""
    proto = meta >> 16 & 0xFF
    return f"{proto_name(proto)}/{meta & 0xFFFF}" if has_port(proto) else proto_name(proto)


def columns(w: Weighed) -> dict[str, npt.NDArray[np.uint64]]:
    """Each grouping's keys, aligned with the pairs; a row of zeros: it has none there."""
    meta = w.meta & ~np.uint64(1 << 24)
    netns, proto = meta >> _S32, meta >> _S16
    src = (w.high != 0) | (w.low != 0)
    served = (proto & _BYTE) != 0
    v4 = (w.high == 0) & (w.low & np.uint64(0xFFFFFFFF) == MAPPED)
    narrow = np.where(v4, w.low & ~(_BYTE << _S56), 0)
    wide = np.where(v4, w.low & ~(np.uint64(0xFFFF) << _S48), 0)
    high48 = w.high & np.uint64(0x0000FFFFFFFFFFFF)

    def rows(keep: npt.NDArray[np.bool_], *parts: U64) -> npt.NDArray[np.uint64]:
        return np.stack(parts, axis=1).astype(np.uint64) * keep[:, None].astype(np.uint64)

    low, high, some = _ranges(meta)
    return {
        "pair": rows(src & served, w.high, w.low, meta),
        "process": rows(w.process != 0, w.process),
        "unit": rows(w.unit != 0, w.unit),
        "src": rows(src, w.high, w.low, netns),
        "service": rows(served, meta),
        "ports": rows(some, proto, low, high),
        "prefix": rows(src, np.where(v4, 0, w.high), narrow, netns),
        "net": rows(src, np.where(v4, 0, high48), wide, netns),
        "netns": rows(netns != 0, netns),
        "proto": rows(served, proto),
    }


def _ranges(meta: U64) -> tuple[U64, U64, npt.NDArray[np.bool_]]:
    """The range of ports that each pair's is in: lowest, highest, and whether it is one."""
    order = np.argsort(meta, kind="stable")
    port, group = meta[order] & _PORT, meta[order] >> _S16
    step = np.diff(port.astype(np.int64), prepend=port[:1].astype(np.int64))
    new = np.ones(len(order), bool)
    new[1:] = (group[1:] != group[:-1]) | (step[1:] > GAP)
    run = np.cumsum(new) - 1
    starts = np.flatnonzero(new)
    ends = np.append(starts[1:], len(order)) - 1
    low, high = port[starts][run], port[ends][run]
    some = (high > low) & (high - low < NARROW) & (port > 0)
    back = np.empty(len(order), np.intp)
    back[order] = np.arange(len(order))
    return low[back], high[back], some[back]


def _address(high: int, low: int) -> str:
    return address_text(np.array([high, low], np.uint64).tobytes())


def _many(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def weighed(pair: Group, service_group: Group, src: Group, measure: str) -> Weighed:
    """Pairs with what each holds (``held``) or had refused (``drops``).

    What a service, or a source, has beyond its pairs (they are too many to have rows) comes as
    rows that know only that; of the two, the ones that are more concentrated.
    """
    weight, whole = _measure(pair, measure), _measure(service_group, measure)
    theirs = _measure(src, measure)
    total = max(float(weight.sum()), float(whole.sum()), float(theirs.sum()))
    if measure == "held":
        total = max(total, float(pair.total_held))
    by_service = _beyond(whole, service_group.key[:, 2], weight, pair.key[:, 2])
    names = (src.key[:, 0] * np.uint64(31) + src.key[:, 1]) ^ (src.key[:, 2] >> _S32)
    of_pair = (pair.key[:, 0] * np.uint64(31) + pair.key[:, 1]) ^ (pair.key[:, 2] >> _S32)
    by_source = _beyond(theirs, names, weight, of_pair)
    some = weight > 0
    parts = [(pair.key[some], weight[some])]
    if max(by_service.max(initial=0.0), by_source.max(initial=0.0)) > 0.01 * total:
        if by_source.max(initial=0.0) > by_service.max(initial=0.0):
            more = by_source > 0
            key = src.key[more].copy()
            key[:, 2] &= np.uint64(0xFFFFFFFF_00000000)
            parts.append((key, by_source[more]))
        else:
            more = by_service > 0
            key = service_group.key[more].copy()
            key[:, :2] = 0
            parts.append((key, by_service[more]))
    keys = np.concatenate([key for key, _ in parts])
    owners = np.zeros((len(keys), 2), np.uint64)
    owners[: int(some.sum())] = pair.processes()[some]
    return Weighed(
        keys[:, 0], keys[:, 1], keys[:, 2], owners[:, 0], owners[:, 1],
        np.concatenate([w for _, w in parts]), total,
    )  # fmt: skip


def _measure(group: Group, measure: str) -> F64:
    column = group.held if measure == "held" else group.sums[measure]
    return np.maximum(column.astype(np.float64), 0.0)


def _beyond(whole: F64, key: U64, weight: F64, of_pair: U64) -> F64:
    """What each key has that none of its pairs has."""
    order = np.argsort(key)
    at = np.minimum(np.searchsorted(key[order], of_pair), max(len(key) - 1, 0))
    if not len(key):
        return np.zeros(0)
    found = key[order][at] == of_pair
    sums = np.bincount(order[at[found]], weight[found], len(key))
    return np.maximum(whole - sums, 0.0)
