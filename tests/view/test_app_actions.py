# ruff: noqa: ARG002
"""The live screen, driven by keys: advice, recordings, replays, and what each key answers."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from kit import samples
from kit.feeds import FixedFeed, RecordingFeed, TravelFeed
from kit.loads import snapshots
from kit.running.screen import Advice, appears, drive, shown
from textual.pilot import Pilot

from ctrace.errors import CtraceError
from ctrace.model import remedies
from ctrace.model import snapshot as model
from ctrace.model.snapshot import Cause, Snapshot
from ctrace.view.screen.advice import AdvicePane, Remedy
from ctrace.view.screen.app import TopApp
from ctrace.view.screen.keys import KEYS
from ctrace.view.screen.tables import culprit_columns, namespace_columns, victim_columns


def test_advice_is_shown_and_applied_only_when_typed() -> None:
    adviser = Advice()

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("p")
        assert not app._prompt.display
        await pilot.press("a")
        await appears(app, pilot, "advice for node-17")
        assert "counter notrack" not in shown(app)
        assert "x shows the rules" in shown(app)
        unsafe = next(one for one in app.painted.lines if "tcp/8063 unsafe" in one.plain)
        assert any(span.style == app.palette.bad for span in unsafe.spans)
        await pilot.press("x")
        assert "counter notrack" in shown(app)  # a rule longer than the screen stands whole
        await pilot.press("p", "enter")
        await pilot.press("p", *"yes", "enter")
        await pilot.press("p", "escape")
        assert adviser.done == []
        assert "nothing was changed" in shown(app)
        assert "NOTRACK" in first_remedy(app)
        await pilot.press("p", *"apply", "enter")
        await appears(app, pilot, "in place")
        assert adviser.done == ["apply"]
        await pilot.press("pagedown", "end", "home", "a")
        assert app.state.mode == "top"
        assert "on trial" in shown(app)  # on every page: it may revert unseen otherwise
        assert "it is untracked now" in first_remedy(app)  # not what is in place already
        await pilot.press("p")
        assert app._prompt.display
        await pilot.press("escape")

    drive(keys, advice=AdvicePane(adviser))


def first_remedy(app: TopApp) -> str:
    assert app.snapshot is not None
    return app.advice.amended(app.snapshot).why[0].remedy


def test_advice_that_fails_is_a_line_not_a_crash() -> None:
    class Failing(Advice):
        def advise(self, snapshot: Snapshot, stop: threading.Event) -> str:
            raise CtraceError("the ruleset cannot be read: install nftables")

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("a")
        await appears(app, pilot, "the ruleset cannot be read")
        await pilot.press("p")
        assert "no advice yet" in shown(app)

    drive(keys, advice=AdvicePane(Failing()))


def test_recording_starts_and_ends() -> None:
    feed = RecordingFeed([samples.incident()])

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("r")
        assert "record from here to the file" in shown(app)
        await pilot.press("enter")
        assert "record from here" not in shown(app)
        assert feed.recording == "ctrace.data"
        assert "recording" in shown(app)
        await pilot.press("r")
        assert feed.recording == ""
        assert "recorded to ctrace.data; ctrace report ctrace.data" in shown(app)

    drive(keys, feed)


def test_a_replay_travels() -> None:
    feed = TravelFeed([snapshots.churning(5, tick) for tick in range(10)])

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("t", "t", "t")
        assert feed.at == 3
        await pilot.press("T")
        assert feed.at == 2
        await pilot.press("left_square_bracket")
        assert "no drops before this" in shown(app)
        await pilot.press("j", *"50%", "enter")
        assert feed.at in (4, 5)
        await pilot.press("j", *"+3", "enter", "j", *"nonsense", "enter")
        assert "is not a time" in shown(app)
        await pilot.press("plus", "plus", "minus")
        assert feed.speed == 2.0
        await pilot.press("left_square_bracket", "space", "home")
        assert feed.at == 2
        await appears(app, pilot, "10:03:07")
        assert "paused" in shown(app) or not feed.paused
        await pilot.click(offset=(60, 38))
        assert feed.at in (4, 5)

    drive(keys, feed)


@pytest.mark.parametrize("key", ["p", "y", "enter", "t", "j", "right_square_bracket"])
def test_a_key_that_has_nothing_to_do_says_why(key: str) -> None:
    calm = replace(samples.calm(), culprits=(), victims=())

    async def act(app: TopApp, pilot: Pilot[None]) -> None:
        before = shown(app).splitlines()
        await pilot.press(key)
        assert app._message[0]
        assert shown(app).splitlines()[-1] != before[-1]

    drive(act, FixedFeed([calm]))


def test_a_live_screen_does_not_travel() -> None:
    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("t", "T", "j", "right_square_bracket", "plus")
        assert "only a replay can travel in time" in shown(app)

    drive(keys)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("escape", "this is the first screen: q quits"),
        ("up", "this is the first row"),
        ("end", "this is the last row"),
        ("home", "this is the first row"),
        ("z", "z does nothing here: ? lists the keys"),
        ("f5", "f5 does nothing here: ? lists the keys"),
    ],
)
def test_a_key_at_the_edge_says_so(key: str, said: str) -> None:
    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press(key)
        await pilot.press(key)
        assert said in shown(app)

    drive(keys)


def test_an_answer_does_not_outlive_the_next_key() -> None:
    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("x")
        assert "nothing to unfold here" in shown(app)
        await pilot.press("n")
        assert "nothing to unfold" not in shown(app)
        assert "q quit" in shown(app)
        await pilot.press("x", "space")  # changes no page
        assert "nothing to unfold" not in shown(app)

    drive(keys)


def test_a_key_that_changes_nothing_here_says_so() -> None:
    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("ctrl+l")
        assert "no filter to clear" in shown(app)
        await pilot.press("question_mark", "enter")
        assert "no row to open here: Esc leads back" in shown(app)
        await pilot.press("s")
        assert "only culprits can be sorted" in shown(app)
        await pilot.press("escape", "5")
        columns = {spot.value for spot in app.painted.spots if spot.action == "sort"}
        assert ("sorted by drops per second" in shown(app)) == ("drops" not in columns)

    drive(keys, size=(60, 24))


def test_help_leads_back_to_the_page_where_it_was_asked_for() -> None:
    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        for page, key in (("advice", "a"), ("detail", "enter"), ("victims", "v")):
            await pilot.press(key, "question_mark")
            assert app.state.mode == "help"
            await pilot.press("escape")
            assert app.state.mode == page
            await pilot.press("escape")
            assert app.state.mode == "top"

    drive(keys, advice=AdvicePane(Advice()))


def test_help_names_every_key_and_every_key_does_something() -> None:
    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("question_mark")
        text = shown(app)
        for key in KEYS:
            assert hasattr(app, f"action_{key.action}"), key
            if not key.travel:
                assert key.names in text, key
        words = text.partition("WORDS")[2]
        for columns in (culprit_columns("pair", True), victim_columns(True), namespace_columns()):
            for name, head in [(one.name, one.head) for one in columns]:
                assert name == "key" or head in words, head

    drive(keys, size=(120, 70))


def test_what_is_on_trial_is_told_with_a_cause_of_several_services() -> None:
    """A process holds more than the service that is untracked: its other help stays."""
    adviser: Any = SimpleNamespace(untracked=frozenset({(1, "tcp", 8063)}))
    help_ = (model.Remedy("keep-alive", "keep connections alive"),)
    why = tuple(
        Cause("no-keepalive", "", proto=proto, port=port, netns=netns, remedies=help_)
        for proto, port, netns in (("tcp", None, 1), ("tcp", 8063, 1), ("udp", None, 1),
                                   ("tcp", None, 2))
    )  # fmt: skip
    shown = AdvicePane(adviser).amended(replace(samples.incident(), why=why)).why
    texts = [[one.text.split(" untracked now")[0] for one in cause.remedies] for cause in shown]
    keep = "keep connections alive"
    assert texts == [["tcp/8063 is", keep], ["it is"], [keep], [keep]]


@pytest.mark.parametrize(("good", "helps"), [(True, ["notrack", "change"]), (False, ["change"])])
def test_what_advice_refuses_helps_no_more(good: bool, helps: list[str]) -> None:
    """Before it was judged it is a condition, in the same sentence."""
    judged = {(1, "tcp", 8063): Remedy("", good=good)}
    adviser: Any = SimpleNamespace(
        untracked=frozenset(), about=lambda _, proto, port, netns: judged.get((netns, proto, port))
    )
    both = (remedies.notrack(samples.incident().culprits[0]), model.Remedy("change", "call less"))
    assert "if advise calls it safe" in both[0].text
    why = tuple(
        Cause("no-keepalive", "", proto="tcp", port=port, netns=1, remedies=both)
        for port in (8063, 8064)
    )
    pane, before = AdvicePane(adviser), replace(samples.incident(), why=why)
    assert pane.amended(before) is before  # nothing was judged so far
    pane._advice = object()
    shown = [[one.id for one in cause.remedies] for cause in pane.amended(before).why]
    assert shown == [helps, ["notrack", "change"]]
