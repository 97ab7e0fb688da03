"""``ctrace whatif``: a recording through a model of the table, with other settings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Optional

import click

from ctrace.cli.options import force_option, output_option
from ctrace.files import check_free

if TYPE_CHECKING:
    from ctrace.whatif.run import WhatIf


@click.command()
@click.argument("file", type=click.Path(), metavar="FILE")
@click.option("--notrack", multiple=True, metavar="PROTO/PORT", help="Untrack a service: tcp/8063.")
@click.option(
    "--timeout", multiple=True, metavar="NAME=S",
    help="Another timeout: tcp_time_wait=30, or for one service tcp/8063:time_wait=5.",
)  # fmt: skip
@click.option("--max", "limit", type=click.IntRange(0, 1 << 31), help="nf_conntrack_max.")
@click.option("--buckets", type=click.IntRange(1, 1 << 31), help="nf_conntrack_buckets.")
@output_option
@click.option("--html", metavar="OUT", help="Write a report's page with the answer in it instead.")
@force_option
def command(
    file: str,
    notrack: tuple[str, ...],
    timeout: tuple[str, ...],
    limit: Optional[int],
    buckets: Optional[int],
    output: str,
    html: Optional[str],
    force: bool,
) -> None:
    """Say what the table in FILE would have done with other settings.

    FILE is a recording, or a flight recorder's directory.

    The model's error on the recording as it really was is always printed; above
    5 % it is not to be trusted.
    """
    from contextlib import closing

    from ctrace.dumps.make import open_any
    from ctrace.whatif.run import whatif
    from ctrace.whatif.settings import parse_levers

    if html:
        check_free(html, force=force)
    levers = parse_levers(notrack, timeout, limit, buckets)
    with closing(open_any([file])) as source:
        answer = whatif(source, levers)
    if html:
        _page(file, html, answer, force)
    elif output == "json":
        click.echo(json.dumps(answer.to_json(), indent=2))
    else:
        click.echo(answer.render(), nl=False)


def _page(file: str, out: str, answer: WhatIf, force: bool) -> None:
    """The report on the recording, with the answer in it."""
    from contextlib import closing

    from ctrace.cli.report import progress, write_new
    from ctrace.dumps.make import open_any
    from ctrace.recording.review import review
    from ctrace.view.report.html import report_html

    with closing(open_any([file])) as source:
        write_new(out, report_html(review(source, show=progress("reading")), answer), force)
