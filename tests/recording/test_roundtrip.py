"""What is written comes back, bit by bit, batch by batch."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Optional

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from kit import synthetic
from kit.examples import examples

import ctrace
from ctrace.batch import Batch
from ctrace.beside import EPHEMERAL, Beside, Left, PortsTaken, Refusing, Short, Stray
from ctrace.record import RECORD, Events, Kind, empty, join
from ctrace.recording.format import beside_block
from ctrace.recording.format.codecs import zstd_available
from ctrace.recording.format.layout import Codec, Damaged
from ctrace.recording.merge import Merged
from ctrace.recording.reader import Recording
from ctrace.recording.redact import Redacted
from ctrace.recording.writer import Writer

SECOND = synthetic.SECOND


def write(path: Path, batches: list[Batch], codec: Optional[Codec] = None) -> Path:
    with Writer(str(path), synthetic.header(), codec=codec) as writer:
        for batch in batches:
            writer.write(batch)
    return path


def cut(events: Events, pieces: list[int], start: int = 1000) -> list[Batch]:
    """The events in batches of these lengths and one for the rest; ends rise."""
    out, at = [], 0
    for i, n in enumerate([*pieces, len(events)]):
        part = events[at : at + n]
        at += len(part)
        out.append(Batch(part, (start + i) * SECOND, lost=i % 3))
    return out


@pytest.mark.parametrize("codec", [Codec.RAW, Codec.ZLIB, Codec.ZSTD])
def test_realistic_traffic_is_kept_exactly(tmp_path: Path, codec: Codec) -> None:
    batches = synthetic.batches(synthetic.traffic(200_000))
    path = write(tmp_path / "a", batches, codec=codec)
    with ctrace.open(str(path)) as recording:
        got = list(recording)
        assert len(got) == len(batches)
        assert all(synthetic.same(a, b) for a, b in zip(batches, got, strict=True))
        assert not recording.missing
        assert recording.ended == ""
        assert recording.header == synthetic.header()
    if codec != Codec.RAW:
        assert path.stat().st_size < 10 * 200_000


@pytest.mark.parametrize("codec", ["zlib", "zstd"])
def test_a_recording_of_the_first_version_is_read_as_it_was(codec: str) -> None:
    path = Path(__file__).parent / "earlier" / f"1.0-{codec}.data"
    with ctrace.open(str(path)) as recording:
        events = join([batch.events for batch in recording])
        assert len(events) == 1856
        # of the events that were written
        assert hashlib.sha256(events.tobytes()).hexdigest() == (
            "e059d5b83e50b475a914e9f8a8ac2a4f1f261d0c090b1b8624cb93c847f16192"
        )
        for column in recording.columns("kind", "reason", "reply_dport"):
            assert len(column["kind"]) == len(column["reason"]) == len(column["reply_dport"]) > 0
        kinds = np.concatenate([column["kind"] for column in recording.columns("kind")])
        assert np.array_equal(kinds, events["kind"])
        assert [reading.max for _, (reading,) in recording.tables()] == [65536] * 3
        assert list(recording.notes()) == ["made by the first version"]
        assert not recording.missing


@examples(60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 3000),
    seed=st.integers(0, 1 << 30),
    alphabet=st.sampled_from([1, 4, 50]),
    pieces=st.lists(st.integers(0, 900), max_size=8),
    codec=st.sampled_from(list(Codec)),
)
def test_arbitrary_records_are_kept_exactly(
    tmp_path: Path, n: int, seed: int, alphabet: int, pieces: list[int], codec: Codec
) -> None:
    batches = cut(synthetic.arbitrary(n, seed, alphabet=alphabet), pieces)
    path = tmp_path / "a"
    path.unlink(missing_ok=True)
    with Recording(str(write(path, batches, codec=codec))) as recording:
        got = list(recording)
    assert len(got) == len(batches)
    assert all(synthetic.same(a, b) for a, b in zip(batches, got, strict=True))


def test_a_tuple_is_found_again_only_when_every_word_of_it_is_the_same(tmp_path: Path) -> None:
    """One destroy per word that differs from its insert's: none may borrow the tuple."""
    base = synthetic.traffic(2)[:1]
    rows = [base]
    for name in ("ct", "src", "dst", "reply_src", "reply_dst", "sport", "dport", "reply_sport",
                 "reply_dport", "netns", "proto", "family", "zone"):  # fmt: skip
        other = base.copy()
        other["kind"] = Kind.DESTROY
        other[name] ^= 1
        rows.append(other)
    events = np.concatenate([row.view(np.uint8) for row in rows]).view(RECORD)
    with Recording(str(write(tmp_path / "a", cut(events, [])))) as recording:
        assert b"".join(b.events.tobytes() for b in recording) == events.tobytes()


