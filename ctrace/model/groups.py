"""Sums over the tables for any grouping, and the culprits that views show."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import copy
from dataclasses import dataclass, field
from hashlib import blake2b
from ipaddress import ip_address
from typing import Any, Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.batch import Clock, Owner
from ctrace.model import histogram, stays
from ctrace.model.composition import Looks, closed, compose
from ctrace.model.forecast import Staying
from ctrace.model.keys.columns import (
    NETNS_MASK,
    OWNED,
    SERVICE_MASK,
    TCP,
    TIME_UNIT,
    has_port,
    key_hash,
)
from ctrace.model.keys.heavy import COUNTERS
from ctrace.model.keys.levels import Level, Levels
from ctrace.model.keys.parts import Part, beyond, narrow_part, parts_of
from ctrace.model.keys.rich import LOOKS, TREND, distinct
from ctrace.model.scope import Scope
from ctrace.model.snapshot import Composition, Culprit, Ends, OwnerView, Percentiles, Tuple5
from ctrace.model.victims import owner_view, tuple5
from ctrace.record import TCP_STATES, Direction, Status, address_text, proto_name

ENOUGH: Final = 20
"""Entries of which shares mean something."""

_SPREAD: Final = 64
_WAYS: Final = sum(1 << int(one) for one in (Direction.IN, Direction.OUT, Direction.FORWARD))
"""Bits of a row's flags that tell directions."""

CANDIDATES: Final = 512
"""How many of the heaviest keys are looked at when sorting by a percentile."""

_EVERYTHING: Final = Scope()
Rows = npt.NDArray[np.intp]


@dataclass
class Context:
    """What names keys."""

    owners: Mapping[int, Owner]
    cgroups: Mapping[int, str]
    listeners: Mapping[tuple[int, int, int], Owner]
    netns_name: Callable[[int], str]
    clock: Clock
    until: int
    """Boot clock, ns."""
    uptime: float
    """Seconds observed until then."""
    looks: Looks
    """What the latest looks at living entries found, newest first."""
    gone: Mapping[int, int] = field(default_factory=dict)
    """Namespaces that are no more, and when they went (boot clock >> TIME_SHIFT)."""
    missed: Mapping[int, int] = field(default_factory=dict)
    """Records lost, by namespace."""
    stale: Collection[int] = ()
    """Namespaces whose entries were not counted anew since."""


