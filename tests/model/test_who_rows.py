"""The rows of who: the same numbers as by any other grouping, few of them, and in frames."""

from __future__ import annotations

import io

import numpy as np
import pytest
from kit.shapes import NETNS, START, SYN_SENT, Trace, steady
from rich.console import Console

from ctrace.batch import Batch, Clock, HookInfo, Names, Netns
from ctrace.errors import UsageError
from ctrace.model.model import Model
from ctrace.model.scope import Scope
from ctrace.model.snapshot import GROUPS, SORTS, Snapshot
from ctrace.view.screen.frame import frame

pytestmark = pytest.mark.slow

SECONDS = 10


def model(trace: Trace) -> Model:
    found = Model(HookInfo("fentry", drop_tuples=True), Clock(0), START)
    names = Names(netns={NETNS: Netns(NETNS, "init")})
    found.update(Batch(trace.events(0)[:0], START, names=names))
    for batch in trace.batches(SECONDS):
        found.update(batch)
    return found


def scattered(t: Trace) -> Model:
    """A range of ports from everywhere, a scan, and a little of much else."""
    n = 300 * SECONDS
    t.flows(steady(300, SECONDS, t.rng), 0, 60, proto=17, dport=t.rng.integers(10000, 10007, n),
            src=t.rng.integers(0x0B000000, 0x2B000000, n), status=0)  # fmt: skip
    n = 200 * SECONDS
    t.flows(steady(200, SECONDS, t.rng), 0, 60, src="10.6.6.6", status=0, state=SYN_SENT,
            dst=t.rng.integers(0x30000000, 0x31000000, n),
            dport=t.rng.integers(1, 9999, n))  # fmt: skip
    n = 40 * SECONDS
    t.flows(steady(40, SECONDS, t.rng), 0, 60, src=t.rng.integers(0x40000000, 0x50000000, n),
            dport=t.rng.integers(20000, 60000, n))  # fmt: skip
    t.drops(steady(50, SECONDS, t.rng), src=t.rng.integers(0x40000000, 0x50000000, 50 * SECONDS),
            dport=443)  # fmt: skip
    return model(t)


@pytest.fixture(scope="module")
def made() -> Model:
    return scattered(Trace(seed=3))


def text(snapshot: Snapshot, width: int = 120) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(frame(snapshot, width))
    return out.getvalue().splitlines()


def test_rows_have_what_other_groupings_say(made: Model) -> None:
    first, second, *others = made.snapshot("who").culprits
    assert first.key == "udp/10000-10006"
    ports = {c.port: c for c in made.snapshot("service", limit=9999).culprits if c.proto == "udp"}
    assert first.held == sum(ports[port].held for port in range(10000, 10007))
    assert first.inserts == sum(ports[port].inserts for port in range(10000, 10007))
    assert "from " in first.words
    assert "sources" in first.words
    (scan,) = (c for c in made.snapshot("src", limit=9999).culprits if c.key == "10.6.6.6")
    assert (second.key, second.held, second.inserts) == (scan.key, scan.held, scan.inserts)
    assert len(others) <= 5
    assert {"->" in one.key for one in others} == {True}


def test_a_frame_is_short_and_names_them_first(made: Model) -> None:
    lines = text(made.snapshot("who", limit=200))
    at = next(n for n, line in enumerate(lines) if "CULPRITS" in line)
    assert "udp/10000-10006 from" in lines[at + 1]
    assert " 10.6.6.6 to " in lines[at + 2]
    assert len(lines) < 80  # of victims there are fifty
    refused = next(line for line in lines if line.startswith(" REFUSED"))
    assert "tcp/443 from" in refused
    assert lines.index(refused) < next(n for n, line in enumerate(lines) if "VICTIMS" in line)


@pytest.mark.parametrize("group", ["prefix", "ports", "proto", "direction"])
def test_coarser_groupings_lose_nothing(made: Model, group: str) -> None:
    found = made.snapshot(group, limit=99999)
    base = made.snapshot({"prefix": "src"}.get(group, "service"), limit=99999)
    for name in ("held", "inserts", "drops"):
        assert sum(getattr(c, name) for c in found.culprits) == sum(
            getattr(c, name) for c in base.culprits
        )
    assert len(found.culprits) <= len(base.culprits)
    assert len({c.key for c in found.culprits}) == len(found.culprits)


@pytest.mark.parametrize("sort", [*SORTS, *(f"-{one}" for one in SORTS)])
def test_every_sort_keeps_the_rows(made: Model, sort: str) -> None:
    rows = {one.key for one in made.snapshot("who").culprits}
    assert {one.key for one in made.snapshot("who", sort).culprits} == rows


@pytest.mark.parametrize(
    "scope", [Scope(proto=17), Scope(port=10003), Scope(netns=NETNS), Scope(netns=7)]
)
def test_of_some_flows_too(made: Model, scope: Scope) -> None:
    some = made.snapshot("who", scope=scope)
    if scope.netns == 7:
        assert not some.culprits
        return
    assert sum(c.held for c in some.culprits) >= 0.8 * sum(
        c.held for c in made.snapshot("service", limit=99999, scope=scope).culprits
    )


def test_every_grouping_answers_when_nothing_was_seen() -> None:
    empty = Model(HookInfo("fentry"), Clock(0), START)
    for group in GROUPS:
        assert empty.snapshot(group).culprits == ()
    with pytest.raises(UsageError):
        empty.snapshot("state")


def test_shares_are_of_all_that_is_held(made: Model) -> None:
    found = made.snapshot("who")
    for one in found.culprits:
        assert one.share == pytest.approx(one.held / found.held_total)
    assert np.isclose(sum(one.share for one in found.who), 0.93, atol=0.05)
