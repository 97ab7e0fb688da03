"""Faults and loads that only look like them, each with real traffic in three namespaces.

A client, a host that tracks, and a server behind it:
10.77.1.1 -- 10.77.1.2, 10.77.2.1 -- 10.77.2.2.
What is looked at is the host in the middle.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from kit.nfqueue import Queue
from kit.traffic import tcp_server, udp_server

from ctrace.errors import CtraceError
from ctrace.host import ctnetlink
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


# -- packets and connections -------------------------------------------------------------------


def _sum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data + b"\0" * (len(data) % 2)))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def packet(src: str, dst: str, proto: int, body: bytes, at: int) -> bytes:
    """An IPv4 packet; the checksum of its body goes to ``at``."""
    ends = socket.inet_aton(src) + socket.inet_aton(dst)
    check = _sum(ends + struct.pack("!HH", proto, len(body)) + body + b"\0" * (len(body) % 2))
    body = body[:at] + struct.pack("!H", check) + body[at + 2 :]
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, proto, 0) + ends + body


def segment(src: str, sport: int, dst: str, dport: int, flags: int = SYN) -> bytes:
    """A TCP segment without data."""
    number = 9 if flags & ACK else 0
    head = struct.pack("!HHIIBBHHH", sport, dport, 7, number, 0x50, flags, 999, 0, 0)
    return packet(src, dst, TCP, head, 16)


def datagram(src: str, sport: int, dst: str, dport: int) -> bytes:
    """One byte of UDP."""
    return packet(src, dst, UDP, struct.pack("!HHHH", sport, dport, 9, 0) + b"x", 6)


def call(dst: str, port: int, *, source: str = "", sport: int = 0, stay: float = 0.0) -> None:
    """A connection that asks, reads the answer and closes."""
    with socket.socket(socket.AF_INET6 if ":" in dst else socket.AF_INET) as one:
        one.settimeout(5)
        if source or sport:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((source, sport))
        one.connect((dst, port))
        one.sendall(b"q\n")
        one.recv(64)
        if stay:
            time.sleep(stay)


def opened(dst: str, port: int, source: str = "") -> socket.socket:
    """A connection that was used once and stays."""
    one = socket.socket()
    one.settimeout(10)
    if source:
        one.bind((source, 0))
    one.connect((dst, port))
    one.sendall(b"q\n")
    return one


def talk_on(one: socket.socket) -> None:
    """Use an open connection once more: take the last answer and send the next question."""
    with suppress(OSError):
        one.recv(8)
        one.sendall(b"q")


def finish(one: socket.socket) -> None:
    """Close it with everything read: what is unread would reset it."""
    with suppress(OSError):
        one.setblocking(False)
        one.recv(1 << 16)
    one.close()


def ask(dst: str, port: int, *, source: str = "", sport: int = 0, wait: bool = True) -> None:
    """A datagram from a new socket, and its answer."""
    with socket.socket(socket.AF_INET6 if ":" in dst else socket.AF_INET, DGRAM) as one:
        one.settimeout(1)
        one.bind((source, sport))
        one.connect((dst, port))
        one.send(b"q")
        if wait:
            one.recv(64)


def echo(number: int, six: bool = False) -> bytes:
    """An echo request with this id."""
    body = struct.pack("!BBHHH", 128 if six else 8, 0, 0, number & 0xFFFF, 1)
    return body[:2] + struct.pack("!H", _sum(body)) + body[4:]


def raw(p: Place, node: Node) -> socket.socket:
    """A socket that sends whole packets."""
    return p.stack.enter_context(node.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW))


def silent(node: Node, match: str) -> None:
    """Packets of a kind are dropped before anything answers them."""
    node.run(["nft", "-f", "-"], stdin="table inet silent { chain p { type filter hook prerouting "
             f"priority -400; {match} drop\n }}\n}}\n")  # fmt: skip


def nft(node: Node, hook: str, rules: str) -> None:
    """One chain of rules more."""
    text = f"table ip more {{ chain c {{ type {hook};\n {rules}\n }}\n}}\n"
    node.run(["nft", "-f", "-"], stdin=text)


# -- faults --------------------------------------------------------------------------------------


def time_wait(p: Place) -> None:
    """A service of the host that closes after each answer, called from twelve addresses."""

    def handle(one: socket.socket) -> None:
        one.settimeout(5)
        one.recv(64)
        one.sendall(b"ok")

    sources = p.addresses(p.client, "to-h", 20, 12)
    p.serve(p.host, 9443, handle)
    p.repeat(p.client, 90, lambda n: call(NEAR, 9443, source=sources[n % 12]))


def upstream(p: Place) -> None:
    """A proxy on the host that opens a connection for each request, by IPv6."""
    p.serve(p.server, 8000)
    p.repeat(p.host, 90, lambda _: call("fd77:2::2", 8000))


def loopback(p: Place) -> None:
    """Probes that never leave the host."""
    p.serve(p.host, 10256)
    p.repeat(p.host, 90, lambda _: call("::1", 10256))


def geneve(p: Place) -> None:
    """The outer packets of a Geneve overlay: a source port for each inner flow."""
    p.answer(p.host, 6081, reply=False)
    p.repeat(p.client, 90, lambda n: ask(NEAR, 6081, sport=20000 + n, wait=False))


def gre(p: Place) -> None:
    """GRE from many ends, one way."""
    p.host.run(["ip", "route", "add", "10.201.0.0/16", "via", CLIENT])
    out = raw(p, p.client)

    def one(n: int) -> None:
        body = struct.pack("!HH", 0, 0x0800) + b"inner"
        out.sendto(
            packet(f"10.201.{n >> 8 & 255}.{n & 255}", NEAR, 47, body + b"\0\0\0\0\0\0\0", 8),
            (NEAR, 0),
        )

    p.repeat(p.client, 90, one)


def forged(p: Place, seed: int, make: Callable[[str, int], bytes], to: str) -> None:
    """Packets of ever new sources behind the client, 150 a second."""
    p.host.run(["ip", "route", "add", "10.200.0.0/16", "via", CLIENT])
    out, draw = raw(p, p.client), random.Random(seed)

    def one(_: int) -> None:
        src = f"10.200.{draw.randrange(256)}.{draw.randrange(1, 255)}"
        out.sendto(make(src, draw.randrange(1024, 65000)), (to, 0))

    p.repeat(p.client, 150, one)


def syn_flood(p: Place) -> None:
    """SYNs of forged sources through the host to a server that lets them go by."""
    silent(p.server, "tcp dport 6443")
    forged(p, 3, lambda src, sport: segment(src, sport, SERVER, 6443), SERVER)


def syn_flood_answered(p: Place) -> None:
    """The same to a port of the host that listens, and answers each."""
    silent(p.client, "ip daddr 10.200.0.0/16")
    p.serve(p.host, 25)
    forged(p, 4, lambda src, sport: segment(src, sport, NEAR, 25), NEAR)


def half_closed(p: Place) -> None:
    """A server that closes; its callers never do."""

    def handle(one: socket.socket) -> None:
        one.settimeout(5)
        one.recv(64)
        one.shutdown(socket.SHUT_WR)
        p.keep(one.dup())

    p.serve(p.server, 8443, handle)
    p.repeat(p.client, 70, lambda _: p.keep(opened(SERVER, 8443)))


def dead_peers(p: Place) -> None:
    """Open connections through the host; then the clients' machine is gone."""
    p.kept(p.server, 3306)
    done = threading.Event()

    def work() -> None:
        with p.client.enter():
            for _ in range(600):
                one = opened(SERVER, 3306)
                one.recv(8)
                p.keep(one)
        p.client.run(["ip", "link", "set", "to-h", "down"])
        done.set()

    p.begin(work)
    assert done.wait(60)


