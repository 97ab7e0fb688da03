"""``ctrace report``: what happened, from a recording."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Optional

import click

from ctrace.cli.options import force_option, output_option
from ctrace.files import check_free, new_text
from ctrace.model.snapshot import GROUPS


@click.command()
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.option(
    "--group", type=click.Choice(GROUPS), default="pair", show_default=True, help="What to rank."
)
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=10, show_default=True, help="Rows at most."
)
@output_option
@click.option("--html", metavar="OUT", help="Write one self-contained page instead.")
@click.option("--redact", is_flag=True, help="Replace addresses and names, consistently.")
@force_option
def command(
    files: tuple[str, ...],
    group: str,
    limit: int,
    output: str,
    html: Optional[str],
    redact: bool,
    force: bool,
) -> None:
    """Say what happened: what filled the table, who was refused, when and why.

    FILE is a recording (default ctrace.data), or a flight recorder's directory. Several
    recordings, of several hosts, are reported as one.
    """
    from ctrace.dumps.make import open_any
    from ctrace.recording.review import review

    if html:
        check_free(html, force=force)
    source = open_any(files or ("ctrace.data",))
    if redact:
        from ctrace.recording.redact import Redacted

        source = Redacted(source)
    with contextlib.closing(source):
        found = review(source, group=group, show=progress("reading"))
        if html:
            from ctrace.view.report.html import report_html

            write_new(html, report_html(found), force)
        elif output == "json":
            from ctrace.view.report.json import report_json

            click.echo(json.dumps(report_json(found, limit), indent=2))
        else:
            from rich.console import Console

            from ctrace.view.report.text import report_text

            wide = None if sys.stdout.isatty() else 140
            Console(highlight=False, width=wide, markup=False).print(report_text(found, limit))


def progress(what: str) -> Callable[[float], None]:
    """A line on a terminal's standard error, from the second second on."""
    begun = time.monotonic()
    shown = [0.0]

    def show(done: float) -> None:
        now = time.monotonic()
        if not sys.stderr.isatty() or now - begun < 2 or now - shown[0] < 0.2:
            return
        shown[0] = now
        end = "\r\033[K" if done >= 1 else ""
        sys.stderr.write(f"\r{what}: {done:4.0%} {end}")
        sys.stderr.flush()

    return show


def write_new(path: str, text: str, force: bool) -> None:
    """Write a report and say so. Raises CtraceError."""
    with new_text(path, force=force) as file:
        file.write(text)
    click.echo(f"ctrace: {path}: {os.path.getsize(path) >> 10:,} KiB", err=True)
