"""Sockets of ctnetlink, and what its messages are made of.

Raw netlink, without a library. A socket keeps its namespace alive until it is closed.
"""

from __future__ import annotations

import os
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from ctrace.errors import CtraceError
from ctrace.host.netns import enter, here

NETLINK_NETFILTER: Final = 12
CTNETLINK: Final = 1 << 8
NEW, GET, DELETE, GET_STATS_CPU = CTNETLINK, CTNETLINK | 1, CTNETLINK | 2, CTNETLINK | 4
REQUEST, ACK, DUMP, CREATE_EXCL = 1, 4, 0x300, 0x600
NLMSG_ERROR, NLMSG_DONE = 2, 3
SOL_NETLINK, NETLINK_CAP_ACK = 270, 10
DATAGRAM: Final = 1 << 16
"""The kernel builds dumps in pieces of at most 32 KiB."""
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33


def header(size: int, kind: int, flags: int, seq: int, family: int = 0) -> bytes:
    """struct nlmsghdr and struct nfgenmsg."""
    return struct.pack("=IHHIIBBH", size, kind, flags, seq, 0, family, 0, 0)


def attr(kind: int, value: bytes) -> bytes:
    """struct nlattr and its value, padded."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def nest(kind: int, value: bytes) -> bytes:
    """An attribute that holds attributes (NLA_F_NESTED)."""
    return attr(kind | 0x8000, value)


def flow_tuple(proto: int, src: bytes, dst: bytes, sport: int, dport: int) -> bytes:
    """What CTA_TUPLE_ORIG holds. Addresses are of 4 or 16 bytes; of ICMP ``sport`` is the id, and
    ``dport`` type and code."""
    kind = 1 if len(src) == 4 else 3
    ports = attr(1, bytes([proto]))
    if proto in (socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6):
        base = 4 if proto == socket.IPPROTO_ICMP else 7
        ports += attr(base, struct.pack(">H", sport))
        ports += attr(base + 1, bytes([dport >> 8])) + attr(base + 2, bytes([dport & 0xFF]))
    else:
        ports += attr(2, struct.pack(">H", sport)) + attr(3, struct.pack(">H", dport))
    return nest(1, attr(kind, src) + attr(kind + 1, dst)) + nest(2, ports)


@contextmanager
def opened(path: str) -> Iterator[tuple[socket.socket, int]]:
    """As open_socket, closed at the end; what goes wrong inside becomes a CtraceError."""
    sock, inum = open_socket(path)
    with sock:
        try:
            yield sock, inum
        except BlockingIOError:
            raise CtraceError("the kernel did not answer a ctnetlink request in 10 s") from None
        except OSError as error:
            raise CtraceError(f"ctnetlink failed: {error.strerror}") from error


def open_socket(path: str, groups: int = 0) -> tuple[socket.socket, int]:
    """A ctnetlink socket inside the namespace at ``path``, and the namespace's inode.

    It works from anywhere, and keeps the namespace alive until closed. ``groups`` are
    multicast groups as a mask. Raises CtraceError when the namespace has gone, or the
    kernel has no nfnetlink.
    """
    with enter(path):
        inum = here()
        try:
            sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        except OSError as error:
            raise CtraceError(
                f"cannot open a netfilter netlink socket: {error.strerror}"
            ) from error
    try:
        # A plain timeout would make MSG_DONTWAIT wait as well.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 10, 0))
        sock.bind((0, groups))
    except OSError as error:
        sock.close()
        raise CtraceError(
            f"cannot listen to ctnetlink: {error.strerror} (CAP_NET_ADMIN?)"
        ) from error
    return sock, inum


def errors(sock: socket.socket) -> Counter[int]:
    """Error answers waiting on a socket, by errno."""
    found: Counter[int] = Counter()
    while True:
        try:
            answer = sock.recv(DATAGRAM, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return found
        kind, error = struct.unpack_from("=4xH10xi", answer)
        if kind == NLMSG_ERROR and error:
            found[-error] += 1


def check(error: int, what: str) -> None:
    """Raise CtraceError for a negative errno."""
    if error < 0:
        raise CtraceError(f"cannot {what} through ctnetlink: {os.strerror(-error)}")
