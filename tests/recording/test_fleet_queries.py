"""Ten hosts' Parquet files: the shipped queries on two engines, against sums made here."""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kit.synthetic import batches, header, traffic

import ctrace
from ctrace.record import Kind, Reason, address_text
from ctrace.recording.writer import Writer
from ctrace.view.export.files import to_parquet

ROOT = Path(__file__).parents[2]
QUERIES = ROOT / "ctrace" / "share" / "queries"
HOSTS = 10
pytestmark = pytest.mark.slow

Key = tuple[str, int]
Ask = Callable[[str], list[dict[str, Any]]]


class Truth:
    """Per source and port: hosts, entries, refused, table-seconds."""

    def __init__(self) -> None:
        self.hosts: dict[Key, set[str]] = defaultdict(set)
        self.entries: dict[Key, int] = defaultdict(int)
        self.refused: dict[Key, int] = defaultdict(int)
        self.seconds: dict[Key, float] = defaultdict(float)
        self.minutes: dict[tuple[str, int], Counter[int]] = defaultdict(Counter)
        """Host and minute of refusals, to ports."""

    def add(self, host: str, events: Any) -> None:
        born: dict[int, tuple[Key, int]] = {}
        for event in events:
            key = address_text(event["src"]), int(event["dport"])
            kind, ts, ct = Kind(int(event["kind"])), int(event["ts"]), int(event["ct"])
            if kind == Kind.INSERT:
                self.entries[key] += 1
                born[ct] = key, ts
            elif kind == Kind.DROP:
                self.refused[key] += 1
                minute = (ts + header().clock.offset) // (60 * 10**9)
                self.minutes[host, minute][key[1]] += 1
            elif ct in born:
                owner, since = born.pop(ct)
                self.seconds[owner] += (ts - since) / 1e9
            if kind in (Kind.INSERT, Kind.DROP):
                self.hosts[key].add(host)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    pytest.importorskip("pyarrow")
    folder, truth = tmp_path_factory.mktemp("fleet"), Truth()
    for number in range(1, HOSTS + 1):
        host = f"web{number}"
        events = traffic(1500, rate=2000, clients=200, seed=number)
        events["src"][:, 13:15] = 0  # the hosts share their clients
        drops = events[:: 20 * number].copy()
        drops["kind"], drops["reason"], drops["ct"] = Kind.DROP, Reason.TABLE_FULL, 0
        for part in (events, drops):
            truth.add(host, part)
        path = folder / f"{host}.data"
        with Writer(str(path), replace(header(), host=host)) as writer:
            for batch in batches(events):
                writer.write(batch)
            for batch in batches(drops):
                writer.write(replace(batch, until=batch.until + 10**12))
        # one folder a day and host, as the page says
        place = folder / f"day=2019-07-13/host={host}"
        place.mkdir(parents=True)
        with ctrace.open(str(path)) as recording, (place / "1.parquet").open("wb") as out:
            to_parquet(recording, out, lambda _: None)
    return folder, truth


@pytest.fixture(params=["duckdb", "clickhouse"])
def ask(
    request: pytest.FixtureRequest, fleet: tuple[Path, Truth], monkeypatch: pytest.MonkeyPatch
) -> Ask:
    """The query on an engine that sees the files as its shipped view does."""
    monkeypatch.chdir(fleet[0])
    view = (QUERIES / f"{request.param}.sql").read_text()
    return (duckdb if request.param == "duckdb" else clickhouse)(view)


def duckdb(view: str) -> Ask:
    engine = pytest.importorskip("duckdb").connect()
    engine.sql(view)

    def ask(query: str) -> list[dict[str, Any]]:
        relation = engine.sql(query)
        return [dict(zip(relation.columns, row)) for row in relation.fetchall()]

    return ask


def clickhouse(view: str) -> Ask:
    """Where PyPI's chdb is installed, which holds the engine."""
    session = pytest.importorskip("chdb.session").Session()
    session.query("DROP DATABASE IF EXISTS here")
    session.query("CREATE DATABASE here")
    session.query("USE here")
    session.query(view)

    def ask(query: str) -> list[dict[str, Any]]:
        text = str(session.query(query.rstrip("; \n"), "CSVWithNames"))
        return list(csv.DictReader(text.splitlines()))

    return ask


@pytest.mark.slow
def test_which_source_over_all_hosts(fleet: tuple[Path, Truth], ask: Ask) -> None:
    truth = fleet[1]
    rows = ask((QUERIES / "sources.sql").read_text())
    assert len(rows) == 20
    best = sorted(truth.seconds.values(), reverse=True)[:20]
    assert [float(row["table_seconds"]) for row in rows] == pytest.approx(best, rel=1e-5)
    for row in rows:
        key = row["src"], int(row["dport"])
        assert int(row["hosts"]) == len(truth.hosts[key])
        assert int(row["entries"]) == truth.entries[key]
        assert int(row["refused"]) == truth.refused[key]
        assert float(row["table_seconds"]) == pytest.approx(truth.seconds[key], rel=1e-5)
    assert max(int(row["hosts"]) for row in rows) > 1


def test_when_and_where_tables_refused(fleet: tuple[Path, Truth], ask: Ask) -> None:
    truth = fleet[1]
    rows = ask((QUERIES / "refused.sql").read_text())
    assert len(rows) == len(truth.minutes) >= HOSTS
    assert {row["host"] for row in rows} == {f"web{number}" for number in range(1, HOSTS + 1)}
    by_host: dict[str, list[Counter[int]]] = defaultdict(list)
    for (host, _), ports in sorted(truth.minutes.items()):
        by_host[host].append(ports)
    for row in rows:  # each host's minutes in order
        ports = by_host[row["host"]].pop(0)
        assert int(row["refused"]) == sum(ports.values())
        assert ports[int(row["dport"])] == max(ports.values())


def test_the_pages_query_does_what_it_says(fleet: tuple[Path, Truth], ask: Ask) -> None:
    truth = fleet[1]
    (query,) = re.findall(r"```sql\n(.*?)```", (ROOT / "docs" / "fleet.md").read_text(), re.S)
    rows = ask(query)
    for row in rows:
        key = row["src"], int(row["dport"])
        assert int(row["hosts"]) == len(truth.hosts[key])
        assert int(row["entries"]) == truth.entries[key]
        assert int(row["refused"]) == truth.refused[key]
    assert [int(row["entries"]) for row in rows] == sorted(truth.entries.values(), reverse=True)[
        :20
    ]
