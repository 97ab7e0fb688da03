"""INVALID packets: whose they are, and why, by a short look at the packets of the namespace.

The kernel only counts them. A packet that has no entry and cannot begin one is INVALID, so is an
answer where the table saw no handshake, a wrong checksum, or a sequence number far from what the
other side asks for (nf_conntrack_tcp_packet in nf_conntrack_proto_tcp.c). The kernel's own windows
don't show here, so the look counts for something only where it finds about as many packets as the
kernel counted meanwhile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Final, Optional

from ctrace.batch import invalid
from ctrace.beside import Stray
from ctrace.host import ctnetlink
from ctrace.host.ctnetlink import Packet
from ctrace.host.netns import enter, local_addresses
from ctrace.host.packets import ECHO, Seen, look
from ctrace.record import MAPPED_PREFIX, TCP, UDP, Events, address_bytes, address_text, proto_name
from ctrace.ruleset.told import Told

SECONDS: Final = 0.5
"""That a look takes."""
FEW: Final = 5
"""INVALID packets of a look below which it tells nothing."""
LEAST, MOST = 0.4, 1.6
"""What the look finds has to be between these parts of what the kernel counted."""
FIN, SYN, RST, ACK = 1, 2, 4, 16
SYN_SENT: Final = 1
WRAP: Final = 1 << 32
FAR: Final = 1 << 26
"""Bytes: more than any usual window, and than is sent within a look."""
PARTNERS: Final = 64
"""Packets of the other side that one is compared with."""
LOOSE: Final = "/proc/sys/net/netfilter/nf_conntrack_tcp_loose"


def invalid_so_far(netns_path: str) -> int:
    """INVALID packets by the kernel's own counters. Raises CtraceError."""
    return invalid(ctnetlink.statistics(netns_path))


def strays(netns_path: str, rules: Told) -> tuple[Stray, ...]:
    """What a look finds; nothing where that does not fit the kernel's count. Raises CtraceError."""
    if rules.zones:
        return ()
    before = invalid_so_far(netns_path)
    seen = look(netns_path, SECONDS)
    counted = invalid_so_far(netns_path) - before
    if counted < FEW:
        return ()
    own = {_short(address_bytes(one)) for one in local_addresses(netns_path)}
    with enter(netns_path), open(LOOSE) as file:
        loose = file.read().strip() != "0"
    # A packet that is forwarded, or goes round through loopback, is copied twice.
    once = [one for one in seen if (one.packet.src in own) == one.out or one.error]
    found = sorted_out(netns_path, once, rules, loose)
    fits = LEAST * counted <= sum(found.values()) <= MOST * counted + FEW
    return tuple(replace(one, packets=n) for one, n in found.most_common()) if fits else ()


def sorted_out(netns_path: str, seen: Iterable[Seen], rules: Told, loose: bool) -> Counter[Stray]:
    """INVALID packets by whose they are and why, each kind with how many."""
    packets = list(seen)
    begun = {one.packet for one in packets if one.flags & (SYN | ACK) == SYN}
    odd = [one for one in packets if _may_be_invalid(one, begun)]
    # What goes may have its addresses translated: then the other direction's has its tuple.
    unique = list(dict.fromkeys(p for one in odd for p in (one.packet, _back(one.packet))))
    entries = dict(zip(unique, ctnetlink.lookup(netns_path, unique)))
    far = _far_off(packets)
    # What refuses one of them is INVALID as well, and says nothing of its own.
    refused = {one.packet: one for one in odd if not one.flags & RST}
    found: Counter[Stray] = Counter()
    for one in (refused.get(_back(o.packet), o) if o.flags & RST else o for o in odd):
        entry = entries[one.packet]
        entry = entries[_back(one.packet)] if entry is None else entry
        why = _why(one, entry, loose) or ("window" if id(one) in far and entry is not None else "")
        if not why:
            continue
        proto, port = proto_name(one.packet.proto), _service(one)
        ways = {way for p, way, n in rules.untracked if (p, n) == (proto, port)}
        if len(ways) == 2:
            continue  # both directions are untracked: not INVALID
        if ways and why not in ("checksum", "reply"):
            why = "half-notrack"
        found[Stray(address_text(_sixteen(one.sender)), proto, port, why, 0)] += 1
    return found