def scan_ports(p: Place) -> None:
    """One source tries every port of a server, which says nothing."""
    silent(p.server, "tcp flags syn")
    out = raw(p, p.client)
    p.repeat(
        p.client, 150, lambda n: out.sendto(segment(CLIENT, 44444, SERVER, 1 + n), (SERVER, 0))
    )


def scan_refused(p: Place) -> None:
    """The same, and the server refuses each."""
    out = raw(p, p.client)
    p.repeat(
        p.client, 150, lambda n: out.sendto(segment(CLIENT, 44444, SERVER, 1 + n), (SERVER, 0))
    )


def scan_hosts(p: Place) -> None:
    """The host itself tries one port of a network; nobody is there."""
    p.host.run(["ip", "route", "add", "198.18.0.0/16", "via", SERVER])
    silent(p.server, "ip daddr 198.18.0.0/16")

    def one(n: int) -> None:
        p.knock(f"198.18.{n >> 8 & 255}.{n & 255}", 22)

    p.repeat(p.host, 120, one)


def udp_flood(p: Place) -> None:
    """Datagrams of forged sources that nobody answers."""
    silent(p.server, "udp dport 27015")
    forged(p, 5, lambda src, sport: datagram(src, sport, SERVER, 27015), SERVER)


def answered_behind_dnat(p: Place) -> None:
    """Authentication requests to a translated address."""
    nft(
        p.host,
        "nat hook prerouting priority dstnat",
        f"ip daddr 192.0.2.9 udp dport 1812 dnat to {SERVER}",
    )
    p.answer(p.server, 1812)
    p.repeat(p.client, 90, lambda n: ask("192.0.2.9", 1812, sport=20000 + n))


