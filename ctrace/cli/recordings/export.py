"""``ctrace export``: a recording for other tools."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Optional

import click

from ctrace.cli.kinds import OneOf
from ctrace.cli.options import file_option, force_option, redact_option
from ctrace.errors import UsageError
from ctrace.files import check_free, new, new_text

FORMATS = ("parquet", "csv", "jsonl", "openmetrics")


@click.command()
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.option(
    "--format",
    "kind",
    type=OneOf(FORMATS),
    metavar="FORMAT",
    help=f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]} [default: by the suffix of FILE].",
)
@click.option("--to", "earlier", type=OneOf(FORMATS), hidden=True, help="As --format.")
@file_option("Write to FILE instead of standard output (parquet needs a file).")
@redact_option
@force_option
def command(
    files: tuple[str, ...],
    kind: Optional[str],
    earlier: Optional[str],
    output: Optional[str],
    redact: bool,
    force: bool,
) -> None:
    """Write a recording (default ctrace.data) as Parquet, CSV, JSON lines or OpenMetrics.

    \b
    Examples:
      ctrace export ctrace.data -o incident.parquet
      ctrace export --format jsonl | jq 'select(.kind == "drop") | .src'
    """
    from ctrace.cli.output import number, progress
    from ctrace.dumps.opened import open_any
    from ctrace.view.export import files as to
    from ctrace.view.export.backfill import to_openmetrics

    output = None if output == "-" else output
    kind = kind or earlier or _kind(output)
    if kind == "parquet" and not output:
        raise UsageError("Parquet needs a file: give one with -o")
    if output:
        check_free(output, force=force)
    source = open_any(files or ("ctrace.data",))
    if redact:
        from ctrace.recording.redact import Redacted

        source = Redacted(source)
    show = progress("exporting")
    with contextlib.closing(source):
        writer = {"csv": to.to_csv, "jsonl": to.to_jsonl}.get(kind, to_openmetrics)
        if kind == "parquet":
            assert output
            with new(output, force=force) as file:
                total = to.to_parquet(source, file, show)
        elif output:
            with new_text(output, force=force) as text:
                total = writer(source, text, show)
        else:
            total = writer(source, sys.stdout, show)
        if output:
            what = "samples" if kind == "openmetrics" else "events"
            click.echo(f"ctrace: {output}: {number(total)} {what}", err=True)
        if source.missing:
            click.echo(f"ctrace: the recording is incomplete: {source.missing}", err=True)


def _kind(output: Optional[str]) -> str:
    ending = os.path.splitext(output or "")[1].lstrip(".").lower()
    known = {
        "parquet": "parquet",
        "pq": "parquet",
        "csv": "csv",
        "jsonl": "jsonl",
        "ndjson": "jsonl",
        "om": "openmetrics",
        "prom": "openmetrics",
    }
    if ending not in known:
        raise UsageError(f"say which format with --format: {', '.join(FORMATS)}")
    return known[ending]
