"""Interfaces and their addresses as ``ip addr`` prints them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Optional

from ctrace.errors import CtraceError
from ctrace.rehearsal.snapshot import Device

MOST: Final = 400
"""Interfaces: each becomes one in every rehearsal."""
TYPES: Final = {
    "ether": 1, "loopback": 772, "none": 65534, "ppp": 512, "ipip": 768, "tunnel": 768,
    "tunnel6": 769, "sit": 776, "gre": 778, "gre6": 823, "slip": 256, "ieee802.11": 801,
    "infiniband": 32,
}  # fmt: skip
"""ARPHRD_* by the names of iproute2 (lib/ll_types.c)."""
KINDS: Final = (
    "vlan|bridge|bond|veth|dummy|vrf|tun|vxlan|gre|gretap|ip6gre|ip6gretap|ipip|sit|ip6tnl|vti|vti6"
    "|wireguard|macvlan|macvtap|ipvlan|team|ifb|netkit|openvswitch|erspan|geneve|xfrm|nlmon|hsr"
    "|macsec|lowpan|ipoib|bareudp|amt|rmnet|gtp|dsa"
)
_HEAD: Final = re.compile(r"^(\d{1,9}): ([^\s:@]{1,15})(?:@(\S{1,15}))?: <([A-Z0-9,_-]*)>(.*)$")
_LINK: Final = re.compile(r"^\s+link/(\S+)(?:\s+([0-9a-f]{2}(?::[0-9a-f]{2})*))?(.*)$")
_KIND: Final = re.compile(rf"^\s+({KINDS})(?:_slave)?\b")
_SLAVE: Final = re.compile(r"^\s+(bridge|bond|vrf|openvswitch|netkit|team)_slave\b")
_ADDRESS: Final = re.compile(
    r"^\s+inet6? ([0-9a-fA-F:.]+)(?: peer ([0-9a-fA-F:.]+))?/(\d{1,3})(.*)$"
)
_SCOPES: Final = ("host", "link", "global", "site")


@dataclass
class Links:
    """The links that were read."""

    devices: list[Device] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    """Arguments of ``ip addr add``."""
    six: bool = False
    """Whether any interface but lo has an IPv6 address."""
    planes: list[tuple[str, str]] = field(default_factory=list)
    """(interface, what sees packets there before the rules)."""
    away: list[str] = field(default_factory=list)
    """Veth interfaces with the other end in another namespace."""
    unclear: list[str] = field(default_factory=list)
    """Interfaces of unknown kind: the text was made without ``-d``."""
    groups: bool = False
    """Whether any is in a named group."""


def read(text: str) -> Links:
    """Raises CtraceError for links that cannot be recreated."""
    found = Links()
    for head, body in _blocks(text):
        _device(found, head, body)
        if len(found.devices) > MOST:
            raise CtraceError(f"the evidence has more than {MOST} interfaces")
    masters = {device.name: device for device in found.devices}
    for head, _ in _blocks(text):
        said = re.search(r" master (\S+)", head[5])
        if said and said[1] in masters and not masters[said[1]].what:
            found.unclear.append(said[1])
    found.unclear = list(dict.fromkeys(found.unclear))
    return found


def _blocks(text: str) -> Iterator[tuple[re.Match[str], list[str]]]:
    head: Optional[re.Match[str]] = None
    body: list[str] = []
    for line in text.splitlines():
        said = _HEAD.match(line)
        if said:
            if head:
                yield head, body
            head, body = said, []
        else:
            body.append(line)
    if head:
        yield head, body


def _device(found: Links, head: re.Match[str], body: list[str]) -> None:
    index, name, flags, rest = int(head[1]), head[2], head[4].split(","), head[5]
    link = next((said for line in body if (said := _LINK.match(line))), None)
    if not re.fullmatch(r"[\w.+-]+", name):
        raise CtraceError(f"an interface is called {name!r}")
    if link is None or link[1] not in TYPES:
        raise CtraceError(f"the kind of interface {name} is unknown: give ip -d addr")
    kind = TYPES[link[1]]
    detailed = any(" promiscuity " in line or " minmtu " in line for line in (*body, rest))
    what = next(
        (
            said[1]
            for line in body
            if detailed and (said := _KIND.match(line)) and "_slave" not in said[0]
        ),
        "",
    )
    slave = next((said[1] for line in body if (said := _SLAVE.match(line))), "")
    for one, of in (("openvswitch", "Open vSwitch"), ("netkit", "netkit"), ("vrf", "a VRF")):
        if one in (what, slave):
            found.planes.append((name, of))
    if re.search(r"\bxdp\w*\b", rest + "".join(body)):
        found.planes.append((name, "an XDP program"))
    if not detailed and "MASTER" in flags and "NOARP" in flags:
        found.unclear.append(name)
    if what == "veth" and "link-netns" in link[3]:
        found.away.append(name)
    group = re.search(r" group (\S+)", rest)
    if group and group[1] != "default" and not group[1].isdigit():
        found.groups = True
    mtu = re.search(r" mtu (\d{1,6})", rest)
    found.devices.append(
        Device(
            index,
            name,
            kind,
            "UP" in flags,
            what,
            0,
            bytes.fromhex((link[2] or "").replace(":", ""))[:6],
            int(mtu[1]) if mtu else 1500,
            int(group[1]) if group and group[1].isdigit() and len(group[1]) < 10 else 0,
        )
    )
    _addresses(found, name, body)


def _addresses(found: Links, device: str, body: list[str]) -> None:
    for line in body:
        said = _ADDRESS.match(line)
        if not said:
            continue
        address, peer, length, rest = said.groups()
        words = rest.split()
        six = ":" in address
        found.six |= six and device != "lo"
        if "dadfailed" in words:
            continue  # nobody uses it
        parts = [address, "peer", f"{peer}/{length}"] if peer else [f"{address}/{length}"]
        following = dict(zip(words, words[1:]))
        if re.fullmatch(r"[0-9.]+", following.get("brd", "")):
            parts += ["brd", following["brd"]]
        if following.get("scope") in _SCOPES:
            parts += ["scope", following["scope"]]
        if re.fullmatch(r"\d{1,10}", following.get("metric", "")):
            parts += ["metric", following["metric"]]
        parts += ["dev", device]
        parts += [flag for flag in ("noprefixroute", "home") if flag in words]
        found.addresses.append(" ".join([*parts, "nodad"] if six else parts))
