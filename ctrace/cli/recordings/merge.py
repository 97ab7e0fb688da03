"""``ctrace merge``: several recordings as one file."""

from __future__ import annotations

import contextlib

import click

from ctrace.cli.options import file_option, force_option, redact_option
from ctrace.errors import UsageError


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@file_option("The new recording.", required=True)
@force_option
@redact_option
def command(files: tuple[str, ...], output: str, force: bool, redact: bool) -> None:
    """Write recordings of several hosts as one, with the host in each namespace's name.

    With a single FILE and --redact, a copy that can be shown to others.
    """
    from ctrace.cli.output import number, progress
    from ctrace.dumps.opened import open_any
    from ctrace.files import check_free, draft
    from ctrace.recording.derived import copy

    if len(files) == 1 and not redact:
        raise UsageError("one recording needs no merging: give more, or --redact")
    check_free(output, force=force)
    source = open_any(files)
    if redact:
        from ctrace.recording.redact import Redacted

        source = Redacted(source)
    with contextlib.closing(source):
        with draft(output, force=force) as path:
            written = copy(source, path, progress("merging"))
        click.echo(f"ctrace: {output}: {number(written.events)} events", err=True)
        if source.missing:
            click.echo(f"ctrace: the originals are incomplete: {source.missing}", err=True)
