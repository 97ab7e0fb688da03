"""What texts tell of a host beside entries: settings, modules, rules, addresses, times."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Final, Optional

from ctrace.batch import Owner
from ctrace.dumps.found import TEXT_LIMIT, Found, Space
from ctrace.record import PROTO_NUMBERS

_SYSCTL_PATH: Final = re.compile(r"(?:^|[\s/])(?:proc/sys/)((?:net|kernel|fs)/[\w./-]+)")
_NETNS: Final = re.compile(r"(?:^|/)netns/([\w.:-]+)/|ip[ _]netns[ _]exec[ _]([\w.:-]+?)[ _]")
_ABOUT: Final = (
    ("log", re.compile(r"\b(dmesg|journal|messages|kern\.log|syslog)")),
    ("modules", re.compile(r"\b(lsmod|proc/modules|modinfo)")),
    ("listeners", re.compile(r"\b(ss|netstat)\b")),
    ("addresses", re.compile(r"\bip(_| )(-\w+(_| ))*a(ddr(ess)?)?\b|\bifconfig")),
    ("count", re.compile(r"conntrack(_| )(-C|--count)")),
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
        "ip6tables" in text or "v6" in text.rsplit("/", 1)[-1],
    )


# -- times ------------------------------------------------------------------------

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
        from ctrace.dumps.kernel_log import utc

        return utc(line)
    epoch = _EPOCH.match(line)
    if epoch and not about.sysctl and 10**9 <= int(epoch[1]) < 1 << 32:
        return float(line)
    return None


# -- blocks of many lines -----------------------------------------------------------


class Block:
    """Rules, taken whole: what they mean is for ctrace.ruleset to say."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lines: list[str] = []
        self._size = 0
        self._open = True

    def take(self, line: bytes) -> bool:
        """Whether the line belongs to it."""
        if not self._open or self._size > TEXT_LIMIT:
            return False
        text = line.decode("utf-8", "replace").rstrip("\r")
        self._open = self._goes_on(text)
        self._lines.append(text)
        self._size += len(text) + 1
        return True

    def _goes_on(self, text: str) -> bool:
        raise NotImplementedError

    def end(self, space: Space) -> None:
        """It goes to where it was read."""
        raise NotImplementedError


class Save(Block):
    """One table of ``iptables-save``: from ``*raw`` to COMMIT."""

    tool = "iptables-legacy"

    @classmethod
    def starting(cls, line: bytes, context: Context) -> Optional[Block]:
        """The block that a line begins, or None."""
        generated = re.match(rb"# Generated by (xtables-|ip6?tables(?:-nft)?-save)", line)
        if not generated and not re.fullmatch(rb"\*(raw|mangle|nat|filter|security)", line.strip()):
            return None
        block = cls(context)
        text = line.decode("ascii", "replace")
        if "nft" in text or "nf_tables" in text:
            block.tool = "iptables-nft"
        block._family = "ip6" if "ip6tables" in text or context.ipv6 else "ip"
        block.take(line)
        return block

    _family = "ip"

    def _goes_on(self, text: str) -> bool:
        del text
        return True

    def take(self, line: bytes) -> bool:
        """Tables follow one another: prompts and other tools' output end them."""
        if line[:1] not in (b"#", b"*", b":", b"-", b"[", b"C") or line.startswith(b"[root@"):
            return False
        if self._lines and line.startswith(b"# Generated by"):
            return False
        return super().take(line)

    def end(self, space: Space) -> None:
        """As one listing of its tool and family."""
        space.saves.append((self.tool, self._family, "\n".join(self._lines) + "\n"))


class NftText(Block):
    """``nft list ruleset`` as people print it: ``table inet filter {`` to its brace."""

    _depth = 0

    @classmethod
    def starting(cls, line: bytes, context: Context) -> Optional[Block]:
        """The block that a line begins, or None."""
        if not re.match(rb"table (?:(?:ip|ip6|inet|arp|bridge|netdev) )?[\w./-]+ \{", line):
            return None
        block = cls(context)
        block.take(line)
        return block

    def _goes_on(self, text: str) -> bool:
        bare = re.sub(r'"[^"]*"', "", text)
        self._depth += bare.count("{") - bare.count("}")
        return self._depth > 0

    def end(self, space: Space) -> None:
        """Beside the tables before it."""
        space.nft_text += "\n".join(self._lines) + "\n"


class NftJson(Block):
    """``nft -j list ruleset``."""

    @classmethod
    def starting(cls, line: bytes, context: Context) -> Optional[Block]:
        """The block that a line begins, or None."""
        if not line.startswith(b'{"nftables"'):
            return None
        block = cls(context)
        block.take(line)
        return block

    def _goes_on(self, text: str) -> bool:
        del text
        return False  # it is one line

    def end(self, space: Space) -> None:
        """The last one counts."""
        space.nft = self._lines[0]


