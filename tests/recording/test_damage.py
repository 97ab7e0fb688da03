"""The promise at the top of the format: whatever happens to a file, what it says is true."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from kit import synthetic

import ctrace
from ctrace.batch import Batch
from ctrace.errors import CtraceError
from ctrace.recording.format import codecs, meta
from ctrace.recording.format import layout as fmt
from ctrace.recording.format.columns import encode, encode_blob
from ctrace.recording.reader import Recording
from ctrace.recording.writer import Writer

SECOND = synthetic.SECOND


def small(path: Path, n: int = 400, rate: float = 100) -> list[Batch]:
    """A file of several blocks; its batches."""
    batches = synthetic.batches(synthetic.traffic(n, rate=rate))
    with Writer(str(path), synthetic.header()) as writer:
        for batch in batches:
            writer.write(batch)
    return batches


def is_true(got: list[Batch], truth: list[Batch], recording: Recording) -> None:
    """What was read is what was written, less what is said to be lost."""
    originals = {batch.until: batch for batch in truth}
    written = b"".join(batch.events.tobytes() for batch in truth)
    rows = {written[i : i + 120] for i in range(0, len(written), 120)}
    seen = lost = 0
    for batch in got:
        data = batch.events.tobytes()
        assert all(data[i : i + 120] in rows for i in range(0, len(data), 120))
        seen += len(batch.events)
        lost += batch.lost
        if batch.until in originals:
            original = originals[batch.until]
            for netns, counts in batch.counts.items():
                assert np.array_equal(counts, original.counts[netns])
            assert batch.tables in (original.tables, ())
    assert lost == recording.missing.events
    total = len(written) // 120
    assert seen + lost <= total
    if seen + lost < total:
        assert recording.missing.truncated or recording.missing.bytes


@pytest.mark.slow
def test_cut_off_at_every_byte(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    truth = small(whole, 40, rate=20)
    data = whole.read_bytes()
    edges = []
    with Recording(str(whole)) as recording:
        edges = [place.offset + place.length for place in recording._places]
    part = tmp_path / "part"
    for length in range(len(data)):
        part.write_bytes(data[:length])
        if length < edges[0]:
            with pytest.raises(CtraceError, match=r"cut off before anything|is empty"):
                Recording(str(part))
            continue
        with Recording(str(part)) as recording:
            # Everything up to the last complete block is there.
            complete = sum(1 for edge in edges if edge <= length)
            assert len(recording._places) == complete
            assert recording.missing.truncated == (complete < len(edges))
            if complete < len(edges):
                assert recording.unread == length - max(e for e in edges if e <= length)
                assert "cut off" in str(recording.missing)
            if length % 7 == 0 or length in edges or length + 1 in edges:
                is_true(list(recording), truth, recording)
            assert len(recording.missing.damage) <= 1


@pytest.mark.slow
def test_hundreds_of_random_corruptions(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    truth = small(whole, 300)
    data = whole.read_bytes()
    chance = random.Random(7)
    part = tmp_path / "part"
    partial, refusals = 0, set()
    for round_ in range(400):
        broken = bytearray(data)
        at = chance.randrange(len(data))
        how = round_ % 4
        if how == 0:
            broken[at] ^= 1 << chance.randrange(8)
        elif how == 1:
            broken[at : at + 16] = chance.randbytes(16)
        elif how == 2:
            del broken[at : at + chance.randrange(1, 200)]
        else:
            broken[at:at] = chance.randbytes(chance.randrange(1, 200))
        part.write_bytes(broken)
        try:
            recording = Recording(str(part))
        except CtraceError as error:
            refusals.add(str(error))
            continue
        with recording:
            got = list(recording)
            is_true(got, truth, recording)
            partial += 0 < sum(len(batch.events) for batch in got) < 300
            for _ in recording.columns("ts", "dport", "src", "reply_sport"):
                pass
            list(recording.tables())
    assert all(len(line) < 300 and line.isprintable() for line in refusals)
    assert partial > 75  # damage in one place does not cost the rest


def test_damage_in_the_middle_costs_that_block_and_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a"
    truth = small(path, 4000, rate=800)
    data = bytearray(path.read_bytes())
    with Recording(str(path)) as recording:
        places = [p for p in recording._places if p.kind == fmt.BlockKind.BATCHES]
        victim = places[len(places) // 2]
        rows = fmt.read_block(recording._file, victim.offset).head.rows
    data[victim.offset + victim.length - 3] ^= 0x55
    path.write_bytes(data)
    with Recording(str(path)) as recording:
        got = list(recording)
        is_true(got, truth, recording)
        assert got[-1].until == truth[-1].until
        assert rows <= recording.missing.events < rows * 4
        assert sum(len(b.events) for b in got) + recording.missing.events == 4000


def test_what_is_cut_out_or_follows_the_end_is_told(tmp_path: Path) -> None:
    """The last block before the end is gone; another recording was appended."""
    path = tmp_path / "a"
    truth = small(path, 300)
    data = path.read_bytes()
    with Recording(str(path)) as recording:
        foot = recording._places[-1].offset
        last = recording._places[-2]
        rows = fmt.read_block(recording._file, last.offset).head.rows
    path.write_bytes(data[: last.offset] + data[foot:])
    with Recording(str(path)) as recording:
        got = list(recording)
        is_true(got, truth, recording)
        assert sum(batch.lost for batch in got) == recording.missing.events == rows
    path.write_bytes(data + data)
    with Recording(str(path)) as recording:
        is_true(list(recording), truth, recording)
        assert recording.missing.bytes == len(data)


def block(kind: int, sections: list[fmt.Section], **fields: int) -> bytes:
    return b"".join(fmt.BlockHead(kind, **fields).pack(sections))


def crafted(path: Path, *blocks: bytes) -> Path:
    """A file that passes every check sum, with these blocks after a good header."""
    none = codecs.Compressor(fmt.Codec.RAW)
    head = block(
        fmt.BlockKind.HEAD, encode_blob(fmt.Column.JSON, meta.header_json(synthetic.header()), none)
    )
    path.write_bytes(fmt.FILE_HEAD + head + b"".join(blocks))
    return path


@pytest.mark.parametrize("codec", [fmt.Codec.ZLIB, fmt.Codec.ZSTD])
def test_bombs_and_lies_stay_small(tmp_path: Path, codec: fmt.Codec) -> None:
    """Lengths that lie, frames that unfold to gigabytes, JSON without a bottom."""
    pack = codecs.Compressor(codec)
    bomb = pack(bytes(200 << 20))[1]
    deep = b"[" * 1_000_000
    column = fmt.Column
    evil = [
        block(2, [fmt.Section(column.TS, 0, codec, 100, 0, bomb)], rows=100, tuples=100),
        block(2, [fmt.Section(column.BATCHES, 0, codec, 1 << 31, 0, bomb)], batches=1),
        block(2, [fmt.Section(column.NAMES, 0, codec, len(bomb), 0, bomb)]),
        block(2, encode_blob(column.NAMES, deep, pack)),
        block(2, encode_blob(column.TABLES, b"[[0,[[1,-5,2,3,{}]]]]", pack), batches=1),
        block(2, encode_blob(column.TABLES, b"[[0,[[1,1e999,2,3,{}]]]]", pack), batches=1),
        block(2, [], rows=1 << 31, tuples=5),
        block(2, [], rows=60_000, tuples=60_000, batches=1),
        block(2, [fmt.Section(column.TS, 255, 0, 9, 1 << 63, b"")], rows=9, until=1 << 63),
        block(99, [fmt.Section(7, 3, 9, 1 << 30, 5, b"what is this")]),
        block(4, encode_blob(column.JSON, b'{"no": "note"}', pack)),
        block(6, encode_blob(column.JSON, b"[1]", pack)),
        fmt.TRAILER.pack(1 << 63, fmt.TRAILER_MAGIC),
    ]
    path = crafted(tmp_path / "a", *evil)
    code = f"""
        import resource, ctrace
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        with ctrace.open({str(path)!r}) as recording:
            assert [len(b.events) for b in recording] == [], list(recording)
            assert list(recording.notes()) == []
            assert list(recording.tables()) == []
            assert recording.missing
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


