"""Replay, reports, exports, merging and redaction say what was recorded."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from kit import synthetic
from kit.examples import examples
from kit.synthetic import incident, write

import ctrace
from ctrace.batch import Batch, HookInfo, Names, Owner
from ctrace.cli import cli
from ctrace.errors import UsageError
from ctrace.live.replay import ReplayFeed
from ctrace.model.model import Model
from ctrace.model.snapshot import GROUPS, Snapshot
from ctrace.record import Kind, Reason, address_bytes, address_text, empty, words
from ctrace.recording.format import layout as fmt
from ctrace.recording.merge import open_several
from ctrace.recording.recorder.segments import FlightRecorder, Retention
from ctrace.recording.recorder.triggers import parse_trigger
from ctrace.recording.redact import Addresses, Redacted
from ctrace.recording.review import review
from ctrace.recording.series import runs
from ctrace.recording.writer import Writer

pytestmark = pytest.mark.slow

SECOND = synthetic.SECOND
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202egnp"


def model() -> Model:
    head = synthetic.header()
    return Model(head.hooks, head.clock, head.started, host=head.host)


def run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == code, done.output
    return done.stdout


def test_replay_gives_the_snapshots_that_live_gave(file: Path, truth: list[Batch]) -> None:
    """Field by field, in one grouping after another as time goes on, and in each at the end."""
    live, again = model(), model()
    with ctrace.open(str(file)) as recording:
        for n, (a, b) in enumerate(zip(truth, recording, strict=True)):
            live.update(a)
            again.update(b)
            if n % 3 == 0:
                group = GROUPS[n // 3 % len(GROUPS)]
                assert live.snapshot(group=group) == again.snapshot(group=group)
    for group in GROUPS:
        assert live.snapshot(group=group) == again.snapshot(group=group)


@pytest.fixture
def feed(file: Path) -> Iterator[ReplayFeed]:
    with ctrace.open(str(file)) as recording:
        feed = ReplayFeed(recording, paused=True)
        yield feed
        feed.close()
        assert feed.error is None


def at(truth: list[Batch], until: int) -> Snapshot:
    live = model()
    for batch in truth:
        if batch.until <= until:
            live.update(batch)
    return live.snapshot(limit=200)


def test_time_travel_shows_what_live_showed_then(feed: ReplayFeed, truth: list[Batch]) -> None:
    """Forwards, backwards, by steps and by bursts of drops."""
    clock = synthetic.header().clock
    for batch in (truth[40], truth[12], truth[60], truth[59], truth[0], truth[-1]):
        feed.seek(clock.utc(batch.until) / 1e9)
        assert feed.settle()
        assert feed.latest() == at(truth, batch.until)
    feed.seek(clock.utc(truth[20].until) / 1e9)
    assert feed.settle()
    feed.step(-1)
    assert feed.settle()
    assert feed.latest() == at(truth, truth[20].until - SECOND)
    first = next(b.until for b in truth if (b.events["kind"] == Kind.DROP).any())
    feed.seek(0)
    assert feed.next_drop()
    assert feed.settle()
    assert feed.latest() == at(truth, first)
    assert not feed.next_drop()
    feed.seek(9e9)
    assert feed.prev_drop()
    assert feed.settle()
    assert feed.position.now == clock.utc(first) / 1e9
    assert feed.position.drops == (clock.utc(first) / 1e9,)


def test_a_step_reaches_the_next_batch_however_far_it_is(tmp_path: Path) -> None:
    sparse = synthetic.incident()[::20]
    file = synthetic.write(tmp_path / "sparse.data", sparse)
    with ctrace.open(str(file)) as recording:
        feed = ReplayFeed(recording, paused=True)
        assert feed.settle()
        ends = [recording.clock.utc(batch.until) / 1e9 for batch in sparse]
        for end in ends:
            if feed.position.now < end:
                feed.step(1)
                assert feed.settle()
                assert feed.position.now == end
        feed.step(-1)
        assert feed.settle()
        assert feed.position.now == ends[-2]
        feed.close()


def test_a_view_can_change_while_paused(feed: ReplayFeed) -> None:
    feed.seek(feed.position.start + 9)
    assert feed.settle()
    feed.set_view("service", "new", "dport=53")
    assert feed.settle()
    latest = feed.latest()
    assert latest is not None
    assert latest.group == "service"
    assert [culprit.port for culprit in latest.culprits] == [53]


def test_playing_at_speed_reaches_the_end(file: Path, truth: list[Batch]) -> None:
    with ctrace.open(str(file)) as recording:
        feed = ReplayFeed(recording, speed=1024)
        deadline = time.monotonic() + 60
        while feed.phase.name == "replay" and time.monotonic() < deadline:
            time.sleep(0.02)
        assert feed.phase.name == "ended"
        assert feed.latest() == at(truth, truth[-1].until)
        feed.close()


def test_replay_without_a_terminal_prints_frames(file: Path) -> None:
    lines = run("replay", str(file), "--step", "5s", "-o", "json").splitlines()
    assert [json.loads(line)["totals"]["insert"] > 0 for line in lines] == [True] * len(lines)
    assert len(lines) >= 3
    assert "tcp/8063" in run("replay", str(file), "--once", "--at", "50%")
    run("replay", str(file), "--at", "yesterday", code=1)


def test_report_totals_are_the_counters(file: Path, truth: list[Batch]) -> None:
    data = json.loads(run("report", str(file), "-o", "json"))
    counts = truth[-1].counts[synthetic.NETNS]
    assert data["totals"]["insert"] == counts[Reason.NEW]
    assert data["totals"]["drop"] == counts[Reason.TABLE_FULL] == 200
    assert data["lost"] == 0
    assert data["recording"]["events"] == sum(len(batch.events) for batch in truth)
    assert len(data["drop_bursts"]) == 1
    assert sum(v["drops"] for v in data["victims"]) <= 200
    first = next(b.until for b in truth if (b.events["kind"] == Kind.DROP).any())
    assert data["before_first_drop"]["totals"]["drop"] == 0
    assert data["before_first_drop"]["ts"] < data["drop_bursts"][0]
    assert data["drop_bursts"][0].startswith(
        np.datetime64(synthetic.header().clock.utc(first), "ns").astype(str)[:22]
    )
    text = run("report", str(file))
    assert "What filled the table" in text
    assert "First refused at" in text


def test_the_cause_is_told_where_refusals_came_before_anything_else(
    tmp_path: Path, truth: list[Batch]
) -> None:
    """Recording begun in the middle of an incident: nothing precedes the first drop."""
    first = next(i for i, b in enumerate(truth) if (b.events["kind"] == Kind.DROP).any())
    before = truth[first - 1]
    empty = replace(before, events=before.events[:0], counts={}, names=truth[0].names)
    path = write(tmp_path / "late.data", [empty, *truth[first:]])
    text = run("report", str(path))
    assert "First refused at" in text
    assert "WHY  " in text
    assert "nothing tracked yet" not in text
    assert "Just before the first drop" not in text  # an empty table tells nothing


def hostile(path: Path) -> Path:
    first, *rest = incident()
    owner = Owner((4242 << 32) | 99, EVIL, 7331, EVIL, EVIL)
    names = Names(
        {k: replace(v, name=EVIL) for k, v in first.names.netns.items()},
        {owner.key: owner},
        {7331: EVIL},
        {(synthetic.NETNS, 6, 8063): owner},
    )
    return write(path, [replace(first, names=names), *rest], host="web1" + EVIL)


class Tags(HTMLParser):
    """Counts elements, and attributes that run code."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs), (tag, attrs)


