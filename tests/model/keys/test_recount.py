"""Keys after losses: against a table that lost nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.examples import examples
from kit.shapes import START

from ctrace.batch import Batch, Clock, Counts, HookInfo
from ctrace.model.model import Model
from ctrace.model.snapshot import Snapshot
from ctrace.record import MAPPED_PREFIX, N_REASONS, Events, Kind, Reason, empty, join

NETNS = (4026531840, 4026531999)
GROUPS = ("src", "dst", "service", "pair", "netns")
OWNER = 77 << 32


def entry(flow: int, kind: Kind, ts: int) -> Events:
    """One of 64 flows: 4 sources, 2 targets, 4 services, 2 namespaces; odd ones have an owner."""
    row = empty(1)
    row["kind"], row["ts"], row["ct"] = kind, ts, 1000 + flow
    row["reason"] = {Kind.INSERT: Reason.NEW, Kind.DESTROY: Reason.EXPIRED}.get(kind, Reason.NONE)
    for name, last in (("src", flow & 3), ("dst", flow >> 2 & 1)):
        row[name][0] = np.frombuffer(MAPPED_PREFIX + bytes((10, 0, name == "dst", last)), np.uint8)
    row["proto"], row["family"], row["sport"], row["dport"] = 6, 2, flow, 80 + (flow >> 3 & 3)
    row["netns"] = NETNS[flow >> 5 & 1]
    if kind is Kind.INSERT and flow & 1:
        row["owner"], row["direction"] = OWNER, 2
    if kind is Kind.FOUND:
        row["ct"] = 0
    return row


def mark(kind: Kind, netns: int, ts: int) -> Events:
    row = empty(1)
    row["kind"], row["netns"], row["ts"] = kind, netns, ts
    return row


class Story:
    """A table, what reaches the model of it, and what is lost."""

    def __init__(self) -> None:
        self.model = Model(HookInfo("fentry"), Clock(0), START)
        self.alive: set[int] = set()
        self._now = START
        self._lost = Counter[int]()

    def step(self, flows: list[int], *, lose: bool = False) -> None:
        parts, lost = [], 0
        for flow in flows:
            kind = Kind.DESTROY if flow in self.alive else Kind.INSERT
            self.alive ^= {flow}
            if lose:
                lost += 1
                self._lost[NETNS[flow >> 5 & 1]] += 1
            else:
                parts.append(entry(flow, kind, self._tick()))
        self.send(join(parts), lost)

    def send(self, events: Events, lost: int = 0) -> None:
        self._now += 1_000_000_000
        counts: dict[int, Counts] = {}
        for netns in NETNS:
            counts[netns] = np.zeros(N_REASONS, np.uint64)
            counts[netns][Reason.RING_FULL] = self._lost[netns]
        self.model.update(Batch(events, self._now, lost, counts))

    def recount(self, netns: int, meanwhile: list[int]) -> None:
        """What the table held at its beginning comes in two parts, with other events between."""
        there = [flow for flow in sorted(self.alive) if NETNS[flow >> 5 & 1] == netns]
        self.send(mark(Kind.RECOUNT, netns, self._tick()))
        half = len(there) // 2
        self.send(join([entry(flow, Kind.FOUND, self._tick()) for flow in there[:half]]))
        self.step(meanwhile)
        rest = [entry(flow, Kind.FOUND, self._tick()) for flow in there[half:]]
        self.send(join([*rest, mark(Kind.RECOUNTED, netns, self._tick())]))

    def _tick(self) -> int:
        self._now += 1000
        return self._now

    def held(self, group: str) -> Counter[tuple[int, ...]]:
        """What a grouping truly holds."""
        parts: dict[str, Callable[[int], tuple[int, ...]]] = {
            "src": lambda f: (f >> 5, f & 3),
            "dst": lambda f: (f >> 5, f >> 2 & 1),
            "service": lambda f: (f >> 5, f >> 3 & 3),
            "pair": lambda f: (f >> 5, f & 3, f >> 3 & 3),
            "netns": lambda f: (f >> 5,),
        }
        return Counter(parts[group](flow) for flow in self.alive)


def told(snapshot: Snapshot) -> Counter[tuple[int, ...]]:
    found: Counter[tuple[int, ...]] = Counter()
    for c in snapshot.culprits:
        place = int(c.netns == NETNS[1])
        last = [int(text.split(" ")[0].rsplit(".", 1)[1]) for text in (c.src or c.dst,) if text]
        if snapshot.group in ("netns", "service"):
            last = []
        port = [c.port - 80] if c.port is not None else []
        found[(place, *last, *port)] += c.held
    return +found


steps = st.lists(
    st.tuples(st.sampled_from(["seen", "lost"]), st.lists(st.integers(0, 63), max_size=40)),
    max_size=6,
)


@pytest.mark.slow
@examples(25)
@given(steps, st.lists(st.integers(0, 63), max_size=20), st.lists(st.integers(0, 63), max_size=20))
def test_after_a_recount_every_grouping_holds_what_the_table_holds(
    before: list[tuple[str, list[int]]], meanwhile: list[int], after: list[int]
) -> None:
    story = Story()
    for way, flows in before:
        story.step(flows, lose=way == "lost")
    for netns in NETNS:
        story.recount(netns, meanwhile)
    story.step(after)
    for group in GROUPS:
        snapshot = story.model.snapshot(group, limit=100)
        assert told(snapshot) == story.held(group), group
        assert not any(c.stale for c in snapshot.culprits)


def culprits(story: Story, group: str) -> dict[int, tuple[int, bool]]:
    return {c.netns: (c.held, c.stale) for c in story.model.snapshot(group).culprits}


def test_only_the_namespace_that_lost_something_is_stale_until_it_was_recounted() -> None:
    story = Story()
    story.step(list(range(64)))
    story.step(list(range(16)), lose=True)  # ends in the first namespace
    assert culprits(story, "netns") == {NETNS[0]: (32, True), NETNS[1]: (32, False)}
    rows = {c.netns: c.error for c in story.model.snapshot("netns").culprits}
    assert rows == {NETNS[0]: 16, NETNS[1]: 0}
    story.recount(NETNS[1], [])
    assert culprits(story, "netns")[NETNS[0]] == (32, True)
    story.recount(NETNS[0], [])
    assert culprits(story, "netns") == {NETNS[0]: (16, False), NETNS[1]: (32, False)}


def test_a_loss_while_counting_keeps_it_stale() -> None:
    story = Story()
    story.step(list(range(32)))
    story.step(list(range(8)), lose=True)
    story.send(mark(Kind.RECOUNT, NETNS[0], story._tick()))
    story.step([9], lose=True)
    story.send(mark(Kind.RECOUNTED, NETNS[0], story._tick()))
    assert culprits(story, "netns")[NETNS[0]] == (32, True)
    story.recount(NETNS[0], [])
    assert culprits(story, "netns")[NETNS[0]] == (23, False)


def test_processes_keep_their_part_and_stay_an_estimate() -> None:
    story = Story()
    story.step(list(range(32)))  # sixteen of them by one process
    story.step(list(range(16)), lose=True)
    story.recount(NETNS[0], [])
    rows = {c.owner is not None: c for c in story.model.snapshot("process").culprits}
    assert rows[True].held + rows[False].held == 16
    assert rows[True].stale
    assert rows[False].stale


def test_numbers_of_unknown_age_are_what_came_unseen() -> None:
    story = Story()
    story.step(list(range(8)))
    story.step(list(range(8, 24)), lose=True)
    story.recount(NETNS[0], [])
    (row,) = story.model.snapshot("netns").culprits
    assert (row.held, row.older) == (24, 16)
    story.step(list(range(24)))
    (row,) = story.model.snapshot("netns").culprits
    assert (row.held, row.older, row.destroys) == (0, 0, 24)


def test_ends_that_nobody_saw_do_not_tell_how_long_entries_stay() -> None:
    """Four of twenty that ended at once are no measure of the rest, whatever else went unseen."""
    story = Story()
    story.step(list(range(20)))
    story.step(list(range(4)))
    for _ in range(2):
        story.step(list(range(20, 32)), lose=True)  # they come, and go
        story.recount(NETNS[0], [])
    (row,) = story.model.snapshot("netns").culprits
    assert (row.held, row.destroys) == (16, 4)
    assert row.residence.p50 is None


@pytest.mark.parametrize("sources", [40_000])
def test_where_keys_are_too_many_the_sums_are_right(sources: int) -> None:
    """Rows are given up, and their part goes on in the coarser tables."""
    model = Model(HookInfo("fentry"), Clock(0), START, memory=4 << 20)

    def flood(kind: Kind, first: int, n: int, ts: int) -> Events:
        rows = empty(n)
        number = np.arange(first, first + n)
        rows["kind"], rows["ts"], rows["ct"] = kind, ts, 1 + number
        rows["reason"] = Reason.NEW if kind is Kind.INSERT else Reason.NONE
        rows["src"][:, 10:12] = 255
        low: npt.NDArray[np.uint8] = (0x0A000000 + number).astype(">u4").view(np.uint8)
        rows["src"][:, 12:] = low.reshape(-1, 4)
        rows["proto"], rows["family"], rows["dport"], rows["netns"] = 17, 2, 53, NETNS[0]
        return rows

    second = 1_000_000_000
    model.update(Batch(flood(Kind.INSERT, 0, sources, START + 1), START + second))
    model.update(Batch(empty(), START + 2 * second, lost=sources))
    begin = mark(Kind.RECOUNT, NETNS[0], START + 3 * second)
    model.update(Batch(begin, START + 3 * second))
    found = flood(Kind.FOUND, sources // 2, sources, START + 4 * second)
    end = mark(Kind.RECOUNTED, NETNS[0], START + 4 * second)
    model.update(Batch(join([found, end]), START + 4 * second))
    for group in ("service", "netns"):
        assert sum(c.held for c in model.snapshot(group).culprits) == sources
    assert model.snapshot("src").held_total == sources
