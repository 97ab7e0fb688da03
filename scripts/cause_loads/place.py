"""Three namespaces with real traffic: a client, a host that tracks, and a server behind it.

10.77.1.1 -- 10.77.1.2, 10.77.2.1 -- 10.77.2.2.
What is looked at is the host in the middle.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Optional

from kit.traffic import tcp_server, udp_server

from ctrace.lab import Lab, Node

CLIENT, NEAR, OUT, SERVER = "10.77.1.1", "10.77.1.2", "10.77.2.1", "10.77.2.2"
TCP, UDP, DGRAM = (socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.SOCK_DGRAM)
SYN, RST, ACK, SYN_ACK = 0x02, 0x04, 0x10, 0x12
SETTING = "net.netfilter.nf_conntrack_"


@dataclass
class Place:
    """The namespaces of one case, and what plays in them until it is stopped."""

    client: Node
    host: Node
    server: Node
    stack: ExitStack
    lab: Lab
    stop: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def begin(self, work: Callable[[], None]) -> None:
        """Play something in a thread of its own."""
        thread = threading.Thread(target=work, daemon=True)
        self.threads.append(thread)
        thread.start()

    def repeat(
        self, node: Node, rate: float, one: Callable[[int], None], most: int = 1 << 30
    ) -> None:
        """``one(number)`` so many times a second in a node; what fails is left."""

        def work() -> None:
            with node.enter():
                for number in self.ticks(rate, most):
                    with suppress(OSError):
                        one(number)

        self.begin(work)

    def ticks(self, rate: float, most: int = 1 << 30) -> Iterator[int]:
        """Numbers, at an even pace until it is over."""
        start = time.monotonic()
        for number in range(most):
            if self.stop.wait(max(0.0, start + number / rate - time.monotonic())):
                return
            yield number

    def serve(
        self, node: Node, port: int, handle: Optional[Callable[[socket.socket], None]] = None
    ) -> None:
        """A server that answers one line, or does what it is told with each connection."""
        self.stack.enter_context(tcp_server(node, port, handle=handle))

    def answer(self, node: Node, port: int, *, reply: bool = True, address: str = "::") -> None:
        """A server that answers datagrams, or takes them."""
        self.stack.enter_context(udp_server(node, port, reply=reply, address=address))

    def keep(self, one: socket.socket) -> socket.socket:
        """Close a socket only at the end."""
        self.stack.callback(one.close)
        return one

    def knock(self, address: str, port: int) -> None:
        """Send a SYN without waiting for an answer. Raises BlockingIOError, as connect(2) does."""
        one = self.keep(socket.socket())
        one.setblocking(False)
        one.connect((address, port))

    def kept(self, node: Node, port: int) -> None:
        """A server that answers what comes, and keeps each connection until the client goes."""

        def talk(one: socket.socket) -> None:
            with suppress(OSError):
                while one.recv(512):
                    one.sendall(b"ok")
            one.close()

        def take(one: socket.socket) -> None:
            mine = one.dup()
            threading.Thread(target=talk, args=(mine,), daemon=True).start()

        self.serve(node, port, take)

    def never_closed(self, node: Node, port: int) -> None:
        """A server that accepts and forgets."""
        self.serve(node, port, lambda one: self.keep(one.dup()))

    def addresses(self, node: Node, device: str, first: int, n: int) -> list[str]:
        """More addresses of the first link's client side."""
        found = [f"10.77.1.{first + i}" for i in range(n)]
        lines = "".join(f"addr add {one}/24 dev {device}\n" for one in found)
        node.run(["ip", "-batch", "-"], stdin=lines)
        return found


@dataclass(frozen=True)
class Case:
    """A load, and what may be said of it."""

    name: str
    play: Callable[[Place], None]
    causes: tuple[str, ...] = ()
    """One of these comes first; of a load that is no fault, none has to."""
    words: str = ""
    """A pattern that what is said first has to hold."""
    beside: tuple[str, ...] = ()
    """Causes that may be said, too."""
    wrong: str = ""
    """A pattern that no cause and no remedy may hold."""
    before: float = 1.0
    """Seconds that it plays before anybody looks."""
    machine: bool = False
    """Whether it changes the whole machine: it plays in an emulated one only."""
    who: str = ""
    """A pattern that the key which holds most has to have, from then on."""


def place(lab: Lab, stack: ExitStack) -> Place:
    """The three namespaces, wired, the middle one forwards and tracks."""
    client, host, server = (lab.namespace(name) for name in "chs")
    lab.link(client, host)
    lab.link(host, server)
    host.track()
    host.sysctl("net.ipv4.ip_forward", 1)
    host.sysctl("net.ipv6.conf.all.forwarding", 1)
    client.run(["ip", "route", "add", "default", "via", NEAR])
    client.run(["ip", "-6", "route", "add", "default", "via", "fd77:1::2"])
    server.run(["ip", "route", "add", "default", "via", OUT])
    server.run(["ip", "-6", "route", "add", "default", "via", "fd77:2::1"])
    return Place(client, host, server, stack, lab)