def lookups(p: Place) -> None:
    """Programs of the host ask a resolver elsewhere, a port each."""
    p.answer(p.server, 53)
    p.repeat(p.host, 90, lambda n: ask(SERVER, 53, sport=20000 + n))


def metrics(p: Place) -> None:
    """A program sends each of its figures from a new port, by IPv6."""
    p.answer(p.server, 8125, reply=False)
    p.repeat(p.host, 90, lambda n: ask("fd77:2::2", 8125, sport=20000 + n, wait=False))


def quic(p: Place) -> None:
    """Streams of both ways that go on, from 40 addresses."""
    p.answer(p.server, 443)
    sources = p.addresses(p.client, "to-h", 20, 40)

    def work() -> None:
        with p.client.enter():
            socks = []
            for n in range(600):
                one = p.keep(socket.socket(socket.AF_INET, DGRAM))
                one.bind((sources[n % 40], 0))
                one.connect((SERVER, 443))
                socks.append(one)
        for n in p.ticks(300):
            with suppress(OSError):
                socks[n % 600].send(b"q")

    p.begin(work)


def ping_dead(p: Place, six: bool = False) -> None:
    """A monitor's pings, a new id each, to neighbours that are not there."""
    family, proto = (socket.AF_INET6, 58) if six else (socket.AF_INET, 1)
    out = p.stack.enter_context(p.host.socket(family, socket.SOCK_RAW, proto))

    def one(n: int) -> None:
        out.sendto(
            echo(n, six), (f"fd77:2::{n % 200 + 16:x}" if six else f"10.77.2.{n % 200 + 20}", 0)
        )

    p.repeat(p.host, 120, one)


def ports_used_up(p: Place) -> None:
    """Twenty ports of the translated address, and sixty connections that want one."""
    nft(p.host, "nat hook postrouting priority srcnat",
        f"ip protocol tcp oifname \"to-s\" snat to {OUT}:20000-20019")  # fmt: skip
    p.kept(p.server, 5672)

    def one(_: int) -> None:
        s = p.keep(socket.socket())
        s.settimeout(0.2)
        s.connect((SERVER, 5672))
        s.sendall(b"q")

    p.repeat(p.client, 12, one)


def clash(p: Place) -> None:
    """Two packets of each new flow meet in a queue: the second finds its place taken."""
    silent(p.server, "tcp dport 53")
    p.host.run(["iptables", "-A", "OUTPUT", "-p", "tcp", "--dport", "53", "-j", "NFQUEUE",
                "--queue-num", "7"])  # fmt: skip
    queue = p.stack.enter_context(Queue(p.host, 7))
    queue.socket.settimeout(2)
    out = raw(p, p.host)

    def one(n: int) -> None:
        for _ in range(2):
            out.sendto(segment(OUT, 20000 + n, SERVER, 53), (SERVER, 0))
        queue.accept(queue.wait(2))

    p.repeat(p.host, 20, one)


def both_families(p: Place) -> None:
    """A and AAAA at once from one socket: since Linux 5.7 the kernel lets both pass
    (clash_resolve)."""
    p.answer(p.server, 53)
    p.host.run(["iptables", "-A", "OUTPUT", "-p", "udp", "--dport", "53", "-j", "NFQUEUE",
                "--queue-num", "7"])  # fmt: skip
    queue = p.stack.enter_context(Queue(p.host, 7))
    queue.socket.settimeout(2)

    def one(_: int) -> None:
        with socket.socket(socket.AF_INET, DGRAM) as s:
            s.settimeout(1)
            s.connect((SERVER, 53))
            s.send(b"A")
            s.send(b"AAAA")
            queue.accept(queue.wait(2))
            s.recv(9)
            s.recv(9)

    p.repeat(p.host, 20, one)


