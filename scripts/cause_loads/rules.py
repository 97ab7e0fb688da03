"""Faults of rules, translations, source ports and chains of the hash."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path

from kit.nfqueue import Queue

from cause_loads.packets import _sum, ask, datagram, nft, opened, packet, raw, segment, silent
from cause_loads.place import CLIENT, DGRAM, OUT, SERVER, SYN_ACK, Place
from ctrace.errors import CtraceError
from ctrace.host import ctnetlink


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
