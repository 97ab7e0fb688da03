"""Real traffic with its own record of what it did, to compare a trace with."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from errno import EPERM
from typing import NamedTuple, Optional

from ctrace.lab import Node

TCP, UDP, SCTP = socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.IPPROTO_SCTP


class Flow(NamedTuple):
    """One flow as its sender knows it: the original tuple."""

    proto: int
    src: str
    sport: int
    dst: str
    dport: int


@dataclass
class Sent:
    """What a generator did."""

    flows: list[Flow] = field(default_factory=list)
    """Flows whose first packet left."""
    refused: list[Flow] = field(default_factory=list)
    """Flows whose first packet got EPERM."""
    failed: int = 0
    """Flows that failed in another way."""


def family_of(address: str) -> socket.AddressFamily:
    """AF_INET6 for an address with a colon."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@contextmanager
def tcp_server(
    node: Node,
    port: int,
    *,
    handle: Optional[Callable[[socket.socket], None]] = None,
    address: str = "::",
) -> Iterator[int]:
    """Accept on ``port`` (both families) inside ``node``: answer one line, then close.

    Yields the port (chosen by the kernel when 0 is given).
    """
    listener = node.socket(family_of(address), socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family_of(address) == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind((address, port))
    listener.listen(4096)
    thread = threading.Thread(target=_serve, args=(listener, handle or _answer), daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        # shutdown wakes the blocked accept; close alone would leave it waiting.
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=5)
        listener.close()


def _serve(listener: socket.socket, handle: Callable[[socket.socket], None]) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            try:
                handle(connection)
            except OSError:
                continue


def _answer(connection: socket.socket) -> None:
    connection.settimeout(5)
    if connection.recv(64):
        connection.sendall(b"ok\n")
        connection.recv(64)  # the client closes first, so TIME_WAIT is on its side


def tcp_connections(
    node: Node, target: tuple[str, int], n: int, *, reset: bool = False, timeout: float = 3.0
) -> Sent:
    """Open, use and close ``n`` short TCP connections from ``node``, one after another.

    ``reset`` ends each with RST instead of FIN.
    """
    sent = Sent()
    family = family_of(target[0])
    with node.enter():
        for _ in range(n):
            with socket.socket(family, socket.SOCK_STREAM) as client:
                client.settimeout(timeout)
                try:
                    client.connect(target)
                    src, sport = client.getsockname()[:2]
                    sent.flows.append(Flow(TCP, src, sport, *target))
                    client.sendall(b"hi\n")
                    client.recv(64)
                    if reset:
                        client.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )
                except OSError as error:
                    if error.errno == EPERM:
                        src, sport = client.getsockname()[:2]
                        sent.refused.append(Flow(TCP, src, sport, *target))
                    else:
                        sent.failed += 1
    return sent


def udp_flows(
    node: Node,
    target: tuple[str, int],
    n: int,
    *,
    first_port: int = 20000,
    packets: int = 1,
    source: str = "",
) -> Sent:
    """Send ``n`` one-way UDP flows, each from a source port of its own."""
    sent = Sent()
    family = family_of(target[0])
    with node.enter():
        for port in range(first_port, first_port + n):
            with socket.socket(family, socket.SOCK_DGRAM) as client:
                client.bind((source, port))
                try:
                    client.connect(target)
                    flow = Flow(UDP, client.getsockname()[0], port, *target)
                    for _ in range(packets):
                        client.send(b"x")
                    sent.flows.append(flow)
                except ConnectionRefusedError:
                    sent.flows.append(flow)
                except OSError as error:
                    if error.errno == EPERM:
                        sent.refused.append(flow)
                    else:
                        sent.failed += 1
    return sent


