"""What single lines tell of a host beside entries: settings, modules, addresses, listeners."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Optional

from ctrace.batch import Owner
from ctrace.dumps import whose
from ctrace.dumps.found import Found, Space
from ctrace.dumps.host.context import Context
from ctrace.record import PROTO_NUMBERS

_SETTING: Final = re.compile(
    r"^(?:/proc/sys/)?((?:net|kernel|vm|fs|dev|user|debug|abi|crypto|sunrpc)[./][\w./:@+-]+?)"
    r"\s*(?:=>|[=:])\s?(.*)$"
)
_SHORT: Final = re.compile(
    r"^(?!\S*(?:etc/|\.conf))(?:\S{1,200}[:|] ?)?[|\"' ]{0,3}(?:[\w/.-]{1,80}[./])?"
    r"((?:nf|ip)_conntrack_(?:max|count|buckets|\w*timeout\w*))"
    r"[\"']?(?:\s*(?:[=-]>|[=:|])\s*|\s+)[\"']?(\d{1,3}(?:[,._' ]\d{3})+|\d+)[\"',| ]{0,3}$"
)
_GROUPED: Final = re.compile(r"\d{1,3}(?:[,._' ]\d{3})+")
"""A number whose thousands somebody set apart."""
_MODULE: Final = re.compile(
    r"^(\w+)\s+(\d+)\s+(-?\d+)(?:\s+([\w,\[\]-]+))?(?:\s+\w+\s+0x[0-9a-f]+.*)?\s*$"
)
_IN_USE: Final = re.compile(
    r"^(?:(?:rmmod|modprobe): )?(?:ERROR|FATAL): Module (\w{1,64}) is in use"
    r"(?: by:? ?(\w[\w, ]*))?\.?$"
)
"""The answer to an attempt to unload it, which names its users."""
_SEVERAL: Final = re.compile(r"\D{0,20}\d{1,11}(?:\D{1,12}\d{1,11}){1,3}\D{0,20}")
"""Several settings in one line, as ``echo $(cat ...)/$(cat ...)`` prints them."""
_WHOLE: Final = ("", "lsmod", "sudo lsmod", "cat /proc/modules", "sudo cat /proc/modules")
"""Commands that print all modules; a file's name is none."""
_NETFILTER: Final = re.compile(
    r"conntrack|nf_nat|^xt_|^nf_|^ip_|^ip6_|^x_tables|^nft_|tables?$|^br_netfilter"
)
_COUNTED: Final = r"((?:(?:[a-z_]+|\(null\))=\d{1,20}(?: +|$))+)\\?$"
_CPU: Final = re.compile(r"^(?:# )?cpu=\d+ +" + _COUNTED)
_CPU_MORE: Final = re.compile(r"^(?:# )?" + _COUNTED)
"""The rest of a CPU's line that was broken into two."""
_STAT_HEAD: Final = re.compile(r"^entries\s+(?:searched|clashres)\s+found\b.*$")
_STAT_ROW: Final = re.compile(r"^[0-9a-f]{8}(\s+[0-9a-f]{8}){8,24}$")
_INET: Final = re.compile(r"\binet6? (?:addr: ?)?([0-9a-fA-F:.]+)(?:%\S+)?/?\d*")
_LINES: Final = re.compile(r"^(\d{1,11}) /proc/net/(?:nf|ip)_conntrack$")
_OLD_STAT: Final = re.compile(r"^([a-z]+(?:_[a-z]+)?)\s+(\d{1,20})$")
"""``conntrack -S`` of conntrack-tools before 1.0: summed over CPUs, ``entries`` first."""
_SLAB: Final = re.compile(r"^(?:nf|ip)_conntrack(?:[:_](?!expect)[0-9a-f]+)?\s+\d+\s+\d+\s+(\d+)\s")
_SLAB_ROW: Final = re.compile(r"^[\w:.-]+(?: +\d+){5}(?: |$)")
_UNAME: Final = re.compile(r"^Linux (?:version|(?!version )(\S+)) (\d\S*) ")
"""``uname -a``; /proc/version tells the release alone."""
_SS: Final = re.compile(
    r"^(?:(tcp|udp)6?\s+)?(?:LISTEN|UNCONN)\s+\d+\s+\d+\s+(\S+):(\d+)\s+\S+"
    r'(?:\s+users:\(\("([^"]{1,64})",(?:pid=)?(\d+))?'
)
_NETSTAT: Final = re.compile(r"^(tcp|udp)6?\s+\d+\s+\d+\s+(\S+):(\d+)\s+\S+:\*(?=\s)")
_PROGRAM: Final = re.compile(r"\s(\d{1,10})/([^\s:]{1,64})")
_SOCKETS: Final = re.compile(
    r"(?:(?:tcp|udp|udplite|raw|sctp|dccp|icmp6?|u_\w+|nl|p_\w+|v_\w+|mptcp|ESTAB|TIME-WAIT"
    r"|SYN-(?:RECV|SENT)|FIN-WAIT-[12]|CLOS(?:E-WAIT|ING)|LAST-ACK|UNCONN)6?\s+){1,2}\d+\s+\d+\s"
    r"|unix\s+\d+\s+\[ "
)
"""A socket that does not listen, or of another kind."""
_NAMES: Final = re.compile(r"^/proc/net/(ip_tables_names|ip6_tables_names|ip_vs): ?(.*)$")
_LISTED: Final = (
    (
        "iptables -S",
        re.compile(r"^-P (?:INPUT|OUTPUT|FORWARD|PREROUTING|POSTROUTING) (?:ACCEPT|DROP)\b"),
    ),
    ("iptables -L", re.compile(r"^Chain \S{1,40} \((?:policy [A-Z]+|\d+ references?)\b")),
)
_LISTED_MORE: Final = re.compile(
    r"^-[AN] [\w.:+/@~-]{1,40}(?: |$)|(?:num +)?(?:pkts +bytes +)?target +prot +opt "
    r"|(?:\d+ +)?(?:\d+[KMGT]? +\d+[KMGT]? +)?[\w.:+/@~-]+ +\S+ +(?:--|-f|!f) "
)
_SWAPPED: Final = str.maketrans("./", "/.")
MOST_SETTINGS: Final = 40_000
_COUNTS_FULL: Final = re.compile(
    r"\bz?[ef]?grep (?:-[a-z]+ )*(?:-[a-z]*c|--count\b).*table full|table full.*\| ?wc -l$"
)
_UP: Final = re.compile(r"\bup (?:(\d+) days?, +)?(?:(\d+):(\d\d)|(\d+) min)")
_IDLE_HEADS: Final = re.compile(
    r"^(Module\s+Size\s+Used|State\s+Recv|Netid\s+State|Proto\s+Re[cf]|slabinfo - |"
    r"Active (?:Internet|UNIX)|"
    r"# name\s|# Warning: |</?(?:conntrack|expect)>|<\?xml|total \d+$|tcpdump|Connection to )"
    r"|^sysctl: |^error: (?:permission denied on key|\"|unknown error)|^conntrack v"
    r"|^\d+: [\w.@-]+: <|^(link/|valid_lft |altname )"
    r"|^[\w./-]{1,60}: .*(?:No such file|not found|[Pp]ermission denied|not permitted|can't open)"
)