@pytest.mark.slow
def test_references_reach_back_a_whole_window_and_no_further(tmp_path: Path) -> None:
    """More entries at once than the window holds: the oldest are written out again."""
    n = (1 << 19) + 100_000
    made = empty(n)
    made["ct"] = (np.random.default_rng(3).permutation(n) + 1) * 256
    made["ts"] = np.arange(n)
    made["kind"], made["sport"] = 1, np.arange(n) % 65536
    gone = made.copy()
    gone["kind"] = 2
    with Recording(
        str(write(tmp_path / "a", cut(made, [n // 2]) + cut(gone, [], 2000)))
    ) as recording:
        got = b"".join(batch.events.tobytes() for batch in recording)
    assert got == made.tobytes() + gone.tobytes()


def test_columns_equal_the_fields_of_the_events(tmp_path: Path) -> None:
    events = synthetic.traffic(150_000)
    is_destroy = events["kind"] == Kind.DESTROY
    with Recording(str(write(tmp_path / "a", synthetic.batches(events)))) as recording:
        names = RECORD.names
        assert names is not None
        whole = list(recording.columns(*names))
        for name in names:
            got = np.concatenate([columns[name] for columns in whole])
            want = events[name].copy()
            if name in ("owner", "cgroup"):
                want[is_destroy] = 0
            elif name in ("idle_ms", "overdue_ms", "timeout_ms", "mark"):
                want[~is_destroy] = 0
            assert got.dtype == want.dtype or name == "kind"
            assert np.array_equal(got, want), name
        with pytest.raises(ctrace.errors.CtraceError, match="no column 'port': there are ts"):
            next(recording.columns("port"))


@pytest.mark.slow
def test_seeking_gives_the_same_batches_and_every_name(tmp_path: Path) -> None:
    batches = synthetic.batches(synthetic.traffic(300_000, rate=20_000))
    assert len(batches) > 40
    with Recording(str(write(tmp_path / "a", batches))) as recording:
        for want in (0, 1, 17, len(batches) - 1):
            recording.seek(recording.clock.utc(batches[want].until))
            got = list(recording)
            assert len(got) == len(batches) - want
            assert got[0].names == batches[0].names
            assert got[0].events.tobytes() == batches[want].events.tobytes()
            assert all(
                synthetic.same(a, b) for a, b in zip(batches[want + 1 :], got[1:], strict=True)
            )
        recording.seek(recording.clock.utc(batches[-1].until + 1))
        assert list(recording) == []


def test_tables_and_counters_by_time(tmp_path: Path) -> None:
    batches = synthetic.batches(synthetic.traffic(100_000))
    with Recording(str(write(tmp_path / "a", batches))) as recording:
        assert list(recording.tables()) == [(b.until, b.tables) for b in batches if b.tables]
        counts = list(recording.counts())
    assert [until for until, _ in counts] == [b.until for b in batches]
    assert np.array_equal(counts[-1][1][synthetic.NETNS], batches[-1].counts[synthetic.NETNS])


BESIDE = Beside(
    synthetic.NETNS,
    (Refusing("ip web in", 7, "limit", 20, 900, 8), Refusing("ip6 web in", 8, "invalid")),
    (Left("udp", "198.51.100.7", 5060, "203.0.113.9", 40),),
    (PortsTaken("tcp", "198.51.100.1", "203.0.113.7", 443, 900, 1000, 850, 3.004),),
    (Stray("203.0.113.4", "tcp", 80, "syn-ack", 71),),
    (Short("cloud", "web0", 90, 0, 12), Short("expectations", used=900, of=1024)),
    echo=True,
    part=0.25,
    ephemeral=(1024, 65535),
)


def test_what_was_read_beside_comes_back(tmp_path: Path) -> None:
    """Merged and redacted, too: there without an address or a name that was in it."""
    batches = synthetic.batches(synthetic.traffic(2000))
    batches[-1] = replace(batches[-1], beside=(BESIDE, Beside(7)))
    path = write(tmp_path / "a", batches)
    with Recording(str(path)) as recording:
        assert [one.beside for one in recording] == [one.beside for one in batches]
    with Merged([Recording(str(path)), Recording(str(path))]) as merged:
        found = [one for batch in merged.batches() for one in batch.beside]
    assert [replace(one, netns=0) for one in found[::2]] == [replace(BESIDE, netns=0)] * 2
    assert len({one.netns for one in found}) == 4
    redacted = Redacted(Recording(str(path)), key=b"k" * 32)
    (one, _), *_ = [batch.beside for batch in redacted.batches() if batch.beside]
    redacted.close()
    said = str(one)
    assert (one.refusing[0].since, one.left[0].entries, one.ports[0].used) == (8, 40, 900)
    assert (one.strays[0].packets, one.short[0].since, one.part) == (71, 12, 0.25)
    assert not [word for word in ("web", "198.51", "203.0") if word in said], said


@pytest.mark.parametrize(
    "data",
    [
        7,
        [[7]],
        [[-1, [], [], []]],
        [[7, [["place", 1, "other", 0, None, None]], [], []]],
        [[7, [], [["udp", "a", 65536, "b", 1]], []]],
        [[7, [], [["udp", "a" * 2000, 1, "b", 1]], []]],
        [[7, [], [["udp", "a", 1, "b", True]], []]],
        [[7, [], [["udp", "a", 1, "b", 1]] * 17, []]],
        [[7, [], [], [["udp", "a", "b", 1, 1, 1, None]]]],
        [[7, [], [], [], [["10.0.0.1", "tcp", 80, "no reason", 1]], [], 1]],
        [[7, [], [], [], [], [["no limit", "eth0", 1, 1, 1]], 1]],
        [[7, [], [], [], [], [], -1]],
    ],
)
def test_what_was_read_beside_is_checked(data: object) -> None:
    with pytest.raises(Damaged):
        beside_block.parse(data)


def test_what_a_later_version_adds_is_passed_over() -> None:
    data = [[*one, "more"] for one in beside_block.to_json((BESIDE,))]
    data[0][1] = [[*rule, "more"] for rule in data[0][1]]
    assert beside_block.parse(data) == (BESIDE,)
    earlier = [one[:4] for one in beside_block.to_json((BESIDE,))]
    assert beside_block.parse(earlier) == (
        replace(BESIDE, strays=(), short=(), echo=False, part=1.0, ephemeral=EPHEMERAL),
    )


def test_zlib_alone_suffices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the zstandard package is not installed."""
    batches = synthetic.batches(synthetic.traffic(20_000))
    packed = write(tmp_path / "zstd", batches)
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    assert not zstd_available()
    with Recording(str(write(tmp_path / "zlib", batches))) as recording:
        assert all(synthetic.same(a, b) for a, b in zip(batches, recording, strict=True))
    with pytest.raises(ctrace.errors.CtraceError, match="install the zstandard package"):
        list(Recording(str(packed)))


def test_the_file_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [])
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ctrace.errors.CtraceError, match="exists: give another name"):
        Writer(str(path), synthetic.header())