def test_names_from_a_stranger_run_nothing_in_a_browser(tmp_path: Path) -> None:
    """What a terminal obeys is left out of every view: tests/hardening/test_views.py."""
    path = hostile(tmp_path / "evil.data")
    run("report", str(path), "--html", str(tmp_path / "evil.html"))
    page = (tmp_path / "evil.html").read_text()
    body = page
    parser = Tags()
    parser.feed(body)
    assert "script" not in parser.tags
    assert "img" not in parser.tags
    assert "\x1b" not in body
    markdown = run("report", str(path), "--markdown")
    assert "<img" not in markdown
    assert "\x1b" not in markdown


def test_exports_open_in_the_tools_that_they_are_for(tmp_path: Path, file: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    pandas = pytest.importorskip("pandas")
    out = tmp_path / "a.parquet"
    run("export", str(file), "-o", str(out))
    frame = pandas.read_parquet(out)
    with ctrace.open(str(file)) as recording:
        columns = list(recording.columns("ts", "src", "dport", "kind", "idle_ms"))
        clock = recording.clock
    ts = np.concatenate([c["ts"] for c in columns]).astype(np.int64) + clock.offset
    assert str(frame["time"].dtype) == "datetime64[ns, UTC]"
    assert (frame["time"].astype("int64").to_numpy() == ts).all()
    src = np.concatenate([c["src"] for c in columns])
    assert frame["src"].iloc[0] == address_text(src[0])
    kinds = np.concatenate([c["kind"] for c in columns])
    idle = np.concatenate([c["idle_ms"] for c in columns])[kinds == Kind.DESTROY]
    assert (frame["idle_ms"].dropna().to_numpy() == idle).all()
    rows = duckdb.sql(
        f"select dport, count(*), max(reply_src) from '{out}' where kind = 'drop' "
        "group by dport order by 2 desc"
    ).fetchall()
    assert sum(row[1] for row in rows) == 200
    assert {row[0] for row in rows} <= {53, 8063}
    run("export", str(file), "-o", str(tmp_path / "a.csv"))
    table = pandas.read_csv(tmp_path / "a.csv")
    assert len(table) == len(frame)
    assert list(table["src"]) == list(frame["src"])
    lines = run("export", str(file), "--to", "jsonl").splitlines()
    assert len(lines) == len(frame)
    assert json.loads(lines[7])["sport"] == frame["sport"].iloc[7]
    run("export", str(file), code=1)


def test_openmetrics_can_be_parsed(file: Path, truth: list[Batch]) -> None:
    parser = pytest.importorskip("prometheus_client.openmetrics.parser")
    text = run("export", str(file), "--to", "openmetrics")
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    assert families["ctrace_drops"].samples[-1].value == 200
    entries = families["ctrace_table_entries"].samples
    assert [int(s.value) for s in entries] == [b.tables[0].count for b in truth if b.tables]


def test_hosts_merge_into_one(tmp_path: Path, truth: list[Batch]) -> None:
    """Both hosts use the same namespace number, identities and owners."""
    a = write(tmp_path / "a", truth, host="web1")
    b = write(tmp_path / "b", truth[:50], host="db1")
    run("merge", str(a), str(b), "-o", str(tmp_path / "both"))
    data = json.loads(run("report", str(tmp_path / "both"), "-o", "json", "--limit", "1000"))
    both = json.loads(run("report", str(a), str(b), "-o", "json", "--limit", "1000"))
    assert both["totals"] == data["totals"]
    assert {table["name"] for table in data["tables"]} == {"web1:init", "db1:init"}
    parts = [Counter(Kind(k).name for b in part for k in b.events["kind"].tolist())
             for part in (truth, truth[:50])]  # fmt: skip
    for name in ("insert", "destroy", "drop"):
        assert data["totals"][name] == sum(part[name.upper()] for part in parts)
    assert {table["name"]: table["totals"]["insert"] for table in data["tables"]} == {
        "web1:init": parts[0]["INSERT"],
        "db1:init": parts[1]["INSERT"],
    }


def later(batches: list[Batch], seconds: int) -> list[Batch]:
    """The same a while later, as another host's recording might have it."""
    moved = []
    for batch in batches:
        events = batch.events.copy()
        events["ts"] += np.uint64(seconds * SECOND)
        moved.append(replace(batch, events=events, until=batch.until + seconds * SECOND))
    return moved


@pytest.mark.parametrize("redact", [False, True])
def test_bursts_of_drops_are_found_in_whatever_is_replayed(
    tmp_path: Path, file: Path, truth: list[Batch], redact: bool
) -> None:
    """Of two hosts, the second of which is refused nine seconds later."""
    other = write(tmp_path / "b", later(truth, 9), host="db1")
    first = next(b.until for b in truth if (b.events["kind"] == Kind.DROP).any())
    source = open_several([str(file), str(other)])
    if redact:
        source = Redacted(source)
    clock = source.clock
    feed = ReplayFeed(source, paused=True)
    feed.seek(0)
    for moment, drops in ((first, 0), (first + 9 * SECOND, 200)):
        assert feed.next_drop()
        assert feed.settle()
        latest = feed.latest()
        assert feed.position.now == clock.utc(moment) / 1e9
        assert latest is not None
        assert latest.totals.drop > drops
    assert not feed.next_drop()
    assert feed.prev_drop()
    assert feed.settle()
    assert feed.position.now == clock.utc(first) / 1e9
    assert len(feed.position.drops) == 2
    feed.close()
    source.close()


@examples(150)
@given(st.lists(st.ip_addresses(), min_size=2, max_size=12))
def test_redaction_preserves_prefixes_and_nothing_else(addresses: list[object]) -> None:
    mapping = Addresses(b"k" * 32)
    old = [address_bytes(str(address)) for address in addresses]
    raw = np.frombuffer(b"".join(old), np.uint8).reshape(-1, 16)
    new = [value.tobytes() for value in mapping.map(raw)]
    for i, a in enumerate(old):
        for j, b in enumerate(old):
            shared, kept = _shared(a, b), _shared(new[i], new[j])
            # Within the last 64 bits of IPv6 nothing is told but equality.
            assert kept == shared if shared < 64 or a[:12] == b[:12] == new[i][:12] else kept >= 64
            assert (new[i] == new[j]) == (a == b)
    again = [value.tobytes() for value in Addresses(b"k" * 32).map(raw)]
    assert again == new


def _shared(a: bytes, b: bytes) -> int:
    difference = int.from_bytes(a, "big") ^ int.from_bytes(b, "big")
    return 128 - difference.bit_length()


@pytest.mark.parametrize("text", ["127.0.0.1", "::1", "::", "0.0.0.0", "127.3.2.1"])
def test_addresses_that_mean_the_same_everywhere_stay(text: str) -> None:
    assert Addresses().text(text) == text


def test_private_stays_private_and_global_global() -> None:
    mapping = Addresses()
    for text, start in (("10.1.2.3", "10."), ("192.168.9.9", "192.168."), ("fe80::1", "fe"),
                        ("169.254.1.1", "169.254.")):  # fmt: skip
        assert mapping.text(text).startswith(start)
        assert mapping.text(text) != text


def test_a_redacted_recording_tells_no_name_and_keeps_every_number(
    tmp_path: Path, file: Path, truth: list[Batch]
) -> None:
    out = tmp_path / "shown"
    run("merge", str(file), "--redact", "-o", str(out))
    raw = out.read_bytes()
    with ctrace.open(str(out)) as shown, ctrace.open(str(file)) as original:
        everything = repr([batch.names for batch in shown]) + repr(shown.header)
        for word in ("web1", "nginx", "resolver", "dns.service", "10.9.0.1", "fd00::1"):
            assert word not in everything
            assert word.encode() not in raw
        assert list(shown.rulesets()) == []
        for a, b in zip(original, shown, strict=True):
            for name in ("ts", "kind", "reason", "dport", "sport", "status", "netns"):
                assert (a.events[name] == b.events[name]).all()
            assert (a.events["src"] != b.events["src"]).any() or not len(a.events)
        before = review(original)
        after = review(shown)
    assert [c.inserts for c in before.final.culprits[:20]] == [
        c.inserts for c in after.final.culprits[:20]
    ]
    assert before.final.totals == after.final.totals
    with ctrace.open(str(file)) as original, pytest.raises(AttributeError):
        Redacted(original).columns  # type: ignore[attr-defined]  # noqa: B018


def test_what_could_not_be_seen_is_redacted_too(tmp_path: Path) -> None:
    """Some of its sentences name namespaces, and in a merged recording hosts."""
    blind = (
        "nothing in shop-db is seen: cannot enter",
        "web1: no events at all: shop-api",
        "which process opened a flow is not known",
    )
    header = replace(synthetic.header(), hooks=HookInfo("netlink", blind=blind, note="shop: x"))
    with Writer(str(tmp_path / "a"), header) as writer:
        writer.write(Batch.idle(101 * SECOND))
    with ctrace.open(str(tmp_path / "a")) as original:
        shown = Redacted(original).hooks
    assert shown.family == "netlink"
    assert blind[2] in shown.blind
    assert "2 more" in shown.blind[-1]
    assert not any(name in f"{shown}" for name in ("shop", "web1"))


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
