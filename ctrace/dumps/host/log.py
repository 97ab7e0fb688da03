"""Lines of the kernel's log, as dmesg, journalctl and syslog show them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Final, Optional

KEPT: Final = 1000
"""Messages kept with their times; all are counted."""

_SHAPE: Final = re.compile(
    r"(?:<\d+>)?(?:\w+\s*:\s*\w+\s*:\s*)?"
    r"(?:\[\s*(?P<boot>\d{1,12}\.\d{1,9})\]"
    r"|\[(?P<long>[A-Z][a-z]{2} [A-Z][a-z]{2} +\d+ [\d:]{8} \d{4})\]"
    r"|(?P<iso>\d{4}-\d\d-\d\d[T ][\d:]{8}(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?)"
    r"|(?P<short>[A-Z][a-z]{2} +\d{1,2} \d\d:\d\d:\d\d(?:\.\d+)?))\s+(?P<text>.*)"
)
_FROM: Final = re.compile(r"(?:\S+ kernel: )?(?:\[\s*(?P<boot>\d{1,12}\.\d{1,9})\] )?(?P<text>.*)")
_FULL: Final = re.compile(
    r"(?:nf|ip)_conntrack: (?:nf_conntrack: )?table full(?: in netns (\d{1,10}))?, ?dropping packet"
)
_SUPPRESSED: Final = re.compile(r"(\w*)ratelimit: (\d{1,12}) (?:callbacks|messages) suppressed")
_SIZES: Final = re.compile(r"nf_conntrack version \S+ \((\d{1,10}) buckets, (\d{1,10}) max\)")


@dataclass(frozen=True)
class Message:
    """One message that the table was full, or how many were suppressed."""

    when: str
    """The time as it stands in the log."""
    boot: Optional[float]
    """Seconds since boot; None where the log has no such time."""
    utc: Optional[float]
    """UTC seconds; None where year or zone are not told."""
    suppressed: int
    """0: it says that the table is full."""
    netns: int = 0
    """Inode of the namespace, where the kernel says it (not of the first one)."""


@dataclass
class Log:
    """What the kernel's log tells of the table."""

    lines: int = 0
    full: int = 0
    """Messages that it was full."""
    suppressed: int = 0
    """Messages that the rate limit of networking's warnings hid, next to them."""
    messages: list[Message] = field(default_factory=list)
    sizes: Optional[tuple[int, int]] = None
    """(buckets, max) as the module was loaded."""

    @property
    def refused(self) -> int:
        """Packets refused at least: one for each message, and one for each suppressed.

        The limit is shared by all of networking (net_ratelimit), so suppressed ones count
        only where a message that the table is full stands in the same log.
        """
        return self.full + (self.suppressed if self.full else 0)

    def take(self, line: str) -> bool:
        """Whether it is a line of a log; what tells of the table is kept."""
        shape = _SHAPE.match(line)
        if shape is None:
            return self._bare(line)
        self.lines += 1
        inner = _FROM.match(shape["text"])
        text = inner["text"] if inner else shape["text"]
        boot = shape["boot"] or (inner["boot"] if inner else None)
        when = next(t for t in (shape["boot"], shape["long"], shape["iso"], shape["short"]) if t)
        self._message(text, when, float(boot) if boot else None, utc(shape["iso"]))
        return True

    def _bare(self, line: str) -> bool:
        """A message without any time."""
        if not (_FULL.search(line[:200]) or _SUPPRESSED.search(line[:200])):
            return False
        self.lines += 1
        self._message(line, "", None, None)
        return True

    def _message(self, text: str, when: str, boot: Optional[float], utc: Optional[float]) -> None:
        full, suppressed = _FULL.search(text), _SUPPRESSED.search(text)
        sizes = _SIZES.search(text)
        if sizes:
            self.sizes = int(sizes[1]), int(sizes[2])
        if full:
            self.full += 1
            self._keep(Message(when, boot, utc, 0, int(full[1] or 0)))
        elif suppressed:
            self.suppressed += int(suppressed[2])
            self._keep(Message(when, boot, utc, int(suppressed[2])))

    def _keep(self, message: Message) -> None:
        if len(self.messages) >= KEPT:
            self.messages.pop()  # the first ones and the last one tell from when to when
        self.messages.append(message)


def utc(iso: Optional[str]) -> Optional[float]:
    """UTC seconds of an ISO time that has its zone."""
    if not iso or not re.search(r"(Z|[+-]\d\d:?\d\d)$", iso):
        return None
    text = re.sub(r"([+-]\d\d)(\d\d)$", r"\1:\2", iso.replace(",", ".").replace("Z", "+00:00"))
    text = re.sub(r"\.(\d+)", lambda part: "." + part[1][:6].ljust(6, "0"), text)
    try:
        return datetime.fromisoformat(text).astimezone(timezone.utc).timestamp()
    except (ValueError, OverflowError):
        return None
