"""``ctrace diff``: before and after a change."""

from __future__ import annotations

import contextlib
import json
import sys

import click

from ctrace.cli.kinds import OneOf
from ctrace.cli.options import answer_options, limit_option
from ctrace.model.snapshot import GROUPS


@click.command()
@click.argument("before", metavar="BEFORE")
@click.argument("after", metavar="AFTER")
@click.option(
    "--group",
    type=OneOf(GROUPS[1:]),
    metavar="KEY",
    default="service",
    show_default=True,
    help=f"What to compare: {', '.join(GROUPS[1:-1])} or {GROUPS[-1]}.",
)
@limit_option(20, 5000, "Show at most N rows.")
@answer_options("text", "json")
def command(before: str, after: str, group: str, limit: int, format: str) -> None:
    """Compare two recordings, key by key: entries held, rates, refusals, lifetimes.

    Everything is per second, so the recordings may differ in length.
    """
    from ctrace.dumps.opened import open_any
    from ctrace.recording.compare import compare

    with (
        contextlib.closing(open_any([before])) as first,
        contextlib.closing(open_any([after])) as second,
    ):
        found = compare(first, second, group)
    if format == "json":
        click.echo(json.dumps(found.to_json(limit), indent=2))
        return
    from ctrace.view.paper import Paper
    from ctrace.view.report.diff import diff_text

    wide = None if sys.stdout.isatty() else 140
    Paper(highlight=False, width=wide, markup=False).put(diff_text(found, limit))
