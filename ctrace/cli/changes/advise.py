"""``ctrace advise``: which ports to NOTRACK, why it is safe or not, and what else helps."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional, cast

import click

from ctrace.cli.kinds import Percent, Time
from ctrace.cli.options import answer_options, filter_options, hooks_option, tell_unseen
from ctrace.cli.output import waiting
from ctrace.errors import CtraceError
from ctrace.files import check_free, new_text
from ctrace.interpreter import called

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ctrace.advice.facts import Facts
    from ctrace.advice.result import Advice
    from ctrace.batch import Batch, Logged, Source
    from ctrace.dropping import Drop
    from ctrace.filters import Filter


@click.command()
@click.argument("file", required=False, type=click.Path(readable=False), metavar="[FILE]")
@click.option(
    "--duration",
    default="10s",
    show_default=True,
    type=Time(1, 86400),
    help="How long to watch when live.",
)
@click.option(
    "--target",
    default="60%",
    show_default=True,
    type=Percent(),
    metavar="SHARE",
    help="Bring each table below this fill.",
)
@click.option("--plan", metavar="FILE", type=click.Path(), help="Write a plan for ctrace apply.")
@click.option(
    "--drop-source",
    multiple=True,
    metavar="NET",
    help="Also plan to drop everything from an address or prefix before tracking.",
)
@click.option(
    "--drop-service",
    multiple=True,
    metavar="PROTO/PORT",
    help="Also plan to drop everything to that port before tracking.",
)
@click.option(
    "--limit-source",
    multiple=True,
    metavar="SERVICE=RATE",
    help="Also plan to limit each source's new connections per second: tcp/8063=50.",
)
@click.option(
    "--limit-service",
    multiple=True,
    metavar="SERVICE=RATE",
    help="Also plan to limit all new connections per second.",
)
@click.option("--rules", "full", is_flag=True, help="Print the rules of every candidate.")
@hooks_option
@answer_options("text", "json", forced=True)
@filter_options
def command(
    file: Optional[str],
    duration: float,
    target: float,
    plan: Optional[str],
    full: bool,
    hooks: Optional[str],
    format: str,
    force: bool,
    **filters: object,
) -> None:
    """Which services to take out of connection tracking, and what else helps.

    It watches the host for a while, or reads a recording; checks each service against the
    ruleset; and prints the fewest changes that bring each full table below the target.
    Nothing is changed: --plan writes a file for ctrace apply.

    ctrace never chooses what to drop. If you do, with a --drop or --limit option, the advice
    says how much of the traffic seen it would have dropped. These options need nft. For UDP
    a limit counts datagrams.
    """
    from ctrace.cli.options import held_filter
    from ctrace.dropping import KINDS, parse

    given = {kind: cast("tuple[str, ...]", filters.pop(kind.replace("-", "_"))) for kind in KINDS}
    drops = parse(given)
    if plan:
        check_free(plan, force=force)
    wanted = held_filter(**filters)
    asked = Asked(wanted, target, drops)
    advice = _recorded(file, asked) if file else _live(duration, asked, hooks)
    if format == "json":
        click.echo(json.dumps(advice.to_json(), indent=2))
    else:
        from ctrace.view.paper import Paper
        from ctrace.view.report.advice import render

        # In a file or a pipe lines may be longer than in a narrow terminal.
        width = None if sys.stdout.isatty() else 120
        console = Paper(highlight=False, markup=False, width=width)
        how = "" if plan else _again(file, given, str(filters["netns"] or ""), target)
        console.put(render(advice, full=full, how=how), crop=False)
    if plan:
        _write(advice, plan, wanted.netns, force)


@dataclass(frozen=True)
class Asked:
    """The subject of the advice."""

    wanted: Filter
    target: float
    drops: tuple[Drop, ...] = ()


def _again(
    file: Optional[str], given: dict[str, tuple[str, ...]], netns: str, target: float
) -> str:
    """The command that makes a plan of this advice."""
    options = [f" --{kind} {text}" for kind, texts in given.items() for text in texts]
    if netns:
        options.insert(0, f" --netns {shlex.quote(netns)}")
    from ctrace.advice.advise import TARGET

    if target != TARGET:
        options.append(f" --target {100 * target:g}%")
    whole = f"{called()} advise{f' {shlex.quote(file)}' if file else ''}"
    return whole + "".join(options)


def _live(duration: float, asked: Asked, hooks: Optional[str]) -> Advice:
    import socket

    from ctrace.advice.again import facts_of
    from ctrace.advice.beside import Reader
    from ctrace.capture import open_live

    reader = Reader(asked.wanted.netns)
    with closing(reader), closing(open_live(asked.wanted, hooks=hooks, sample=True)) as source:
        tell_unseen()
        click.echo(f"ctrace: observing for {duration:g} s", err=True)
        host = socket.gethostname()
        return _advise(source, asked, duration, facts_of, host, along=reader.along)


def _recorded(path: str, asked: Asked) -> Advice:
    from ctrace.advice.facts import from_text
    from ctrace.dumps.opened import open_any
    from ctrace.recording.format.evidence import logged

    with closing(open_any([path])) as recording:
        known = {}
        for netns, text in recording.rulesets():
            try:
                known[netns] = from_text(text)
            except CtraceError as error:
                click.echo(f"ctrace: {error}", err=True)
        return _advise(
            recording, asked, None, known.get, recording.header.host, logged(recording.header.facts)
        )


def _advise(
    source: Source,
    asked: Asked,
    duration: Optional[float],
    facts_of: object,
    host: str,
    log: Optional[Logged] = None,
    along: Callable[[Iterator[Batch]], Iterable[Batch]] = iter,
) -> Advice:
    """Drain a source into a model, then advise from its contents. ``along`` adds what is read
    beside it."""
    from dataclasses import replace

    from ctrace.advice.advise import advise
    from ctrace.advice.asked import Views, include
    from ctrace.advice.facts import Facts
    from ctrace.advice.texts import Kept
    from ctrace.batch import DUMP
    from ctrace.model import Model

    wanted = asked.wanted
    model = Model(source.hooks, source.clock, source.started, host=host, logged=log)
    addresses: dict[int, tuple[str, ...]] = {}
    kept = Kept()
    for batch in along(source.batches(min(1.0, duration or 1.0))):
        if not wanted.is_empty:
            batch = replace(batch, events=batch.events[wanted.mask(batch.events)])  # noqa: PLW2901
        model.update(batch)
        if source.hooks.family == DUMP:
            kept.add(batch.events)
        addresses |= {inum: netns.addresses for inum, netns in batch.names.netns.items()}
        past = (batch.until - source.started) / 1e9
        if duration is not None and past >= duration and not batch.more:
            break
    services = model.snapshot(group="service", sort="held", limit=100)
    pairs = model.snapshot(group="pair", sort="held", limit=500)
    known: dict[int, Facts] = {}
    with waiting("reading the rules and trying out what helps"):
        for table in services.tables:
            found = facts_of(table.netns)  # type: ignore[operator]
            known[table.netns] = found or Facts(addresses=addresses.get(table.netns, ()))
            if source.hooks.family == DUMP:
                known[table.netns] = replace(known[table.netns], entries=kept.of(table.netns))
        advice = advise(services, pairs, known, target=asked.target)
    if not asked.drops:
        return advice
    sources = model.snapshot(group="src", sort="held", limit=500)
    views = Views(services, pairs, sources)
    return include(advice, asked.drops, views, known, wanted.netns)


def _write(advice: Advice, path: str, netns: Optional[int], force: bool) -> None:
    from ctrace.plan.plan import to_json

    text = to_json(advice.plan(netns))
    with new_text(path, force=force) as file:
        file.write(text)
    command = f"{called()} apply {shlex.quote(path)}"
    click.echo(f"ctrace: plan written; apply it with: {command}", err=True)
