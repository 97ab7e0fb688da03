"""What a scrape says: a snapshot's numbers, with labels that stay bounded."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from kit.running.scrapes import snapshot, values
from kit.synthetic import incident, write
from prometheus_client.openmetrics.parser import text_string_to_metric_families

import ctrace
from ctrace.change.condition import HOLDS, OFF, Condition
from ctrace.model import Model
from ctrace.model.snapshot import Cause, Counted, Culprit, Snapshot, Table, Victim
from ctrace.view.export.backfill import to_openmetrics
from ctrace.view.export.openmetrics import Exposition

SHARE = Path(__file__).parents[2] / "ctrace" / "share" / "prometheus"


def test_numbers_are_the_snapshots() -> None:
    got = values(Exposition().text(snapshot()))
    assert got["ctrace_table_entries", (("netns", "init"),)] == 900
    assert got["ctrace_table_seconds_to_full", (("netns", "init"),)] == 12.5
    assert got["ctrace_drops_total", (("netns", "init"),)] == 4
    ends = {
        dict(key[1])["reason"]: n for key, n in got.items() if key[0] == "ctrace_destroys_total"
    }
    assert ends == {"expired": 30, "evicted": 10, "deleted": 0, "other": 10}
    assert got["ctrace_victim_refused_per_second", (("service", "udp/53"),)] == 3.0
    assert got["ctrace_lost_events_total", ()] == 7
    assert got["ctrace_unseen_inserts_total", ()] == 3
    assert ("ctrace_table_pinned_ratio", (("netns", "init"),)) not in got  # unknown stays absent


@pytest.mark.slow
def test_an_export_has_the_families_and_values_of_a_scrape(tmp_path: Path) -> None:
    """Name by name: type, meaning, labels but the host's, and what was counted."""
    path = write(tmp_path / "a.data", incident())
    out = io.StringIO()
    with ctrace.open(str(path)) as recording:
        to_openmetrics(recording, out, lambda _: None)
    exported = {one.name: one for one in text_string_to_metric_families(out.getvalue())}
    with ctrace.open(str(path)) as recording:
        model = Model(recording.hooks, recording.clock, recording.started, host="web1")
        for batch in recording.batches():
            model.update(batch)
    text = Exposition().text(model.snapshot(group="service", sort="held", limit=50)).decode()
    scraped = {one.name: one for one in text_string_to_metric_families(text)}
    assert {
        "ctrace_table_entries", "ctrace_destroys", "ctrace_drops", "ctrace_cause_share_ratio"
    } <= exported.keys()  # fmt: skip
    for name, family in exported.items():
        same = scraped[name]
        if name == "ctrace_cause_share_ratio":  # other causes may have been told before
            end = max(one.timestamp for one in family.samples)
            family.samples = [one for one in family.samples if one.timestamp == end]
        assert (family.type, family.documentation) == (same.type, same.documentation), name
        last = {
            (one.name, *sorted((k, v) for k, v in one.labels.items() if k != "host")): one.value
            for one in family.samples
        }
        assert all(one.labels["host"] == "web1" for one in family.samples)
        live = {(one.name, *sorted(one.labels.items())): one.value for one in same.samples}
        # a gauge is as of its last reading, a scrape goes on from there by what was counted since
        assert last.keys() == live.keys() if family.type == "gauge" else last == live, name


def test_causes_are_told_by_namespace_and_kind() -> None:
    """What is wrong, and what is ordinary traffic; one sample for several services."""
    why = (
        Cause("no-keepalive", "one", share=0.5, netns=1, load=True),
        Cause("no-keepalive", "other", share=0.25, netns=1, load=True),
        Cause("clash", "races", netns=1),
        Cause("unknown", "nothing", share=1.0, netns=1),
    )
    got = values(Exposition().text(replace(snapshot(), why=why)))
    told = {key[1]: n for key, n in got.items() if key[0] == "ctrace_cause_share_ratio"}
    assert told == {
        (("cause", "no-keepalive"), ("kind", "load"), ("netns", "init")): 0.75,
        (("cause", "clash"), ("kind", "fault"), ("netns", "init")): 0.0,
    }


