"""ctrace's command line in a child of this process: the same entry, with no interpreter to start.

What a shell would see is what is told: exit status and both streams, as they arrive at their
descriptors. What an interpreter does before :func:`ctrace.cli.main` is not tested this way.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, NoReturn, Optional

import click

from ctrace.cli import VERBS, cli, main

LONGEST = 240
"""Seconds after which a child is ended: a test would wait for it for ever."""
CLOSED = -1
"""In place of a descriptor: standard output is closed."""


@dataclass(frozen=True)
class Done:
    """How it ended and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


@cache
def _load() -> None:
    """Every verb's modules, once here instead of once in each child."""
    for verb in VERBS:
        cli.get_command(click.Context(cli), verb)


def ctrace(
    *words: object,
    cwd: Optional[Path] = None,
    user: Optional[int] = None,
    out: Optional[int] = None,
) -> Done:
    """Run it, in a folder and as a user; ``out``: a descriptor for its output, or CLOSED."""
    _load()
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as remarks:
        child = os.fork()
        if child == 0:
            _run([*map(str, words)], cwd, user, printed.fileno() if out is None else out, remarks)
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (printed, remarks):
            file.seek(0)
            texts.append(file.read().decode())
        return Done(os.waitstatus_to_exitcode(status), *texts)


def _run(
    words: Sequence[str], cwd: Optional[Path], user: Optional[int], out: int, err: IO[bytes]
) -> NoReturn:
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LONGEST)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(err.fileno(), 2)
        if out == CLOSED:
            os.close(1)
        else:
            os.dup2(out, 1)
        sys.stdout = open(1, "w", closefd=False) if out != CLOSED else None  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        if user is not None:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        if cwd is not None:
            os.chdir(cwd)
        sys.argv = ["ctrace", *words]
        main()
    except SystemExit as done:
        status = done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
