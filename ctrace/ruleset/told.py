"""What rules say about connections that the table alone does not: limits of their own, what they
drop as INVALID, and where destination NAT leads now.

It is read from what the tools print (:func:`ctrace.ruleset.reader.dump`). Counters stand only in
rules that have one; a rule without one does not show how often it was met.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any, Final, Optional

from ctrace.ruleset import nft
from ctrace.ruleset.users import nft_uses, xt_uses

Span = tuple[int, int, int]
"""IP version, first and last address as numbers."""
_TO: Final = re.compile(r"--to-destination (\S+)")
_XT_PORTS: Final = re.compile(r"(?:--to-ports |--to-source \S+:)(\d+)(?:-(\d+))?")
USUAL: Final = (1024, 65535)
"""What source NAT takes without a range of its own, for ports from 1024 on
(nf_nat_l4proto_unique_tuple in nf_nat_core.c)."""
_LINE: Final = re.compile(r"(?:\[(?P<packets>\d+):\d+\] )?-A (?P<chain>\S+)")
_ABOVE: Final = re.compile(r"(?<!! )--connlimit-above (\d+)")
_INVALID: Final = re.compile(r"(?<!! )--(?:ct)?state INVALID(?![,\w])")
STATE: Final = {"ct": {"key": "state"}}
_UNTOLD: Final = ("NETMAP", "netmap", "-j REDIRECT", "TPROXY", "-j DNPT")


@dataclass(frozen=True)
class Met:
    """One rule, and how many packets it has dropped or refused so far."""

    place: str
    """``inet filter input``: family, table and chain; ``iptables filter INPUT, rule 3``."""
    handle: int
    """0: it has none, as a rule of iptables."""
    kind: str
    """``limit`` (of connections at once) or ``invalid``."""
    limit: int = 0
    packets: Optional[int] = None
    """By the rule's own counter; None where it has none."""


@dataclass(frozen=True)
class Told:
    """What the rules of one namespace say."""

    met: tuple[Met, ...] = ()
    targets: Optional[tuple[Span, ...]] = None
    """Addresses that destination NAT may lead to; None where that is not certain."""
    ports: tuple[tuple[int, int], ...] = ()
    """Ranges of ports that source NAT may take, first and last."""

    untracked: frozenset[tuple[str, str, int]] = frozenset()
    """Protocol, ``dport`` or ``sport``, and port of what rules take out of tracking."""
    zones: bool = False
    """Whether a rule puts packets into a zone."""

    echo: bool = False
    """Whether pings fare the same without entries: what reads entries is about TCP or UDP."""

    def leads_to(self, address: str) -> bool:
        """Whether a rule may translate to an address; True where that is not certain."""
        if self.targets is None:
            return True
        found = ip_address(address)
        mapped = found.ipv4_mapped if found.version == 6 else None
        one = mapped or found
        return any(v == one.version and low <= int(one) <= high for v, low, high in self.targets)


def told(document: dict[str, Any]) -> Told:
    """Of a :func:`ctrace.ruleset.reader.dump`."""
    try:
        items = nft.objects_of(document["nft"]) if document["nft"] else []
    except (ValueError, KeyError, TypeError):
        return Told()
    lines = [line for _, _, text in document.get("saves", ()) for line in text.splitlines()]
    return Told(
        tuple(_met(document, items)),
        _targets(document, items),
        tuple(_ports(document, items)),
        frozenset(_untracked(items, lines)),
        '{"key": "zone"' in document["nft"] or any(" --zone" in line for line in lines),
        _echo(document, items),
    )


def _met(document: dict[str, Any], items: list[Any]) -> Iterator[Met]:
    """Rules that refuse, from nft's listing and, of iptables' tables, from its own."""
    saved = set()
    for tool, family, text in document.get("saves", ()):
        yield from _met_in_lines(text, family)
        if tool == "iptables-nft":
            saved |= {(family, name) for name in re.findall(r"(?m)^\*(\S+)", text)}
    rules = [one["rule"] for one in items if isinstance(one, dict) and _is_rule(one.get("rule"))]
    refusing = {_chain(rule) for rule in rules if any(map(_refuses, _parts(rule)))}
    refusing -= {_chain(rule) for rule in rules if not _only_refuses(_parts(rule))}
    for rule in rules:
        parts = _parts(rule)
        family, table, chain = _chain(rule)
        if (family, table) in saved or not any(
            _refuses(one) or (family, table, _target(one)) in refusing for one in parts
        ):
            continue
        kind, limit = _kind(parts)
        if kind:
            counters = (one.get("counter") for one in parts)
            packets = next((one["packets"] for one in counters if isinstance(one, dict)), None)
            if kind == "invalid" and any("vmap" in one for one in parts):
                packets = None  # of every packet that is looked up
            handle = int(rule.get("handle", 0))
            yield Met(f"{family} {table} {chain}", handle, kind, limit, packets)


