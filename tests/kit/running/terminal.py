"""A command on a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

CTRACE = [sys.executable, "-m", "ctrace"]
UTF8 = {"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "TERM": "xterm-256color", "COLORTERM": "truecolor"}


def environment(**changed: str) -> dict[str, str]:
    kept = {
        k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "CTRACE_ASCII", "LC_CTYPE")
    }
    return {**kept, **UTF8, **changed}


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, argv: list[str], env: dict[str, str], size: tuple[int, int]) -> None:
        self.master, slave = pty.openpty()
        import fcntl
        import struct
        import termios

        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = subprocess.Popen(
            argv, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True
        )
        self.said = b""

    def until(self, wanted: bytes, timeout: float = 120.0) -> None:
        deadline = time.monotonic() + timeout
        while wanted not in self.said:
            assert time.monotonic() < deadline, self.said[-2000:]
            self.read(0.1)

    def read(self, timeout: float) -> None:
        if select.select([self.master], [], [], timeout)[0]:
            self.said += os.read(self.master, 1 << 16)

    def end(self, timeout: float = 60.0) -> int:
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "it did not end"
            self.read(0.1)
        self.read(0.1)
        return self.process.returncode

    def settings(self) -> list[object]:
        import termios

        return list(termios.tcgetattr(self.slave))


@contextmanager
def terminal(
    *arguments: str, program: list[str] = CTRACE, size: tuple[int, int] = (100, 30), **env: str
) -> Iterator[Terminal]:
    one = Terminal([*program, *arguments], environment(**env), size)
    try:
        yield one
    finally:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
        os.close(one.master)
        os.close(one.slave)
