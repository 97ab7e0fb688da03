"""A stream as whole lines of plain bytes, whatever window, page or shell they were copied from."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import IO, Final

CHUNK: Final = 1 << 20
LINE: Final = 1 << 16
"""Bytes of a line; no tool prints longer ones."""
SNIFF: Final = 1 << 15
"""Bytes of a bundle's file in which something must be known, or the file is passed over."""
LONG: Final = b"x" * LINE  # stands for one that is longer

_COLOUR: Final = re.compile(rb"\x1b\[[0-9;?]{0,20}[A-Za-z]")
"""What ``grep --color`` and others tell a terminal, often within a word."""
_NO_BREAK: Final = "\N{NO-BREAK SPACE}".encode()
"""What pages have in place of several spaces."""


def chunks(stream: IO[bytes]) -> Iterator[bytes]:
    """Whole lines of a stream, in bounded memory; the first part of it is short."""
    rest, skipping = b"", False
    for part in _decoded(stream):
        data = rest + part
        end = data.rfind(b"\n") + 1
        data, rest = data[:end], data[end:]
        if skipping and end:
            skipping, data = False, LONG + data[data.index(b"\n") :]
        if data:
            yield _plain(data)
        if len(rest) > LINE:
            rest, skipping = b"", True
    if rest or skipping:
        yield _plain((LONG if skipping else rest) + b"\n")


def _decoded(stream: IO[bytes]) -> Iterator[bytes]:
    """Its bytes; those of UTF-16, which PowerShell writes, as UTF-8."""
    first = stream.read(SNIFF)
    wide = first[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    decoder = codecs.getincrementaldecoder("utf-16")("replace") if wide else None
    data = first.removeprefix(codecs.BOM_UTF8)
    while data:
        yield decoder.decode(data).encode("utf-8", "replace") if decoder else data
        data = stream.read(CHUNK)


def _plain(data: bytes) -> bytes:
    if b"\x1b[" in data:
        data = _COLOUR.sub(b"", data)
    if _NO_BREAK in data and b"src=" in data:  # rules may have one in a comment, and keep it
        data = data.replace(_NO_BREAK, b" ")
    return data
