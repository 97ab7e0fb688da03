"""What a rule set names: addresses, ports, users. Only that: what rules do with it is for the
kernel to say.

Addresses are put into classes: those of one set, and those of rules that are the same but for
them. Where a rule set names thousands, some of each class are tried.
"""

from __future__ import annotations

import re
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Final, Optional, TypeVar

from ctrace.host.rawlink import Attributes, number, split, word
from ctrace.rehearsal.conditions.needs import Needs
from ctrace.rehearsal.nft_copy import ELEMENT, RULE, SET, Expression, expressions
from ctrace.rehearsal.snapshot import Snapshot
from ctrace.ruleset.model import Ruleset

_Any = TypeVar("_Any")
_IPV4, _IPV6, _SERVICE, _UID, _GID = 7, 8, 13, 24, 25
"""Data types as nft numbers them (include/datatype.h)."""
_WIDTH: Final = {_IPV4: 4, _IPV6: 16, _SERVICE: 2, _UID: 4, _GID: 4}
_ADDRESS: Final = re.compile(
    r"(?<![\w.:])(?:\d+\.\d+\.\d+\.\d+|[0-9a-f]*:[0-9a-f:]+)(?:/\d+)?(?![\w.])"
)
_PORT: Final = re.compile(r"(?<![\w.:/x])(\d{1,5})(?![\w./x])|(?<=[\d\]]:)(\d{1,5})(?![\w.])")
_SHIFT: Final = re.compile(r"--to-destination \S+:(\d+)-(\d+)/(\d+)")
_NAMES: Final = re.compile(r"\b[A-Z0-9]{16}\b|(?<=--comment )(?:\"[^\"]*\"|\S+)")
"""Of one service, say: a hash, a comment."""
_BY_BITS: Final = re.compile(
    r"/(?:\d+\.){3}\d+|/[0-9a-f]*:|-m (?:cluster|u32|bpf)\b|-j (?:HMARK|CLUSTERIP)\b"
)
"""Rules that choose addresses otherwise than by networks."""
_USER: Final = re.compile(r"--[ug]id-owner (\d+)(?:-(\d+))?")


FEWEST: Final = 4
MOST_ALIKE: Final = 64
"""Addresses of one class, at least and at most, where there are too many to try them all."""