def fact(line: str, about: Context, found: Found, at: Optional[float]) -> bool:
    """Whether the line says something about the host; it is kept where that is useful."""
    space = found.space(about.netns)
    return any(one(line, about, found, space, at) for one in _FACTS)


def _setting(line: str, about: Context, found: Found, space: Space, at: Optional[float]) -> bool:
    del found, at
    said = _SETTING.match(line) or _SHORT.match(line)
    if said:
        name = said[1].replace("/", ".").removeprefix(".")
        _path(space, said[1], said[2])
        if name.startswith(("nf_conntrack", "ip_conntrack")):
            name = "net.netfilter." + name.replace("ip_conntrack", "nf_conntrack")
        value = said[2].strip()
        if "_conntrack_" in name and _GROUPED.fullmatch(value):
            value = re.sub(r"\D", "", value)
        _sysctl(space, name, value)
        return True
    if len(about.settings) > 1 and _SEVERAL.fullmatch(line):
        values = re.findall(r"\d+", line)
        short = all(name.endswith(("_max", "_count", "_buckets")) for name in about.settings)
        if short and len(values) == len(about.settings):
            for name, value in zip(about.settings, values):
                _sysctl(space, name, value)
            return True
    if about.settings and re.fullmatch(r"-?\d+([\t ]+-?\d+)*", line):
        nth = int(about.state.get("settings", "0"))
        _sysctl(space, about.settings[nth % len(about.settings)], line)
        about.state["settings"] = str(nth + 1)
        return True
    counted = _LINES.match(line)
    if counted or (about.about == "count" and line.isdigit() and len(line) < 12):
        space.counts.append(int(counted[1] if counted else line))
        return True
    return False


