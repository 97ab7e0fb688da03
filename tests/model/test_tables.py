"""Fill, forecast, reconciliation, wraps and the pinned share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.shapes import NETNS, SECOND, SEEN_REPLY, START, Trace, steady

from ctrace.batch import Batch, Clock, HookInfo, Names, Netns, TableReading
from ctrace.model.model import Model
from ctrace.model.sample import ENOUGH, FEW, WALKS, Dumped, PinnedSample
from ctrace.model.snapshot import Reconciliation, Table
from ctrace.model.tables import Rising
from ctrace.record import N_REASONS, Kind, Reason, empty

OFFSET = 1_700_000_000 * SECOND


def model() -> Model:
    return Model(HookInfo("fentry"), Clock(OFFSET), START)


def table(m: Model, netns: int = NETNS) -> Table:
    return next(t for t in m.snapshot().tables if t.netns == netns)


def reading(count: int, stats: dict[str, int] | None = None, limit: int = 1000) -> TableReading:
    return TableReading(NETNS, count, limit, 1024, stats or {})


def counts(**by_reason: int) -> dict[int, np.ndarray]:
    array = np.zeros(N_REASONS, np.uint64)
    for name, value in by_reason.items():
        array[Reason[name]] = value
    return {NETNS: array}


def at(second: float) -> int:
    return START + int(second * SECOND)


def test_counters_agree_with_the_kernels() -> None:
    m = model()
    zero = {"drop": 0, "early_drop": 0, "insert_failed": 0}
    m.update(Batch(empty(), at(1), counts=counts(NEW=10), tables=(reading(10, zero),)))
    m.update(
        Batch(empty(), at(2), counts=counts(NEW=30, EXPIRED=5, CLASH=2, TABLE_FULL=3, EVICTED=1),
              tables=(reading(24, {"drop": 5, "early_drop": 1, "insert_failed": 2}),))
    )  # fmt: skip
    t = table(m)
    assert t.totals.insert == 30
    assert t.totals.destroy == 6
    assert t.off_by == Reconciliation()


def test_a_namespace_that_only_counters_know_goes_once_it_is_idle_and_empty() -> None:
    m = model()

    def shown(second: float, **by_reason: int) -> list[str]:
        m.update(Batch(empty(), at(second), counts=counts(**by_reason)))
        return [t.name for t in m.snapshot().tables]

    name = [f"netns:{NETNS}"]
    assert shown(1, NEW=5, EXPIRED=4) == name
    assert shown(9, NEW=5, EXPIRED=4) == name, "it holds an entry"
    assert shown(10, NEW=5, EXPIRED=5) == name
    assert shown(16, NEW=5, EXPIRED=5) == []
    assert m.snapshot().totals.insert == 5
    assert shown(17, NEW=6, EXPIRED=5) == name


def test_one_hash_table_holds_the_entries_of_all_namespaces() -> None:
    m = model()
    others = tuple(TableReading(NETNS + n, 10 * n, 1000, 1024, {}) for n in (1, 2))
    m.update(Batch(empty(), at(1), tables=(reading(7), *others)))
    assert [t.hashed for t in m.snapshot().tables] == [37, 37, 37]


def test_disagreement_is_shown() -> None:
    m = model()
    first = {"drop": 100, "early_drop": 0, "insert_failed": 0}
    m.update(Batch(empty(), at(1), counts=counts(NEW=10), tables=(reading(10, first),)))
    second = {"drop": 110, "early_drop": 4, "insert_failed": 0}
    m.update(
        Batch(empty(), at(2), counts=counts(NEW=30, TABLE_FULL=7), tables=(reading(25, second),))
    )
    off = table(m).off_by
    assert off.count == 20 - 15
    assert off.drop == 7 - 10
    assert off.early_drop == -4
    assert off.insert_failed == 0


def test_kernel_counters_wrap_at_32_bits() -> None:
    rising = Rising()
    for value in (2**32 - 10, 2**32 - 1, 5, 15):
        rising.see(value)
    assert rising.total == 9 + 6 + 10


def test_a_counter_that_starts_again_only_adds() -> None:
    rising = Rising()
    for value in (100, 150, 20, 30):
        rising.see(value)
    assert rising.total == 50 + 20 + 10


def test_attaching_anew_does_not_lose_totals() -> None:
    m = model()
    m.update(Batch(empty(), at(1), counts=counts(NEW=100), tables=(reading(100),)))
    m.update(Batch(empty(), at(2), counts=counts(NEW=4), tables=(reading(104),)))
    assert table(m).totals.insert == 104
    assert table(m).off_by.count == 0


def test_lost_events_do_not_touch_totals() -> None:
    m = model()
    m.update(Batch(empty(), at(1), lost=500, counts=counts(NEW=500), tables=(reading(500),)))
    s = m.snapshot()
    assert s.lost == 500
    assert s.totals.insert == 500
    assert s.rates.insert == pytest.approx(500)
    assert s.culprits == ()


def test_rates_follow_events_under_a_filter() -> None:
    trace = Trace()
    trace.flows(np.linspace(0, 0.9, 50), 0.01, 60.0)
    m = model()
    m.update(Batch(trace.events(1.0), at(1), counts=counts(NEW=1000), tables=(reading(1000),)))
    assert m.snapshot().rates.insert == pytest.approx(1000)
    filtered = m.snapshot(filter_text="-p tcp")
    assert filtered.rates.insert == pytest.approx(50)
    assert filtered.totals.insert == 50
    assert filtered.tables[0].totals.insert == 1000


def test_full_since_and_no_longer() -> None:
    m = model()
    for second, refused in ((1, 0), (2, 0), (3, 5), (4, 9)):
        m.update(Batch(empty(), at(second), counts=counts(NEW=10, TABLE_FULL=refused),
                       tables=(reading(1000),)))  # fmt: skip
    assert table(m).full_since == pytest.approx((OFFSET + at(2)) / 1e9)
    for second in range(5, 12):
        m.update(Batch(empty(), at(second), counts=counts(NEW=10, TABLE_FULL=9),
                       tables=(reading(400),)))  # fmt: skip
    assert table(m).full_since is None


def test_pinned_from_existing_entries() -> None:
    trace = Trace()
    trace.existing(300)
    trace.existing(100, status=0, dport=53, proto=17)
    m = model()
    m.update(Batch(trace.events(), at(1), tables=(reading(400),)))
    assert table(m).pinned == pytest.approx(0.75)


def test_pinned_is_unknown_while_only_inserts_were_seen() -> None:
    trace = Trace()
    trace.flows(np.linspace(0, 0.9, 400), 0.01, 600.0)
    m = model()
    m.update(Batch(trace.events(1.0), at(1), tables=(reading(400),)))
    assert table(m).pinned is None


def test_pinned_from_what_is_left_of_the_dump() -> None:
    left = Dumped()
    assert left.share(0) is None
    left.came(400, 300)
    left.went(90, 0)
    assert left.share(310) == pytest.approx(300 / 310)
    assert left.share(330) is None  # too many came since
    left.went(310, 310)
    assert left.share(0) is None
    assert left.assured == 0


def test_entries_of_the_dump_that_end_are_noticed() -> None:
    trace = Trace()
    trace.existing(300)
    trace.existing(100, status=0, dport=53, proto=17)
    trace.flows(np.linspace(1, 2, 80), 0.0, 0.5, status=0, dport=53, proto=17)
    trace.parts.pop(-2)  # those are of the dump: only their ends are seen
    m = model()
    for batch in trace.batches(4):
        m.update(batch)
    assert table(m).pinned == pytest.approx(300 / 320)


def test_evicted_entries_say_nothing_of_those_that_stay() -> None:
    """A table full of ASSURED entries: only the few others ever end."""
    trace = Trace()
    trace.flows(np.linspace(0, 5, 900), 0.01, 600.0)
    trace.flows(steady(40, 60, trace.rng), 0.0, 1.0, status=0, proto=17, dport=8125)
    m = model()
    for batch in trace.batches(50):
        m.update(batch)
    assert table(m).totals.destroy > 1000
    assert table(m).pinned is None


@given(st.integers(0, 2**32), st.floats(0, 1), st.integers(FEW, 5 * ENOUGH))
def test_a_sampled_share_is_within_its_error(seed: int, share: float, met: int) -> None:
    assured = int(np.random.default_rng(seed).binomial(met, share))
    sample = PinnedSample()
    sample.see(0, 0)
    sample.see(met, assured)
    found = sample.share()
    assert found is not None
    assert 0 < found[1] <= 0.5 / met**0.5
    assert abs(found[0] - share) < 6 * found[1]


def test_a_sampled_share_is_of_late_and_needs_some() -> None:
    sample = PinnedSample()
    assert sample.share() is None
    met = assured = 0
    for _ in range(30):  # all ASSURED
        met, assured = met + 100, assured + 100
        sample.see(met, assured)
    for _ in range(4):  # then none
        met += 100
        sample.see(met, assured)
    found = sample.share()
    assert found is not None
    assert found[0] == 0
    assert found[1] == pytest.approx(0.0035, abs=1e-4)
    for _ in range(WALKS):  # nothing is met any more
        sample.see(met, assured)
    assert sample.share() is None
    sample.see(10, 10)  # another capture counts from zero
    sample.see(10 + FEW, 10)
    few = sample.share()
    assert few is not None
    assert few[0] == 0
    assert few[1] == pytest.approx(0.04, abs=0.01)


def test_what_walks_met_is_preferred() -> None:
    trace = Trace()
    trace.existing(400)
    m = model()
    m.update(Batch(trace.events(), at(1), tables=(replace(reading(400), met=50, met_assured=50),)))
    assert table(m).pinned == pytest.approx(1.0)
    assert table(m).pinned_error is None
    met = trace.events()
    met["kind"], met["ts"], met["status"][100:] = int(Kind.MET), at(1.9), SEEN_REPLY
    # walks met some of them before they lost what pins them: each counts as it was last seen
    later = replace(reading(400), met=850, met_assured=350)
    m.update(Batch(met, at(2), tables=(later,)))
    assert table(m).pinned == pytest.approx(0.25, abs=0.01)
    assert table(m).pinned_error == pytest.approx((0.25 * 0.75 / 400) ** 0.5, rel=0.02)


def test_what_walks_met_counts_where_looks_are_of_chosen_flows_only() -> None:
    trace = Trace()
    trace.existing(100)
    m = model()
    m.update(Batch(trace.events(), at(1), tables=(replace(reading(400), met=50, met_assured=50),)))
    later = replace(reading(400), met=450, met_assured=150)
    m.update(Batch(empty(), at(2), tables=(later,)))
    assert table(m).pinned == pytest.approx(0.25)


def test_names_and_unknown_namespaces() -> None:
    m = model()
    names = Names(netns={NETNS: Netns(NETNS, "init"), 77: Netns(77, "web", active=False)})
    m.update(Batch(empty(), at(1), tables=(reading(5), TableReading(99, 1, 10, 4)), names=names))
    shown = {t.netns: t.name for t in m.snapshot().tables}
    assert shown == {NETNS: "init", 99: "netns:99"}


def test_the_count_is_of_the_same_moment_as_what_stands_beside_it() -> None:
    """Read once a second, counted with each batch."""
    m = model()

    def update(at: float, inserts: int, destroys: int, count: int | None) -> None:
        now = START + round(at * SECOND)
        read = () if count is None else (replace(reading(count), at=now),)
        told = counts(NEW=inserts, EXPIRED=destroys)
        m.update(Batch(empty(), now, counts=told, tables=read))

    update(1.0, 40, 10, 130)
    assert table(m).count == 130
    update(1.5, 60, 15, None)
    assert table(m).count == 145
    update(2.0, 70, 15, 156)  # one is not confirmed yet
    assert table(m).count == 156
