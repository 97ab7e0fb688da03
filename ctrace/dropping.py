"""Drops before tracking that somebody asks for: what they match, and their nftables rules.

One text for the commands that are printed to be pasted and for the rules that apply puts in place.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import ClassVar, Final, Optional, Union

from ctrace.errors import UsageError

SOURCE, SERVICE, EACH, ALL = KINDS = (
    "drop-source",
    "drop-service",
    "limit-source",
    "limit-service",
)
"""Options of advise, and how the comment of a rule begins."""
PROTOS: Final = ("tcp", "udp")
FASTEST: Final = 1_000_000
REMEMBERED_S: Final = 60
MOST_SOURCES: Final = 65535
"""That a limit of each source remembers at a time: when there are more it lets new ones through."""
LEAST_BURST: Final = 5
"""nft's own default."""
PRIORITY: Final = "raw - 10"
"""After defragmentation, before conntrack: as the rules of NOTRACK."""
HOOKS: Final = (
    ("pre", "prerouting"),
    ("output", "output"),
)  # nft before 1.0 keeps "out" for itself
_FAMILIES: Final = (("ip", "v4", "ipv4_addr"), ("ip6", "v6", "ipv6_addr"))
_SYN: Final = "tcp flags & (syn | ack) == syn "


@dataclass(frozen=True)
class Drop:
    """Drop what some sources send, what comes to a port, or what comes to a port too fast."""

    proto: str = ""
    """``tcp`` or ``udp``; empty: TCP, UDP and ICMP of ``sources``."""
    port: int = 0
    sources: tuple[str, ...] = ()
    """Addresses and prefixes; empty: whoever sends to ``port``."""
    rate: int = 0
    """A second: only what comes faster is dropped, of TCP only what opens a connection."""
    each: bool = True
    """Whether every source has ``rate`` for itself, rather than all together."""

    kind: ClassVar[str] = "drop"
    roles: ClassVar[tuple[str, ...]] = ()
    """None: it is no matter who serves, calls or routes."""

    @property
    def option(self) -> str:
        """Which of :data:`KINDS` it is."""
        if self.sources:
            return SOURCE
        return (EACH if self.each else ALL) if self.rate else SERVICE

    def __str__(self) -> str:
        return f"{self.option} {', '.join(self.sources) or f'{self.proto}/{self.port}'}"

    @property
    def effect(self) -> str:
        """What it does, for who is about to apply it."""
        if self.sources:
            return (
                "drop all TCP, UDP and ICMP from there before tracking, answers to this host's own "
                "connections too"
            )
        if not self.rate:
            return "drop all that comes to it before tracking, from this host itself too"
        what = "new connections" if self.proto == "tcp" else "datagrams"
        whose = "from each source" if self.each else "in all"
        return (
            f"drop {what} above {self.rate:,} a second {whose} before tracking; this host's own "
            "pass"
        )

    def comes_from(self, address: str) -> bool:
        """Whether an address is one of its sources."""
        found = ip_address(address) if self.sources else None
        return any(found in ip_network(one) for one in self.sources)

    def problem(self) -> str:
        """What is wrong with it, for a plan's reader; empty when it is good."""
        if self.sources:
            if any(_here(ip_network(one)) for one in self.sources):
                return "drops a source that is this host itself"
            good = not self.proto and not self.port and not self.rate
            return "" if good else "drops sources: it can't name a service or a rate, too"
        return "" if self.proto and self.port else "names neither sources nor a service"


def parse(given: Mapping[str, Collection[str]]) -> tuple[Drop, ...]:
    """What options of :data:`KINDS` with these values ask for. Raises UsageError."""
    found = [_service(kind, text) for kind in KINDS[1:] for text in dict.fromkeys(given[kind])]
    for at, drop in enumerate(found):
        if any((one.proto, one.port) == (drop.proto, drop.port) for one in found[:at]):
            raise UsageError(f"{drop.proto}/{drop.port} can be dropped or limited in one way only")
    sources = tuple(dict.fromkeys(_address(text) for text in given[SOURCE]))
    return (*([Drop(sources=sources)] if sources else []), *found)


def _service(option: str, text: str) -> Drop:
    """``tcp/8063`` to be dropped, ``tcp/8063=50`` to be limited."""
    like = re.fullmatch(r"(tcp|udp)/(\d{1,5})(?:=(\d{1,7}))?", text)
    port, rate = (int(like[2]), int(like[3] or 0)) if like else (0, 0)
    wrong = bool(like and like[3]) == (option == SERVICE) or rate > FASTEST
    if like is None or not 1 <= port <= 65535 or wrong or (option != SERVICE and not rate):
        example = "tcp/8063" if option == SERVICE else "tcp/8063=50, which is 50 a second"
        raise UsageError(f"--{option} {text[:40]!r} can't be used: give one like {example}")
    return Drop(like[1], port, rate=rate, each=option != ALL)