def _path(space: Space, name: str, value: str) -> None:
    """Keep a setting by its path: sysctl swaps the points and slashes of interfaces' names."""
    path = name if name[3:4] == "/" else name.translate(_SWAPPED)
    if path.startswith(("net/ipv4/", "net/ipv6/", "net/netfilter/")) and (
        path in space.settings or len(space.settings) < MOST_SETTINGS
    ):
        space.settings[path] = value[:200]


def _sysctl(space: Space, name: str, value: str) -> None:
    old = {
        "net.ipv4.netfilter.ip_conntrack_": "net.netfilter.nf_conntrack_",
        "net.ipv4.ip_conntrack_": "net.netfilter.nf_conntrack_",
    }
    for prefix, new in old.items():
        if name.startswith(prefix):
            name = new + name[len(prefix) :]
    value = " ".join(value.strip("'\"").split())[:200]
    if name == "net.nf_conntrack_max":
        name = "net.netfilter.nf_conntrack_max"
    if name.endswith("nf_conntrack_count"):
        if value.isdigit() and len(value) < 12:
            space.counts.append(int(value))
    elif name.startswith(
        (
            "net.netfilter.nf_conntrack",
            "net.ipv4.ip_",
            "net.ipv4.tcp_",
            "net.ipv6.conf.all.forwarding",
        )
    ):
        space.sysctls[name] = value


def _module(line: str, about: Context, found: Found, space: Space, at: Optional[float]) -> bool:
    del space, at
    if re.match(r"Module\s+Size\s+Used", line):
        found.modules_whole |= "|" not in about.command
        return True
    used = _IN_USE.match(line)
    if used:
        users = tuple(re.split(r"[, ]+", used[2] or "", maxsplit=64))
        if used[2] and used[1] not in found.modules and len(found.modules) < 2000:
            found.modules[used[1]] = len(users), users
        return True
    said = _MODULE.match(line)
    if not said or (about.about != "modules" and not _NETFILTER.search(said[1])):
        return False
    users = tuple(one for one in (said[4] or "").split(",") if one[:1] not in ("", "-", "["))
    if len(found.modules) < 2000:
        found.modules[said[1]] = max(0, int(said[3])), users
        if about.about == "modules" and about.command in _WHOLE:
            found.modules_whole = True
    return True


def _counters(line: str, about: Context, found: Found, space: Space, at: Optional[float]) -> bool:
    del found
    cpu = _CPU.match(line)
    if not cpu and "cpu" in about.state:
        cpu = _CPU_MORE.match(line.lstrip())
    if cpu:
        said = dict(word.split("=") for word in cpu[1].split())
        first = "cpu=0 " in line
        about.state["cpu"] = "yes"
        _count(space, at, list(said), [int(v) % (1 << 64) for v in said.values()], first)
        return True
    if _STAT_HEAD.match(line):
        about.state["stat"], about.state["rows"] = line, ""
        return True
    if "stat" in about.state and _STAT_ROW.match(line):
        from ctrace.host.tables import COLUMNS

        names = about.state["stat"].split()
        values = [int(word, 16) for word in line.split()]
        first = not about.state["rows"]
        about.state["rows"] = "yes"
        # Whether the second is a part of the first depends on the kernel.
        apart = COLUMNS.keys() - {"icmp_error"}
        known = [(COLUMNS[n], v) for n, v in zip(names, values) if n in apart]
        _count(space, at, [n for n, _ in known], [v for _, v in known], first)
        return True
    return _old_counter(line, about, space, at)


def _old_counter(line: str, about: Context, space: Space, at: Optional[float]) -> bool:
    said = _OLD_STAT.match(line)
    if not said or (said[1] != "entries" and "old" not in about.state):
        return False
    if said[1] == "entries":
        about.state["old"] = "yes"
        if not space.counts and len(said[2]) < 12:
            space.counts.append(int(said[2]))
    _count(space, at, [said[1]], [int(said[2]) % (1 << 64)], said[1] == "entries")
    return True


