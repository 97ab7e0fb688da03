"""The keys of "who" as culprits, and coarser groupings made of existing ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from ctrace.model.groups import Group, unit_number
from ctrace.model.keys.columns import NETNS_MASK
from ctrace.model.snapshot import Culprit
from ctrace.model.who.answer import Answer
from ctrace.model.who.lattice import SAMPLED, Key, narrowed, port_ranges, widened
from ctrace.model.who.names import Names, network, service
from ctrace.model.who.pods import Known, by_pod
from ctrace.record import proto_name

BASE: Final = {
    "pair": "pair", "src": "src", "prefix": "src", "net": "src", "dst": "dst", "dst-prefix": "dst",
    "service": "service", "ports": "service", "proto": "service", "netns": "netns",
    "process": "process", "unit": "container", "direction": "service",
    "pod": "src", "pod-namespace": "src",
}  # fmt: skip
"""The grouping that a key's flows are summed by; a coarser one is made from it."""
COARSER: Final = ("prefix", "ports", "proto", "direction", "pod", "pod-namespace")
"""Groupings that can be asked for and are made of others."""
ONE: Final = ("pair", "src", "dst", "service", "netns")
"""Kinds with a key that is also a key of their base grouping."""
SEVERAL: Final = ("process", "unit", "ports", "src", "prefix", "net")
"""Kinds of keys that may hold several services."""
_S16, _S32 = np.uint64(16), np.uint64(32)
_PORT = np.uint64(0xFFFF)

Mask = npt.NDArray[np.bool_]


def culprits(answer: Answer, groups: Callable[[str], Group], names: Names) -> tuple[Culprit, ...]:
    """Each key with all that it holds, also what others have too; its words in ``words``."""
    return tuple(
        replace(
            _culprit(key, groups, names, holder.share, holder.held),
            key=names.label(key),
            words=words,
            distinct_src=max(holder.sources, names.scattered.get(key.value[0], 0)) or None,
        )
        for key, holder, words in zip(answer.keys, answer.holders, answer.words)
    )


def several(
    answer: Answer, groups: Callable[[str], Group], names: Names
) -> Iterator[tuple[Culprit, str]]:
    """The keys that hold several services of one protocol, each with its words."""
    found = zip(answer.keys, answer.holders, answer.parts, answer.words)
    for key, holder, parts, words in found:
        if key.kind not in SEVERAL or parts.only or not parts.proto:
            continue
        one = _culprit(key, groups, names, holder.share, holder.held)
        sources = max(holder.sources, names.scattered.get(key.value[0], 0)) or None
        yield (
            replace(
                one,
                key=names.label(key),
                proto=proto_name(parts.proto & 0xFF),
                netns=parts.proto >> 16,
                held=parts.of_proto,
                distinct_src=sources,
            ),
            words,
        )


def _culprit(
    key: Key, groups: Callable[[str], Group], names: Names, share: float, held: int
) -> Culprit:
    sampled = Culprit(key.kind, share=share, held=held)
    if key.kind in SAMPLED:
        return sampled
    group = groups(BASE[key.kind])
    if key.kind == "direction":
        ways = group.by_direction()
        at = np.flatnonzero(ways.key[:, 0] == np.uint64(key.value[0]))
        return ways.culprit(int(at[0])) if at.size else sampled
    mine = members(key, group)
    at = np.flatnonzero(mine)
    if not at.size:
        return sampled
    if key.kind in ONE:
        return group.culprit(int(at[0]))
    meta = {"ports": key.value[0] << 16, "proto": key.value[0] << 16}.get(key.kind, key.netns << 32)
    whole = np.array([[0, 0, meta]], np.uint64)
    one = group.regrouped(key.kind, np.where(mine, 0, -1), whole, (names.label(key),))
    found = one.culprit(0)
    return replace(found, owner=group.owner_of(key.value[0])) if key.kind == "process" else found


def members(key: Key, group: Group) -> Mask:
    """Which keys of its base belong to a key."""
    words, v = group.key, [np.uint64(one) for one in key.value]
    high, low, meta = words[:, 0], words[:, 1], words[:, 2]
    found: Mask
    if key.kind == "pair":
        found = (high == v[0]) & (low == v[1]) & (meta == v[2])
    elif key.kind in ("src", "dst", "prefix", "dst-prefix", "net"):
        narrow = {"src": None, "dst": None, "net": widened}.get(key.kind, narrowed)
        one, two = narrow(high, low) if narrow else (high, low)
        found = (one == v[0]) & (two == v[1]) & (meta >> _S32 == v[2])
    elif key.kind == "service":
        found = meta == v[0]
    elif key.kind == "ports":
        port = meta & _PORT
        found = (meta >> _S16 == v[0]) & (port >= v[1]) & (port <= v[2])
    elif key.kind == "proto":
        found = meta >> _S16 == v[0]
    elif key.kind == "netns":
        found = meta >> _S32 == v[0]
    elif key.kind == "process":
        found = high == v[0]
    else:
        found = np.array([unit_number(group.label(at)) == key.value[0] for at in range(group.n)])
    return found


def coarser(name: str, base: Group, known: Known) -> Group:
    """One of :data:`COARSER`."""
    if name in ("pod", "pod-namespace"):
        return by_pod(base, known, name != "pod")
    if name == "direction":
        return base.by_direction()
    key = base.key.copy()
    if name == "prefix":
        key[:, 0], key[:, 1] = narrowed(key[:, 0], key[:, 1])
        key[:, 2] &= NETNS_MASK
    elif name == "proto":
        key[:, 2] &= ~_PORT
    else:
        low, high, some = port_ranges(key[:, 2])
        key[:, 2] = np.where(some, (key[:, 2] & ~_PORT) | low, key[:, 2])
        key[:, 1] = np.where(some, high, 0)
    whole, codes = np.unique(key, axis=0, return_inverse=True)
    said = tuple(_said(name, *(int(word) for word in one)) for one in whole)
    return base.regrouped(name, codes.ravel(), whole, said)


def _said(name: str, high: int, low: int, meta: int) -> str:
    if name == "prefix":
        return network(name, high, low)
    if name == "proto":
        return proto_name(meta >> 16 & 0xFF)
    return f"{service(meta)}-{low}" if low else service(meta)


def rest(answer: Answer, measure: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Pairs that no key has, those that hold most first; ``measure`` is what each holds."""
    some = np.flatnonzero(measure > 0)
    if answer.beyond is None or len(answer.beyond) < some.size:
        return some[:0]
    others = some[answer.beyond[: some.size]]
    found: npt.NDArray[np.intp] = others[np.argsort(-measure[others], kind="stable")]
    return found