def _may_be_invalid(one: Seen, begun: set[Packet]) -> bool:
    """Whether it is none that begins a flow, or ends one that it just refused."""
    packet = one.packet
    if one.bad or one.error:
        return True
    if packet.proto == UDP:
        return False
    if packet.proto == TCP:
        # The kernel deletes an entry whose only answer is a reset.
        refuses = one.flags & RST and _back(packet) in begun
        return one.flags & (SYN | ACK) != SYN and not refuses
    return packet.dport >> 8 == ECHO[packet.proto][1]


def _why(one: Seen, entry: Optional[Events], loose: bool) -> Optional[str]:
    """Why conntrack calls it INVALID; None: it does not, or not for a reason that shows."""
    packet, flags = one.packet, one.flags
    if entry is not None and not one.bad:
        row, n = entry[0], len(packet.src)
        forth = (packet.src, packet.sport) in (
            (bytes(row["src"])[-n:], int(row["sport"])),
            (bytes(row["reply_dst"])[-n:], int(row["reply_dport"])),
        )
        if packet.proto != TCP or one.error or not forth or flags & RST:
            return None
        # The SYN was seen and no answer, or the SYN was not and what followed was picked up.
        answers = flags & SYN and flags & ACK
        return "one-way" if answers or (row["state"] == SYN_SENT and not flags & SYN) else None
    tcp = packet.proto == TCP
    reasons = (
        ("checksum", one.bad),
        ("error", one.error),
        ("reply", not tcp),
        ("rst", flags & RST),
        ("syn-ack", flags & SYN),
        ("fin", flags & FIN),
        ("ack", not loose),
    )
    return next((why for why, so in reasons if so), None)


def _far_off(packets: Iterable[Seen]) -> set[int]:
    """Packets, by id, whose numbers fit none of the other side's, though others of the connection
    fit these."""
    sides: dict[Packet, list[Seen]] = {}
    for one in packets:
        if one.packet.proto == TCP and one.flags & (SYN | RST | ACK) == ACK:
            sides.setdefault(one.packet, []).append(one)
    pairs = [(mine, sides.get(_back(flow), [])[:PARTNERS]) for flow, mine in sides.items()]
    good = {id(one) for mine, other in pairs for one in mine if any(_fits(one, o) for o in other)}
    return {
        id(one)
        for mine, other in pairs
        for one in mine
        if id(one) not in good and any(id(o) in good for o in other)
    }


def _fits(one: Seen, other: Seen) -> bool:
    """Whether each is about what the other asks for."""
    return all(
        not FAR < (sent - wanted) % WRAP < WRAP - FAR
        for sent, wanted in ((one.seq, other.ack), (other.seq, one.ack))
    )


def _back(packet: Packet) -> Packet:
    """The same of the other direction."""
    if packet.proto in ECHO:
        request, reply = ECHO[packet.proto]
        kind = request if packet.dport >> 8 == reply else reply
        return Packet(packet.proto, packet.dst, packet.src, packet.sport, kind << 8)
    return Packet(packet.proto, packet.dst, packet.src, packet.dport, packet.sport)


def _service(one: Seen) -> int:
    """The port that the packet's flow is about: of an answer where it comes from."""
    packet = one.packet
    if packet.proto not in (TCP, UDP):
        return 0
    if one.flags & SYN:
        return packet.sport
    return min(packet.sport, packet.dport)


def _short(address: bytes) -> bytes:
    return address[12:] if address.startswith(MAPPED_PREFIX) else address


def _sixteen(address: bytes) -> bytes:
    return address if len(address) == 16 else MAPPED_PREFIX + address
