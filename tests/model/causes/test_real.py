"""Each cause made for real in namespaces, recorded by the live source, named by the model.

All loads run at once, each in namespaces of its own, and one live source sees them all; a
model is then shown one load's namespaces at a time, as on a host that has no others.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import pytest
from kit import traffic
from kit.nfqueue import Queue
from kit.turns import lowered

from ctrace.batch import Batch
from ctrace.capture import open_live
from ctrace.capture.live import LiveSource
from ctrace.errors import CtraceError
from ctrace.host import ctnetlink
from ctrace.lab import Lab, Node
from ctrace.model import Model
from ctrace.model.snapshot import Cause

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.machine,  # one of its tables is full, which has few places
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
SECONDS, AGAIN = 9.0, 2.0
"""Until the first look at what the models say, and between two looks."""
AT_MOST = 240.0
"""On a busy machine the loads come more slowly, and so do the looks at them."""
SERVICES = 24
ROOM = 60
"""Entries short of the limit, which the load fills."""


@dataclass
class Load:
    """One load: where it shows, and what it does before and while the source listens."""

    cause: str
    nodes: tuple[Node, ...]
    """Namespaces that the model is shown."""
    run: Callable[[], None]
    text: str = ""
    """Words that the sentence must hold."""
    host: bool = True
    """Whether the model is shown the host's own namespace, too."""


def pair(lab: Lab, name: str) -> tuple[Node, Node, str]:
    """A client without conntrack, a server with it, and the server's address."""
    a, b = lab.namespace(f"{name}-c"), lab.namespace(name, track=True)
    return a, b, lab.link(a, b)[1]


def until_stopped(step: Callable[[int], None], stop: threading.Event, pause: float) -> None:
    """Repeat a portion of traffic, with its number, until the source has seen enough."""
    turn = 0
    while not stop.is_set():
        step(turn)
        turn += 1
        stop.wait(pause)


# -- the loads --------------------------------------------------------------------------------


def no_keepalive(lab: Lab, stack: ExitStack, stop: threading.Event) -> Load:
    a, b, target = pair(lab, "short")
    stack.enter_context(traffic.tcp_server(b, 8063))

    def run(turn: int) -> None:
        traffic.tcp_connections(a, (target, 8063), 60)

    return Load("no-keepalive", (b,), lambda: until_stopped(run, stop, 0.5), "tcp/8063")


def one_way_udp(lab: Lab, stack: ExitStack, stop: threading.Event) -> Load:
    a, b, target = pair(lab, "statsd")
    stack.enter_context(traffic.udp_server(b, 8125, reply=False))

    def run(turn: int) -> None:
        traffic.udp_flows(a, (target, 8125), 100, first_port=20000 + 100 * turn % 40000)

    return Load("one-way-udp", (b,), lambda: until_stopped(run, stop, 0.5), "udp/8125")


def dns_storm(lab: Lab, stack: ExitStack, stop: threading.Event) -> Load:
    a, b, target = pair(lab, "dns")
    stack.enter_context(traffic.udp_server(b, 53))

    def run(turn: int) -> None:
        traffic.udp_flows(a, (target, 53), 40, first_port=20000 + 40 * turn)

    return Load("dns-storm", (b,), lambda: until_stopped(run, stop, 0.5), "DNS")


def tunnel(lab: Lab, stack: ExitStack, stop: threading.Event) -> Load:
    """VXLAN between two hosts' pods; the outer source port follows each inner flow."""
    hosts = a, b = lab.namespace("host-a"), lab.namespace("host-b", track=True)
    pods = [lab.namespace(name) for name in ("pod-a", "pod-b")]
    outer = lab.link(a, b)
    for at, (host, pod) in enumerate(zip(hosts, pods, strict=True)):
        device = f"to-{hosts[1 - at].name}"
        try:
            host.run(["ip", "link", "add", "vx0", "type", "vxlan", "id", "9", "remote",
                      outer[1 - at], "dstport", "4789", "dev", device])  # fmt: skip
        except CtraceError:  # this kernel has no VXLAN: the same outer packets, made by hand
            stack.enter_context(traffic.udp_server(b, 4789, reply=False))
            pods, target = [a], (outer[1], 4789)
            break
        host.run(["ip", "link", "set", "vx0", "netns", str(pod.holder.pid)])
        pod.run(["ip", "addr", "add", f"10.66.0.{at + 1}/24", "dev", "vx0"])
        pod.run(["ip", "link", "set", "vx0", "up"])
        target = ("10.66.0.2", 7777)

    def run(turn: int) -> None:
        traffic.udp_flows(pods[0], target, 40, first_port=20000 + 40 * turn)

    return Load("tunnel", (b,), lambda: until_stopped(run, stop, 0.5), "VXLAN")


