"""ctrace's command line in a child of this process: the same entry, with no interpreter to start.

What a shell would see is what is told: exit status and both streams, as they arrive at their
descriptors. What an interpreter does before :func:`ctrace.cli.main` is not tested this way.
"""

from __future__ import annotations

import atexit
import gc
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn, Optional

import click
from click.testing import CliRunner

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


def command(*words: object, env: Optional[Mapping[str, str]] = None) -> dict[str, Any]:
    """What ``subprocess`` takes to run it: ``Popen(**command("top"), stdout=PIPE)``.

    As with a new interpreter nothing is inherited but the three streams, and nothing runs before
    it but what this process has imported. Saves 0.6 s of a processor each time.
    """
    _load()
    return {"args": ["ctrace", *map(str, words)], "preexec_fn": partial(_become, words, env)}


def said(*words: object) -> str:
    """What it prints; the rest of it when it fails."""
    done = ctrace(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(*arguments: str, code: int = 0) -> str:
    """What it prints, run in this process; it has to end with ``code``."""
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == code, done.output
    return done.stdout


def ctrace(
    *words: object,
    cwd: Optional[Path] = None,
    user: Optional[int] = None,
    out: Optional[int] = None,
) -> Done:
    """Run it, in a folder and as a user; ``out``: a descriptor for its output, or CLOSED."""
    begin = command(*words)

    def as_asked() -> None:
        if out == CLOSED:
            os.close(1)
        if user is not None:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        begin["preexec_fn"]()

    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as remarks:
        done = subprocess.run(
            begin["args"],
            preexec_fn=as_asked,
            cwd=cwd,
            check=False,
            timeout=LONGEST,
            stdin=subprocess.DEVNULL,
            stdout=printed if out in (None, CLOSED) else out,
            stderr=remarks,
        )
        texts = []
        for file in (printed, remarks):
            file.seek(0)
            texts.append(file.read().decode())
        return Done(done.returncode, *texts)


def _become(words: tuple[object, ...], env: Optional[Mapping[str, str]]) -> NoReturn:
    """What a child is until its end: it never gets to what subprocess would execute."""
    status = 1
    try:
        gc.freeze()  # what is collected here could close a number that is another file's by now
        os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])  # subprocess waits for one
        _as_new()
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        sys.argv = ["ctrace", *map(str, words)]
        try:
            main()
        except SystemExit as done:
            status = done.code if isinstance(done.code, int) else int(done.code is not None)
        threading._shutdown()  # type: ignore[attr-defined]  # as an interpreter ends: threads,
        atexit._run_exitfuncs()  # what was left to be done, what was not yet written
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _as_new() -> None:
    """Streams, signals and the list of what is done at the end, as a new interpreter has them."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    atexit._clear()
    sys.stdin = _stream(0, "r")
    sys.stdout = _stream(1, "w")
    sys.stderr = _stream(2, "w", errors="backslashreplace")


def _stream(number: int, mode: str, errors: Optional[str] = None) -> Any:
    try:
        os.fstat(number)
    except OSError:
        return None
    return open(number, mode, closefd=False, errors=errors, buffering=1 if number == 2 else -1)
