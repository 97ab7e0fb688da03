"""TCP sockets of a namespace as sock_diag lists them: their states and their retransmissions."""

from __future__ import annotations

import socket
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY = 4, 20
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST_DUMP: Final = 0x301
INET_DIAG_INFO: Final = 2
TOTAL_RETRANS: Final = 100
"""Offset of tcpi_total_retrans in struct tcp_info (linux/tcp.h), the same since 2.6.33."""
ESTABLISHED, SYN_SENT, SYN_RECV, CLOSE_WAIT = 1, 2, 3, 8
OPENING: Final = (SYN_SENT, SYN_RECV)
OPEN: Final = (ESTABLISHED, CLOSE_WAIT)
"""From these states only a reset takes a socket straight to CLOSE (counted in Tcp.EstabResets)."""
STATES: Final = OPENING + OPEN + (4, 5, 9, 11)
"""Every state that can be reset or retransmit: no listeners, no TIME_WAIT."""


@dataclass(frozen=True)
class Connection:
    """One socket."""

    state: int
    sport: int
    dport: int
    resent: int
    """Segments retransmitted over its life."""
    here: bytes = b""
    there: bytes = b""
    """Remote address, 4 or 16 bytes."""


def connections(states: Collection[int] = STATES) -> dict[bytes, Connection]:
    """TCP sockets in these states by the kernel's cookie, in the namespace of this thread.

    Raises OSError when the kernel does not answer.
    """
    found: dict[bytes, Connection] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as diag:
        diag.settimeout(2)
        wanted = sum(1 << state for state in states)
        for family in (socket.AF_INET, socket.AF_INET6):
            # struct inet_diag_req_v2: family, protocol, ext, pad, states, an empty id
            body = struct.pack(
                "=BBBxI48x", family, socket.IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), wanted
            )
            head = (16 + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST_DUMP, 1, 0)
            diag.sendto(struct.pack("=IHHII", *head) + body, (0, 0))
            found.update(_answers(diag))
    return found


def listening() -> frozenset[tuple[str, int]]:
    """(``tcp`` or ``udp``, port) that the kernel picks for no other socket of this namespace.

    A TCP listener takes its port for all addresses (inet_csk_find_open_port and
    __inet_hash_connect pass over a port that bind has given to somebody); a UDP socket
    only where it is bound to every address, so others don't count. Raises OSError.
    """
    found: set[tuple[str, int]] = set()
    for name, proto, state in (("tcp", socket.IPPROTO_TCP, 10), ("udp", socket.IPPROTO_UDP, 7)):
        for family in (socket.AF_INET, socket.AF_INET6):
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as diag:
                diag.settimeout(2)
                body = struct.pack("=BBBxI48x", family, proto, 0, 1 << state)
                head = (16 + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST_DUMP, 1, 0)
                diag.sendto(struct.pack("=IHHII", *head) + body, (0, 0))
                for one in _messages(diag):
                    (port,) = struct.unpack_from("!H", one, 4)
                    if port and (name == "tcp" or not any(one[8:24])):
                        found.add((name, port))
    return frozenset(found)


def connecting(ports: Collection[int]) -> int:
    """Sockets that wait for the first answer from one of these ports. Raises OSError."""
    if not ports:
        return 0
    return sum(one.dport in ports for one in connections((SYN_SENT,)).values())


def _answers(diag: socket.socket) -> Iterator[tuple[bytes, Connection]]:
    for one in _messages(diag):
        # struct inet_diag_msg: state at 1, ports at 4, addresses at 8 and 24, the cookie at 44
        sport, dport = struct.unpack_from("!HH", one, 4)
        size = 4 if one[0] == socket.AF_INET else 16
        here, there = one[8 : 8 + size], one[24 : 24 + size]
        yield one[44:52], Connection(one[1], sport, dport, _resent(one), here, there)


def _messages(diag: socket.socket) -> Iterator[bytes]:
    """Each struct inet_diag_msg of a dump with its attributes."""
    while True:
        data = diag.recv(1 << 17)
        at = 0
        while at + 16 <= len(data):
            size, kind = struct.unpack_from("=IH", data, at)
            if kind in (NLMSG_ERROR, NLMSG_DONE) or size < 88:
                return
            yield data[at + 16 : at + size]
            at += (size + 3) & ~3


def _resent(data: bytes) -> int:
    at, end = 72, len(data)
    while at + 4 <= end:
        size, kind = struct.unpack_from("=HH", data, at)
        if kind == INET_DIAG_INFO and size >= 4 + TOTAL_RETRANS + 4:
            return int(struct.unpack_from("=I", data, at + 4 + TOTAL_RETRANS)[0])
        at += max((size + 3) & ~3, 4)
    return 0
