"""A short look at the packets of a namespace: what flow each is of, and whether its checksum is
right. What comes is copied before conntrack sees it, what goes after that.
"""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass, replace
from typing import Final, Optional

from ctrace.errors import CtraceError
from ctrace.host.ctnetlink import Packet
from ctrace.host.netns import enter
from ctrace.record import ICMP, ICMPV6, TCP, UDP

MOST: Final = 2000
"""Packets of one look."""
BYTES: Final = 2048
"""That are copied of each packet; checksums of longer ones are not looked at."""
ERRORS: Final = {ICMP: (3, 4, 5, 11, 12), ICMPV6: (1, 2, 3, 4)}
"""Types that quote a packet (nf_conntrack_proto_icmp.c, nf_conntrack_proto_icmpv6.c);"""
ECHO: Final = {ICMP: (8, 0), ICMPV6: (128, 129)}
"""request and reply."""
ALL: Final = 0x0003
IPV4: Final = 0x0800
IPV6: Final = 0x86DD
SOL_PACKET: Final = 263
AUXDATA: Final = 8
NOT_READY: Final = 1 << 3
"""TP_STATUS_CSUMNOTREADY: the checksum is filled in later, by the device."""
OUTGOING: Final = 4
EXTENSIONS: Final = (0, 43, 60)
"""Headers of IPv6 that may stand before the protocol's own."""


@dataclass(frozen=True)
class Seen:
    """One packet."""

    packet: Packet
    """Of an ICMP error, the flow that it is about."""
    sender: bytes
    flags: int = 0
    """Of TCP."""
    error: bool = False
    bad: bool = False
    """Whether its checksum is wrong."""
    out: bool = False
    """Whether it was leaving."""
    seq: int = 0
    ack: int = 0
    """Numbers of TCP."""


def look(netns_path: str, seconds: float) -> list[Seen]:
    """TCP, UDP and ICMP packets of the next moment. Raises CtraceError."""
    with enter(netns_path):
        try:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ALL))
        except OSError as error:
            raise CtraceError(f"cannot look at packets: {error.strerror}") from error
    found: list[Seen] = []
    end = time.monotonic() + seconds
    with sock:
        sock.setsockopt(SOL_PACKET, AUXDATA, 1)
        while len(found) < MOST and (left := end - time.monotonic()) > 0:
            sock.settimeout(left)
            try:
                data, more, _, address = sock.recvmsg(BYTES, 64)
            except OSError:  # nothing came, or a device went
                continue
            status = [
                struct.unpack_from("=I", value)[0] for _, kind, value in more if kind == AUXDATA
            ]
            out = address[2] == OUTGOING
            one = parse(
                data, address[1], whole=not out and not (status or [NOT_READY])[0] & NOT_READY
            )
            if one is not None:
                found.append(replace(one, out=out))
    return found


def parse(data: bytes, kind: int, *, whole: bool) -> Optional[Seen]:
    """A packet of the ether type ``kind``; None for fragments and other protocols.

    ``whole``: its checksum is filled in.
    """
    found = _ip(data, kind)
    if found is None:
        return None
    proto, src, dst, body, length = found
    pseudo = src + dst + struct.pack("!II", length, proto)
    checked = whole and len(body) == length
    if proto in (TCP, UDP):
        none = proto == UDP and body[6:8] == b"\0\0"
        bad = checked and not none and _sum(pseudo + body) != 0xFFFF
        return _with_ports(proto, src, dst, body, bad)
    if proto not in ECHO or len(body) < 8:
        return None
    bad = checked and _sum((pseudo if proto == ICMPV6 else b"") + body) != 0xFFFF
    if body[0] in ERRORS[proto]:
        quoted = parse(body[8:], kind, whole=False)
        return None if quoted is None else Seen(quoted.packet, src, error=True, bad=bad)
    if body[0] not in ECHO[proto]:
        return None
    (number,) = struct.unpack_from("!H", body, 4)
    return Seen(Packet(proto, src, dst, number, body[0] << 8 | body[1]), src, bad=bad)


def _with_ports(proto: int, src: bytes, dst: bytes, body: bytes, bad: bool) -> Optional[Seen]:
    """Of TCP or UDP; an ICMP error may quote no more than the ports and the sequence number."""
    if len(body) < 8:
        return None
    flow = Packet(proto, src, dst, *struct.unpack_from("!HH", body))
    if proto == UDP or len(body) < 20:
        return Seen(flow, src, bad=bad)
    seq, ack = struct.unpack_from("!II", body, 4)
    return Seen(flow, src, body[13], bad=bad, seq=seq, ack=ack)


def ends(packet: bytes, six: bool) -> tuple[bytes, bytes]:
    """Source and destination of a whole header of IPv4 or IPv6."""
    return (packet[8:24], packet[24:40]) if six else (packet[12:16], packet[16:20])


def _ip(data: bytes, kind: int) -> Optional[tuple[int, bytes, bytes, bytes, int]]:
    """Protocol, ends, what follows the header, and how long that was."""
    if kind == IPV4 and len(data) >= 20:
        head = (data[0] & 15) * 4
        total, fragment = struct.unpack_from("!2xH2xH", data)
        if fragment & 0x3FFF or total < head:
            return None
        return data[9], *ends(data, six=False), data[head:total], total - head
    if kind == IPV6 and len(data) >= 40:
        length, proto, at = struct.unpack_from("!H", data, 4)[0] + 40, data[6], 40
        while proto in EXTENSIONS and at + 8 <= len(data):
            proto, at = data[at], at + 8 + 8 * data[at + 1]
        return proto, *ends(data, six=True), data[at:length], length - at
    return None


def _sum(data: bytes) -> int:
    """The Internet checksum's sum: 0xFFFF of what is right."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total
