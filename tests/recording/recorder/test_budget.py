"""A recording is a stranger's file: each part has a limit, and so has the whole."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from kit import synthetic
from kit.command import ctrace

from ctrace.batch import Batch, TableReading
from ctrace.record import empty
from ctrace.recording import budget
from ctrace.recording.format import evidence, meta
from ctrace.recording.format import layout as fmt
from ctrace.recording.format.columns import CONSTANT
from ctrace.recording.format.layout import BlockHead, BlockKind, Column, Section
from ctrace.recording.reader import Recording
from ctrace.recording.writer import Writer

SECOND = synthetic.SECOND
DAY = 86_400 * SECOND


class Crafted:
    """A sound recording, and blocks after it that a writer of ours would not make."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.truth = synthetic.batches(synthetic.traffic(200, rate=50))
        synthetic.write(path, self.truth)
        with Recording(str(path)) as recording:
            foot = recording._places[-1]
            self.until = recording.until
        self._data = [path.read_bytes()[: foot.offset]]
        self._row = sum(len(batch.events) for batch in self.truth)

    def add(self, kind: BlockKind, sections: list[Section], **head: int) -> None:
        block = BlockHead(kind, **head).pack(sections)
        self._data.append(b"".join(bytes(part) for part in block))
        self.path.write_bytes(b"".join(self._data))

    def batch(
        self, *ends: int, names: object = None, until: int = 0, rows: int = 0,
        more: Sequence[Section] = (),
    ) -> None:  # fmt: skip
        table = np.zeros(len(ends), meta.ENDS)
        table["until"], table["end"], table["counts"] = ends, rows, meta.CHANGED_COUNTS
        sections = [packed(Column.BATCHES, table.tobytes()), *more]
        if names is not None:
            sections.append(packed(Column.NAMES, json.dumps([[0, names]]).encode()))
        self.add(
            BlockKind.BATCHES, sections, batches=len(ends), first_row=self._row, rows=rows,
            tuples=rows, first_tuple=self._row, ts=ends[0], until=until or ends[-1],
        )  # fmt: skip
        self._row += rows

    def events(self, got: list[Batch]) -> bool:
        """Whether every event of the sound part was read."""
        return b"".join(b.events.tobytes() for b in got) == b"".join(
            b.events.tobytes() for b in self.truth
        )


def packed(column: Column, raw: bytes) -> Section:
    return Section(column, 0, fmt.Codec.ZLIB, len(raw), 0, zlib.compress(raw, 9))


@pytest.fixture
def crafted(tmp_path: Path) -> Crafted:
    return Crafted(tmp_path / "a")


def long_names(i: int) -> dict[str, object]:
    return {"cgroups": [[i * 1000 + j, "a" * 65_000] for j in range(200)]}


MANY = 1 << 14
"""Names that are too many in the tests: as many as the limit is take a quarter of a minute."""


def many_names(i: int) -> dict[str, object]:
    return {"cgroups": [[i * 3200 + j, ""] for j in range(3200)]}


def many_addresses(i: int) -> dict[str, object]:
    return {"netns": [[i + 1, "n", ["10.0.0.1"] * 3200, True]]}


def test_what_the_limits_are() -> None:
    assert (budget.LIMIT_NAMES, budget.LIMIT_NAMES_BYTES) == (524_288, 64 << 20)


@pytest.mark.parametrize(
    ("names", "kept", "told"),
    [
        pytest.param(long_names, 5, "67,108,864 bytes of names", marks=pytest.mark.slow),
        (many_names, 5, "16,384 names"),
        pytest.param(many_addresses, 5, "16,384 names", marks=pytest.mark.slow),
    ],
)
def test_names_have_a_limit_together_and_events_are_kept(
    crafted: Crafted, names: object, kept: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "LIMIT_NAMES", MANY)
    for i in range(12):
        crafted.batch(crafted.until + i + 1, names=names(i))  # type: ignore[operator]
    for _ in range(2):  # the limit is for the file, not for what a program reads of it
        with Recording(str(crafted.path)) as recording:
            for _ in range(2):
                named = []
                got = []
                for batch in recording.batches():
                    got.append(batch)
                    if batch.until > crafted.until:
                        named.append(bool(batch.names.cgroups or batch.names.netns))
                assert named == [True] * kept + [False] * (12 - kept)
                assert crafted.events(got)
                assert not any(batch.lost for batch in got)
            assert str(recording.missing).count(told) == 1
            recording.seek(recording.clock.utc(crafted.until + 12))
            first = next(recording.batches())
            assert len(first.names.cgroups) + len(first.names.netns) < MANY
            assert str(recording.missing).count(told) == 1


