"""The tables of keys that every group is made of, and how a window is counted into them.

Two fine tables see every event: *pair* (source, service) and *target* (destination,
service). Where a key has no row there, its event goes to a coarser one: *source*,
or *service* and *destination*. Detail (lifetimes and the like) of rows too light for a
slot goes the same way. A group is then a sum over a fine table and a coarse one.
*process* counts what local processes opened, *space* everything in a namespace: what a
share is a share of, also when keys are too many for the coarse tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.model import histogram
from ctrace.model.keys.columns import (
    CLOSE,
    I64,
    NETNS_MASK,
    OWNED,
    TCP,
    TIME_WAIT,
    U64,
    Window,
    key_hash,
    service_hash,
    some,
)
from ctrace.model.keys.heavy import Found, HeavyTable, Keys
from ctrace.model.keys.pairing import EXISTING, UNKNOWN
from ctrace.model.keys.rich import YOUNG_NS, RichPool, registers_of
from ctrace.model.keys.scatter import Rows, add_at
from ctrace.model.keys.timeouts import Timeouts
from ctrace.record import Kind, Reason, Status

SEEN_REPLY: Final = np.uint16(int(Status.SEEN_REPLY))
_DIRECTION_SAMPLE: Final = 1024
_SWAPS: Final = 32
_TICK_MS: Final = np.float32(50)
"""What a time in ticks, and its reader, may be late by."""
SAMPLED: Final = 8
ENDS_MEASURED: Final = 16_384
"""Lifetimes measured in a window (of 131,072 events); ``n`` of percentiles counts these."""


@dataclass
class Details:
    """What a window says beyond its packed counters; all arrays are indices of events."""

    adds: list[tuple[str, Rows, int]]
    """Counters to change by so much, once for each event at these indices."""
    nat: Rows
    owned: Rows
    owner: U64
    """Aligned with ``owned``."""
    born: Rows
    ends: Rows
    """Ends whose lifetimes are looked at: all whose birth was looked for, or an even sample."""
    state: Rows
    """Aligned with ``ends``."""
    residence: Rows
    """Which of ``ends`` have a known residence; ``residence_bin`` is aligned with it."""
    residence_bin: I64
    life: Rows
    life_bin: I64
    register: I64
    rest: U64
    """Aligned with ``born``: HyperLogLog's register and remaining bits of the source."""
    directions: list[tuple[int, Rows]]
    """Each direction that some of the inserts had, with these; keys seldom have two."""
    latest: U64
    """The last few of ``ends``, as words of their records."""


