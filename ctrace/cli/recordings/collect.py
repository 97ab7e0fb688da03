"""``ctrace collect``: a shell script that gathers evidence on a host without ctrace."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Optional

import click

from ctrace.cli.options import file_option
from ctrace.cli.output import number
from ctrace.errors import CtraceError
from ctrace.files import give_to_caller

SCRIPT = Path(__file__).parents[2] / "share" / "collect.sh"
WAIT = 120.0
"""Seconds: the script ends by itself before."""


@click.command()
@click.option("--print", "printed", is_flag=True, help="Print the script, to be run elsewhere.")
@file_option("The archive to write on this host.", "evidence.tar.gz")
def command(printed: bool, output: Optional[str]) -> None:
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
    try:
        fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CtraceError(f"cannot create {output}: {error.strerror}") from None
    give_to_caller(fd)
    try:
        with os.fdopen(fd, "wb") as file:
            done = subprocess.run(["/bin/sh", str(SCRIPT)], stdout=file, timeout=WAIT, check=False)
    except subprocess.TimeoutExpired:
        raise CtraceError(f"the script did not end within {WAIT:.0f} s; see {output}") from None
    if done.returncode:
        raise CtraceError(f"the script ended with status {done.returncode}; see {output}")
    click.echo(f"ctrace: {output}: {number(os.path.getsize(output) >> 10)} KiB", err=True)
