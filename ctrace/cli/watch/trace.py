"""``ctrace trace``: one line per conntrack event, as it happens."""

from __future__ import annotations

import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Optional

import click

from ctrace.cli.kinds import Time, Whole, Words
from ctrace.cli.options import (
    answer_options,
    filter_options,
    hooks_option,
    make_filter,
    stop_after_option,
)
from ctrace.cli.output import number
from ctrace.errors import UsageError, nearest
from ctrace.record import Kind

if TYPE_CHECKING:
    from ctrace.batch import Source
    from ctrace.capture.live import LiveSource

INTERVAL = 0.1
KINDS = {kind.name.lower(): kind for kind in Kind if kind < Kind.EXISTING}


@click.command()
@filter_options
@click.option(
    "-e",
    "--kinds",
    metavar="LIST",
    type=Words(tuple(KINDS)),
    help=f"Only these, separated by commas: {', '.join(KINDS)}.",
)
@stop_after_option
@click.option("--count", type=Whole(1), hidden=True, help="As --stop-after.")
@click.option("--duration", type=Time(), help="Stop after this long: 30, 5m, 2h.")
@answer_options("text", "json", stream=True)
@hooks_option
def command(
    *,
    kinds: Optional[str],
    stop_after: Optional[int],
    count: Optional[int],
    duration: Optional[float],
    format: str,
    hooks: Optional[str],
    **filters: Any,
) -> None:
    """One line per conntrack event, as it happens: inserts, deletions, refusals.

    Says on standard error when it is listening, and at the end how many events were lost.

    \b
    Examples:
      ctrace trace -p tcp --dport 8063         one service's connections
      ctrace trace -e drop,insert_failed       only who is refused
      ctrace trace --format json --duration 5m five minutes as JSON lines
    """
    from dataclasses import replace

    from ctrace.capture import open_live
    from ctrace.view.unseen import newcomers

    wanted = make_filter(**filters)
    if kinds:
        wanted = replace(wanted, kinds=frozenset(map(parse_kind, kinds.split(","))))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    shown = lost = 0
    source: Optional[LiveSource] = None
    try:
        source = open_live(wanted, hooks=hooks, seed=False)
        tell(f"listening with {source.hooks.family} hooks")
        if source.hooks.note and not source.hooks.drop_tuples:
            tell(f"no better hooks: {source.hooks.note}")
        for blind in source.hooks.blind:
            tell(f"not seen: {blind}")
        for printed, missed in print_events(
            source, stop_after or count, duration, as_json=format == "json"
        ):
            shown += printed
            lost += missed
    except KeyboardInterrupt:
        pass  # the usual way to end it
    finally:
        if source is not None:
            source.close()
            tell(
                f"{number(shown)} event{'' if shown == 1 else 's'}, {number(lost)} lost"
                f"{newcomers(source.unseen)}"
            )


def print_events(
    source: Source, count: Optional[int], duration: Optional[float], *, as_json: bool
) -> Iterator[tuple[int, int]]:
    """Print batches; yield (printed, lost) for each."""
    from ctrace.view.export.events import HEADER, EventLines

    lines = EventLines(source.clock)
    out = sys.stdout
    ends = time.monotonic() + duration if duration else float("inf")
    left = count if count is not None else sys.maxsize
    if not as_json:
        print(HEADER, file=out, flush=True)
    for batch in source.batches(min(INTERVAL, duration or INTERVAL)):
        lines.learn(batch.names)
        events = batch.events[batch.events["kind"] != int(Kind.EXISTING)][:left]
        if len(events):
            left -= len(events)
            made = lines.json(events) if as_json else lines.columns(events)
            out.write("\n".join(made) + "\n")
            out.flush()
        yield len(events), batch.lost
        if left <= 0 or time.monotonic() >= ends:
            return
        if nobody_reads():
            raise BrokenPipeError


def nobody_reads() -> bool:
    """Whether the other end of standard output has gone, without writing to it."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False


def parse_kind(text: str) -> Kind:
    """A kind by name. Raises UsageError."""
    kind = KINDS.get(text.strip().lower())
    if kind is None:
        raise UsageError(f"unknown kind {text!r}: use {', '.join(KINDS)}{nearest(text, KINDS)}")
    return kind


def tell(text: str) -> None:
    """A line for people, apart from the events."""
    print(f"ctrace: {text}", file=sys.stderr, flush=True)
