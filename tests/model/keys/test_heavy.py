"""The bounded table: exact while keys fit, and never off by more than it says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.examples import examples
from kit.shapes import NETNS, START, Trace

from ctrace.model.keys.columns import Keys, grouped, key_hash, service_hash
from ctrace.model.keys.heavy import HeavyTable
from ctrace.model.keys.index import Found
from ctrace.model.keys.scatter import Scatter
from ctrace.model.keys.window import window
from ctrace.record import RECORD, Events, Kind


def inserts(keys: list[int]) -> Events:
    rows = np.zeros(len(keys), RECORD)
    rows["ts"], rows["kind"], rows["reason"] = START, int(Kind.INSERT), 1
    rows["dport"], rows["proto"], rows["family"] = 1, 6, 2
    rows["netns"] = keys
    return rows


def feed(table: HeavyTable, keys: list[int]) -> None:
    w = window(inserts(keys))
    none = np.zeros(w.n, np.uint64)
    h = key_hash(none, none, w.netns(np.arange(w.n)))
    rows = table.locate(h, w.comes, Keys(None, None, w.netns))
    table.count(rows, w)


def rows_of(table: HeavyTable) -> dict[int, tuple[int, int]]:
    table.drain()
    return {
        int(table.key[row, 2]) >> 32: (int(table.counters["inserts"][row]), int(table.error[row]))
        for row in range(1, table.used + 1)
    }


@examples(80)
@given(st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=200), max_size=12))
def test_bounds_hold_for_every_key(windows: list[list[int]]) -> None:
    table = HeavyTable(64)
    truth: Counter[int] = Counter()
    for keys in windows:
        feed(table, keys)
        truth.update(keys)
    shown = rows_of(table)
    assert table.used <= 64
    for key, count in truth.items():
        if key in shown:
            mine, error = shown[key]
            assert mine <= count <= mine + error
        else:
            assert count <= table.floor
    if len(truth) <= 64:
        assert shown == {key: (count, 0) for key, count in truth.items()}
        assert table.distinct() == len(truth)


def test_a_heavy_key_among_a_million_light_ones() -> None:
    rng = np.random.default_rng(5)
    table = HeavyTable(2000)
    total = 0
    for _ in range(20):
        light = rng.integers(1000, 4_000_000_000, 20_000)
        feed(table, [*light.tolist(), *([7] * 200)])
        total += 200
    shown = rows_of(table)
    mine, error = shown[7]
    assert mine <= total <= mine + error
    # The sketch has 16,384 cells for 400,000 light keys: about 24 in each.
    assert error < total
    assert table.floor < 200


@pytest.mark.parametrize("events", [10, 600, 5000])
def test_a_heavy_key_that_comes_late_is_named(events: int) -> None:
    """Also one with more events in a window than there are rows to give away."""
    rng = np.random.default_rng(6)
    table = HeavyTable(2000)
    for number in range(30):
        light = rng.integers(1000, 4_000_000_000, 20_000)
        feed(table, [*light.tolist(), *([7] * events if number >= 20 else [])])
    assert table.scarce
    mine, error = rows_of(table)[7]
    assert mine <= 10 * events <= mine + error
    assert error < 100
    assert table.floor < 100  # no higher for the heavy one


def test_distinct_keys_beyond_the_rows() -> None:
    table = HeavyTable(500)
    feed(table, list(range(1, 401)))
    assert table.distinct() == 400
    feed(table, list(range(1, 6001)))
    assert table.distinct() == pytest.approx(6000, rel=0.05)


def test_a_key_without_address_has_one_hash() -> None:
    """By it a coarse table finds what a finer one hands over."""
    meta = np.array([0, 443 | 6 << 16 | NETNS << 32, 53 | 17 << 16], np.uint64)
    none = np.zeros(len(meta), np.uint64)
    assert service_hash(meta).tolist() == key_hash(none, none, meta).tolist()


@pytest.mark.parametrize("step", [1, 2, 256, 65536, 1 << 24])
@pytest.mark.parametrize("ports", [1, 5, 1000])
def test_keys_in_a_row_lie_apart(step: int, ports: int) -> None:
    """Addresses and ports in sequence: none shares a hash, few another's place of the index."""
    n = 24_000
    at = np.arange(n, dtype=np.uint64)
    host = (at // np.uint64(ports) * np.uint64(step)) & np.uint64(0xFFFFFFFF)
    host += at // np.uint64(ports) * np.uint64(step) >> np.uint64(32)
    low = host.astype(np.uint32).byteswap().astype(np.uint64) << np.uint64(32) | np.uint64(
        0xFFFF0000
    )
    meta = at % np.uint64(ports) | np.uint64(6 << 16 | NETNS << 32)
    h = np.unique(key_hash(np.zeros(n, np.uint64), low, meta) >> np.uint64(18))
    assert len(h) == n
    home = (h >> np.uint64(64 - 18 - 17)).astype(np.int64)  # of 131,072 places
    place = np.maximum.accumulate(home - np.arange(n)) + np.arange(n)
    assert np.mean(place > home) < 0.3
    assert (place - home).max() <= 8


def test_distinct_keys_in_a_row_are_estimated_as_well() -> None:
    """What counts them must not see how evenly they lie."""
    table = HeavyTable(1000)
    for first in range(0, 16_000, 2000):
        feed(table, list(range(NETNS + first, NETNS + first + 2000)))
    assert table.distinct() == pytest.approx(16_000, rel=0.04)


def test_a_hash_of_zero_is_a_key_like_any_other() -> None:
    table = HeavyTable(64)
    h = np.array([0, 0, 5 << 40], np.uint64)
    assert not table.index.find(h).hit.any()
    w = window(inserts([0, 0, 0]))
    found = table.locate(h, w.comes, Keys(None, None, w.netns))
    assert found.rows().tolist() == [1, 1, 2]
    assert table.index.find(h).rows().tolist() == [1, 1, 2]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=60),
    st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_what_was_found_reads_alike_in_every_way(rows: list[int], kept: list[bool]) -> None:
    given_rows = np.array(rows)
    found = Found.of(given_rows).among(80, np.arange(5, 5 + len(rows)))
    assert found.rows().tolist() == [0] * 5 + rows + [0] * (75 - len(rows))
    found.keep(np.array([True] * 5 + kept + [True] * 15))
    expected = np.zeros(80, np.intp)
    expected[5 : 5 + len(rows)] = given_rows * np.array(kept[: len(rows)])
    for _ in range(2):  # also once all rows were asked for
        assert found.rows().tolist() == expected.tolist()
        assert found.rows(np.arange(0, 80, 3)).tolist() == expected[::3].tolist()
        at, there = found.split()
        assert (at is None) == (np.count_nonzero(expected) > 60)
        which = np.arange(80) if at is None else at
        assert expected[which].tolist() == there.tolist()


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=300))
def test_grouping_finds_each_value_once(values: list[int]) -> None:
    h = np.array(values, np.uint64)
    distinct, count, order, starts = grouped(h)
    assert sorted(order.tolist()) == list(range(len(h)))
    total: Counter[int] = Counter()
    for value, n in zip(distinct.tolist(), count.tolist(), strict=True):
        total[value] += n
    assert total == Counter(values)
    assert h[order[starts]].tolist() == distinct.tolist()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1000)), max_size=60))
