"""``ctrace whatif``: a recording through a model of the table, with other settings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Optional

import click

from ctrace.cli.kinds import Whole
from ctrace.cli.options import answer_options, page_option
from ctrace.cli.output import progress, prose

if TYPE_CHECKING:
    from ctrace.whatif.answer import WhatIf


@click.command()
@click.argument("file", type=click.Path(readable=False), metavar="[FILE]", default="ctrace.data")
@click.option("--notrack", multiple=True, metavar="PROTO/PORT", help="Untrack a service: tcp/8063.")
@click.option(
    "--timeout",
    multiple=True,
    metavar="NAME=TIME",
    help="Another timeout: tcp_time_wait=30s, or for one service tcp/8063:time_wait=5s.",
)
@click.option("--max", "limit", type=Whole(0, 1 << 31), metavar="N", help="nf_conntrack_max.")
@click.option("--buckets", type=Whole(1, 1 << 31), metavar="N", help="nf_conntrack_buckets.")
@page_option
@answer_options("text", "json", "html")
def command(
    file: str,
    notrack: tuple[str, ...],
    timeout: tuple[str, ...],
    limit: Optional[int],
    buckets: Optional[int],
    format: str,
) -> None:
    """Say what the table in FILE would have done with other settings.

    FILE is a recording (default ctrace.data), or a flight recorder's directory.

    The model predicts the second half of the recording from the first and prints its error:
    above 15 %, do not trust it.
    """
    from contextlib import closing

    from ctrace.dumps.opened import open_any
    from ctrace.whatif.run import whatif
    from ctrace.whatif.settings import parse_levers

    levers = parse_levers(notrack, timeout, limit, buckets)
    with closing(open_any([file])) as source:
        answer = whatif(source, levers)
    if format == "html":
        _page(file, answer)
    elif format == "json":
        click.echo(json.dumps(answer.to_json(), indent=2))
    else:
        from ctrace.view.report.whatif_text import whatif_text

        click.echo(prose(whatif_text(answer)), nl=False)


def _page(file: str, answer: WhatIf) -> None:
    """The report on the recording, with the answer in it."""
    from contextlib import closing

    from ctrace.dumps.opened import open_any
    from ctrace.recording.review import review
    from ctrace.view.report.html import report_html

    with closing(open_any([file])) as source:
        click.echo(report_html(review(source, show=progress("reading")), answer))