def long_chains(p: Place) -> None:
    """The smallest hash table, filled until chains are too long; then new flows."""
    setting = Path("/proc/sys/net/netfilter/nf_conntrack_buckets")
    before = setting.read_text()
    p.stack.callback(setting.write_text, before)
    setting.write_text("512")
    with suppress(CtraceError):
        for first in range(0, 20_000, 500):
            ctnetlink.fill(p.host.path, 500, first=first)
    p.answer(p.server, 9999, reply=False)
    p.repeat(p.host, 60, lambda n: ask(SERVER, 9999, sport=20000 + n, wait=False))


def stale_nat(p: Place) -> None:
    """Talks through a translation whose rule then names another backend."""
    p.server.run(["ip", "addr", "add", "10.77.2.3/24", "dev", "to-h"])
    for address in (SERVER, "10.77.2.3"):
        p.answer(p.server, 5060, address=address)
    rule = "ip daddr 192.0.2.7 udp dport 5060 dnat to {}"
    nft(p.host, "nat hook prerouting priority dstnat", rule.format("10.77.2.3"))
    begun = threading.Event()

    def work() -> None:
        with p.client.enter():
            socks = [p.keep(socket.socket(socket.AF_INET, DGRAM)) for _ in range(560)]
            for one in socks:
                one.connect(("192.0.2.7", 5060))
                one.send(b"q")
        p.host.run(["nft", "flush table ip more"])
        nft(p.host, "nat hook prerouting priority dstnat", rule.format(SERVER))
        begun.set()
        for n in p.ticks(100):
            with suppress(OSError):
                socks[n % len(socks)].send(b"q")

    p.begin(work)
    assert begun.wait(60)


def invalid(p: Place) -> None:
    """Answers to calls that nobody made, which a rule drops."""
    nft(p.host, "filter hook forward priority 0", "ct state invalid counter drop")
    out = raw(p, p.client)
    p.repeat(
        p.client,
        100,
        lambda n: out.sendto(segment(CLIENT, 80, SERVER, 1024 + n, SYN_ACK), (SERVER, 0)),
    )


def stray_errors(p: Place) -> None:
    """ICMP errors about flows that nobody has, which a rule drops."""
    nft(p.host, "filter hook forward priority 0", "ct state invalid counter drop")
    out = raw(p, p.client)

    def one(n: int) -> None:
        body = struct.pack("!BBHI", 3, 3, 0, 0) + datagram(SERVER, 1024 + n, "203.0.113.9", 53)[:28]
        body = body[:2] + struct.pack("!H", _sum(body)) + body[4:]
        out.sendto(packet(CLIENT, SERVER, 1, body, 2)[:20] + body, (SERVER, 0))

    p.repeat(p.client, 100, one)


def rule_limit(p: Place) -> None:
    """A rule lets each source have eight connections."""
    p.kept(p.server, 8080)
    nft(p.host, "filter hook forward priority 0",
        "tcp dport 8080 ct state new ct count over 8 counter reject with tcp reset")  # fmt: skip

    def one(_: int) -> None:
        p.keep(opened(SERVER, 8080))

    p.repeat(p.client, 10, one)


def leak(p: Place) -> None:
    """A program opens a connection for each job, and closes none."""
    p.never_closed(p.server, 9092)
    p.repeat(p.host, 70, lambda _: p.keep(opened(SERVER, 9092)))


def unanswered(p: Place) -> None:
    """A program asks on for a database that is gone."""
    silent(p.server, "tcp dport 5432")

    def one(_: int) -> None:
        p.knock(SERVER, 5432)

    p.repeat(p.host, 90, one)


# -- look-alikes ---------------------------------------------------------------------------------


def keep_alive(p: Place) -> None:
    """A pool of connections in use."""
    p.kept(p.server, 8080)

    def work() -> None:
        with p.client.enter():
            pool = [p.keep(opened(SERVER, 8080)) for _ in range(120)]
        for n in p.ticks(120):
            talk_on(pool[n % 120])

    p.begin(work)


