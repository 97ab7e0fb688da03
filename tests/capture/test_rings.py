"""Rings under load: nothing torn, nothing twice, nothing missing that is not counted."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ctrace.kernel import bpf, btf, layout, programs, rings
from ctrace.kernel.bpf import online_cpus
from ctrace.kernel.objects import Objects
from ctrace.kernel.rings import ROOM, ROOMS, SLOT, ArrayRing, one_piece
from ctrace.record import RECORD, Events, Reason, by_time, empty, join

ROUNDS = 3000
PER_RUN = 32
DISCARDED = {True: 0, False: 2}
"""Of PER_RUN; our own arrays know no such thing."""


@pytest.fixture(params=["arrays", "buffers"])
def own(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the rings are arrays of ours, or the kernel's ring buffers."""
    if os.geteuid() != 0 or btf.kernel() is None:
        pytest.skip("needs root and BTF")
    wanted: bool = request.param == "arrays"
    where = layout.running()
    if wanted and "FETCH_ADD" not in where:
        pytest.skip("this kernel or machine cannot have arrays of ours")
    if not wanted:
        without = {name: value for name, value in where.constants.items() if name != "FETCH_ADD"}
        monkeypatch.setattr(layout, "running", lambda: layout.Layout(without))
    return wanted


@pytest.fixture
def objects(request: pytest.FixtureRequest, own: bool) -> Iterator[Objects]:
    made = Objects(getattr(request, "param", 1 << 16))
    source = str(Path(__file__).resolve().parent / "produce.c")
    code = programs.instructions(source, ("produce",), layout.running().constants)
    made.load("produce", code["produce"], bpf.ProgType.RAW_TRACEPOINT)
    yield made
    made.close()


def counted(objects: Objects, reason: Reason) -> int:
    return int(objects.counts().get(1, np.zeros(16, np.uint64))[reason])


@pytest.mark.kernel
@pytest.mark.parametrize("objects", [1 << 16, 1 << 21], indirect=True)
def test_every_record_arrives_once_and_whole(objects: Objects) -> None:
    """All CPUs write while one thread reads; of ring buffers' records some are discarded."""
    program = objects.programs["produce"]
    writers = []
    for producer, cpu in enumerate(online_cpus(), 1):

        def write(producer: int = producer, cpu: int = cpu) -> None:
            for i in range(ROUNDS):
                bpf.prog_run(program, (producer << 32 | i * PER_RUN, producer), cpu=cpu)

        writers.append(threading.Thread(target=write))
    for writer in writers:
        writer.start()
    parts: list[Events] = []
    lost = 0
    while any(writer.is_alive() for writer in writers):
        events, missed = objects.poll(0.001)
        parts.append(events)
        lost += missed
    for _ in range(3):
        events, missed = objects.poll(0)
        parts.append(events)
        lost += missed
    got = join(parts)
    # every record says what the program wrote
    assert (got["cgroup"] == (got["ct"] ^ got["owner"] ^ got["ts"])).all()
    assert (got["ct"] >> np.uint64(32) == got["owner"]).all()
    assert len(np.unique(got["ct"])) == len(got)
    assert len(got) == counted(objects, Reason.NEW)
    assert lost == counted(objects, Reason.RING_FULL)
    made = len(got) + lost + counted(objects, Reason.NONE)
    assert made == len(writers) * ROUNDS * PER_RUN
    for producer in range(1, len(writers) + 1):
        own = got["ct"][got["owner"] == producer]
        assert (np.diff(own.astype(np.int64)) > 0).all()


@pytest.mark.kernel
def test_a_full_ring_loses_and_counts(objects: Objects, own: bool) -> None:
    program = objects.programs["produce"]
    slots = objects.rings.size // SLOT
    # the kernel keeps one byte of a buffer free, so its last slot is never used
    room = slots - ArrayRing.SPARE if own else slots - 1
    runs = slots // PER_RUN + 4
    for lap in range(3):  # read, it goes on where it was
        discarded = counted(objects, Reason.NONE)
        for i in range(runs):
            bpf.prog_run(program, ((lap * runs + i) * PER_RUN, 1), cpu=0)
        events, lost = objects.poll(0)
        discarded = counted(objects, Reason.NONE) - discarded
        assert len(events) + discarded == room
        assert lost == runs * PER_RUN - room
        first = lap * runs * PER_RUN
        assert first <= events["ct"].min()
        assert events["ct"].max() < first + slots
    assert counted(objects, Reason.RING_FULL) == 3 * lost
    bpf.prog_run(program, (0, 1), cpu=0)
    events, lost = objects.poll(0)
    assert (len(events), lost) == (PER_RUN - DISCARDED[own], 0)


@pytest.mark.kernel
def test_young_records_wait(objects: Objects, own: bool) -> None:
    program = objects.programs["produce"]
    bpf.prog_run(program, (0, 1), cpu=0)
    events, _ = objects.poll(3600)
    assert not len(events)
    bpf.prog_run(program, (32, 1), cpu=max(online_cpus()))
    events, _ = objects.poll(0)
    assert len(events) == 2 * (PER_RUN - DISCARDED[own])
    assert (np.diff(events["ts"].astype(np.int64)) >= 0).all()