def test_crafted_events_that_no_kernel_makes_are_left_out_and_counted(tmp_path: Path) -> None:
    events = synthetic.traffic(100)
    events["kind"][10] = 77
    events["reason"][20] = 200
    events["ts"][30] = 1 << 63
    with Writer(str(tmp_path / "a"), synthetic.header()) as writer:
        writer.write(Batch(events, 500 * SECOND))
    with Recording(str(tmp_path / "a")) as recording:
        (batch,) = recording
    assert len(batch.events) == 97
    assert batch.lost == recording.missing.events == 3


def test_references_out_of_range_are_damage(tmp_path: Path) -> None:
    none = codecs.Compressor(fmt.Codec.RAW)
    one = np.ones(3, np.uint8)
    for distance in (0, 1, 1 << 20):
        sections = [
            s
            for column, values in (
                (fmt.Column.TS, one * 0), (fmt.Column.KIND, one * 2), (fmt.Column.REASON, one),
                (fmt.Column.DIRECTION, one), (fmt.Column.STATE, one), (fmt.Column.STATUS, one),
                (fmt.Column.IDLE, one), (fmt.Column.OVERDUE, one), (fmt.Column.TIMEOUT, one),
                (fmt.Column.MARK, one), (fmt.Column.REFERS, one),
                (fmt.Column.DISTANCE, np.full(3, distance, np.uint32)),
            )
            for s in encode(column, values, none)
        ]  # fmt: skip
        path = crafted(tmp_path / str(distance), block(2, sections, rows=3))
        with Recording(str(path)) as recording:
            assert list(recording) == []
            assert recording.missing


