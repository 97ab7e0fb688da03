"""Routes and routing rules as ``ip`` prints them, turned into input for ``ip -batch``."""

from __future__ import annotations

import re
from typing import Final, Optional

_TYPES: Final = ("unicast", "local", "broadcast", "multicast", "throw", "unreachable", "prohibit",
                 "blackhole", "nat", "anycast")  # fmt: skip
_FLAGS: Final = {"linkdown", "dead", "offload", "trap", "offload_failed", "rt_offload", "rt_trap",
                 "pervasive", "notify", "unresolved", "cache", "[detached]"}  # fmt: skip
"""Words that the kernel reports of a route, and nobody can set."""
_DROPPED: Final = {"proto", "expires", "error", "nhid", "users", "age", "used", "cache", "mtu",
                   "advmss", "hoplimit", "initcwnd", "initrwnd", "rto_min", "quickack", "congctl",
                   "window", "rtt", "rttvar", "ssthresh", "cwnd", "reordering",
                   "features"}  # fmt: skip
"""Words that do not affect a packet's fate, each with its value."""
_KEPT: Final = {"via", "dev", "src", "metric", "table", "scope", "tos", "dsfield", "weight", "pref",
                "from", "realm", "realms"}  # fmt: skip
_SCOPES: Final = {"host", "link", "global", "site", "nowhere"}
_KNOWN: Final = {"local": "255", "main": "254", "default": "253", "all": "0", "unspec": "0"}
_WORD: Final = re.compile(r"[\w.:/@+-]{1,64}")
_ADDRESS: Final = re.compile(r"[0-9a-fA-F.:]+(?:/\d{1,3})?")


class Tables:
    """Numbers of routing tables. The names are known only to that host's /etc/iproute2/rt_tables,
    and any number does if routes and rules agree."""

    def __init__(self) -> None:
        self._named: dict[str, str] = {}

    def number(self, name: str) -> str:
        """Of a name or number."""
        if name.isdigit():
            return name
        return _KNOWN.get(name) or self._named.setdefault(name, str(70_000 + len(self._named)))


def route_lines(text: str) -> list[str]:
    """Routes, each on one line with its nexthops."""
    out: list[str] = []
    for line in text.splitlines():
        if line[:1].isspace() and line.split()[:1] == ["nexthop"] and out:
            out[-1] += " " + line.strip()
        elif line.strip():
            out.append(line.strip())
    return out


def is_six(line: str) -> bool:
    """Whether a route is one of IPv6."""
    words = line.split()
    first = next((word for word in words if word not in _TYPES), "")
    if ":" in first:
        return True
    following = dict(zip(words, words[1:]))
    # With an IPv6 gateway a route of IPv4 has the word inet6 before it (RFC 5549).
    return "pref" in words or "::" in following.get("via", "") or ":" in following.get("src", "")


def route(line: str, tables: Tables) -> Optional[str]:
    """The arguments of ``ip route add``; None: the kernel makes it itself.

    Raises ValueError with the unknown word.
    """
    words = line.split()
    kind = words.pop(0) if words[0] in _TYPES else "unicast"
    table, own = "main", "proto kernel" in line
    out: list[str] = []
    if not words or not (words[0] == "default" or _ADDRESS.fullmatch(words[0])):
        raise ValueError(words[0] if words else line)
    out.append(words.pop(0))
    while words:
        word = words.pop(0)
        value = words[0] if words else ""
        if word in ("nexthop", "onlink"):
            out.append(word)
        elif word in _FLAGS:
            continue
        elif not words or word not in _DROPPED | _KEPT:
            raise ValueError(word)
        else:
            del words[: 1 + (value in ("lock", "inet", "inet6"))]
            table = value if word == "table" else table
            if word == "via" and value.startswith("inet"):
                value += " " + line.split(f" via {value} ", 1)[1].split(maxsplit=1)[0]
            if word in _KEPT and word != "table":
                out += _pair(word, value)
    if table == "local" and kind in ("local", "broadcast", "anycast", "multicast") and own:
        return None
    if own and kind in ("broadcast", "multicast", "unreachable") and is_six(line):
        return None
    # The same as the kernel's own of an address, it is not added again.
    # Its table comes first: after nexthops nothing may follow.
    own_word = ["proto", "kernel"] if own else []
    return " ".join([kind, out[0], "table", tables.number(table), *own_word, *out[1:]])


def _pair(word: str, value: str) -> list[str]:
    if not all(_WORD.fullmatch(one) for one in value.split()):
        raise ValueError(value)
    scope = word != "scope" or value in _SCOPES or value.isdigit()
    if not scope or (word.startswith("realm") and not re.fullmatch(r"\d+(/\d+)?", value)):
        raise ValueError(value)
    return [word, value]


_RULE: Final = re.compile(r"^(\d{1,10}):\s+(.*)$")
_RULE_VALUES: Final = {"from", "to", "tos", "dsfield", "fwmark", "iif", "oif", "dev", "uidrange",
                       "ipproto", "sport", "dport", "priority", "goto", "suppress_prefixlength",
                       "suppress_ifgroup", "realms", "tun_id"}  # fmt: skip
_RULE_WORDS: Final = {"not", "blackhole", "prohibit", "unreachable", "nop", "l3mdev"}
_RULE_DROPPED: Final = {"[detached]", "[iif", "[oif", "detached]", "[unresolved]"}


def rule(line: str, tables: Tables) -> tuple[str, str]:
    """(table that it looks up, or nothing; arguments of ``ip rule add``). Raises ValueError."""
    said = _RULE.match(line)
    if not said:
        raise ValueError(line)
    words, table = said[2].split(), ""
    out = ["priority", said[1]]
    while words:
        word = words.pop(0)
        if word in ("lookup", "table") and words:
            value = words.pop(0)
            if value == "[l3mdev-table]":
                out.append("l3mdev")
            else:
                table = tables.number(value)
                out += ["lookup", table]
        elif word in ("proto", "protocol") and words:
            words.pop(0)
        elif word in _RULE_VALUES and words:
            value = words.pop(0)
            if not _WORD.fullmatch(value):
                raise ValueError(value)
            out += [word, value]
        elif word in _RULE_WORDS:
            out.append(word)
        elif word not in _RULE_DROPPED:
            raise ValueError(word)
    return table, " ".join(out)
