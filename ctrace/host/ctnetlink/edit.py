"""Changes of a connection tracking table through ctnetlink: entries made and deleted.

Every function takes the path of a namespace and leaves no socket behind.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from errno import EEXIST, ENOMEM
from ipaddress import IPv4Address
from typing import Final, Optional

import numpy as np

from ctrace.errors import CtraceError
from ctrace.host.ctnetlink.message import U8
from ctrace.host.ctnetlink.socket import (
    ACK,
    CREATE_EXCL,
    DATAGRAM,
    DELETE,
    NETLINK_CAP_ACK,
    NEW,
    REQUEST,
    SO_RCVBUFFORCE,
    SO_SNDBUFFORCE,
    SOL_NETLINK,
    attr,
    check,
    errors,
    flow_tuple,
    header,
    nest,
    opened,
)
from ctrace.record import Status

SOURCE: Final = IPv4Address("198.18.0.0")
BATCH: Final = 2048
"""Entries in one message to the kernel."""


def flush(path: str) -> None:
    """Delete every entry of the namespace's table. Raises CtraceError."""
    with opened(path) as (sock, _):
        sock.send(header(20, DELETE, REQUEST | ACK, 1))
        check(struct.unpack_from("=i", sock.recv(DATAGRAM), 16)[0], "flush the table")


def delete(path: str, entry: np.void) -> None:
    """Delete one entry, given as a record. Raises CtraceError when it does not exist."""
    first = 0 if entry["family"] == socket.AF_INET6 else 12
    src, dst = (bytes(entry[name])[first:] for name in ("src", "dst"))
    proto, sport, dport = (int(entry[name]) for name in ("proto", "sport", "dport"))
    body = nest(1, flow_tuple(proto, src, dst, sport, dport))
    if entry["zone"]:
        body += attr(18, struct.pack(">H", int(entry["zone"])))
    family = int(entry["family"])
    with opened(path) as (sock, _):
        sock.send(header(20 + len(body), DELETE, REQUEST | ACK, 1, family) + body)
        check(struct.unpack_from("=i", sock.recv(DATAGRAM), 16)[0], "delete the entry")


def fill(
    path: str,
    n: int,
    *,
    target: str = "192.0.2.1",
    dport: int = 443,
    timeout: int = 600,
    state: Optional[int] = 3,
    first: int = 0,
) -> int:
    """Insert ``n`` IPv4 entries into the namespace's table; returns how many it took.

    It stops early when the table is full; entries that are there already are no
    error. Entry ``i`` (counted from ``first``) has source address ``SOURCE + i //
    60000`` and source port ``1024 + i % 60000``. They are TCP in ``state`` (3 is
    ESTABLISHED) and ASSURED, so early_drop never evicts them. With no state they are
    UDP and have seen a reply: those it may evict.
    About 2 us each. Raises CtraceError.
    """
    message = _entry(target, dport, timeout, state)
    size = len(message)
    addresses = [message.index(word) for word in (b"SRC1", b"SRC2")]
    ports = [message.index(word) for word in (b"P1", b"P2")]
    base = int(SOURCE)
    taken = 0
    with opened(path) as (sock, _):
        sock.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        for option in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
            sock.setsockopt(socket.SOL_SOCKET, option, BATCH * (size + 1024))
        for begin in range(first, first + n, BATCH):
            index = np.arange(begin, min(begin + BATCH, first + n), dtype=np.int64)
            block: U8 = np.tile(np.frombuffer(message, np.uint8), (len(index), 1))
            source_of = (base + index // 60000).astype(">u4").view(np.uint8).reshape(-1, 4)
            port_of = (1024 + index % 60000).astype(">u2").view(np.uint8).reshape(-1, 2)
            for at in addresses:
                block[:, at : at + 4] = source_of
            for at in ports:
                block[:, at : at + 2] = port_of
            sock.send(block.data)
            refused = errors(sock)
            taken += len(index) - sum(refused.values())
            if ENOMEM in refused:  # the table is full
                break
            for error in refused.keys() - {EEXIST}:
                raise CtraceError(f"cannot insert entries through ctnetlink: {os.strerror(error)}")
    return taken


@dataclass(frozen=True)
class Flow:
    """A TCP connection as its first packet had it."""

    src: bytes
    """4 or 16 bytes."""
    dst: bytes
    sport: int
    dport: int


def insert(path: str, flows: Iterable[Flow], timeout: int) -> int:
    """Make ESTABLISHED entries for TCP connections that are open but untracked; returns how many
    were made.

    Windows are not checked (BE_LIBERAL), as for a connection that nf_conntrack_tcp_loose picks up
    (tcp_new in nf_conntrack_proto_tcp.c). A connection that has an entry keeps it; those for which
    the table has no room are left out. Raises CtraceError.
    """
    taken = 0
    status = Status.SEEN_REPLY | Status.ASSURED
    with opened(path) as (sock, _):
        for flow in flows:
            ports = struct.pack(">H", flow.sport), struct.pack(">H", flow.dport)
            message = _message(
                _tuple(socket.IPPROTO_TCP, flow.src, flow.dst, *ports),
                _tuple(socket.IPPROTO_TCP, flow.dst, flow.src, *ports[::-1]),
                timeout,
                status,
                attr(1, b"\x03") + attr(4, b"\x0a\x0a") + attr(5, b"\x0a\x0a"),
                socket.AF_INET if len(flow.src) == 4 else socket.AF_INET6,
            )
            sock.send(message)
            # Only errors are answered, before send returns: the kernel handles it in the call.
            refused = errors(sock)
            taken += not refused
            if ENOMEM in refused:
                break
    return taken


def _entry(target: str, dport: int, timeout: int, state: Optional[int]) -> bytes:
    """IPCTNL_MSG_CT_NEW with words in place of the source address and port."""
    proto, status, tcp = socket.IPPROTO_UDP, Status.SEEN_REPLY, b""
    if state is not None:
        proto, status, tcp = socket.IPPROTO_TCP, status | Status.ASSURED, attr(1, bytes([state]))
    to, port = IPv4Address(target).packed, struct.pack(">H", dport)
    return _message(
        _tuple(proto, b"SRC1", to, b"P1", port),
        _tuple(proto, to, b"SRC2", port, b"P2"),
        timeout,
        status,
        tcp,
        socket.AF_INET,
    )


def _tuple(proto: int, src: bytes, dst: bytes, sport: bytes, dport: bytes) -> bytes:
    kind = 1 if len(src) == 4 else 3
    ports = attr(1, bytes([proto])) + attr(2, sport) + attr(3, dport)
    return nest(1, attr(kind, src) + attr(kind + 1, dst)) + nest(2, ports)


def _message(
    original: bytes, reply: bytes, timeout: int, status: Status, tcp: bytes, family: int
) -> bytes:
    """IPCTNL_MSG_CT_NEW; ``tcp`` holds the attributes of CTA_PROTOINFO_TCP, if it is TCP."""
    body = nest(1, original) + nest(2, reply)
    body += attr(3, struct.pack(">I", status | Status.CONFIRMED))
    body += attr(7, struct.pack(">I", timeout))
    if tcp:
        body += nest(4, nest(1, tcp))
    return header(20 + len(body), NEW, REQUEST | CREATE_EXCL, 1, family) + body
