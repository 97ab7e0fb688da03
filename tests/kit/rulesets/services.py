"""What listens and answers in the network of rule sets, and its addresses and ports."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

from ctrace.lab import Node

PORT = 8063
CLOSED = 22
HIGH = 40000
"""In the ephemeral range, with a listener that the firewall hides."""
BACKEND = 9063
WAIT = 1.0
PATIENCE = 60.0
SHORT = 0.4
"""Seconds for what ought to be closed: open doors here answer within a millisecond."""
LONGEST = 4 * WAIT
"""What a second, patient look at a service waits: nothing of a connection outlives it."""
ABORT = b"\x01\0\0\0\0\0\0\0"
"""As SO_LINGER: close at once, and send nothing again. What went on sending after a failed
use would be tracked, and counted, under the rules of the next case."""
LOCAL = {4: "127.0.0.1", 6: "::1"}
STRANGER = {4: "10.77.1.100", 6: "fd77:1::100"}
Address = tuple[str, int]
BIG = 60_000
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


# ---- services ----------------------------------------------------------------


def tcp_service(node: Node, port: int) -> socket.socket:
    listener = node.socket(socket.AF_INET6, socket.SOCK_STREAM)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("::", port))
    listener.listen(64)
    threading.Thread(target=_accept, args=(listener, node.name), daemon=True).start()
    return listener


def _accept(listener: socket.socket, name: str) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_talk, args=(connection, name), daemon=True).start()


@contextlib.contextmanager
def aborted(connection: socket.socket) -> Iterator[None]:
    """A failure in the block is no error, and leaves nothing to send."""
    try:
        yield
    except OSError:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)


def _talk(connection: socket.socket, name: str) -> None:
    """``s``: a short answer; ``w``: that and who asked; ``d``: a large one; ``u``: take a large
    one, then answer."""
    user_timeout = int(LONGEST * 1000)
    with connection, aborted(connection):
        connection.settimeout(5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout)
        asked = connection.recv(1)
        if asked == b"d":
            connection.sendall(b"x" * BIG)
        elif asked == b"u":
            got = 0
            while got < BIG:
                data = connection.recv(65536)
                if not data:
                    return
                got += len(data)
            connection.sendall(b"ok")
        elif asked:
            # Services can be told apart: which node, and which of its ports, answers.
            port = connection.getsockname()[1]
            who = connection.getpeername()[0] if asked == b"w" else ""
            connection.sendall(name.encode() + b"%d" % (port // 1000 % 10) + who.encode())
        connection.recv(1)


def udp_service(node: Node, port: int) -> socket.socket:
    server = node.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    # Answer from the address that was asked, or a client on another link would not know us.
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    server.bind(("::", port))

    def serve() -> None:
        while True:
            try:
                data, info, _, peer = server.recvmsg(2048, 256)
            except OSError:
                return
            if not data:
                return
            with contextlib.suppress(OSError):
                server.sendmsg([data], info, 0, peer)

    threading.Thread(target=serve, daemon=True).start()
    return server


@contextlib.contextmanager
def serving(
    node: Node, kind: int, port: int, serve: Callable[[socket.socket], None]
) -> Iterator[None]:
    """``serve`` in a thread, called with a bound socket of both families until it is closed."""
    server = node.socket(socket.AF_INET6, kind)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("::", port))
    if kind == socket.SOCK_STREAM:
        server.listen(16)
    with answering(server, serve):
        yield


@contextlib.contextmanager
def answering(server: socket.socket, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """``serve`` in a thread, called with the socket again and again until it is closed."""

    def run() -> None:
        with contextlib.suppress(OSError):
            while True:
                serve(server)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)
