"""Which container or pod an address belongs to: the one that has it in its network namespace.

This gives names to flows that the host only forwards, which no local process opened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Final, Optional, TypeVar

import numpy as np

from ctrace.batch import TYPED_IN, Netns
from ctrace.filters import network_words
from ctrace.model.groups import Group
from ctrace.model.snapshot import Culprit, Victim

NO_POD: Final = "(no container's address)"
NO_SPACE: Final = "(no pod's address)"
Row = TypeVar("Row", Culprit, Victim)
LEFT: Final = 4096
"""Addresses remembered from namespaces that went."""
Known = Mapping[str, str]
"""Address to the name of a container, pod or named namespace: ``k8s:shop/cart-0``."""


class Pods:
    """Pods by their addresses: those that only one namespace has, without local ones.

    An address stays its pod's after the namespace went, until another namespace comes with it.
    """

    def __init__(self) -> None:
        self._spaces: dict[int, Netns] = {}
        self._left: dict[str, str] = {}
        self._known: Optional[dict[str, str]] = None

    def update(self, told: Mapping[int, Netns]) -> None:
        """Take a batch's names; a namespace that went is told without addresses."""
        for inum, space in told.items():
            before = self._spaces.pop(inum, None)
            if space.addresses:
                self._spaces[inum] = space
            elif before:
                self._left.update(dict.fromkeys(before.addresses, _name(before)))
        while len(self._left) > LEFT:
            del self._left[next(iter(self._left))]
        if told:
            self._known = None

    def _look(self) -> dict[str, str]:
        living: dict[str, str] = {}
        for space in self._spaces.values():
            for address in space.addresses:
                living[address] = "" if address in living else _name(space)
        found = {**self._left, **living}
        return {address: name for address, name in found.items() if name and _global(address)}

    @property
    def known(self) -> Known:
        """Of every address that is one container's."""
        if self._known is None:
            self._known = self._look()
        return self._known


def _name(space: Netns) -> str:
    """Empty for the host itself, and for one without a name; of several hosts they begin with
    the host's own (:mod:`ctrace.recording.merge`)."""
    host = space.inum == TYPED_IN or re.search(r"(?:^|:)(?:init$|netns:)", space.name)
    return "" if host else space.name


def _global(address: str) -> bool:
    one = ip_address(address)
    return not (one.is_loopback or one.is_link_local or one.is_unspecified)


def told(rows: tuple[Row, ...], known: Known) -> tuple[Row, ...]:
    """The rows with the pod of their source or, where rows have none, of their destination."""
    if not known:
        return rows
    return tuple(replace(row, pod=known.get(row.src or row.dst, "")) for row in rows)


def by_pod(base: Group, known: Known, whole: bool) -> Group:
    """Sources by pod; with ``whole`` by the Kubernetes namespace of their pods."""
    name_of = {
        tuple(network_words(ip_network(address))[0].tolist()): _space(name) if whole else name
        for address, name in known.items()
    }
    none = NO_SPACE if whole else NO_POD
    names = [name_of.get((high, low), none) for high, low in base.key[:, :2].tolist()]
    said, codes = np.unique(np.array(names, object), return_inverse=True)
    key = np.zeros((len(said), 3), np.uint64)
    key[:, 0] = np.arange(len(said))
    return base.regrouped("pod", codes.ravel(), key, tuple(said.tolist()))


def _space(name: str) -> str:
    """``k8s:shop`` of ``k8s:shop/cart-0``."""
    space, slash, _ = name.partition("/")
    return space if slash and re.search(r"(?:^|:)k8s:", space) else NO_SPACE
