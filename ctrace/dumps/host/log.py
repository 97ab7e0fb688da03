"""Lines of the kernel's log, as dmesg, journalctl and syslog show them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Final, Optional

KEPT: Final = 1000
"""Messages kept with their times; all are counted."""
DIFFERENT: Final = 100_000
"""Messages of one text that are told apart; what comes after is compared with the later ones."""
_Key = tuple[str, int]
"""The time as it stands there, and how many messages were hidden (0: it was full)."""

_MONTH: Final = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
_CLOCK: Final = r"\d\d:\d\d:\d\d(?:[.,]\d{1,9})?"
_SHAPE: Final = re.compile(
    r"(?:<\d+>(?:1 (?=\d{4}-))?)?(?:kernel: (?=\[)|\w+\s*:\s*\w+\s*:\s*)?"
    r"(?:\[\s*(?P<boot>\d{1,12}\.\d{1,9})(?:,\d+)?\](?:\[\s*[TC]\d+\])?"
    # dmesg -T, -H and its differences to the line before
    rf"|\[(?P<long>[A-Z][a-z]{{2}} {_MONTH} +\d+ {_CLOCK} \d{{4}}|{_MONTH} *\d+ \d\d:\d\d)\]"
    r"|\[\s*(?P<since>\+\d{1,12}\.\d{1,9})\]"
    r"|(?P<iso>\d{4}-\d\d-\d\d[T ][\d:]{8}(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?)"
    # journalctl -o short-full and short-unix, /dev/kmsg
    r"|[A-Z][a-z]{2} (?P<full>\d{4}-\d\d-\d\d [\d:]{8}(?:\.\d+)? [A-Z]{2,5})"
    r"|(?P<unix>\d{9,10}\.\d{6})"
    r"|\d{1,3},\d{1,12},(?P<kmsg>\d{1,18}),[^;\s]{1,40};\s?(?=\S)"
    # syslog, also with the year, as OpenWrt's logread and routers have it
    rf"|(?P<short>(?:[A-Z][a-z]{{2}} )?(?:\d{{4}} )?{_MONTH} +\d{{1,2}} (?:\d{{4}} )?{_CLOCK}"
    r"(?: \d{4}(?= ))?|\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}(?=\s+\d+\s+\d+ [VDIWEF] )))"
    r"(?(kmsg)|\s+)(?P<text>.*)"
)
_FROM: Final = re.compile(
    r"(?:\S+ (?:\w+\.\w+ )?kernel: |\w+\.\w+ kernel: )?"
    r"(?:\[\s*(?P<boot>\d{1,12}\.\d{1,9})\] )?(?P<text>.*)"
)
_TIMES: Final = ("boot", "long", "since", "iso", "full", "unix", "kmsg", "short")
_JSON: Final = re.compile(r'\{.*"MESSAGE"\s*:\s*"([^"]{1,400})"')
_JSON_TIME: Final = re.compile(r'"__REALTIME_TIMESTAMP"\s*:\s*"(\d{10,16})\d{6}"')
_FULL: Final = re.compile(
    r"(?:nf|ip)_conntrack: (?:nf_conntrack: |VPS \d+ )?table full(?: in netns (\d{1,10}))?,"
    r" ?(?:dropping packet|$)"
)
_SUPPRESSED: Final = re.compile(
    r"(?:\w*ratelimit|printk|NET): (\d{1,12}) (?:callbacks|messages) suppressed"
)
"""``net_ratelimit``; before Linux 2.6.26 all of the kernel shared one limit, ``printk``."""
_KLOG: Final = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d{1,9} +\d{1,10} \S{1,200}:\d{1,6}\] ")
"""A line of a Kubernetes component's log."""
_HEADING: Final = re.compile(r"-- (?:Logs|Journal) begins? |-- (?:Re)?[Bb]oot|-- No entries")
_SIZES: Final = re.compile(r"nf_conntrack version \S+ \((\d{1,10}) buckets, (\d{1,10}) max\)")


@dataclass(frozen=True)
class Message:
    """One message that the table was full, or how many were suppressed."""

    when: str
    """The time as written in the log."""
    boot: Optional[float]
    """Seconds since boot; None where the log has no such time."""
    utc: Optional[float]
    """UTC seconds; None where year or zone are not told."""
    suppressed: int
    """0: the message says that the table is full."""
    netns: int = 0
    """Inode of the namespace, where the kernel says it (not of the first one)."""