@pytest.mark.slow
def test_notes_and_rules_have_a_limit_each(crafted: Crafted) -> None:
    for _ in range(12):
        note, rules = "A" * (120 << 10), {"netns": 1, "text": "A" * (8 << 20)}
        for kind, data in ((BlockKind.NOTE, note), (BlockKind.RULESET, rules)):
            blob = json.dumps(data).encode()
            crafted.add(kind, [packed(Column.JSON, blob)], until=crafted.until)
    with Recording(str(crafted.path)) as recording:
        for _ in range(2):
            assert len(list(recording.notes())) == 8
            assert len(list(recording.rulesets())) == 7
        assert str(recording.missing).count("1,048,576 bytes of notes") == 1
        assert str(recording.missing).count("67,108,864 bytes of rules") == 1
        assert crafted.events(list(recording.batches()))


@pytest.mark.slow
def test_a_bomb_of_names_stays_small(crafted: Crafted) -> None:
    for i in range(24):  # more than 300 MiB when they are unfolded
        crafted.batch(crafted.until + i + 1, names=long_names(i))
    assert crafted.path.stat().st_size < 1 << 20
    kept: list[Batch] = []
    tracemalloc.start()
    try:
        with Recording(str(crafted.path)) as recording:
            kept.extend(recording.batches())
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


def rows_without_bytes(crafted: Crafted) -> None:
    """All rows alike: every column is a constant."""
    alike = {Column.TS: 0, Column.KIND: 1, Column.REASON: 0, Column.DIRECTION: 0, Column.STATE: 0,
             Column.STATUS: 0, Column.OWNER: 0, Column.CGROUP: 0, Column.CT: 7, Column.SHAPE: 3,
             Column.SPORT: 1, Column.DPORT: 80, Column.NETNS: 5, Column.ZONE: 0, Column.PROTO: 6,
             Column.FAMILY: 2, Column.SRC4: 1, Column.DST4: 2}  # fmt: skip
    n = fmt.LIMIT_ROWS
    sections = [Section(column, CONSTANT, 0, n, base, b"") for column, base in alike.items()]
    for i in range(40):  # 600 MiB of events in 30 KB
        crafted.batch(crafted.until + i + 1, rows=n, more=sections)


def batches_without_bytes(crafted: Crafted) -> None:
    for i in range(4):
        crafted.batch(*[crafted.until + i + 1] * 100_000)


def hours_without_bytes(crafted: Crafted) -> None:
    crafted.batch(*(crafted.until + (i + 1) * 3600 * SECOND for i in range(9000)))


def counters_of_each_batch(crafted: Crafted) -> None:
    """Work that grows with the square of the batches, if each looks for its own among all."""
    counts = np.zeros(60_000, meta.COUNTS)
    counts["batch"], counts["netns"] = np.arange(len(counts)), 5
    crafted.batch(
        *range(crafted.until + 1, crafted.until + 1 + len(counts)),
        more=[packed(Column.COUNTS, counts.tobytes())],
    )


@pytest.mark.parametrize(
    "dense",
    [rows_without_bytes, batches_without_bytes, hours_without_bytes, counters_of_each_batch],
)  # fmt: skip
def test_what_is_denser_than_a_recorder_writes_is_left_out(
    crafted: Crafted, dense: Callable[[Crafted], None]
) -> None:
    dense(crafted)
    before = len(crafted.truth)
    with Recording(str(crafted.path)) as recording:
        for _ in range(2):
            got = list(recording.batches())
            assert crafted.events(got[:before])
            assert len(got) < before + 100
            assert sum(len(batch.events) for batch in got) < 1_000_000
            assert str(recording.missing).count("more than 250 times their size") == 1
        read = sum(len(batch.events) for batch in got)
        assert sum(len(one["ts"]) for one in recording.columns("ts")) == read
        assert len(list(recording.tables())) < before + 100


@pytest.mark.slow
def test_a_quiet_recording_is_not_too_dense(tmp_path: Path) -> None:
    """An hour in which nothing happens, with twenty batches a second at its end."""
    path = tmp_path / "a"
    counts = {5: np.zeros(16, np.uint64)}
    ends = [*range(1, 4000), *(4000 + i / 20 for i in range(4000))]
    with Writer(str(path), synthetic.header(), codec=fmt.Codec.ZLIB) as writer:
        for end in ends:
            table = TableReading(5, 0, 1000, 1000, {})
            writer.write(Batch(empty(), int((100 + end) * SECOND), 0, counts, (table,)))
    with Recording(str(path)) as recording:
        assert sum(1 for _ in recording.batches()) == len(ends)
        assert not recording.missing


