"""Translated connections whose insert failed because no source port was free for them.

Source NAT that finds no free tuple goes on with one that is taken
(get_unique_tuple in nf_nat_core.c), and the entry is refused when it is confirmed
(__nf_conntrack_confirm). The same counter rises when two packets of one flow race, but then
the other packet's insert is seen at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Optional

import numpy as np

from ctrace.model.causes.facts import Failure
from ctrace.model.keys.columns import PORTED, U64, Window, key_hash, spread
from ctrace.model.keys.scatter import Rows
from ctrace.record import Kind, Reason, Status, address_text, proto_name

KEYS: Final = 256
"""Destinations that are remembered; beyond that, those with the fewest failures go."""
ADDRESSES: Final = 8
"""Translated addresses remembered per destination."""


@dataclass
class _Target:
    failed: int = 0
    translated: dict[str, None] = field(default_factory=dict)


class SourcePorts:
    """Failures by (protocol, destination, port, namespace)."""

    def __init__(self) -> None:
        self._targets: dict[tuple[str, str, int, int], _Target] = {}

    def feed(self, w: Window) -> None:
        """Count a window's failures that no racing packet of the same flow explains."""
        at = w.because(Reason.CLASH, Reason.FAILED)
        at = at[w.kinds(at) == int(Kind.INSERT_FAILED)]
        at = at[w.status.take(at) & np.uint16(int(Status.SRC_NAT)) != 0]
        if not at.size:
            return
        won = np.isin(_flow(w, at), _flow(w, w.where(Kind.INSERT)))
        for number in at[~won]:
            record = w.events[number]
            proto = int(record["proto"])
            port = int(record["dport"]) if proto in PORTED else 0
            key = (proto_name(proto), address_text(record["dst"]), port, int(record["netns"]))
            target = self._targets.setdefault(key, _Target())
            target.failed += 1
            if len(target.translated) < ADDRESSES:
                target.translated[address_text(record["reply_dst"])] = None
        if len(self._targets) > KEYS:
            heavy = sorted(self._targets.items(), key=lambda item: -item[1].failed)
            self._targets = dict(heavy[: KEYS // 2])

    def view(self, netns: Optional[int] = None) -> tuple[Failure, ...]:
        """Where most failed, in one namespace or all; worst first."""
        found = [
            Failure(*key, target.failed, tuple(target.translated))
            for key, target in self._targets.items()
            if netns in (None, key[3])
        ]
        return tuple(sorted(found, key=lambda one: -one.failed))


def _flow(w: Window, at: Rows) -> U64:
    """A hash of whole original tuples, including both ports."""
    h = spread(w.pair_hash.take(at))
    ports: U64 = w.words[at, 10] & np.uint64(0xFFFFFFFF)
    high, low = (part[at] for part in w.dst)
    return h + key_hash(high, low, ports)
