"""A table that changes while it is dumped, against a dict."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.examples import examples

from ctrace.capture.table import first_dump
from ctrace.capture.table.seed import Seeding, Slice
from ctrace.host import ctnetlink
from ctrace.host.netns import Namespace
from ctrace.record import Events, Kind, Reason, empty, join

AT = 1_000


def record(kind: Kind, flow: int, ct: int, ts: int) -> Events:
    """One record; flows differ in exactly one part of what identifies an entry."""
    row = empty(1)
    row["kind"], row["ct"], row["ts"] = kind, ct, ts
    row["proto"], row["family"], row["netns"], row["sport"] = 6, 2, 7, 40
    part = ("netns", "zone", "proto", "sport", "dport", "reply_sport", "reply_dport")[flow % 10 % 7]
    if flow % 10 < 7:
        row[part] += 1 + flow // 10
    else:
        row[("src", "dst", "reply_dst")[flow % 10 - 7]][0, 15] = 1 + flow // 10
    if kind is Kind.DESTROY:
        row["reason"], row["idle_ms"], row["mark"] = Reason.EXPIRED, 17, 3
    return row


steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(("toggle", "dump")), st.integers(0, 29)),
        st.tuples(st.just("noise"), st.integers(0, 29)),
        st.tuples(st.just("batch"), st.just(0)),
        st.tuples(st.just("slice"), st.just(0)),
    ),
    max_size=120,
)


class Walk:
    """A table that is walked while it changes, and what becomes known of it."""

    def __init__(self, before: set[int], same_ids: bool) -> None:
        self.table = {flow: 100 + flow for flow in before}
        """Flow to the identity of the entry that now has that tuple."""
        self.netns = {flow: int(record(Kind.DROP, flow, 0, 0)["netns"][0]) for flow in range(30)}
        self.order = sorted(set(self.netns.values()))
        self.seeding = Seeding(self.order, same_ids=same_ids)
        self.walked: set[int] = set()
        self.ended: list[int] = []
        self.rows: list[Events] = []
        self.news: list[Events] = []
        self.waiting: list[Slice] = []
        self.next_ct = 1000
        self.ts = AT
        self.out: list[Events] = []

    def event(self, kind: Kind, flow: int, ct: int) -> None:
        self.ts += 1
        self.news.append(record(kind, flow, ct, self.ts))

    def toggle(self, flow: int) -> None:
        if flow in self.table:
            self.event(Kind.DESTROY, flow, self.table.pop(flow))
        else:
            self.table[flow] = self.next_ct
            self.event(Kind.INSERT, flow, self.next_ct)
            self.next_ct += 1

    def dump(self, flow: int) -> None:
        """The walk reaches this flow's bucket, once; namespaces come one after another."""
        if flow in self.walked or not self.order or self.netns[flow] != self.order[0]:
            return
        if flow in self.table:
            self.rows.append(record(Kind.EXISTING, flow, self.table[flow], AT))
        self.walked.add(flow)
        if all(flow in self.walked for flow, at in self.netns.items() if at == self.order[0]):
            self.ended.append(self.order.pop(0))

    def slice(self) -> None:
        self.waiting.append(Slice(join(self.rows), tuple(self.ended)))
        self.rows, self.ended = [], []

    def batch(self) -> None:
        """Everything so far has come: the slices that were read before are sure."""
        events, self.news = join(self.news), []
        self.out.append(self.seeding.first(events, AT))
        self.out += [self.seeding.dumped(one, AT) for one in self.waiting]
        self.waiting = []
        self.out.append(events)

    def end(self) -> None:
        for netns in list(self.order):
            for flow in range(30):
                if self.netns[flow] == netns:
                    self.dump(flow)
        self.slice()
        self.batch()