def test_both_ways_of_adding_agree(pairs: list[tuple[int, int]]) -> None:
    rows = np.array([row for row, _ in pairs], np.intp)
    values = np.array([value for _, value in pairs], np.int64)
    fast, slow = np.zeros(10, np.int64), np.zeros(10, np.int64)
    Scatter(rows, fast=True).add(fast, values)
    Scatter(rows, fast=False).add(slow, values)
    assert fast.tolist() == slow.tolist()
    ones_fast, ones_slow = np.zeros(10, np.uint32), np.zeros(10, np.uint32)
    Scatter(rows, fast=True).add(ones_fast, 1)
    Scatter(rows, fast=False).add(ones_slow, 1)
    assert ones_fast.tolist() == ones_slow.tolist()


def test_memory_is_fixed_at_any_cardinality() -> None:
    table = HeavyTable(1000)
    before = table.nbytes()
    rng = np.random.default_rng(1)
    for _ in range(10):
        feed(table, rng.integers(1, 4_000_000_000, 20_000).tolist())
    assert table.nbytes() == before


def test_trace_helper_makes_what_it_says() -> None:
    trace = Trace()
    trace.flows(np.array([1.0]), 0.5, 1.5)
    rows = trace.events()
    assert rows["kind"].tolist() == [1, 2]
    assert int(rows["ts"][1] - rows["ts"][0]) == 2_000_000_000
    assert int(rows["idle_ms"][1]) == 1500
