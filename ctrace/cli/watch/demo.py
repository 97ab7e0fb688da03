"""``ctrace demo``: the incident of the README, in private namespaces, with the screen on it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from typing import TYPE_CHECKING, Optional

import click

from ctrace.cli.kinds import Whole
from ctrace.cli.options import hooks_option, screen_options
from ctrace.errors import CtraceError

if TYPE_CHECKING:
    from ctrace.demo.director import Beat, Director
    from ctrace.live.adviser import LiveAdviser
    from ctrace.live.feed import LiveFeed


@click.command()
@click.option(
    "--auto",
    is_flag=True,
    help="Play it through without a key pressed, narrated; about two minutes.",
)
@click.option(
    "--plain",
    is_flag=True,
    help="Print frames of text instead of the screen (as without a terminal).",
)
@click.option(
    "--lower-max",
    type=Whole(1),
    metavar="N",
    help="Lower the host's nf_conntrack_max to N meanwhile, instead of filling the "
    "demo's own table. A watchdog puts it back, whatever happens to ctrace.",
)
@hooks_option
@screen_options
def command(
    *,
    auto: bool,
    plain: bool,
    lower_max: Optional[int],
    hooks: Optional[str],
    theme: Optional[str],
    ascii_only: bool,
) -> None:
    """The incident of the README, in private namespaces, with ctrace top on it.

    Many short TCP connections to port 8063 fill a small table; metrics and look-ups
    of the same host begin to fail with EPERM. Nothing on the host is changed: the
    traffic runs between network namespaces that vanish with this process.
    """
    from ctrace.cli.watch.top import has_screen
    from ctrace.demo.director import play
    from ctrace.demo.limit import check_limit
    from ctrace.demo.scene import Scene

    if os.geteuid() != 0:
        raise CtraceError("the demo makes network namespaces, which needs root: sudo ctrace demo")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    if lower_max is not None:
        check_limit(lower_max)
    screen = has_screen() and not plain

    def show(feed: LiveFeed, adviser: LiveAdviser, director: Director) -> None:
        if screen:
            on_screen(feed, adviser, director, theme or "", ascii_only)
        else:
            in_words(feed, director, theme or "", ascii_only)

    click.echo("ctrace: building three network namespaces and a nearly full table", err=True)
    with Scene(lower_max=lower_max) as scene:
        play(scene, hooks, auto=auto or not screen, show=show)


def on_screen(
    feed: LiveFeed, adviser: LiveAdviser, director: Director, theme: str, ascii_only: bool
) -> None:
    """The live screen with a caption; in a played demo its pages turn by themselves.

    What was told of the incident stays in the terminal when the screen has gone.
    """
    from ctrace.cli.watch.top import end_recording
    from ctrace.view import format as fmt
    from ctrace.view.palette import choose
    from ctrace.view.screen.advice import AdvicePane
    from ctrace.view.screen.app import TopApp

    only_ascii = ascii_only or fmt.wants_ascii()
    app = TopApp(feed, palette=choose(theme), ascii_only=only_ascii, advice=AdvicePane(adviser))
    app.caption = lambda: director.text
    app.record_to = "demo.data"

    told: dict[str, str] = {}

    def turn(beat: Beat) -> None:
        told[beat.name] = beat.text
        if beat.name == "advice":
            app.call_from_thread(app.action_advice)
        elif beat.name == "applied":
            app.call_from_thread(app.action_up)
        elif beat.name == "end":
            threading.Timer(5.0, app.call_from_thread, (app.exit,)).start()

    director.on_beat = turn
    director.start()
    app.run()
    end_recording(feed)
    for name in ("full", "applied", "recovered", "end"):
        if name in told:
            text = click.wrap_text(told[name], shutil.get_terminal_size().columns)
            click.echo(fmt.ascii_only(text) if only_ascii else text)
    if director.failed:
        raise CtraceError(director.failed)


def in_words(feed: LiveFeed, director: Director, theme: str, ascii_only: bool) -> None:
    """The same without a screen: every sentence, and a frame at each turn."""
    from ctrace.cli.watch.top import print_frame
    from ctrace.view import format as fmt

    only_ascii = ascii_only or fmt.wants_ascii()
    told: list[str] = []

    def tell(beat: Beat) -> None:
        if beat.text in told:
            return
        told.append(beat.text)
        click.echo(f"\n== {fmt.ascii_only(beat.text) if only_ascii else beat.text}\n")
        snapshot = feed.latest()
        if snapshot is not None and beat.name in ("full", "recovered"):
            print_frame(snapshot, ascii_only=only_ascii, theme=theme)

    director.on_beat = tell
    director.start()
    while not director.over:
        director.wait(0.2)
    if director.failed:
        raise CtraceError(director.failed)
