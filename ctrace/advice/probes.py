"""Probes: the packets of a service as a ruleset would see them, one of each kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Final, Optional

from ctrace.change.plan import Notrack
from ctrace.record import PROTO_NUMBERS
from ctrace.ruleset.evaluate import ICMP, ICMP6, UNKNOWN_DEVICE, Packet
from ctrace.ruleset.model import Rule, Ruleset

SYN, ACK, SYN_ACK = 0x02, 0x10, 0x12
STRANGER: Final = {"ip": "198.51.100.77", "ip6": "2001:db8:77::77"}
"""An address that no rule names: documentation prefixes."""
HERE: Final = {"ip": "192.0.2.1", "ip6": "2001:db8:1::1"}
"""This host, where none of its addresses is known."""
LOOPBACK: Final = {"ip": "127.0.0.1", "ip6": "::1"}
MOST: Final = 8
"""Addresses of one kind that are tried."""

IN: Final = ("prerouting", "input")
OUT: Final = ("output", "postrouting")
THROUGH: Final = ("prerouting", "forward", "postrouting")
AROUND: Final = ("output", "postrouting", "prerouting", "input")


@dataclass(frozen=True)
class Subject:
    """A service as the table's entries show it, in one namespace."""

    proto: str
    port: int
    roles: tuple[str, ...]
    local: tuple[str, ...] = ()
    """Addresses of the namespace."""
    peers: tuple[str, ...] = ()
    """Far ends seen: clients of a server, servers of a client, servers behind a router."""
    clients: tuple[str, ...] = ()
    """For the forward role: where the connections came from."""
    nat: str = ""
    """``no``, or what was seen on its entries: ``src``, ``dst``; empty: nothing seen."""
    reply_ports: tuple[int, ...] = ()
    """Ports that translated entries of the namespace answer from."""
    ephemeral: tuple[int, int] = (32768, 60999)
    picked: bool = True
    """Whether the kernel may pick ``port`` as a source port: neither reserved nor listened on."""
    status: int = 0
    """Status bits seen on any of its entries (enum ip_conntrack_status)."""
    shared_now: bool = False
    """Whether a translated connection of another host has the service's port now."""
    forwarding: bool = True
    """Whether the namespace routes (``net.ipv4.ip_forward`` or IPv6's); True if not known."""


@dataclass(frozen=True)
class Probe:
    """A packet and what it stands for."""

    packet: Packet
    role: str
    flow: str
    """``to`` or ``from`` the port, or ``icmp``."""
    service: bool = True
    """Part of the service's own traffic, which has to be untracked for any gain."""


Flow = tuple[Probe, ...]
"""The packets of one connection, its first one in front; or one stranger's packet."""


def flows(subject: Subject, lever: Notrack, ruleset: Ruleset) -> Iterator[Flow]:
    """Every kind of connection and packet that the lever touches."""
    for family in families(subject):
        here = _local(subject, family)
        named = _named(ruleset, family)
        sources = [*_of(subject.peers, family), STRANGER[family], *named]
        servers = _of(lever.peers or subject.peers, family) or [STRANGER[family]]
        if not lever.peers:  # the rules are for any address, so also for one that is translated
            servers += [a for a in _targets(ruleset, family, lever.port) if a not in here]
        clients = [*_of(subject.clients, family), *named] or [STRANGER[family]]
        for role in lever.roles:
            if role in ("client", "forward") and lever.peers and not _of(lever.peers, family):
                continue  # no rule is for this family
            if role == "server":
                yield from (_server(lever, family, me, far) for me in here for far in sources)
            elif role == "client":
                yield from (_client(lever, family, me, far) for me in here[:2] for far in servers)
                # A UDP server that is called may reach this host from its port: no handshake
                # could tell. For TCP even a known server gets nowhere with a SYN.
                known = lever.peers if lever.proto == "udp" else ()
                others = [far for far in sources if far not in known]
                yield from _strangers(lever, family, here[0], ruleset, others)
            elif role == "forward":
                pairs = [(source, far) for far in servers for source in clients if source != far]
                for source, far in pairs:
                    yield _forward(lever, family, source, far)
                    yield from _scans(lever, family, source)
                yield from (_neighbour(lever, family, far) for far in servers)
            if role in ("server", "loopback"):
                yield _loopback(lever, family, role)


def gateway(subject: Subject, lever: Notrack) -> Iterator[Packet]:
    """First packets of connections that others make to the port through this host.

    When they are masqueraded, their replies arrive at this host's own address and
    a client's rules would catch them.
    """
    for family in families(subject):
        servers = _of(lever.peers or subject.peers, family) or [STRANGER[family]]
        for far in servers:
            yield _packet(
                lever, family, "a forwarded connection", THROUGH, None, far,
                dport=lever.port, sport=_middle(lever), flags=SYN,
                iif=UNKNOWN_DEVICE, oif=UNKNOWN_DEVICE,
            )  # fmt: skip


