"""``ctrace top``: what fills the table, who is refused, and why."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Optional

import click

from ctrace.cli.kinds import Size, Time, Whole
from ctrace.cli.options import (
    answer_options,
    filter_options,
    group_option,
    hooks_option,
    later_status,
    limit_option,
    make_filter,
    rows_by,
    say,
    screen_options,
    sort_option,
)
from ctrace.errors import CtraceError, UsageError
from ctrace.model.snapshot import Snapshot

if TYPE_CHECKING:
    from ctrace.live.feed import LiveFeed
    from ctrace.view.screen.state import State

PLAIN_SIZE = (100, 40)
"""Columns and lines of a plain frame where the terminal's size is unknown."""
FIRST = 30.0
"""Seconds that attaching and the first interval may take beyond the interval itself."""


@click.command()
@click.argument("interval", type=Time(0.1, 86400), default="1", metavar="[INTERVAL]")
@click.argument("count", type=Whole(1), required=False)
@filter_options
@group_option
@sort_option
@click.option("--once", is_flag=True, help="Observe one interval, print one answer and exit.")
@answer_options("text", "json", stream=True)
@click.option(
    "--plain",
    is_flag=True,
    help="Print frames of text instead of the screen (as without a terminal).",
)
@limit_option(200, 10000, "Show at most N culprits.")
@hooks_option
@click.option(
    "--memory",
    default="32M",
    show_default=True,
    type=Size(1 << 20),
    help="Memory limit; beyond it, counts of small keys become upper bounds.",
)
@screen_options
@click.option(
    "--resolve",
    is_flag=True,
    help="Show names for addresses. The look-ups are flows too: not for use in a DNS incident.",
)
def command(
    *,
    interval: float,
    count: Optional[int],
    group: Optional[str],
    sort: str,
    once: bool,
    format: str,
    plain: bool,
    limit: int,
    hooks: Optional[str],
    memory: int,
    theme: Optional[str],
    ascii_only: bool,
    resolve: bool,
    **filters: Any,
) -> None:
    """Live: what fills the connection tracking table, who is refused, and why.

    INTERVAL is a TIME like 1, 5s or 2m; COUNT is how many intervals to observe. In JSON each
    interval is one line; with --once there is a single object.

    \b
    Examples:
      ctrace top                               the screen
      ctrace top 5 12                          a minute, in steps of five seconds
      ctrace top -p udp --dport 53 --group src who asks for names
      ctrace top 12 --once --format json       one answer after twelve seconds
    """
    from ctrace.capture import open_live
    from ctrace.live.feed import LiveFeed
    from ctrace.live.filtering import View, check
    from ctrace.view import format as fmt
    from ctrace.view.screen.state import State

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    by_status = later_status(filters)
    by = rows_by(group, format)
    check(by, by_status)
    shown = shown_filter(filters)
    wanted = make_filter(**filters)
    as_screen = not (once or plain or format == "json" or not has_screen())
    if resolve and not as_screen:
        raise UsageError("--resolve goes with the screen: names come later than a frame is printed")
    feed = LiveFeed(
        lambda: open_live(wanted, hooks=hooks, sample=True),
        interval=interval,
        asked=View(by, sort, by_status, limit),
        memory=memory,
        early=as_screen,
        shown_filter=shown,
        flows_filtered=not replace(wanted, netns=None).is_empty,
    )
    from ctrace.advice.beside import Reader  # while the hooks are being attached

    feed.read_beside(Reader(wanted.netns))
    with contextlib.closing(feed):
        if as_screen:
            chosen = State(group=by, sort=sort, filter=by_status)
            run_screen(feed, chosen, count, theme or "", ascii_only, resolve)
        else:
            show: Callable[[Snapshot], None] = partial(print_json, indent=2 if once else None)
            if format == "text":
                show = frames(ascii_only or fmt.wants_ascii(), theme or "")
            run_plain(feed, interval, 1 if once else count, show)
    if feed.error is not None:
        raise feed.error


