"""What lines belong to, by a prompt, a heading or a file's name; and lines that are a time."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Final, Optional

_SYSCTL_PATH: Final = re.compile(r"(?:^|[\s/])(?:proc/sys/)((?:net|kernel|fs)/[\w./-]+)")
_NETNS: Final = re.compile(r"(?:^|/)netns/([\w.:-]+)/|ip[ _]netns[ _]exec[ _]([\w.:-]+?)[ _]")
_ABOUT: Final = (
    ("log", re.compile(r"\b(dmesg|journal|messages|kern\.log|syslog)")),
    ("modules", re.compile(r"\b(lsmod|proc/modules|modinfo)")),
    ("listeners", re.compile(r"(?<![a-zA-Z0-9])(ss|netstat)(?![a-zA-Z0-9])")),
    (
        "addresses",
        re.compile(r"\bip(_| )(-\w+(_| ))*(a(ddr(ess)?)?|l(ink)?)(?![a-zA-Z])|\bifconfig"),
    ),
    (
        "network",
        re.compile(
            r"\bip(_| )(-\w+(_| ))*r(o|oute|u|ule)?(?![a-zA-Z])|\btc(_| )(-\w+(_| ))*qdisc|\bipset"
        ),
    ),
    (
        "count",
        re.compile(
            r"conntrack(_| )(-C|--count)|^(cat )?/proc/net/(nf|ip)_conntrack ?\| ?wc -l$"
            r"|^wc -l ?<? ?/proc/net/(nf|ip)_conntrack$"
        ),
    ),
    ("uptime", re.compile(r"proc/uptime|(^|/)uptime$")),
    ("epoch", re.compile(r"date \+?%s|(^|/)epoch$")),
    ("host", re.compile(r"(^|/)hostname( -f)?$")),
    ("kernel", re.compile(r"uname(_| )-r|(^|/)osrelease$")),
    ("sysctl", re.compile(r"\bsysctl")),
    ("stat", re.compile(r"stat/(nf|ip)_conntrack|conntrack(_| )-S")),
    ("slab", re.compile(r"slabinfo|slabtop")),
    ("rules", re.compile(r"tables(_|-)save|nft(_| )|ip6?tables")),
    ("entries", re.compile(r"(nf|ip)_conntrack$|conntrack(_| )-[LEG]|dying|unconfirmed")),
)


@dataclass(frozen=True)
class Context:
    """What the lines that follow belong to, by a prompt, a heading or the file's name."""

    command: str = ""
    """As typed; empty where none was shown."""
    about: str = ""
    sysctl: str = ""
    """The setting whose bare value follows."""
    netns: str = ""
    list: str = ""
    """``dying`` or ``unconfirmed``."""
    ipv6: bool = False
    state: dict[str, str] = field(default_factory=dict)
    """What an earlier line of the same output said."""

    @property
    def ignored(self) -> bool:
        """Whether lines that nothing is known of are no surprise: a known tool printed them."""
        return bool(self.about and self.about not in ("entries", "count", "epoch"))


def context(text: str, before: Context, *, named: bool = False) -> Context:
    """The context that a command, heading or file's name makes."""
    path = _SYSCTL_PATH.search(text)
    about = next((name for name, pattern in _ABOUT if pattern.search(text)), "")
    spaces = _NETNS.search(text)
    netns = (spaces[1] or spaces[2]) if spaces else ("" if named else before.netns)
    kind = re.search(r"\b(dying|unconfirmed)\b", text)
    if not (named or about or path):
        # Another command altogether: what it prints is not ours to understand.
        about = "other"
    return Context(
        "" if named else text,
        "sysctl" if path else about,
        path[1].replace("/", ".") if path else "",
        netns,
        kind[1] if kind else "",
        "ip6tables" in text
        or "v6" in text.rsplit("/", 1)[-1]
        or bool(re.search(r"\bip[ _]-(6|f(amily)?[ _]inet6)", text)),
    )


_DATE: Final = re.compile(
    r"^(?:zzz \*+ ?)?[A-Z][a-z]{2},? ([A-Z][a-z]{2}) +(\d{1,2}) (\d\d):(\d\d):(\d\d)"
    r"(?: ([AP]M))? (UTC|GMT) (\d{4})(?: .{0,20})?$"
)
_ISO: Final = re.compile(r"^\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)$")
_EPOCH: Final = re.compile(r"^(\d{10})(\.\d{1,9})?$")


def moment(line: str, about: Context) -> Optional[float]:
    """UTC seconds of a line that is nothing but a time, in UTC or with its zone."""
    date = _DATE.match(line)
    if date:
        month, day, hour, minute, second, half, _, year = date.groups()
        try:
            text = f"{year} {month} {day} {hour}:{minute}:{second} {half or ''}".strip()
            form = "%Y %b %d %I:%M:%S %p" if half else "%Y %b %d %H:%M:%S"
            return datetime.strptime(text, form).replace(tzinfo=timezone.utc).timestamp()
        except ValueError:
            return None
    if _ISO.match(line):
        from ctrace.dumps.host.log import utc

        return utc(line)
    epoch = _EPOCH.match(line)
    if epoch and not about.sysctl and 10**9 <= int(epoch[1]) < 1 << 32:
        return float(line)
    return None