def families(subject: Subject) -> list[str]:
    """Address families to judge: those that the namespace has beyond loopback, or both."""
    found = []
    for family in ("ip", "ip6"):
        mine = [a for a in _of(subject.local, family, 1 << 16) if not ip_address(a).is_loopback]
        if family == "ip6":
            mine = [a for a in mine if not ip_address(a).is_link_local]
        if mine or _of((*subject.peers, *subject.clients), family):
            found.append(family)
    return found or ["ip", "ip6"]


def own(subject: Subject, lever: Notrack) -> Iterator[Packet]:
    """First packets of connections that this host makes to others."""
    for family in families(subject):
        for here in _local(subject, family):
            yield _packet(
                lever, family, "a connection of this host", OUT, here, STRANGER[family],
                dport=443, sport=_middle(lever), flags=SYN, oif=UNKNOWN_DEVICE, local_src=True,
            )  # fmt: skip


def _server(lever: Notrack, family: str, here: str, far: str) -> Flow:
    sport = _middle(lever)
    inward = _packet(lever, family, "", IN, far, here, sport=sport, dport=lever.port,
                     iif=UNKNOWN_DEVICE, local_dst=True)  # fmt: skip
    outward = _packet(lever, family, "", OUT, here, far, sport=lever.port, dport=sport,
                      oif=UNKNOWN_DEVICE, local_src=True, reply=True)  # fmt: skip
    error = _error(family, IN, here, (PROTO_NUMBERS[lever.proto], lever.port, sport))
    return *_pair(lever, "server", inward, outward), Probe(error, "server", "icmp")


def _client(lever: Notrack, family: str, here: str, far: str) -> Flow:
    sport = _middle(lever)
    outward = _packet(lever, family, "", OUT, here, far, sport=sport, dport=lever.port,
                      oif=UNKNOWN_DEVICE, local_src=True)  # fmt: skip
    inward = _packet(lever, family, "", IN, far, here, sport=lever.port, dport=sport,
                     iif=UNKNOWN_DEVICE, local_dst=True, reply=True)  # fmt: skip
    error = _error(family, IN, here, (PROTO_NUMBERS[lever.proto], sport, lever.port))
    return *_pair(lever, "client", outward, inward), Probe(error, "client", "icmp")


def _forward(lever: Notrack, family: str, client: str, server: str) -> Flow:
    sport = _middle(lever)
    there = _packet(lever, family, "", THROUGH, client, server, sport=sport, dport=lever.port,
                    iif=UNKNOWN_DEVICE, oif=UNKNOWN_DEVICE)  # fmt: skip
    back = _packet(lever, family, "", THROUGH, server, client, sport=lever.port, dport=sport,
                   iif=UNKNOWN_DEVICE, oif=UNKNOWN_DEVICE, reply=True)  # fmt: skip
    number = PROTO_NUMBERS[lever.proto]
    errors = [
        replace(_error(family, THROUGH, target, quoted), local_dst=False, oif=UNKNOWN_DEVICE)
        for target, quoted in (
            (client, (number, sport, lever.port)),
            (server, (number, lever.port, sport)),
        )
    ]
    return (
        *_pair(lever, "forward", there, back),
        *(Probe(error, "forward", "icmp") for error in errors),
    )


def _neighbour(lever: Notrack, family: str, host: str) -> Flow:
    """A host behind the router calls out, and has the service's port as its source port."""
    there = _packet(lever, family, "", THROUGH, host, STRANGER[family], sport=lever.port,
                    dport=443, iif=UNKNOWN_DEVICE, oif=UNKNOWN_DEVICE)  # fmt: skip
    back = replace(there, saddr=there.daddr, daddr=host, sport=443, dport=lever.port, reply=True)
    pair = _pair(lever, "forward", there, back)
    return tuple(replace(probe, service=False) for probe in pair)


def _scans(lever: Notrack, family: str, inside: str) -> Iterator[Flow]:
    """A scanner's packet from the service's port, which must open nothing behind the router."""
    for port in (22, _middle(lever)):
        scan = _packet(lever, family, _first(lever), THROUGH, STRANGER[family], inside,
                       sport=lever.port, dport=port, flags=SYN, iif=UNKNOWN_DEVICE,
                       oif=UNKNOWN_DEVICE)  # fmt: skip
        yield (Probe(scan, "forward", "from", service=False),)


def _strangers(
    lever: Notrack, family: str, here: str, ruleset: Ruleset, sources: Iterable[str]
) -> Iterator[Flow]:
    """Somebody with the service's port as source port, looking for open doors."""
    low, high = lever.ephemeral
    named = [port for port in _named_ports(ruleset) if low <= port <= high]
    for far in sources:
        for port in [_middle(lever), low, *named[:MOST]]:
            scan = _packet(lever, family, _first(lever), IN, far, here, sport=lever.port,
                           dport=port, flags=SYN, iif=UNKNOWN_DEVICE,
                           local_dst=True)  # fmt: skip
            yield (Probe(scan, "client", "from", service=False),)


