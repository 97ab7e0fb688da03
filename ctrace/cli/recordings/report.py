"""``ctrace report``: what happened, from a recording."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from typing import Optional

import click

from ctrace.cli.options import (
    answer_options,
    group_option,
    limit_option,
    page_option,
    redact_option,
    rows_by,
)
from ctrace.cli.output import progress


@click.command()
@click.argument("files", nargs=-1, metavar="[FILE]...")
@group_option
@limit_option(10, 1000, "Show at most N rows.")
@page_option
@click.option(
    "--markdown", is_flag=True, help="The same as --format markdown: to paste into a postmortem."
)
@answer_options("text", "markdown", "json", "html")
@redact_option
def command(
    files: tuple[str, ...],
    group: Optional[str],
    limit: int,
    markdown: bool,
    format: str,
    redact: bool,
) -> None:
    """Say what happened: what filled the table, who was refused, when and why.

    FILE is a recording (default ctrace.data), or a flight recorder's directory. Several
    recordings, of several hosts, are reported as one.
    """
    from ctrace.dumps.opened import open_any
    from ctrace.recording.review import review

    by = rows_by(group, format)
    source = open_any(files or ("ctrace.data",))
    if redact:
        from ctrace.recording.redact import Redacted

        source = Redacted(source)
    with contextlib.closing(source):
        found = review(source, group=by, show=progress("reading"))
        if format == "html":
            from ctrace.view.report.html import report_html

            click.echo(report_html(found))
        elif markdown or format == "markdown":
            from ctrace.view.report.markdown import report_markdown

            click.echo(report_markdown(found), nl=False)
        elif format == "json":
            from ctrace.view.report.json import report_json

            click.echo(json.dumps(report_json(found, limit), indent=2))
        else:
            from ctrace.view.paper import Paper
            from ctrace.view.report.text import WIDTH, report_text

            wide = min(WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else WIDTH
            console = Paper(highlight=False, markup=False, width=wide)
            console.put(report_text(found, limit))