def test_addresses_leave_only_when_asked_for() -> None:
    assert b"192.0.2." not in Exposition().text(snapshot())
    assert b"192.0.2.9" in Exposition(addresses=True).text(snapshot())


def test_changes_that_share_a_label_are_one_series() -> None:
    """Prometheus refuses a whole scrape that has a series twice."""
    states = (HOLDS, HOLDS, OFF, HOLDS, OFF)
    changes = [Condition(n, f"n{n}", state, (), "") for n, state in enumerate(states)]
    text = Exposition(limit=1).text(snapshot(), changes).decode()
    lines = re.findall(r"^ctrace_change_holds\{.*", text, re.M)
    assert sorted(lines) == [
        'ctrace_change_holds{netns="other",state="holds"} 1.0',
        'ctrace_change_holds{netns="other",state="off"} 0.0',
    ]


def test_counters_of_tables_that_share_a_label_are_summed_and_never_fall() -> None:
    """A host may have more namespaces than labels: what any of them refused is counted."""

    def scraped(drops: dict[int, int]) -> dict[str, float]:
        tables = tuple(
            Table(n, f"pod{n}", 10 * n, 100, 64, totals=Counted(insert=9, drop=refused))
            for n, refused in drops.items()
        )
        got = values(exposition.text(replace(snapshot(), tables=tables)))
        return {dict(at)["netns"]: n for (name, at), n in got.items() if name == asked}

    exposition, asked = Exposition(limit=1), "ctrace_drops_total"
    assert scraped({1: 5, 2: 10, 3: 20}) == {"pod1": 5, "other": 30}
    assert scraped({1: 5, 2: 11, 3: 20}) == {"pod1": 5, "other": 31}
    assert scraped({1: 5, 2: 12}) == {"pod1": 5, "other": 32}  # one has gone
    assert scraped({1: 5, 2: 3, 4: 1}) == {"pod1": 5, "other": 36}  # one began anew, one came
    assert scraped({4: 1}) == {"other": 36}
    assert scraped({1: 1, 4: 1}) == {"pod1": 6, "other": 36}
    exposition, asked = Exposition(limit=1), "ctrace_table_entries"
    assert scraped({1: 0, 3: 0, 2: 0}) == {"pod1": 10, "other": 30}  # of the fullest


def test_label_values_are_bounded_for_ever() -> None:
    exposition = Exposition(limit=20)
    seen = set()
    for first in range(0, 3000, 100):
        shot = snapshot()
        shot = Snapshot(
            **{
                **shot.__dict__,
                "culprits": tuple(
                    Culprit(key=str(p), proto="tcp", port=p + 1, held=1)
                    for p in range(first, first + 100)
                ),
            }
        )
        got = values(exposition.text(shot))
        held = {k: v for k, v in got.items() if k[0] == "ctrace_culprit_entries"}
        assert sum(held.values()) == 100  # what loses its name is still counted
        seen |= set(held)
    assert len(seen) == 21


def test_a_host_never_has_more_series_than_the_page_says() -> None:
    """Thousands of services and namespaces come and go while Prometheus scrapes."""
    (told,) = re.findall(r"at most (\d+) series", (SHARE.parents[2] / "docs/fleet.md").read_text())
    exposition, seen = Exposition(), set()
    one = snapshot()
    for first in range(0, 3000, 100):
        names = range(first, first + 100)
        shot = replace(
            one,
            tables=tuple(replace(one.tables[0], name=f"pod{n}", pinned=0.5) for n in names),
            culprits=tuple(Culprit(key=str(n), proto="tcp", port=n + 1, held=1) for n in names),
            victims=tuple(
                Victim(str(n), "udp", "192.0.2.1", "192.0.2.2", n + 1, 1, drop_per_s=1.0)
                for n in names
            ),
            why=tuple(Cause(f"c{n}", "made", netns=1) for n in names),
        )
        seen |= set(values(exposition.text(shot)))
    assert len(seen) == int(told)