def _is_rule(rule: Any) -> bool:
    return isinstance(rule, dict) and isinstance(rule.get("expr", []), list)


def _parts(rule: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in rule.get("expr", ()) if isinstance(one, dict)]


def _chain(rule: dict[str, Any]) -> tuple[str, str, str]:
    return str(rule.get("family")), str(rule.get("table")), str(rule.get("chain"))


def _only_refuses(parts: list[dict[str, Any]]) -> bool:
    """Whether a rule asks nothing of what comes to it: it counts, logs or refuses it."""
    return all({"counter", "log", "drop", "reject"} & one.keys() for one in parts)


def _target(part: dict[str, Any]) -> str:
    """The chain that a part jumps or goes to; empty: none."""
    body = part.get("jump") or part.get("goto")
    return str(body.get("target")) if isinstance(body, dict) else ""


def _refuses(part: dict[str, Any]) -> bool:
    if "drop" in part or "reject" in part:
        return True
    xt, vmap = part.get("xt"), part.get("vmap")
    if isinstance(vmap, dict):
        return ["invalid", {"drop": None}] in list(_elements(vmap))
    return isinstance(xt, dict) and xt.get("type") == "target" and xt.get("name") == "REJECT"


def _elements(vmap: dict[str, Any]) -> Iterator[Any]:
    """What a map of packets' states to verdicts has, if it is written in the rule."""
    data = vmap.get("data")
    if vmap.get("key") == STATE and isinstance(data, dict) and isinstance(data.get("set"), list):
        yield from data["set"]


def _kind(parts: list[dict[str, Any]]) -> tuple[str, int]:
    for count in _found(parts, "ct count"):
        # Without "over" it matches those within the number.
        return ("limit", int(count.get("val", 0))) if count.get("inv") else ("", 0)
    for one in parts:
        xt, match = one.get("xt"), one.get("match")
        if isinstance(xt, dict) and xt.get("name") == "connlimit":
            return "limit", 0
        if "vmap" in one:
            return "invalid", 0
        if isinstance(match, dict) and match.get("left") == STATE:
            right = match.get("right")
            if match.get("op") in ("==", "in") and right in ("invalid", ["invalid"]):
                return "invalid", 0
    return "", 0


def _found(value: Any, name: str) -> Iterator[dict[str, Any]]:
    """Objects with this name, wherever in it."""
    if isinstance(value, list):
        for one in value:
            yield from _found(one, name)
    elif isinstance(value, dict):
        for key, one in value.items():
            if key == name and isinstance(one, dict):
                yield one
            yield from _found(one, name)


def _met_in_lines(text: str, family: str) -> Iterator[Met]:
    """The same of what ``iptables-save -c`` prints: a rule has no handle, but a place."""
    table, position = "", Counter[str]()
    for line in text.splitlines():
        if line.startswith("*"):
            table, position = line[1:].strip(), Counter()
        found = _LINE.match(line)
        if found is None:
            continue
        position[found["chain"]] += 1
        if not re.search(r" -j (?:DROP|REJECT)\b", line):
            continue
        limit, invalid = _ABOVE.search(line), _INVALID.search(line)
        if limit or invalid:
            name = f"{'ip6' if family == 'ip6' else 'ip'}tables {table} {found['chain']}"
            yield Met(
                f"{name}, rule {position[found['chain']]}",
                0,
                "limit" if limit else "invalid",
                int(limit[1]) if limit else 0,
                None if found["packets"] is None else int(found["packets"]),
            )


def _targets(document: dict[str, Any], items: list[Any]) -> Optional[tuple[Span, ...]]:
    """Every address that destination NAT names; None where something else may translate as well."""
    if document.get("gaps") or document.get("ipvs") or document.get("planes"):
        return None
    words: list[str] = []
    for _, _, text in document.get("saves", ()):
        if any(one in text for one in _UNTOLD):
            return None
        words += _TO.findall(text)
    for item in items:
        rule = item.get("rule") if isinstance(item, dict) else None
        for part in rule.get("expr", ()) if isinstance(rule, dict) else ():
            if "redirect" in part or "tproxy" in part:
                return None
            if "dnat" in part:
                named = list(_strings(part["dnat"]))
                if any(word.startswith("@") for word in named):
                    return None
                words += named
    spans = [_span(word) for word in words]
    return tuple(one for one in spans if one is not None)


