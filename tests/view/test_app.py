# ruff: noqa: ARG002
"""The live screen, driven by keys and mouse."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Optional

import pytest
from kit import samples
from kit.feeds import FixedFeed, RecordingFeed, TravelFeed
from rich.text import Text
from textual.pilot import Pilot

from ctrace.errors import CtraceError
from ctrace.live.protocol import Phase
from ctrace.model import remedies
from ctrace.model import snapshot as model
from ctrace.model.snapshot import GROUPS, Cause, Histogram, Snapshot
from ctrace.view.palette import DARK, PALETTES
from ctrace.view.screen.advice import AdvicePane, Remedy
from ctrace.view.screen.app import TopApp
from ctrace.view.screen.detail import detail_lines
from ctrace.view.screen.keys import KEYS
from ctrace.view.screen.tables import culprit_columns, namespace_columns, victim_columns

Drive = Callable[[TopApp, "Pilot[None]"], Awaitable[None]]


class Advice:
    """An adviser that remembers what it was told to do."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def advise(self, snapshot: Snapshot, stop: threading.Event) -> str:
        return f"advice for {snapshot.host}"

    def lines(self, advice: str, width: int, folded: bool) -> list[Text]:
        rule = "    tcp dport 8063 " + "meta l4proto tcp " * 12 + "counter notrack"
        lever = Text.from_ansi("tcp/8063 \x1b[31munsafe\x1b[0m")
        return [Text(advice), lever, *([] if folded else [Text(rule)]), *[Text("more")] * 80]

    def rules(self, advice: str) -> str:
        return "tcp dport 8063 notrack"

    def about(self, advice: str, proto: str, port: int, netns: int) -> Optional[Remedy]:
        return samples.remedy() if (proto, port) == ("tcp", 8063) else None

    @property
    def on_trial(self) -> bool:
        return bool(self.done)

    @property
    def untracked(self) -> frozenset[tuple[int, str, int]]:
        cause = samples.incident().why[0]
        return frozenset({(cause.netns, cause.proto, cause.port or 0)} if self.done else ())

    def status(self) -> str:
        return "on trial" if self.done else ""

    def offer(self, advice: str) -> tuple[str, tuple[str, ...]]:
        return "type apply", ("apply",)

    def act(self, advice: str, word: str, stop: threading.Event) -> str:
        self.done.append(word)
        return "in place"


def drive(
    what: Drive, feed: Any = None, size: tuple[int, int] = (120, 40), **options: Any
) -> TopApp:
    """Run the application over a feed and do something to it."""

    async def run() -> TopApp:
        # in the loop: before Python 3.10 what is made outside belongs to another one
        app = TopApp(feed or FixedFeed([samples.incident()]), **options)
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await what(app, pilot)
            await pilot.pause()
        return app

    return asyncio.run(run())


def shown(app: TopApp) -> str:
    return "\n".join(line.plain for line in app.painted.lines)


def test_before_the_first_snapshot_it_says_what_it_waits_for() -> None:
    async def look(app: TopApp, pilot: Pilot[None]) -> None:
        lines = shown(app).splitlines()
        assert any("attaching to the kernel: netfilter hooks" in line for line in lines[:-1])
        assert "q quit" in lines[-1]

    drive(look, FixedFeed([], "attaching"))


