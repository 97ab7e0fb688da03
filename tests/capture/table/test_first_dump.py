"""Which tables are read first, and what is told before the last of them is."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import numpy as np
import pytest

from ctrace.batch import Batch, Clock, HookInfo, TableReading
from ctrace.capture.live import open_live
from ctrace.capture.table import dumps, first_dump
from ctrace.capture.table.first_dump import Older, must_wait
from ctrace.capture.table.seed import Seeding
from ctrace.filters import Filter
from ctrace.host import ctnetlink
from ctrace.host.netns import Namespace
from ctrace.lab import Lab
from ctrace.model.model import Model
from ctrace.record import Events, Kind, empty, join


def made(inum: int, n: int) -> Events:
    rows = empty(n)
    rows["netns"], rows["kind"], rows["sport"] = inum, int(Kind.EXISTING), np.arange(n) % 65536
    rows["dport"] = np.arange(n) // 65536
    return rows


HELD = {1: 3, 2: 1000, 3: 0, 4: 30}
SPACES = [Namespace(inum, f"n{inum}", f"/{inum}") for inum in HELD]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The namespaces in the order in which their tables were read; each takes a second."""
    order: list[int] = []
    seconds = itertools.count()

    def existing(space: Namespace) -> Iterator[Events]:
        order.append(space.inum)
        yield made(space.inum, HELD[space.inum])

    monkeypatch.setattr(first_dump, "_existing", existing)
    monkeypatch.setattr(
        "ctrace.capture.table.first_dump.time.monotonic", lambda: float(next(seconds))
    )
    return order


def begun() -> Older:
    ids = {inum: inum for inum in HELD}
    return Older(SPACES, Seeding(ids.values()), ids, held=HELD)


def test_the_largest_table_comes_first_and_each_in_a_slice_of_its_own(read: list[int]) -> None:
    """A hundred small namespaces beside a large one do not keep what it holds for seconds."""
    one, came = begun(), []
    while one.reading:
        one.read()
        came.append(len(one.with_events(empty(), 1e9, 500)))
    assert read == [2, 4, 1, 3]
    assert came == [1000, 30, 3, 0]
    assert not one.missing


def test_what_the_last_few_hold_is_not_waited_for(read: list[int]) -> None:
    one, told = begun(), []
    while not one.done:
        told.append((must_wait([one], 1033), set(one.missing)))
        one.read()
        one.with_events(empty(), 1e9, 500)
    assert told == [
        (True, {1, 2, 3, 4}),
        (True, {1, 3, 4}),  # 33 of 1,033 are more than 2 %
        (False, {1, 3}),
        (True, {3}),  # how many it has is not known any better than 0: soon read
    ]
    assert not must_wait([], 1033)


def test_no_table_is_read_of_which_nothing_would_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """An even sample of a full table takes nothing from most of the small ones beside it."""
    read: list[str] = []

    def slices(path: str) -> Iterator[ctnetlink.Table]:
        read.append(path)
        rows = made(2, 100_000)
        rows["ct"] = np.arange(len(rows))
        left, mark, since = (np.zeros(len(rows), kind) for kind in ("i4", "u4", "u8"))
        for at in range(0, len(rows), 16_384):
            some = slice(at, at + 16_384)
            yield ctnetlink.Table(rows[some], left[some], mark[some], since[some], 2)

    monkeypatch.setattr(ctnetlink, "slices", slices)
    monkeypatch.setattr(dumps, "_established", lambda _: 0)
    monkeypatch.setattr("ctrace.capture.table.dumps.time.monotonic_ns", lambda: 50 << 10)
    taken = dumps.Dumps()
    taken._due = 0.0
    held = {1: 3, 2: 100_000, 3: 50}
    readings = [TableReading(inum, n, 1 << 17, 1 << 16) for inum, n in held.items()]
    found = empty()
    while not len(found):
        found = taken.take(SPACES[:3], readings, 1 << 60)
    assert read == ["/2"]
    assert found["ct"].tolist() == list(range(50, 100_000, 196)), "every 196th, over all slices"
    assert (found["kind"] == Kind.MET).all()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.kernel
def test_what_is_not_read_yet_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_dump, "SPELL", 0.0)
    filled: dict[int, int] = {}
    with Lab() as lab:
        for name, n in (("a", 1000), ("b", 5)):
            node = lab.namespace(name, track=True)
            filled[node.inum] = ctnetlink.fill(node.path, n)
        source = open_live(Filter(), hooks="netfilter")
        unread, came = [], []
        for batch in source.batches(0.05):
            came.append(batch.events[batch.events["kind"] == Kind.EXISTING])
            if batch.tables:
                unread.append({t.netns for t in batch.tables if t.unread} & filled.keys())
            if unread and not unread[-1]:
                break
        source.close()
    assert unread[0] == filled.keys()
    found = join(came)["netns"].tolist()
    assert {inum: found.count(inum) for inum in filled} == filled


def test_keys_of_a_table_that_is_not_read_yet_are_stale() -> None:
    model = Model(HookInfo("netfilter"), Clock(0), 0)
    told = []
    for number, unread in enumerate(((2, 4), (4,), ())):
        rows = made(2, 1000) if number == 1 else made(4, 30)
        tables = tuple(
            TableReading(inum, HELD[inum], 1 << 16, 1 << 14, unread=inum in unread)
            for inum in (2, 4)
        )
        model.update(Batch(rows if number else empty(), number * 10**9, tables=tables))
        told.append({table.netns: table.stale for table in model.snapshot().tables})
    assert told == [{2: True, 4: True}, {2: False, 4: True}, {2: False, 4: False}]