@examples(200)
@given(st.sets(st.integers(0, 29)), steps, st.booleans())
def test_existing_plus_events_is_the_table(
    before: set[int], steps: list[tuple[str, int]], same_ids: bool
) -> None:
    walk = Walk(before, same_ids)
    at_start = dict(walk.table)
    for step, flow in steps:
        if step == "dump":
            walk.dump(flow)
        elif step == "noise":
            walk.event(Kind.DROP, flow, 0)
            walk.event(Kind.INSERT_FAILED, flow, 5)
        elif step == "toggle":
            walk.toggle(flow)
        else:
            getattr(walk, step)()
    walk.end()

    whole = join(walk.out)
    found = whole[whole["kind"] == Kind.EXISTING]
    flows = {entry(record(Kind.EXISTING, flow, 0, AT)): flow for flow in range(30)}
    got = {}
    for row in (found[i : i + 1] for i in range(len(found))):
        flow = flows[entry(row)]
        assert flow not in got
        got[flow] = int(row["ct"][0])
        bare = row.copy()
        bare["ct"] = 0
        assert bare == record(Kind.EXISTING, flow, 0, AT)
    assert got.keys() == at_start.keys()
    if same_ids:
        assert got == at_start
    else:
        assert all(ct in (0, at_start[flow]) for flow, ct in got.items())

    # At every moment the table is what the rows say, in the order in which they came.
    alive: set[bytes] = set()
    for row in (whole[i : i + 1] for i in range(len(whole))):
        if row["kind"][0] in (Kind.EXISTING, Kind.INSERT):
            assert entry(row) not in alive
            alive.add(entry(row))
        elif row["kind"][0] == Kind.DESTROY:
            alive.remove(entry(row))
    assert {flows[one] for one in alive} == walk.table.keys()


def entry(row: Events) -> bytes:
    """What one record says of whose it is."""
    bare = empty(1)
    for name in ("src", "dst", "reply_src", "reply_dst", "sport", "dport", "reply_sport"):
        bare[name] = row[name]
    for name in ("reply_dport", "netns", "proto", "zone"):
        bare[name] = row[name]
    return bare.tobytes()


def test_an_entry_dumped_twice_counts_once() -> None:
    row = record(Kind.EXISTING, 3, 9, AT)
    netns = int(row["netns"][0])
    seeding = Seeding([netns])
    assert len(seeding.dumped(Slice(join([row, row])), AT)) == 1
    assert len(seeding.dumped(Slice(row, (netns,)), AT)) == 0


def test_what_is_told_after_the_last_slice_is_the_events_own_business() -> None:
    netns = int(record(Kind.EXISTING, 3, 9, AT)["netns"][0])
    seeding = Seeding([netns])
    assert len(seeding.dumped(Slice(record(Kind.EXISTING, 3, 9, AT), (netns,)), AT)) == 1
    assert len(seeding.first(record(Kind.DESTROY, 4, 8, AT + 9), AT)) == 0


def test_inputs_are_left_alone() -> None:
    dump, events = record(Kind.EXISTING, 3, 9, 5), record(Kind.DESTROY, 4, 8, 6)
    copies = dump.copy(), events.copy()
    seeding = Seeding(events["netns"].tolist())
    seeding.first(events, AT)
    seeding.dumped(Slice(dump), AT)
    assert (dump == copies[0]).all()
    assert (events == copies[1]).all()


def test_what_was_told_of_a_namespace_goes_with_its_dump() -> None:
    rows = join([record(Kind.INSERT, flow, 9, 5) for flow in (0, 1, 2, 11)])
    busy, other = 7, int(rows["netns"][0])
    seeding = Seeding([busy, other])
    seeding.first(rows, AT)
    assert (seeding.told(busy), seeding.told(other)) == (3, 1)
    assert len(seeding.dumped(Slice(rows, (busy,)), AT)) == 0
    assert (seeding.told(busy), seeding.told(other)) == (0, 1)


def test_the_busiest_namespace_is_read_first(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def existing(space: Namespace) -> Iterator[Events]:
        read.append(space.inum)
        told[3] = 9  # a flood begins
        yield empty(ctnetlink.SLICE)

    monkeypatch.setattr(first_dump, "_existing", existing)
    told = {1: 0, 2: 5, 3: 0}
    parts = list(first_dump.slices([Namespace(one, "", "") for one in told], told.__getitem__))
    assert read == [2, 3, 1]
    assert [part.ended for part in parts] == [(), (2,), (3,), (1,)]
