"""Real traffic with its own record of what it did, to hold a trace against."""

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

from ctrace.lab.namespaces import Node

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP


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
    """  # fmt: skip
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
    """Send ``n`` one-way UDP flows, each from a source port of its own."""  # fmt: skip
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
