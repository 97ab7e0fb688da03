"""Entries that a mail, a page or a terminal broke into several lines."""

from __future__ import annotations

import re
from typing import Final, Optional

from ctrace.dumps.entries.lines import row
from ctrace.dumps.entries.words import Bad

MOST: Final = 8192
_MORE: Final = re.compile(
    rb"^[>|\s]*((?:(?:src|dst|sport|dport|type|code|id|srckey|dstkey|packets|bytes|mark|zone|use"
    rb"|secctx)=|\[(?:UNREPLIED|ASSURED|OFFLOAD|HW_OFFLOAD)\]).*)$",
    re.S,
)
_BROKEN: Final = re.compile(rb"(?:^|[\s>|])(?:tcp|udp|icmp|icmpv6|sctp|gre|dccp)\s+\d{1,3}\s.*\\$")
_TORN: Final = re.compile(
    rb"[^\s\[]{1,60}(?:\s+(?:\[[A-Z_]{1,20}\]|[a-z][\w-]{0,20}=\S*))*(?:\s+\[?[\w.:-]{0,40})?\s*"
    rb"|[A-Z_]{1,20}\](?:\s.*)?"
)
"""What may follow a line that a terminal broke within a word."""
_WORD: Final = re.compile(
    rb"(?:src|dst|sport|dport|type|code|id|srckey|dstkey|packets|bytes|mark|zone|use|secctx|secmark)"
    rb"=[\w.:/-]*|\[(?:UNREPLIED|ASSURED|OFFLOAD|HW_OFFLOAD)\]|[A-Z_]{4,12}"
)
NARROW: Final = 60
"""Columns that a terminal has at least."""
Line = tuple[bytes, int]
"""Its text and number."""


def goes_on(line: bytes) -> bool:
    """Whether a line looks like the rest of an entry."""
    return _MORE.match(line) is not None or (b"=" in line and _TORN.fullmatch(line) is not None)


def is_entry(line: bytes) -> bool:
    """Whether a line by itself is an entry."""
    try:
        row(line)
    except Bad:
        return False
    return len(line) <= MOST


def _torn(before: bytes, line: bytes) -> bool:
    """Whether the end of ``before`` and the beginning of a line are one word."""
    if len(before) < NARROW or not before.count(b"=") or not _TORN.fullmatch(line):
        return False
    if not (re.search(rb"[]=]", line) or before.endswith(b"=")):
        return False  # it may be a number that stands for itself
    return _WORD.fullmatch(before.rsplit(None, 1)[-1] + line.split(None, 1)[0]) is not None


class Wrapped:
    """Holds an entry that may continue in the next line."""

    def __init__(self) -> None:
        self._open: Optional[Line] = None
        self._reason = ""
        self._whole: Optional[Line] = None
        self._at = 0
        """Number of the line being read."""

    @property
    def is_open(self) -> bool:
        """Whether a partial entry waits for its rest."""
        return self._open is not None

    def begin(self, line: bytes, number: int, reason: str) -> None:
        """An entry without its end: ``reason`` says what is missing."""
        self._open, self._reason, self._whole = (line.strip(), number), reason, None

    def whole(self, line: bytes) -> None:
        """An entry was read; the next line may still belong to it."""
        self._whole = line.strip(), self._at

    def breaks(self, line: bytes, number: int) -> bool:
        """Whether a line ends in a backslash in the middle of an entry."""
        bare = line.strip()
        if self.is_open or len(bare) > MOST or not _BROKEN.search(bare):
            return False
        self.begin(bare[:-1], number, "cut off at its backslash")
        return True

    def more(self, line: bytes, number: int) -> Optional[tuple[Line, bool]]:
        """The entry with this line as its rest, and whether it was taken as whole before; None
        where the line is something else."""
        before, was_whole = self._open, False
        self._at = number
        if before is None and self._whole is not None and self._whole[1] == number - 1:
            before, was_whole = self._whole, True
        self._whole = None
        if before is None or len(before[0]) > MOST:
            return None
        said, space = _MORE.match(line), b" "
        if said is None and _torn(before[0], line):
            space = b""
        elif said is None:
            return None
        self._open = None
        rest = (said[1] if said else line).strip()
        ended = rest[:-1] if rest.endswith(b"\\") else rest
        joined = before[0] + space + ended, before[1]
        if was_whole and len(ended) == len(rest) and not is_entry(joined[0]):
            return None  # then it was no rest, and what came before stays what it was
        if len(ended) < len(rest):
            self.begin(*joined, self._reason)
        return joined, was_whole

    def lost(self) -> Optional[tuple[int, str]]:
        """(number, reason) of the part whose rest never came; forgets it."""
        found = (self._open[1], self._reason) if self._open else None
        self._open = self._whole = None
        return found
