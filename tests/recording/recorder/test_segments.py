"""Files of a flight recorder: together, one by one, damaged, and under a clock that is set."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kit import synthetic
from kit.command import run

import ctrace
from ctrace.batch import Batch
from ctrace.errors import UsageError
from ctrace.record import Kind, empty, words
from ctrace.recording.format import layout as fmt
from ctrace.recording.merge import open_several
from ctrace.recording.recorder.segments import FlightRecorder, Retention
from ctrace.recording.recorder.triggers import parse_trigger
from ctrace.recording.series import runs
from ctrace.recording.writer import Writer

pytestmark = pytest.mark.slow
SECOND = synthetic.SECOND


def fly(path: Path, batches: list[Batch], retention: Retention) -> FlightRecorder:
    recorder = FlightRecorder(str(path), synthetic.header(), retention)
    for batch in batches:
        recorder.write(batch)
        if retention.size:
            assert recorder.stored <= retention.size + (1 << 20)
    recorder.close()
    return recorder


def test_who_is_alive_may_take_more_than_a_segment(tmp_path: Path) -> None:
    """Else each batch began another segment, and the ring was full of beginnings."""
    rng, rows, at = np.random.default_rng(7), 1 << 15, 100 * SECOND
    recorder = FlightRecorder(str(tmp_path / "ring"), synthetic.header(), Retention(16 << 20))
    recorder._segment_size = 256 << 10
    alive = empty(4 * rows)
    alive["kind"], alive["ts"], alive["family"] = Kind.EXISTING, at, 10
    alive["src"] = rng.integers(0, 256, (len(alive), 16), np.uint8)
    recorder.write(Batch(alive, at))
    recorder.write(Batch.idle(at + SECOND))
    for number in range(20):
        recorder.write(Batch(alive[:100].copy(), at + SECOND + number))
    recorder.close()
    assert len(list((tmp_path / "ring").iterdir())) == 2


def test_segments_read_as_one_recording(tmp_path: Path, truth: list[Batch]) -> None:
    where = tmp_path / "ring"
    fly(where, truth, Retention(size=None, seconds=36.0))
    (run_,) = runs(str(where))
    assert len(run_) >= 5
    for source in (ctrace.open(str(where)), open_several(run_[::-1])):
        got = list(source.batches())
        assert [b.until for b in got] == [b.until for b in truth]
        assert all(
            a.events.tobytes() == b.events.tobytes() for a, b in zip(truth, got, strict=True)
        )
        assert all(np.array_equal(a.counts[synthetic.NETNS], b.counts[synthetic.NETNS])
                   for a, b in zip(truth, got, strict=True))  # fmt: skip
        source.close()
    assert json.loads(run("report", str(where), "-o", "json"))["totals"]["drop"] == 200


def test_recordings_of_one_host_are_not_taken_for_those_of_two(
    tmp_path: Path, truth: list[Batch]
) -> None:
    """Its entries would count twice. Other namespaces, or another start of the host, are others."""

    def recorded(name: str, boot: str, shown: str = "") -> str:
        head = replace(synthetic.header(), facts={"boot_id": boot}, filter=shown)
        with Writer(str(tmp_path / name), head) as writer:
            writer.write(truth[0])
        return str(tmp_path / name)

    morning, evening = recorded("morning", "one"), recorded("evening", "one")
    with pytest.raises(UsageError, match="of the same host: give one"):
        open_several([morning, evening])
    old = recorded("old", "")
    (tmp_path / "link").symlink_to(old)
    with pytest.raises(UsageError, match="given twice"):
        open_several([old, recorded("young", ""), str(tmp_path / "link")])
    for others in (
        [morning, recorded("rebooted", "two")],
        [recorded("a", "one", "netns=a"), recorded("b", "one", "netns=b")],
        [old, recorded("older", "")],
    ):
        open_several(others).close()


def test_one_segment_alone_begins_with_the_living(tmp_path: Path, truth: list[Batch]) -> None:
    where = tmp_path / "ring"
    fly(where, truth, Retention(size=None, seconds=36.0))
    third = runs(str(where))[0][2]
    with ctrace.open(third) as recording:
        first, *rest = recording
        alive: dict[bytes, int] = {}
        for batch in truth:
            if batch.until > recording.started:
                break
            # the made-up traffic repeats tuples, of which a table has but one at a time
            for row, ct, kind in zip(
                words(batch.events), *(batch.events[name].tolist() for name in ("ct", "kind"))
            ):
                if ct and kind == Kind.INSERT:
                    alive[row[2:12].tobytes()] = ct
                elif kind == Kind.DESTROY:
                    alive.pop(row[2:12].tobytes(), None)
        assert set(first.events["ct"].tolist()) == set(alive.values())
        assert set(first.events["kind"].tolist()) == {int(Kind.EXISTING)}
        assert first.names.owners
        assert int(first.counts[synthetic.NETNS].sum()) == 0
        seen = sum(len(batch.events) for batch in rest)
        assert int(rest[-1].counts[synthetic.NETNS].sum()) == seen


def test_a_trigger_keeps_what_surrounds_it_and_no_more(tmp_path: Path, truth: list[Batch]) -> None:
    where = tmp_path / "ring"
    retention = Retention(triggers=(parse_trigger("drop"),), before=4.0, after=3.0)
    fly(where, truth, retention)
    drops = [b.until for b in truth if (b.events["kind"] == Kind.DROP).any()]
    with ctrace.open(str(where)) as kept:
        got = list(kept)
        assert kept.started <= drops[0] - 3 * SECOND
        assert got[-1].until >= drops[-1] + 2 * SECOND
        assert sum(int((b.events["kind"] == Kind.DROP).sum()) for b in got) == 200
        # A segment on each side at most beyond what was asked for.
        assert kept.started >= drops[0] - 6 * SECOND
        assert got[-1].until <= drops[-1] + 5 * SECOND
    calm = tmp_path / "calm"
    fly(calm, truth[:20], retention)
    assert list(calm.iterdir()) == []


def test_the_ring_never_outgrows_its_limit(tmp_path: Path) -> None:
    events = synthetic.arbitrary(200_000, 5)
    events["ts"] = np.sort(events["ts"] % (60 * SECOND)) + 100 * SECOND
    batches = synthetic.batches(events)
    recorder = fly(tmp_path / "ring", batches, Retention(size=8 << 20))
    assert 4 << 20 < recorder.stored <= 8 << 20
    assert len(runs(str(tmp_path / "ring"))) == 1


def test_damage_of_each_segment_is_told(tmp_path: Path, truth: list[Batch]) -> None:
    where = tmp_path / "ring"
    fly(where, truth, Retention(size=None, seconds=36.0))
    (run_,) = runs(str(where))
    for path in run_[1:3]:  # without an index, and damaged where no block begins
        data = bytearray(Path(path).read_bytes())
        at = data.rindex(fmt.MAGIC, 0, data.rindex(fmt.MAGIC))
        Path(path).write_bytes(data[:at] + bytes(100) + data[at:-16])
    with ctrace.open(str(where)) as series:
        assert series.missing.bytes >= 200
        assert len(series.missing.damage) == 2


@pytest.mark.parametrize("step", [86400.0, -86400.0])
def test_a_clock_that_is_set_changes_nothing_of_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    """Neither is all too old at once, nor does what is too old stay. Files of others do."""
    where, old = tmp_path / "ring", tmp_path / "ring/21990101T000000.000Z-0.ctrace"
    folder = where / "21990101T000000.000Z-1.ctrace"
    folder.mkdir(parents=True)
    mine = where / "incident.ctrace"
    for path, age in ((old, 60.0), (old.with_suffix(".kept.ctrace"), 3.0), (mine, 60.0)):
        path.write_bytes(b"")
        os.utime(path, (time.time() - age,) * 2)
    begin = 100 * SECOND
    recorder = FlightRecorder(str(where), synthetic.header(begin), Retention(None, seconds=12.0))
    assert not old.exists()
    assert len(list(where.iterdir())) == 4
    real, real_ns = time.time, time.time_ns
    for second in range(1, 31):
        if second == 5:  # a host that starts in 1970 gives names that sort before earlier ones
            ages = [path.name[:4] for path, _ in recorder._files()]
            assert ages[0] == "2199"
            assert len(ages) > 2
        if second == 10:
            monkeypatch.setattr(time, "time", lambda: real() + step)
            monkeypatch.setattr(time, "time_ns", lambda: real_ns() + int(step * 1e9))
        recorder.write(Batch.idle(begin + second * SECOND))
    recorder.close()
    assert mine.exists()
    mine.unlink()
    folder.rmdir()
    (run_,) = runs(str(where))
    kept = open_several(run_)
    first, last = kept.started, [batch.until for batch in kept.batches()][-1]
    kept.close()
    assert last == begin + 30 * SECOND
    assert begin + 16 * SECOND <= first <= begin + 18 * SECOND


@pytest.mark.parametrize("text", ["drops", "fill=0", "fill=101", "inserts=many", ""])
def test_triggers_that_are_none(text: str) -> None:
    with pytest.raises(ctrace.errors.UsageError, match="is not a trigger"):
        parse_trigger(text)