def _address(text: str) -> str:
    try:
        found = ip_network("" if "%" in text else text, strict=False)
    except ValueError:
        raise UsageError(
            f"--{SOURCE} {text[:60]!r} is not an IPv4 or IPv6 address or prefix"
        ) from None
    if _no_source(found):
        raise UsageError(f"--{SOURCE} {_short(found)} is not a source outside this host")
    return _short(found)


def _short(net: Union[IPv4Network, IPv6Network]) -> str:
    """A prefix, or the one address of it."""
    return str(net.network_address) if net.prefixlen == net.max_prefixlen else str(net)


def _no_source(net: Union[IPv4Network, IPv6Network]) -> bool:
    """Whether it holds what no packet from elsewhere comes from."""
    none = ("224.0.0.0/4", "0.0.0.0/32") if net.version == 4 else ("ff00::/8", "::/128")
    return _here(net) or any(net.overlaps(ip_network(one)) for one in none)


def _here(net: Union[IPv4Network, IPv6Network]) -> bool:
    """Whether it holds addresses of loopback."""
    return net.overlaps(ip_network("127.0.0.0/8" if net.version == 4 else "::1/128"))


def told(comment: str) -> str:
    """``limit-source tcp/80`` of a rule's comment without its ``ctrace:``; empty if not a drop."""
    kind, _, rest = comment.partition(":")
    if kind == SOURCE:
        return f"{kind} {rest}"
    named = re.fullmatch(r"(tcp|udp):(\d{1,5})", rest) if kind in KINDS else None
    return f"{kind} {named[1]}/{named[2]}" if named else ""


def sets(drop: Drop) -> dict[str, tuple[str, ...]]:
    """The sets that its rules need, by name: the lines of each."""
    if not drop.rate or not drop.each:
        return {}
    return {
        f"{drop.proto}_{drop.port}_{short}": (
            f"type {kind}",
            f"size {MOST_SOURCES}",
            "flags dynamic,timeout",
            f"timeout {REMEMBERED_S}s",
        )
        for _, short, kind in _FAMILIES
    }


def rules(drop: Drop, chain: str, gate: str = "", tag: Optional[str] = None) -> list[str]:
    """Its rules for our chain ``pre`` or ``output``. ``gate`` is one more condition of each rule;
    with ``tag`` each has a comment that begins with it.

    A packet that this host sends itself has its entry before it comes back through
    prerouting: a drop of a service meets it where it goes out, and limits leave it alone.
    """

    def rule(match: str, name: str) -> str:
        comment = "" if tag is None else f' comment "{tag}{drop.option}:{name}"'
        return f"{match}counter drop{comment}"

    gate = f"{gate} " if gate else ""
    if drop.sources:
        return [
            rule(f"{'ip6' if ':' in one else 'ip'} saddr {one} {gate}", one)
            for one in (drop.sources if chain == "pre" else ())
        ]
    to, name = f"{drop.proto} dport {drop.port} {gate}", f"{drop.proto}:{drop.port}"
    if not drop.rate:
        return [rule(to if chain == "pre" else f'oifname "lo" {to}', name)]
    if chain != "pre":
        return []
    match = f'iifname != "lo" {_SYN if drop.proto == "tcp" else ""}{to}'
    over = f"limit rate over {drop.rate}/second burst {max(drop.rate, LEAST_BURST)} packets"
    if not drop.each:
        return [rule(f"{match}{over} ", name)]
    return [
        rule(f"{match}update @{drop.proto}_{drop.port}_{short} {{ {family} saddr {over} }} ", name)
        for family, short, _ in _FAMILIES
    ]


def command(drop: Drop, table: str) -> str:
    """One shell line that puts its rules into a table of their own."""
    parts = [f"add table inet {table}"]
    for name, lines in sets(drop).items():
        parts.append(f"add set inet {table} {name} {{ {'; '.join(lines)}; }}")
    for chain, hook in HOOKS:
        found = rules(drop, chain)
        if found:
            head = f"type filter hook {hook} priority {PRIORITY};"
            parts.append(f"add chain inet {table} {chain} {{ {head} }}")
        parts += [f"add rule inet {table} {chain} {one}" for one in found]
    return f"nft '{'; '.join(parts)}'"
