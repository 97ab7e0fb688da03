"""What the keys of "who" are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from ctrace.model.causes.words import plural
from ctrace.model.keys.columns import has_port
from ctrace.model.snapshot import Holder
from ctrace.model.who.lattice import SAMPLED, Key, Parts
from ctrace.record import TCP_STATES, Direction, address_text, proto_name

WAYS: Final = {
    1 << int(way): name
    for way, name in (
        (Direction.IN, "incoming"),
        (Direction.OUT, "outgoing"),
        (Direction.FORWARD, "forwarded"),
    )
}
BITS: Final = {"prefix": (24, 64), "dst-prefix": (24, 64), "net": (16, 48)}
"""Length of a prefix, of IPv4 and of IPv6."""


@dataclass(frozen=True)
class Names:
    """What keys are called."""

    netns: Mapping[int, str]
    """Names of the namespaces shown; with only one, it need not be named."""
    process: Callable[[int], str]
    """By its number; empty if it is not known."""
    unit: Callable[[int], str]
    scattered: Mapping[int, int]
    """Estimated sources of a service, by its meta word, where they are too many to keep."""
    pods: Mapping[str, str] = field(default_factory=dict)
    """Address to the pod or container that has it."""

    def holder(self, key: Key, parts: Parts) -> Holder:
        """A key in words, with its namespace where there are several."""
        netns = key.netns
        where = f" in {self.netns.get(netns, netns)}" if netns and len(self.netns) > 1 else ""
        where = where if key.kind != "netns" else ""
        text = self.text(key, parts) + where
        return Holder(key.kind, text, parts.share, parts.held, netns, parts.sources)

    def text(self, key: Key, parts: Parts) -> str:
        """A key with the number of its scattered parts: ``tcp/443 from 1,204 sources``."""
        label, kind = self.label(key), key.kind
        to = ("more than " if parts.more else "") + plural(parts.services, "service")
        if kind == "pair":
            return f"{service(key.value[2])} from {self._whose(*key.value[:2])}"
        if kind in ("dst", "dst-prefix"):
            return f"{to} {label}"
        sources = max(parts.sources, self._estimated(key))
        if kind in ("service", "ports") and sources:
            # what each port of a range has is estimated, not what all have together
            least = "more than " if kind == "ports" and sources > parts.sources else ""
            return f"{label} from {least}{plural(sources, 'source')}"
        if kind in ("prefix", "net"):
            return f"{label} ({plural(sources, 'source')}) to {to}"
        if kind in ("process", "unit") and parts.only:
            alone = parts.services == 1 and not parts.more
            label += f"{'' if alone else ' mostly'} on {service(parts.only)}"
        label += " (by a sample)" if kind in SAMPLED else ""
        return f"{label} to {to}" if kind in ("src", "proto", "direction") else label

    def label(self, key: Key) -> str:
        """The key alone: the same from second to second."""
        v = key.value
        spelled: dict[str, Callable[[], str]] = {
            "process": lambda: self.process(v[0]) or "a process that has ended",
            "unit": lambda: self.unit(v[0]) or "a unit that has ended",
            "netns": lambda: f"namespace {self.netns.get(v[0], v[0])}",
            "pair": lambda: f"{_address(v[0], v[1])} -> {service(v[2])}",
            "src": lambda: self._whose(v[0], v[1]),
            "service": lambda: service(v[0]),
            "ports": lambda: f"{proto_name(v[0] & 0xFF)}/{v[1]}-{v[2]}",
            "proto": lambda: f"all {proto_name(v[0] & 0xFF)}",
            "direction": lambda: WAYS.get(v[0], "traffic"),
            "zone": lambda: f"zone {v[0]}",
            "state": lambda: f"tcp in {TCP_STATES[v[0]]}",
        }
        if key.kind in spelled:
            return spelled[key.kind]()
        return ("to " if key.kind.startswith("dst") else "") + network(key.kind, v[0], v[1])

    def _whose(self, high: int, low: int) -> str:
        """An address, with the pod that has it."""
        address = _address(high, low)
        return f"{address} ({self.pods[address]})" if address in self.pods else address

    def _estimated(self, key: Key) -> int:
        """Sources of a service, or of the port of a range that has most, by estimate."""
        if key.kind != "ports":
            return self.scattered.get(key.value[0], 0) if key.kind == "service" else 0
        where, low, high = key.value
        guesses = (
            n
            for meta, n in self.scattered.items()
            if meta >> 16 == where and low <= meta & 0xFFFF <= high
        )
        return max(guesses, default=0)


def network(kind: str, high: int, low: int) -> str:
    """An address, or a prefix with its length."""
    address = _address(high, low)
    bits = BITS.get(kind)
    return f"{address}/{bits[0] if '.' in address else bits[1]}" if bits else address


def service(meta: int) -> str:
    """``tcp/8063``, ``icmp``."""
    proto = meta >> 16 & 0xFF
    return f"{proto_name(proto)}/{meta & 0xFFFF}" if has_port(proto) else proto_name(proto)


def _address(high: int, low: int) -> str:
    return address_text(np.array([high, low], np.uint64).tobytes())
