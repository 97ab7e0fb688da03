"""What a table's translated entries show: those that lead where no rule does any more, and how
many of its source ports a translated address uses towards each destination (before connections
fail, where :mod:`ctrace.model.ports` sees those that do).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.beside import Left
from ctrace.host import ctnetlink
from ctrace.host.netns import local_addresses
from ctrace.record import TCP, Events, Status, address_text, proto_name
from ctrace.ruleset.told import Told

CLOSED: Final = (7, 8)
"""TIME_WAIT and CLOSE: closed connections' entries go by themselves."""

Stale = tuple[str, str, int, str]
"""Protocol, original destination and port, and the address that it is translated to."""
Towards = tuple[str, str, str, int]
"""Protocol, translated source address, destination and its port."""
Zoned = tuple[Towards, int]
"""The same in a conntrack zone: each has every port once."""
Ports = tuple[int, int]
"""In use, and how many there are."""


@dataclass
class Reading:
    """One reading of a table, or of an even part of it."""

    rules: Told
    own: frozenset[str] = frozenset()
    """The namespace's addresses."""
    seen: int = 0
    """Entries read."""
    part: float = 1.0
    """Which part of the table these are."""
    _stale: Counter[Stale] = field(default_factory=Counter)
    _ports: dict[Zoned, set[int]] = field(default_factory=dict)

    def add(self, rows: Events) -> None:
        """Some more entries."""
        self.seen += len(rows)
        status = rows["status"].astype(int)
        if self.rules.targets is not None:
            mine = (status & int(Status.DST_NAT) != 0) & (status & int(Status.EXPECTED) == 0)
            mine &= (rows["proto"] != TCP) | ~np.isin(rows["state"], CLOSED)
            self._add_stale(rows[mine])
        if self.rules.ports:
            self._add_ports(rows[status & int(Status.SRC_NAT) != 0])

    def _add_stale(self, rows: Events) -> None:
        first, code = _ends(rows, "dst", "reply_src", "dport", "proto")
        for row, n in zip(rows[first], np.bincount(code, minlength=len(first)).tolist()):
            backend = address_text(row["reply_src"])
            if backend not in self.own and not self.rules.leads_to(backend):
                dst, proto = address_text(row["dst"]), proto_name(int(row["proto"]))
                self._stale[proto, dst, int(row["dport"]), backend] += n

    def _add_ports(self, rows: Events) -> None:
        first, code = _ends(rows, "proto", "zone", "reply_dst", "reply_src", "reply_sport")
        if not len(first):
            return
        order = np.argsort(code, kind="stable")
        taken = np.split(rows["reply_dport"][order], np.cumsum(np.bincount(code))[:-1])
        for row, mine in zip(rows[first], taken):
            key = (
                proto_name(int(row["proto"])),
                address_text(row["reply_dst"]),
                address_text(row["reply_src"]),
                int(row["reply_sport"]),
            )
            self._ports.setdefault((key, int(row["zone"])), set()).update(mine.tolist())

    def left(self) -> tuple[Left, ...]:
        """Entries that lead where no rule does, of the whole table by what the part has."""
        return tuple(
            Left(*towards, round(n / self.part)) for towards, n in self._stale.most_common()
        )

    def ports(self) -> dict[Towards, Ports]:
        """Ports in use, of groups whose ports are all in one range that rules name; of the zone
        that uses most."""
        found: dict[Towards, Ports] = {}
        for (key, _), some in sorted(self._ports.items(), key=lambda one: len(one[1])):
            if len(some) < 2 or key[0] not in ("tcp", "udp"):
                continue
            low, high = min(some), max(some)
            fits = [
                last - first + 1 for first, last in self.rules.ports if first <= low <= high <= last
            ]
            if fits:
                found[key] = min(round(len(some) / self.part), *fits), min(fits)
        return found


def read(netns_path: str, rules: Told, held: int = 0, most: Optional[int] = None) -> Reading:
    """The table of the namespace, or its first ``most`` of ``held`` entries: the kernel lists them
    by hash, so these are an even sample. Raises CtraceError."""
    reading = Reading(rules)
    if rules.targets is None and not rules.ports:
        return reading
    reading.own = frozenset(local_addresses(netns_path))
    for table in ctnetlink.slices(netns_path):
        reading.add(table.events)
        if most is not None and reading.seen >= most:
            reading.part = min(1.0, reading.seen / max(held, 1))
            break
    return reading


def leftovers(netns_path: str, rules: Told, entries: Optional[Events] = None) -> tuple[Left, ...]:
    """Living entries that are translated to a destination no rule leads to now; ``entries``: the
    table, where it was read already."""
    only = Told(targets=rules.targets)
    if entries is None:
        return read(netns_path, only).left()
    reading = Reading(only, frozenset(local_addresses(netns_path)))
    reading.add(entries)
    return reading.left()


def used(netns_path: str, ranges: tuple[tuple[int, int], ...]) -> dict[Towards, Ports]:
    """Ports in use; ``ranges``: first and last port that source NAT may take, by its rules."""
    return read(netns_path, Told(ports=ranges)).ports()


def _ends(rows: Events, *names: str) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The first row of each combination of these fields, and each row's combination."""
    if not len(rows):
        return np.zeros(0, np.intp), np.zeros(0, np.intp)
    parts = (np.ascontiguousarray(rows[name]).view(np.uint8) for name in names)
    ends = np.concatenate([one.reshape(len(rows), -1) for one in parts], axis=1)
    _, first, code = np.unique(ends, axis=0, return_index=True, return_inverse=True)
    return first, code.ravel()
