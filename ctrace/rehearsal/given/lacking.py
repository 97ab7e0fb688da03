"""What the texts lack about a host, though the fate of its packets may depend on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, Optional

from ctrace.given import Given
from ctrace.rehearsal.given.links import Links
from ctrace.rehearsal.given.routes import Tables, is_six, route_lines, rule

HELPERS: Final = {
    f"nf_conntrack_{name}"
    for name in (
        "ftp",
        "sip",
        "tftp",
        "irc",
        "h323",
        "pptp",
        "sane",
        "amanda",
        "snmp",
        "netbios_ns",
    )
}
_BY_ENTRY: Final = re.compile(
    r" -m (?:connmark|connbytes|connlimit|helper|connlabel|cluster)\b|-j CONN(?:SEC)?MARK\b"
    r"|--ct(?!state\b)\w+"
)
_BY_ENTRY_NFT: Final = re.compile(r"\bct (?!state\b|helper\b|timeout\b|expectation\b)\w+")


def texts(given: Given, links: Links) -> Iterator[str]:
    """Further texts to give, as commands that one would type."""
    if not links.devices:
        yield "ip -d addr"
    elif links.unclear:
        yield f"ip -d addr (what {links.unclear[0]} is, is not told without -d)"
    yield from _routes(given, links)
    if not all(
        f"net/ipv4/conf/{name}/rp_filter" in given.settings
        for name in ("all", *(device.name for device in links.devices if device.up))
    ) or not {"net/ipv4/ip_forward", "net/ipv4/conf/all/forwarding"} & set(given.settings):
        yield "sysctl -a"
    if not given.qdiscs:
        yield "tc qdisc"
    if not (given.nft or given.nft_text) and _may_have(given, "nf_tables", (3, 13)):
        yield "nft list ruleset"
    yield from _legacy(given, links)
    asked = "\n".join(text for _, _, text in given.saves)
    sets = set(re.findall(r"--(?:match|add|del|map)-set (\S+)", asked))
    if sets - set(re.findall(r"(?m)^create (\S+)", given.ipsets)):
        yield "ipset save"
    if not given.ipvs and given.modules is None:
        yield "lsmod"
    if release(given.kernel) is None and _reads_entries(given):
        yield "uname -r"


def _routes(given: Given, links: Links) -> Iterator[str]:
    lines = route_lines(given.routes)
    four = [line for line in lines if not is_six(line)]
    six = [line for line in lines if is_six(line)]
    tables = Tables()
    for found, rules, option, wanted in (
        (four, given.rules, "", any("." in one for one in links.addresses)),
        (six, given.rules6, " -6", links.six),
    ):
        if not wanted and links.devices:
            continue
        asked = set()
        for line in rules.splitlines():
            try:
                asked.add(rule(line.strip(), tables)[0])
            except ValueError:
                continue
        others = asked - {"", "253", "254", "255"}
        if not found or (others and not any(" table local" in line for line in found)):
            yield f"ip{option} route show table all"
        if not rules:
            yield f"ip{option} rule"


def _may_have(given: Given, module: str, since: tuple[int, int] = (0, 0)) -> bool:
    kernel = release(given.kernel)
    if kernel is not None and kernel < since:
        return False
    # Without any of netfilter's among them they are built in, and no list tells of them.
    telling = given.modules and {"x_tables", "nf_tables"} & set(given.modules)
    return not telling or module in (given.modules or ())


def _legacy(given: Given, links: Links) -> Iterator[str]:
    for family, mark in (("ip", ""), ("ip6", "6")):
        if any((tool, of) == ("iptables-legacy", family) for tool, of, _ in given.saves):
            continue
        if family == "ip6" and links.devices and not any(":" in one for one in links.addresses):
            continue  # IPv6 is off
        told = given.legacy_tables
        there = (
            bool(told.get(family))
            if told is not None and family in told
            else any(
                _may_have(given, f"ip{mark}table_{table}")
                for table in ("raw", "mangle", "nat", "filter", "security")
            )
        )
        if there:
            nft = any(tool == "iptables-nft" for tool, _, _ in given.saves)
            yield f"ip{mark}tables-{'legacy-' if nft or told is not None else ''}save"


def sentences(given: Given, links: Links, ours: str) -> Iterator[str]:
    """What no text can say, or no namespace here can have."""
    modules = set(given.modules or ())
    services = given.ipvs not in ("", "none")
    if services or (not given.ipvs and "ip_vs" in modules):
        yield "IPVS is loaded there, and its services are not in the texts"
    helpers = sorted(HELPERS & modules)
    by_itself = given.settings.get("net/netfilter/nf_conntrack_helper")
    kernel = release(given.kernel)
    if helpers and (
        by_itself != "0" if by_itself is not None else kernel is None or kernel < (6, 0)
    ):
        yield (
            f"{helpers[0]} is loaded there, and may follow connections without a rule; here "
            "only rules give a helper"
        )
    mine = release(ours)
    if kernel and mine and kernel < (4, 12) <= mine and _reads_entries(given):
        yield (
            f"rules read more of an entry than its state, which kernel {given.kernel} answers "
            f"otherwise for what is untracked than {ours} of this machine"
        )
    if any(device.what == "bridge" for device in links.devices) and any(
        " -m physdev " in text for _, _, text in given.saves
    ):
        yield "rules tell a bridge's ports apart (physdev), and a copy's bridge has none"
    every = given.nft + given.nft_text + "".join(text for _, _, text in given.saves)
    if links.groups and re.search(r"\b[io]ifgroup\b|-m devgroup", every):
        yield "rules ask for an interface's group, whose number is not in the texts"
    if _is_terse(given.nft_text):
        yield "no set in the nft rules has an element: nft -t leaves them out, so list without it"


def _is_terse(text: str) -> bool:
    """Whether sets have no elements though rules cannot have filled or emptied them."""
    sets = re.findall(r"(?m)^[ \t]+(?:set|map) \S+ \{\n((?:(?![ \t]+\}).*\n)*)", text)
    return any(not come_and_go(one) for one in sets) and not any(
        "elements = " in one for one in sets
    )


def come_and_go(text: str) -> bool:
    """Whether sets in it have elements that rules add or that expire."""
    return any(
        {"dynamic", "timeout"} & set(re.findall(r"[a-z]+", line))
        for line in text.splitlines()
        if "flags " in line
    )


def _reads_entries(given: Given) -> bool:
    return any(_BY_ENTRY.search(text) for _, _, text in given.saves) or bool(
        _BY_ENTRY_NFT.search(given.nft_text) or '"ct": {"key": "mark"' in given.nft
    )


def release(text: str) -> Optional[tuple[int, int]]:
    """(6, 1) for ``6.1.0-18-amd64``; None when it is not a release."""
    said = re.match(r"(\d{1,3})\.(\d{1,4})", text)
    return (int(said[1]), int(said[2])) if said else None