def test_namespaces_have_a_limit(crafted: Crafted) -> None:
    counts = np.zeros(10_000, meta.COUNTS)
    for i in range(3):
        counts["netns"] = np.arange(len(counts)) + i * len(counts)
        crafted.batch(crafted.until + i + 1, more=[packed(Column.COUNTS, counts.tobytes())])
    with Recording(str(crafted.path)) as recording:
        for _ in range(2):
            assert len(max((told for _, told in recording.counts()), key=len)) <= 10_001
            assert crafted.events(list(recording.batches()))
        assert str(recording.missing).count("16,384 namespaces") == 1


@pytest.mark.parametrize(
    "tables",
    [[[5, 1, 2, 3, {f"counter{i}": i for i in range(100)}]], [[5, 1, 2, 3, {}]] * 20_000],
    ids=["counters", "tables"],
)
def test_more_than_a_batch_can_tell_of_tables_is_damage(
    crafted: Crafted, tables: list[object]
) -> None:
    told = json.dumps([[0, tables]]).encode()
    crafted.batch(crafted.until + 1, more=[packed(Column.TABLES, told)])
    with Recording(str(crafted.path)) as recording:
        assert crafted.events(list(recording.batches()))
        assert "more tables or counters" in "".join(recording.missing.damage)


@pytest.mark.slow
def test_frames_are_printed_only_of_what_was_recorded(crafted: Crafted) -> None:
    crafted.batch(*(crafted.until + (i + 1) * 3500 * SECOND for i in range(50)))
    done = ctrace("replay", crafted.path, "--format", "json")
    assert done.returncode == 0, done.stderr
    said = [json.loads(line)["ts"][:19] + "+00:00" for line in done.stdout.splitlines()]
    moments = [datetime.fromisoformat(text).timestamp() for text in said]
    assert 50 < len(moments) < 60
    assert all((later - moments[0]) % 1 < 0.01 for later in moments)  # whole steps
    assert moments[-1] - moments[-2] == pytest.approx(3500, abs=1)


@pytest.mark.parametrize("how", ["a later block", "a later batch", "a lie in the header"])
def test_no_recording_lasts_for_years(crafted: Crafted, how: str) -> None:
    year = 365 * DAY
    if how == "a later block":
        crafted.batch(crafted.until + 50 * year)
    elif how == "a later batch":
        crafted.batch(crafted.until + 1, crafted.until + 50 * year)
    else:
        crafted.batch(crafted.until + 50 * year, until=crafted.until + 1)
    with Recording(str(crafted.path)) as recording:
        assert recording.until <= crafted.until + 1
        got = list(recording.batches())
        assert max(batch.until for batch in got) <= crafted.until + 1
        assert crafted.events(got)
        assert recording.missing.bytes
        assert ("400 days" in str(recording.missing)) == (how != "a lie in the header")
        assert max(until for until, _ in recording.counts()) <= crafted.until + 1


def test_a_year_of_standstill_is_kept_and_jumped_over(crafted: Crafted) -> None:
    crafted.batch(crafted.until + 399 * DAY)
    with Recording(str(crafted.path)) as recording:
        assert max(batch.until for batch in recording.batches()) == crafted.until + 399 * DAY
        assert "400 days" not in str(recording.missing)
        length = crafted.until - recording.started
    done = ctrace("replay", crafted.path, "-o", "json")
    assert done.returncode == 0
    said = [json.loads(line)["ts"][:19] + "+00:00" for line in done.stdout.splitlines()]
    moments = [datetime.fromisoformat(text).timestamp() for text in said]
    assert length / SECOND - 2 < len(moments) < length / SECOND + 4
    assert moments == sorted(moments)
    assert moments[-1] - moments[0] > 398 * 86_400
    assert "incomplete: the end is cut off" in done.stderr


def test_what_was_made_of_texts_may_span_decades_and_still_ends(tmp_path: Path) -> None:
    path = tmp_path / "a"
    began = 100 * SECOND
    moments = [began + SECOND, began + 20 * 365 * DAY, began + 50 * 365 * DAY]
    header = replace(synthetic.header(), facts={evidence.FACT: "{}"})
    with Writer(str(path), header) as writer:
        for moment in moments:
            writer.write(Batch.idle(moment))
    with Recording(str(path)) as recording:
        assert [batch.until for batch in recording.batches()] == moments
        assert not recording.missing
    done = ctrace("replay", path, "-o", "json")
    assert done.returncode == 0
    assert 3 <= len(done.stdout.splitlines()) <= 6


@pytest.mark.slow
def test_what_a_file_spent_is_told_in_one_line(crafted: Crafted) -> None:
    for i in range(12):
        crafted.batch(crafted.until + i + 1, names=long_names(i))
    crafted.batch(crafted.until + 1000 * DAY)
    done = ctrace("replay", "--once", crafted.path)
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert "incomplete" in line
    assert "bytes of names" in line
    assert "400 days" in line
