"""Names that others chose, made harmless where they enter.

Who may name a process, a cgroup, a container, a namespace or a chain, or writes a
recording, must not reach the terminal of who looks at it.
"""

from __future__ import annotations

import unicodedata
from typing import Final

_HIDDEN: Final = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Me"))
_RIGHT_TO_LEFT: Final = frozenset(("R", "AL", "AN", "RLE", "RLO", "RLI", "LRE", "LRO", "LRI"))
_MARKS_IN_A_ROW: Final = 2


def clean(text: str) -> str:
    """A name that can do no harm on a screen.

    Control characters, invisible and bidirectional formatting, right-to-left letters
    (which make a terminal reorder the numbers beside them) and piles of combining marks
    become visible escapes such as ``\\x1b`` or ``\\u202e``.
    """
    if text.isascii() and text.isprintable():
        return text
    out: list[str] = []
    marks = 0
    for char in text:
        category = unicodedata.category(char)
        marks = marks + 1 if category in ("Mn", "Mc") else 0
        if (
            category in _HIDDEN
            or marks > _MARKS_IN_A_ROW
            or (marks and not out)
            or unicodedata.bidirectional(char) in _RIGHT_TO_LEFT
        ):
            out.append(_escape(char))
        else:
            out.append(char)
    return "".join(out)


def _escape(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