BLOCKS: Final[tuple[type[Save] | type[NftText] | type[NftJson], ...]] = (Save, NftText, NftJson)

# -- single lines ---------------------------------------------------------------------

_SETTING: Final = re.compile(
    r"^(?:/proc/sys/)?((?:net|kernel|vm|fs|dev|user|debug|abi|crypto|sunrpc)[./][\w./:-]+)"
    r"\s*[=:]\s?(.*)$"
)
_SHORT: Final = re.compile(
    r"^((?:nf|ip)_conntrack_(?:max|count|buckets|\w*timeout\w*))\s*[=:]\s*(\d+)$"
)
_MODULE: Final = re.compile(
    r"^(\w+)\s+(\d+)\s+(-?\d+)(?:\s+([\w,-]+))?(?:\s+\w+\s+0x[0-9a-f]+.*)?\s*$"
)
_NETFILTER: Final = re.compile(
    r"conntrack|nf_nat|^xt_|^nf_|^ip_|^ip6_|^x_tables|^nft_|tables?$|^br_netfilter"
)
_CPU: Final = re.compile(r"^cpu=\d+ +((?:[a-z_]+=\d{1,20} +)*[a-z_]+=\d{1,20}) *$")
_STAT_HEAD: Final = re.compile(r"^entries\s+(?:searched|clashres)\s+found\b.*$")
_STAT_ROW: Final = re.compile(r"^[0-9a-f]{8}(\s+[0-9a-f]{8}){8,24}$")
_INET: Final = re.compile(r"\binet6? (?:addr: ?)?([0-9a-fA-F:.]+)(?:%\S+)?/?\d*")
_SLAB: Final = re.compile(r"^nf_conntrack(?:_[0-9a-f]+)?\s+\d+\s+\d+\s+(\d+)\s")
_UNAME: Final = re.compile(r"^Linux (\S+) (\d\S*) ")
_SS: Final = re.compile(
    r"^(?:(tcp|udp)6?\s+)?(?:LISTEN|UNCONN)\s+\d+\s+\d+\s+(\S+):(\d+)\s+\S+"
    r'(?:\s+users:\(\("([^"]{1,64})",(?:pid=)?(\d+))?'
)
_NETSTAT: Final = re.compile(
    r"^(tcp|udp)6?\s+\d+\s+\d+\s+(\S+):(\d+)\s+\S+:\*\s+(?:LISTEN\s+)?.*?(?:\s(\d+)/(\S+))?\s*$"
)
_UP: Final = re.compile(r"\bup (?:(\d+) days?, +)?(?:(\d+):(\d\d)|(\d+) min)")
_IDLE_HEADS: Final = re.compile(
    r"^(Module\s+Size\s+Used|State\s+Recv|Netid\s+State|Proto\s+Recv|Active Internet|slabinfo - |"
    r"# name\s|</?conntrack>|<\?xml|total \d+$|tcpdump|Connection to )|^sysctl: |^conntrack v"
)


def fact(line: str, about: Context, found: Found, at: Optional[float]) -> bool:
    """Whether the line tells something of the host; it is kept where it is of use."""
    space = found.space(about.netns)
    return any(one(line, about, found, space, at) for one in _FACTS)


def _setting(line: str, about: Context, found: Found, space: Space, at: Optional[float]) -> bool:
    del found, at
    said = _SETTING.match(line) or _SHORT.match(line)
    if said:
        name = said[1].replace("/", ".").removeprefix(".")
        if name.startswith(("nf_conntrack", "ip_conntrack")):
            name = "net.netfilter." + name.replace("ip_conntrack", "nf_conntrack")
        _sysctl(space, name, said[2])
        return True
    if about.sysctl and re.fullmatch(r"-?\d+([\t ]+-?\d+)*", line):
        _sysctl(space, about.sysctl, line)
        return True
    if about.about == "count" and line.isdigit() and len(line) < 12:
        space.counts.append(int(line))
        return True
    return False


def _sysctl(space: Space, name: str, value: str) -> None:
    old = {"net.ipv4.netfilter.ip_conntrack_": "net.netfilter.nf_conntrack_",
           "net.ipv4.ip_conntrack_": "net.netfilter.nf_conntrack_"}  # fmt: skip
    for prefix, new in old.items():
        if name.startswith(prefix):
            name = new + name[len(prefix) :]
    value = " ".join(value.split())[:200]
    if name == "net.nf_conntrack_max":
        name = "net.netfilter.nf_conntrack_max"
    if name.endswith("nf_conntrack_count"):
        if value.isdigit() and len(value) < 12:
            space.counts.append(int(value))
    elif name.startswith(("net.netfilter.nf_conntrack", "net.ipv4.ip_", "net.ipv4.tcp_",
                          "net.ipv6.conf.all.forwarding")):  # fmt: skip
        space.sysctls[name] = value


