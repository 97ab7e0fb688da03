"""Several hosts' Parquet files in DuckDB: the documented queries against sums made here."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kit.synthetic import batches, header, traffic

from ctrace.record import Kind, Reason, address_text
from ctrace.recording.writer import Writer

ROOT = Path(__file__).parents[2]
QUERY = ROOT / "ctrace" / "share" / "queries" / "sources.sql"

Key = tuple[str, int]


class Truth:
    """Per source and port: hosts, entries, refused, table-seconds."""

    def __init__(self) -> None:
        self.hosts: dict[Key, set[str]] = defaultdict(set)
        self.entries: dict[Key, int] = defaultdict(int)
        self.refused: dict[Key, int] = defaultdict(int)
        self.seconds: dict[Key, float] = defaultdict(float)

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
            elif ct in born:
                owner, since = born.pop(ct)
                self.seconds[owner] += (ts - since) / 1e9
            if kind in (Kind.INSERT, Kind.DROP):
                self.hosts[key].add(host)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    folder, truth = tmp_path_factory.mktemp("fleet"), Truth()
    for number, host in enumerate(("web1", "web2", "db1"), 1):
        events = traffic(4000, rate=2000, clients=400, seed=number)
        events["src"][:, 13:15] = 0  # the hosts share their clients
        drops = events[:: 50 * number].copy()
        drops["kind"], drops["reason"], drops["ct"] = Kind.DROP, Reason.TABLE_FULL, 0
        for part in (events, drops):
            truth.add(host, part)
        path = folder / f"{host}.data"
        with Writer(str(path), replace(header(), host=host)) as writer:
            for batch in batches(events):
                writer.write(batch)
            for batch in batches(drops):
                writer.write(replace(batch, until=batch.until + 10**12))
        subprocess.run(
            [sys.executable, "-m", "ctrace", "export", path, "-o", folder / f"{host}.parquet"],
            check=True, capture_output=True,
        )  # fmt: skip
    return folder, truth


def asked(folder: Path, query: str) -> list[dict[str, Any]]:
    duckdb = pytest.importorskip("duckdb")
    assert "'*.parquet'" in query
    relation = duckdb.sql(query.replace("'*.parquet'", f"'{folder}/*.parquet'").rstrip("; \n"))
    return [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]


def test_which_source_over_all_hosts(fleet: tuple[Path, Truth]) -> None:
    folder, truth = fleet
    rows = asked(folder, QUERY.read_text())
    assert len(rows) == 20
    best = sorted(truth.seconds.values(), reverse=True)[:20]
    assert [row["table_seconds"] for row in rows] == pytest.approx(best)
    for row in rows:
        key = row["src"], row["dport"]
        assert row["hosts"] == len(truth.hosts[key])
        assert row["entries"] == truth.entries[key]
        assert row["refused"] == truth.refused[key]
        assert row["table_seconds"] == pytest.approx(truth.seconds[key])
    assert max(row["hosts"] for row in rows) > 1


def test_the_pages_query_does_what_it_says(fleet: tuple[Path, Truth]) -> None:
    folder, truth = fleet
    (query,) = re.findall(r"```sql\n(.*?)```", (ROOT / "docs" / "fleet.md").read_text(), re.S)
    rows = asked(folder, query)
    for row in rows:
        key = row["src"], row["dport"]
        assert row["hosts"] == len(truth.hosts[key])
        assert row["entries"] == truth.entries[key]
        assert row["refused"] == truth.refused[key]
    assert [row["entries"] for row in rows] == sorted(truth.entries.values(), reverse=True)[:20]
