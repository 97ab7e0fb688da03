"""One table of keys with the detail of its heavier rows, and what it overflows into."""

from __future__ import annotations

from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.model.keys.columns import U64, Keys, Window, key_hash
from ctrace.model.keys.details import SAMPLED, Details
from ctrace.model.keys.heavy import HeavyTable
from ctrace.model.keys.index import Found
from ctrace.model.keys.rich import RichPool
from ctrace.model.keys.scatter import Rows, add_at
from ctrace.record import Status

_SWAPS: Final = 32
"""Detail slots that move to another row per interval, at most."""


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
        """Hand the counts of pruned rows to the coarser levels."""
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
        """Count a window that belongs to one row."""
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