def _module(line: str, about: Context, found: Found, space: Space, at: Optional[float]) -> bool:
    del space, at
    said = _MODULE.match(line)
    if not said or (about.about != "modules" and not _NETFILTER.search(said[1])):
        return False
    users = tuple(one for one in (said[4] or "").split(",") if one and one != "-")
    if len(found.modules) < 2000:
        found.modules[said[1]] = max(0, int(said[3])), users
    return True


def _counters(line: str, about: Context, found: Found, space: Space, at: Optional[float]) -> bool:
    del found, at
    cpu = _CPU.match(line)
    if cpu:
        said = dict(word.split("=") for word in cpu[1].split())
        first = line.startswith("cpu=0")
        names = list(said)
        _count(space, names, [int(v) % (1 << 64) for v in said.values()], first)
        return True
    if _STAT_HEAD.match(line):
        about.state["stat"] = line
        return True
    if "stat" in about.state and _STAT_ROW.match(line):
        from ctrace.host.tables import COLUMNS

        names = about.state["stat"].split()
        values = [int(word, 16) for word in line.split()]
        first = about.state.get("rows", "") != about.state["stat"]
        about.state["rows"] = about.state["stat"]
        known = [(COLUMNS[n], v) for n, v in zip(names, values) if n in COLUMNS]
        _count(space, [n for n, _ in known], [v for _, v in known], first)
        return True
    return False


def _count(space: Space, names: list[str], values: list[int], first: bool) -> None:
    if first or not space.counters:
        space.counters.append({})
        del space.counters[:-1000]
    reading = space.counters[-1]
    for name, value in zip(names, values):
        reading[name] = reading.get(name, 0) + value


def _address(line: str, about: Context, found: Found, space: Space, at: Optional[float]) -> bool:
    del found, at
    said = _INET.search(line)
    if said and (about.about == "addresses" or line.lstrip().startswith("inet")):
        from ctrace.dumps.words import is_address

        if is_address(said[1]) and said[1] not in space.addresses and len(space.addresses) < 4096:
            space.addresses.append(said[1])
        return True
    return False


def _listener(line: str, about: Context, found: Found, space: Space, at: Optional[float]) -> bool:
    del found, at
    said, pid, comm = _SS.match(line), None, ""
    if said:
        proto, port, pid, comm = said[1] or "tcp", said[3], said[5], said[4] or ""
    else:
        said = _NETSTAT.match(line)
        if not said:
            return about.about == "listeners" and bool(re.match(r"(tcp|udp|ESTAB|TIME-WAIT)", line))
        proto, port, pid, comm = said[1], said[3], said[4], said[5] or ""
    if pid and int(port) < 65536 and int(pid) < 1 << 31 and len(space.listeners) < 4096:
        key = (PROTO_NUMBERS[proto], int(port))
        space.listeners[key] = Owner(int(pid) << 32, comm[:64].split("/")[0])
    return True


def _other(line: str, about: Context, found: Found, space: Space, at: Optional[float]) -> bool:
    del space
    slab, name, up = _SLAB.match(line), _UNAME.match(line), _UP.search(line)
    if slab:
        found.slab = int(slab[1]) if int(slab[1]) < 1 << 20 else None
    elif name:
        found.host, found.kernel = name[1][:64], name[2][:64]
    elif about.about == "uptime" and (two := re.fullmatch(r"(\d{1,12}\.\d+) \d+\.\d+", line)):
        found.uptime = float(two[1]), at
    elif up and "load average" in line:
        days, hours, minutes, alone = (int(one or 0) for one in up.groups())
        found.uptime = float(((days * 24 + hours) * 60 + minutes + alone) * 60), at
    elif about.about == "host" and re.fullmatch(r"[\w.-]{1,64}", line):
        found.host = line
    elif about.about == "kernel" and re.fullmatch(r"\d[\w.+-]{1,64}", line):
        found.kernel = line
    elif line == "made by ctrace collect":
        found.whole = True
    else:
        return bool(_IDLE_HEADS.match(line)) or about.about == "other"
    return True


_Fact = Callable[[str, Context, Found, Space, Optional[float]], bool]
_FACTS: Final[tuple[_Fact, ...]] = (
    _setting, _counters, _module, _listener, _address, _other,
)  # fmt: skip

__all__ = ["BLOCKS", "Block", "Context", "context", "fact", "moment"]
