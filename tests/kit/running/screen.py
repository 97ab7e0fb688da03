# ruff: noqa: ARG002
"""The live screen without a terminal: how it is driven, and what it shows."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, Optional

from rich.text import Text
from textual.pilot import Pilot

from ctrace.model.snapshot import Snapshot
from ctrace.view.screen.advice import Remedy
from ctrace.view.screen.app import TopApp
from kit import samples
from kit.feeds import FixedFeed

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


async def appears(app: TopApp, pilot: Pilot[None], text: str) -> None:
    """Wait until the screen shows this, however busy the machine is."""
    end = time.monotonic() + 60
    while text not in shown(app) and time.monotonic() < end:
        await pilot.pause(0.05)
    assert text in shown(app)