def loopback_probes(lab: Lab, stack: ExitStack, stop: threading.Event) -> Load:
    node = lab.namespace("kubelet", track=True)
    stack.enter_context(traffic.tcp_server(node, 10248))

    def run(turn: int) -> None:
        traffic.tcp_connections(node, ("127.0.0.1", 10248), 30)

    return Load("loopback-probes", (node,), lambda: until_stopped(run, stop, 0.5), "loopback")


def syn_flood(lab: Lab, stack: ExitStack, stop: threading.Event) -> Load:
    """Forged sources at a listening port, which answers them all."""
    a, b, target = pair(lab, "flood")
    stack.enter_context(traffic.tcp_server(b, 80))
    b.run(["ip", "route", "add", "10.200.0.0/16", "via", a.addresses["flood"][0]])
    raw = stack.enter_context(a.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW))
    draw = random.Random(1)

    def run(turn: int) -> None:
        for _ in range(60):
            source = f"10.200.{draw.randrange(256)}.{draw.randrange(1, 255)}"
            raw.sendto(_syn(source, target, draw.randrange(1024, 60000), 80), (target, 0))

    return Load("syn-flood", (b,), lambda: until_stopped(run, stop, 0.3), "half-open")


def _syn(src: str, dst: str, sport: int, dport: int) -> bytes:
    ends = socket.inet_aton(src) + socket.inet_aton(dst)
    tcp = struct.pack("!HHIIBBHHH", sport, dport, 1, 0, 0x50, 2, 1024, 0, 0)
    total = sum(struct.unpack("!16H", ends + struct.pack("!HH", 6, 20) + tcp))
    total = (total >> 16) + (total & 0xFFFF)
    tcp = tcp[:16] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + tcp[18:]
    return struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 64, 6, 0) + ends + tcp


def clash(lab: Lab, stack: ExitStack, stop: threading.Event) -> Load:
    """Two packets of each flow meet in a queue, so the second finds its place taken."""
    a, b = lab.namespace("race", track=True), lab.namespace("race-s")
    source, target = lab.link(a, b)
    dns = ["OUTPUT", "-p", "tcp", "--dport", "53"]
    a.run(["iptables", "-A", *dns, "-j", "NFQUEUE", "--queue-num", "7"])
    # an answer would end the first entry before the second packet comes
    b.run(["iptables", "-t", "raw", "-A", "PREROUTING", "-p", "tcp", "--dport", "53", "-j", "DROP"])
    queue = stack.enter_context(Queue(a, 7))
    raw = stack.enter_context(a.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW))

    def run() -> None:
        for port in range(30000, 30020):
            for _ in range(2):
                raw.sendto(_syn(source, target, port, 53), (target, 0))
            queue.accept(queue.wait(2))

    return Load("clash", (a,), run, "lost a race")


def idle_established(lab: Lab, stack: ExitStack, stop: threading.Event) -> Load:
    """Connections opened before the tracer came, and used no more."""
    a, b, target = pair(lab, "pool")
    held: list[socket.socket] = []

    def keep(connection: socket.socket) -> None:
        connection.recv(8)
        connection.sendall(b"ok")
        held.append(connection.dup())

    stack.enter_context(traffic.tcp_server(b, 5432, handle=keep))
    for _ in range(80):
        one = stack.enter_context(a.socket(socket.AF_INET, socket.SOCK_STREAM))
        one.connect((target, 5432))
        one.sendall(b"hi")
        one.recv(8)

    def let_go() -> None:
        for one in held:
            one.close()

    stack.callback(let_go)
    return Load("idle-established", (b,), lambda: None, "ESTABLISHED")