def test_other_files_and_other_versions(tmp_path: Path) -> None:
    path = tmp_path / "a"
    small(path, 20)
    data = path.read_bytes()
    later = bytearray(data)
    later[11] = 2
    path.write_bytes(later)
    with pytest.raises(CtraceError, match=r"format 2; this ctrace reads format 1: use ctrace"):
        ctrace.open(str(path))
    later[11] = 0  # of before the first
    path.write_bytes(later)
    with pytest.raises(CtraceError, match=r"format 0; this ctrace reads format 1$"):
        ctrace.open(str(path))
    path.write_bytes(b"")
    with pytest.raises(CtraceError, match="is empty"):
        ctrace.open(str(path))
    minor = bytearray(data)
    minor[12] = 9
    path.write_bytes(minor)
    assert sum(len(batch.events) for batch in ctrace.open(str(path))) == 20
    for text in (b"\x7fELF" + bytes(100), b"perf.data", data[1:]):
        path.write_bytes(text)
        with pytest.raises(CtraceError, match="is not a ctrace recording"):
            ctrace.open(str(path))
    with pytest.raises(CtraceError, match="No such file"):
        ctrace.open(str(tmp_path / "absent"))
    with pytest.raises(CtraceError, match="directory"):
        ctrace.open(str(tmp_path))


def test_blocks_of_a_later_minor_version_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a"
    truth = small(path, 200)
    data = path.read_bytes()
    with Recording(str(path)) as recording:
        first = recording._places[1].offset
    new = block(200, [fmt.Section(500, 9, 77, 5, 0, b"later")])
    path.write_bytes(data[:first] + new + data[first:])
    with Recording(str(path)) as recording:
        assert all(synthetic.same(a, b) for a, b in zip(truth, recording, strict=True))
        assert not recording.missing


RECORDER = """
    import sys, time
    sys.path[:0] = [{tests!r}]
    from kit import synthetic
    from ctrace.recording.writer import Writer
    batches = synthetic.batches(synthetic.traffic(40_000, rate=2000))
    with Writer({path!r}, synthetic.header()) as writer:
        for batch in batches:
            writer.write(batch)
            print(batch.until, flush=True)
            time.sleep(0.01)
"""


def recorder(path: Path) -> subprocess.Popen[str]:
    code = RECORDER.format(tests=str(Path(__file__).parents[1]), path=str(path))
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )


def test_kill_9_while_writing_costs_a_second_at_most(tmp_path: Path) -> None:
    path = tmp_path / "a"
    process = recorder(path)
    assert process.stdout is not None
    for _ in range(40):
        last = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    last = max(last, *(int(line) for line in process.stdout.read().split()), 0)
    process.wait()
    process.stdout.close()
    with ctrace.open(str(path)) as recording:
        assert not recording.writing
        assert recording.ended is None
        got = list(recording)
        assert last - got[-1].until <= 1.25 * SECOND
        truth = synthetic.batches(synthetic.traffic(40_000, rate=2000))
        assert all(synthetic.same(a, b) for a, b in zip(truth, got, strict=False))


def test_reading_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a"
    process = recorder(path)
    assert process.stdout is not None
    for _ in range(12):
        process.stdout.readline()
    recording = ctrace.open(str(path))
    assert recording.writing
    before = len(list(recording))
    assert before
    process.communicate(timeout=60)
    recording.refresh()
    truth = synthetic.batches(synthetic.traffic(40_000, rate=2000))
    assert all(synthetic.same(a, b) for a, b in zip(truth, recording, strict=True))
    assert len(truth) > before
    assert not recording.missing
    assert not recording.writing
    assert recording.ended == ""


FULL = """
    import os, subprocess, sys
    sys.path[:0] = [{tests!r}]
    from kit import synthetic
    from ctrace.errors import CtraceError
    from ctrace.recording.writer import Writer
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k", "none", {where!r}], check=True)
    batches = synthetic.batches(synthetic.traffic(60_000, rate=5000))
    writer = Writer({where!r} + "/a", synthetic.header())
    try:
        for batch in batches:
            writer.write(batch)
    except CtraceError as error:
        print(error)
    try:
        writer.write(batches[-1])
    except CtraceError:
        writer.close()
    sys.stdout.flush()
    subprocess.run(["cp", {where!r} + "/a", {kept!r}], check=True)
"""


@pytest.mark.kernel
def test_a_full_disk_ends_it_with_one_line_and_keeps_what_is_there(tmp_path: Path) -> None:
    where, kept = tmp_path / "disk", tmp_path / "kept"
    where.mkdir()
    code = FULL.format(tests=str(Path(__file__).parents[1]), where=str(where), kept=str(kept))
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", textwrap.dedent(code)],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    (line,) = done.stdout.splitlines()
    assert "No space left on device; the recording ends here and keeps its" in line
    truth = synthetic.batches(synthetic.traffic(60_000, rate=5000))
    with ctrace.open(str(kept)) as recording:
        got = list(recording)
        assert got
        kept_events = sum(len(batch.events) for batch in got)
        assert f"keeps its {kept_events:,} events" in line
        for a, b in zip(truth, got, strict=False):
            assert synthetic.same(a, b)
        assert not recording.missing.events
    assert list(where.iterdir()) == []
