"""Packets as bytes, each with a number that survives translation and forwarding."""

from __future__ import annotations

import struct
from typing import Final

from ctrace.record import ICMP, ICMPV6, TCP, UDP

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))
MSS: Final = struct.pack(">BBHBBBBII", 2, 4, 65483, 1, 1, 8, 10, 1, 0)
"""A SYN's options as Linux has them: MSS, timestamps. The MSS is that of lo, so that rules lower
it that lower any."""
NUMBERS: Final = 65000
"""IPv4's identification has 16 bits; 0 is replaced by the kernel."""


def _sum(data: bytes) -> int:
    """RFC 1071: the carry of a sum of 16-bit words goes round, so it is a remainder."""
    if len(data) & 1:
        data += b"\0"
    total = int.from_bytes(data, "big")
    return 0xFFFF - (total % 0xFFFF or (0xFFFF if total else 0))


def _ip(number: int, src: bytes, dst: bytes, proto: int, payload: bytes) -> bytes:
    if len(src) == 4:
        size = 20 + len(payload)
        head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, size, number, 0x4000, 64, proto, 0, src, dst)
        return head[:10] + struct.pack(">H", _sum(head)) + head[12:] + payload
    head = struct.pack(">IHBB", 0x60000000 | number, len(payload), proto, 64)
    return head + src + dst + payload


def _summed(src: bytes, dst: bytes, proto: int, payload: bytes, at: int) -> bytes:
    check = _sum(src + dst + struct.pack(">II", len(payload), proto) + payload)
    return payload[:at] + struct.pack(">H", check) + payload[at + 2 :]


def tcp(
    number: int,
    src: bytes,
    dst: bytes,
    ports: tuple[int, int],
    flags: int,
    order: tuple[int, int] = (7, 9),
    data: bytes = b"",
) -> bytes:
    """A segment; ``order``: sequence and acknowledgement number."""
    options = MSS if flags & SYN else b""
    head = struct.pack(">HHIIBBHHH", *ports, *order, (20 + len(options)) << 2, flags, 65000, 0, 0)
    return _ip(number, src, dst, TCP, _summed(src, dst, TCP, head + options + data, 16))


def udp(number: int, src: bytes, dst: bytes, ports: tuple[int, int]) -> bytes:
    """A datagram."""
    payload = struct.pack(">HHHH", *ports, 13, 0) + b"hello"
    return _ip(number, src, dst, UDP, _summed(src, dst, UDP, payload, 6))


TOO_BIG: Final = {4: (3, 4, 1300), 16: (2, 0, 1300)}
"""An error's type, code and word, by the length of an address: a packet did not fit."""
REFUSED: Final = {4: (3, 3, 0), 16: (1, 4, 0)}
"""Nobody listens on its port."""


def error(
    number: int, source: bytes, dst: bytes, quoted: bytes, what: dict[int, tuple[int, int, int]]
) -> bytes:
    """About a packet of ``dst``'s: :data:`TOO_BIG` or :data:`REFUSED`."""
    kind, code, word = what[len(dst)]
    payload = struct.pack(">BBHI", kind, code, 0, word) + quoted[:64]
    if len(dst) == 4:
        payload = payload[:2] + struct.pack(">H", _sum(payload)) + payload[4:]
        return _ip(number, source, dst, ICMP, payload)
    return _ip(number, source, dst, ICMPV6, _summed(source, dst, ICMPV6, payload, 2))


def echo(number: int, src: bytes, dst: bytes, *, answer: bool) -> bytes:
    """A ping, or the answer to it; ``number`` is its id, too."""
    if len(dst) == 4:
        payload = struct.pack(">BBHHH", 0 if answer else 8, 0, 0, number, 1)
        payload = payload[:2] + struct.pack(">H", _sum(payload)) + payload[4:]
        return _ip(number, src, dst, ICMP, payload)
    payload = struct.pack(">BBHHH", 129 if answer else 128, 0, 0, number, 1)
    return _ip(number, src, dst, ICMPV6, _summed(src, dst, ICMPV6, payload, 2))


MARKER: Final = 253
"""A protocol number for experiments (RFC 3692)."""
MARK: Final = bytes(12) + b"\x08\0" + _ip(1, b"\x7f\0\0\1", b"\x7f\0\0\1", MARKER, b"")
"""From lo to lo, with its Ethernet header: what was sent before it is over when it arrives."""