def growing_pool(p: Place) -> None:
    """A pool that opens while it is looked at, and is in use."""
    p.kept(p.server, 5432)

    def work() -> None:
        pool: list[socket.socket] = []
        for n in p.ticks(100):
            if len(pool) < 300 and n % 2:
                with p.host.enter(), suppress(OSError):
                    pool.append(p.keep(opened(SERVER, 5432)))
            for one in pool[n % 40 :: 40]:
                talk_on(one)

    p.begin(work)


def load_test(p: Place) -> None:
    """A hundred and fifty connections at once, in use for five seconds, then closed."""
    p.kept(p.host, 8080)

    def work() -> None:
        with p.client.enter():
            pool = [p.keep(opened(NEAR, 8080)) for _ in range(150)]
        end = time.monotonic() + 5
        for n in p.ticks(200):
            if time.monotonic() > end:
                break
            talk_on(pool[n % 150])
        for one in pool:
            finish(one)

    p.begin(work)


def crawler(p: Place) -> None:
    """A program that reads long pages from many servers."""
    p.server.run(["ip", "route", "add", "local", "198.18.0.0/24", "dev", "lo"])
    p.host.run(["ip", "route", "add", "198.18.0.0/24", "via", SERVER])
    p.kept(p.server, 443)

    def work() -> None:
        held: list[socket.socket] = []
        for n in p.ticks(60):
            if n % 4 == 0:
                with p.host.enter(), suppress(OSError):
                    held.append(p.keep(opened(f"198.18.0.{n // 4 % 250 + 1}", 443)))
            for one in held[n % 30 :: 30]:
                talk_on(one)
            if len(held) > 300:
                finish(held.pop(0))

    p.begin(work)


def resolver(p: Place) -> None:
    """The host answers look-ups of 60 clients."""
    sources = p.addresses(p.client, "to-h", 20, 60)
    p.answer(p.host, 53)
    p.repeat(p.client, 90, lambda n: ask(NEAR, 53, source=sources[n % 60]))


def backup(p: Place) -> None:
    """A few streams that carry much."""
    p.kept(p.server, 873)

    def work() -> None:
        with p.host.enter():
            four = [p.keep(opened(SERVER, 873)) for _ in range(4)]
        for n in p.ticks(100):
            with suppress(OSError):
                four[n % 4].sendall(b"q" * 500)
                four[n % 4].recv(4096)

    p.begin(work)


def answered_pings(p: Place) -> None:
    """A monitor that pings thirty addresses once a second, with one id each."""
    for last in range(20, 50):
        p.server.run(["ip", "addr", "add", f"10.77.2.{last}/24", "dev", "to-h"])
    out = p.stack.enter_context(p.host.socket(socket.AF_INET, socket.SOCK_RAW, 1))
    p.repeat(p.host, 30, lambda n: out.sendto(echo(n % 30 + 1), (f"10.77.2.{n % 30 + 20}", 0)))


def port_reuse(p: Place) -> None:
    """Calls from fifty ports in turn: each entry is taken up again."""
    p.serve(p.host, 8063)
    p.repeat(p.client, 50, lambda n: call(NEAR, 8063, source=CLIENT, sport=30000 + n % 50))


def falling(p: Place) -> None:
    """A table that empties: what was there goes, nothing comes."""
    p.host.sysctl(f"{SETTING}udp_timeout", 8)
    p.answer(p.server, 9999, reply=False)
    with p.client.enter():
        for n in range(600):
            ask(SERVER, 9999, sport=20000 + n, wait=False)


def popular(p: Place) -> None:
    """A site with 200 clients; each has a connection for some seconds."""
    sources = p.addresses(p.client, "to-h", 20, 200)
    p.kept(p.host, 443)

    def work() -> None:
        held: list[socket.socket] = []
        for n in p.ticks(60):
            with p.client.enter(), suppress(OSError):
                held.append(p.keep(opened(NEAR, 443, sources[n % 200])))
            for one in held[n % 20 :: 20]:
                talk_on(one)
            if len(held) > 200:
                finish(held.pop(0))

    p.begin(work)


