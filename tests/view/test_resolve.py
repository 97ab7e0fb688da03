"""Names for addresses: never waited for, whatever the resolver does."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from kit import samples
from kit.feeds import FixedFeed

from ctrace.live.resolve import KNOWN, WAITING, Resolver
from ctrace.view.screen.app import TopApp


class Dead:
    """A resolver that answers nothing until it is let go."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.alive = threading.Event()

    def __call__(self, address: str) -> str:
        self.asked.append(address)
        self.alive.wait(60)
        return f"host-{address.rpartition('.')[2]}.example"


def test_a_screen_goes_on_while_the_resolver_hangs() -> None:
    """Frames and keys as ever; names come when the resolver does."""
    dead = Dead()
    resolver = Resolver(dead)
    first = samples.incident()
    feed = FixedFeed([replace(first, ts=first.ts + tick * 10**9) for tick in range(4)])

    async def drive() -> None:
        # in the loop: before Python 3.10 what is made outside belongs to another one
        app = TopApp(feed, names=resolver.named)

        def shown() -> str:
            return "\n".join(line.plain for line in app.painted.lines)

        async with app.run_test(size=(120, 40)) as pilot:
            while not dead.asked:
                await pilot.pause(0.05)
            for at in range(1, 4):
                feed.at = at
                await pilot.pause(0.15)
                assert app.snapshot is not None
                assert app.snapshot.ts == feed.snapshots[at].ts
                assert f"10:03:{7 + at:02}" in shown()
            assert "10.42.3.17 → tcp/8063" in shown()
            await pilot.press("enter")
            assert app.state.mode == "detail"
            dead.alive.set()
            while "host-17.example" not in shown():
                feed.snapshots.append(replace(first, ts=feed.snapshots[-1].ts + 10**9))
                feed.at += 1
                await pilot.pause(0.15)
            assert "host-17.example → tcp/8063" in shown()
            assert "no longer among the rows" not in shown()  # the same row, under its name
            await pilot.press("escape")
            assert "host-17.example → tcp/8063" in shown()

    asyncio.run(drive())


def test_no_more_is_asked_than_may_be_under_way() -> None:
    dead = Dead()
    resolver = Resolver(dead)
    addresses = [f"10.0.{i // 200}.{i % 200}" for i in range(1000)]
    for _ in range(3):
        assert [resolver.name(address) for address in addresses] == addresses
    assert len(resolver._waiting) == WAITING
    dead.alive.set()
    assert len(resolver._names) <= KNOWN


def test_a_hanging_resolver_does_not_hold_up_the_end() -> None:
    """As when a screen is left during a DNS incident: no look-up is waited for."""
    code = (
        "import threading\nfrom ctrace.live.resolve import Resolver\n"
        "asked = threading.Event()\n"
        "def dead(address):\n asked.set()\n threading.Event().wait()\n"
        "names = Resolver(dead)\n"
        "for i in range(100): names.name(f'10.0.0.{i}')\n"
        "asked.wait()\nprint('over')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "over\n"


@pytest.mark.parametrize(
    ("key", "src", "dst", "shown"),
    [
        ("10.0.0.1 → 10.0.0.12:80", "10.0.0.1", "10.0.0.12", "<10.0.0.1> → <10.0.0.12>:80"),
        ("10.0.0.12 → 10.0.0.1", "10.0.0.12", "10.0.0.1", "<10.0.0.12> → <10.0.0.1>"),
        ("110.0.0.1 → tcp/80", "10.0.0.1", "", "110.0.0.1 → tcp/80"),
        ("fd00::1 → fd00::1:2", "fd00::1", "fd00::1:2", "<fd00::1> → <fd00::1:2>"),
        ("[fd00::1]:80", "fd00::1", "", "[<fd00::1>]:80"),
        ("10.0.0.1.", "10.0.0.1", "", "<10.0.0.1>."),
        ("tcp/80", "", "", "tcp/80"),
    ],
)
def test_an_address_within_a_longer_one_keeps_its_place(
    key: str, src: str, dst: str, shown: str
) -> None:
    resolver = Resolver(lambda _: "")
    resolver.name = lambda address: f"<{address}>"  # type: ignore[method-assign]
    assert resolver._in(key, src, dst) == shown
