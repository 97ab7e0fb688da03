"""Lines of the kernel's log, as dmesg, journalctl and syslog show them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Final, Optional

from ctrace.dumps.host.journal import Fields

KEPT: Final = 1000
"""Messages kept with their times; all are counted."""
DIFFERENT: Final = 100_000
"""Messages of one text that are told apart; further ones are compared with the latest only."""
_Key = tuple[str, str, int]
"""The form of its time, the time, and the number of suppressed messages (0: the table was full).
Times since boot are one form, wherever they stand."""

_MONTH: Final = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
_CLOCK: Final = r"\d\d:\d\d:\d\d(?:[.,]\d{1,9})?"
_SHAPE: Final = re.compile(
    r"(?:<\d+>(?:1 (?=\d{4}-))?)?(?:kernel: (?=\[)|\w+\s*:\s*\w+\s*:\s*)?"
    r"(?:\[\s*(?P<boot>\d{1,12}\.\d{1,9})(?:,\d+| <\s*[+\d.]+ ?>)?\](?:\[\s*[TC]\d+\])?"
    # dmesg -T, -H and its differences to the line before
    rf"|\[(?:(?P<long>[A-Z][a-z]{{2}} {_MONTH} +\d+ {_CLOCK} \d{{4}})"
    rf"|(?P<human>{_MONTH} *\d+ \d\d:\d\d))\]"
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
    r"(?:std(?:out|err) F )?"
    r"(?:(?P<host>(?!(?:kern|user|daemon|syslog|local\d)\.[a-z]+ )\S+) (?:\w+\.\w+ )?"
    r"kernel(?:\[\d+\])?: |\w+\.\w+ kernel: )?"
    r"(?:\[\s*(?P<boot>\d{1,12}\.\d{1,9})\] )?(?P<text>.*)"
)
_TIMES: Final = ("boot", "long", "human", "since", "iso", "full", "unix", "kmsg", "short")
_LATER: Final = re.compile(r"(?<=[\s:|>}\])\"])(?=[\[<A-Z\d])")
"""Where a time may begin, behind what grep, containers and mails put in front of it."""
_FOREIGN: Final = re.compile(
    r"(?:[^\s:>[]{1,12} {1,2}){0,3}\d\d?:\d\d:\d\d(?:[.,]\d{1,9})?"
    r"(?: \d{4}(?=\]))?"
)
"""A time whose month is written in another language."""
_CUT: Final = re.compile(r"kernel: (?:\[[ \d.]*\] )?$|\] $|\A(?:ernel|rnel|nel|el|l)?: $")
"""What stands before a message in a line whose own beginning is missing."""
_WHOLE: Final = re.compile(r"\[|\d{1,4}[./-]\d{1,2}[./-]\d{1,4}[, T]")
"""The beginning of a line that has its own."""
_ISO: Final = re.compile(
    r"(?<!\d)\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)"
)
_AGAIN: Final = re.compile(r"\b(?P<last>last )?message repeated (?P<times>\d{1,9}) times")
_NO_NAME: Final = re.compile(r"localhost\b|[\d.:]+$|.*:$")
_ELIDED: Final = r"(?:>|\.\.\.|\?\?\?)"
"""What a pager shows at its window's edge; an ellipsis stands as three question marks."""
_FULL: Final = re.compile(
    r"(?:nf|ip)_conntrack: (?:nf_conntrack: |VPS \d+ )?table full(?: in netns (\d{1,10}))?"
    rf"(?:, ?(?:dropping packet|[dropingacket ]{{0,15}}{_ELIDED}?$)|{_ELIDED}$)"
)
_SUPPRESSED: Final = re.compile(
    r"(?:\w*ratelimit|printk|NET): (\d{1,12}) "
    rf"(?:(?:callbacks|messages) suppressed|[calbkmesgupr]{{1,9}} ?[suprem]{{0,8}}{_ELIDED}$)"
)
"""``net_ratelimit``; before Linux 2.6.26 all of the kernel shared one limit, ``printk``."""
_KLOG: Final = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d{1,9} +\d{1,10} \S{1,200}:\d{1,6}\] ")
"""A line of a Kubernetes component's log."""
_HEADING: Final = re.compile(r"-- (?:Logs|Journal) begins? |-- (?:Re)?[Bb]oot|-- No entries")
_SIZES: Final = re.compile(
    r"(?:nf|ip)_conntrack version \S+ \((\d{1,10}) buckets, (\d{1,10}) max\)"
)


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
    form: str = ""
    """Of its time."""


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
    hosts: set[str] = field(default_factory=set)
    """Those that the messages about the table are of, where a line names one."""

    _known: Counter[_Key] = field(default_factory=Counter)
    """How often each message occurs: bundles have the same message in several files."""
    _text: Counter[_Key] = field(default_factory=Counter)
    """The same for the text being read."""
    _form: str = ""
    _fields: Fields = field(default_factory=Fields)
    _begun: int = 0
    """Lines before the text being read."""
    _before: str = ""
    """The message before, if it was about the table."""

    def begin(self) -> None:
        """Another text begins: messages that it repeats from earlier ones are not counted again."""
        self._fold()
        self._form = ""
        self._fields, self._before, self._begun = Fields(), "", self.lines

    def _fold(self) -> None:
        self._known |= self._text
        self._text = Counter()

    def counted(self, times: int) -> None:
        """Somebody counted its messages that the table was full."""
        self._known["counted", "", 0] = max(times, self._known["counted", "", 0])

    @property
    def main(self) -> list[Message]:
        """Those of the log with the most: others may be the same ones with other times."""
        form, _ = self._most()
        return [one for one in self.messages if one.form == form] or self.messages

    def _most(self) -> tuple[str, tuple[int, int]]:
        """The log with the most messages, by the form of its times: (how many that it was full,
        how many hidden)."""
        sums: dict[str, tuple[int, int]] = {"": (0, 0)}
        for (form, _, hid), n in (self._known | self._text).items():
            full, hidden = sums.get(form, (0, 0))
            sums[form] = full + n * (not hid), hidden + n * hid
        return max(sums.items(), key=lambda one: (one[1][0] > 0, sum(one[1])))

    @property
    def full(self) -> int:
        """Messages that it was full."""
        return self._most()[1][0]

    @property
    def suppressed(self) -> int:
        """Messages that the rate limit of networking's warnings hid, next to them."""
        return self._most()[1][1]

    @property
    def refused(self) -> int:
        """Packets refused at least: one for each message, and one for each suppressed.

        The limit is shared by all of networking (net_ratelimit), so suppressed ones count
        only where a message that the table is full stands in the same log.
        """
        _, (full, suppressed) = self._most()
        return full + (suppressed if full else 0)

    def take(self, line: str) -> bool:
        """Whether it is a line of a log; messages about the table are kept."""
        shape = _SHAPE.match(line)
        if shape is None:
            return self._bare(line)
        self._shaped(shape)
        return True

    def _shaped(self, shape: re.Match[str]) -> None:
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
        if text.startswith("[s="):  # what it says is in the fields below (journalctl -o verbose)
            self._fields.begin(when)
            return
        about = self._message(text, form, when, seconds, at)
        if about and inner and inner["host"] and len(self.hosts) < KEPT:
            name = inner["host"].lower().partition(".")[0]
            self.hosts |= set() if _NO_NAME.match(inner["host"]) else {name}

    def _bare(self, line: str) -> bool:
        """A message whose time is elsewhere, or that has none; what journalctl says itself."""
        if self._fields.take(line):
            self.lines += 1
            for text, boot, at, when in self._fields.told():
                self._message(text, "fields", when, boot, at)
            return True
        said = _FULL.search(line) or _SUPPRESSED.search(line) or _SIZES.search(line)
        if not said:
            rest = self._before and line.rstrip(".") == "dropping packet"  # broken into two lines
            return bool(rest or _HEADING.match(line) or _KLOG.match(line))
        at = said.start()
        for begins in _LATER.finditer(line, 0, at + 1):
            shape = _SHAPE.match(line, begins.start())
            if shape and shape.start("text") <= at:
                self._shaped(shape)
                return True
        clock = _FOREIGN.search(line[:at])
        form = ("long" if line[0] == "[" else "short") if clock else "none"
        iso = _ISO.search(line)
        if iso:  # in JSON also behind the message
            form, clock = "iso", iso
        elif self.lines == self._begun and not _WHOLE.match(line) and _CUT.search(line, 0, at):
            form = ""  # of the same log as the next
        self.lines += 1
        self._message(line, form, clock[0] if clock else "", None, utc(iso[0]) if iso else None)
        return True

    def _message(
        self, text: str, form: str, when: str, boot: Optional[float], utc: Optional[float]
    ) -> bool:
        """Whether it is about the table."""
        again = _AGAIN.search(text)
        if again and again["last"]:
            text = self._before
        full, suppressed = _FULL.search(text), _SUPPRESSED.search(text)
        sizes = _SIZES.search(text)
        if sizes:
            self.sizes = int(sizes[1]), int(sizes[2])
        self._before = text if full or suppressed else ""
        if not (full or suppressed):
            return False
        hid = int(suppressed[1]) if suppressed and not full else 0
        if full and len(self.spaces) < KEPT:
            self.spaces.add(int(full[1] or 0))
        if form == "since":  # dmesg -H: the first of a minute has another
            form = "human"
        key = ("boot", f"{boot:.6f}", hid) if boot is not None else (form, when, hid)
        if not self._form:
            self._text = Counter({(key[0], *old[1:]): n for old, n in self._text.items()})
        elif form != self._form:  # the same log again, as another tool shows it
            self._fold()
        self._form = form
        self._text[key] += int(again["times"]) if again else 1
        if len(self._text) > DIFFERENT:
            self.begin()
        if self._text[key] > self._known[key]:
            self._keep(Message(when, boot, utc, hid, int(full[1] or 0) if full else 0, key[0]))
        return True

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
