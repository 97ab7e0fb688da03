"""A recording on the live screen, driven by its keys."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from kit.running.screen import shown
from kit.synthetic import at
from textual.pilot import Pilot

import ctrace
from ctrace.batch import Batch
from ctrace.live.replay import ReplayFeed
from ctrace.record import Kind
from ctrace.view.screen.app import TopApp

Drive = Callable[[TopApp, "Pilot[None]", ReplayFeed], Awaitable[None]]


def drive(file: Path, what: Drive, *, paused: bool = True) -> None:
    async def run() -> None:
        with ctrace.open(str(file)) as recording:
            feed = ReplayFeed(recording, paused=paused)
            app = TopApp(feed)
            async with app.run_test(size=(120, 40)) as pilot:
                await arrived(pilot, feed)
                await what(app, pilot, feed)
            feed.close()
            assert feed.error is None

    asyncio.run(run())


async def arrived(pilot: Pilot[None], feed: ReplayFeed) -> None:
    """Wait until the jump has arrived and is painted."""
    while not await asyncio.to_thread(feed.settle, 0.1):
        pass
    await pilot.pause(0.25)


@pytest.mark.slow
def test_the_keys_of_travel_lead_where_they_say(file: Path, truth: list[Batch]) -> None:
    first = next(b.until for b in truth if (b.events["kind"] == Kind.DROP).any())

    async def keys(app: TopApp, pilot: Pilot[None], feed: ReplayFeed) -> None:
        start = feed.position.start

        async def go(*pressed: str) -> None:
            await pilot.press(*pressed)
            await arrived(pilot, feed)

        def shows(until: int) -> bool:
            assert app.snapshot is not None
            rows = len(app.snapshot.culprits)
            assert rows >= 20, "all that this screen has lines for"
            return app.snapshot == at(truth, until, rows)

        def moment() -> float:
            assert app.snapshot is not None
            assert app.snapshot is feed.latest()
            return app.snapshot.ts / 1e9

        assert "PAUSED" in shown(app)
        await go("t", "t", "t")
        assert moment() == pytest.approx(start + 3, abs=0.3)
        await go("T")
        assert moment() == pytest.approx(start + 2, abs=0.3)
        assert "no drops before this" not in shown(app)
        await pilot.press("left_square_bracket")
        assert "no drops before this" in shown(app)
        await go("right_square_bracket")
        clock = feed._of.clock  # the recording's, to name the moment
        assert shows(first)
        assert moment() == clock.utc(first) / 1e9
        assert "DROPPED" in shown(app)
        await pilot.press("right_square_bracket")
        assert "no drops after this" in shown(app)
        # 14:03:20 and its like: a time of day, a stretch, a share
        text = app.snapshot.ts // 10**9 % 86400 + 4 if app.snapshot else 0
        await go("j", *f"{text // 3600:02}:{text // 60 % 60:02}:{text % 60:02}", "enter")
        assert moment() % 86400 == pytest.approx(text, abs=0.3)
        await go("j", *"-5s", "enter")
        assert moment() % 86400 == pytest.approx(text - 5, abs=0.3)
        await go("j", *"-5m", "enter")  # before the beginning: the beginning
        assert moment() == pytest.approx(start, abs=0.3)
        await go("j", *"100%", "enter")
        assert shows(truth[-1].until)
        await go("left_square_bracket")
        assert moment() == clock.utc(first) / 1e9
        await go("j", *"noon", "enter")
        assert "'noon' is not a time: give 10:03:07 (UTC), +30, -2m or 50%" in shown(app)
        assert moment() == clock.utc(first) / 1e9

    drive(file, keys)


@pytest.mark.slow
def test_speed_and_pause(file: Path) -> None:
    async def keys(app: TopApp, pilot: Pilot[None], feed: ReplayFeed) -> None:
        await pilot.press("plus", "plus", "minus")
        assert feed.position.speed == 2.0
        assert "2 times as fast" in shown(app)
        here = feed.position.now
        await pilot.pause(0.6)
        assert feed.position.now == here
        await pilot.press(*["plus"] * 9, "space")  # a thousand times as fast
        assert not feed.position.paused
        while feed.phase.name != "ended":
            await pilot.pause(0.1)
        assert feed.position.now == feed.position.end
        await pilot.press("T")
        await arrived(pilot, feed)
        assert feed.position.paused
        assert feed.position.now == pytest.approx(feed.position.end - 1, abs=0.3)

    drive(file, keys)


@pytest.mark.slow
def test_a_view_is_changed_and_drilled_into_while_standing(file: Path) -> None:
    async def keys(app: TopApp, pilot: Pilot[None], feed: ReplayFeed) -> None:
        await pilot.press("j", *"60%", "enter")
        await arrived(pilot, feed)
        now = feed.position.now
        await pilot.press("slash", *"dport=53", "enter")
        await arrived(pilot, feed)
        assert "udp/53" in shown(app)
        assert "tcp/8063" not in shown(app).split("CULPRITS")[1]
        await pilot.press("enter")
        assert app.state.mode == "detail"
        assert "LIFE" in shown(app)
        await pilot.press("r")
        assert "this is a recording already" in shown(app)
        assert feed.position.now == now

    drive(file, keys)
