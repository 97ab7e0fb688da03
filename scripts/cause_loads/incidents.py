"""Loads shaped as incidents that people have published: what comes first, and stays so.

Each plays in the three namespaces of :mod:`cause_loads.place`. ``who`` is what has to stand first
for half a minute, ``causes`` what has to be named first.
"""

from __future__ import annotations

import random
import socket
import struct
from contextlib import suppress

from cause_loads.floods import (
    dead_targets,
    drawn,
    half_a_zone,
    lone_acks,
    networks,
    ping_flood,
    reset_each,
    tenants,
    tftp,
    udp_scan,
)
from cause_loads.packets import (
    ask,
    call,
    datagram,
    echo,
    nft,
    opened,
    packet,
    raw,
    segment,
    silent,
    talk_on,
)
from cause_loads.place import CLIENT, DGRAM, NEAR, SERVER, SETTING, Case, Place


def node_port(p: Place) -> None:
    """A service's port on a node, translated to a pod; callers connect for each request."""
    sources = p.addresses(p.client, "to-h", 20, 40)
    nft(p.host, "nat hook prerouting priority dstnat",
        f"ip daddr {NEAR} tcp dport 30443 dnat to {SERVER}:8443")  # fmt: skip
    p.serve(p.server, 8443)
    p.repeat(p.client, 90, lambda n: call(NEAR, 30443, source=sources[n % 40]))


def ldap(p: Place) -> None:
    """A name service that binds anew for each look-up, and never unbinds."""
    p.never_closed(p.server, 389)
    p.repeat(p.host, 60, lambda _: p.keep(opened(SERVER, 389)))
    p.repeat(p.client, 3, lambda _: ask(SERVER, 53))


def search_domains(p: Place) -> None:
    """Every name is looked up in five domains, as A and AAAA at once from one socket."""
    p.answer(p.server, 53)

    def one(_: int) -> None:
        with socket.socket(socket.AF_INET, DGRAM) as s:
            s.settimeout(1)
            s.connect((SERVER, 53))
            s.send(b"A")
            s.send(b"AAAA")
            s.recv(9)
            s.recv(9)

    p.repeat(p.host, 90, one)


def userland_proxy(p: Place) -> None:
    """A published port behind a proxy: each call is a connection to it, and one from it."""
    p.serve(p.server, 80)

    def handle(one: socket.socket) -> None:
        one.settimeout(5)
        data = one.recv(64)
        with p.host.enter(), socket.socket() as further:
            further.settimeout(5)
            further.connect((SERVER, 80))
            further.sendall(data)
            one.sendall(further.recv(64))

    p.serve(p.host, 8080, handle)
    p.repeat(p.client, 60, lambda _: call(NEAR, 8080))


