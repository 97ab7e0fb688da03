"""``ctrace perf``: what connection tracking costs on this host, and where."""

from __future__ import annotations

import signal
import sys
from typing import Optional

import click

from ctrace.cli.kinds import OneOf, Time, Whole
from ctrace.cli.options import answer_options, hooks_option, tell_unseen
from ctrace.files import check_free, new_text


@click.command()
@click.option(
    "--duration",
    default="10s",
    show_default=True,
    type=Time(0.5, 3600),
    help="How long to measure.",
)
@click.option(
    "--hertz",
    default=199,
    show_default=True,
    type=Whole(1, 5000),
    metavar="N",
    help="Samples a second on each CPU.",
)
@click.option(
    "--folded",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Also write stacks for flame graphs to FILE.",
)
@click.option(
    "--stacks",
    type=OneOf(["insert", "drop", "evict"]),
    metavar="EVENT",
    help="Sample the stacks at each insert, drop or evict, not by the clock.",
)
@click.option(
    "--against",
    type=click.Path(readable=False),
    metavar="FILE",
    help="Compare with an earlier answer (--format json) from before a change.",
)
@hooks_option
@answer_options("text", "json", forced=True)
def command(
    *,
    duration: float,
    hertz: int,
    folded: Optional[str],
    stacks: Optional[str],
    against: Optional[str],
    hooks: Optional[str],
    format: str,
    force: bool,
) -> None:
    """Measure what connection tracking costs here, and where that time goes.

    It shows the time that packets spend in conntrack, its share of CPU time, the hash table's
    chains, how late expired entries are collected, and waits for its locks. While
    it measures, its timers and its sampler cost a few hundred nanoseconds a packet.

    \b
    Examples:
      ctrace perf                              ten seconds, as tables
      ctrace perf --folded out.folded          stacks for a flame-graph viewer
      ctrace perf -o before.json               as JSON; and after the change:
      ctrace perf --against before.json        compare with the earlier measurement
      ctrace perf --stacks drop                who sends the refused packets
    """
    from ctrace.cost.measure import measure
    from ctrace.kernel import symbols
    from ctrace.view.report.cost import perf_json, render
    from ctrace.view.report.cost_change import changes_json, load, render_changes

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    before = load(against) if against else None
    if folded:
        check_free(folded, force=force)
    names = symbols.kernel()
    tell_unseen()
    click.echo(f"ctrace: measuring for {duration:g} s", err=True)
    perf, lines = measure(duration, hertz, names, stacks_of=stacks or "", family=hooks)
    if folded:
        with new_text(folded, force=force) as file:
            file.write("\n".join(lines) + "\n")
    if format == "json":
        import json

        document = perf_json(perf)
        if before is not None:
            document["changes"] = changes_json(before, perf)
        click.echo(json.dumps(document, indent=2))
    else:
        from ctrace.view.paper import Paper

        Paper().put(render(perf))
        if before is not None:
            Paper().put(render_changes(before, perf))