def _first(lever: Notrack) -> str:
    return f"a stranger's {'SYN' if lever.proto == 'tcp' else 'datagram'}"


def _loopback(lever: Notrack, family: str, role: str) -> Flow:
    here, sport = LOOPBACK[family], _middle(lever)
    there = _packet(lever, family, "", AROUND, here, here, sport=sport, dport=lever.port,
                    iif="lo", oif="lo", local_src=True, local_dst=True)  # fmt: skip
    back = replace(there, sport=lever.port, dport=sport, reply=True)
    return tuple(_pair(lever, role, there, back))


def _pair(lever: Notrack, role: str, there: Packet, back: Packet) -> Iterator[Probe]:
    where = " over loopback" if there.iif == "lo" else ""
    if lever.proto == "tcp":
        yield Probe(replace(there, name=f"SYN{where}", flags=SYN), role, "to")
        yield Probe(
            replace(back, name=f"SYN-ACK{where}", flags=SYN_ACK, state="established"), role, "from"
        )
        flags = ACK
    else:
        yield Probe(replace(there, name=f"first datagram{where}"), role, "to")
        flags = 0
    for packet, flow, name in ((there, "to", "later packets"), (back, "from", "replies")):
        later = replace(packet, name=name + where, flags=flags, state="established")
        yield Probe(later, role, flow)


def _packet(
    lever: Notrack, family: str, name: str, hooks: tuple[str, ...], saddr: Optional[str],
    daddr: str, *, sport: int, dport: int, flags: int = 0, iif: str = "", oif: str = "",
    local_src: bool = False, local_dst: bool = False, reply: bool = False,
) -> Packet:  # fmt: skip
    return Packet(
        name=name, family=family, proto=PROTO_NUMBERS[lever.proto], hooks=hooks, saddr=saddr,
        daddr=daddr, sport=sport, dport=dport, flags=flags, iif=iif, oif=oif,
        local_src=local_src, local_dst=local_dst, reply=reply,
    )  # fmt: skip


def _error(family: str, hooks: tuple[str, ...], daddr: str, quoted: tuple[int, int, int]) -> Packet:
    """Fragmentation needed, or packet too big, from some router on the way."""
    return Packet(
        name="path MTU error",
        family=family,
        proto=ICMP if family == "ip" else ICMP6,
        hooks=hooks,
        saddr=STRANGER[family],
        daddr=daddr,
        icmp=3 if family == "ip" else 2,
        state="related",
        iif=UNKNOWN_DEVICE,
        local_dst=True,
        quoted=quoted,
    )


def _middle(lever: Notrack) -> int:
    low, high = lever.ephemeral
    port = (low + high) // 2
    return port if port != lever.port else port + 1


def _of(addresses: Iterable[str], family: str, most: int = MOST) -> list[str]:
    version = 4 if family == "ip" else 6
    found = [address for address in addresses if ip_address(address).version == version]
    return found[:most]


def _local(subject: Subject, family: str) -> list[str]:
    mine = [
        address
        for address in _of(subject.local, family, 1 << 16)
        if not ip_address(address).is_loopback and not ip_address(address).is_link_local
    ]
    return mine[:MOST] or [HERE[family]]


def _named(ruleset: Ruleset, family: str) -> list[str]:
    """One address of each source prefix that a rule names."""
    rules = (rule for chain in ruleset.chains for rule in chain.rules)
    return _addresses(rules, family, "saddr")[:MOST]


def _targets(ruleset: Ruleset, family: str, port: int) -> list[str]:
    """One address of each destination prefix that a rule names for the port."""
    rules = (
        rule
        for chain in ruleset.chains
        for rule in chain.rules
        if all(
            match.key != "dport"
            or any(low <= port <= high for low, high in match.values) != match.negate
            for match in rule.matches
        )
    )
    return _addresses(rules, family, "daddr")[:MOST]


def _addresses(rules: Iterable[Rule], family: str, side: str) -> list[str]:
    version = 4 if family == "ip" else 6
    found: dict[str, None] = {}
    for rule in rules:
        for match in rule.matches:
            if match.key == side:
                for kind, low, high in match.values:
                    address = ip_address(low + (1 if high > low + 1 else 0))
                    if kind == version and address.version == version:
                        found[str(address)] = None
    return [a for a in found if not ip_address(a).is_loopback and not ip_address(a).is_multicast]


def _named_ports(ruleset: Ruleset) -> list[int]:
    """Destination ports at which some rule changes its mind."""
    found = {
        port
        for chain in ruleset.chains
        for rule in chain.rules
        for match in rule.matches
        if match.key == "dport"
        for port in match.values[0]
    }
    return sorted(found)
