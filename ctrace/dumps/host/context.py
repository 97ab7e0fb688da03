"""What lines belong to, by a prompt, a heading or a file's name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

_SYSCTL_PATH: Final = re.compile(
    r"(?<![\w-])proc/sys/((?:net|kernel|fs)/[\w./-]*)(?:\{([\w,./-]{1,200})\})?(\*?)"
)
_SYSCTL_NAMES: Final = re.compile(r"\bsysctl (?:-\w+ )*(?:-\w*n\w*|--values) (.*)$")
_NETNS: Final = re.compile(r"(?:^|/)netns/([\w.:-]+)/|ip[ _]netns[ _]exec[ _]([\w.:-]+?)[ _]")
_CONFIGURED: Final = re.compile(
    r"^(?!.*(?:sysctl|-restore|nft|modprobe) )(?:.*[\s<])?/?etc/(?!hostname\b)"
)
"""A file that says how a host is to be, which it need not be."""
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
            r"conntrack(_| )(-C|--count)\b|^(cat )?/proc/net/(nf|ip)_conntrack ?\| ?wc -l$"
            r"|^wc -l ?<? ?/proc/net/(nf|ip)_conntrack$"
            r"|^(sudo )?conntrack -L( 2> ?/dev/null)? ?\| ?wc -l$"
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
    ("entries", re.compile(r"(nf|ip)_conntrack$|conntrack(_| )-[LEGD]|dying|unconfirmed")),
)


@dataclass(frozen=True)
class Context:
    """What the lines that follow belong to, by a prompt, a heading or the file's name."""

    command: str = ""
    """As typed; empty where none was shown."""
    about: str = ""
    settings: tuple[str, ...] = ()
    """The settings whose bare values follow, one after the other."""
    netns: str = ""
    list: str = ""
    """``dying``, ``unconfirmed`` or ``deleted``."""
    ipv6: bool = False
    state: dict[str, str] = field(default_factory=dict)
    """What an earlier line of the same output said."""

    @property
    def configured(self) -> bool:
        """Whether lines tell how the host is to be, not how it is."""
        return self.about == "configured"

    @property
    def ignored(self) -> bool:
        """Whether lines that nothing is known of are no surprise: a known tool printed them."""
        return bool(self.about and self.about not in ("entries", "count", "epoch"))


def context(text: str, before: Context, *, named: bool = False) -> Context:
    """The context that a command, heading or file's name makes."""
    settings = _settings(text)
    about = next((name for name, pattern in _ABOUT if pattern.search(text)), "")
    spaces = _NETNS.search(text)
    netns = (spaces[1] or spaces[2]) if spaces else ("" if named else before.netns)
    kind = re.search(r"\b(dying|unconfirmed)\b", text)
    list_ = "deleted" if re.search(r"\bconntrack\b.* (?:-D|--delete)\b", text) else ""
    if not named and _CONFIGURED.search(text):
        settings, about = (), "configured"
    if not (named or about or settings):
        # Another command altogether: what it prints is not ours to understand.
        about = "other"
    return Context(
        "" if named else text,
        "sysctl" if settings else about,
        settings,
        netns,
        kind[1] if kind else list_,
        "ip6tables" in text
        or "v6" in text.rsplit("/", 1)[-1]
        or bool(re.search(r"\bip[ _]-(6|f(amily)?[ _]inet6)", text)),
    )


def _settings(text: str) -> tuple[str, ...]:
    """Names of the settings in a command or path, in their order."""
    names = _SYSCTL_NAMES.search(text)
    if names:
        return tuple(word for word in names[1].split() if re.fullmatch(r"[a-z]+\.[\w.]+", word))
    found: list[str] = []
    for path, several, more in _SYSCTL_PATH.findall(text):
        if not more:  # which ones, only that host's shell knew
            found += [path + one for one in several.split(",")]
    return tuple(one.replace("/", ".") for one in found)
