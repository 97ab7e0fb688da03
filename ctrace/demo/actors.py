"""The processes of the scene, inside a namespace; the arguments are the role and its values.

Each says on standard output, once a second and as one JSON object a line, what it did.
They end when their standard input does, and with their parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import select
import selectors
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

PR_SET_NAME = 15
PORT, DNS, METRICS = 8063, 53, 8125
PATIENCE = 2.0
"""Seconds until a client gives up to connect."""
LINGER = 30.0
"""Seconds until it gives up on an answer: closing earlier would reset what comes late."""
REQUEST, ANSWER = b"GET /item\n", b"ok\n"


def rename(comm: str) -> None:
    """The name that ps, and ctrace, show."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, comm.encode()[:15])


class Actor:
    """A loop over sockets with a report every second."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.did: Counter[str] = Counter()
        self.every: list[tuple[Callable[[], float], Callable[[], None]]] = []
        """(how often a second, what)."""
        self._owed: list[float] = []

    def watch(self, sock: socket.socket, events: int, call: Callable[[int], None]) -> None:
        """Call ``call`` when the socket is ready."""
        self.selector.register(sock, events, call)

    def forget(self, sock: socket.socket) -> None:
        """Close a watched socket."""
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(sock)
        sock.close()

    def run(self) -> None:
        """Until standard input ends."""
        self.selector.register(sys.stdin, selectors.EVENT_READ, None)
        self._owed = [0.0] * len(self.every)
        last, told = time.monotonic(), time.monotonic()
        while True:
            for key, events in self.selector.select(0.01):
                if key.data is None:
                    line = sys.stdin.readline()
                    if not line:
                        return
                    self.told(line.strip())
                else:
                    key.data(events)
            now = time.monotonic()
            for index, (rate, act) in enumerate(self.every):
                self._owed[index] += rate() * (now - last)
                # What a stall has delayed is not caught up in one burst.
                self._owed[index] = min(self._owed[index], max(2.0, rate() / 10))
                while self._owed[index] >= 1:
                    self._owed[index] -= 1
                    act()
            last = now
            if now - told >= 1:
                told = now
                print(json.dumps(self.did), flush=True)
                self.did.clear()

    def told(self, line: str) -> None:
        """An order from the director."""


class Api(Actor):
    """The service: answers on its port, sends metrics, looks names up."""

    def __init__(self, resolver: str, collector: str) -> None:
        super().__init__()
        rename("shop-api")
        self.resolver, self.collector = resolver, collector
        self.calls = 0.0
        listener = socket.create_server(("0.0.0.0", PORT), backlog=4096)
        listener.setblocking(False)
        self.listener = listener
        self.watch(listener, selectors.EVENT_READ, self._accept)
        self.every = [(lambda: self.calls, self._metric), (lambda: self.calls / 2, self._lookup)]

    def told(self, line: str) -> None:
        """How many metrics a second; half as many look-ups."""
        with contextlib.suppress(ValueError):
            self.calls = float(line)

    def _accept(self, _: int) -> None:
        for _turn in range(64):
            try:
                connection, _peer = self.listener.accept()
            except OSError:
                return
            connection.setblocking(False)
            self.watch(connection, selectors.EVENT_READ, partial(self._serve, connection))

    def _serve(self, connection: socket.socket, _: int) -> None:
        try:
            if connection.recv(256):
                connection.send(ANSWER)
                self.did["served"] += 1
                return
        except OSError:
            pass
        self.forget(connection)

    def _metric(self) -> None:
        self._send(self.collector, METRICS, b"shop.requests:1|c", "metrics")

    def _lookup(self) -> None:
        self._send(self.resolver, DNS, b"config.shop.internal", "lookups")

    def _send(self, address: str, port: int, data: bytes, what: str) -> None:
        # A socket for every message, as short-lived clients and resolvers do.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            try:
                sock.sendto(data, (address, port))
                self.did[what] += 1
            except OSError as error:
                self.did[f"{what} {errno.errorcode.get(error.errno or 0, 'failed')}"] += 1


class Front(Actor):
    """The clients: a connection for every request, as many a second as they are told."""

    def __init__(self, target: str) -> None:
        super().__init__()
        rename("shop-front")
        self.target = (target, PORT)
        self.rate = 0.0
        self.open: dict[socket.socket, float] = {}
        self.connected: set[socket.socket] = set()
        self.every = [(lambda: self.rate, self._call), (lambda: 4.0, self._give_up)]

    def told(self, line: str) -> None:
        """A new rate."""
        with contextlib.suppress(ValueError):
            self.rate = float(line)

    def _call(self) -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        if sock.connect_ex(self.target) not in (0, errno.EINPROGRESS):
            self.did["failed"] += 1
            sock.close()
            return
        self.open[sock] = time.monotonic()
        self.watch(sock, selectors.EVENT_WRITE, lambda _: self._connected(sock))

    def _connected(self, sock: socket.socket) -> None:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._done(sock, "failed")
            return
        self.connected.add(sock)
        with contextlib.suppress(OSError):
            sock.send(REQUEST)
        self.selector.modify(sock, selectors.EVENT_READ, lambda _: self._answered(sock))

    def _answered(self, sock: socket.socket) -> None:
        try:
            good = bool(sock.recv(256))
        except OSError:
            good = False
        self._done(sock, "answered" if good else "failed")

    def _done(self, sock: socket.socket, how: str) -> None:
        self.did[how] += 1
        self.open.pop(sock, None)
        self.connected.discard(sock)
        self.forget(sock)

    def _give_up(self) -> None:
        now = time.monotonic()
        for sock, began in list(self.open.items()):
            if now - began > PATIENCE and sock not in self.connected:
                self._done(sock, "gave up")
            elif now - began > LINGER:
                self._done(sock, "late")


class Net(Actor):
    """Everything else: a resolver that answers, a collector that never does."""

    def __init__(self) -> None:
        super().__init__()
        rename("resolver")
        self.socks = []
        for port in (DNS, METRICS):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind(("0.0.0.0", port))
            sock.setblocking(False)
            self.socks.append(sock)
            self.watch(sock, selectors.EVENT_READ, partial(self._receive, sock, port == DNS))

    def _receive(self, sock: socket.socket, answers: bool, _: int) -> None:
        while select.select([sock], [], [], 0)[0]:
            try:
                data, peer = sock.recvfrom(2048)
                if answers:
                    sock.sendto(data, peer)
            except OSError:
                return


def main(argv: list[str]) -> None:
    """Play a role until standard input ends."""
    role, *rest = argv
    actor: Actor
    if role == "api":
        actor = Api(rest[0], rest[1])
    elif role == "front":
        actor = Front(rest[0])
    else:
        actor = Net()
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        actor.run()


if __name__ == "__main__":
    main(sys.argv[1:])
