"""The live screen: the mouse, the palettes, and whatever else may be pressed."""

from __future__ import annotations

import random
from typing import Any

import pytest
from kit import samples
from kit.feeds import FixedFeed, RecordingFeed, TravelFeed
from kit.loads import snapshots
from kit.running.screen import Advice, drive, shown
from textual.pilot import Pilot

from ctrace.model.snapshot import GROUPS, Snapshot
from ctrace.view.palette import PALETTES
from ctrace.view.screen.advice import AdvicePane
from ctrace.view.screen.app import TopApp
from ctrace.view.screen.keys import KEYS


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

    drive(keys, FixedFeed([snapshots.hostile()]), ascii_only=True)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(one, marks=pytest.mark.slow) for one in (1, 2))]
)
def test_no_keys_and_no_size_can_upset_it(seed: int) -> None:
    """Random keys, mouse and resizes over every kind of snapshot and feed."""
    dice = random.Random(seed)
    scenes = [
        samples.incident(), samples.calm(), samples.netlink(), snapshots.hostile(),
        snapshots.namespaces(), Snapshot(0, "", 1.0, 0.0, samples.NETFILTER, "pair", "held"),
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