def test_a_feed_that_cannot_start_closes_the_screen() -> None:
    async def look(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.pause(0.3)

    app = drive(look, FixedFeed([], "failed"))
    assert not app.is_running


def test_a_feed_that_fails_later_leaves_its_last_numbers_and_says_why() -> None:
    feed = FixedFeed([samples.incident()])

    async def look(app: TopApp, pilot: Pilot[None]) -> None:
        feed.phase = Phase("failed", "the hooks were detached by somebody else")
        await pilot.pause(0.3)
        text = shown(app)
        for wanted in ("the hooks were detached by somebody else", "ENDED", "CULPRITS", "tcp/8063"):
            assert wanted in text, wanted
        assert "cannot start" not in text

    drive(look, feed)


def test_a_long_message_is_shown_whole() -> None:
    async def look(app: TopApp, pilot: Pilot[None]) -> None:
        app.say("nothing was changed: " + "the rules refuse it, " * 6 + "that is all")
        last = " ".join(" ".join(line.plain for line in app.painted.lines[-4:]).split())
        assert f"nothing was changed: {'the rules refuse it, ' * 6}that is all" in last

    drive(look, size=(80, 24))


def test_enter_drills_down_and_backspace_comes_back() -> None:
    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("down", "down", "enter")
        text = shown(app)
        assert "127.0.0.1 → tcp/10248" in text
        assert "kubelet" in text
        await pilot.press("backspace")
        assert app.state.mode == "top"
        await pilot.press("home", "enter")
        text = shown(app)
        for wanted in ("php-fpm[18211]", "LIFE", "IN TABLE", "none seen", "TIME_WAIT", "63518"):
            assert wanted in text, wanted
        await pilot.press("escape")
        assert "CULPRITS" in shown(app)

    drive(keys, size=(120, 50))


def test_a_long_histogram_is_told_in_few_rows() -> None:
    counts = [0] * 90
    counts[3], counts[40], counts[80] = 700, 20, 3
    edges = tuple(0.001 * 1.12**step for step in range(91))
    incident = samples.incident()
    first = replace(incident.culprits[0], life_histogram=Histogram(edges, tuple(counts)))
    lines = [one.plain for one in detail_lines(incident, first, 80, DARK)]
    start = next(index for index, text in enumerate(lines) if text.startswith(" LIFE"))
    rows = lines[start + 1 : lines.index(" " * 80, start)]
    assert len(rows) <= 12
    numbers = [int(text.split("s ")[-1].split()[0]) for text in rows]
    assert sum(numbers) == 723
    assert numbers[0] == 700
    assert numbers[-1] == 3


def test_the_page_about_one_culprit_tells_everything() -> None:
    """Histograms, ends, states, owner, NAT, samples, peers, curves, advice with its rules."""
    scenes = [samples.incident()]
    first, second, *rest = scenes[0].culprits
    second = replace(second, key="10.42.3.18 -> tcp/8063", proto="tcp", port=8063, src="10.42.3.18")
    scenes[0] = replace(scenes[0], culprits=(first, second, *rest))
    for tick in range(1, 6):
        rates = replace(scenes[0].culprits[0], new_per_s=455.0 + 40 * tick)
        moment = replace(scenes[0], ts=scenes[0].ts + tick * 10**9)
        scenes.append(replace(moment, culprits=(rates, *scenes[0].culprits[1:])))
    feed = FixedFeed(scenes)

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        for at in range(6):
            feed.at = at
            app.look()
        await pilot.press("enter")
        while "reading the rules" in shown(app):
            await pilot.pause(0.1)
        text = shown(app)
        for wanted in (
            "first seen", "455", "up to 655/s", "1 min", "php-fpm[18211]", "opened these flows",
            "docker:shop-php-7c9", "php-fpm: pool www --nodaemonize", "none seen on",
            "pinned (ASSURED)", "expired", "TIME_WAIT", "first to last packet",
            "from insert to destroy", "SAMPLES", "PEERS", "10.42.3.18 → tcp/8063", "10.42.3.17:",
            "ADVICE",
            "safe-with-rules", "inet filter input accepts its answers",
            "tcp dport @client_tcp notrack", "keep-alive",
        ):  # fmt: skip
            assert wanted in text, wanted
        await pilot.press("y")
        assert app.clipboard == samples.remedy().rules
        await pilot.press("escape", "down", "down", "enter")
        assert "none: it holds too little of the table to need a rule" in shown(app)
        await pilot.press("y")
        assert app.clipboard == app.state.subject[0]

    drive(keys, feed, size=(140, 90), advice=AdvicePane(Advice()))


def test_the_order_is_turned_round_over_all_rows() -> None:
    first = samples.churning(20, 0)
    whole = samples.churning(40, 0)
    feed = FixedFeed([first, replace(first, sort="-held", culprits=whole.culprits[:-21:-1])])

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("S")
        assert feed.views[-1][1] == "-held"
        feed.at = 1  # what a feed answers: the other end of all there is
        app.look()
        rows = [spot for spot in app.painted.spots if spot.value == "culprits:0"]
        assert whole.culprits[-1].key.split(" ")[0] in app.painted.lines[rows[0].y].plain
        await pilot.press("S")
        assert feed.views[-1][1] == "held"

    drive(keys, feed)


def test_what_a_feed_has_to_say_is_shown() -> None:
    feed = FixedFeed([samples.calm()])

    async def look(app: TopApp, pilot: Pilot[None]) -> None:
        feed.phase = Phase("live", "recording stopped: no space left on device")
        await pilot.pause(0.3)
        assert "recording stopped: no space left on device" in shown(app)

    drive(look, feed)


def test_the_cursor_stays_with_its_row_when_rows_move() -> None:
    first = samples.churning(20, 0)
    turned = samples.churning(20, 0)
    turned = type(turned)(**{**turned.__dict__, "culprits": turned.culprits[::-1]})
    feed = FixedFeed([first, turned])

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("down", "down", "down")
        feed.at = 1
        await pilot.pause(0.3)
        assert app.state.cursor == 16
        await pilot.press("enter")
        assert app.state.subject[0] == first.culprits[3].key

    drive(keys, feed)


def test_group_and_sort_are_asked_of_the_feed() -> None:
    feed = FixedFeed([samples.incident()])

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("g", "G", "s", "2", "less_than_sign", "5", "5", "S")
        assert app.state.sort == "drops"
        assert not app.state.reverse

    drive(keys, feed)
    assert [view[0] for view in feed.views[:2]] == ["process", "pair"]
    assert [view[1] for view in feed.views[2:]] == [
        "new", "-new", "held", "drops", "-drops", "drops",
    ]  # fmt: skip


def test_a_filter_is_typed_and_taken_away() -> None:
    feed = FixedFeed([samples.incident()])

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("slash", *"dport=53", "enter")
        text = shown(app)
        assert "10.42.3.17 → udp/53" in text
        assert "udp/8125" not in text.split("CULPRITS")[1].split("NAMESPACES")[0]
        assert "filter dport=53" in text
        await pilot.press("slash", *"netns=nowhere", "enter")  # another word, and no such place
        assert "no namespace 'nowhere' was seen: n lists them" in shown(app)
        assert app.state.filter == "dport=53"
        await pilot.press("slash", "ctrl+u", *"bogus=1", "enter")
        assert "unknown filter" in shown(app)
        await pilot.press("slash", "escape", "ctrl+l")
        assert "tcp/10248" in shown(app)

    drive(keys, feed)
    assert feed.views[0][2] == "dport=53"
    assert feed.views[-1][2] == ""


def test_a_paused_screen_stands_still() -> None:
    feed = FixedFeed([samples.calm(), samples.incident()])

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("space")
        feed.at = 1
        await pilot.pause(0.3)
        assert "PAUSED" in shown(app)
        assert "FULL" not in shown(app)
        await pilot.press("space")
        await pilot.pause(0.3)
        assert "FULL" in shown(app)

    drive(keys, feed)


def test_namespaces_victims_and_panes() -> None:
    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("n")
        assert "pod-39-checkout" in shown(app) or "pod-08-checkout" in shown(app)
        await pilot.press("enter")
        assert app.state.filter.startswith("netns=pod-08")
        await pilot.press("ctrl+l", "v")
        assert "VICTIMS" in shown(app)
        await pilot.press("v", "tab", "down")
        assert app.state.pane == "victims"
        await pilot.press("enter")
        assert app.state.filter == "udp/8125"

    drive(keys, FixedFeed([samples.namespaces()]))


def test_escape_walks_back_through_what_was_narrowed() -> None:
    feed = FixedFeed([samples.namespaces()])

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("slash", *"proto=udp", "enter", "n")
        assert (app.state.mode, app.state.filter) == ("namespaces", "proto=udp")
        await pilot.press("enter")
        first = app.state.filter
        assert first.startswith("proto=udp netns=pod-08")
        assert "Esc back" in shown(app)
        await pilot.press("n", "down", "enter")  # another one, in place of the first
        assert app.state.filter.startswith("proto=udp netns=pod-")
        assert app.state.filter != first
        steps = []
        for _ in range(5):
            await pilot.press("escape")
            steps.append((app.state.mode, app.state.filter))
        assert steps == [
            ("namespaces", "proto=udp"), ("top", first), ("namespaces", "proto=udp"),
            ("top", "proto=udp"), ("top", ""),
        ]  # fmt: skip

    drive(keys, feed)
    assert [one[2] for one in feed.views][-1] == ""


def test_groupings_that_cannot_be_filtered_so_are_passed_over_and_said() -> None:
    feed = FixedFeed([samples.incident()])

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("slash", *"src=10.0.0.0/8", "enter", "g")
        assert app.state.group == "pod"
        assert "rows by processes can't be filtered by src" in shown(app)
        await pilot.press("slash", "ctrl+u", *"dst=10.0.0.1 src=10.0.0.2", "enter")
        assert "src and dst together can't be told" in shown(app)

    drive(keys, feed)
    assert {one[0] for one in feed.views} == {"pair", "pod"}


def test_advice_is_shown_and_applied_only_when_typed() -> None:
    adviser = Advice()

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("p")
        assert not app._prompt.display
        await pilot.press("a")
        await pilot.pause(0.4)
        assert "advice for node-17" in shown(app)
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
        await pilot.pause(0.4)
        assert adviser.done == ["apply"]
        assert "in place" in shown(app)
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
        await pilot.pause(0.4)
        assert "the ruleset cannot be read" in shown(app)
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
    feed = TravelFeed([samples.churning(5, tick) for tick in range(10)])

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
        await pilot.pause(0.2)
        assert "10:03:07" in shown(app)
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


def test_the_mouse_selects_sorts_opens_and_presses_keys() -> None:
    async def mouse(app: TopApp, pilot: Pilot[None]) -> None:
        heads = [spot for spot in app.painted.spots if spot.action == "sort"]
        new = next(spot for spot in heads if spot.value == "new")
        await pilot.click(offset=(new.start + 1, new.y))
        assert app.state.sort == "new"
        row = next(spot for spot in app.painted.spots if spot.value == "culprits:2")
        await pilot.click(offset=(5, row.y))
        assert app.state.cursor == 2
        await pilot.click(offset=(5, row.y), times=2)
        assert app.state.mode == "detail"
        await pilot.press("escape")
        key = next(spot for spot in app.painted.spots if spot.value == "help")
        await pilot.click(offset=(key.start, key.y))
        assert app.state.mode == "help"

    drive(mouse)


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


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
def test_the_footer_is_within_reach_of_the_mouse_and_the_eye(size: tuple[int, int]) -> None:
    async def look(app: TopApp, pilot: Pilot[None]) -> None:
        footer = app.painted.lines[-1].plain
        for words in ("q quit", "? help", "a advice", "g group", "/ filter", "s sort", "n netns"):
            assert words in footer

    drive(look, size=size)


def test_the_command_palette_opens_and_runs_a_command() -> None:
    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        await pilot.press("ctrl+p")
        await pilot.pause(0.2)
        await pilot.press(*"victims")
        await pilot.pause(0.5)
        await pilot.press("enter")
        await pilot.pause(0.3)
        if app.state.mode != "victims":  # the first enter may only choose
            await pilot.press("enter")
            await pilot.pause(0.3)
        assert app.state.mode == "victims"

    drive(keys)


def test_every_palette_shows_the_same_words() -> None:
    texts = []

    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        for _ in PALETTES:
            texts.append(shown(app).splitlines()[1:-1])
            await pilot.press("l")

    drive(keys)
    assert texts[0] == texts[1] == texts[2]


def test_in_ascii_nothing_else_leaves_for_the_terminal() -> None:
    async def keys(app: TopApp, pilot: Pilot[None]) -> None:
        for key in ("enter", "escape", "question_mark", "escape", "n", "escape", "ctrl+p"):
            await pilot.press(key)
            await pilot.pause(0.1)
            for strip in app.screen._compositor.render_strips():
                filtered = strip.apply_filter(app._ascii, app.screen.background_colors[1])
                assert filtered.text.isascii()

    drive(keys, FixedFeed([samples.hostile()]), ascii_only=True)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(one, marks=pytest.mark.slow) for one in (1, 2))]
)
def test_no_keys_and_no_size_can_upset_it(seed: int) -> None:
    """Random keys, mouse and resizes over every kind of snapshot and feed."""
    dice = random.Random(seed)
    scenes = [
        samples.incident(), samples.calm(), samples.netlink(), samples.hostile(),
        samples.namespaces(), Snapshot(0, "", 1.0, 0.0, samples.NETFILTER, "pair", "held"),
    ]  # fmt: skip
    feed: Any = (FixedFeed, RecordingFeed, TravelFeed)[seed % 3](scenes)
    keys = [name for key in KEYS for name in key.keys if name not in ("q", "ctrl+c", "ctrl+p",
                                                                      "colon")]  # fmt: skip
    keys += ["enter", "escape", "x", "7", "backspace", "left", "\u20ac"]

    async def fuzz(app: TopApp, pilot: Pilot[None]) -> None:
        for _ in range(45):
            roll = dice.random()
            if roll < 0.12:
                await pilot.resize_terminal(dice.randint(1, 220), dice.randint(1, 70))
            elif roll < 0.2:
                feed.at = dice.randrange(len(scenes))
                app.look()
            elif roll < 0.3:
                x, y = dice.randrange(app.size.width), dice.randrange(app.size.height)
                await pilot.click(offset=(x, y))
            else:
                await pilot.press(dice.choice(keys))
            assert app.is_running
            assert app.state.group in GROUPS

    drive(fuzz, feed, advice=AdvicePane(Advice()))


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
