"""``ctrace collect``: a shell script that gathers evidence on a host without ctrace."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import IO, Optional

import click

from ctrace import interpreter
from ctrace.cli.options import file_option, force_option
from ctrace.cli.output import number
from ctrace.errors import CtraceError
from ctrace.files import new

SCRIPT = Path(__file__).parents[2] / "share" / "collect.sh"
WAIT = 120.0
"""Seconds: the script ends by itself before."""


@click.command()
@click.option("--print", "printed", is_flag=True, help="Print the script, to be run elsewhere.")
@file_option("The archive to write on this host.", "evidence.tar.gz")
@force_option
def command(printed: bool, output: Optional[str], force: bool) -> None:
    """Gather evidence on connection tracking from a host, with only its shell.

    The script needs no ctrace, Python or compiler, works on old kernels and routers, is
    bounded in time and size, changes nothing and leaves nothing behind.

    \b
    Examples:
      ctrace collect --print | ssh root@HOST sh > evidence.tar.gz
      ctrace report evidence.tar.gz
    """
    if printed:
        click.echo(SCRIPT.read_text(encoding="utf-8"), nl=False)
        return
    assert output is not None
    with new(output, force=force) as file:
        try:
            status = _run(file)
        except subprocess.TimeoutExpired:
            raise CtraceError(f"the script did not end within {WAIT:.0f} s") from None
        if status:
            raise CtraceError(f"the script ended with status {status}")
    click.echo(f"ctrace: {output}: {number(os.path.getsize(output) >> 10)} KiB", err=True)


def _run(file: IO[bytes]) -> int:
    """The script's exit status. It is never killed: it has a folder to remove."""
    with subprocess.Popen(
        ["/bin/sh", str(SCRIPT)],
        stdout=file,
        preexec_fn=_end_with_parent,  # noqa: PLW1509  # no other thread is here
    ) as running:
        try:
            return running.wait(WAIT)
        except BaseException:
            running.terminate()
            running.wait()
            raise


def _end_with_parent() -> None:
    """However ctrace ends, the script is told to."""
    interpreter.end_with_parent(signal.SIGTERM)