def _ports(document: dict[str, Any], items: list[Any]) -> Iterator[tuple[int, int]]:
    """For each rule with source NAT its own range, or else the one that the kernel uses."""
    for _, _, text in document.get("saves", ()):
        for line in text.splitlines():
            if "-j MASQUERADE" in line or "-j SNAT" in line:
                found = _XT_PORTS.search(line)
                yield (int(found[1]), int(found[2] or found[1])) if found else USUAL
    for item in items:
        rule = item.get("rule") if isinstance(item, dict) else None
        for part in rule.get("expr", ()) if isinstance(rule, dict) else ():
            for kind in ("masquerade", "snat"):
                if kind not in part:
                    continue
                body = part[kind] if isinstance(part[kind], dict) else {}
                port = body.get("port")
                span = port.get("range") if isinstance(port, dict) else [port, port]
                if isinstance(span, list) and all(isinstance(one, int) for one in span):
                    yield int(span[0]), int(span[-1])
                elif port is None:
                    yield USUAL


def _untracked(items: list[Any], lines: list[str]) -> Iterator[tuple[str, str, int]]:
    """What rules with NOTRACK name: protocol, which of the ports, and the port."""
    for line in lines:
        if re.search(r" -j (?:NOTRACK|CT --notrack)\b", line):
            proto = re.search(r" -p (tcp|udp)\b", line)
            for way, port in re.findall(r" --([sd]port)s? (\d+)(?![\d:])", line):
                yield (proto[1] if proto else ""), way, int(port)
    for item in items:
        rule = item.get("rule") if isinstance(item, dict) else None
        parts = _parts(rule) if isinstance(rule, dict) else []
        for part in parts if any("notrack" in one for one in parts) else ():
            for match in _found(part, "match"):
                left = match.get("left")
                payload = left.get("payload") if isinstance(left, dict) else None
                if isinstance(payload, dict) and payload.get("field") in ("sport", "dport"):
                    for port in _numbers(match.get("right")):
                        yield str(payload.get("protocol")), str(payload["field"]), port


def _echo(document: dict[str, Any], items: list[Any]) -> bool:
    """Whether no rule that pings may come to decides by their entries. Whoever may, is taken for
    one: any rule that reads or needs an entry, decides something, and isn't of TCP or UDP alone."""
    if document.get("gaps") or document.get("ipvs") or document.get("planes"):
        return False
    for item in items:
        rule = item.get("rule") if isinstance(item, dict) else None
        parts = _parts(rule) if isinstance(rule, dict) else []
        decides = any(not {"match", "counter", "log", "limit"} & one.keys() for one in parts)
        if decides and any(nft_uses(parts)) and not any(map(_of_ports, parts)):
            return False
    legacy = (text for tool, _, text in document.get("saves", ()) if tool == "iptables-legacy")
    lines = (line for text in legacy for line in text.splitlines() if " -j " in line)
    return not any(
        any(xt_uses(line.split())) and not re.search(r"(?<!! )-p (?:tcp|udp)\b", line)
        for line in lines
    )


def _of_ports(part: dict[str, Any]) -> bool:
    """Whether a match lets TCP or UDP through alone."""
    match = part.get("match")
    left = match.get("left") if isinstance(match, dict) and match.get("op") == "==" else None
    if not isinstance(match, dict) or not isinstance(left, dict):
        return False
    payload = left.get("payload")
    if isinstance(payload, dict) and payload.get("protocol") in ("tcp", "udp"):
        return True
    return left == {"meta": {"key": "l4proto"}} and match.get("right") in ("tcp", "udp", 6, 17)


def _numbers(value: Any) -> Iterator[int]:
    """Ports of a match: one, or those of a set that is written in the rule."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict) and isinstance(value.get("set"), list):
        yield from (one for one in value["set"] if isinstance(one, int))


def _strings(value: Any) -> Iterator[str]:
    """Texts in JSON; a range and a prefix as one."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)
    elif isinstance(value, dict):
        if "range" in value and all(isinstance(one, str) for one in value["range"]):
            yield "-".join(value["range"])
        elif "prefix" in value:
            yield f"{value['prefix'].get('addr')}/{value['prefix'].get('len')}"
        else:
            for one in value.values():
                yield from _strings(one)


def _span(word: str) -> Optional[Span]:
    """``10.0.0.1``, ``10.0.0.1-10.0.0.9:80``, ``[fd00::1]:80``, ``10.0.0.0/24``."""
    if "/" in word:
        try:
            net = ip_network(word, strict=False)
        except ValueError:
            return None
        return net.version, int(net[0]), int(net[-1])
    if word.startswith("["):
        word = word[1:].partition("]")[0]
    elif word.count(":") == 1:
        word = word.partition(":")[0]
    low, _, high = word.partition("-")
    try:
        first, last = ip_address(low), ip_address(high or low)
    except ValueError:
        return None
    return first.version, int(first), int(last)
