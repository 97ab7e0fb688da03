"""Lines inside something else: a page's tags, the strings of JSON, a list's marks."""

from __future__ import annotations

import html
import re
from typing import Final

_TAG: Final = re.compile(r"</?[a-zA-Z][^<>]{0,200}>")
_BREAK: Final = re.compile(r"\\r?\\n|\\n|<br ?/?>|\",\s{0,20}\"")
_MARKS: Final = re.compile(r"\\[rt\"]|[\"'`]|\A\s*(?:\+|[-*] )")


def bare(line: bytes) -> list[bytes]:
    """The lines in it without markup and quotation marks; empty if it has none."""
    text = line.decode("latin-1")
    parts = [
        _MARKS.sub(" ", html.unescape(_TAG.sub(" ", part))).encode("latin-1", "replace")
        for part in _BREAK.split(text)
    ]
    return [] if parts == [line] else parts
