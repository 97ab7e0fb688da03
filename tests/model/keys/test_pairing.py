"""From births to ends: address reuse, losses, late reports, unknown births."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.examples import examples

from ctrace.model.keys.pairing import EXISTING, UNKNOWN, Births
from ctrace.record import PART

U64 = npt.NDArray[np.uint64]
MS = 1_000_000
UNIT = 1 << 14
LEFT_OUT = -2
"""What these tests write for an end that was not looked for."""


def step(
    births: Births, rows: list[tuple[int, int, bool]], extra: list[int] | None = None
) -> tuple[list[int], list[int]]:
    """Rows of (ct, ms, ends); returns an age for each, UNKNOWN for births, and its ``extra``."""
    ct = np.array([row[0] for row in rows], np.uint64)
    ts = np.array([row[1] * MS for row in rows], np.uint64)
    ends = np.array([row[2] for row in rows], bool)
    tags = np.array(extra or [0] * len(rows), np.uint16)
    netns = np.full(len(ct), 7 << 32, np.uint64)
    ended, ages, found = births.step(ct, netns, ts, ends, tags)
    assert ends[ended].all()
    age = np.full(len(ct), UNKNOWN)
    age[ended] = ages
    return age.tolist(), found.tolist()


def test_pairs_within_and_across_windows() -> None:
    births = Births(1 << 10)
    age, _ = step(births, [(1, 10, False), (2, 11, False), (1, 15, True)])
    assert age == [-1, -1, 5 * MS]
    age, _ = step(births, [(2, 511, True)])
    assert abs(age[0] - 500 * MS) <= UNIT


def test_an_address_reused_in_one_window_starts_anew() -> None:
    births = Births(1 << 10)
    step(births, [(1, 0, False)])
    age, _ = step(births, [(1, 100, True), (1, 100, False), (1, 130, True), (1, 131, False)])
    assert abs(age[0] - 100 * MS) <= UNIT
    assert age[2] == 30 * MS
    age, _ = step(births, [(1, 231, True)])
    assert abs(age[0] - 100 * MS) <= UNIT


def test_a_lost_end_does_not_lengthen_the_next_entry() -> None:
    births = Births(1 << 10)
    step(births, [(1, 0, False)])
    step(births, [(1, 5000, False)])  # the first one's end was lost
    age, _ = step(births, [(1, 6000, True)])
    assert abs(age[0] - 1000 * MS) <= UNIT
    age, _ = step(births, [(1, 7000, True)])  # and a birth was lost
    assert age == [-1]


def test_an_end_reported_before_its_birth_leaves_nothing_behind() -> None:
    births = Births(1 << 10)
    step(births, [(1, 100, True)])
    step(births, [(1, 99, False)])
    assert births.late == 1
    age, _ = step(births, [(1, 900, True)])
    assert age == [-1]


def test_a_birth_after_an_unmatched_end_is_kept() -> None:
    births = Births(1 << 10)
    step(births, [(1, 100, True)])
    step(births, [(1, 101, False)])
    age, _ = step(births, [(1, 900, True)])
    assert abs(age[0] - 799 * MS) <= UNIT


def test_entries_older_than_the_tracer_have_no_age() -> None:
    births = Births(1 << 10)
    step(births, [(1, 0, False)], [EXISTING])
    age, found = step(births, [(1, 900, True)])
    assert age == [-1]
    assert found == [EXISTING]


def test_the_opener_comes_back_with_the_end() -> None:
    births = Births(1 << 10)
    _, found = step(births, [(1, 0, False), (2, 1, False), (1, 2, True)], [5, 6, 0])
    assert found == [5, 6, 5]
    _, found = step(births, [(2, 3, True)])
    assert found == [6]


def test_uptime_beyond_the_time_field_wraps_cleanly() -> None:
    births = Births(1 << 10)
    wrap_ms = (1 << 40) * UNIT // MS
    step(births, [(1, wrap_ms - 5, False)])
    age, _ = step(births, [(1, wrap_ms + 995, True)])
    assert abs(age[0] - 1000 * MS) <= UNIT


def test_memory_stays_fixed_and_the_young_survive() -> None:
    births = Births(1 << 10)
    before = births.nbytes()
    rng = np.random.default_rng(2)
    cts = rng.integers(1, 2**48, 20_000)
    for at in range(0, len(cts), 1000):
        step(births, [(int(ct), at + i, False) for i, ct in enumerate(cts[at : at + 1000])])
    assert births.nbytes() == before
    assert births.alive() <= 1 << 10
    assert births.forgotten > 10_000
    last = [(int(ct), 30_000, True) for ct in cts[-100:]]
    age, _ = step(births, last)
    assert sum(a >= 0 for a in age) > 70  # buckets fill unevenly


@examples(100)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.booleans(), st.integers(0, 500)), max_size=120),
    st.lists(st.integers(0, 120), max_size=5),
)
def test_agrees_with_a_dictionary(moves: list[tuple[int, bool, int]], cuts: list[int]) -> None:
    """Any sequence of births and ends, lost ones included, cut anywhere."""
    births, alive = Births(1 << 12), dict[int, int]()
    now, rows, expected = 0, [], []
    for ct, ends, pause in moves:
        now += pause + 200  # farther apart than a late report can be
        rows.append((ct, now, ends))
        if ends:
            born = alive.pop(ct, None)
            expected.append(-1 if born is None else (now - born) * MS)
        else:
            alive[ct] = now
            expected.append(-1)
    shown: list[int] = []
    edges = sorted({min(c, len(rows)) for c in cuts} | {0, len(rows)})
    for a, b in zip(edges, edges[1:]):
        shown += step(births, rows[a:b])[0]
    for mine, right in zip(shown, expected, strict=True):
        assert (mine < 0) == (right < 0)
        assert abs(mine - right) <= UNIT


def flood(births: Births, cts: range, ms: int, ends: bool, extra: int = 0) -> tuple[
    npt.NDArray[np.int64], npt.NDArray[np.uint16]
]:  # fmt: skip
    """Births or ends of many addresses at one moment."""
    ct = np.array(cts, np.uint64) * np.uint64(320) + np.uint64(0xFFFF888000000000)
    ts = np.full(len(ct), ms * MS, np.uint64)
    kinds = np.full(len(ct), ends)
    netns, extras = np.zeros(len(ct), np.uint64), np.full(len(ct), extra, np.uint16)
    ended, ages, found = births.step(ct, netns, ts, kinds, extras)
    age = np.full(len(ct), LEFT_OUT)
    age[ended] = ages
    return age, found


def test_thin_pairs_an_even_part_and_says_what_it_left_out() -> None:
    births = Births(1 << 16)
    births.thin_out(True, 0)
    flood(births, range(20_000), 10, False)
    age, _ = flood(births, range(20_000), 510, True)
    looked = age != LEFT_OUT
    assert looked.mean() == pytest.approx(1 / PART, rel=0.1)
    assert (np.abs(age[looked] - 500 * MS) <= UNIT).all()
    age, _ = flood(births, range(20_000, 40_000), 520, True)  # never born here
    assert set(age.tolist()) == {UNKNOWN, LEFT_OUT}


def test_thin_leaves_out_none_whose_opener_is_known() -> None:
    births = Births(1 << 16)
    flood(births, range(1000), 5, False, extra=3)  # before it is thin: still known
    births.thin_out(True, 6 * MS)
    flood(births, range(1000, 3000), 10, False, extra=9)
    flood(births, range(3000, 20_000), 10, False)
    for cts, ms, extra in ((range(1000), 505, 3), (range(1000, 3000), 510, 9)):
        age, found = flood(births, cts, ms, True)
        assert (np.abs(age - 500 * MS) <= UNIT).all()
        assert (found == extra).all()
    _, found = flood(births, range(3000, 20_000), 510, True)
    assert not found.any()
    births.thin_out(True, 600 * MS)  # the openers' entries have gone: no others need a look
    flood(births, range(20_000), 610, False)
    age, _ = flood(births, range(20_000), 1110, True)
    assert (age != LEFT_OUT).mean() == pytest.approx(1 / PART, rel=0.1)


def test_after_a_flood_nothing_is_taken_for_what_was_left_out() -> None:
    births = Births(1 << 16)
    flood(births, range(10_000), 0, False)
    births.thin_out(True, 1 * MS)
    flood(births, range(10_000), 1000, False)  # the same addresses anew: most are left out
    births.thin_out(False, 2000 * MS)
    flood(births, range(10_000, 20_000), 2500, False)
    age, _ = flood(births, range(10_000), 3000, True)
    assert set(np.where(age == LEFT_OUT, 0, (age + UNIT) // (2000 * MS)).tolist()) == {0, 1}
    assert (age == LEFT_OUT).mean() == pytest.approx(1 - 1 / PART, rel=0.05)
    age, _ = flood(births, range(10_000, 20_000), 3000, True)
    assert (np.abs(age - 500 * MS) <= UNIT).all()
    peeked, _ = births.peek(
        np.arange(20_000, 20_100, dtype=np.uint64),
        np.zeros(100, np.uint64),
        np.full(100, 3000 * MS, np.uint64),
    )
    assert (peeked == UNKNOWN).all()


@examples(60)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 40), st.booleans(), st.integers(0, 500), st.sampled_from([0, 0, 5])
        ),
        max_size=150,
    ),
    st.lists(st.tuples(st.integers(0, 150), st.booleans()), max_size=5),
)
def test_thin_is_right_or_silent(
    moves: list[tuple[int, bool, int, int]], cuts: list[tuple[int, bool]]
) -> None:
    """Whenever it begins and ends: an age that is told is the true one, and so is an opener."""
    births, alive = Births(1 << 12), dict[int, tuple[int, int]]()
    now, rows, extras, expected = 0, [], [], []
    for ct, ends, pause, extra in moves:
        now += pause + 200
        rows.append((ct * 100, now, ends))  # five of forty are looked at
        extras.append(0 if ends else extra)
        if ends:
            born = alive.pop(ct, None)
            expected.append((-1, 0) if born is None else ((now - born[0]) * MS, born[1]))
        else:
            alive[ct] = now, extra
            expected.append((-1, extra))
    at, shown = 0, list[tuple[int, int]]()
    for cut, thin in [*sorted(cuts), (len(rows), False)]:
        part = rows[at : max(at, cut)]
        age, found = step(births, part, extras[at : max(at, cut)])
        shown += zip(age, found, strict=True)
        at = max(at, cut)
        births.thin_out(thin, now if not part else part[-1][1] * MS)
    for (told, opener), (right_age, right_extra) in zip(shown, expected, strict=True):
        assert opener == right_extra
        assert told < 0 or abs(told - right_age) <= UNIT
