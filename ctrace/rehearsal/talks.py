"""Which conversations to try: in every role, with whoever a rule, a set or a route names."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from typing import Final, NamedTuple, Optional

from ctrace.host.rawlink import ROUTE, Link, attr, split
from ctrace.record import TCP
from ctrace.rehearsal.constants import Named, evenly
from ctrace.rehearsal.packets import ACK, FIN, RST, SYN
from ctrace.rehearsal.play import FIRST_LOW, Stray, Talk, renumbered
from ctrace.rehearsal.snapshot import LOOPBACK, Snapshot
from ctrace.rehearsal.stage import Stage

MOST_ADDRESSES: Final = 600
"""That rules name, and as many of the table, which take part in every role."""
MOST_PAIRS: Final = 1500
MOST_BUSY: Final = 16
MOST_PORTS: Final = 256
MOST_FROM: Final = 8
FEW_USERS: Final = 4
STRANGERS: Final = tuple(
    ip_address(text).packed for text in ("203.0.113.250", "2001:db8:ffff::250")
)
"""Addresses that no rule names: of documentation prefixes."""
CLOSED: Final = (22, 1)
_ODD: Final = 442
"""A port that nothing else here is with."""
_GETROUTE: Final = 26
_UNICAST: Final = 1


class Far(NamedTuple):
    """Another host, and the way to it."""

    address: bytes
    device: int
    source: bytes
    """The address of this host that it would use by itself; empty: none."""


@dataclass
class Cast:
    """Who takes part."""

    local: tuple[tuple[bytes, int], ...]
    """(address, interface)."""
    far: dict[bytes, Far] = field(default_factory=dict)
    """Those that take part in every role."""
    ways: dict[bytes, Far] = field(default_factory=dict)
    """Of everybody, also of those that only have flows of their own played."""
    near: list[Far] = field(default_factory=list)
    """Neighbours and strangers: one or two a way."""
    busy: list[Far] = field(default_factory=list)
    """A few of the addresses that flows in the table go to."""
    uids: tuple[int, ...] = (0,)
    left_out: int = 0
    """Addresses named in rules that are represented by others of their class."""
    in_flows_only: int = 0
    """Addresses of the table that no more than their own flows are tried of."""


def cast(snapshot: Snapshot, stage: Stage, names: Named, seen: Iterable[bytes], port: int) -> Cast:
    """Local addresses, and every far one with its route on ``stage``.

    A flood's sources are thousands that no rule names: an even part of them plays every role,
    and the others what they were seen to do.
    """
    local = tuple((a, i) for a, i in snapshot.local)
    mine = {address for address, _ in local}
    found, left_out = names.addresses(MOST_ADDRESSES, port)
    # A user whom no rule names, too: what is for one user only must not open to others.
    other = next(uid for uid in range(64_000, 64_999) if uid not in names.uids)
    uids = (0, *sorted(names.uids - {0}), other) if names.uids else (0,)
    made = Cast(local, uids=uids, left_out=left_out)
    neighbours = [address for address in _neighbours(snapshot) if address not in mine]
    listed = sorted(set(seen))
    tried = {*evenly(listed, MOST_ADDRESSES), *found, *neighbours, *STRANGERS}
    with Link(stage.space.path, ROUTE) as link:
        for address in dict.fromkeys([*listed, *found, *neighbours, *STRANGERS]):
            if address in mine or address[:2] == b"\xfe\x80" or ip_address(address).is_loopback:
                continue
            way = _route(link, address)
            if way is not None:
                made.ways[address] = way
                if address not in tried:
                    made.in_flows_only += 1
                    continue
                made.far[address] = way
                if address in neighbours or address in STRANGERS:
                    made.near.append(way)
    known = [made.far[address] for address in listed if address in made.far]
    made.busy = [far for far in evenly(known, MOST_BUSY) if far not in made.near]
    for address, index in local:
        if address[:2] == b"\xfe\x80" and len(address) == 16:
            other_end = address[:15] + bytes([address[15] ^ 1])
            made.ways[other_end] = made.far[other_end] = Far(other_end, index, address)
    return made


def _neighbours(snapshot: Snapshot) -> Iterator[bytes]:
    for body in snapshot.addresses:
        of = dict(split(body, 8))
        raw = of.get(2) or of.get(1) or b""
        if len(raw) not in (4, 16) or ip_address(raw).is_loopback or raw[:2] == b"\xfe\x80":
            continue
        peer = of.get(1, raw)
        if peer != raw:
            yield peer
        net = ip_network((raw, body[1]), strict=False)
        first = int(net.network_address)
        for step in (1, 2, 100):
            if net.num_addresses > step + 1:
                yield (first + step).to_bytes(len(raw), "big")


def _route(link: Link, address: bytes) -> Optional[Far]:
    family = 2 if len(address) == 4 else 10
    ask = struct.pack("=BBBBBBBBI", family, len(address) * 8, 0, 0, 0, 0, 0, 0, 0)
    try:
        body = link.ask(_GETROUTE, ask + attr(1, address))
    except OSError:
        return None
    of = dict(split(body, 12))
    if body[7] != _UNICAST or 4 not in of:
        return None
    return Far(address, int(struct.unpack("=I", of[4])[0]), of.get(7, b""))


class Plot:
    """The conversations and strays of one service."""

    def __init__(
        self, snapshot: Snapshot, who: Cast, proto: int, port: int, ephemeral: tuple[int, int]
    ) -> None:
        self._snapshot, self._who = snapshot, who
        self._proto, self._port, self._ephemeral = proto, port, ephemeral
        self.ports_left_out = 0
        """Ports that rules name, and others stand for."""
        lo = next((d.index for d in snapshot.devices if d.kind == LOOPBACK), 1)
        self._lo = lo
        # An address of a balancer or of anycast is on lo, and others call it all the same.
        self._mine = [(a, i) for a, i in who.local if i != lo or not ip_address(a).is_loopback]

    def talks(self, names: Named, flows: Sequence[Talk]) -> list[Talk]:
        """All of them, each from a port of its own."""
        found = [
            *flows,
            *self._server(self._port),
            *self._client(self._port),
            *self._loopback(self._port),
            *self._through(self._port, names.nat),
            *self._from_port(names),
            *self._from_here(names, flows),
            *self._elsewhere(names),
        ]
        named = list(self._from_named(names))
        # The other way round it would be the same entry.
        turned = {(talk.server, talk.dport, talk.client, talk.sport) for talk in named}
        found = [t for t in found if (t.client, t.sport, t.server, t.dport) not in turned] + named
        return renumbered(list(dict.fromkeys(found)), self._ephemeral)

    def _server(self, port: int, near: bool = False) -> Iterator[Talk]:
        """Others call this host."""
        far = self._who.near if near else list(self._who.far.values())
        mine = self._mine
        few = len(far) * len(mine) <= MOST_PAIRS
        for number, other in enumerate(far):
            same = [(a, i) for a, i in mine if fits(a, i, other)]
            first = [(a, i) for a, i in same if a == other.source] or same[:1]
            every = same if few or other in self._who.near or number % 64 == 0 else first
            for address, _ in every:
                for sport in (0,) if near else (0, 1):
                    yield Talk(
                        "server", self._proto, other.address, sport, address, port, other.device, 0
                    )
                for uid in self._who.uids[1:] if other in self._who.near and not near else ():
                    ends = other.address, 0, address, port
                    yield Talk("server", self._proto, *ends, other.device, answering=uid)
        for address, _ in mine:  # from an interface that no route leads to
            for device in self._snapshot.devices if not near else ():
                if device.index not in (self._lo, 0) and address[:2] != b"\xfe\x80":
                    stranger = STRANGERS[len(address) == 16]
                    yield Talk("server", self._proto, stranger, 0, address, port, device.index, 0)

    def _client(self, port: int, near: bool = False) -> Iterator[Talk]:
        """This host calls others."""
        for other in self._who.near if near else self._who.far.values():
            # Where many users are named each calls the hosts nearby, and a few call all.
            uids = self._who.uids if other in self._who.near else self._who.uids[:FEW_USERS]
            for uid in uids if other.source else ():
                for sport in (0,) if near else (0, 1):
                    yield Talk("client", self._proto, other.source, sport, other.address, port,
                               0, other.device, uid)  # fmt: skip

    def _loopback(self, port: int) -> Iterator[Talk]:
        """This host calls itself, by each of its addresses."""
        for address, _ in self._who.local:
            if address[:2] != b"\xfe\x80":
                for uid in self._who.uids:
                    yield Talk("loopback", self._proto, address, 0, address, port, 0, 0, uid)
                for uid in self._who.uids[1:]:
                    yield Talk("loopback", self._proto, address, 0, address, port, answering=uid)

    def _through(self, port: int, nat: bool) -> Iterator[Talk]:
        """Others call others by way of this host."""
        if not self._snapshot.forwards:
            return
        far = [f for f in self._who.far.values() if f.address[:2] != b"\xfe\x80"]
        same = [(a, b) for b in far if nat for a in self._callers(b, 2) if a.device == b.device]
        for a, b in (*pairs_of(far, set(self._who.near)), *same):
            yield Talk("forward", self._proto, a.address, 0, b.address, port, a.device, b.device)

    def _from_port(self, names: Named) -> Iterator[Talk]:
        """Others call from the service's port, by way of this host: their source is kept."""
        if not self._snapshot.forwards:
            return
        near = [f for f in self._who.near if f.address[:2] != b"\xfe\x80"]
        for dport in self._others(names, 32):
            for a in (*near, *self._who.busy):
                for b in near:
                    if _apart(a, b):
                        ends = a.address, self._port, b.address, dport
                        yield Talk("forward", self._proto, *ends, a.device, b.device)

    def _from_here(self, names: Named, flows: Sequence[Talk]) -> Iterator[Talk]:
        """This host calls others from the service's port.

        Where something is translated no conversation of others may be with the same far end: it
        could be given the same port.
        """
        low = self._ephemeral[0]
        for other in (*self._who.near, *self._who.busy):  # and is called from it
            if other.source and other.address[:2] != b"\xfe\x80":
                yield Talk(
                    "server",
                    self._proto,
                    other.address,
                    self._port,
                    other.source,
                    low + 9,
                    other.device,
                    0,
                )
        known = {(talk.client, talk.server, talk.dport) for talk in flows}
        for dport in (_ODD,) if names.nat else (_ODD, *self._others(names, 8)):
            for other in (*self._who.near, *self._who.busy):
                if other.source and (other.source, other.address, dport) not in known:
                    ends = other.source, self._port, other.address, dport
                    yield Talk("client", self._proto, *ends, 0, other.device)

    def _from_named(self, names: Named) -> Iterator[Talk]:
        """Calls of the service from ports that rules name: one of each for a way and a family."""
        port = self._port
        every = (*self._server(port, near=True), *self._client(port, near=True))
        ways = {
            (talk.role, len(talk.client), talk.client_at, talk.server_at): talk
            for talk in (*every, *self._through(port, nat=False))
        }
        for sport in self._others(names, MOST_FROM)[1:]:
            if sport < FIRST_LOW or 1024 <= sport < self._ephemeral[0]:
                yield from (replace(talk, sport=sport) for talk in ways.values())

    def _others(self, names: Named, most: int) -> list[int]:
        """Other ports: first one that hardly any rule names, then those that rules name."""
        found = sorted(names.ports - {self._port, 443})
        self.ports_left_out = max(self.ports_left_out, len(found) - MOST_PORTS)
        some = evenly(found, most)
        return list(dict.fromkeys([443, *names.leading_to(self._port), *some]))

    def _elsewhere(self, names: Named) -> Iterator[Talk]:
        """Ports that a rule names, which may be translated to the service's."""
        if not names.nat:
            return
        ports = self._others(names, MOST_PORTS)
        each = 2 if len(ports) * len(self._who.far) <= MOST_PAIRS else 1
        for port in ports:
            yield from self._server(port, near=True)
            yield from self._client(port, near=True)
            yield from self._loopback(port)
            for target in self._who.far.values() if self._snapshot.forwards else ():
                for a in self._callers(target, each):
                    ends = a.address, 0, target.address, port
                    yield Talk("forward", self._proto, *ends, a.device, target.device)

    def _callers(self, target: Far, each: int) -> Iterator[Far]:
        """Of those nearby so many at each interface, also at the target's own: a translation may
        lead elsewhere than its route, back to one of them."""
        seen: Counter[int] = Counter()
        for one in self._who.near:
            other = one.address != target.address and one.address[:2] != b"\xfe\x80"
            if other and len(one.address) == len(target.address) and seen[one.device] < each:
                seen[one.device] += 1
                yield one

    def strays(self) -> list[Stray]:
        """Single packets of strangers: to the service's port, and from it to others."""
        low, high = self._ephemeral
        flags = (SYN, ACK, SYN | ACK, RST, FIN | ACK) if self._proto == TCP else (0,)
        near = set(self._who.near)
        out = []
        for other in self._who.far.values():
            targets = [(a, i) for a, i in self._mine if fits(a, i, other)]
            for address, _ in targets if other in near else targets[:1]:
                ports = [(self._port, q) for q in (*CLOSED, low + 7, high - 2)]
                for sport, dport in (*ports, (low + 11, self._port)):
                    for flag in flags:
                        out.append(Stray(other.device, self._proto, other.address, sport,
                                         address, dport, flag))  # fmt: skip
        if self._snapshot.forwards:
            out += [
                Stray(a.device, self._proto, a.address, self._port, b.address, dport, flag)
                for a in (*self._who.near, *self._who.busy)
                for b in near
                if _apart(a, b) and a.address[:2] != b"\xfe\x80" != b.address[:2]
                for dport in (*CLOSED, low + 7)
                for flag in flags
            ]
        return out


def fits(address: bytes, index: int, other: Far) -> bool:
    """Whether a host and an address of ours can speak: one family, one link where it counts."""
    if len(address) != len(other.address):
        return False
    links = address[:2] == b"\xfe\x80", other.address[:2] == b"\xfe\x80"
    return links[0] == links[1] and (not links[0] or index == other.device)


def pairs_of(far: Sequence[Far], near: set[Far]) -> list[tuple[Far, Far]]:
    """Who calls whom through this host: everybody, or where that is too much, with who is near.

    A flood's sources are thousands: what all of them would be is counted, not made.
    """
    ways = Counter((one.device, len(one.address)) for one in far)
    of_family = Counter(len(one.address) for one in far)
    many = sum(n * (of_family[family] - n) for (_, family), n in ways.items())
    if many <= MOST_PAIRS:
        return [(a, b) for a in far for b in far if _apart(a, b)]
    some = [one for one in far if one in near]
    pairs = [(a, b) for a in far for b in (far if a in near else some) if _apart(a, b)]
    return pairs[:: max(1, len(pairs) // MOST_PAIRS)]


def _apart(a: Far, b: Far) -> bool:
    return a.device != b.device and len(a.address) == len(b.address)