def pings(node: Node, target: str, n: int, *, first_id: int = 1) -> Sent:
    """Send ``n`` echo requests with ids of their own, and await each answer.

    As conntrack has it, a flow's source port is the id, its destination port type << 8 | code.
    """
    sent = Sent()
    v6 = family_of(target) == socket.AF_INET6
    proto, kind = (socket.IPPROTO_ICMPV6, 128) if v6 else (socket.IPPROTO_ICMP, 8)
    with node.socket(family_of(target), socket.SOCK_RAW, proto) as raw:
        raw.settimeout(10)
        raw.connect((target, 0))
        src = raw.getsockname()[0]
        for number in range(first_id, first_id + n):
            packet = struct.pack("!BBHHH", kind, 0, 0, number, 1)
            total = (kind << 8) + number + 1  # no carry: ids stay small
            if not v6:  # in ICMPv6 the kernel fills in the checksum
                packet = struct.pack("!BBHHH", kind, 0, ~total & 0xFFFF, number, 1)
            try:
                raw.send(packet)
                sent.flows.append(Flow(proto, src, number, target, kind << 8))
                while _echo(raw.recv(256), v6) != number:
                    pass  # neighbour discovery, our own request on loopback
            except OSError as error:
                if error.errno == EPERM:
                    sent.refused.append(Flow(proto, src, number, target, kind << 8))
                else:
                    sent.failed += 1
    return sent


def _echo(packet: bytes, v6: bool) -> int:
    """The id of an echo reply; -1 for anything else."""
    body = packet if v6 else packet[(packet[0] & 15) * 4 :]
    return struct.unpack_from("!H", body, 4)[0] if body[0] == (129 if v6 else 0) else -1


def sctp_flows(node: Node, peer: Node, target: str, n: int, *, first_port: int = 20000) -> Sent:
    """Begin ``n`` SCTP associations from ``node`` to port 2905: INIT and, from ``peer``, INIT ACK.

    By hand: the kernel need not know SCTP, only its conntrack.
    """
    sent = Sent()
    family = family_of(target)
    with (
        node.socket(family, socket.SOCK_RAW, SCTP) as here,
        peer.socket(family, socket.SOCK_RAW, SCTP) as there,
    ):
        there.settimeout(10)
        here.connect((target, 0))
        src = here.getsockname()[0]
        for port in range(first_port, first_port + n):
            here.send(_sctp(port, 2905, 0, 1, 7))
            sent.flows.append(Flow(SCTP, src, port, target, 2905))
            there.recv(256)
            there.sendto(_sctp(2905, port, 7, 2, 9), (src, 0))
    return sent


def _sctp(sport: int, dport: int, tag: int, chunk: int, init_tag: int) -> bytes:
    """An INIT (1) or INIT ACK (2), RFC 9260 3.3.2, with its checksum (CRC-32C)."""
    body = struct.pack("!BBHIIHHI", chunk, 0, 20, init_tag, 1500, 1, 1, 1)
    head = struct.pack("!HHI", sport, dport, tag)
    crc = 0xFFFFFFFF
    for byte in head + bytes(4) + body:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return head + struct.pack("<I", crc ^ 0xFFFFFFFF) + body


@contextmanager
def udp_server(node: Node, port: int, *, reply: bool = True, address: str = "::") -> Iterator[int]:
    """Receive on ``port`` inside ``node``; ``reply`` sends each datagram back."""
    server = node.socket(family_of(address), socket.SOCK_DGRAM)
    if family_of(address) == socket.AF_INET6:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.bind((address, port))
    server.setblocking(False)
    stop_read, stop_write = socket.socketpair()

    def serve() -> None:
        with selectors.DefaultSelector() as ready:
            ready.register(server, selectors.EVENT_READ)
            ready.register(stop_read, selectors.EVENT_READ)
            while True:
                for key, _ in ready.select():
                    if key.fileobj is stop_read:
                        return
                    try:
                        data, peer = server.recvfrom(2048)
                        if reply:
                            server.sendto(data, peer)
                    except OSError:
                        continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        stop_write.close()
        thread.join(timeout=5)
        stop_read.close()
        server.close()
