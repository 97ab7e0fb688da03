"""A change on trial, looked at once a second: the namespace's counters, its own rules, probes.

Each look reads files of /proc and one small table; nothing is dumped unless something rose. Where
there is no load to judge by, ctrace opens connections of its own, and only to targets that answered
before the change: this host's own addresses for what it serves, and the servers that it was seen to
call. What comes from outside can't be tried from here; the rehearsal does that.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from errno import EINPROGRESS
from ipaddress import ip_address
from typing import Final

from ctrace.change import health
from ctrace.errors import CtraceError
from ctrace.host import ctnetlink, netns
from ctrace.plan.plan import Notrack, Plan
from ctrace.ruleset.installed import EXPIRED, NOTHING, read_own

LISTEN_S: Final = 0.2
"""Seconds, at least, for which new entries are listened to."""
TWICE: Final = 2
"""One probe that gets no answer may have been lost."""
Target = tuple[str, int]
MOST: Final = 6
PATIENCE_S: Final = 0.8


@dataclass
class Watch:
    """What a look compares with; made when the rules are in."""

    plan: Plan
    way: netns.Way
    """Into the namespace."""
    before: health.Before
    probes: tuple[Target, ...] = ()
    last: health.Sample = field(init=False)
    _open: health.Connections = field(init=False)
    _silent: dict[Target, int] = field(default_factory=dict)
    _local: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        with self._there() as path, netns.enter(path):
            self._local = netns.local_addresses(path)
            self._open = health.Connections()
            self.last = self._sample()[0]

    @contextmanager
    def _there(self) -> Iterator[str]:
        with self.way.held() as space:
            if space is None:
                raise CtraceError("the network namespace is gone")
            yield space.path

    def look(self, listen_s: float = 0.0) -> health.Verdict:
        """The verdict on the time since the last look. Raises CtraceError.

        ``listen_s``: how long to listen for new entries of the services, which should not come.
        """
        with self._there() as path:
            return self._look(path, listen_s)

    def _look(self, path: str, listen_s: float) -> health.Verdict:
        fresh = 0
        if listen_s:
            made = ctnetlink.new_entries(path, max(LISTEN_S, listen_s))
            fresh = len(health.of_services(made, self.plan.levers, self._local))
        with netns.enter(path):
            second, state = self._sample()
            verdict = health.compare(self.before, (self.last, second), self.plan.levers, self._open)
            # a full table refuses these connections, too, whatever the rules do
            full = _refused(second) > _refused(self.last)
            more = [] if verdict.proven or full else self._ask()
        self.last = second
        if state == NOTHING:
            more.append("the rules are gone: something else removed them")
        elif fresh and state != EXPIRED:
            more.append(f"{fresh} new entries of the services: the rules have no effect")
        if not more:
            return verdict
        return health.Verdict((*verdict.worse, *more), False, verdict.seen)

    def _sample(self) -> tuple[health.Sample, str]:
        own = read_own(self.plan.backend, time.time())
        try:
            return health.sample(self.plan.levers, own.rules), own.state
        except OSError as error:
            raise CtraceError(f"the namespace's counters cannot be read: {error}") from None

    def _ask(self) -> list[str]:
        """Try the probes; one sentence for each that has been silent twice."""
        answered = answering(self.probes)
        self._silent = {t: self._silent.get(t, 0) + 1 for t in self.probes if t not in answered}
        return [
            f"a connection of its own to {address} port {port} is not taken any more"
            for (address, port), times in self._silent.items()
            if times >= TWICE
        ]


def _refused(sample: health.Sample) -> int:
    return sample.counters.get(health.REFUSED, 0)


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
            try:  # a kernel without IPv6 (ipv6.disable=1) refuses the socket itself
                sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            except OSError:
                continue
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