@pytest.mark.kernel
def test_records_of_several_cpus_come_by_time(objects: Objects, own: bool) -> None:
    """Whichever CPU's ring is read first, and whatever waits from before."""
    program = objects.programs["produce"]
    for at, cpu in enumerate((max(online_cpus()), 0, max(online_cpus()))):
        bpf.prog_run(program, (at * 32, 1), cpu=cpu)
    assert not len(objects.poll(3600)[0])
    for at, cpu in enumerate((max(online_cpus()), 0)):
        bpf.prog_run(program, ((3 + at) * 32, 1), cpu=cpu)
    events, _ = objects.poll(0)
    assert len(events) == 5 * (PER_RUN - DISCARDED[own])
    assert (np.diff(events["ts"].astype(np.int64)) >= 0).all()
    assert (np.diff(events["ct"].astype(np.int64)) > 0).all()


@pytest.mark.kernel
def test_what_is_held_back_is_settled_too(objects: Objects, own: bool) -> None:
    """A record may be taken out by one that comes with, or after, the end of the wait."""
    program = objects.programs["produce"]
    bpf.prog_run(program, (0, 1), cpu=0)
    seen: list[int] = []

    def settle(events: Events) -> Events:
        seen.append(len(events))
        return events[events["ct"] >= 16]

    assert not len(objects.poll(3600, settle)[0])
    bpf.prog_run(program, (32, 1), cpu=0)
    events, _ = objects.poll(0, settle)
    run = PER_RUN - DISCARDED[own]
    assert seen == [run, run // 2 + run]
    assert int(events["ct"].min()) == 16
    assert len(events) == run // 2 + run


@pytest.mark.kernel
def test_what_successive_polls_return_is_one_array(objects: Objects, own: bool) -> None:
    program = objects.programs["produce"]
    parts = []
    for turn in range(5):
        bpf.prog_run(program, (turn * PER_RUN, 1), cpu=(0, max(online_cpus()))[turn % 2])
        parts.append(objects.poll(3600 if turn == 2 else 0)[0])
    told = [part for part in parts if len(part)]
    assert [len(part) for part in told] == [n * (PER_RUN - DISCARDED[own]) for n in (1, 1, 2, 1)]
    whole = one_piece(told)
    assert whole is not None
    assert whole.dtype == RECORD
    assert whole.tobytes() == join(told).tobytes()
    assert all(np.shares_memory(whole, part) for part in told)
    assert one_piece([]) is None
    assert one_piece([told[1], told[0]]) is None
    assert one_piece([told[0], told[2]]) is None
    assert one_piece([told[0], told[1].copy()]) is None
    assert one_piece([told[0].copy()]) is None


@pytest.mark.kernel
def test_the_faster_a_ring_fills_the_sooner_it_is_read(
    objects: Objects, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, now = objects.programs["produce"], 1 << 40

    def read(after: float) -> float:
        nonlocal now
        now += int(after * 1e9)
        monkeypatch.setattr(time, "clock_gettime_ns", lambda _: now)
        objects.poll(0)
        return objects.rings.interval

    read(0)
    calm = read(1)
    slots = objects.rings.size // SLOT
    for _ in range(slots // 2 // PER_RUN):
        bpf.prog_run(program, (0, 1), cpu=0)
    assert read(0.01) == pytest.approx(0.01 / 3 * 2)  # discarded ones take their place, too
    assert read(0.01) == calm
    for _ in range(slots // 2 // PER_RUN):
        bpf.prog_run(program, (0, 1), cpu=0)
    assert read(0.001) == rings.BRIEF
    assert read(0.001) == calm


@pytest.mark.kernel
@pytest.mark.parametrize("objects", [1 << 23], indirect=True)
def test_rows_stay_what_they_are_as_long_as_someone_has_them(objects: Objects) -> None:
    """Their memory is used again, but not before."""
    program, numbers = objects.programs["produce"], iter(range(1 << 30))
    per_batch = ROOM // 8 // PER_RUN + 100
    kept: list[tuple[Events, bytes]] = []
    memory = set()
    for turn in range(12):
        parts = []
        for _ in range(2):
            for _ in range(per_batch // 2):
                bpf.prog_run(program, (next(numbers) * PER_RUN, 1), cpu=0)
            parts.append(objects.poll(0)[0])
        batch = one_piece(parts)
        assert batch is not None, "a batch begins where there is room for all of it"
        memory.add(batch.__array_interface__["data"][0])
        if turn in (1, 2):
            kept.append((batch, batch.tobytes()))
        del parts, batch
        objects.rings.part()
    assert all(rows.tobytes() == before for rows, before in kept)
    assert len(memory) < 12
    assert len(objects.rings._rooms) <= ROOMS
    for turn in range(2 * ROOMS):  # little: what was needed in the flood is let go
        bpf.prog_run(program, (turn, 1), cpu=0)
        objects.poll(0)
        objects.rings.part()
    assert objects.rings._rooms == []


def test_sorting_by_time_keeps_records_whole() -> None:
    mixed = empty(7)
    mixed["ts"] = [1, 9, 3, 5, 9, 2, 10]
    mixed["ct"] = [1, 9, 3, 5, 8, 2, 10]
    mixed["sport"] = mixed["ct"]
    ordered = by_time(mixed)
    assert ordered.dtype == RECORD
    assert ordered["ts"].tolist() == [1, 2, 3, 5, 9, 9, 10]
    assert ordered["ct"].tolist() == ordered["sport"].tolist() == [1, 2, 3, 5, 9, 8, 10]
    assert by_time(ordered) is ordered
    assert len(by_time(empty())) == 0