@dataclass
class Log:
    """What the kernel's log says about the table."""

    lines: int = 0
    messages: list[Message] = field(default_factory=list)
    """The first ones and the last."""
    spaces: set[int] = field(default_factory=set)
    """Inodes of the namespaces whose tables were full; 0 for the first one, and where the kernel
    does not tell."""
    sizes: Optional[tuple[int, int]] = None
    """(buckets, max) as the module was loaded."""

    _logs: dict[str, Counter[_Key]] = field(default_factory=dict)
    """By the form of their times, how often each message occurs: bundles have the same message in
    several files."""
    _text: Counter[_Key] = field(default_factory=Counter)
    """The same for the text being read."""
    _form: str = ""

    def begin(self) -> None:
        """Another text begins: messages that it repeats from earlier ones are not counted again."""
        if self._text:
            known = self._logs.setdefault(self._form, Counter())
            known |= self._text
        self._text, self._form = Counter(), ""

    def _most(self) -> tuple[int, int]:
        """(messages that it was full, messages hidden), from the log with the most of them."""
        logs = dict(self._logs)
        logs[self._form] = logs.get(self._form, Counter()) | self._text
        sums = [
            (
                sum(n for (_, hid), n in log.items() if not hid),
                sum(n * hid for (_, hid), n in log.items()),
            )
            for log in logs.values()
        ]
        return max(sums, key=lambda one: (one[0] > 0, sum(one)))

    @property
    def full(self) -> int:
        """Messages that it was full."""
        return self._most()[0]

    @property
    def suppressed(self) -> int:
        """Messages that the rate limit of networking's warnings hid, next to them."""
        return self._most()[1]

    @property
    def refused(self) -> int:
        """Packets refused at least: one for each message, and one for each suppressed.

        The limit is shared by all of networking (net_ratelimit), so suppressed ones count
        only where a message that the table is full stands in the same log.
        """
        full, suppressed = self._most()
        return full + (suppressed if full else 0)

    def take(self, line: str) -> bool:
        """Whether it is a line of a log; messages about the table are kept."""
        shape = _SHAPE.match(line)
        if shape is None:
            return self._bare(line)
        self.lines += 1
        inner = _FROM.match(shape["text"])
        text = inner["text"] if inner else shape["text"]
        boot = shape["boot"] or (inner["boot"] if inner else None)
        seconds = float(boot) if boot else None
        if shape["kmsg"]:
            seconds = int(shape["kmsg"]) / 1e6
        at = float(shape["unix"]) if shape["unix"] else utc(shape["iso"] or _zoned(shape["full"]))
        form = next(name for name in _TIMES if shape[name])
        when = f"{seconds:.6f}" if shape["kmsg"] else shape[form]
        self._message(text, form, when, seconds, at)
        return True

    def _bare(self, line: str) -> bool:
        """A message without any time, or in the journal's JSON; what journalctl says itself."""
        said = _JSON.match(line)
        if said:
            at = _JSON_TIME.search(line)
            self.lines += 1
            self._message(said[1], "json", at[1] if at else "", None, float(at[1]) if at else None)
            return True
        if not (_FULL.search(line[:200]) or _SUPPRESSED.search(line[:200])):
            return bool(_HEADING.match(line) or _KLOG.match(line))
        self.lines += 1
        self._message(line, "none", "", None, None)
        return True

    def _message(
        self, text: str, form: str, when: str, boot: Optional[float], utc: Optional[float]
    ) -> None:
        full, suppressed = _FULL.search(text), _SUPPRESSED.search(text)
        sizes = _SIZES.search(text)
        if sizes:
            self.sizes = int(sizes[1]), int(sizes[2])
        if not (full or suppressed):
            return
        hid = int(suppressed[1]) if suppressed and not full else 0
        if full and len(self.spaces) < KEPT:
            self.spaces.add(int(full[1] or 0))
        self._form = self._form or form
        key = when, hid
        self._text[key] += 1
        if len(self._text) > DIFFERENT:
            self.begin()
        if self._text[key] > self._logs.get(self._form, Counter())[key]:
            self._keep(Message(when, boot, utc, hid, int(full[1] or 0) if full else 0))

    def _keep(self, message: Message) -> None:
        if len(self.messages) >= KEPT:
            self.messages.pop()
        self.messages.append(message)


def _zoned(full: Optional[str]) -> Optional[str]:
    """``2024-07-29 11:02:03 UTC`` as ISO time; of other zones only the name is kept."""
    return full[:-4] + "Z" if full and full.endswith(" UTC") else None


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
