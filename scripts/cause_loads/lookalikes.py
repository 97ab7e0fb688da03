"""Loads that only look like a fault."""

from __future__ import annotations

import random
import socket
import threading
import time
from contextlib import suppress

from cause_loads.faults import scan_refused
from cause_loads.packets import ask, call, echo, finish, nft, opened, raw, segment, talk_on
from cause_loads.place import CLIENT, DGRAM, NEAR, RST, SERVER, SETTING, Case, Place
from cause_loads.rules import both_families

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