def has_screen() -> bool:
    """Whether there is a terminal that can be drawn on."""
    return (
        sys.stdout.isatty()
        and sys.stdin.isatty()
        and os.environ.get("TERM", "") not in ("", "dumb")
    )


def run_screen(
    feed: LiveFeed, state: State, count: Optional[int], theme: str, ascii_only: bool, resolve: bool
) -> None:
    """The live screen, until it is left."""
    from ctrace.live.adviser import LiveAdviser
    from ctrace.view import format as fmt
    from ctrace.view.palette import choose
    from ctrace.view.screen.advice import AdvicePane
    from ctrace.view.screen.app import TopApp

    adviser = LiveAdviser(feed)
    names = None
    if resolve:
        from ctrace.live.resolve import Resolver

        names = Resolver().named
    app = TopApp(
        feed,
        palette=choose(theme),
        ascii_only=ascii_only or fmt.wants_ascii(),
        state=state,
        advice=AdvicePane(adviser),
        names=names,
        count=count,
    )
    try:
        app.run()
    finally:
        if told := adviser.close():
            say(f"ctrace: {told}", err=True)
        end_recording(feed)


def end_recording(feed: LiveFeed) -> None:
    """Finish what the screen was asked to record, and say where it is."""
    if path := feed.stop_recording():
        say(f"ctrace: recorded to {path}; ctrace report {path} tells what happened", err=True)


def run_plain(
    feed: LiveFeed, interval: float, count: Optional[int], show: Callable[[Snapshot], None]
) -> None:
    """Show each snapshot, until the count is reached or the reader goes."""
    seen: Optional[Snapshot] = None
    shown = 0
    while count is None or shown < count:
        snapshot = feed.wait(seen, interval + FIRST)
        if snapshot is None and feed.phase.name == "failed":
            return
        if snapshot is None and feed.phase.name == "ended":
            raise CtraceError("the stream of kernel events ended unexpectedly: start ctrace again")
        if snapshot is None:
            continue  # a host that stalls is not the end: the next snapshot shows it
        seen = snapshot
        show(snapshot)
        shown += 1


def print_json(snapshot: Snapshot, *, indent: Optional[int]) -> None:
    """One object, on a line of its own without ``indent``."""
    import json

    from ctrace.view.export.json import snapshot_json

    click.echo(json.dumps(snapshot_json(snapshot), indent=indent))


def frames(ascii_only: bool, theme: str) -> Callable[[Snapshot], None]:
    """Prints a frame; what that needs is loaded now, while the first interval passes."""
    import rich.console  # noqa: F401

    import ctrace.view.screen.frame  # noqa: F401

    return partial(print_frame, ascii_only=ascii_only, theme=theme)


def print_frame(snapshot: Snapshot, *, ascii_only: bool, theme: str) -> None:
    """One plain frame; colours only where the output is a terminal that has them."""
    import shutil

    from ctrace.view.palette import PALETTES, TERMINAL
    from ctrace.view.paper import Paper
    from ctrace.view.screen.frame import frame

    columns, rows = shutil.get_terminal_size(PLAIN_SIZE)
    console = Paper(width=max(40, columns), highlight=False, legacy_windows=False)
    height = max(12, rows - 1) if sys.stdout.isatty() else None
    palette = PALETTES.get(theme, TERMINAL)
    console.put(
        frame(snapshot, max(40, columns), height, palette=palette, ascii_only=ascii_only), end="\n"
    )
    with contextlib.suppress(ValueError):
        sys.stdout.flush()


def shown_filter(filters: dict[str, Any]) -> str:
    """The filter options in words: ``proto=udp dport=53``."""
    words = []
    for name, value in filters.items():
        if value is True:
            words.append(name.replace("_", "-"))
        elif value not in (None, False):
            words.append(f"{name.replace('_', '-')}={value}")
    return " ".join(words)
