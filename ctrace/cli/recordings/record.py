"""``ctrace record``: per-flow events to a file, also as a flight recorder."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Optional

import click
from click.core import ParameterSource

from ctrace.cli.kinds import Size, Time
from ctrace.cli.options import (
    file_option,
    filter_options,
    held_filter,
    hooks_option,
    stop_after_option,
    tell_unseen,
)
from ctrace.errors import UsageError
from ctrace.files import named

if TYPE_CHECKING:
    from ctrace.recording.recorder.run import Progress, Sink, Until
    from ctrace.recording.recorder.segments import Retention

DEFAULT = "ctrace.data"
DEFAULT_RING = "ctrace.d"


@click.command()
@file_option(f"Where to write [default: {DEFAULT}; for a flight recorder, {DEFAULT_RING}/].")
@click.option("--duration", type=Time(), help="Stop after this long: 30, 5m, 2h.")
@stop_after_option
@click.option("--cmd", metavar="COMMAND", help="Record as long as this shell command runs.")
@click.option("--ring", type=Size(8 << 20), help="Flight recorder: use at most this much disk.")
@click.option("--keep", type=Time(), help="Flight recorder: keep the last TIME.")
@click.option(
    "--trigger",
    multiple=True,
    metavar="WHAT",
    help="Flight recorder: keep only what surrounds drop, evict, fill=90 or inserts=20000/s.",
)
@click.option(
    "--before",
    type=Time(),
    default="2m",
    show_default=True,
    help="How much to keep before a trigger.",
)
@click.option(
    "--after",
    type=Time(),
    default="2m",
    show_default=True,
    help="How much to keep after a trigger.",
)
@click.option(
    "--interval",
    default="250ms",
    show_default=True,
    type=Time(0.05, 10),
    help="Time between two batches; a replay can step no finer.",
)
@hooks_option
@click.option("--perf", is_flag=True, help="Also measure what conntrack costs, for the report.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@filter_options
def command(
    *,
    output: Optional[str],
    duration: Optional[float],
    stop_after: Optional[int],
    cmd: Optional[str],
    ring: Optional[int],
    keep: Optional[float],
    trigger: tuple[str, ...],
    before: float,
    after: float,
    interval: float,
    hooks: Optional[str],
    perf: bool,
    quiet: bool,
    **filters: Any,
) -> None:
    """Record every conntrack event for the postmortem.

    Ctrl-C ends it cleanly; a crash loses at most the last second. With --cmd the exit
    status is that of the command. An existing recording is renamed (ctrace.data.1), not
    overwritten.

    A recording holds addresses, ports, the names of namespaces, containers, units and
    processes, and command lines, in which *** replaces every word that may be a secret. To
    share it, make a copy with ctrace merge FILE --redact.

    \b
    Examples:
      ctrace record                            to ctrace.data, until Ctrl-C
      ctrace record --cmd './loadtest'         as long as the test runs
      ctrace record --keep 2h --ring 1G        always the last two hours
      ctrace record --trigger drop             the minutes around each drop
    """
    from ctrace.capture import open_live
    from ctrace.cli.watch.top import shown_filter
    from ctrace.recording.recorder import host_facts
    from ctrace.recording.recorder.run import Until, make_way, record
    from ctrace.recording.recorder.segments import FlightRecorder
    from ctrace.recording.writer import Writer
    from ctrace.view.unseen import newcomers

    until = Until(duration, stop_after, cmd)
    in_ring = bool(ring or keep or trigger)
    retention = _retention(ring, keep, trigger, (before, after))
    shown = shown_filter(filters)
    wanted = held_filter(**filters)
    path = named(output or (DEFAULT_RING if in_ring else DEFAULT))
    with contextlib.ExitStack() as opened:
        measurement = None
        if perf:
            from ctrace.cost.measure import Beside, Measurement
            from ctrace.kernel import symbols

            measurement = opened.enter_context(Measurement(symbols.kernel()))
        source = open_live(wanted, hooks=hooks, sample=True)
        opened.callback(source.close)
        header = host_facts.header(source, shown, wanted.netns)
        tell = _teller(quiet)
        sink: Sink
        if in_ring:
            sink = FlightRecorder(path, header, retention)
        else:
            if old := make_way(path):
                tell(f"the earlier {path} is now {old}")
            sink = Writer(path, header)
        tell_unseen()
        tell(f"recording to {path} with {source.hooks.family} hooks, {_told(until)}")
        line = ProgressLine(quiet or not sys.stderr.isatty(), bounded=in_ring)
        costs = Beside(measurement, header.host) if measurement is not None else None
        ended = record(source, sink, until, interval, line.show, costs)
        line.end()
        if isinstance(sink, FlightRecorder) and sink.full:
            tell("the disk was full: older segments went for newer ones")
        kept = "; nothing was kept, as no trigger fired" if trigger and not sink.stored else ""
        told = line.told(sink.stored) + newcomers(source.unseen)
        tell(f"{path}: {told} ({ended.reason}){kept}")
    if ended.status:
        sys.exit(ended.status)


def _teller(quiet: bool) -> Callable[[str], None]:
    """Says a line on standard error, unless nothing is to be said."""
    return lambda line: None if quiet else click.echo(f"ctrace: {line}", err=True)


def _told(until: Until) -> str:
    """When the recording ends: ``until Ctrl-C, 5 min at most``."""
    from ctrace.view import format as fmt

    bounds = [f"until {until.command!r} ends" if until.command else "until Ctrl-C"]
    if until.duration:
        bounds.append(f"{fmt.duration(until.duration)} at most")
    if until.events:
        bounds.append(f"{fmt.plural(until.events, 'event')} at most")
    return ", ".join(bounds)


class ProgressLine:
    """One line on a terminal, written anew a few times a second."""

    def __init__(self, silent: bool, bounded: bool = False) -> None:
        """``bounded``: the disk holds less than what was recorded."""
        self._last: Optional[Progress] = None
        self._silent = silent
        self._bounded = bounded
        self._next = 0.0
        self._width = 0

    def show(self, progress: Progress) -> None:
        """Show the progress."""
        self._last = progress
        now = time.monotonic()
        if self._silent or now < self._next:
            return
        self._next = now + 0.5
        text = self.told(progress.size)
        sys.stderr.write("\r" + text.ljust(self._width))
        sys.stderr.flush()
        self._width = len(text)

    def told(self, size: int) -> str:
        """The last progress reported, with ``size`` bytes on disk."""
        from ctrace.view import format as fmt

        if self._last is None:
            return "nothing recorded"
        events = self._last.events
        each = " on disk" if self._bounded else f" ({size / events:.1f} B each)" if events else ""
        return (
            f"{fmt.span(self._last.seconds)}, {fmt.plural(events, 'event')}, "
            f"{fmt.size(size)}{each}, {fmt.count(self._last.lost)} lost"
        )

    def end(self) -> None:
        """Leave the line."""
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()


def _retention(
    ring: Optional[int],
    keep: Optional[float],
    trigger: tuple[str, ...],
    around: tuple[float, float],
) -> Retention:
    """What a flight recorder keeps. Raises UsageError."""
    from ctrace.recording.recorder.segments import Retention
    from ctrace.recording.recorder.triggers import parse_trigger

    asked = click.get_current_context().get_parameter_source
    for name in ("before", "after"):
        if not trigger and asked(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"--{name} goes with --trigger")
    return Retention(
        size=ring if ring else (None if keep else 1 << 30),
        seconds=keep,
        triggers=tuple(parse_trigger(text) for text in trigger),
        before=around[0],
        after=around[1],
    )
