"""Reports, exports, merging and redaction over a recording."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import synthetic
from kit.command import run
from kit.examples import examples
from kit.synthetic import incident, write

import ctrace
from ctrace.batch import Batch, HookInfo, Names, Owner
from ctrace.record import Kind, Reason, address_bytes, address_text
from ctrace.recording.redact import Addresses, Redacted
from ctrace.recording.review import review
from ctrace.recording.writer import Writer

pytestmark = pytest.mark.slow
SECOND = synthetic.SECOND
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202egnp"


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
