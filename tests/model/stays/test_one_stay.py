"""One computation of how long entries stay: WHY, the table of keys and JSON say the same."""

from __future__ import annotations

from typing import Optional

import numpy as np
import pytest
from kit.shapes import ASSURED, SEEN_REPLY, START, Trace

from ctrace.batch import Clock, HookInfo
from ctrace.model import histogram, stays
from ctrace.model.composition import Looks
from ctrace.model.keys.columns import CLOSE
from ctrace.model.model import Model
from ctrace.model.sample import ROW
from ctrace.model.snapshot import Culprit
from ctrace.record import Kind, Reason

NO_LOOKS = Looks(np.zeros(0, ROW))


@pytest.mark.parametrize(("rate", "stay"), [(10.0, 8.0), (200.0, 30.0)])
def test_the_check_by_load_agrees_with_a_steady_load(rate: float, stay: float) -> None:
    """Held over new is Little's mean; it comes from other counts than the percentiles."""
    held = round(rate * stay)
    ended = np.zeros(histogram.BINS, np.int64)
    ended[np.searchsorted(histogram.EDGES, stay, "right") - 1] = 1000
    ages = np.linspace(0, stay, 64)
    curve = stays.survival(ended, 1000, stays.Living(ages, held))
    told = stays.told(curve, NO_LOOKS, held, rate, stays.Going(1000, 1.0))
    assert told.p50 is not None
    assert told.by_load is not None
    assert told.by_load == pytest.approx(told.p50, rel=0.2)


def test_without_new_entries_there_is_no_check() -> None:
    curve = stays.survival(np.zeros(histogram.BINS, np.int64), 0, stays.Living(np.zeros(0), 0))
    assert stays.told(curve, NO_LOOKS, 50, 0.0, stays.Going(0, 1.0)).by_load is None


def test_where_no_end_was_measured_those_that_are_left_do_not_speak_for_all() -> None:
    living = stays.Living(np.linspace(0, 60, 64), 200)
    none = np.zeros(histogram.BINS, np.int64)
    few, many = stays.survival(none, 5, living), stays.survival(none, 5000, living)
    assert few.at_least is not None
    assert few.until > 0
    assert (many.at_least, many.until) == (None, 0.0)
    going = stays.Going(0, 60.0, young=120.0)
    told = stays.told(many, NO_LOOKS, 200, 30.0, going)
    assert (told.p50, told.at_least) == (None, None)


def test_closed_young_ones_tell_their_timeout_unless_half_has_gone_before() -> None:
    living = stays.Living(np.linspace(0, 9, 64), 300)
    none = np.zeros(histogram.BINS, np.int64)
    going = stays.Going(0, 60.0, young=120.0)
    told = stays.told(stays.survival(none, 0, living), NO_LOOKS, 300, 30.0, going)
    assert (told.p50, told.by, told.at_least) == (120.0, "timeout", None)
    many = none.copy()
    many[np.searchsorted(histogram.EDGES, 2.0) - 1] = 400
    going = stays.Going(2000, 60.0, young=120.0)
    told = stays.told(stays.survival(many, 2000, living), NO_LOOKS, 300, 30.0, going)
    assert told.p50 is not None
    assert told.p50 < 9


@pytest.mark.parametrize(("early", "told"), [(0.0, 120.0), (0.003, 120.0), (0.02, None)])
def test_a_timeout_is_no_stay_where_entries_from_before_go_early(
    early: float, told: Optional[float]
) -> None:
    """As those of ports that are used again. What came since has not gone yet."""
    none, living = np.zeros(histogram.BINS, np.int64), stays.Living(np.linspace(0, 3, 64), 690)
    going = stays.Going(0, 60.0, 120.0, early)
    assert stays.told(stays.survival(none, 0, living), NO_LOOKS, 2190, 230.0, going).p50 == told


@pytest.mark.parametrize(("resets", "told"), [(0.05, 60.0), (0.5, None), (0.9, 10.0)])
def test_between_two_timeouts_no_luck_of_a_sample_tells_the_stay(
    resets: float, told: Optional[float]
) -> None:
    trace = Trace(seed=4)
    reset = trace.rng.random(300) < resets
    at = np.sort(trace.rng.uniform(0, 6, 300))
    trace.flows(at[reset], 0.001, 10.0, state=CLOSE)
    trace.flows(at[~reset], 0.001, 60.0)
    stays_for = row_of(trace, 8).residence
    assert stays_for.p50 == (told if told is None else pytest.approx(told, rel=0.01))
    assert stays_for.by == ("timeout" if told else "")


def test_the_few_that_ended_tell_no_stay_where_no_look_met_those_that_live() -> None:
    trace = Trace(seed=13)
    trace.flows(np.linspace(0, 10, 588), 0.001, 120.0)
    trace.flows(np.linspace(0, 10, 12), 0.001, 0.9, reason=Reason.DELETED)
    trace.flows(np.linspace(0, 10, 600), 0.001, 120.0, dport=443)
    trace.walks(18)
    trace.parts = [
        part[(part["kind"] != int(Kind.MET)) | (part["dport"] == 443)] for part in trace.parts
    ]
    model = Model(HookInfo("fentry"), Clock(0), START)
    for batch in trace.batches(18):
        model.update(batch)
    (row,) = (one for one in model.snapshot("service").culprits if one.port == 8063)
    assert (row.held, row.composition.n) == (588, 0)
    assert row.residence.p50 is None or row.residence.p50 > 60
    assert (row.residence.at_least or 60.0) <= 120


def row_of(trace: Trace, seconds: float) -> Culprit:
    """The one service, after so many seconds."""
    trace.walks(seconds)
    model = Model(HookInfo("fentry"), Clock(0), START)
    for batch in trace.batches(seconds):
        model.update(batch)
    return model.snapshot("service").culprits[0]


