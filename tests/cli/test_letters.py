"""What is printed suits the terminal: its locale may lack the letters that views draw with."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

SAY = "from ctrace.cli import output; output.prepare(); print('1\\u202f000 → ▇ ñ', flush=True)"
PLAIN, DRAWN = "1,000 > * \\xf1", "1\u202f000 → ▇ ñ"


def printed(locale: str, *, terminal: bool) -> str:
    """What reaches a terminal, or a pipe."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LC_")}
    environ |= {"LC_ALL": locale, "TERM": "xterm"}
    environ.pop("CTRACE_ASCII", None)
    reader, writer = pty.openpty() if terminal else os.pipe()
    with subprocess.Popen([sys.executable, "-c", SAY], stdout=writer, env=environ) as child:
        os.close(writer)
        out = b""
        try:
            while more := os.read(reader, 4096):
                out += more
        except OSError:  # so a terminal says that nobody has it open any more
            pass
        finally:
            os.close(reader)
        assert child.wait(60) == 0
    return out.decode().strip()


@pytest.mark.parametrize(
    ("locale", "terminal", "wanted"),
    [
        ("C", True, PLAIN),
        ("C.UTF-8", True, DRAWN),
        ("C", False, DRAWN),  # a file is read elsewhere
    ],
)
def test_a_terminal_gets_the_letters_that_its_locale_has(
    locale: str, terminal: bool, wanted: str
) -> None:
    assert printed(locale, terminal=terminal) == wanted
