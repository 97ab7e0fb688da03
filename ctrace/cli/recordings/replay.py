"""``ctrace replay``: the live screen over a recording, with time travel."""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Optional

import click

from ctrace.cli.kinds import Speed, Time
from ctrace.cli.options import answer_options, group_option, rows_by, screen_options, sort_option
from ctrace.errors import CtraceError, UsageError
from ctrace.live.protocol import Position

if TYPE_CHECKING:
    from ctrace.live.replay import ReplayFeed


@click.command()
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.option("--at", metavar="MOMENT", help="Start at 14:03:20 (UTC), -5m from the end, +30, 50%.")
@click.option(
    "--speed",
    type=Speed(),
    default="1",
    show_default=True,
    metavar="N",
    help="Playback speed: 2 is twice as fast as it happened.",
)
@click.option("--paused", is_flag=True, help="Begin paused.")
@group_option
@sort_option
@click.option("--once", is_flag=True, help="Print one frame (at --at, else at the end) and exit.")
@answer_options("text", "json", stream=True)
@click.option("--step", default="1s", show_default=True, type=Time(), help="Between frames.")
@screen_options
def command(
    *,
    files: tuple[str, ...],
    at: Optional[str],
    speed: float,
    paused: bool,
    group: Optional[str],
    sort: str,
    once: bool,
    format: str,
    step: float,
    theme: Optional[str],
    ascii_only: bool,
) -> None:
    """Show a recording (default ctrace.data) on the live screen, at any moment of it.

    Space pauses, t and T step, j jumps to a time, ? shows the other keys. Without a
    terminal, and with --format json, frames are printed one after the other, --step apart;
    a step in which nothing was recorded is left out.
    """
    from ctrace.cli.watch.top import has_screen
    from ctrace.dumps.opened import open_any
    from ctrace.live.replay import ReplayFeed
    from ctrace.view import format as fmt

    source = open_any(files or ("ctrace.data",))
    with contextlib.closing(source):
        start, end = (source.clock.utc(t) / 1e9 for t in (source.started, source.until))
        moment = parse_moment(at, start, end) if at else None
        rules = dict(source.rulesets())  # before the feed's thread reads the same file
        plain = once or format == "json" or not has_screen()
        by = rows_by(group, format)
        feed = ReplayFeed(
            source, group=by, sort=sort, speed=speed, paused=paused or plain, start=moment
        )
        try:
            if plain:
                _print(
                    feed,
                    end if once and moment is None else moment,
                    once,
                    format,
                    step,
                    ascii_only or fmt.wants_ascii(),
                    theme or "",
                )
            else:
                _screen(feed, rules, by, sort, ascii_only or fmt.wants_ascii(), theme or "")
        finally:
            feed.close()
        if plain and source.missing:
            click.echo(f"ctrace: the recording is incomplete: {source.missing}", err=True)
        if feed.error is not None:
            raise (
                feed.error if isinstance(feed.error, CtraceError) else CtraceError(str(feed.error))
            )


def parse_moment(text: str, start: float, end: float) -> float:
    """``14:03:20``, a whole date and time, ``-5m`` from the end, ``+30``, ``50%``.

    UTC seconds. Raises UsageError, also for a moment that the recording does not have.
    """
    from ctrace.live.jump import inside, parse_jump

    whole = Position(start, start, end)

    if re.match(r"\d{4}-", text):
        try:
            moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
        except ValueError:
            raise UsageError(
                f"{text!r} is not a time: give one like 2019-07-03T11:02:00Z"
            ) from None
        moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
        return inside(moment.timestamp(), text, whole)
    base = end if text.startswith("-") else start
    return inside(parse_jump(text, replace(whole, now=base)), text, whole)


def _screen(
    feed: ReplayFeed, rules: dict[int, str], group: str, sort: str, ascii_only: bool, theme: str
) -> None:
    from ctrace.live.adviser import FeedAdviser, recorded_facts
    from ctrace.view.palette import choose
    from ctrace.view.screen.advice import AdvicePane
    from ctrace.view.screen.app import TopApp
    from ctrace.view.screen.state import State

    TopApp(
        feed,
        advice=AdvicePane(FeedAdviser(feed, recorded_facts(rules))),
        palette=choose(theme),
        ascii_only=ascii_only,
        state=State(group=group, sort=sort),
    ).run()


def _print(
    feed: ReplayFeed,
    moment: Optional[float],
    once: bool,
    format: str,
    step: float,
    ascii_only: bool,
    theme: str,
) -> None:
    """One frame, or one per step up to the end; quiet stretches are jumped over."""
    import json

    from ctrace.cli.watch.top import print_frame
    from ctrace.view.export.json import snapshot_json

    here = feed.position.start + (0 if once else step) if moment is None else moment
    while True:
        feed.seek(here)
        if not feed.settle(3600):
            return
        snapshot = feed.latest()
        if snapshot is not None and format == "json":
            click.echo(json.dumps(snapshot_json(snapshot), indent=2 if once else None))
        elif snapshot is not None:
            print_frame(snapshot, ascii_only=ascii_only, theme=theme)
        if once or here >= feed.position.end:
            return
        here += step
        following = feed.following
        if following is not None and following > here:  # nothing was recorded until then
            here += step * math.ceil((following - here) / step)
        here = min(here, feed.position.end)