def full(lab: Lab, stack: ExitStack, stop: threading.Event) -> tuple[Load, Load]:
    """Many services of one namespace, none of them odd, fill it to the host's maximum. By itself it
    is too small; with a namespace beside it that has room, that comes first.

    One table for both: its entries are what costs most here.
    """
    a, b, target = pair(lab, "busy")
    roomy = lab.namespace("roomy", track=True)
    b.sysctl("net.netfilter.nf_conntrack_udp_timeout", 1)
    limit = int(b.sysctl("net.netfilter.nf_conntrack_max"))
    each = limit // SERVICES
    for service in range(SERVICES):
        ctnetlink.fill(
            b.path,
            each if service else limit - (SERVICES - 1) * each - ROOM,
            dport=9000 + service,
            timeout=6000,
            first=limit * service,
            state=3 + service % 2,
        )  # open ones, and such as are being closed
    stack.callback(lambda: ctnetlink.flush(b.path))
    stack.enter_context(traffic.udp_server(b, 9))

    def run(turn: int) -> None:
        first = 20000 + 2 * ROOM * turn % 40000
        traffic.udp_flows(a, (target, 9), 2 * ROOM, first_port=first)
        traffic.udp_flows(roomy, ("127.0.0.1", 9), 1, first_port=20000 + turn)
        if turn % 4 == 3:  # a walk collects what has ended
            b.run(["conntrack", "-L", "-p", "tcp", "--dport", "1"])

    return (
        Load("other-netns", (b, roomy), lambda: until_stopped(run, stop, 0.5), "is full"),
        Load("too-small", (b,), lambda: None, "too few", host=False),
    )


LOADS = (
    no_keepalive, one_way_udp, dns_storm, tunnel, loopback_probes, syn_flood, clash,
    idle_established,
)  # fmt: skip
NAMES = [*(make.__name__ for make in LOADS), "other_netns", "too_small"]


# -- watching ---------------------------------------------------------------------------------


class Shown:
    """A model that sees a load's namespaces, the host's own, and no other."""

    def __init__(self, source: LiveSource, load: Load) -> None:
        self.load = load
        self.model = Model(source.hooks, source.clock, source.started)
        here = [os.stat("/proc/self/ns/net").st_ino] if load.host else []
        self._inums = [*here, *(node.inum for node in load.nodes)]

    def update(self, batch: Batch) -> None:
        inums = self._inums
        self.model.update(
            replace(
                batch,
                events=batch.events[np.isin(batch.events["netns"], inums)],
                counts={inum: n for inum, n in batch.counts.items() if inum in inums},
                tables=tuple(table for table in batch.tables if table.netns in inums),
            )
        )

    @property
    def why(self) -> tuple[Cause, ...]:
        """What it says by now."""
        why: tuple[Cause, ...] = self.model.snapshot("service").why
        return why

    @property
    def named(self) -> bool:
        """Whether it says by now what it has to."""
        first = self.why[0]
        return first.id == self.load.cause and self.load.text in first.text


@pytest.fixture(scope="module")
def played() -> list[Shown]:
    """What each model had seen; all else is gone when the first test's turn ends."""
    stop = threading.Event()
    with lowered(), Lab() as lab, ExitStack() as stack:
        loads = [*(make(lab, stack, stop) for make in LOADS), *full(lab, stack, stop)]
        source = stack.enter_context(contextlib.closing(open_live(sample=True)))
        shown = [Shown(source, load) for load in loads]
        threads = [threading.Thread(target=load.run) for load in loads]
        try:
            for thread in threads:
                thread.start()
            start = time.monotonic()
            look = start + SECONDS
            for batch in source.batches(0.25):
                for one in shown:
                    one.update(batch)
                if time.monotonic() >= look:
                    if look > start + AT_MOST or all(one.named for one in shown):
                        break
                    look = time.monotonic() + AGAIN
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    return shown


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_a_real_load_is_named(number: int, played: list[Shown]) -> None:
    one = played[number]
    assert one.why[0].id == one.load.cause, one.why
    assert one.load.text in one.why[0].text
    assert one.why[0].evidence
