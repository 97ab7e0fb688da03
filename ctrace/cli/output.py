"""Standard output and error of every verb: failed writes are handled in one place."""

from __future__ import annotations

import codecs
import io
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Optional, TextIO

from ctrace.errors import CtraceError
from ctrace.names import clean
from ctrace.view.letters import replaced, wants_ascii

_COUNT: Final = re.compile(r"(?<![^\s(])\d{1,3}(?:,\d{3})+(?![\w,./'\"]\S)")
"""A count in a sentence; text in quotes or in a path is left as it was given."""


class _Output(io.FileIO):
    """Raises CtraceError when the system refuses; that a pipe's reader has gone stays as it is."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise CtraceError(f"cannot write to standard output: {error.strerror}") from None


class _Remarks(io.FileIO):
    """For standard error: work does not end because a remark on it has no place."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare() -> None:
    """Take over the streams. A letter that their encoding, or the terminal's locale, lacks is
    written in ASCII as far as there is one like it, else as ``\\uXXXX``."""
    codecs.register_error("ctrace", replaced)
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch(r"[0-9]{1,4}", os.environ.get(name, "0")):
            del os.environ[name]  # no screen is as large: a line of that many blanks takes minutes
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # Closed: a file that is opened later would take its place, and be printed into.
            # Reading only, so that writing to it fails as it should.
            os.open(os.devnull, os.O_RDONLY)
    if sys.stdin is None:  # it was closed
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = _stream(_Output(1, "w", closefd=False), sys.stdout)
    sys.stderr = _stream(_Remarks(2, "w", closefd=False), sys.stderr)


def _stream(raw: io.FileIO, before: Optional[TextIO]) -> TextIO:
    encoding = before.encoding if before is not None else "utf-8"
    # Python writes UTF-8 in the locale C, too. What goes to a file or a pipe stays as it is.
    if raw.isatty() and wants_ascii():
        encoding = "ascii"
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=encoding,
        errors="ctrace",
        line_buffering=raw.isatty() or raw.fileno() == 2,
    )


unsaid = ""
"""Why a verb that changes something could not say what it did; empty: it could."""


def drop() -> None:
    """Standard output has failed: discard the rest of it, without a last complaint."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def refused(error: BaseException) -> str:
    """In one line what the system refused."""
    if not isinstance(error, OSError):
        return "there is no memory left"
    where = f"{clean(error.filename)}: " if isinstance(error.filename, str) else ""
    return where + (error.strerror or str(error))


def number(value: float) -> str:
    """A count as the views write it, in letters that this terminal has."""
    from ctrace.view import format as fmt

    text = fmt.count(value)
    return fmt.ascii_only(text) if fmt.wants_ascii() else text


def remark(text: str) -> str:
    """One line of ours with its counts as ``number`` writes them."""
    return _COUNT.sub(lambda found: number(int(found[0].replace(",", ""))), text)


def prose(text: str) -> str:
    """Lines of ours with their numbers as ``number`` writes them."""
    from ctrace.view import format as fmt

    lines = "\n".join(map(fmt.prose, text.split("\n")))
    return fmt.ascii_only(lines) if fmt.wants_ascii() else lines


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


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """While the block runs a line on a terminal's standard error, from the second second on."""
    over = threading.Event()

    def tell() -> None:
        seconds = 2
        while not over.wait(2 if seconds == 2 else 1):
            sys.stderr.write(f"\r\033[Kctrace: {what}: {seconds} s so far")
            sys.stderr.flush()
            seconds += 1
        if seconds > 2:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()

    if not sys.stderr.isatty():
        yield
        return
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
