"""``ctrace import``: text dumps, logs and support bundles as a recording."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import click

from ctrace.cli.options import file_option, redact_option

if TYPE_CHECKING:
    from ctrace.dumps.source import Told
    from ctrace.recording.writer import Writer


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@file_option("The new recording.", "imported.data")
@redact_option
def command(files: tuple[str, ...], output: str, redact: bool) -> None:
    """Make a recording from text: dumps of the table, logs, settings, rules.

    FILE is text, plain or packed (gzip, xz, bzip2, zstd), a directory or a tar of such (a
    support bundle, or what ctrace collect prints), or - for standard input. Each line is
    recognised by its content: /proc/net/nf_conntrack, conntrack -L, -E and -S in any of
    their forms, dmesg, journalctl, sysctl -a, lsmod, iptables-save, nft list ruleset, ss
    and netstat. Lines that are not understood are counted, and the first are shown.

    \b
    Examples:
      ssh HOST cat /proc/net/nf_conntrack | ctrace import - -o incident.data
      ctrace import sosreport-web1.tar.xz -o web1.data
      ctrace report dump.txt            reads it directly; so do advise and replay
    """
    from ctrace.dumps.ended import cleanly
    from ctrace.files import named
    from ctrace.recording.recorder.run import make_way
    from ctrace.view.report.evidence import imported

    with cleanly():
        old = make_way(named(output))
        try:
            writer, told = _made(files, output, redact)
        except BaseException:
            if old:
                os.rename(old, output)
            raise
    if old:
        click.echo(f"ctrace: the earlier {output} is now {old}", err=True)
    for line in imported(told.said, output, writer.events):
        click.echo(f"ctrace: {line}", err=True)


def _made(files: tuple[str, ...], output: str, redact: bool) -> tuple[Writer, Told]:
    """Write the recording. Raises CtraceError, and leaves nothing of it then."""
    from ctrace.dumps.make import make

    if not redact:
        return make(files, output)
    import tempfile

    from ctrace.files import draft
    from ctrace.recording.derived import copy
    from ctrace.recording.reader import Recording
    from ctrace.recording.redact import Redacted

    with tempfile.TemporaryDirectory(prefix="ctrace-") as folder:
        whole = os.path.join(folder, "imported")
        _, told = make(files, whole)
        with contextlib.closing(Redacted(Recording(whole))) as source, draft(output) as own:
            return copy(source, own), told
