"""The JSON of a snapshot: what it holds, and that its documentation holds the same."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import samples
from kit.loads import snapshots

from ctrace.batch import Logged, Moment
from ctrace.model.snapshot import Composition, Rising, Snapshot, Tuple5
from ctrace.view.export.json import snapshot_json, status_names, utc

DOC = Path(__file__).parents[2] / "ctrace" / "share" / "snapshot.md"
MAPS = ("top", "states", "ended_states", "zones")
"""Objects whose keys are data."""
SAME = {
    "tables[].totals.*",
    "tables[].rates_per_s.*",
    "culprits[].composition.*",
    "culprits[].residence_histogram.*",
    "victims[].owner.*",
    "who_refused[].*",
    "culprits[].samples[].*",
}
"""Documented by reference."""
SNAPSHOTS = [
    samples.incident(),
    samples.filling(),
    samples.calm(),
    samples.netlink(),
    snapshots.namespaces(),
    snapshots.hostile(),
    Snapshot(0, "", 1.0, 0.0, samples.NETFILTER, "pair", "held"),
]


def paths(value: Any, at: str = "") -> Iterator[str]:
    """Every leaf of a JSON value, as the documentation writes it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            step = "*" if at.rpartition(".")[2] in MAPS else name
            yield from paths(inner, f"{at}.{step}" if at else step)
    elif isinstance(value, (list, tuple)):
        if not value:
            yield f"{at}[]"
        for inner in value:
            yield from paths(inner, f"{at}[]")
    else:
        yield at


def documented() -> set[str]:
    return set(re.findall(r"^\| `([^`]+)` \|", DOC.read_text(), re.M))


def whole() -> Snapshot:
    """A snapshot in which every optional thing is there."""
    full = samples.incident()
    flow = Tuple5("tcp", "10.0.0.1", "10.0.0.2", 1, 2, "10.0.0.2", "10.0.0.1", 2, 1, 6, "CLOSE")
    made_of = Composition(
        400, 0.9, 0.03, 0.0, 0.01, 1.0, 0.01, (("CLOSE", 400),), (("7", 380), ("0", 20))
    )
    full = replace(
        full,
        logged=Logged(3, 1370, Moment(boot=5000.7), Moment(1563966125.0), (4026532999,)),
        tables=tuple(replace(one, composition=made_of) for one in full.tables),
        culprits=tuple(
            replace(one, composition=made_of, ended_states=(("TIME_WAIT", 1),))
            for one in full.culprits
        ),
    )
    first = next(cause for cause in full.why if cause.remedies)
    rising = replace(first.remedies[0], rising=Rising((1.0, 2.0), (60.0, 120.0)))
    why = (*full.why, replace(first, remedies=(rising,)))
    victims = tuple(replace(one, sample=flow) for one in full.victims)
    return replace(full, victims=victims, why=why)


def test_every_field_is_documented_and_every_documented_field_is_there() -> None:
    def by_reference(path: str) -> bool:
        return any(path.startswith(prefix[:-1]) for prefix in SAME)

    found = {path for path in paths(snapshot_json(whole())) if not by_reference(path)}
    assert found - {
        "culprits[].owner",
        "victims[].owner",
        "culprits[].samples[]",
    } == documented() - SAME - {"logged"}


def test_the_page_is_made_of_what_the_fields_say() -> None:
    script = Path(__file__).parents[2] / "scripts" / "snapshot-page"
    made = runpy.run_path(str(script))
    assert DOC.read_text() == made["page"](), "run scripts/snapshot-page"


@pytest.mark.parametrize("snapshot", SNAPSHOTS)
def test_it_is_json_and_shows_what_the_snapshot_holds(snapshot: Snapshot) -> None:
    shown = json.loads(json.dumps(snapshot_json(snapshot), allow_nan=False))
    assert shown["totals"]["drop"] == snapshot.totals.drop
    assert [one["key"] for one in shown["culprits"]] == [one.key for one in snapshot.culprits]
    assert [one["count"] for one in shown["tables"]] == [one.count for one in snapshot.tables]
    assert shown["self"]["rss"] == snapshot.cost.rss
    assert shown["hooks"]["family"] == snapshot.hooks.family


def test_what_is_unknown_is_null() -> None:
    shown = snapshot_json(samples.incident())
    assert shown["culprits"][1]["residence_p50_s"] is None
    assert shown["culprits"][1]["owner"] is None
    assert shown["tables"][0]["seconds_to_full"] is None


@given(st.floats())
def test_no_number_is_infinite_or_none_at_all(value: float) -> None:
    full = samples.calm()
    odd = replace(full, interval_s=value, tables=(replace(full.tables[0], pinned=value),))
    json.dumps(snapshot_json(odd), allow_nan=False)


@given(st.integers(0, 2**62))
def test_time_keeps_every_nanosecond(ns: int) -> None:
    text = utc(ns)
    assert int(text[-10:-1]) == ns % 10**9
    assert text.endswith("Z")


def test_status_bits_carry_conntracks_names() -> None:
    assert status_names(0x0E) == ["SEEN_REPLY", "ASSURED", "CONFIRMED"]
    assert status_names(0) == []