class Group:
    """All keys of one grouping, with their sums. Arrays are aligned by key."""

    def __init__(
        self, name: str, levels: Levels, context: Context, now: int, scope: Scope = _EVERYTHING
    ) -> None:
        """``scope`` is one that the grouping can tell: :meth:`~Scope.refusal` is empty."""
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
        self._looks: Optional[tuple[Looks, npt.NDArray[np.intp]]] = None
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
        """Keys of which something is known: not of one that has just got its row."""

    # -- other groupings of the same rows ---------------------------------------

    def regrouped(
        self, name: str, codes: Rows, key: npt.NDArray[np.uint64], said: tuple[str, ...]
    ) -> Group:
        """The same by a coarser grouping: ``codes`` numbers the new key of each of these keys.

        Keys with -1 are left out; ``said`` are the names of the new ones.
        """
        return self._of_rows(name, codes[self._inverse], key, said)

    def by_direction(self) -> Group:
        """The same by the way that flows take, row by row: one key's may take several."""
        flags = self._gather("flags") & np.uint8(_WAYS)
        found, codes = np.unique(flags, return_inverse=True)
        key = np.zeros((len(found), 3), np.uint64)
        key[:, 0] = found
        said = tuple(_way(int(one)) or "unknown" for one in found)
        return self._of_rows("direction", codes.ravel(), key, said)

    def _of_rows(
        self, name: str, codes: Rows, key: npt.NDArray[np.uint64], said: tuple[str, ...]
    ) -> Group:
        other = copy(self)
        kept = np.flatnonzero(codes >= 0)
        other._level_of, other._row_of = self._level_of[kept], self._row_of[kept]
        other.name, other._said = name, said
        other._arrange(key, codes[kept])
        other.distinct = other.n
        return other

    def _until(self, netns: npt.NDArray[Any], now: int) -> npt.NDArray[np.int64]:
        """Up to when each row's entries were held: until now, or their namespace went."""
        until = np.full(len(netns), now, np.int64)
        for one, at in self._context.gone.items():
            until[netns == one] = min(at, now - 1)
        return until

    def inside(self, netns: int) -> npt.NDArray[np.bool_]:
        """Which keys are of a namespace."""
        mine: npt.NDArray[np.bool_] = self.key[:, 2] >> np.uint64(32) == netns
        return mine

    def refused(self, high: np.uint64, low: np.uint64, meta: np.uint64) -> Optional[float]:
        """Which share of a key's new flows was refused, since the start; None if unknown."""
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
        """What each key has of ``held``, ``table_seconds`` or a counter; never below 0."""
        columns = {"held": self.held, "table_seconds": self.table_seconds}
        column = columns[name] if name in columns else self.sums[name]
        found: npt.NDArray[np.float64] = np.maximum(column.astype(np.float64), 0.0)
        return found

    def ways(self) -> npt.NDArray[np.uint8]:
        """The directions that each key's flows took, as bits ``1 << Direction``."""
        found = np.zeros(self.n, np.uint8)
        flags = self._gather("flags")
        for bit in (1 << int(way) for way in (Direction.IN, Direction.OUT, Direction.FORWARD)):
            found[np.unique(self._inverse[flags & bit != 0])] |= bit
        return found

    def unit_of(self, process: int) -> str:
        """A process' container or unit; empty if it has none."""
        known = self.owner_of(process)
        return known.unit if known else ""

    def units(self) -> set[str]:
        """Containers and units of all processes known."""
        known = (*self._context.owners.values(), *self._context.listeners.values())
        return {one.unit for one in known if one.unit}

    def owner_of(self, process: int) -> Optional[OwnerView]:
        """A process that opened or listens, as views show it."""
        listens = (one for one in self._context.listeners.values() if one.key == process)
        known = self._context.owners.get(process) or next(listens, None)
        return OwnerView(known.pid, known.comm, known.unit, known.cmdline) if known else None

    # -- collecting -----------------------------------------------------------

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

        column = 1 if part.address else 2
        values, inverse = np.unique(key[:, column], return_inverse=True)
        found = np.zeros(len(values), np.uint64)
        for at, value in enumerate(values):
            if part.address:
                found[at] = number(self._cgroup(int(value)))
                continue
            listener = self._listener(int(value))
            unit = (listener.unit or self._context.cgroups.get(listener.cgroup, "")
                    if listener else "")  # fmt: skip
            found[at] = number(unit or self._context.netns_name(int(value) >> 32))
        key[:] = 0
        key[:, 0] = found[inverse.ravel()]
        return key

    @property
    def _names(self) -> dict[int, str]:
        if not hasattr(self, "_label_of"):
            self._label_of: dict[int, str] = {}
        return self._label_of

    def _cgroup(self, cgroup: int) -> str:
        name = self._context.cgroups.get(cgroup, "")
        if not name:
            for owner in self._context.owners.values():
                if owner.cgroup == cgroup and owner.unit:
                    return owner.unit
        return name or (f"cgroup:{cgroup}" if cgroup else "(no cgroup)")

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
            rows = self._row_of[self._level_of == number]
            counted = part.counted or field in ("netns", "flags")
            values.append(column[rows] if counted else np.zeros(len(rows), column.dtype))
        return np.concatenate(values)

    # -- ranking --------------------------------------------------------------

    def order(self, sort: str, limit: int) -> Rows:
        """The first ``limit`` keys by a sort of :data:`~ctrace.model.snapshot.SORTS`.

        With a leading ``-``, the last ones, last first.
        """
        turned, sort = sort.startswith("-"), sort.removeprefix("-")
        weight: tuple[npt.NDArray[Any], ...] = (self.held, self.table_seconds, self.rate)
        if sort == "new":
            weight = (self.rate, self.sums["inserts"], self.held)
        elif sort == "drops":
            weight = (self.sums["drops"], self.drop_rate, self.held)
        ranked = np.lexsort(tuple(-part for part in reversed(weight)))
        ranked = ranked[self._told[ranked]]
        if sort in ("life", "residence"):
            some = ranked[:CANDIDATES]
            part = 0 if sort == "life" else 1
            median = [self._median(int(at), part) for at in some]
            if sort == "life":  # the shortest-lived first
                value = np.array([np.inf if m is None else m for m in median])
            else:
                value = np.array([np.inf if m is None else -m for m in median])
            ranked = some[np.argsort(value, kind="stable")]
        return ranked[::-1][:limit] if turned else ranked[:limit]

    def _median(self, at: int, part: int) -> Optional[float]:
        """Of a key's lives (0) or residences (1); at least so much."""
        one = self.percentiles(at)[part]
        return one.p50 if one.p50 is not None else one.at_least

    def members(self, at: int) -> list[tuple[Level, int]]:
        """(table, row) of everything summed up in a key."""
        chosen = self._members[self._bounds[at] : self._bounds[at + 1]]
        return [(self._parts[int(self._level_of[i])].level, int(self._row_of[i])) for i in chosen]

    def _rich(self, at: int) -> list[tuple[Level, Rows]]:
        """Slots of detail of a key, by table."""
        found = self._rich_rows(at)
        return [(level, level.table.rich[rows].astype(np.intp)) for level, rows in found]

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

    def _detail(self, at: int) -> tuple[npt.NDArray[np.int64], ...]:
        """Histograms: lives of the ended, lives of closed ones looked at, and residences."""
        life = np.zeros(histogram.BINS, np.int64)
        looked, residence = life.copy(), life.copy()
        for level, slots in self._rich(at):
            life += level.rich.life[slots].sum(axis=0, dtype=np.int64)
            looked += level.rich.looked_life[slots].sum(axis=0, dtype=np.int64)
            residence += level.rich.residence[slots].sum(axis=0, dtype=np.int64)
        return life, looked, residence

    # -- showing --------------------------------------------------------------

    def looks_at(self, at: int) -> Looks:
        """The latest looks at living entries of a key, newest first."""
        if self._looks is None:
            looks = self._context.looks
            key = self._key_of(looks)
            order = np.argsort(key, kind="stable")
            self._looks = looks[order], np.searchsorted(key[order], np.arange(self.n + 1))
        found, bounds = self._looks
        return found[bounds[at] : bounds[at + 1]]

    def _key_of(self, looks: Looks) -> Rows:
        """Which key each look is of; -1 where it has no row."""
        key = np.full(len(looks), -1)
        for number, part in enumerate(self._parts):
            if not part.counted:
                continue
            mine = self._level_of == number
            key_of_row = np.full(part.level.table.used + 1, -1)
            key_of_row[self._row_of[mine]] = self._inverse[mine]
            if part.hash == "opener":
                rows = looks["opener"].astype(np.intp)
            else:
                rows = part.level.table.find_rows(np.ascontiguousarray(looks[part.hash]))
            key = np.where(key < 0, key_of_row[np.minimum(rows, len(key_of_row) - 1)], key)
        return key

    def composition(self, at: int) -> Composition:
        """What a key's entries are like that are held now."""
        older, until = int(self.sums["older"][at]), self._context.until
        return compose(self.looks_at(at), int(self.held[at]), older, until)

    def stays(self, at: int) -> stays.Survival:
        """How long a key's entries stay, with the living counted."""
        held, older = int(self.held[at]), int(self.sums["older"][at])
        older = min(max(older, 0), held)
        born = held - older
        looks = self.looks_at(at)
        looks = looks[~np.isnan(looks["now"])]
        ages, young, late = looks["now"].astype(float), 0.0, 0.0
        if len(looks):
            late = (self._context.until - float(looks["ts"].mean())) / 1e9
            young = min(late * float(self.rate[at]), born / 2)
        elif born > 0 and self._context.looks["older"].all():
            ages = self._even_ages(at, born)
        residence = self._detail(at)[2]
        # at most as many as were seen to end: after losses it isn't sure whose births were seen
        ended = min(int(self.sums["inserts"][at]) - born, int(self.sums["destroys"][at]))
        living = stays.Living(ages, born - young, young, late / 2)
        return stays.survival(residence, ended, living)

    def staying(self, at: int) -> Optional[Staying]:
        """What a forecast of a key's entries rests on; None for too few."""
        if self.held[at] < ENOUGH:
            return None
        curve, looks = self.stays(at), self.looks_at(at)
        ages = looks["now"][~np.isnan(looks["now"])].astype(float)
        ages = np.quantile(ages, np.linspace(0, 1, _SPREAD)) if ages.size else [curve.until]
        left = looks["left"][~np.isnan(looks["left"])]
        waiting = len(looks) > 0 and closed(looks).mean() > 0.95
        return Staying(
            curve, np.array(ages), float(np.quantile(left, 0.05)) if left.size else 0.0,
            bool(waiting),
        )  # fmt: skip

    def percentiles(self, at: int) -> tuple[Percentiles, Percentiles]:
        """Life and residence of a key."""
        return self.lives(at), self.residence(at)

    def lives(self, at: int) -> Percentiles:
        """How long a key's entries live, as it is said everywhere."""
        ended, looked, _ = self._detail(at)
        held = int(self.held[at])
        born = held - min(max(int(self.sums["older"][at]), 0), held)
        over = stays.Over(ended, max(int(self.sums["inserts"][at]) - born, 0), looked)
        even = self._even_ages(at, max(born, 1))
        return stays.lives(over, born, self.looks_at(at), self.looks(at)[0], even)

    def residence(self, at: int) -> Percentiles:
        """How long a key's entries stay, as it is said everywhere."""
        held, rate = int(self.held[at]), float(self.rate[at])
        looks, timeout = self.looks(at)
        closed_soon = looks["young"] >= ENOUGH and looks["closed"] >= 0.75 * looks["young"]
        young = timeout if closed_soon else None
        return stays.told(self.stays(at), self.looks_at(at), held, rate, young)

    def states(self, at: int) -> tuple[tuple[str, int], ...]:
        """TCP states at the end, most frequent first."""
        counts = np.zeros(16, np.int64)
        for level, slots in self._rich(at):
            counts += level.rich.states[slots].sum(axis=0, dtype=np.int64)
        named = [(TCP_STATES[s], int(counts[s])) for s in range(len(TCP_STATES)) if counts[s]]
        return tuple(sorted(named, key=lambda item: -item[1]))

    def looks(self, at: int) -> tuple[dict[str, int], Optional[float]]:
        """Looks at living entries, as in LOOKS, and seconds that a closed one stays."""
        counts, timeout = np.zeros(len(LOOKS), np.int64), 0
        for level, slots in self._rich(at):
            counts += level.rich.looks[slots].sum(axis=0, dtype=np.int64)
            timeout = max(timeout, int(level.rich.timeout[slots].max()))
        found = dict(zip(LOOKS, counts.tolist()))
        return found, timeout / 1000 if timeout else None

    def sources(self, at: int) -> Optional[int]:
        """Estimated distinct sources; None where they aren't counted."""
        if self.name in ("src", "pair"):
            return 1
        registers = None
        for level, slots in self._rich(at):
            if level.rich.sources is not None:
                part = level.rich.sources[slots].max(axis=0)
                registers = part if registers is None else np.maximum(registers, part)
        if registers is None or not registers.any():
            return None
        return distinct(registers)

    def _trend(self, at: int, ticks: int) -> tuple[float, ...]:
        """``held`` per interval; empty if most of it is in rows without detail."""
        total = np.zeros(TREND)
        seen = np.zeros(TREND, bool)
        now = 0
        for level, rows in self._rich_rows(at, counted=True):
            trend = level.rich.trend[level.table.rich[rows].astype(np.intp)]
            seen |= ~np.isnan(trend).all(axis=0)
            total += np.nansum(trend, axis=0)
            now += int(level.table.held(rows).sum())
        if not seen.any() or now < 0.9 * self.held[at]:
            return ()
        order = (np.arange(TREND) + ticks + 1) % TREND
        values, known = total[order], seen[order]
        return tuple(float(v) for v in values[int(np.argmax(known)) :])

    def culprits(self, sort: str, limit: int, ticks: int) -> tuple[Culprit, ...]:
        """The first keys by a sort, as views show them."""
        return tuple(self.culprit(int(at), ticks) for at in self.order(sort, limit))

    def by_netns(self) -> dict[int, int]:
        """Entries by namespace, where the keys are namespaces."""
        return {int(self.key[at, 2]) >> 32: int(self.held[at]) for at in range(self.n)}

    def culprit(self, at: int, ticks: int) -> Culprit:
        """One key as views show it."""
        s = {name: int(column[at]) for name, column in self.sums.items()}
        key = self.key[at]
        meta = int(key[2])
        netns = meta >> 32
        members = self._members[self._bounds[at] : self._bounds[at + 1]]
        flags, error, first, owner = self._marks(members)
        missed, stale = self._missed(netns)
        life, looked, residence = self._detail(at)
        # one or the other: together they would count entries twice
        life = looked if looked.sum() > life.sum() else life
        ended = s["destroys"]
        held = int(self.held[at])
        made_of = self.composition(at)
        assured, unreplied, closed = self._shares(at, made_of)
        tcp = not self.service(at)[0] or self.service(at)[0] == TCP
        shown = self._show(at, flags)
        samples = self._samples(at)
        destroyed_other = max(0, ended - s["expired"] - s["evicted"] - s["deleted"])
        process = shown.pop("owner", None) or self._owner(owner, meta)
        return Culprit(
            **shown,
            netns=netns,
            netns_name=self._context.netns_name(netns) if netns else "",
            held=held,
            share=held / self.total_held if self.total_held else 0.0,
            table_seconds=float(self.table_seconds[at]),
            inserts=s["inserts"],
            new_per_s=float(self.rate[at]),
            destroys=ended,
            drops=s["drops"],
            drop_per_s=float(self.drop_rate[at]),
            error=error + missed,
            stale=stale,
            older=min(max(s["older"], 0), held),
            life=self.lives(at),
            residence=self.residence(at),
            ends=Ends(s["expired"], s["evicted"], s["deleted"], destroyed_other),
            nat=",".join(
                name
                for name, bit in (("src", Status.SRC_NAT), ("dst", Status.DST_NAT))
                if flags & int(bit)
            ) or "no",
            composition=made_of,
            assured=assured,
            unreplied=unreplied,
            closed=closed if tcp else None,
            distinct_src=self.sources(at),
            owner=process,
            trend=self._trend(at, ticks),
            first_seen=self._context.clock.utc(first) / 1e9 if first else None,
            life_histogram=histogram.view(life),
            residence_histogram=histogram.view(residence),
            states=made_of.states,
            ended_states=self.states(at),
            samples=samples,
        )  # fmt: skip

    def _missed(self, netns: int) -> tuple[int, bool]:
        """Events lost that may have been a key's, and whether what it holds may be off."""
        missed, stale = self._context.missed, self._context.stale
        lost = missed.get(netns, 0) if netns else sum(missed.values())
        if self.name in ("process", "container", "unit"):
            return lost, lost > 0
        return lost, netns in stale

    def _shares(self, at: int, made_of: Composition) -> tuple[Optional[float], ...]:
        """ASSURED, unreplied and closed ones of what a key holds.

        Where nothing looks into the table: of what ended, if that is most of what there was.
        """
        if made_of.n or not self._context.looks["older"].all():
            return made_of.assured, made_of.unreplied, made_of.closed
        s = {name: int(column[at]) for name, column in self.sums.items()}
        ended, existing = s["destroys"], s["existing"]
        looks, _ = self.looks(at)
        known = ended if ended >= int(self.held[at]) else 0
        assured = s["assured"] + s["existing_assured"]
        return (
            share(assured, known + existing if known else 0, looks, "assured"),
            share(s["unreplied"], known, looks, "unreplied"),
            share(s["closed"], known, looks, "closed"),
        )

    def _even_ages(self, at: int, born: int) -> npt.NDArray[np.float64]:
        """Ages of living entries of which only the sum is known: spread as evenly as may be."""
        residence = self._detail(at)[2]
        n, uptime = int(residence.sum()), self._context.uptime
        middle = (histogram.EDGES[:-1] + histogram.EDGES[1:]) / 2
        gone = float((residence * middle).sum()) / n if n else 0.0
        ended = int(self.sums["inserts"][at]) - born
        seconds = float(self.table_seconds[at]) - ended * gone
        seconds -= max(int(self.sums["older"][at]), 0) * uptime
        mean = min(max(seconds / born, 0.0), uptime)
        low, high = max(0.0, 2 * mean - uptime), min(2 * mean, uptime)
        spread_evenly: npt.NDArray[np.float64] = np.linspace(low, high, _SPREAD)
        return spread_evenly

    def _marks(self, members: Rows) -> tuple[int, int, int, int]:
        """Flags seen, error bound, first event's time, latest owner."""
        flags = owner = 0
        first: Optional[int] = None
        error = 0 if len(self._parts) == 1 else self.floor
        for number, part in enumerate(self._parts):
            rows = self._row_of[members[self._level_of[members] == number]]
            if not rows.size:
                continue
            table = part.level.table
            flags |= int(np.bitwise_or.reduce(table.flags[rows]))
            times = table.first[rows]
            times = times[times > 0]
            if times.size:
                first = int(times.min()) if first is None else min(first, int(times.min()))
            owners = table.owner[rows]
            owners = owners[owners != 0]
            if owners.size:
                owner = int(owners[0])
            if number == len(self._parts) - 1 and self.name not in ("netns", "container"):
                error = int(table.error[rows].max())
        if self._beyond is not None:
            missed = self._parts[0].level.table.error[self._row_of[members]]
            error = self._beyond + int(missed.sum())
        return flags, error, first or 0, owner

    def _owner(self, owner: int, meta: int) -> Optional[OwnerView]:
        if self._said or self.name in ("netns", "container", "dst", "src"):
            return None
        found = owner_view(owner, self._context.owners, "opened")
        if found is None and self.name in ("service", "pair"):
            listener = self._listener(meta)
            if listener:
                return OwnerView(
                    listener.pid, listener.comm, listener.unit, listener.cmdline, "listens"
                )
        return found

    def _samples(self, at: int) -> tuple[Tuple5, ...]:
        found = []
        for level, slots in self._rich(at):
            for slot in slots[:3]:
                records = level.rich.samples[slot]
                found += [tuple5(record) for record in records if record["kind"]]
        return tuple(found[:3])

    def label(self, at: int) -> str:
        """The key as shown."""
        return str(self._show(at, 0)["key"])

    def service(self, at: int) -> tuple[int, Optional[int]]:
        """Protocol number and port of a key."""
        meta = int(self.key[at, 2])
        proto = meta >> 16 & 0xFF
        return proto, (meta & 0xFFFF) if has_port(proto) else None

    def address(self, at: int) -> str:
        """The address of a key, in text form."""
        return address_text(self.key[at, :2].tobytes())

    def _show(self, at: int, flags: int) -> dict[str, Any]:
        name, key = self.name, self.key[at]
        if self._said or name in ("netns", "container"):
            whole = self._said[at] if self._said else (
                self._context.netns_name(int(key[2]) >> 32)
                if name == "netns"
                else self._names[int(key[0])]
            )  # fmt: skip
            return {"key": whole, "direction": _way(flags)}
        if name == "process":
            return self._show_process(at, flags)
        proto, port = self.service(at)
        service = f"{proto_name(proto)}/{port}" if port is not None else proto_name(proto)
        address = self.address(at) if name != "service" else ""
        direction = "loopback" if address and ip_address(address).is_loopback else _way(flags)
        if name == "service":
            found = self._one_target(at)
            if found and ip_address(found).is_loopback:
                direction = "loopback"
            return {"key": service, "proto": proto_name(proto), "port": port, "dst": found,
                    "direction": direction}  # fmt: skip
        if name == "pair":
            return {"key": f"{address} -> {service}", "proto": proto_name(proto), "port": port,
                    "src": address, "direction": direction}  # fmt: skip
        return {"key": address, name: address, "direction": direction}

    def _one_target(self, at: int) -> str:
        """The service's address when it has just one."""
        members = self.members(at)
        if len(members) > 2:
            return ""
        found = {address_text(level.table.key[row, :2].tobytes())
                 for level, row in members if level.table.key[row, :2].any()}  # fmt: skip
        return found.pop() if len(found) == 1 else ""

    def _show_process(self, at: int, flags: int) -> dict[str, Any]:
        key = self.key[at]
        owner, netns = int(key[0]), int(key[2]) >> 32
        role = "listens" if key[1] else "opened"
        shown = owner_view(owner, self._context.owners, role)
        if shown is not None and role == "listens":
            listener = next((known for known in self._context.listeners.values()
                             if known.key == owner), None)  # fmt: skip
            if listener:
                shown = OwnerView(
                    listener.pid, listener.comm, listener.unit, listener.cmdline, role
                )
        if shown is None:
            way = _way(flags)
            text = "forwarded" if way == "forward" else "no local process"
            return {"key": f"({text} in {self._context.netns_name(netns)})", "direction": way}
        # What it opened and what it listens for are two rows: their keys differ, too.
        name = f"{shown.comm or '?'}[{shown.pid}]" + (" listens" if role == "listens" else "")
        return {"key": name, "owner": shown, "direction": _way(flags)}


def share(part: int, ended: int, looks: Mapping[str, int], name: str) -> Optional[float]:
    """A share of the ended; of young entries looked at, while hardly any has ended."""
    young = looks["young"]
    if young >= ENOUGH > ended:
        return min(1.0, looks[name] / young)
    return part / ended if ended else None


def unit_number(name: str) -> int:
    """The same number for a name from second to second; 0 for none."""
    return int.from_bytes(blake2b(name.encode(), digest_size=7).digest(), "little") if name else 0


def _way(flags: int) -> str:
    names = {Direction.IN: "in", Direction.OUT: "out", Direction.FORWARD: "forward"}
    seen = [name for bit, name in names.items() if flags & (1 << bit)]
    return seen[0] if len(seen) == 1 else ("mixed" if seen else "")