def agents(p: Place) -> None:
    """A hundred and fifty agents that send on from where they are, and want no answer."""
    sources = p.addresses(p.client, "to-h", 20, 150)
    p.answer(p.host, 8125, reply=False)

    def work() -> None:
        with p.client.enter():
            socks = []
            for one in sources:
                socks.append(p.keep(socket.socket(socket.AF_INET, DGRAM)))
                socks[-1].bind((one, 9000))
                socks[-1].connect((NEAR, 8125))
        for n in p.ticks(100):
            with suppress(OSError):
                socks[n % 150].send(b"x")

    p.begin(work)


def websockets(p: Place) -> None:
    """Connections opened long ago, each with a ping now and then."""
    p.kept(p.server, 8443)
    ready = threading.Event()

    def work() -> None:
        with p.client.enter():
            pool = [p.keep(opened(SERVER, 8443)) for _ in range(250)]
        ready.set()
        for n in p.ticks(100):
            talk_on(pool[n % 250])

    p.begin(work)
    assert ready.wait(60)


def refused(p: Place) -> None:
    """Calls to a port that nobody serves: over at once."""

    def one(_: int) -> None:
        with socket.socket() as s:
            s.settimeout(1)
            s.connect((NEAR, 7777))

    p.repeat(p.client, 60, one)


def many_services(p: Place) -> None:
    """One client of eighty services, all of which answer."""
    for port in range(7000, 7080):
        p.kept(p.server, port)

    def work() -> None:
        held: list[socket.socket] = []
        for n in p.ticks(60):
            with p.client.enter(), suppress(OSError):
                held.append(p.keep(opened(SERVER, 7000 + n % 80)))
            for one in held[n % 20 :: 20]:
                talk_on(one)
            if len(held) > 300:
                finish(held.pop(0))

    p.begin(work)


def few_invalid(p: Place) -> None:
    """Late resets beside honest calls, and a rule that drops them."""
    nft(p.host, "filter hook forward priority 0", "ct state invalid counter drop")
    out = raw(p, p.client)

    def one(n: int) -> None:
        out.sendto(segment(CLIENT, 80, SERVER, 1024 + n, RST), (SERVER, 0))

    p.repeat(p.client, 2, one)
    keep_alive(p)


def masquerade(p: Place) -> None:
    """Source NAT with all its ports, and few of them used."""
    nft(p.host, "nat hook postrouting priority srcnat", 'oifname "to-s" masquerade')
    keep_alive(p)


def reloaded(p: Place) -> None:
    """A translation whose rules are written anew, to the same backend."""
    p.answer(p.server, 5060)
    rule = f"ip daddr 192.0.2.7 udp dport 5060 dnat to {SERVER}"
    nft(p.host, "nat hook prerouting priority dstnat", rule)

    def work() -> None:
        with p.client.enter():
            socks = [p.keep(socket.socket(socket.AF_INET, DGRAM)) for _ in range(100)]
            for one in socks:
                one.connect(("192.0.2.7", 5060))
        for n in p.ticks(100):
            with suppress(OSError):
                socks[n % len(socks)].send(b"q")
            if n == 300:
                p.host.run(["nft", "flush table ip more"])
                nft(p.host, "nat hook prerouting priority dstnat", rule)

    p.begin(work)


def room_in_the_limit(p: Place) -> None:
    """A rule's limit that nobody reaches."""
    nft(p.host, "filter hook forward priority 0",
        "tcp dport 8080 ct state new ct count over 500 counter reject with tcp reset")  # fmt: skip
    keep_alive(p)


def voice(p: Place) -> None:
    """Calls of 80 telephones: datagrams of both ways all the time."""
    sources = p.addresses(p.client, "to-h", 20, 80)
    p.answer(p.host, 16384)

    def work() -> None:
        with p.client.enter():
            socks = []
            for one in sources:
                socks.append(p.keep(socket.socket(socket.AF_INET, DGRAM)))
                socks[-1].bind((one, 4000))
                socks[-1].connect((NEAR, 16384))
        for n in p.ticks(200):
            with suppress(OSError):
                socks[n % 80].send(b"x")

    p.begin(work)


def clocks(p: Place) -> None:
    """A time server that answers everybody, once each."""
    p.host.run(["ip", "route", "add", "10.200.0.0/16", "via", CLIENT])
    p.client.run(["ip", "route", "add", "local", "10.200.0.0/16", "dev", "lo"])
    p.answer(p.host, 123)
    draw = random.Random(6)

    def one(_: int) -> None:
        ask(NEAR, 123, source=f"10.200.{draw.randrange(256)}.{draw.randrange(1, 255)}")

    p.repeat(p.client, 90, one)


