"""Faults, each with real traffic."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

from cause_loads.packets import ask, call, datagram, echo, nft, opened, packet, raw, segment, silent
from cause_loads.place import CLIENT, DGRAM, NEAR, SERVER, Case, Place
from cause_loads.rules import (
    clash,
    invalid,
    long_chains,
    ports_used_up,
    rule_limit,
    stale_nat,
    stray_errors,
)

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
