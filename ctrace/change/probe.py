"""Connections of our own to the services of a plan, where no load tells how they fare.

Only what answered before the change is asked again: this host's own addresses for what it
serves, and for what it calls the servers that it was seen to call. What comes from outside
can't be tried from here; for that there is the rehearsal.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from errno import EINPROGRESS
from ipaddress import ip_address
from typing import Final

from ctrace.change.plan import Notrack, Plan

Target = tuple[str, int]
MOST: Final = 6
PATIENCE_S: Final = 0.8


def targets(plan: Plan, local: Iterable[str]) -> tuple[Target, ...]:
    """What could be connected to, at most :data:`MOST` for each of a plan's TCP services."""
    here = [a for a in ("127.0.0.1", "::1", *local) if not ip_address(a).is_link_local]
    found: list[Target] = []
    for lever in plan.levers:
        if not isinstance(lever, Notrack) or lever.proto != "tcp":
            continue
        roles = set(lever.roles)
        mine = here if {"server", "loopback"} & roles else []
        called = list(lever.peers) if "client" in roles else []
        found += [(a, lever.port) for a in dict.fromkeys([*called[:MOST], *mine])][:MOST]
    return tuple(found)


def answering(wanted: Collection[Target]) -> frozenset[Target]:
    """Those that take a connection, tried all at once from this thread's namespace."""
    found: set[Target] = set()
    poll = select.poll()
    waiting: dict[int, tuple[Target, socket.socket]] = {}
    with ExitStack() as stack:
        for target in wanted:
            family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
            sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            sock.setblocking(False)
            code = sock.connect_ex(target)
            if code in (0, EINPROGRESS):
                waiting[sock.fileno()] = target, sock
                poll.register(sock, select.POLLOUT)
        while waiting:
            ready = poll.poll(PATIENCE_S * 1000)
            if not ready:
                break
            for fd, _ in ready:
                target, sock = waiting.pop(fd)
                poll.unregister(fd)
                if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    found.add(target)
    return frozenset(found)