FAULTS = (
    Case("TIME_WAIT", time_wait, ("no-keepalive", "time-wait"), "tcp/9443"),
    Case("a call each, IPv6", upstream, ("no-keepalive", "time-wait"), "tcp/8000"),
    Case("loopback churn", loopback, ("loopback-probes",), "tcp/10256"),
    Case("Geneve", geneve, ("tunnel",), "Geneve"),
    Case("GRE", gre, ("tunnel",), "GRE"),
    Case("SYN flood", syn_flood, ("syn-flood",), "tcp/6443"),
    Case("SYN flood, answered", syn_flood_answered, ("syn-flood",), "tcp/25"),
    Case("half-closed", half_closed, ("half-closed",), "CLOSE_WAIT", wrong="timeout_established"),
    Case("dead peers", dead_peers, ("idle-established",), "tcp/3306"),
    Case("scan of ports", scan_ports, ("scan",), CLIENT),
    Case("scan of hosts by the host", scan_hosts, ("scan",), "10.77.2.1"),
    Case("UDP flood", udp_flood, ("udp-flood",), "udp/27015"),
    Case(
        "answered UDP behind DNAT",
        answered_behind_dnat,
        ("answered-udp",),
        "udp/1812",
        wrong="NOTRACK",
    ),
    Case("DNS look-ups", lookups, ("dns-storm",), "DNS look-ups"),
    Case("UDP metrics, IPv6", metrics, ("one-way-udp",), "udp/8125"),
    Case("QUIC", quic, ("udp-streams",), "udp/443"),
    Case("pings of the dead", ping_dead, ("pings",), "icmp"),
    Case("pings of the dead, IPv6", lambda p: ping_dead(p, six=True), ("pings",), "icmpv6"),
    Case(
        "source ports used up",
        ports_used_up,
        ("source-ports",),
        f"{SERVER}:5672",
        beside=("leak", "syn-flood", "unanswered"),
        wrong="lost a race",
    ),
    Case(
        "racing packets", clash, ("clash",), "lost a race", beside=("unanswered", "lasting-state")
    ),
    Case(
        "stale NAT", stale_nat, ("stale-nat",), "10.77.2.3", beside=("udp-streams", "answered-udp")
    ),
    Case("INVALID", invalid, ("invalid",), "rule dropped"),
    Case(
        "INVALID, ICMP", stray_errors, ("invalid",), "rule dropped.*ICMP errors|ICMP errors.*rule"
    ),
    Case("a rule's limit", rule_limit, ("rule-limit",), "limit of 8"),
    Case(
        "chains too long",
        long_chains,
        ("chains-too-long",),
        "512 buckets",
        beside=("idle-established", "leak", "one-way-udp"),
        wrong="lost a race",
        machine=True,
    ),
    Case("leak", leak, ("leak",), "tcp/9092"),
    Case("unanswered", unanswered, ("unanswered",), "tcp/5432"),
)
LOOKALIKES = (
    Case("keep-alive", keep_alive),
    Case("pool that opens", growing_pool),
    Case("load test that ends", load_test, beside=("no-keepalive", "time-wait")),
    Case("crawler", crawler, beside=()),
    Case("A and AAAA at once", both_families, beside=("dns-storm",), wrong="lost a race|racing"),
    Case("resolver that answers", resolver, beside=("dns-storm",), wrong="caching resolver|flood"),
    Case("backup", backup),
    Case("answered pings", answered_pings),
    Case("ports used again", port_reuse, wrong="stay 120 s", beside=("no-keepalive",)),
    Case("table that empties", falling, beside=("one-way-udp",)),
    Case("popular site", popular, beside=("no-keepalive", "time-wait")),
    Case("agents", agents, beside=("one-way-udp",)),
    Case("websockets", websockets),
    Case("refused", refused),
    Case("scan that is refused", scan_refused, beside=("scan",)),
    Case("many services", many_services),
    Case("few INVALID", few_invalid),
    Case("masquerade", masquerade),
    Case("rules written anew", reloaded, beside=("udp-streams",)),
    Case("limit with room", room_in_the_limit),
    Case("voice", voice, beside=("udp-streams",)),
    Case("time server", clocks, beside=("answered-udp",)),
)
