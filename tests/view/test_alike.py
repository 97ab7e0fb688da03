"""One figure wherever it stands: what every view says of the end of one recording."""

from __future__ import annotations

import json
import re
from html import unescape
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from kit import synthetic
from kit.loads.entries import Table
from kit.loads.packets import SETTINGS, closes_and_resets, leaks, one_way, talks

import ctrace
from ctrace.cli import cli
from ctrace.model.model import Model
from ctrace.model.snapshot import Snapshot
from ctrace.recording.writer import Writer
from ctrace.view import format as fmt
from ctrace.view.export.openmetrics import Exposition

WIDE = {"COLUMNS": "240", "LINES": "60"}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Closed, open, one-way and answered flows; the kernel has just collected the expired ones."""
    random = np.random.default_rng(1)
    packets = [one for load in (closes_and_resets, leaks, one_way, talks) for one in load(random)]
    table = Table(SETTINGS, 60, looks=60, seed=1)
    path = str(tmp_path_factory.mktemp("alike") / "a.ctrace")
    with Writer(path, synthetic.header(started=synthetic.SECOND)) as writer:
        for batch in table.run(packets):
            writer.write(batch)
    return path


@pytest.fixture(scope="module")
def end(file: str) -> Snapshot:
    """What the model says at its end."""
    with ctrace.open(file) as recording:
        model = Model(recording.hooks, recording.clock, recording.started)
        for batch in recording.batches():
            model.update(batch)
    return model.snapshot(group="service")


def run(*arguments: str) -> str:
    done = CliRunner().invoke(cli, arguments, env=WIDE)
    assert done.exit_code == 0, done.output
    return done.stdout


def rows(text: str) -> dict[str, list[str]]:
    """Cells of the lines that begin with a service, by the service."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        cells = re.split(r"\s{2,}|\|+", line.strip(" |"))
        if re.fullmatch(r"(tcp|udp)/\d+", cells[0]):
            found.setdefault(cells[0], cells)
    return found


def plain(html: str) -> str:
    """A page's words, one table row a line."""
    text = re.sub(r"<(script|style).*?</\1>", "", html, flags=re.DOTALL)
    return unescape(re.sub(r"<[^>]+>", "|", re.sub(r"\s*</tr>\s*", "\n", text)))


@pytest.mark.slow
def test_json_of_replay_and_report_is_the_snapshot(file: str, end: Snapshot) -> None:
    (table,) = end.tables
    for verb in (("replay", "--once"), ("report",)):
        told: dict[str, Any] = json.loads(
            run(*verb, file, "--group", "service", "--format", "json")
        )
        assert told["tables"][0]["count"] == table.count
        assert told["totals"]["insert"] == end.totals.insert
        assert told["held_total"] == end.held_total
        of = {one["key"]: one for one in told["culprits"]}
        for c in end.culprits:
            assert of[c.key]["held"] == c.held
            assert of[c.key]["inserts"] == c.inserts
            for name, value in (
                ("life_p50_s", c.life.p50),
                ("residence_p50_s", c.residence.p50),
                ("residence_at_least_s", c.residence.at_least),
                ("closed", c.closed),
                ("new_per_s", c.new_per_s),
            ):
                known = None if value is None else pytest.approx(value, abs=1e-6)
                assert of[c.key][name] == known, (verb, c.key, name)


@pytest.mark.parametrize("verb", [("report",), ("replay", "--once"), ("advise",)])
def test_lines_of_a_file_end_with_their_text(file: str, verb: tuple[str, ...]) -> None:
    lines = run(*verb, file).splitlines()
    assert len(lines) > 5
    assert [line for line in lines if line != line.rstrip()] == []


def test_the_screen_has_the_same_rows_and_sentences(file: str, end: Snapshot) -> None:
    text = run("replay", "--once", file, "--group", "service")
    (table,) = end.tables
    assert f"{fmt.count(table.count)} of {fmt.count(table.max)}" in text
    shown = rows(text)
    for c in end.culprits:
        cells = {fmt.count(c.held), fmt.share(c.share), fmt.stays(c.residence)}
        cells |= {fmt.duration(c.life.p50), fmt.count(c.inserts)}
        assert cells <= set(shown[c.key]), shown[c.key]
    for cause in end.why[:2]:
        assert fmt.prose(cause.text).split(" are ")[0] in text


@pytest.mark.slow
def test_text_page_and_markdown_say_the_same(file: str, end: Snapshot) -> None:
    texts = [
        run("report", file, "--group", "service", "--format", format)
        for format in ("text", "html", "markdown")
    ]
    (table,) = end.tables
    for text in (texts[0], plain(texts[1])):
        shown = rows(text)
        for c in end.culprits:
            cells = {fmt.count(c.inserts), fmt.stays(c.residence), fmt.duration(c.life.p50)}
            assert cells <= set(shown[c.key]), shown[c.key]
        assert re.search(rf"{table.name}\W+{fmt.count(table.count)}\W+{fmt.count(table.max)}", text)
    held = f"{table.name} {fmt.count(table.count)} of {fmt.count(table.max)}"
    assert " ".join(held.split()) in " ".join(texts[2].split())
    said = {
        re.findall(r"\d+ % of [\d ]+ entries are \w+", " ".join(one.replace("\\", "").split()))[0]
        for one in (texts[0], plain(texts[1]), texts[2])
    }
    assert len(said) == 1, said


def test_advice_frees_what_the_rows_hold(file: str, end: Snapshot) -> None:
    told = json.loads(run("advise", file, "--format", "json"))
    (table,) = end.tables
    assert told["tables"][0]["count"] == table.count
    held = {c.key: c.held for c in end.culprits}
    for one in told["candidates"]:
        service = "{proto}/{port}".format(**one["service"])
        open_ones = one["frees"] == 0
        assert open_ones or one["frees"] == held[service]
        assert one["share"] == pytest.approx(held[service] / table.count, abs=0.001)


def test_metrics_and_their_history_are_the_same_counts(file: str, end: Snapshot) -> None:
    (table,) = end.tables
    text = Exposition().text(end).decode()
    past = run("export", file, "--format", "openmetrics")

    def last(of: str, name: str) -> dict[str, float]:
        found = re.findall(rf"^{name}{{([^}}]*)}} (\S+)", of, re.MULTILINE)
        return {labels: float(value) for labels, value in found}

    assert list(last(text, "ctrace_table_entries").values()) == [table.count]
    assert last(text, "ctrace_culprit_entries") == {
        f'service="{c.key}"': float(c.held) for c in end.culprits
    }
    (entries,) = re.findall(r"^ctrace_table_entries\S* (\d+) \S+$", past, re.MULTILINE)[-1:]
    assert int(entries) == table.count
