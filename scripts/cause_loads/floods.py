"""Incidents that floods, scans and dead targets make, also in zones."""

from __future__ import annotations

import random
import socket
import struct
from contextlib import suppress

from cause_loads.faults import forged
from cause_loads.packets import ask, call, echo, opened, packet, segment, silent
from cause_loads.place import ACK, CLIENT, DGRAM, NEAR, SERVER, Place


def networks(p: Place) -> None:
    """10.200.0.0/16 lies behind the client, 198.18.0.0/16 behind the server."""
    p.host.run(["ip", "route", "add", "10.200.0.0/16", "via", CLIENT])
    p.host.run(["ip", "route", "add", "198.18.0.0/16", "via", SERVER])


def drawn(draw: random.Random, first: str) -> str:
    """An address below ``first``."""
    return f"{first}.{draw.randrange(256)}.{draw.randrange(1, 255)}"


def lone_acks(p: Place) -> None:
    """Forged packets of connections that never were, to a server that lets them go by."""
    silent(p.server, "tcp dport 443")
    forged(p, 9, lambda src, sport: segment(src, sport, SERVER, 443, ACK), SERVER)


def udp_scan(p: Place) -> None:
    """One host asks ever other UDP ports, and nothing answers."""
    silent(p.server, "udp dport 1-65535")
    p.repeat(p.client, 120, lambda n: ask(SERVER, 1 + n * 977 % 60000, wait=False))


def reset_each(p: Place) -> None:
    """Connections that their clients reset."""
    p.serve(p.server, 3389)

    def one(_: int) -> None:
        with socket.socket() as made:
            made.settimeout(3)
            made.connect((SERVER, 3389))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    p.repeat(p.client, 90, one)


def dead_targets(p: Place) -> None:
    """A collector on the host that asks sixty hosts of a rack again and again; the rack is off."""
    networks(p)
    silent(p.server, "ip daddr 198.18.0.0/16")

    def one(n: int) -> None:
        p.knock(f"198.18.0.{n % 60 + 1}", 9100)

    p.repeat(p.host, 60, one)


def zoned(p: Place, rules: str) -> None:
    """Rules that put packets into conntrack zones."""
    p.host.run(["nft", "-f", "-"], stdin="table ip zones { chain c { type filter hook prerouting "
               f"priority -300;\n {rules}\n }}\n}}\n")  # fmt: skip


def half_a_zone(p: Place) -> None:
    """A tenant's calls go into a zone; whoever wrote the rules forgot the answers."""
    zoned(p, "tcp dport 8000 ct zone set 7")
    p.serve(p.server, 8000)
    p.repeat(p.client, 90, lambda _: call(SERVER, 8000))


def tenants(p: Place) -> None:
    """Two tenants with a zone each, and the same services; one leaves nearly all half-closed."""
    sources = p.addresses(p.client, "to-h", 20, 40)
    last = "10.77.1.20-10.77.1.55 ct zone set 7\n ip {} 10.77.1.56-10.77.1.59 ct zone set 8"
    zoned(p, "\n ".join(f"ip {way} {last.format(way)}" for way in ("saddr", "daddr")))

    def handle(one: socket.socket) -> None:
        one.settimeout(5)
        one.recv(64)
        one.shutdown(socket.SHUT_WR)
        p.keep(one.dup())

    for port in (7001, 7101, 7201, 7301, 7401, 7501):
        p.serve(p.server, port, handle)
    ports = (7001, 7101, 7201, 7301, 7401, 7501)
    p.repeat(p.client, 70, lambda n: p.keep(opened(SERVER, ports[n % 6], sources[n % 36])))
    p.repeat(p.client, 5, lambda n: p.keep(opened(SERVER, ports[n % 6], sources[36 + n % 4])))


def ping_flood(p: Place) -> None:
    """Echo requests of forged sources."""
    silent(p.client, "ip daddr 10.200.0.0/16")
    forged(p, 8, lambda src, n: packet(src, NEAR, 1, echo(n), 2)[:20] + echo(n), NEAR)


def tftp(p: Place) -> None:
    """Machines that boot over TFTP, which a helper follows: the answer comes from another port."""
    helper = 'ct helper t {\n type "tftp" protocol udp;\n }'
    chain = 'type filter hook prerouting priority 0; udp dport 69 ct helper set "t"'
    p.host.run(
        ["nft", "-f", "-"], stdin=f"table ip help {{\n {helper}\n chain c {{ {chain}\n }}\n}}\n"
    )
    with p.server.enter():
        asked = p.keep(socket.socket(socket.AF_INET, DGRAM))
        asked.bind((SERVER, 69))
        asked.settimeout(1)

    def serve() -> None:
        while not p.stop.is_set():
            with suppress(OSError):
                who = asked.recvfrom(99)[1]
                with p.server.enter(), socket.socket(socket.AF_INET, DGRAM) as one:
                    one.bind((SERVER, 0))
                    one.sendto(b"\0\3\0\1data", who)

    def boot(_: int) -> None:
        with socket.socket(socket.AF_INET, DGRAM) as one:
            one.settimeout(1)
            one.bind((CLIENT, 0))
            one.sendto(b"\0\1file\0octet\0", (SERVER, 69))
            who = one.recvfrom(99)[1]
            one.sendto(b"\0\4\0\1", who)

    p.begin(serve)
    p.repeat(p.client, 60, boot)