def _count(
    space: Space, at: Optional[float], names: list[str], values: list[int], first: bool
) -> None:
    if first or not space.counters:
        space.counters.append((at, {}))
        del space.counters[1:-1000]  # the first one stays: what came since is told
    _, reading = space.counters[-1]
    for name, value in zip(names, values):
        reading[name] = reading.get(name, 0) + value


def _address(line: str, about: Context, found: Found, space: Space, at: Optional[float]) -> bool:
    del found, at
    if about.about != "addresses" and not line.lstrip().startswith("inet"):
        return False
    return take_address(line, space)


def take_address(line: str, space: Space) -> bool:
    """Whether a line of ip or ifconfig has an address; it is kept as the host's own."""
    said = _INET.search(line)
    if not said:
        return False
    from ctrace.dumps.entries.words import is_address

    if is_address(said[1]) and said[1] not in space.addresses and len(space.addresses) < 4096:
        space.addresses.append(said[1])
    return True


def _listener(line: str, about: Context, found: Found, space: Space, at: Optional[float]) -> bool:
    del found, at
    del about
    said, pid, comm = _SS.match(line), None, ""
    if said:
        proto, port, pid, comm = said[1] or "tcp", said[3], said[5], said[4] or ""
    else:
        said = _NETSTAT.match(line)
        if not said:
            return _SOCKETS.match(line) is not None
        proto, port = said[1], said[3]
        program = _PROGRAM.search(line, said.end())
        pid, comm = program.groups() if program else (None, "")
    if pid and int(port) < 65536 and int(pid) < 1 << 31 and len(space.listeners) < 4096:
        key = (PROTO_NUMBERS[proto], int(port))
        space.listeners[key] = Owner(int(pid) << 32, comm[:64].split("/")[0])
    return True


def _names(line: str, about: Context, found: Found, space: Space, at: Optional[float]) -> bool:
    """``head /proc/net/ip_tables_names`` as ctrace collect prints it."""
    del about, found, at
    said = _NAMES.match(line)
    if not said:
        return False
    words = tuple(said[2].split()[:64])
    if said[1] == "ip_vs":
        space.ipvs = " ".join(words)
    else:
        family = said[1].split("_")[0]
        space.legacy_tables[family] = () if words == ("none",) else words
    return True


def _rules(line: str, about: Context, found: Found, space: Space, at: Optional[float]) -> bool:
    """Rules in forms that leave out too much to make them again."""
    del about, found, at
    shown = next((name for name, form in _LISTED if form.match(line)), "")
    if shown:
        space.listed.add(shown)
    return bool(shown or (space.listed and _LISTED_MORE.match(line)))


def _other(line: str, about: Context, found: Found, space: Space, at: Optional[float]) -> bool:
    del space
    slab, name, up = _SLAB.match(line), _UNAME.match(line), _UP.search(line)
    if slab:
        found.slab = int(slab[1]) if int(slab[1]) < 1 << 20 else None
    elif name:
        found.kernel = name[2][:64]
        if name[1]:
            _named(found, name[1][:64])
    elif about.about == "uptime" and (two := re.fullmatch(r"(\d{1,12}\.\d+) \d+\.\d+", line)):
        found.uptime = float(two[1]), at
    elif up and "load average" in line:
        days, hours, minutes, alone = (int(one or 0) for one in up.groups())
        found.uptime = float(((days * 24 + hours) * 60 + minutes + alone) * 60), at
    elif about.about == "host" and re.fullmatch(r"[\w.-]{1,64}", line):
        _named(found, line)
    elif about.about == "kernel" and re.fullmatch(r"\d[\w.+-]{1,64}", line):
        found.kernel = line
    elif line.isdigit() and len(line) < 12 and _COUNTS_FULL.search(about.command):
        found.log.counted(int(line))
    elif line == "made by ctrace collect":
        found.whole = True
    else:
        idle = _IDLE_HEADS.match(line) or _SLAB_ROW.match(line)
        return bool(idle) or about.about == "other"
    return True


def _named(found: Found, name: str) -> None:
    found.host = name
    found.belongs(whose.NAMES, whose.short(name))


_Fact = Callable[[str, Context, Found, Space, Optional[float]], bool]
_FACTS: Final[tuple[_Fact, ...]] = (
    _names,
    _setting,
    _counters,
    _module,
    _listener,
    _address,
    _rules,
    _other,
)