@dataclass
class Named:
    """Addresses, ports and users found in the rules."""

    classes: dict[object, dict[bytes, None]] = field(default_factory=lambda: defaultdict(dict))
    """Addresses by class."""
    ports: set[int] = field(default_factory=set)
    uids: set[int] = field(default_factory=set)
    nat: bool = False
    """Whether anything is translated."""
    beside: dict[int, dict[bytes, None]] = field(default_factory=lambda: defaultdict(dict))
    """By port the addresses that stand in one rule with it, or in one element of a set."""
    asked: set[tuple[int, bytes, bytes]] = field(default_factory=set)
    """(family, table, name) of sets that a rule looks something up in."""
    security: bool = False
    """Whether connections keep security marks, of which no copy can tell."""
    shifts: set[tuple[int, int, int]] = field(default_factory=set)
    """(first, last, base): ports from ``base`` on are translated to these, one by one."""
    bounds: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    """By an address's length: the first of each network and address, and the first behind it. No
    comparison tells two addresses apart between which there is none of these."""
    scattered: bool = False
    """Whether rules pick addresses by a hash, or by other bits than a network's."""
    _addresses: list[bytes] = field(default_factory=list)
    _ports: list[int] = field(default_factory=list)

    def addresses(self, most: int, port: int) -> tuple[list[bytes], int]:
        """(addresses of all classes, how many are not among them).

        All of them up to ``most``; beyond that some of each class, evenly, and those whose rule
        names the port.
        """
        every = {address for found in self.classes.values() for address in found}
        if len(every) <= most:
            return sorted(every), 0
        classes: dict[object, dict[bytes, None]] = self.classes
        if FEWEST * len(classes) > most:  # a chain for each service, say
            classes = defaultdict(dict)
            for kind, found in self.classes.items():
                classes[_anywhere(kind)].update(found)
        each = min(MOST_ALIKE, max(FEWEST, most // len(classes)))
        chosen = dict.fromkeys(evenly(sorted(self.beside.get(port, {})), most))
        for found in classes.values():
            chosen.update(dict.fromkeys(evenly(sorted(found), each)))
        return sorted(chosen), len(every) - len(chosen)

    def together(self) -> None:
        """A rule or an element ends: what it named stands beside each other."""
        if self._addresses:
            for port in self._ports:
                self.beside[port].update(dict.fromkeys(self._addresses))
        self._addresses, self._ports = [], []

    def leading_to(self, port: int) -> set[int]:
        """Ports that a shift of a whole range translates to this one."""
        return {base + port - low for low, high, base in self.shifts if low <= port <= high}

    def port(self, value: int) -> None:
        """A port."""
        self.ports.add(value)
        self._ports.append(value)

    def _net(self, text: str, kind: object) -> None:
        try:
            net = ip_network(text, strict=False)
        except ValueError:
            self.scattered |= "/" in text
            return
        self.take(net.network_address.packed, net.prefixlen, kind)

    def take(self, address: bytes, length: int, kind: object) -> None:
        """An address, or the first hosts of a network."""
        first = ip_address(address)
        if first.is_multicast or (first.is_unspecified and length == first.max_prefixlen):
            return
        size = 1 << first.max_prefixlen - length
        begin = int(first) & -size
        self.bounds[len(address)] |= {begin, begin + size}
        if length in (0, first.max_prefixlen):
            hosts = [address] if length else []
        else:
            hosts = (
                [(first + 1).packed, (first + 2).packed]
                if int(first) + 2 < 1 << len(address) * 8
                else []
            )
        self.classes[kind].update(dict.fromkeys(hosts))
        self._addresses += hosts

    def text(self, line: str, place: str) -> None:
        """A rule of iptables, or a line about an ipset."""
        kind = place, _NAMES.sub("*", _ADDRESS.sub("*", line))
        for found in _ADDRESS.finditer(line):
            self._net(found[0], kind)
        bare = _ADDRESS.sub(lambda m: ":" if ":" in m[0] and "." not in m[0] else "", line)
        for found in _PORT.finditer(bare):
            value = int(found[1] or found[2])
            if 0 < value < 65536:
                self.port(value)
        for found in _SHIFT.finditer(line):
            self.shifts.add((int(found[1]), int(found[2]), int(found[3])))
        self.uids |= {int(n) for found in _USER.finditer(line) for n in found.groups() if n}
        self.security |= " CONNSECMARK " in f"{line} "
        self.scattered |= bool(_BY_BITS.search(line))
        self.nat = self.nat or bool(re.search("DNAT|SNAT|MASQUERADE|REDIRECT|NETMAP", line))
        self.together()


def _anywhere(kind: object) -> object:
    """A class without the chain, set or map that it is of."""
    if isinstance(kind, tuple) and len(kind) == 2 and isinstance(kind[0], tuple):
        return kind[0][0], kind[1]
    return kind[0] if isinstance(kind, tuple) and len(kind) == 3 else kind


def evenly(every: Sequence[_Any], most: int) -> list[_Any]:
    """An even part of them, or all where these are no more than ``most``."""
    return list(every[:: -(-len(every) // most) or 1])


def named(snapshot: Snapshot, ruleset: Optional[Ruleset], needs: Needs) -> Named:
    """Of all rules, sets and maps. ``needs`` sees each rule of nftables, too: it takes long to take
    them apart."""
    found = Named()
    types = {}
    for kind, family, body in snapshot.nft:
        of = dict(split(body))
        if kind == SET:
            flags = number(of.get(3, b""))
            fields = _types(number(of.get(4, b""))), _types(number(of.get(6, b"")))
            types[family, of[1], of[2]] = (*fields, bool(flags & 4))
            needs.see_set(family, of)
        elif kind == ELEMENT:
            about = types.get((family, of[1], of[2]))
            needs.see_elements(family, of)
            if about:
                _listed(found, of[3], about, (family, of[1], of[2]))
        elif kind == RULE and 4 in of:
            taken = expressions(of[4])
            _rule(found, taken, (family, of[1], of[2]))
            found.together()
            found.asked |= {
                (family, of[1], dict(about)[1]) for name, about in taken if name == "lookup"
            }
            found.security |= any(_keeps_security(name, dict(about)) for name, about in taken)
            needs.see(family, body, taken)
    needs.decide()
    for chain in ruleset.chains if ruleset else ():
        if chain.tool != "nft":
            place = f"{chain.family} {chain.table} {re.sub('[A-Z0-9]{16}', '*', chain.name)}"
            for rule in chain.rules:
                found.text(rule.text, place)
    for line in snapshot.ipsets:
        if line.startswith("add "):
            found.text(line.replace(",", " "), line.split()[1])
    return found


def _listed(found: Named, elements: bytes, about: _About, kind: object) -> None:
    for value, parts, interval in _elements(elements, about):
        if parts is about[0]:
            found.together()
        _values(found, value, parts, interval, kind)
    found.together()


def _types(packed: int) -> tuple[int, ...]:
    """A set's key type: six bits for each part of it."""
    out = []
    while packed:
        out.append(packed & 63)
        packed >>= 6
    return tuple(reversed(out))


_About = tuple[tuple[int, ...], tuple[int, ...], bool]


def _elements(data: bytes, about: _About) -> Iterator[tuple[bytes, tuple[int, ...], bool]]:
    for _, element in split(data):
        of = dict(split(element))
        for key, fields in ((1, about[0]), (10, about[0]), (2, about[1])):
            if key in of:
                value = dict(split(of[key])).get(1)
                if value:
                    yield value, fields, about[2] and key != 2


def _values(
    found: Named, value: bytes, fields: tuple[int, ...], interval: bool, kind: object
) -> None:
    widths = _widths(fields, len(value))
    at = 0
    for one, width in zip(fields, widths):
        part = value[at : at + width]
        at += (width + 3) & ~3
        if len(part) < width:
            return
        if one in (_IPV4, _IPV6):
            found.take(part, width * 8, kind)
            if interval and any(part) and part != b"\xff" * width:
                found.take((ip_address(part) + 1).packed, width * 8, kind)
        elif one == _SERVICE:
            found.port(struct.unpack(">H", part)[0])
        elif one in (_UID, _GID):
            found.uids.add(_user(part, ordered=interval))


def _user(value: bytes, *, ordered: bool) -> int:
    """``ordered``: ranges are compared in network byte order."""
    return int(struct.unpack(">I" if ordered else "=I", value)[0])


def _widths(fields: tuple[int, ...], length: int) -> list[int]:
    """Of the parts of a key; empty where they are not certain. Each begins at a word of 32 bits."""
    known = [_WIDTH.get(one, 4) for one in fields]
    more = length - sum((width + 3) & ~3 for width in known)
    strange = [at for at, one in enumerate(fields) if one not in _WIDTH]
    if len(fields) > 1 and more > 0:
        if len(strange) != 1:
            return []
        known[strange[0]] += more  # an interface's name, say
    return known


def _rule(found: Named, rule: list[Expression], place: object) -> None:
    has_nat = any(name in ("nat", "masq", "redir", "tproxy") for name, _ in rule)
    found.nat = found.nat or has_nat
    kind = place, tuple((name, _alike(name, of)) for name, of in rule)
    loads: dict[bytes, tuple[str, int]] = {}
    masks: dict[bytes, int] = {}
    for name, attributes in rule:
        of = dict(attributes)
        found.scattered |= name == "hash"
        if name in ("payload", "meta", "ct") and 1 in of:
            loads[of[1]] = _loaded(name, of)
            masks.pop(of[1], None)
        elif name == "byteorder" and of.get(1) in loads:
            loads[of[2]] = _ORDERED.get(loads[of[1]], loads[of[1]])
        elif name == "bitwise" and 4 in of and of.get(1) in loads:
            loads[of[2]] = loads[of[1]]
            mask = int.from_bytes(mask_bytes := dict(split(of[4])).get(1, b""), "big")
            masks[of[2]] = bin(mask).count("1")
            hosts = mask ^ ((1 << 8 * len(mask_bytes)) - 1)
            found.scattered |= loads[of[2]][0].startswith("address") and bool(hosts & (hosts + 1))
        elif name == "cmp" and of.get(1) in loads:
            what, width = loads[of[1]]
            value = dict(split(of[3])).get(1, b"")
            _compared(found, what, width, value, masks.get(of[1]), kind)
        elif name == "range" and of.get(1) in loads:
            for key in (3, 4):
                value = dict(split(of[key])).get(1, b"")
                _compared(found, *loads[of[1]], value, None, kind)
        elif name == "immediate" and has_nat and 2 in of:
            value = dict(split(of[2])).get(1, b"")
            if len(value) in (4, 16):
                found.take(value, len(value) * 8, kind)
            elif len(value) == 2:
                found.port(struct.unpack(">H", value)[0])


def _alike(name: str, attributes: Attributes) -> object:
    """What one class of rules has in common: no values, of a verdict its code without a chain."""
    if name == "immediate":
        verdict = dict(split(dict(split(dict(attributes).get(2, b""))).get(2, b"")))
        return verdict.get(1)
    return None if name in ("cmp", "lookup", "bitwise", "counter") else tuple(attributes)


def _keeps_security(name: str, of: dict[int, bytes]) -> bool:
    """Whether it reads or writes an entry's security mark (NFT_CT_SECMARK 4)."""
    if name == "target":
        return word(of[1]) == "CONNSECMARK"
    return name == "ct" and number(of.get(2, b"")) == 4


_FIELD: Final = {"ports": "port", "addresses": "address"}
_OF_ENTRIES: Final = {
    **dict.fromkeys((8, 9), ("address", 0)),  # of either family
    **dict.fromkeys((21, 22), ("address", 16)),
    **dict.fromkeys((19, 20), ("address", 4)),
    **dict.fromkeys((11, 12), ("port", 2)),
}
"""NFT_CT_SRC, _DST, _SRC_IP, _DST_IP, _SRC_IP6, _DST_IP6, _PROTO_SRC, _PROTO_DST."""
_ORDERED: Final = {("uid", 4): ("ordered uid", 4)}


def _loaded(name: str, of: dict[int, bytes]) -> tuple[str, int]:
    if name == "meta":
        return {10: ("uid", 4), 11: ("uid", 4)}.get(number(of.get(2, b"")), ("", 0))
    if name == "ct":
        return _OF_ENTRIES.get(number(of.get(2, b"")), ("", 0))
    base, offset, length = number(of[2]), number(of[3]), number(of[4])
    if (base, offset, length) in ((2, 0, 4), (1, 12, 8)):
        return ("ports", 2) if base == 2 else ("addresses", 4)  # two fields compared at once
    if base == 1:
        return {
            12: ("address", 4),
            16: ("address", 4),
            8: ("address", 16),
            24: ("address", 16),
        }.get(offset, ("", 0))
    return ("port", 2) if base == 2 and offset in (0, 2) else ("", 0)


def _compared(
    found: Named, what: str, width: int, value: bytes, mask: Optional[int], kind: object
) -> None:
    width = width or len(value)
    if what == "address" and len(value) <= width:
        # Networks of whole bytes are compared by those bytes alone.
        length = mask if mask is not None else len(value) * 8
        found.take(value + bytes(width - len(value)), length, kind)
    elif what == "port" and len(value) == 2:
        found.port(struct.unpack(">H", value)[0])
    elif what in ("ports", "addresses") and mask is None and len(value) == 2 * width:
        for part in (value[:width], value[width:]):
            _compared(found, _FIELD[what], width, part, None, kind)
    elif what in ("uid", "ordered uid") and len(value) == 4:
        found.uids.add(_user(value, ordered=what != "uid"))