def details(
    w: Window, ends: Rows, age: I64, extra: npt.NDArray[np.uint16], owned: Rows, part: int,
    timeouts: Timeouts,
) -> Details:  # fmt: skip
    """Look once at what all tables need, with what pairing told of ``ends`` and each event.

    They are one of ``part``.
    """
    adds = [
        (name, at, 1)
        for name, at in (
            ("drops", w.where(Kind.DROP)),
            ("failed", w.where(Kind.INSERT_FAILED)),
            ("deleted", w.because(Reason.DELETED)),
            (
                "evicted",
                w.because(Reason.EVICTED, Reason.GC_PRESSURE),
            ),
        )
        if at.size
    ]
    existing = w.where(Kind.EXISTING)
    if existing.size:
        adds += [("existing", existing, 1), ("older", existing, 1)]
        adds.append(("existing_assured", existing[w.assured(existing)], 1))
    found = w.where(Kind.FOUND)
    if found.size:
        adds.append(("found", found, 1))
    unpaired = ends.take(np.flatnonzero(age == UNKNOWN))
    if unpaired.size:
        adds.append(("older", unpaired, -1))
        if part > 1:  # those of the first dump are all known, others stand for what is left out
            adds.append(("older", unpaired[extra.take(unpaired) & EXISTING == 0], 1 - part))

    step = max(1, -(-len(ends) // ENDS_MEASURED))
    ends, age = ends[::step], age[::step]
    residence = np.flatnonzero(age >= 0)
    milliseconds = age.take(residence).astype(np.float32)
    milliseconds *= np.float32(1e-6)
    idle = w.idle_ms(ends.take(residence))
    # longer idle than it existed is impossible: that was not the timeout that it had
    sure = (idle >= 0) & (idle <= milliseconds + _TICK_MS)
    told = np.flatnonzero(sure & ~timeouts.doubtful(w, ends.take(residence)))
    life = milliseconds.take(told) - idle.take(told).astype(np.float32)
    np.maximum(life, np.float32(0), out=life)
    born = w.where(Kind.INSERT)
    register, rest = registers_of(w.sources(born))
    looked = born[:: max(1, born.size // _DIRECTION_SAMPLE)]
    direction = w.directions(looked)
    return Details(
        adds=adds,
        nat=w.nat(),
        owned=owned,
        owner=w.owner(owned),
        born=born,
        ends=ends,
        state=np.minimum(w.states(ends), np.uint8(15)).astype(np.intp),
        residence=residence,
        residence_bin=histogram.bins(milliseconds),
        life=residence.take(told),
        life_bin=histogram.bins(life),
        register=register,
        rest=rest,
        directions=[(one, looked[direction == one]) for one in np.unique(direction).tolist()],
        latest=w.words[ends[-SAMPLED:]],
    )


@dataclass(frozen=True)
class Left:
    """What a fine level leaves to its parents."""

    events: npt.NDArray[np.bool_]
    """Those without a row."""
    ends: npt.NDArray[np.bool_]
    """Aligned with :attr:`Details.ends`: those without detail."""

    def any(self) -> bool:
        """Whether there is something."""
        return bool(self.events.any() or self.ends.any())


class Level:
    """A table of keys with the detail of its heavier rows, and what it overflows into."""

    def __init__(self, rows: int, rich: int, distinct: bool = False) -> None:
        self.table = HeavyTable(rows)
        self.rich = RichPool(rich, distinct)
        self.parents: list[tuple[Level, np.uint64, bool]] = []
        """(coarser level, mask of the meta word, whether it keeps the address)."""

    def nbytes(self) -> int:
        """Memory held."""
        return self.table.nbytes() + self.rich.nbytes()

    def locate(
        self, w: Window, at: Optional[Rows], h: U64, comes: npt.NDArray[np.bool_], keys: Keys
    ) -> Found:
        """Rows for the events at ``at`` (all, if None); new keys get theirs here."""
        found = self.table.locate(h, comes, keys)
        if self.table.gave_up:
            self._fold()
        if self.table.given.size:
            self._welcome(w, at)
        return found

    def _welcome(self, w: Window, at: Optional[Rows]) -> None:
        """Set what new rows start with, from one of the events that brought them."""
        table = self.table
        given, which = table.given, table.given_at
        events = which if at is None else at[which]
        table.first[given] = w.ts[events].view(np.int64)
        table.flags[given] |= np.uint8(1) << w.directions(events)
        slots = self.rich.take(len(given))
        if slots:
            chosen = given[: len(slots)]
            table.rich[chosen] = slots
            self.rich.samples[slots, 0] = w.events[events[: len(slots)]]

    def _fold(self) -> None:
        """Hand what pruned rows had counted to the coarser levels."""
        table = self.table
        key, slots = table.dropped_key, table.dropped_rich
        held = np.flatnonzero(slots)
        for parent, mask, keeps_address in self.parents:
            coarse = key.copy()
            coarse[:, 2] &= mask
            if not keeps_address:
                coarse[:, :2] = 0
            rows = parent.table.absorb(coarse, table.dropped)
            parent.table.flags[rows[rows > 0]] |= np.uint8(0)
            for flag in (1, 2, 4, 8, 16, 32):
                which = rows[(table.dropped_flags & flag) != 0]
                parent.table.flags[which] |= np.uint8(flag)
            for at in held:
                into = int(parent.table.rich[rows[at]])
                if into:
                    parent.rich.merge(into, self.rich, int(slots[at]))
        self.rich.give(slots.astype(np.intp))

    def count(self, w: Window, d: Details, found: Found) -> None:
        """Count a window."""
        table = self.table
        table.count(found, w)
        for name, at, step in d.adds:
            add_at(table.counters[name], found.rows(at), step)
        if d.nat.size:
            bits, rows = w.status.take(d.nat), found.rows(d.nat)
            for flag in (Status.SRC_NAT, Status.DST_NAT):
                table.flags[rows[(bits & np.uint16(int(flag))) != 0]] |= np.uint8(int(flag))
        if d.owned.size:
            table.owner[found.rows(d.owned)] = d.owner
        if self.rich.sources is not None and d.born.size:
            self.rich.count_sources(self.slots(found, d.born), d.register, d.rest)

    def count_all(self, w: Window, d: Details, row: int) -> None:
        """Count a window of which all is one row's."""
        table = self.table
        table.count_all(row, w)
        for name, at, step in d.adds:
            table.counters[name][row] += step * len(at)

    def slots(self, found: Found, at: Rows) -> Rows:
        """The slot of detail (or 0) of the row of each event at ``at``."""
        return self.table.rich.take(found.rows(at)).astype(np.intp)

    def measure(self, d: Details, slots: Rows) -> None:
        """Count lifetimes and states: a slot of detail (or 0) for each of ``d.ends``."""
        if not slots.any():
            return
        self.rich.count_ends(slots, d.state, d.residence, d.residence_bin, d.life, d.life_bin)
        self.rich.keep(slots[-SAMPLED:], d.latest)

    def tick(self, number: int, seconds: float) -> None:
        """Close an interval: rates, the trend, and detail for those who earned it."""
        table = self.table
        table.tick(seconds)
        self._promote()
        rich = np.flatnonzero(table.rich)
        column = number % self.rich.trend.shape[1]
        self.rich.trend[:, column] = np.nan
        self.rich.trend[table.rich[rich], column] = table.held()[rich]

    def _promote(self) -> None:
        """Move slots from light rows to the heaviest that have none."""
        table, slots = self.table, self.rich.slots
        if self.rich.free or table.used <= slots:
            return
        weight = table.weight()[: table.used + 1]
        weight[0] = -1
        heaviest = np.argpartition(weight, -slots)[-slots:]
        needy = heaviest[table.rich[heaviest] == 0]
        if not needy.size:
            return
        needy = needy[np.argsort(-weight[needy])][:_SWAPS]
        holders = np.flatnonzero(table.rich[: table.used + 1])
        lightest = holders[np.argsort(weight[holders], kind="stable")][: len(needy)]
        for poor, holder in zip(needy, lightest):
            if weight[poor] < 2 * weight[holder] + 2:
                break
            slot = int(table.rich[holder])
            for parent, mask, keeps_address in self.parents:
                key = table.key[holder : holder + 1].copy()
                key[:, 2] &= mask
                if not keeps_address:
                    key[:, :2] = 0
                row = int(parent.table.find_rows(key_hash(key[:, 0], key[:, 1], key[:, 2]))[0])
                if parent.table.rich[row]:
                    parent.rich.merge(int(parent.table.rich[row]), self.rich, slot)
            table.rich[holder] = 0
            self.rich.give(np.array([slot]))
            table.rich[poor] = self.rich.take(1)[0]


_PROCESS_ROWS: Final = 4_000
"""A row of the processes fits the field by which entries remember it."""
_SHARES: Final = (
    (28_000, 384, False),  # pair
    (14_000, 384, True),  # target
    (8_000, 96, False),  # source
    (7_000, 96, True),  # service
    (7_000, 96, True),  # destination
    (_PROCESS_ROWS, 128, False),  # process
    (1_000, 32, False),  # space
)
"""Rows, rows with detail, and whether distinct sources are counted, at scale 1."""


def _sizes(scale: float) -> Iterator[tuple[int, int, bool]]:
    """Of each level: rows, how many have detail, whether that counts distinct sources."""
    for rows, rich, distinct in _SHARES:
        most = EXISTING - 1 if rows == _PROCESS_ROWS else 100_000
        yield (
            min(max(64, int(rows * scale)), most),
            min(max(8, int(rich * scale)), 60_000),
            distinct,
        )


def needed(scale: float) -> int:
    """Bytes that ``Levels(scale)`` will hold, known without taking them.

    Memory that was taken and given back is cleared by hand when it is taken again, so
    every page of it counts as used; fresh memory counts page by page as it is used.
    """
    return sum(
        HeavyTable.needed(rows) + RichPool.needed(rich, distinct)
        for rows, rich, distinct in _sizes(scale)
    )


class Levels:
    """All tables, sized for a part of the memory limit."""

    def __init__(self, scale: float) -> None:
        self.timeouts = Timeouts()
        (
            self.pair, self.target, self.source, self.service, self.destination, self.process,
            self.space,
        ) = (Level(*size) for size in _sizes(scale))  # fmt: skip
        self.pair.parents = [(self.source, NETNS_MASK, True)]
        self.target.parents = [
            (self.service, ~np.uint64(0), False),
            (self.destination, NETNS_MASK, True),
        ]

    def all(self) -> tuple[Level, ...]:
        """Every level."""
        return (
            self.pair, self.target, self.source, self.service, self.destination, self.process,
            self.space,
        )  # fmt: skip

    def nbytes(self) -> int:
        """Memory held."""
        return sum(level.nbytes() for level in self.all())

    def owners(self, w: Window) -> tuple[Rows, npt.NDArray[np.uint16], Rows | None]:
        """Rows of the processes that opened this window's entries.

        Returns (indices of owned inserts, the ``extra`` of each event for pairing,
        how rows moved if some were given up).
        """
        extra = np.zeros(w.n, np.uint16)
        existing = w.where(Kind.EXISTING)
        extra[existing] = EXISTING
        owned = w.owned
        if not owned.size:
            return owned, extra, None
        cgroup = w.events["cgroup"][owned]
        owner, netns = w.owner(owned), w.netns(owned)
        level = self.process
        used = level.table.used
        found = level.locate(
            w, owned, key_hash(owner, cgroup, netns), np.ones(len(owned), bool),
            Keys(owner, cgroup, netns.take),
        )  # fmt: skip
        extra[owned] = found.rows()
        moved = None
        if level.table.gave_up:
            moved = np.zeros(used + 1, np.intp)
            kept = level.table.moved_from
            moved[kept] = np.arange(1, len(kept) + 1)
        return owned, extra, moved

    def feed(
        self,
        w: Window,
        ends: Rows,
        age: I64,
        extra: npt.NDArray[np.uint16],
        owned: Rows,
        part: int,
    ) -> None:
        """Count a window. ``age`` is what pairing told of ``ends``, ``extra`` of each event.

        One end of ``part`` was looked for.
        """
        d = details(w, ends, age, extra, owned, part, self.timeouts)
        opener = extra & np.uint16(EXISTING - 1)
        meta, target = w.meta, w.target_hash
        opened = np.flatnonzero(opener)
        if opened.size:
            meta, target = meta.copy(), target.copy()
            target[opened] = w.target_hash_owned(opened)
            meta[opened] |= OWNED
            found = Found.of(opener.astype(np.intp))
            self.process.count(w, d, found)
            self.process.measure(d, self.process.slots(found, d.ends))

        self._space(w, d)
        fine = self._fine(self.pair, w, d, w.pair_hash, Keys(*w.src, w.meta.take))
        if fine.any():
            self._coarse(self.source, w, d, fine, w.src_only, Keys(*w.src, w.netns))

        fine = self._fine(self.target, w, d, target, Keys(*w.dst, meta.take))
        if fine.any():
            keys = Keys(None, None, meta.take)
            self._coarse(self.service, w, d, fine, lambda at: service_hash(some(meta, at)), keys)
            self._coarse(self.destination, w, d, fine, w.dst_only, Keys(*w.dst, w.netns))

    def look(self, w: Window, at: Rows, age: I64, extra: npt.NDArray[np.uint16]) -> None:
        """Count looks at living entries, for rows with detail. ``age`` in ns, -1: unknown."""
        idle = w.idle_ms(at).astype(np.int64)
        timeout = w.events["timeout_ms"][at]
        known = (age >= 0) & (idle >= 0)
        at, age, idle = at[known], age[known], idle[known]
        timeout, extra = timeout[known], extra[known]
        young = age < YOUNG_NS
        closed = np.isin(w.states(at), (TIME_WAIT, CLOSE)) & (w.proto(at) == TCP)
        unreplied = young & (w.status.take(at) & SEEN_REPLY == 0)
        assured = young & w.assured(at)
        seen = [young, closed, unreplied, assured]
        life = np.maximum(age / 1e6 - idle, 0).astype(np.float32)
        life_bin = histogram.bins(life)
        opener = (extra & np.uint16(EXISTING - 1)).astype(np.intp)
        meta = w.meta[at] | np.where(opener != 0, OWNED, np.uint64(0))
        found = [(self.process, opener)]
        for level, addresses, service in (
            (self.pair, w.src, w.meta[at]), (self.target, w.dst, meta),
        ):  # fmt: skip
            high, low = (part[at] for part in addresses)
            found.append((level, level.table.find_rows(key_hash(high, low, service))))
        for level, rows in found:
            slots = level.table.rich[rows].astype(np.intp)
            level.rich.count_looks(slots, seen, timeout, life_bin)

    def _space(self, w: Window, d: Details) -> None:
        """Count into the namespaces' table."""
        level, keys = self.space, Keys(None, None, w.netns)
        if not w.alone:
            level.count(w, d, level.locate(w, None, w.space_only(None), w.comes, keys))
            return
        first = np.zeros(1, np.intp)
        row = level.locate(w, first, w.space_only(first), np.ones(1, bool), keys).rows()
        level.count_all(w, d, int(row[0]))

    @staticmethod
    def _fine(level: Level, w: Window, d: Details, h: U64, keys: Keys) -> Left:
        """Count into a fine level; returns what its parents should see."""
        found = level.locate(w, None, h, w.comes, keys)
        level.count(w, d, found)
        for direction, at in d.directions:
            level.table.flags[found.rows(at)] |= np.uint8(1 << direction)
        slots = level.slots(found, d.ends)
        level.measure(d, slots)
        return Left(~found.hit, slots == 0)

    @staticmethod
    def _coarse(
        level: Level, w: Window, d: Details, left: Left,
        hashes: Callable[[Optional[Rows]], U64], keys: Keys,
    ) -> None:  # fmt: skip
        """Count what a fine level has no row for, and measure what it has no detail for."""
        wanted = left.events.copy()
        wanted[d.ends[left.ends]] = True
        number = int(np.count_nonzero(wanted))
        without_detail = number > np.count_nonzero(left.events)
        worth = wanted if without_detail and level.rich.free else w.comes & left.events
        if level.table.scarce and 4 * number > 3 * w.n:  # the few others are as soon looked up
            found = level.locate(w, None, hashes(None), worth, keys)
        else:
            at = np.flatnonzero(wanted)
            part = level.locate(w, at, hashes(at), worth.take(at), keys.at(at))
            found = part.among(w.n, at)
        level.measure(d, level.slots(found, d.ends) * left.ends)
        found.keep(left.events)
        level.count(w, d, found)

    def tick(self, number: int, seconds: float) -> None:
        """Close an interval in every table."""
        for level in self.all():
            level.tick(number, seconds)
