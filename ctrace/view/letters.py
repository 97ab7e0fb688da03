"""The letters that views draw with, and ASCII for terminals that lack them.

Loads nothing: every verb needs it for its output, also for an error in one line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final, Optional

THIN: Final = "\u202f"
ELLIPSIS: Final = "…"
ARROW: Final = "→"
RAMP: Final = "▁▂▃▄▅▆▇█"
EIGHTHS: Final = "▏▎▍▌▋▊▉"

ASCII: Final[dict[int, str]] = str.maketrans(
    dict(zip(RAMP + EIGHTHS, "_.-:=+*#" + "..--==="))
    | {
        THIN: ",", "\u00a0": " ", ELLIPSIS: "~", ARROW: ">", "←": "<", "↑": "^", "↓": "v",
        "▒": "=", "░": ".", "▐": "|", "│": "|", "─": "-", "┄": "-", "━": "=", "┃": "|",
        "┌": "+", "┐": "+", "└": "+", "┘": "+", "├": "+", "┤": "+", "┬": "+", "┴": "+", "┼": "+",
        "·": ".", "•": "*", "●": "*", "○": "o", "▶": ">", "▸": ">", "‖": "=", "✓": "+", "✗": "x",
        "µ": "u", "≥": ">", "≤": "<", "\u00d7": "x", "±": "~", "\u2013": "-", "—": "-",
        "\u2019": "'", "“": '"', "”": '"', "▲": "^", "▼": "*", "◆": "*", "⚠": "!",
    }
)  # fmt: skip
"""One ASCII character for each of ours, so that a line keeps its columns."""


def wants_ascii(environ: Optional[Mapping[str, str]] = None) -> bool:
    """Whether this terminal should get ASCII only.

    ``CTRACE_ASCII`` decides when it is set (``0`` asks for Unicode). Else a locale that
    is not UTF-8 does, and the Linux console, whose font lacks most of our characters.
    Python itself turns ``LANG=C`` into ``LC_CTYPE=C.UTF-8`` (PEP 538): seen through here.
    """
    environ = os.environ if environ is None else environ
    asked = environ.get("CTRACE_ASCII", "")
    if asked:
        return asked != "0"
    if environ.get("TERM") == "linux":
        return True
    overall, ctype, lang = (environ.get(name, "") for name in ("LC_ALL", "LC_CTYPE", "LANG"))
    if not overall and lang in ("", "C", "POSIX") and ctype in ("C.UTF-8", "C.utf8", "UTF-8"):
        return True
    locale = (overall or ctype or lang).lower().replace("-", "")
    return not locale.endswith("utf8")


def ascii_only(text: str) -> str:
    """The same text in ASCII, cell for cell; characters without an equivalent become ``?``."""
    if text.isascii():
        return text
    text = text.translate(ASCII)
    return text if text.isascii() else "".join(map(_ascii_char, text))


def _ascii_char(char: str) -> str:
    if char.isascii():
        return char
    from rich.cells import cell_len

    return "?" * cell_len(char)


def replaced(error: UnicodeError) -> tuple[str, int]:
    """An error handler for encoding: ASCII where there is a letter of ours, else ``\\uXXXX``."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(ASCII)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end
