"""The report for people: one page on any screen and on paper, Markdown, and text."""

from __future__ import annotations

import base64
import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import shapes, synthetic
from kit.browser import CHROMIUM, Browser
from kit.synthetic import incident, write
from rich.cells import cell_len
from rich.console import Console

import ctrace
from ctrace.batch import Batch, Names, Netns, TableReading
from ctrace.dumps.opened import open_any
from ctrace.record import Kind
from ctrace.recording.review import Review, review
from ctrace.view import format as fmt
from ctrace.view.report import charts, svg
from ctrace.view.report.html import report_html
from ctrace.view.report.markdown import report_markdown
from ctrace.view.report.story import grouping, headline, story
from ctrace.view.report.text import WIDTH, report_text, telling
from ctrace.view.verdict import verdict

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>|`[x](y)\x1b[31m"
SIZES = {"desktop": (1280, 900, False), "phone": (390, 844, True), "small phone": (320, 640, True)}
TOO_WIDE = """
[...document.querySelectorAll("main *")].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && box.right > innerWidth + 1 && !e.closest(".wide, .plot, details:not([open])");
}).map(e => e.outerHTML.slice(0, 200))
"""
TOO_SMALL = """
[...document.querySelectorAll("main *")].filter(e => e.offsetParent && [...e.childNodes].some(
  n => n.nodeType === 3 && n.textContent.trim())).filter(
  e => parseFloat(getComputedStyle(e).fontSize) < 11.5).map(e => e.outerHTML.slice(0, 200))
"""
OVER_ONE_ANOTHER = """
[...document.querySelectorAll(".plot")].flatMap(plot => ["x", "y", "m"].flatMap(kind => {
  const boxes = [...plot.querySelectorAll("span." + kind)].filter(e => e.offsetParent)
    .map(e => e.getBoundingClientRect());
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1
  ).map(b => kind + " " + Math.round(a.left) + " " + Math.round(b.left)));
}))
"""


@pytest.fixture(scope="module")
def truth() -> list[Batch]:
    return list(incident())


@pytest.fixture(scope="module", params=["plain", pytest.param("evil", marks=pytest.mark.slow)])
def found(
    request: pytest.FixtureRequest, truth: list[Batch], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Review]:
    """The incident beside fifty namespaces that hold nothing; once with evil names."""
    first, *rest = truth
    evil = request.param == "evil"
    idle = {4026540000 + i: Netns(4026540000 + i, f"idle42{i}") for i in range(50)}
    unused = tuple(TableReading(inum, 0, 65536, 16384) for inum in idle)
    owners = first.names.owners
    if evil:
        owners = {key: replace(owner, comm=EVIL, unit=EVIL) for key, owner in owners.items()}
    names = Names({**idle, **first.names.netns}, owners)
    path = tmp_path_factory.mktemp("page") / "a.data"
    host = "web1" + EVIL if evil else "web1"
    whole = [replace(first, names=names, tables=(*first.tables, *unused)), *rest]
    with ctrace.open(str(write(path, whole, host=host))) as recording:
        yield review(recording)


@pytest.fixture(scope="module")
def page(found: Review, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("html") / "a.html"
    path.write_text(report_html(found), encoding="utf-8")
    return path


@pytest.fixture
def browser(page: Path, tmp_path: Path) -> Iterator[Browser]:
    with Browser(page, tmp_path / "profile") as opened:
        opened.until("document.readyState === 'complete' && !!document.querySelector('main')")
        yield opened


@pytest.mark.slow
@needs_browser
def test_the_page_runs_loads_and_complains_of_nothing(page: Path, browser: Browser) -> None:
    assert page.stat().st_size < 300 << 10
    assert browser.value("document.querySelectorAll('script, img, link, [src]').length") == 0
    assert browser.value("document.querySelectorAll('[href]').length") == 0
    asked = [one["request"]["url"] for one in browser.said("Network.requestWillBeSent")]
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    for what in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
        assert browser.said(what) == []


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("size", SIZES)
def test_it_is_legible_at_every_size(browser: Browser, size: str) -> None:
    width, height, mobile = SIZES[size]
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                 deviceScaleFactor=1, mobile=mobile)  # fmt: skip
    browser.until(f"innerWidth === {width}")
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    assert browser.value(TOO_WIDE) == []
    assert browser.value(TOO_SMALL) == []
    assert browser.value(OVER_ONE_ANOTHER) == []


@pytest.mark.slow
@needs_browser
def test_on_paper_it_takes_at_most_four_pages(browser: Browser, tmp_path: Path) -> None:
    made = browser.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
    pdf = base64.b64decode(made["data"])
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 4
    boxes = set(re.findall(rb"/MediaBox\s*\[([^\]]+)\]", pdf))
    for box in boxes:
        *_, wide, high = map(float, box.split())
        assert (round(wide / 72 * 25.4), round(high / 72 * 25.4)) == (210, 297)


@pytest.mark.slow
@needs_browser
def test_every_chart_has_lines_names_and_units(browser: Browser) -> None:
    charts = browser.value(
        """[...document.querySelectorAll("figure")].map(f => ({
          title: f.querySelector("figcaption").textContent,
          axis: f.querySelector(".axis").textContent,
          drawn: f.querySelectorAll(".plot polyline, .plot polygon").length,
          ys: f.querySelectorAll(".plot .y").length, xs: f.querySelectorAll(".plot .x").length,
          keys: [...f.querySelectorAll(".legend li svg *")].map(
            e => (e.getAttribute("stroke") || e.getAttribute("fill")) +
                 e.getAttribute("stroke-dasharray")),
          marks: [...f.querySelectorAll(".plot .m")].map(e => e.textContent).join("")}))"""
    )
    assert len(charts) == 5
    letters = browser.value(
        "[...document.querySelectorAll('.story .letter')].map(e => e.textContent).join('')"
    )
    for chart in charts:
        assert re.search(r"[Ss]hare|per second|by ", chart["title"]), chart
        assert re.search(r"time", chart["axis"]), chart
        assert chart["drawn"] == len(chart["keys"]) > 0, chart
        assert len(set(chart["keys"])) == len(chart["keys"]), "two keys that look alike"
        assert chart["ys"] >= 3, chart
        assert chart["xs"] >= 2, chart
        if "UTC" in chart["axis"]:
            assert chart["marks"] == letters, chart
    shown = browser.value("document.body.textContent")
    assert "idle42" not in shown, "a namespace that held nothing"


def test_the_story_is_what_was_recorded(found: Review, truth: list[Batch]) -> None:
    drops = [batch for batch in truth if (batch.events["kind"] == Kind.DROP).any()]
    clock = synthetic.header().clock
    told = story(found)
    assert [one.ts for one in told] == sorted(one.ts for one in told)
    first = next(one for one in told if one.text.startswith("first refusal"))
    assert first.ts == clock.utc(drops[0].until) / 1e9
    events = np.concatenate([batch.events for batch in truth])
    owned = events[(events["kind"] == Kind.DROP) & (events["owner"] != 0)]
    complaint = next(one for one in told if "gets EPERM" in one.text)
    assert complaint.ts == clock.utc(int(owned["ts"][0])) / 1e9
    last = next(one for one in told if one.text.startswith("last refusal"))
    assert "200 packets in all" in last.text
    assert drops[-1].until <= last.ts * 1e9 - clock.offset + 1
    assert headline(found).text.startswith("200 packets refused from ")
    fullest = next(one for one in told if one.text.startswith("fullest"))
    most = max(
        reading.count / reading.max for batch in truth for reading in batch.tables if reading.max
    )
    assert fmt.share(most) in fullest.text


@pytest.mark.slow
def test_what_was_there_before_the_first_reading_did_not_rise_and_the_end_is_not_empty(
    truth: list[Batch], tmp_path: Path
) -> None:
    """A recording begins before all that is there is read, and ends between two readings."""
    path, n = tmp_path / "edges.data", len(truth) // 4
    fills = [max((one.count / one.max for one in b.tables), default=0.0) for b in truth]
    until = fills.index(max(fills)) + 2
    unread = [replace(one, tables=()) for one in truth]
    write(path, [*unread[:n], *truth[n : until - 1], unread[until - 1]])
    with ctrace.open(str(path)) as recording:
        told = story(review(recording))
    read = synthetic.header().clock.utc(truth[n].until) / 1e9
    assert all(one.ts >= read for one in told if "rises from" in one.text)
    words, _, fill = told[-1].text.removesuffix(" %").rpartition(" ")
    assert words == "the recording ends, the fullest table at"
    assert float(fill) / 100 == pytest.approx(max(fills), rel=0.05)  # some went since


@pytest.mark.slow
def test_a_table_that_is_first_read_when_its_holders_have_passed_their_most(
    found: Review, truth: list[Batch], tmp_path: Path
) -> None:
    """The story tells no rise before the reading, though the most was held then."""
    path, shares = tmp_path / "late.data", grouping(found)[1].stacked()
    most = max(series.index(max(series)) for series in shares.values())
    n = most * len(truth) // len(next(iter(shares.values()))) + 2
    assert n < len(truth), "the holders are at their most in the end"
    write(path, [*[replace(one, tables=()) for one in truth[:n]], *truth[n:]])
    with ctrace.open(str(path)) as recording:
        told = story(review(recording))
    read = synthetic.header().clock.utc(truth[n].until) / 1e9
    assert all(one.ts >= read for one in told if "rises from" in one.text)
    assert "the recording ends" in told[-1].text


@pytest.mark.parametrize(("failures", "word"), [(0, "HEALTHY"), (3, "HEALTHY"), (300, "LOSING")])
def test_inserts_that_failed_are_not_passed_over(tmp_path: Path, failures: int, word: str) -> None:
    """Source ports used up, or chains too long: the table has room, and nothing is refused."""
    load = shapes.Trace()
    load.flows(shapes.steady(100, 20, load.rng), 0.01, 5)
    load.failures(np.linspace(8.5, 12.4, failures))
    path = tmp_path / "failed.data"
    write(path, load.batches(20))
    with ctrace.open(str(path)) as recording:
        found = review(recording)
    told = str(headline(found))
    assert told.startswith(word), told
    assert (f"{failures} inserts failed" in told) == bool(failures)
    moments = [one for one in story(found) if "insert that failed" in one.text]
    first = synthetic.header().clock.utc(shapes.START + 9 * shapes.SECOND) / 1e9
    assert [one.ts for one in moments] == ([first] if failures else [])
    assert str(verdict(found.final)).count("failed") == bool(failures)


def test_the_cause_told_is_that_of_what_went_wrong_not_of_the_peak(tmp_path: Path) -> None:
    """The table is fullest with a load that hurts nobody; later, at less, inserts fail."""
    load = shapes.Trace()
    load.flows(shapes.steady(1000, 10, load.rng), 0.01, 5)
    load.flows(shapes.steady(50, 20, load.rng), 0.01, 5)
    load.walks(30)
    load.failures(np.linspace(25, 29, 300), dport=53, proto=17)
    path = write(tmp_path / "later.data", load.batches(30))
    with ctrace.open(str(path)) as recording:
        found = review(recording)
    assert found.peak is not None
    assert found.peak.why[0].id not in ("unknown", "clash")
    assert telling(found).why[0].id == "clash"
    assert "lost a race" in report_markdown(found)


@pytest.mark.parametrize("limit", [10, 1000])
def test_text_is_no_wider_than_100_columns_and_names_no_idle_namespace(
    found: Review, limit: int
) -> None:
    console = Console(width=WIDTH, highlight=False, markup=False, file=io.StringIO(), record=True)
    console.print(report_text(found, limit))
    text = console.export_text()
    assert max(map(cell_len, text.splitlines())) <= 100
    assert "idle42" not in text
    assert "50 held nothing" in text


def test_markdown_is_25_lines_that_any_reader_takes_as_they_are(found: Review) -> None:
    text = report_markdown(found)
    lines = text.splitlines()
    assert 8 <= len(lines) <= 25
    assert max(map(cell_len, lines)) <= 100
    assert any(line.startswith("- **Held:** ") for line in lines), "what counts has room"
    assert any(line.startswith("| tcp ") for line in lines)
    assert lines[0].startswith("## Connection tracking on web1")
    assert re.match(r"\*\*[A-Z]+\*\* ", lines[2])
    assert any("first refusal" in line for line in lines)
    assert "<" not in text, "HTML is let through by many readers"
    assert not re.search(r"(?<!\\)\[", text), "a name made a link"
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")}
    assert len(widths) <= 1, "a name added a column"


def test_a_page_made_of_a_dump_has_no_empty_section(tmp_path: Path) -> None:
    dump = tmp_path / "dump.txt"
    dump.write_text(
        "".join(
            f"ipv4 2 tcp 6 {i % 100 + 1} TIME_WAIT src=10.1.0.1 dst=10.0.0.5 sport={20000 + i} "
            f"dport=443 src=10.0.0.5 dst=10.1.0.1 sport=443 dport={20000 + i} [ASSURED] use=1\n"
            for i in range(50)
        ),
        encoding="utf-8",
    )
    with contextlib.closing(open_any([str(dump)])) as recording:
        found = review(recording)
    page = report_html(found)
    assert re.findall(r"<section>(?:<h2>[^<]*</h2>)?</section>", page) == []
    assert re.findall(r"<(table|dl|ul)[^>]*></\1>", page) == []
    assert "tcp/443" in page


def test_times_tell_their_day_where_a_recording_is_of_several(found: Review) -> None:
    """Two weeks had been told as a part of one day."""
    assert found.first_drop is not None
    day = datetime.fromtimestamp(found.first_drop, timezone.utc)
    weeks = replace(found, start=found.start - 13 * 86400)
    begun = day - timedelta(days=13)
    for told in (report_markdown(weeks), _as_text(weeks)):
        assert f"{begun:%Y-%m-%d} " in told.splitlines()[0]
        assert f" to {day:%Y-%m-%d} " in told.replace("\n", " ")[:200]
        assert f"refused from {day:%m-%d %H:%M:%S} to {day:%m-%d} " in told
    assert all(one.time.startswith(f"{day:%m-%d} ") for one in story(weeks))
    assert all(re.fullmatch(r"[\d:]{8}", one.time) for one in story(found))


def _as_text(found: Review) -> str:
    out = io.StringIO()
    Console(file=out, width=WIDTH).print(report_text(found))
    return out.getvalue()


@given(st.floats(1e-5, 1.0))
def test_rates_below_one_a_second_are_told_apart_at_an_axis(most: float) -> None:
    _, ticks = svg._scale(most)
    told = [charts._rate(value) for value in ticks]
    assert len(set(told)) == len(told)


@given(st.floats(1e-5, 1.0))
def test_shares_at_an_axis_are_where_they_stand(most: float) -> None:
    top, ticks = svg._scale(most)
    assert top == ticks[-1]
    for value in ticks:
        number, unit = charts._tick(value).split()
        assert unit == "%"
        assert float(number) == pytest.approx(100 * value, rel=1e-5)
