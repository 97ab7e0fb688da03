"""Who is alive when a segment begins: against a set, also after losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from kit import shapes, synthetic
from kit.examples import examples

from ctrace.batch import Batch, Clock, TableReading
from ctrace.model.model import Model
from ctrace.record import N_REASONS, Events, Kind, Reason, empty, join
from ctrace.recording.reader import Recording
from ctrace.recording.recorder.living import Living
from ctrace.recording.recorder.segments import FlightRecorder, Retention

NETNS = (4026531840, 4026531999)
SECOND = 1_000_000_000


def record(kind: Kind, flow: int, ct: int = 0, ts: int = 0) -> Events:
    row = empty(1)
    row["kind"], row["ct"], row["sport"], row["ts"] = kind, ct, flow, ts
    row["proto"], row["family"], row["dport"], row["netns"] = 17, 2, 9, NETNS[flow % 2]
    return row


def mark(kind: Kind, netns: int, ts: int = 0) -> Events:
    row = empty(1)
    row["kind"], row["netns"], row["ts"] = kind, netns, ts
    return row


class Story:
    def __init__(self, there: set[int]) -> None:
        self.living, self.alive = Living(), set(there)
        self._lost = dict.fromkeys(NETNS, 0)
        self.send(join([record(Kind.EXISTING, flow) for flow in sorted(there)]))

    def send(self, events: Events, lost: int = 0) -> None:
        counts = {netns: np.zeros(N_REASONS, np.uint64) for netns in NETNS}
        for netns, n in self._lost.items():
            counts[netns][Reason.RING_FULL] = n
        self.living.take(Batch(events, SECOND, lost, counts))

    def step(self, flows: list[int], *, lose: bool = False) -> None:
        parts = []
        for flow in flows:
            kind = Kind.DESTROY if flow in self.alive else Kind.INSERT
            self.alive ^= {flow}
            self._lost[NETNS[flow % 2]] += lose
            parts.append(record(kind, flow, ct=100 + flow))
        self.send(empty() if lose else join(parts), len(flows) if lose else 0)

    def recount(self, netns: int, meanwhile: list[int]) -> None:
        there = [flow for flow in sorted(self.alive) if NETNS[flow % 2] == netns]
        self.send(mark(Kind.RECOUNT, netns))
        ends = [flow for flow in dict.fromkeys(meanwhile) if flow in there]
        self.send(join([record(Kind.FOUND, flow) for flow in ends]))  # ahead of their ends
        self.step(meanwhile)
        rest = [record(Kind.FOUND, flow) for flow in there if flow not in meanwhile]
        self.send(join([*rest, mark(Kind.RECOUNTED, netns)]))

    def told(self) -> set[int]:
        rows = join(list(self.living.rows(2 * SECOND)))
        assert set(rows["kind"].tolist()) <= {int(Kind.EXISTING)}
        flows: list[int] = rows["sport"].tolist()
        assert len(flows) == len(set(flows))
        return set(flows)


flows = st.lists(st.integers(0, 19), max_size=12)


@examples(150)
@given(st.sets(st.integers(0, 19)), st.lists(st.tuples(flows, st.booleans()), max_size=4), flows,
       st.booleans())  # fmt: skip
def test_the_living_are_those_of_the_table(
    there: set[int], steps: list[tuple[list[int], bool]], meanwhile: list[int], look: bool
) -> None:
    story = Story(there)
    for changed, lose in steps:
        story.step(changed, lose=lose)
        if look:
            story.told()
    if not any(lose and changed for changed, lose in steps):
        assert story.told() == story.alive  # also those that only a dump told of
        assert story.living.lacks == 0
    for netns in NETNS:
        story.recount(netns, meanwhile)
    assert story.told() == story.alive
    assert story.living.lacks == 0


def test_a_loss_stays_until_it_was_made_good() -> None:
    story = Story({1, 2, 3, 4})
    story.step([1, 2, 5], lose=True)
    assert story.living.lacks == 3
    story.send(mark(Kind.RECOUNT, NETNS[1]))
    story.step([7], lose=True)
    story.send(mark(Kind.RECOUNTED, NETNS[1]))  # of one that was disturbed
    assert story.living.lacks == 4
    story.recount(NETNS[1], [])
    assert story.living.lacks == 1
    story.recount(NETNS[0], [])
    assert story.living.lacks == 0
    assert story.told() == story.alive


def test_what_lived_in_a_namespace_ends_with_it() -> None:
    """Its entries' ends were lost, and nothing is left to count anew."""
    story = Story(set(range(20)))
    story.step([1, 3, 4], lose=True)
    assert story.living.lacks == 3
    tables = (TableReading(NETNS[1], 0, 0, 0, gone=True), TableReading(NETNS[0], 9, 100, 100))
    story.living.take(Batch(empty(), SECOND, tables=tables))
    assert story.told() == set(range(0, 20, 2))
    assert story.living.lacks == 1
    assert len(story.living) == 10


def test_a_segment_after_many_holds_what_was_there_before_the_recorder(tmp_path: Path) -> None:
    """Entries of the dump at the start have no address; and a loss is told by each segment."""
    at = 100 * SECOND
    recorder = FlightRecorder(str(tmp_path / "ring"), synthetic.header(at), Retention(seconds=12.0))
    first = join([record(Kind.EXISTING, flow, ts=at) for flow in range(50)])
    recorder.write(Batch(first, at + 1))
    for second in range(1, 7):
        now = at + second * SECOND
        end = record(Kind.DESTROY, second, ct=900 + second, ts=now)
        recorder.write(Batch(end, now + 1, lost=7 if second == 3 else 0))
    recorder.close()
    paths = sorted((tmp_path / "ring").glob("*.ctrace"))
    assert len(paths) > 4
    for path, lost in ((paths[1], 0), (paths[-1], 7)):
        with Recording(str(path)) as recording:
            model = Model(recording.hooks, Clock(0), recording.started)
            batches = list(recording.batches())
            for batch in batches:
                model.update(batch)
        ends = sum(int((b.events["kind"] == Kind.DESTROY).sum()) for b in batches)
        existing = int((batches[0].events["kind"] == Kind.EXISTING).sum())
        snapshot = model.snapshot("service")
        assert snapshot.held_total == existing - ends
        assert snapshot.lost == lost
        assert {c.stale for c in snapshot.culprits} == {lost > 0}
    assert existing == 50 - 6 + ends


def test_a_segment_does_not_take_the_state_at_birth_for_the_state_of_now(tmp_path: Path) -> None:
    """Every TCP entry begins as SYN_SENT and unreplied; when the segment begins it is long over."""
    load = shapes.Trace()
    load.flows(shapes.steady(200, 30, load.rng), 0.01, 5)
    ring = Retention(size=None, seconds=12.0)
    recorder = FlightRecorder(str(tmp_path / "ring"), synthetic.header(shapes.START), ring)
    for batch in load.batches(30):
        recorder.write(batch)
    recorder.close()
    with Recording(str(sorted((tmp_path / "ring").glob("*.ctrace"))[0])) as recording:
        model = Model(recording.hooks, Clock(0), recording.started)
        model.update(next(recording.batches()))
    snapshot = model.snapshot("service")
    (service,) = snapshot.culprits
    assert service.held > 900
    assert (service.unreplied, service.assured, service.closed, service.states) == (*[None] * 3, ())
    assert snapshot.tables[0].pinned is None
    assert all("half-open" not in cause.text for cause in snapshot.why)
