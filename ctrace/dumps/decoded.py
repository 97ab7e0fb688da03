"""A stream as whole lines of plain bytes, whatever window, page or shell they were copied from."""

from __future__ import annotations

import codecs
import html
import re
from collections.abc import Iterator
from typing import IO, Final

from ctrace.errors import CtraceError

CHUNK: Final = 1 << 20
LINE: Final = 1 << 16
"""Bytes of a line; no tool prints longer ones."""
SNIFF: Final = 1 << 15
"""Bytes of a bundle's file in which something must be known, or the file is passed over."""
RULES: Final = b'{"nftables"'
"""What ``nft -j`` prints begins so, and is one line, however many rules there are."""
RULES_LINE: Final = 8 << 20
MAILED: Final = 1 << 13
"""Bytes of a line that mail broke into several, at most."""
LONG: Final = b"x" * LINE  # stands for one that is longer
NO_TEXT: Final = 256 << 20
"""Bytes of lines that are too long, in one stream: what has more is data, and may never end."""

_COLOUR: Final = re.compile(
    rb"\x1b(?:\[[0-9;?]{0,20}[A-Za-z]|\][^\x07\x1b\n]{0,400}(?:\x07|\x1b\\))"
)
"""What ``grep --color`` and others tell a terminal, often within a word; and its window's title."""
_WRITTEN: Final = (b"^[[", b"ESC[", b"\\x1b[", b"\\033[", b"\\u001b[", b"#033[")
"""How it begins as pagers, JSON and rsyslog write it."""
_ESCAPED: Final = re.compile(rb"^[^\n]*(?:src=|&lt;)[^\n]*$", re.M)
"""Lines in which a page's entities are made characters: rules may have some in a comment."""
_ENTITY: Final = re.compile(rb"&(?:#\d{1,5}|#x[0-9a-fA-F]{1,4}|lt|gt|amp|quot|apos|nbsp);")
_QUOTED: Final = re.compile(rb"(?:> ?)+")
"""What mails put in front of a line that they quote."""
_MAILED: Final = re.compile(rb"(?:src|port|mark)=3D")
"""An equal sign as mail has it (quoted-printable)."""
_NULS: Final = re.compile(rb"\0+")
_INVISIBLE: Final = (codecs.BOM_UTF8, "\N{ZERO WIDTH SPACE}".encode())
"""What stands where one text was put behind another, and in what pages show."""
_NO_BREAK: Final = "\N{NO-BREAK SPACE}".encode()
"""What pages have in place of several spaces."""
_NO_BREAK_LATIN: Final = re.compile(rb"(?<=[ -~])\xa0+")
"""The same in Latin-1: not within a character of UTF-8."""


def chunks(stream: IO[bytes], name: str) -> Iterator[bytes]:
    """Whole lines of a stream, in bounded memory; the first part of it is short. Nothing of a part
    in which no line ends.

    Raises CtraceError with its name where it is no text.
    """
    rest, skipping, skipped = b"", False, 0
    for part in _decoded(stream):
        data = rest + part
        end = data.rfind(b"\n") + 1
        data, rest = data[:end], data[end:]
        if skipping and end:
            skipping, data = False, LONG + data[data.index(b"\n") :]
        if data or skipping:
            yield _plain(data)
        if len(rest) > (RULES_LINE if rest.startswith(RULES) else LINE):
            skipped += len(rest)
            if skipped > NO_TEXT:
                raise CtraceError(f"{name} is not text: most of it has no ends of lines")
            rest, skipping = b"", True
    if rest or skipping:
        yield _plain((LONG if skipping else rest) + b"\n")


def _decoded(stream: IO[bytes]) -> Iterator[bytes]:
    """Its bytes; those of UTF-16, which PowerShell writes, as UTF-8, and carriage returns alone
    as ends of lines."""
    first = stream.read(SNIFF)
    wide = _wide(first)
    decoder = codecs.getincrementaldecoder(wide)("replace") if wide else None
    returns = b"\n" not in first
    data = first.removeprefix(codecs.BOM_UTF8)
    while data:
        text = decoder.decode(data).encode("utf-8", "replace") if decoder else data
        yield text.replace(b"\r", b"\n") if returns else text
        data = stream.read(CHUNK)


def _wide(first: bytes) -> str:
    """The name of an encoding with several bytes a character, or nothing: not every text has a
    mark."""
    if first[:4] in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return "utf-32"
    if first[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    some = first[:64] if len(first) > 8 else b"00"
    low, high = any(some[::2]), any(some[1::2])
    return {(True, False): "utf-16-le", (False, True): "utf-16-be"}.get((low, high), "")


def _plain(data: bytes) -> bytes:
    for written in _WRITTEN:
        if written in data:
            data = data.replace(written, b"\x1b[")
    if b"\x1b" in data:
        data = _COLOUR.sub(b"", data)
    if b"&" in data and _ENTITY.search(data):
        data = _ESCAPED.sub(lambda line: _ENTITY.sub(_character, line[0]), data)
    for mark in _INVISIBLE:
        if mark in data:
            data = data.replace(mark, b"")
    if b"\0" in data:  # a crash leaves them in a log
        data = _NULS.sub(b"\n", data)
    if _NO_BREAK in data and b"src=" in data:  # rules may have one in a comment, and keep it
        data = data.replace(_NO_BREAK, b" ")
    elif b"\xa0 " in data and b"src=" in data:
        data = _NO_BREAK_LATIN.sub(b" ", data)
    return data


def _character(entity: re.Match[bytes]) -> bytes:
    return html.unescape(entity[0].decode("ascii")).encode("utf-8", "replace")


def unmailed(line: bytes) -> tuple[bytes, bytes]:
    """A line without what mail has done to it; or nothing, and what its next line goes on with."""
    quoted = _QUOTED.match(line)
    if quoted:
        line = line[quoted.end() :]
    if not _MAILED.search(line):
        return line, b""
    if line.endswith(b"=") and len(line) < MAILED:
        return b"", line[:-1]
    return line.replace(b"=3D", b"="), b""
