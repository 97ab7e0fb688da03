"""What only the heavier rows of a table have: lifetimes, states, sources, trend, samples.

A row refers to a slot of this pool; slot 0 is everybody else's and is never shown.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ctrace.model.histogram import BINS
from ctrace.model.keys.columns import I64, U64
from ctrace.model.keys.scatter import Rows, Scatter, add_at
from ctrace.record import RECORD, WORDS, words

U32 = npt.NDArray[np.uint32]

TREND: Final = 60
STATES: Final = 16
SAMPLES: Final = 3
LOOKS: Final = ("young", "closed", "unreplied", "assured", "reset")
"""Looks at living entries: at young ones (in any state), at those found closed; among the young,
without a reply, and ASSURED; and among the closed, those that an RST closed."""
YOUNG_NS: Final = 3_000_000_000
_HLL_BITS: Final = 10
REGISTERS: Final = 1 << _HLL_BITS
"""Standard error of a distinct count: 1.04 / sqrt(1024) = 3.3 %."""


class RichPool:
    """``slots`` slots of detail, one for each of a table's heavier rows."""

    def __init__(self, slots: int, distinct: bool) -> None:
        self.slots = slots
        n = slots + 1
        self.life = np.zeros((n, BINS), np.uint32)
        self.looked_life = np.zeros((n, BINS), np.uint32)
        """Of closed entries that were looked at: each of those is in ``life`` again, at its end."""
        self.residence = np.zeros((n, BINS), np.uint32)
        self.states = np.zeros((n, STATES), np.uint32)
        self.looks = np.zeros((n, len(LOOKS)), np.uint32)
        self.timeout = np.zeros((n, 2), np.uint32)
        """ms, of the latest entry found in TIME_WAIT, and in CLOSE."""
        self.trend = np.full((n, TREND), np.nan, np.float32)
        self.samples = np.zeros((n, SAMPLES), RECORD)
        self.sources = np.zeros((n, REGISTERS), np.uint8) if distinct else None
        self._above = np.full(n, _BELOW[0])
        """Sources with remaining bits at or above this change none of a slot's registers."""
        self._above[0] = 0
        self._noted = 0
        self._free = list(range(slots, 0, -1))

    def take(self, n: int) -> list[int]:
        """Up to ``n`` free slots."""
        return [self._free.pop() for _ in range(min(n, len(self._free)))]

    def give(self, slots: Rows) -> None:
        """Take slots back, emptied."""
        slots = slots[slots != 0]
        if not slots.size:
            return
        for part in self.parts():
            part[slots] = np.zeros((), part.dtype)
        self.trend[slots] = np.nan
        self._above[slots] = _BELOW[0]
        self._free.extend(int(slot) for slot in slots)

    @property
    def free(self) -> int:
        """How many slots are free."""
        return len(self._free)

    def parts(self) -> list[npt.NDArray[Any]]:
        """Every array."""
        parts: list[npt.NDArray[Any]] = [
            self.life,
            self.looked_life,
            self.residence,
            self.states,
            self.looks,
            self.timeout,
            self.trend,
            self.samples,
        ]
        return [*parts, self.sources] if self.sources is not None else parts

    @classmethod
    def needed(cls, slots: int, distinct: bool) -> int:
        """Bytes that this many slots take."""
        return cls(0, distinct).nbytes() * (slots + 1)

    def nbytes(self) -> int:
        """Memory held."""
        return sum(part.nbytes for part in self.parts())

    def merge(self, mine: int, other: RichPool, theirs: int) -> None:
        """Add what a slot of another pool has counted."""
        self.life[mine] += other.life[theirs]
        self.looked_life[mine] += other.looked_life[theirs]
        self.residence[mine] += other.residence[theirs]
        self.states[mine] += other.states[theirs]
        self.looks[mine] += other.looks[theirs]
        if self.sources is not None and other.sources is not None:
            np.maximum(self.sources[mine], other.sources[theirs], out=self.sources[mine])

    def count_ends(
        self,
        slots: Rows,
        state: Rows,
        residence: Rows,
        residence_bin: I64,
        life: Rows,
        life_bin: I64,
    ) -> None:
        """Count ends: a slot and state each; ``residence`` and ``life`` index the known."""
        Scatter(slots * STATES + state).add(self.states.reshape(-1), np.uint32(1))
        Scatter(slots.take(residence) * BINS + residence_bin).add(
            self.residence.reshape(-1), np.uint32(1)
        )
        Scatter(slots.take(life) * BINS + life_bin).add(self.life.reshape(-1), np.uint32(1))

    def keep(self, slots: Rows, latest: U64) -> None:
        """Keep records, as words, for samples, in turn after the first of each slot."""
        # Not kept: a copy of the model would get a view's own copy, apart from its array's.
        rows = words(self.samples.reshape(-1)).reshape(*self.samples.shape, WORDS)
        rows[slots, 1 + np.arange(len(latest)) % (SAMPLES - 1)] = latest

    def count_looks(
        self, slots: Rows, seen: list[npt.NDArray[np.bool_]], timeout: U32, life_bin: I64
    ) -> None:
        """Count looks: ``seen`` as in :data:`LOOKS`; the life of a closed one is final."""
        self.count_states(slots, seen)
        closed = slots[seen[1]]
        self.timeout[closed, seen[4][seen[1]].astype(np.intp)] = timeout[seen[1]]
        add_at(self.looked_life.reshape(-1), closed * BINS + life_bin[seen[1]], 1)

    def count_states(self, slots: Rows, seen: list[npt.NDArray[np.bool_]]) -> None:
        """Count looks that tell no life."""
        for column, which in enumerate(seen):
            add_at(self.looks[:, column], slots[which], 1)

    def count_sources(self, slots: Rows, register: I64, rest: U64) -> None:
        """Note sources, by HyperLogLog's register and remaining bits; in slot 0 none."""
        assert self.sources is not None
        if self._noted % _LEARN == 0:
            self._above[1:] = _BELOW.take(self.sources[1:].min(axis=1).astype(np.intp))
        self._noted += 1
        some = np.flatnonzero(rest < self._above.take(slots))
        if not some.size:
            return
        registers = self.sources.reshape(-1)
        at, rest = slots.take(some) * REGISTERS + register.take(some), rest.take(some)
        # The rank is higher than the register's when this many leading bits are zero.
        higher = np.flatnonzero(rest < _BELOW.take(registers.take(at).astype(np.intp)))
        if higher.size:
            # The exponent of a float is the place of its highest bit.
            exponent = (rest[higher].astype(np.float64).view(np.int64) >> 52) - 1023
            rank = np.clip(_REST_BITS - exponent, 1, _REST_BITS + 1).astype(np.uint8)
            np.maximum.at(registers, at[higher], rank)


_REST_BITS: Final = 52
_LEARN: Final = 8
"""Windows after which the lowest registers are recomputed: they only rise."""
_BELOW: Final = np.array([1 << max(0, _REST_BITS - rank) for rank in range(64)], np.uint64)


def registers_of(h: U64) -> tuple[I64, U64]:
    """HyperLogLog's register and the 52 bits that its rank is taken from."""
    register = (h >> np.uint64(64 - _HLL_BITS)).view(np.int64)
    return register, (h << np.uint64(_HLL_BITS)) >> np.uint64(64 - _REST_BITS)


def distinct(registers: npt.NDArray[np.uint8]) -> int:
    """HyperLogLog's estimate, with linear counting while registers are empty."""
    m = len(registers)
    raw = 0.7213 / (1 + 1.079 / m) * m * m / float(np.exp2(-registers.astype(float)).sum())
    empty = int(np.count_nonzero(registers == 0))
    if raw <= 2.5 * m and empty:
        return round(m * float(np.log(m / empty)))
    return round(raw)
