"""Detail of the heavier keys: distinct sources."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from ctrace.model.keys.rich import REGISTERS, RichPool, distinct, registers_of


def registers(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    """HyperLogLog as in the book: the place of the first bit that is set, the largest of each."""
    found = np.zeros(REGISTERS, np.uint8)
    for h in hashes.tolist():
        rest = h & ((1 << 54) - 1)
        rank = 55 - rest.bit_length() if rest >> 2 else 53
        found[h >> 54] = max(int(found[h >> 54]), rank)
    return found


@pytest.mark.parametrize("n", [5, 3_000, 40_000])
def test_registers_are_those_of_all_sources_however_few_are_looked_at(n: int) -> None:
    rng = np.random.default_rng(n)
    pool = RichPool(3, distinct=True)
    used, given = pool.take(2)
    for turn in range(2):
        hashes = rng.integers(0, 1 << 64, n, np.uint64)
        slots = np.where(rng.random(n) < 0.7, used, 0)
        for at in range(0, n, max(1, n // 20)):
            part = slice(at, at + max(1, n // 20))
            pool.count_sources(slots[part], *registers_of(hashes[part]))
        assert pool.sources is not None
        expected = registers(hashes[slots == used])
        assert (pool.sources[used] == expected).all()
        assert not pool.sources[0].any()
        assert not pool.sources[given].any()
        seen = np.count_nonzero(slots == used)
        assert distinct(pool.sources[used]) == pytest.approx(seen, rel=0.15, abs=2)
        if not turn:  # the slot is emptied, and begins anew
            pool.give(np.array([used]))
            assert pool.take(1) == [used]
