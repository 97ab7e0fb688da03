"""Packets by hand, and connections of every kind."""

from __future__ import annotations

import socket
import struct
import time
from contextlib import suppress

from cause_loads.place import ACK, DGRAM, SYN, TCP, UDP, Place
from ctrace.lab import Node

# -- packets and connections -------------------------------------------------------------------


def _sum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data + b"\0" * (len(data) % 2)))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def packet(src: str, dst: str, proto: int, body: bytes, at: int) -> bytes:
    """An IPv4 packet; the checksum of its body goes to ``at``."""
    ends = socket.inet_aton(src) + socket.inet_aton(dst)
    check = _sum(ends + struct.pack("!HH", proto, len(body)) + body + b"\0" * (len(body) % 2))
    body = body[:at] + struct.pack("!H", check) + body[at + 2 :]
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, proto, 0) + ends + body


def segment(src: str, sport: int, dst: str, dport: int, flags: int = SYN) -> bytes:
    """A TCP segment without data."""
    number = 9 if flags & ACK else 0
    head = struct.pack("!HHIIBBHHH", sport, dport, 7, number, 0x50, flags, 999, 0, 0)
    return packet(src, dst, TCP, head, 16)


def datagram(src: str, sport: int, dst: str, dport: int) -> bytes:
    """One byte of UDP."""
    return packet(src, dst, UDP, struct.pack("!HHHH", sport, dport, 9, 0) + b"x", 6)


def call(dst: str, port: int, *, source: str = "", sport: int = 0, stay: float = 0.0) -> None:
    """A connection that asks, reads the answer and closes."""
    with socket.socket(socket.AF_INET6 if ":" in dst else socket.AF_INET) as one:
        one.settimeout(5)
        if source or sport:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((source, sport))
        one.connect((dst, port))
        one.sendall(b"q\n")
        one.recv(64)
        if stay:
            time.sleep(stay)


def opened(dst: str, port: int, source: str = "") -> socket.socket:
    """A connection that was used once and stays."""
    one = socket.socket()
    one.settimeout(10)
    if source:
        one.bind((source, 0))
    one.connect((dst, port))
    one.sendall(b"q\n")
    return one


def talk_on(one: socket.socket) -> None:
    """Use an open connection once more: take the last answer and send the next question."""
    with suppress(OSError):
        one.recv(8)
        one.sendall(b"q")


def finish(one: socket.socket) -> None:
    """Close it with everything read: what is unread would reset it."""
    with suppress(OSError):
        one.setblocking(False)
        one.recv(1 << 16)
    one.close()


def ask(dst: str, port: int, *, source: str = "", sport: int = 0, wait: bool = True) -> None:
    """A datagram from a new socket, and its answer."""
    with socket.socket(socket.AF_INET6 if ":" in dst else socket.AF_INET, DGRAM) as one:
        one.settimeout(1)
        one.bind((source, sport))
        one.connect((dst, port))
        one.send(b"q")
        if wait:
            one.recv(64)


def echo(number: int, six: bool = False) -> bytes:
    """An echo request with this id."""
    body = struct.pack("!BBHHH", 128 if six else 8, 0, 0, number & 0xFFFF, 1)
    return body[:2] + struct.pack("!H", _sum(body)) + body[4:]


def raw(p: Place, node: Node) -> socket.socket:
    """A socket that sends whole packets."""
    return p.stack.enter_context(node.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW))


def silent(node: Node, match: str) -> None:
    """Packets of a kind are dropped before anything answers them."""
    node.run(["nft", "-f", "-"], stdin="table inet silent { chain p { type filter hook prerouting "
             f"priority -400; {match} drop\n }}\n}}\n")  # fmt: skip


def nft(node: Node, hook: str, rules: str) -> None:
    """One chain of rules more."""
    text = f"table ip more {{ chain c {{ type {hook};\n {rules}\n }}\n}}\n"
    node.run(["nft", "-f", "-"], stdin=text)