@pytest.mark.parametrize(("every", "told"), [(2, None), (8, 120.0)])
def test_those_that_were_reset_do_not_tell_how_long_the_others_wait(
    every: int, told: Optional[float]
) -> None:
    """One of so many ends by RST; the latest that was looked at, too."""
    trace, at = Trace(seed=8), np.linspace(0, 8, 400)
    reset = np.arange(400) % every == every - 1
    trace.flows(at[~reset], 0.001, 120.0)
    trace.flows(at[reset], 0.001, 10.0, state=CLOSE)
    trace.looks()
    model = Model(HookInfo("fentry"), Clock(0), START)
    for batch in trace.batches(9.5):
        model.update(batch)
    snapshot = model.snapshot("service")
    (row,) = snapshot.culprits
    assert row.residence.p50 == told
    assert ("stay 120 s" in snapshot.why[0].text) == (told is not None)


def test_a_flush_by_hand_does_not_tell_how_long_entries_stay() -> None:
    """All that was held is deleted in the eighth second; the timeout is 30 s. It is told while that
    is half of all."""
    trace, at = Trace(seed=9), np.linspace(0, 20, 400)
    old = at < 7.5
    trace.flows(at[old], 0.0, 7.5 - at[old], proto=17, status=0, reason=Reason.DELETED)
    trace.flows(at[~old], 0.0, 30.0, proto=17, status=0)
    trace.walks(20)
    model = Model(HookInfo("fentry"), Clock(0), START)
    for batch in trace.batches(20):
        model.update(batch)
        (row,) = model.snapshot("service").culprits
        assert row.residence.p50 is None or 2 * row.destroys >= row.inserts
        assert (row.residence.at_least or 0.0) <= 30


@pytest.mark.parametrize(("until", "known"), [(50, True), (56, False)])
def test_the_check_by_load_is_silent_where_entries_do_not_come_evenly(
    until: float, known: bool
) -> None:
    """50 a second, which stay for 8 s, and none from the fifty-first second on."""
    trace = Trace(seed=10)
    trace.flows(np.linspace(0, 50, 2500), 0.0, 8.0, proto=17, status=0)
    load = row_of(trace, until).residence.by_load
    assert (load is not None) == known
    assert load is None or load == pytest.approx(8.0, rel=0.25)


def test_the_few_that_were_reset_tell_no_life_of_those_that_are_open() -> None:
    trace = Trace(seed=6)
    trace.flows(np.linspace(0, 4, 1500), 600.0, 120.0, status=SEEN_REPLY | ASSURED)
    trace.flows(np.linspace(5, 7, 40), 0.001, 10.0, state=CLOSE)
    row = row_of(trace, 20)
    assert row.ends.expired == 40
    assert (row.life.p50, row.life.n) == (None, 40)


@pytest.mark.parametrize("open_share", [0.1, 0.4, 0.7])
def test_a_life_is_of_all_entries_also_of_those_that_wait_or_are_open(open_share: float) -> None:
    trace = Trace(seed=7)
    at = np.sort(trace.rng.uniform(0, 10, 1000))
    opened = trace.rng.random(1000) < open_share
    lives = np.where(opened, 600.0, trace.rng.uniform(0.5, 1.5, 1000))
    trace.flows(at, lives, 120.0)
    row = row_of(trace, 14)
    if open_share > 0.5:
        assert row.life.p50 is None
    else:
        assert row.life.p50 == pytest.approx(float(np.median(lives)), rel=0.2)
    assert (row.life.p90 is None) == (open_share >= 0.1)


def test_one_way_flows_live_for_a_moment_once_the_first_have_expired() -> None:
    for seconds, known in ((20, False), (40, True)):
        trace = Trace(seed=8)
        at = np.sort(trace.rng.uniform(0, 60, 1800))
        trace.flows(at, 0.0, 30.0, proto=17, dport=53, status=0)
        row = row_of(trace, seconds)
        assert (row.life.p50 is not None) == known
        assert (row.life.p50 or 0.0) < 0.01


@pytest.mark.slow
def test_at_least_is_what_half_of_them_stay_beyond_chance() -> None:
    """Of those that stay for 10 s or for long, half each: the sample's luck decides nothing."""
    for seed in range(8):
        trace = Trace(seed=seed)
        at = np.sort(trace.rng.uniform(0, 30, 600))
        trace.flows(at, 0.0, np.where(trace.rng.random(600) < 0.5, 10.0, 300.0), proto=17,
                    dport=53, status=0)  # fmt: skip
        row = row_of(trace, 60)
        assert row.residence.at_least is None or row.residence.at_least <= 12


@pytest.mark.slow
@pytest.mark.parametrize(("mean", "linger"), [(4.0, 30.0), (20.0, 5.0), (40.0, 120.0)])
@pytest.mark.parametrize("proto", [6, 17])
def test_lives_about_as_long_as_was_watched_are_told_right_or_not_at_all(
    mean: float, linger: float, proto: int
) -> None:
    said = []
    for seed in range(2):
        trace = Trace(seed=seed)
        at = np.sort(trace.rng.uniform(0, 90, 2000))
        trace.flows(at, trace.rng.exponential(mean, 2000), linger, proto=proto)
        row = row_of(trace, 60)
        assert row.life.p99 is None or row.life.p99 < 60
        if row.life.p50 is not None:
            said.append(row.life.p50)
    median = mean * float(np.log(2))
    assert said == [pytest.approx(median, rel=0.25)] * len(said)
    assert said or median + linger * (proto == 17) > 50
