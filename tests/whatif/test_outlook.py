"""What a lever frees is counted in the table; what goes on rising is no level."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrace.advice.alternatives import levers_of
from ctrace.model.composition import by_settings
from ctrace.model.keys.rich import TREND
from ctrace.model.remedies import TIMEOUTS
from ctrace.model.snapshot import Composition, Culprit, Percentiles, Residence, Table
from ctrace.plan.plan import CtTimeout
from ctrace.whatif.growth import Range
from ctrace.whatif.predict import Outlook
from ctrace.whatif.settings import parse_levers

SECONDS = 30.0
SHORTER = parse_levers(timeout=["tcp_time_wait=30"])


def service(waited: tuple[float, ...] = (), idle: tuple[float, ...] = (), **of: object) -> Culprit:
    """One service; of 400 entries looked at so many as it says are closed."""
    given = {"proto": "tcp", "port": 8063, "held": 1000, "closed": 1.0, "states": (), **of}
    made_of = Composition(n=400, waited=waited, idle=idle)
    return Culprit("tcp/8063", composition=made_of, **given)  # type: ignore[arg-type]


def evenly(low: float, high: float) -> tuple[float, ...]:
    return tuple(np.linspace(low, high, 41).tolist())


def outlook(*culprits: Culprit, limit: int = 100_000, seconds: float = SECONDS) -> Outlook:
    table = Table(1, "a", sum(one.held for one in culprits), limit, limit)
    return Outlook(table, culprits, TIMEOUTS, seconds)


def frees(one: Culprit, time_wait: int, seconds: float = SECONDS) -> Range:
    """What another TIME_WAIT frees of it."""
    return outlook(one, seconds=seconds).frees(parse_levers(timeout=[f"tcp_time_wait={time_wait}"]))


@given(st.integers(1, 119), st.integers(1, 10**6))
def test_entries_that_wait_evenly_are_freed_in_proportion(new: int, held: int) -> None:
    one = service(evenly(0, 120), held=held, new_per_s=held / 120)
    freed = frees(one, new)
    assert 0 <= freed.low <= held * (1 - new / 120) <= freed.high <= held


def test_ports_that_are_used_again_before_the_timeout_free_nothing() -> None:
    one = service(evenly(0, 2), held=800, new_per_s=400.0, inserts=12_000, destroys=12_000)
    freed = frees(one, 30)
    assert freed.high == 0
    assert frees(one, 1).high > 100
    found = outlook(one, limit=1000).fill(SHORTER)
    assert found == pytest.approx((0.8, 0.8), abs=0.01)


def test_ports_that_are_all_in_use_free_nothing_from_the_first_seconds() -> None:
    """400 come a second, as many go: what it holds no longer rises, though it did at first."""
    one = service(evenly(0, 2), held=750, new_per_s=400.0, inserts=3000, destroys=2250)
    full = replace(one, trend=(0.0, 400.0, *[750.0] * 6))
    assert frees(full, 30, 8.0).high == 0
    rising = replace(one, trend=tuple(float(n) for n in range(100, 900, 100)))
    assert frees(rising, 30, 8.0).high > 750


def test_what_will_stay_is_no_more_than_of_those_that_ended() -> None:
    """Ports are used again after 2 s, and how many are held still changes: nine in ten of what
    comes will not be there for 30 s, whatever the timeout is."""
    stays = Residence(2.0, 3.0, 4.0, 2000, by="ends")
    one = service(evenly(0, 2), held=750, new_per_s=400.0, inserts=3000, destroys=2250)
    told = {}
    for known in (Residence(), stays):
        some = replace(one, residence=known, trend=tuple(float(n) for n in range(100, 900, 100)))
        fill = outlook(some).fill()
        assert fill is not None
        told[known.by] = frees(some, 30, 8.0).high, fill[1] * 100_000
    for measured, unknown in zip(told["ends"], told[""]):
        assert 750 < measured < unknown / 10


def test_a_setting_frees_nothing_for_sure_of_entries_with_other_timeouts() -> None:
    one = service(evenly(0, 120), new_per_s=8.0)
    for other, settings in ((0.2, True), (1.0, False)):
        mixed = replace(one, composition=replace(one.composition, other_timeout=other))
        freed = frees(mixed, 30)
        assert freed.low <= 750 * (1 - other) <= freed.high
        assert by_settings(mixed.composition) is settings


def test_a_shorter_time_wait_frees_nothing_of_what_was_reset() -> None:
    one = service(evenly(0, 120), new_per_s=8.0)
    states = (("TIME_WAIT", 100), ("CLOSE", 300))
    reset = replace(one, states=states, composition=replace(one.composition, states=states))
    freed = frees(reset, 30)
    assert 0 < freed.low < freed.high <= 250
    told = outlook(reset, limit=1000)
    now, then = told.fill(), told.fill(SHORTER)
    assert now is not None
    assert then is not None
    assert now[0] - 0.25 <= then[0] < now[0]


def test_a_load_that_has_just_begun_frees_what_it_will_hold() -> None:
    """Nothing has waited for 30 s yet, and all that comes will: between nothing and most."""
    one = service(evenly(0, 20), held=400, new_per_s=20.0, inserts=400)
    freed = frees(one, 30, 20.0)
    assert freed.low == 0
    assert freed.high >= 300


def test_connections_that_stay_rise_until_the_table_is_full() -> None:
    leak = service(
        closed=0.0, held=1200, new_per_s=40.0, inserts=1200, states=(("ESTABLISHED", 400),)
    )
    told = outlook(leak, limit=10_000)
    found = told.rising()
    assert found is not None
    assert found.per_s[0] <= 40 <= found.per_s[1]
    assert found.full_s is not None
    assert found.full_s[0] <= (10_000 - 1200) / 40 <= found.full_s[1]
    fill = told.fill()
    assert fill is not None
    assert fill[1] == 1.0
    assert told.rising(parse_levers(["tcp/8063"])) is None, "it goes with the service"
    for lever in ("tcp_established=60", "tcp/8063:established=60"):
        assert told.rising(parse_levers(timeout=[lever])) is None, "they expire then"
    assert told.rising(parse_levers(timeout=["tcp/80:established=60"])) == found


def test_a_policy_for_streams_leaves_short_answers_the_timeout_of_the_unanswered() -> None:
    """nf_conntrack_udp_packet: a flow answered within two seconds waits as one that is not."""
    one = service(idle=evenly(0, 30), new_per_s=33.3, inserts=1000, proto="udp", port=53)
    told = outlook(replace(one, closed=None, unreplied=0.0, assured=0.0))
    streams, answers = (
        told.frees(levers_of(CtTimeout("udp", 53, ("server",), ((name, 5),))))
        for name in ("replied", "unreplied")
    )
    assert streams == Range(0, 0)
    assert 0 < answers.low <= 1000 * 25 / 30 <= answers.high


@pytest.mark.parametrize(
    "steady",
    [
        service(closed=0.0, new_per_s=40.0, inserts=1200, destroys=1190),
        service(closed=0.0, new_per_s=0.0, inserts=1200),
        service(closed=0.5, new_per_s=40.0, inserts=1200),
        service(closed=0.0, new_per_s=40.0, inserts=1200, states=(("SYN_SENT", 400),)),
    ],
    ids=["as many go as come", "none comes any more", "closed ones hide it", "they will expire"],
)
def test_what_may_as_well_not_rise_is_not_said_to(steady: Culprit) -> None:
    assert outlook(steady).rising() is None


@pytest.mark.parametrize("new", [0.0, 300.0])
def test_bursts_are_not_foretold_from_the_last_second(new: float) -> None:
    """300 datagrams at once every ten seconds, each held for 30 s: neither none nor 300 a second
    will come."""
    trend = tuple([300.0] * 10 + [600.0] * 10 + [900.0] * 20)
    one = service(evenly(0, 30), held=900, new_per_s=new, inserts=1200, destroys=300, trend=trend)
    udp = replace(one, proto="udp", port=53, closed=None, unreplied=1.0)
    told = outlook(udp, limit=10_000, seconds=40.0)
    lever = parse_levers(timeout=["udp=5"])
    assert told.frees(lever).low == 0
    for fill in (told.fill(), told.fill(lever)):
        assert fill is not None
        assert fill[0] < 0.02
        assert 0.08 < fill[1] < 0.3


def test_a_load_that_the_full_table_refuses_is_not_one_that_ends() -> None:
    """Nearly nothing gets in any more: what helps is counted as if all of it still came."""
    full = tuple([4000.0] * 20)
    one = service(
        evenly(0, 20), held=4000, new_per_s=10.0, inserts=5000, destroys=1000, drop_per_s=1000.0,
        trend=full,
    )  # fmt: skip
    told = outlook(one, limit=4000, seconds=20.0)
    assert told.expected() > 0.9
    after = told.fill(parse_levers(["tcp/8063"]))
    assert after is not None
    assert after[1] < 0.1


@pytest.mark.parametrize("seconds", [30.0, 100.0, 300.0])
@pytest.mark.parametrize(("proto", "timeout"), [("gre", 180.0), ("sctp", 210.0), ("esp", 600.0)])
@pytest.mark.parametrize("looked", [True, False])
def test_protocols_without_settings_here_wait_for_their_own_timeout(
    proto: str, timeout: float, looked: bool, seconds: float
) -> None:
    """Ten come a second and expire: by the looks at them, not as pings do, after 30 s."""
    held, right = round(10 * min(seconds, timeout)), 10 * timeout
    waited = min(seconds, timeout)
    made_of = Composition(n=400, idle=evenly(0, waited), left=Percentiles(timeout - waited / 2))
    trend = tuple(10.0 * min(at, timeout) for at in range(int(seconds)))[-TREND:]
    one = Culprit(
        proto, proto=proto, port=0, held=held, new_per_s=10.0, inserts=round(10 * seconds),
        destroys=round(10 * seconds) - held, trend=trend,
        composition=made_of if looked else Composition(),
    )  # fmt: skip
    told = outlook(one, limit=10_000, seconds=seconds).fill()
    assert told is not None
    assert told[0] <= right / 10_000 <= told[1]
    assert told[0] >= 0.99 * held / 10_000


@pytest.mark.parametrize("new", [0.0, 300.0])
def test_what_comes_in_bursts_is_expected_as_it_is(new: float) -> None:
    """A table that bursts have filled is not taken for one with room."""
    trend = tuple([300.0] * 10 + [600.0] * 10 + [900.0] * 20)
    one = service(evenly(0, 30), held=900, new_per_s=new, inserts=1200, destroys=300, trend=trend)
    udp = replace(one, proto="udp", port=53, closed=None, unreplied=1.0)
    assert outlook(udp, limit=1000, seconds=40.0).expected() > 0.6
