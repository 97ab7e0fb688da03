"""Sums over the tables for any grouping, and what its keys are."""

from __future__ import annotations

from copy import copy
from typing import Any, Final, Optional, TypeVar

import numpy as np
import numpy.typing as npt

from ctrace.batch import Owner
from ctrace.digests import blake2b
from ctrace.model.composition import Looks
from ctrace.model.groups.context import Context
from ctrace.model.keys.columns import NETNS_MASK, OWNED, SERVICE_MASK, TIME_UNIT, has_port, key_hash
from ctrace.model.keys.heavy import COUNTERS
from ctrace.model.keys.level import Level
from ctrace.model.keys.levels import Levels
from ctrace.model.keys.parts import Part, beyond, narrow_part, parts_of
from ctrace.model.keys.scatter import Rows
from ctrace.model.scope import Scope
from ctrace.model.snapshot import Composition, Culprit, OwnerView
from ctrace.record import Direction, address_text

Same = TypeVar("Same", bound="Sums")

Details = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]

_WAYS: Final = sum(1 << int(one) for one in (Direction.IN, Direction.OUT, Direction.FORWARD))
"""Bits of a row's flags that show directions."""
_EVERYTHING: Final = Scope()


class Sums:
    """All keys of one grouping, with their sums. Arrays are aligned by key."""

    def __init__(
        self, name: str, levels: Levels, context: Context, now: int, scope: Scope = _EVERYTHING
    ) -> None:
        """``scope`` must be one that the grouping can resolve: its :meth:`~Scope.refusal` is
        empty."""
        self.name = name
        self._context = context
        self._scope = scope
        narrow = narrow_part(name, levels, scope)
        self._parts = (narrow,) if narrow else parts_of(name, levels)
        self._beyond = beyond(self._parts, levels, scope)
        keys, level_of, row_of = self._collect()
        self._level_of, self._row_of = level_of, row_of
        self._now = now
        self._said: tuple[str, ...] = ()
        h = key_hash(keys[:, 0], keys[:, 1], keys[:, 2])
        _, first, inverse = np.unique(h, return_index=True, return_inverse=True)
        self._arrange(keys[first], inverse.ravel())
        space = levels.space.table
        mine = scope.of_namespace.rows(space.key)
        until, held = self._until(space.key[:, 2] >> np.uint64(32), now), space.held()
        self.total_held = max(int(self.held.sum()), int(held[mine & (until == now)].sum()))
        """Entries of all keys of the namespaces looked at, shown or not, with a row or not."""
        stood = (held * until - space.counters["births"]) * TIME_UNIT
        whole = float(stood[mine].sum())
        self.total_seconds = max(float(self.table_seconds.sum()), whole)
        coarse = self._parts[-1].level if len(self._parts) > 1 else self._parts[0].level
        self.floor = coarse.table.floor
        whole_group = scope == _EVERYTHING
        self.distinct = max(self.n, coarse.table.distinct() if self.floor and whole_group else 0)
        """Keys ever seen, shown or not: estimated once any were turned away."""

    def _arrange(self, key: npt.NDArray[np.uint64], inverse: Rows) -> None:
        """Sum up rows by key; ``inverse`` is each row's key."""
        self.key, self.n = key, len(key)
        self._members = np.argsort(inverse, kind="stable")
        self._bounds = np.searchsorted(inverse[self._members], np.arange(self.n + 1))
        self._inverse = inverse
        self._looks: Optional[tuple[Rows, npt.NDArray[np.intp], dict[int, Looks]]] = None
        self._details: dict[int, Details] = {}
        self._trends: dict[int, tuple[float, ...]] = {}
        self._curves: dict[int, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]] = {}
        self._made_of: dict[int, Composition] = {}
        self._rows: dict[int, Culprit] = {}
        self._went: dict[int, float] = {}
        """Of what keys held when they were looked at: how much has ended since."""
        self._slots: dict[int, list[tuple[Level, Rows]]] = {}
        self._by_part = [self._row_of[self._level_of == at] for at in range(len(self._parts))]
        self.sums = {field: np.bincount(inverse, self._gather(field), self.n) for field in COUNTERS}
        self.rate = np.bincount(inverse, self._gather("rate:inserts"), self.n)
        self.drop_rate = np.bincount(inverse, self._gather("rate:drops"), self.n)
        net, now = self._gather("net"), self._now
        until = self._until(self._gather("netns"), now)
        held = np.bincount(inverse, net * (until == now), self.n)
        self.held = np.maximum(held, 0).astype(np.int64)
        seconds = (net * until - self._gather("births")) * TIME_UNIT
        self.table_seconds = np.maximum(np.bincount(inverse, seconds, self.n), 0.0)
        s = self.sums
        self._told = s["inserts"] + s["existing"] + s["destroys"] + s["drops"] + s["failed"] > 0
        """Keys with any data: not those that have only just got a row."""

    def regrouped(
        self: Same, name: str, codes: Rows, key: npt.NDArray[np.uint64], said: tuple[str, ...]
    ) -> Same:
        """Regrouped more coarsely: ``codes`` gives the number of each key's new key.

        Keys with -1 are left out; ``said`` are the names of the new ones.
        """
        return self._of_rows(name, codes[self._inverse], key, said)

    def by_direction(self: Same) -> Same:
        """Regrouped by the flows' direction, row by row: a key's flows may have several."""
        flags = self._gather("flags") & np.uint8(_WAYS)
        found, codes = np.unique(flags, return_inverse=True)
        key = np.zeros((len(found), 3), np.uint64)
        key[:, 0] = found
        said = tuple(way(int(one)) or "unknown" for one in found)
        return self._of_rows("direction", codes.ravel(), key, said)

    def _of_rows(
        self: Same, name: str, codes: Rows, key: npt.NDArray[np.uint64], said: tuple[str, ...]
    ) -> Same:
        other = copy(self)
        kept = np.flatnonzero(codes >= 0)
        other._level_of, other._row_of = self._level_of[kept], self._row_of[kept]
        other.name, other._said = name, said
        other._arrange(key, codes[kept])
        other.distinct = other.n
        return other

    def _until(self, netns: npt.NDArray[Any], now: int) -> npt.NDArray[np.int64]:
        """When each row's entries were last held: now, or when their namespace went."""
        until = np.full(len(netns), now, np.int64)
        for one, at in self._context.gone.items():
            until[netns == one] = min(at, now - 1)
        return until

    def inside(self, netns: int) -> npt.NDArray[np.bool_]:
        """Which keys belong to a namespace."""
        mine: npt.NDArray[np.bool_] = self.key[:, 2] >> np.uint64(32) == netns
        return mine

    def refused(self, high: np.uint64, low: np.uint64, meta: np.uint64) -> Optional[float]:
        """The share of a key's new flows that was refused, since the start; None if unknown."""
        key = self.key
        at = np.flatnonzero((key[:, 1] == low) & (key[:, 0] == high) & (key[:, 2] == meta))
        drops, inserts = (float(self.sums[name][at].sum()) for name in ("drops", "inserts"))
        return drops / (drops + inserts) if drops + inserts else None

    def processes(self, at: Rows) -> npt.NDArray[np.uint64]:
        """Of these pairs (process, number of its unit): who opened or listens for it; 0: none."""
        first = self._members[self._bounds[at]]
        table = self._parts[0].level.table
        found = np.zeros((len(at), 2), np.uint64)
        found[:, 0] = table.owner[self._row_of[first]]
        meta = self.key[at, 2] & SERVICE_MASK
        for (netns, proto, port), owner in self._context.listeners.items():
            here = meta == np.uint64(netns << 32 | proto << 16 | port)
            found[here & (found[:, 0] == 0), 0] = owner.key
        for process in np.unique(found[:, 0]):
            if process:
                found[found[:, 0] == process, 1] = unit_number(self.unit_of(int(process)))
        return found

    def measure(self, name: str) -> npt.NDArray[np.float64]:
        """Each key's ``held``, ``table_seconds`` or a counter; never below 0."""
        columns = {"held": self.held, "table_seconds": self.table_seconds}
        column = columns[name] if name in columns else self.sums[name]
        found: npt.NDArray[np.float64] = np.maximum(column.astype(np.float64), 0.0)
        return found

    def ways(self) -> npt.NDArray[np.uint8]:
        """The directions that each key's flows took, as bits ``1 << Direction``."""
        found = np.zeros(self.n, np.uint8)
        flags = self._gather("flags")
        for bit in (1 << int(way) for way in (Direction.IN, Direction.OUT, Direction.FORWARD)):
            found[self._inverse[flags & bit != 0]] |= bit  # a key that comes twice gets it once
        return found

    def unit_of(self, process: int) -> str:
        """A process' container or unit; empty if it has none."""
        known = self.owner_of(process)
        return known.unit if known else ""

    def units(self) -> set[str]:
        """Containers and units of all known processes."""
        known = (*self._context.owners.values(), *self._context.listeners.values())
        return {one.unit for one in known if one.unit}

    def owner_of(self, process: int) -> Optional[OwnerView]:
        """A process that opened or listens, as views show it."""
        listens = (one for one in self._context.listeners.values() if one.key == process)
        known = self._context.owners.get(process) or next(listens, None)
        return OwnerView(known.pid, known.comm, known.unit, known.cmdline) if known else None

    def _collect(self) -> tuple[npt.NDArray[np.uint64], Rows, Rows]:
        keys, levels, rows = [], [], []
        for number, part in enumerate(self._parts):
            table = part.level.table
            table.drain()
            chosen = np.arange(1, table.used + 1)
            if part.owned is not None:
                owned = (table.key[chosen, 2] & OWNED) != 0
                chosen = chosen[owned == part.owned]
            scope = self._scope
            chosen = chosen[scope.rows(table.key[chosen])]
            key = table.key[chosen].copy()
            if not part.address:
                key[:, :2] = 0
            key[:, 2] &= part.meta
            if self.name == "process":
                key = self._by_process(key, part)
            if self.name == "container":
                key = self._by_container(key, part)
            keys.append(key)
            levels.append(np.full(len(chosen), number))
            rows.append(chosen)
        return np.concatenate(keys), np.concatenate(levels), np.concatenate(rows)

    def _listener(self, meta: int) -> Optional[Owner]:
        return self._context.listeners.get((meta >> 32, meta >> 16 & 0xFF, meta & 0xFFFF))

    def _by_process(self, key: npt.NDArray[np.uint64], part: Part) -> npt.NDArray[np.uint64]:
        """Keys (process, opened or listens, namespace)."""
        if part.address:  # the process table: (owner, cgroup, namespace)
            key[:, 1] = 0
            return key
        services, inverse = np.unique(key[:, 2], return_inverse=True)
        owner = np.zeros(len(services), np.uint64)
        for at, service in enumerate(services):
            found = self._listener(int(service))
            owner[at] = found.key if found else 0
        key[:, 0] = owner[inverse.ravel()]
        key[:, 1] = 1
        key[:, 2] &= NETNS_MASK
        return key

    def _by_container(self, key: npt.NDArray[np.uint64], part: Part) -> npt.NDArray[np.uint64]:
        """Keys (number of a container's or unit's name, 0, 0)."""
        numbers: dict[str, int] = {name: at for at, name in self._names.items()}

        def number(name: str) -> int:
            at = numbers.setdefault(name, len(numbers) + 1)
            self._names[at] = name
            return at

        if part.address:  # the process table
            values, inverse = np.unique(key[:, :2], axis=0, return_inverse=True)
            units = [self._unit(int(owner), int(cgroup)) for owner, cgroup in values]
        else:
            values, inverse = np.unique(key[:, 2], return_inverse=True)
            units = [self._listening(int(meta)) for meta in values]
        found = np.array([number(unit) for unit in units], np.uint64)
        key[:] = 0
        key[:, 0] = found[inverse.ravel()]
        return key

    @property
    def _names(self) -> dict[int, str]:
        if not hasattr(self, "_label_of"):
            self._label_of: dict[int, str] = {}
        return self._label_of

    def _unit(self, key: int, cgroup: int) -> str:
        """Of a process. Its own comes first: with version 1 of control groups all processes are in
        one of version 2, and so have its number."""
        owner = self._context.owners.get(key)
        if owner is not None and owner.unit:
            return owner.unit
        name = self._context.cgroups.get(cgroup, "")
        return name or (f"cgroup:{cgroup}" if cgroup else "(no cgroup)")

    def _listening(self, meta: int) -> str:
        """Of what listens for a service; the namespace's name where that is not known."""
        listener = self._listener(meta)
        unit = listener.unit or self._context.cgroups.get(listener.cgroup, "") if listener else ""
        return unit or self._context.netns_name(meta >> 32)

    def _gather(self, field: str) -> npt.NDArray[Any]:
        values = []
        for number, part in enumerate(self._parts):
            table = part.level.table
            c = table.counters
            if field == "net":
                column: npt.NDArray[Any] = c["inserts"] + c["existing"] - c["destroys"]
            elif field == "flags":
                column = table.flags
            elif field == "netns":
                column = table.key[:, 2] >> np.uint64(32)
            elif field.startswith("rate:"):
                column = table.rate[field[5:]]
            else:
                column = c[field]
            rows = self._by_part[number]
            counted = part.counted or field in ("netns", "flags")
            values.append(column[rows] if counted else np.zeros(len(rows), column.dtype))
        return np.concatenate(values)

    def members(self, at: int) -> list[tuple[Level, int]]:
        """(table, row) of everything summed up in a key."""
        chosen = self._members[self._bounds[at] : self._bounds[at + 1]]
        return [(self._parts[int(self._level_of[i])].level, int(self._row_of[i])) for i in chosen]

    def _rich(self, at: int) -> list[tuple[Level, Rows]]:
        """Slots of detail of a key, by table."""
        if at not in self._slots:
            found = self._rich_rows(at)
            self._slots[at] = [(one, one.table.rich[rows].astype(np.intp)) for one, rows in found]
        return self._slots[at]

    def _rich_rows(self, at: int, counted: bool = False) -> list[tuple[Level, Rows]]:
        """Rows of a key that have detail, by table; of those that are ``counted`` or of all."""
        chosen = self._members[self._bounds[at] : self._bounds[at + 1]]
        found = []
        for number, part in enumerate(self._parts):
            rows = self._row_of[chosen[self._level_of[chosen] == number]]
            rows = rows[part.level.table.rich[rows] != 0]
            if rows.size and (part.counted or not counted):
                found.append((part.level, rows))
        return found

    def by_netns(self) -> dict[int, int]:
        """Entries by namespace, where the keys are namespaces."""
        return {int(self.key[at, 2]) >> 32: int(self.held[at]) for at in range(self.n)}

    def service(self, at: int) -> tuple[int, Optional[int]]:
        """Protocol number and port of a key."""
        meta = int(self.key[at, 2])
        proto = meta >> 16 & 0xFF
        return proto, (meta & 0xFFFF) if has_port(proto) else None

    def address(self, at: int) -> str:
        """The address of a key, in text form."""
        return address_text(self.key[at, :2].tobytes())


def unit_number(name: str) -> int:
    """The same number for a name from second to second; 0 for none."""
    return int.from_bytes(blake2b(name.encode(), digest_size=7).digest(), "little") if name else 0


def way(flags: int) -> str:
    """The direction in a row's flags: "mixed" for several, empty for none."""
    names = {Direction.IN: "in", Direction.OUT: "out", Direction.FORWARD: "forward"}
    seen = [name for bit, name in names.items() if flags & (1 << bit)]
    return seen[0] if len(seen) == 1 else ("mixed" if seen else "")
