"""The model against a plain dictionary per key, on arbitrary event streams."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.examples import examples
from kit.shapes import NETNS, SECOND, START, Trace, cut, joined, steady

from ctrace.batch import Batch, Clock, HookInfo
from ctrace.model import histogram
from ctrace.model.model import Model
from ctrace.record import RECORD, Events, Kind, Reason, address_bytes, address_text

HOOKS = HookInfo("fentry")
GROUP_KEYS = {
    "src": lambda r: address_text(r["src"]),
    "dst": lambda r: address_text(r["dst"]),
    "service": lambda r: f"{'tcp' if r['proto'] == 6 else 'udp'}/{r['dport']}",
}


def model(memory: int = 4 << 20) -> Model:
    return Model(HOOKS, Clock(0), START, memory=memory)


@dataclass
class Plain:
    """What one key should show."""

    inserts: int = 0
    destroys: int = 0
    drops: int = 0
    held_seconds: float = 0.0
    residences: list[float] = field(default_factory=list)
    lives: list[float] = field(default_factory=list)


def reference(events: Events, key: str, until: int) -> dict[str, Plain]:
    found: dict[str, Plain] = defaultdict(Plain)
    birth: dict[int, int] = {}
    for row in events:
        plain = found[GROUP_KEYS[key](row)]
        ts, kind = int(row["ts"]), int(row["kind"])
        if kind == Kind.INSERT:
            plain.inserts += 1
            plain.held_seconds += (until - ts) / 1e9
            birth[int(row["ct"])] = ts
        elif kind == Kind.DESTROY:
            plain.destroys += 1
            plain.held_seconds -= (until - ts) / 1e9
            born = birth.pop(int(row["ct"]), None)
            if born is not None:
                plain.residences.append((ts - born) / 1e9)
                if row["idle_ms"] >= 0:
                    plain.lives.append(max(0.0, (ts - born) / 1e9 - row["idle_ms"] / 1e3))
        elif kind == Kind.DROP:
            plain.drops += 1
    return found


@st.composite
def streams(draw: st.DrawFn) -> Events:
    """Entries opened and closed by a few sources, addresses reused at once."""
    steps = draw(st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 5), st.integers(1, 3000)),
        min_size=1, max_size=120,
    ))  # fmt: skip
    rows = np.zeros(len(steps), RECORD)
    alive: list[tuple[int, int, int]] = []
    free: list[int] = []
    now, fresh = START, 0xFFFF888000001000
    for row, (source, port, action, pause) in zip(rows, steps, strict=True):
        now += pause * 1_000_000
        row["ts"], row["netns"], row["family"] = now, NETNS, 2
        if action >= 3 and alive:
            ct, source, port = alive.pop(action % len(alive))  # noqa: PLW2901
            free.append(ct)
            row["kind"], row["reason"], row["ct"] = 2, int(Reason.EXPIRED), ct
            row["idle_ms"] = -1 if action == 5 else min(pause, 50)
        elif action == 2:
            row["kind"], row["reason"] = 3, int(Reason.TABLE_FULL)
        else:
            if not free:
                free.append(fresh)
                fresh += 320
            row["kind"], row["reason"], row["ct"] = 1, int(Reason.NEW), free.pop()
            alive.append((int(row["ct"]), source, port))
        row["src"] = np.frombuffer(address_bytes(f"10.0.0.{source + 1}"), np.uint8)
        row["dst"] = np.frombuffer(address_bytes(f"10.9.0.{port + 1}"), np.uint8)
        row["proto"], row["dport"] = (6, 80 + port) if port else (17, 53)
    return rows


@examples(40)
@given(streams(), st.lists(st.integers(0, 120), max_size=4))
def test_every_group_agrees_with_a_dictionary(events: Events, cuts: list[int]) -> None:
    until = int(events["ts"][-1]) + SECOND
    m = model()
    edges = sorted({min(c, len(events)) for c in cuts} | {0, len(events)})
    for a, b in zip(edges, edges[1:]):
        last = until if b == len(events) else int(events["ts"][b - 1])
        m.update(Batch(events[a:b], last))
    for group in GROUP_KEYS:
        expected = reference(events, group, until)
        shown = {c.key: c for c in m.snapshot(group).culprits}
        assert shown.keys() == expected.keys()
        for key, plain in expected.items():
            c = shown[key]
            assert c.inserts == plain.inserts
            assert c.destroys == plain.destroys
            assert c.drops == plain.drops
            assert c.held == plain.inserts - plain.destroys
            assert c.error == 0
            assert c.table_seconds == pytest.approx(plain.held_seconds, abs=1e-3)
            assert c.residence.n == len(plain.residences)
            assert c.life.n == len(plain.lives)
            for measured, values in ((c.residence, plain.residences), (c.life, plain.lives)):
                if values and measured.p50 is not None:
                    # Both count the living as well: they can only make a median longer.
                    check_quantile(measured.p50, values, 0.5, longer=c.held > 0)


def check_quantile(shown: float, values: list[float], q: float, *, longer: bool = False) -> None:
    """Within the stated error of some value that is a q-quantile of the sample, or ``longer``."""
    ordered = sorted(values)
    low = ordered[max(0, int(np.ceil(q * len(ordered))) - 1)]
    high = ordered[-1 if longer else min(len(ordered) - 1, int(np.floor(q * len(ordered))))]
    slack = histogram.ABSOLUTE_ERROR + 2**-16  # births are kept in units of 16 us
    assert low * (1 - histogram.RELATIVE_ERROR) - slack <= shown
    assert shown <= high * (1 + histogram.RELATIVE_ERROR) + slack


def test_percentiles_of_a_known_distribution() -> None:
    trace = Trace()
    at = steady(2000, 10, trace.rng)
    life = trace.rng.lognormal(-3, 1.2, len(at))
    linger = trace.rng.uniform(1.0, 3.0, len(at))
    trace.flows(at, life, linger)
    m = model()
    for batch in trace.batches(60):
        m.update(batch)
    c = m.snapshot("service").culprits[0]
    assert c.life.n == c.residence.n == len(at)
    # idle_ms is in whole milliseconds, so a life is known to a millisecond.
    for shown, q in ((c.life.p50, 0.5), (c.life.p90, 0.9), (c.life.p99, 0.99)):
        assert shown == pytest.approx(np.quantile(life, q), rel=0.125, abs=0.002)
    for shown, q in ((c.residence.p50, 0.5), (c.residence.p90, 0.9), (c.residence.p99, 0.99)):
        assert shown == pytest.approx(np.quantile(life + linger, q), rel=0.125)


@pytest.mark.slow
def test_sums_stay_whole_when_rows_run_out() -> None:
    """A flood past the memory limit: services, and so shares, stay exact."""
    trace = Trace()
    n = 60_000
    trace.flows(np.linspace(0, 5, n), 0, 2.0, src=0x0B000000 + np.arange(n), dport=80)
    trace.flows(np.linspace(0, 5, 5000), 0.001, 2.0, src="10.0.0.7", dport=443)
    m = model(8 << 20)
    for batch in trace.batches(6, step=0.25):
        m.update(batch)
    rows = joined([batch.events for batch in trace.batches(6, step=0.25)])
    expected = reference(rows, "service", START + 6 * SECOND)
    snapshot = m.snapshot("service")
    for c in snapshot.culprits:
        plain = expected[c.key]
        assert (c.inserts, c.destroys) == (plain.inserts, plain.destroys)
        assert c.held == plain.inserts - plain.destroys
        assert c.error == 0
    heavy = m.snapshot("src", sort="new").culprits[0]
    assert heavy.key == "10.0.0.7"
    assert heavy.inserts <= 5000 <= heavy.inserts + heavy.error
    assert snapshot.memory.pruned > 0
    assert snapshot.memory.used <= snapshot.memory.limit
    total = m.snapshot("src").culprits_total
    assert total == pytest.approx(n + 1, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "step"), [(4 << 20, 0.25), (4 << 20, 3.0), (8 << 20, 1.0)])
def test_bounds_hold_when_every_table_is_short_of_rows(memory: int, step: float) -> None:
    """Sources, destinations and ports by Zipf's law, each with a long tail that has no room."""
    rng = np.random.default_rng(3)
    trace, n, until = Trace(3), 150_000, 20
    trace.flows(
        steady(n / until, until, rng), rng.choice([0.05, 1, 8], n), rng.choice([0, 5]),
        src=(1 << 24) + rng.zipf(1.15, n) % 150_000, dst=(3 << 24) + rng.zipf(1.3, n) % 50_000,
        dport=1000 + rng.zipf(1.4, n) % 20_000,
    )  # fmt: skip
    rows = trace.events(until)
    m = model(memory)
    for batch in cut(rows, until, step=step):
        m.update(batch)
    born = rows["kind"] == Kind.INSERT
    src, dst = (rows[side][:, 12:].copy().view(">u4").ravel() for side in ("src", "dst"))
    port = rows["dport"]
    keys: dict[str, tuple[npt.NDArray[Any], Callable[[Any], str]]] = {
        "src": (src, lambda key: str(IPv4Address(int(key)))),
        "dst": (dst, lambda key: str(IPv4Address(int(key)))),
        "service": (port, lambda key: f"tcp/{key}"),
        "pair": (
            src.astype(np.uint64) << np.uint64(16) | port,
            lambda key: f"{IPv4Address(int(key) >> 16)} -> tcp/{int(key) & 0xFFFF}",
        ),
    }
    for group, (column, name) in keys.items():
        distinct, at = np.unique(column, return_inverse=True)
        inserts, ends = np.bincount(at, born), np.bincount(at, ~born)
        held = {
            name(key): (int(a), int(a - b))
            for key, a, b in zip(distinct, inserts, ends, strict=True)
        }
        snapshot = m.snapshot(group, limit=len(distinct))
        assert snapshot.memory.pruned > 0
        assert snapshot.held_total == len(rows[born]) - len(rows[~born])
        for c in snapshot.culprits:
            came, stayed = held[c.key]
            assert c.inserts <= came <= c.inserts + c.error
            assert abs(c.held - stayed) <= c.error
        heaviest = sorted(held, key=lambda key: -held[key][1])[:10]
        shown = {c.key: c for c in snapshot.culprits}
        for key in heaviest:
            assert shown[key].held == pytest.approx(held[key][1], rel=0.02, abs=5)
