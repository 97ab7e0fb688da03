"""Words of ``nft list ruleset``: lines to tokens, and tokens to values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*"|[{},;()]|[^\s{},;()"]+')
_PREFIX: Final = re.compile(r"([0-9a-fA-F:.]+)/(\d{1,3})")
_RANGE: Final = re.compile(r"(\d+)-(\d+)|([0-9a-fA-F:.]*[.:][0-9a-fA-F:.]*)-([0-9a-fA-F:.]+)")
MOST: Final = 100_000
"""Tokens of one line, with the elements that go on below it: what is more is cut off."""


class Quoted(str):
    """A word that stood in quotes: a name, whatever it looks like."""


class Tokens:
    """The words of one line, taken one by one; empty ones after its end."""

    def __init__(self, words: list[str]) -> None:
        self._words, self._at = words[:MOST], 0
        self.last_taken = ""

    @property
    def done(self) -> bool:
        """Whether all are taken."""
        return self._at >= len(self._words)

    def peek(self, ahead: int = 0) -> str:
        """The next word, or the one after it."""
        at = self._at + ahead
        return self._words[at] if at < len(self._words) else ""

    def take(self) -> str:
        """The next word. Raises IndexError at the end."""
        self.last_taken = self._words[self._at]
        self._at += 1
        return self.last_taken

    def skip(self, word: str) -> bool:
        """Take it if it is the next."""
        if self.peek() == word and not isinstance(self.peek(), Quoted):
            self._at += 1
            return True
        return False

    def rest(self, *, keep: bool = False) -> list[str]:
        """All that are left."""
        found = self._words[self._at :]
        if not keep:
            self._at = len(self._words)
        return found

    def last(self) -> str:
        """The last word of the line."""
        return self._words[-1] if self._words else ""


def lines(text: str) -> Iterator[Tokens]:
    """Each line that is not empty; elements of a set stand together, however many lines.

    Statements that share a line (``type ...; policy drop;``) stay together.
    """
    words: list[str] = []
    for raw in text.splitlines():
        line = re.sub(r"\s# handle \d+\s*$", "", raw)
        found = [Quoted(one[1:-1]) if one.startswith('"') else one for one in _TOKEN.findall(line)]
        if not found or found[0].startswith("#"):
            continue
        words += found
        if words[0] in ("elements", "devices") and len(words) < MOST and not _closed(words):
            continue
        yield Tokens(words)
        words = []
    if words:
        yield Tokens(words)


def _closed(words: list[str]) -> bool:
    return words[-1] == "}" and not isinstance(words[-1], Quoted)


def value(word: str) -> Any:
    """A number, prefix, range or plain word, as ``nft -j`` has it."""
    if isinstance(word, Quoted):
        return str(word)
    if re.fullmatch(r"\d{1,19}|0x[0-9a-fA-F]{1,16}", word):
        return int(word, 0) if word.startswith("0x") else int(word)
    prefix = _PREFIX.fullmatch(word)
    if prefix:
        return {"prefix": {"addr": prefix[1], "len": int(prefix[2])}}
    ends = _RANGE.fullmatch(word)
    if ends:
        low, high = (ends[1], ends[2]) if ends[1] else (ends[3], ends[4])
        return {"range": [int(low), int(high)] if ends[1] else [low, high]}
    return {"exists": True, "missing": False}.get(word, word)