def nfs(p: Place) -> None:
    """Clients that mount again and again, from ports below 1024, a server that was restarted."""
    sources = p.addresses(p.client, "to-h", 20, 30)
    silent(p.server, "tcp dport 2049")
    out = raw(p, p.client)

    def one(n: int) -> None:
        source = sources[n % 30]
        out.sendto(segment(source, 665 + n // 30 % 358, SERVER, 2049), (SERVER, 0))

    p.repeat(p.client, 120, one)


def torrent(p: Place) -> None:
    """One machine behind source NAT that talks to ever new peers; one in three answers."""
    networks(p)
    p.server.run(["ip", "route", "add", "local", "198.18.0.0/16", "dev", "lo"])
    nft(p.host, "nat hook postrouting priority srcnat", 'oifname "to-s" masquerade')
    draw, out = random.Random(1), raw(p, p.client)
    for port in range(7000, 7010):
        p.answer(p.server, port)

    def one(n: int) -> None:
        port = 7000 + n % 10 if n % 3 == 0 else draw.randrange(1024, 65000)
        to = drawn(draw, "198.18")
        out.sendto(datagram(CLIENT, 6881, to, port), (to, 0))

    p.repeat(p.client, 120, one)


def ping_monitor(p: Place) -> None:
    """A monitor that starts ping(8) anew for each of 40 hosts, which all answer."""
    for last in range(20, 60):
        p.server.run(["ip", "addr", "add", f"10.77.2.{last}/24", "dev", "to-h"])
    out = p.stack.enter_context(p.client.socket(socket.AF_INET, socket.SOCK_RAW, 1))
    p.repeat(p.client, 90, lambda n: out.sendto(echo(n), (f"10.77.2.{n % 40 + 20}", 0)))


def bfd(p: Place) -> None:
    """Liveness probes of a router, from a new port each, answered from another port."""
    p.answer(p.host, 3784, reply=False)
    out = raw(p, p.client)
    p.repeat(p.client, 90, lambda n: out.sendto(
        datagram(CLIENT, 49152 + n % 16000, NEAR, 3784), (NEAR, 0)))  # fmt: skip


def ipsec(p: Place) -> None:
    """ESP of many peers, one way."""
    networks(p)
    out = raw(p, p.client)

    def one(n: int) -> None:
        body = struct.pack("!II", 0x1000 + n, n) + bytes(12)
        source = f"10.200.{n >> 8 & 255}.{n & 255}"
        out.sendto(packet(source, NEAR, 50, body, 8), (NEAR, 0))

    p.repeat(p.client, 90, one)


def health_checks(p: Place) -> None:
    """A load balancer's checks: a handshake, and a reset as soon as it is answered."""
    p.serve(p.host, 8081)

    def one(_: int) -> None:
        with socket.socket() as s:
            s.settimeout(2)
            s.connect((NEAR, 8081))
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    p.repeat(p.client, 90, one)


def scanner_behind(p: Place) -> None:
    """A machine behind a gateway that tries five ports of a /16."""
    networks(p)
    silent(p.server, "ip daddr 198.18.0.0/16")
    nft(p.host, "nat hook postrouting priority srcnat", 'oifname "to-s" masquerade')
    draw, out = random.Random(2), raw(p, p.client)

    def one(n: int) -> None:
        to = drawn(draw, "198.18")
        out.sendto(segment(CLIENT, 40000 + n % 20000, to, (22, 23, 80, 443, 3389)[n % 5]), (to, 0))

    p.repeat(p.client, 150, one)


def sip(p: Place) -> None:
    """Telephones that register every few seconds with an exchange."""
    sources = p.addresses(p.client, "to-h", 20, 200)
    p.answer(p.server, 5060)
    p.repeat(p.client, 90, lambda n: ask(SERVER, 5060, source=sources[n % 200], sport=5060))


def migration(p: Place) -> None:
    """Clients whose address changes all the time: their streams begin anew each time."""
    p.host.run(["ip", "route", "add", "10.200.0.0/16", "via", CLIENT])
    p.client.run(["ip", "route", "add", "local", "10.200.0.0/16", "dev", "lo"])
    p.answer(p.server, 443)
    draw = random.Random(3)

    def one(_: int) -> None:
        with socket.socket(socket.AF_INET, DGRAM) as s:
            s.settimeout(1)
            s.bind((drawn(draw, "10.200"), 0))
            s.connect((SERVER, 443))
            for _ in range(3):
                s.send(b"q")
                s.recv(9)

    p.repeat(p.client, 60, one)


def failover(p: Place) -> None:
    """Open connections that come to a gateway which has not seen them begin; answers go past it."""
    p.host.sysctl(f"{SETTING}tcp_loose", 1)
    silent(p.server, "tcp dport 5432")
    out = raw(p, p.client)
    p.repeat(p.client, 90, lambda n: out.sendto(
        segment(CLIENT, 20000 + n % 40000, SERVER, 5432, 0x10), (SERVER, 0)))  # fmt: skip


def pool(p: Place) -> None:
    """Workers that lose connections of a pool: some are in use, the others are kept for nothing."""
    p.kept(p.server, 6379)

    def work() -> None:
        used: list[socket.socket] = []
        for n in p.ticks(80):
            with p.host.enter(), suppress(OSError):
                one = p.keep(opened(SERVER, 6379))
                if n % 8 == 0:
                    used.append(one)
            for one in used[n % 10 :: 10]:
                talk_on(one)

    p.begin(work)


def two_processes(p: Place) -> None:
    """Seven ports of one program, each called from everywhere; others are bystanders."""
    networks(p)
    for port in range(10000, 10007):
        p.answer(p.host, port, reply=False)
    draw, out = random.Random(4), raw(p, p.client)

    def one(n: int) -> None:
        source = drawn(draw, "10.200")
        out.sendto(datagram(source, draw.randrange(1024, 65000), NEAR, 10000 + n % 7), (NEAR, 0))

    p.repeat(p.client, 150, one)
    p.serve(p.host, 22)
    p.repeat(p.client, 5, lambda _: call(NEAR, 22))


def gateway_of_many(p: Place) -> None:
    """Forty machines behind a gateway, one of which holds nearly all with calls to one site."""
    sources = p.addresses(p.client, "to-h", 20, 40)
    nft(p.host, "nat hook postrouting priority srcnat", 'oifname "to-s" masquerade')
    for port in (443, 8443):
        p.serve(p.server, port)
    p.repeat(p.client, 90, lambda _: call(SERVER, 443, source=sources[7]))
    p.repeat(p.client, 8, lambda n: call(SERVER, 8443, source=sources[n % 40]))


def quiet_agents(p: Place) -> None:
    """Agents that connect again and again to a collector which refuses them after a while."""
    sources = p.addresses(p.client, "to-h", 20, 60)

    def handle(one: socket.socket) -> None:
        one.settimeout(5)
        one.recv(64)
        one.shutdown(socket.SHUT_WR)
        p.keep(one.dup())

    p.host.sysctl(f"{SETTING}tcp_timeout_close_wait", 3600)
    p.serve(p.host, 9997, handle)
    p.repeat(p.client, 70, lambda n: p.keep(opened(NEAR, 9997, sources[n % 60])))


def direct_return(p: Place) -> None:
    """A balancer whose servers answer the clients past it: it sees one direction."""
    p.lab.link(p.server, p.client)
    for node in (p.client, p.host, p.server):
        for device in node.run(["ls", "/proc/sys/net/ipv4/conf"]).split():
            node.sysctl(f"net.ipv4.conf.{device}.rp_filter", 0)
    p.server.run(["ip", "route", "replace", "10.77.1.0/24", "via", p.client.addresses["s"][0]])
    sources = p.addresses(p.client, "to-h", 20, 150)
    p.serve(p.server, 8080)
    p.repeat(p.client, 120, lambda n: call(SERVER, 8080, source=sources[n % 150]))


INCIDENTS = (
    Case("NodePort", node_port, ("no-keepalive", "time-wait"), "tcp/30443|tcp/8443",
         wrong="NOTRACK", who="tcp/30443|tcp/8443"),
    Case("LDAP without unbind", ldap, ("leak",), "tcp/389", who="tcp/389"),
    Case("search domains", search_domains, ("dns-storm",), "DNS look-ups", who="udp/53"),
    Case("userland proxy", userland_proxy, ("no-keepalive", "time-wait")),
    Case("NFS remounts", nfs, ("syn-flood", "unanswered"), "tcp/2049.* from 30 sources",
         who="tcp/2049"),
    Case("BitTorrent", torrent, ("unknown", "scan", "one-way-udp", "answered-udp"), "",
         who=CLIENT),
    Case("monitoring by ping", ping_monitor, ("pings",), "icmp", who="icmp"),
    Case("BFD", bfd, ("one-way-udp",), "udp/3784", who="udp/3784"),
    Case("IPsec", ipsec, ("tunnel",), "ESP", who="esp"),
    Case("health checks", health_checks, ("no-keepalive", "time-wait", "lasting-state"),
         "tcp/8081", who="tcp/8081"),
    Case("scanner behind a gateway", scanner_behind, ("scan",), CLIENT, who=CLIENT),
    Case("SIP registrations", sip, ("answered-udp", "udp-streams"), "udp/5060", who="udp/5060"),
    Case("QUIC migration", migration, ("answered-udp", "udp-streams"), "udp/443",
         who="udp/443", wrong="flood"),
    Case("failover", failover, ("one-way-tcp",), "tcp/5432", who="tcp/5432", wrong="SYN"),
    Case("pool that leaks", pool, ("leak",), "tcp/6379", who="tcp/6379"),
    Case("seven ports", two_processes, ("udp-flood",), "udp/10000-10006|python",
         who="udp/10000-10006|python"),
    Case("one behind the gateway", gateway_of_many, ("no-keepalive", "time-wait"),
         "tcp/443 from 10.77.1.27", who="10.77.1.27"),
    Case("half-closed agents", quiet_agents, ("half-closed",), "tcp/9997", who="tcp/9997"),
    Case("direct server return", direct_return, ("one-way-tcp",), "tcp/8080", who="tcp/8080",
         wrong="flood|SYN proxy", beside=("invalid",)),
    Case("ACK flood", lone_acks, ("ack-flood",), "tcp/443", who="tcp/443"),
    Case("scan of UDP ports", udp_scan, ("scan",), CLIENT, who=CLIENT),
    Case("dead targets", dead_targets, ("unanswered",), "tcp/9100.*nobody answers",
         who="tcp/9100", wrong="scan"),
    Case("half a zone", half_a_zone, ("one-way-tcp", "half-closed"), "", wrong="scan|flood",
         beside=("invalid",)),
    Case("tenants by zone", tenants, ("half-closed",), "CLOSE_WAIT", who="zone 7"),
    Case("ping flood", ping_flood, ("pings",), "ping flood", who="icmp", wrong="ping less often"),
    Case("TFTP", tftp, ("one-way-udp", "answered-udp"), "", beside=("one-way-udp",),
         wrong="fixed source port"),
    Case("reset each time", reset_each, ("no-keepalive", "time-wait"), "were reset",
         who="tcp/3389", wrong="waiting out TIME_WAIT"),
)  # fmt: skip
