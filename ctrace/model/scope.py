"""Which flows a snapshot is about: one namespace, one service, a network at either end.

The model keeps sums by (source, service), (destination, service) and the like, not single flows. A
scope picks the sums that can answer it; one that no sums can answer is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import numpy as np
import numpy.typing as npt

from ctrace.filters import Network, network_words

_BY = {"process": "processes", "container": "containers", "pair": "source and service",
       "src": "source", "dst": "destination", "service": "service",
       "netns": "namespace", "prefix": "prefix", "pod": "pod",
       "pod-namespace": "namespace of pods", "ports": "ports", "proto": "protocol",
       "direction": "direction"}  # fmt: skip


@dataclass(frozen=True)
class Scope:
    """An unset field lets everything pass."""

    netns: Optional[int] = None
    """Inode number; an unknown one has no flows."""
    proto: Optional[int] = None
    port: Optional[int] = None
    src: tuple[Network, ...] = ()
    """Networks that must all contain the original source."""
    dst: tuple[Network, ...] = ()

    @property
    def of_namespace(self) -> Scope:
        """Only its namespace: table, causes and totals are for all of that."""
        return Scope(netns=self.netns)

    @property
    def by_service(self) -> bool:
        """Whether it selects by protocol or port."""
        return self.proto is not None or self.port is not None

    def refusal(self, group: str) -> str:
        """Why rows of that grouping can't be narrowed this way, and what to do; empty: they can."""
        ends = [name for name, nets in (("src", self.src), ("dst", self.dst)) if nets]
        if len(ends) == 2:
            return "src and dst together can't be told: filter by one, or start ctrace with -s, -d"
        fields = [*ends, *(["proto and port"] if self.by_service else [])]
        if not fields:
            return ""
        of_source = ("src", "prefix", "pair", "pod", "pod-namespace")
        other = {"dst": "src", **dict.fromkeys(of_source, "dst")}.get(group)
        if group in ("process", "container"):
            return (
                f"rows by {_BY[group]} can't be filtered by {fields[0]}: "
                "press g to group by service or source"
            )
        if other in ends:
            by = "destination" if other == "dst" else "source"
            return f"rows by {_BY[group]} can't be filtered by {other}: press g to group by {by}"
        return ""

    def rows(self, key: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which keys (address, address, namespace | proto | port) pass, but for ``dst``:
        ``src`` is what the address is held against."""
        keep = np.ones(len(key), bool)
        meta = key[:, 2]
        if self.netns is not None:
            keep &= meta >> np.uint64(32) == np.uint64(self.netns)
        if self.proto is not None:
            keep &= (meta >> np.uint64(16)) & np.uint64(0xFF) == np.uint64(self.proto)
        if self.port is not None:
            keep &= meta & np.uint64(0xFFFF) == np.uint64(self.port)
        for network in (*self.src, *self.dst):
            value, bits = network_words(network)
            keep &= ((key[:, :2] & bits) == value).all(axis=1)
        return keep
