"""The self-test's traffic: flows whose sender knows every field that a record must have."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Final, Optional

from ctrace.errors import CtraceError
from ctrace.lab import Node
from ctrace.record import Direction, Status, boot_ns, proto_name

PORT: Final = 2048
"""One destination port for all flows, so that a filter keeps the host's own traffic out.
ICMP's echo request (type 8, code 0) reads as this port too."""
NAT_PORT: Final = 45678
MARK: Final = 0x5E1F
ZONE: Final = 9
EXPIRES: Final = 1
"""Seconds; the timeout of the flow that is left to expire."""
PATIENCE: Final = 5.0


@dataclass
class Flow:
    """A flow as its sender knows it, and what its entry must look like."""

    name: str
    proto: int
    src: str
    sport: int
    dst: str
    dport: int = PORT
    netns: int = 0
    direction: Direction = Direction.OUT
    reply_dst: str = ""
    reply_dport: int = 0
    nat: int = 0
    zone: int = 0
    timeout: str = ""
    """The setting (seconds) that holds its entry while it is idle."""
    idle_since: tuple[int, int] = (0, 0)
    """Boot clock, ns, between which the last packet went."""
    made: tuple[int, int] = (0, 0)

    def tuple_(self) -> dict[str, Any]:
        """The tuple fields of its records."""
        icmp = self.proto == socket.IPPROTO_ICMP
        return {
            "src": self.src,
            "dst": self.dst,
            "sport": self.sport,
            "dport": self.dport,
            "reply_src": self.dst,
            "reply_dst": self.reply_dst or self.src,
            "reply_sport": self.sport if icmp else self.dport,
            "reply_dport": 0 if icmp else self.reply_dport or self.sport,
            "proto": self.proto,
            "family": socket.AF_INET6 if ":" in self.src else socket.AF_INET,
            "netns": self.netns,
            "zone": self.zone,
        }


def mark_and_translate(client: Node) -> bool:
    """NAT and a mark for one flow, a zone for another; whether zones exist here."""
    client.run(
        ["nft", "-f", "-"],
        stdin=(
            "table ip selftest {\n"
            " chain marking { type filter hook output priority 0;"
            f" udp sport 40003 ct mark set {MARK:#x}; }}\n"
            " chain natting { type nat hook postrouting priority 100;"
            f" udp sport 40003 snat to {client.addresses['server'][0]}:{NAT_PORT}; }}\n"
            "}\n"
        ),
    )
    with suppress(CtraceError):
        client.run(
            ["nft", "-f", "-"],
            stdin=(
                "table ip selftest_zone {\n"
                " chain leaving { type filter hook output priority -300;"
                f" udp sport 40004 ct zone set {ZONE}; }}\n"
                " chain arriving { type filter hook prerouting priority -300;"
                f" udp dport 40004 ct zone set {ZONE}; }}\n"
                "}\n"
            ),
        )
        return True
    return False


def traffic(client: Node, server: Node, stack: ExitStack, zoned: bool) -> Iterator[Flow]:
    """Make every flow; yields it as each end's table should have it."""
    client4, client6 = client.addresses["server"]
    server4, server6 = server.addresses["client"]
    for src, dst in ((client4, server4), (client6, server6)):
        family = socket.AF_INET6 if ":" in src else socket.AF_INET
        listener = stack.enter_context(server.socket(family, socket.SOCK_STREAM))
        listener.bind((dst, PORT))
        listener.listen()
        sock = stack.enter_context(client.socket(family, socket.SOCK_STREAM))
        sock.settimeout(PATIENCE)
        sock.bind((src, 40000))
        flow = Flow("tcp", socket.IPPROTO_TCP, src, 40000, dst, timeout="tcp_timeout_established")

        def connect(sock: socket.socket = sock, to: str = dst) -> None:
            sock.connect((to, PORT))

        yield from _both_ends(flow, connect, client, server)
        stack.enter_context(listener.accept()[0])

        echo = stack.enter_context(server.socket(family, socket.SOCK_DGRAM))
        echo.bind((dst, PORT))
        for port, name in ((40001, "udp, answered"), (40002, "udp, one way")):
            sock = stack.enter_context(client.socket(family, socket.SOCK_DGRAM))
            sock.bind((src, port))
            flow = Flow(name, socket.IPPROTO_UDP, src, port, dst, timeout="udp_timeout")
            answer = echo if port == 40001 else None
            yield from _both_ends(flow, _datagram(sock, dst, answer), client, server)
    yield from _special(client, server, stack, zoned)


def _special(client: Node, server: Node, stack: ExitStack, zoned: bool) -> Iterator[Flow]:
    """Flows with something to themselves: NAT and a mark, a zone, ICMP, an early end."""
    src, dst = client.addresses["server"][0], server.addresses["client"][0]
    udp = socket.IPPROTO_UDP
    for port in (40003, 40004, 40005):
        if port == 40004 and not zoned:
            continue
        sock = stack.enter_context(client.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.bind((src, port))
        send = _datagram(sock, dst, None)
        if port == 40003:
            flow = Flow("udp, NAT, marked", udp, src, port, dst, timeout="udp_timeout")
            flow.reply_dst, flow.reply_dport, flow.nat = src, NAT_PORT, Status.SRC_NAT
            yield _send(flow, send, client, Direction.OUT)
            beyond = Flow("udp, beyond NAT", udp, src, NAT_PORT, dst, timeout="udp_timeout")
            beyond.made, beyond.idle_since = flow.made, flow.idle_since
            beyond.netns, beyond.direction = server.inum, Direction.IN
            beyond.name += f" {_ends_text(beyond)} in {server.name}"
            yield beyond
        elif port == 40004:
            flow = Flow("udp, zone", udp, src, port, dst, zone=ZONE, timeout="udp_timeout")
            yield _send(flow, send, client, Direction.OUT)
        else:
            usual = client.sysctl("net.netfilter.nf_conntrack_udp_timeout")
            client.sysctl("net.netfilter.nf_conntrack_udp_timeout", EXPIRES)
            flow = Flow("udp, expiring", udp, src, port, dst, timeout="udp_timeout")
            yield _send(flow, send, client, Direction.OUT)
            client.sysctl("net.netfilter.nf_conntrack_udp_timeout", usual)
    raw = stack.enter_context(client.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
    ident = 0x1234
    flow = Flow("icmp echo", socket.IPPROTO_ICMP, src, ident, dst, timeout="icmp_timeout")

    def ping() -> None:
        body = struct.pack(">BBHHH", 8, 0, 0, ident, 1)
        total = sum(struct.unpack(">4H", body))
        check = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
        raw.sendto(body[:2] + struct.pack(">H", check) + body[4:], (dst, 0))
        raw.settimeout(PATIENCE)
        raw.recv(256)

    yield from _both_ends(flow, ping, client, server)


def refused(full: Node) -> Iterator[Flow]:
    """Packets into a table that is full; a flow without netns was not refused."""
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        for kind, proto in (
            (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
            (socket.SOCK_STREAM, socket.IPPROTO_TCP),
        ):
            with full.socket(family, kind) as sock:
                sock.bind((host, 41000))
                sock.setblocking(False)
                flow = Flow(proto_name(proto), proto, host, 41000, host)
                began = boot_ns()
                try:
                    # TCP says only EINPROGRESS: its SYN is lost, and would be sent again in 1 s.
                    sock.connect((host, PORT))
                    if kind == socket.SOCK_DGRAM:
                        sock.send(b"x")
                    refused = False
                except PermissionError:
                    refused = True
                except BlockingIOError:
                    refused = kind == socket.SOCK_STREAM
                flow.made = began, boot_ns()
                flow.netns = full.inum if refused else 0
                flow.name += f" {_ends_text(flow)}"
                yield flow


def _datagram(sock: socket.socket, dst: str, answer: Optional[socket.socket]) -> Callable[[], None]:
    def send() -> None:
        sock.sendto(b"x", (dst, PORT))
        if answer is not None:
            answer.settimeout(PATIENCE)
            _, peer = answer.recvfrom(16)
            answer.sendto(b"y", peer)
            sock.settimeout(PATIENCE)
            sock.recv(16)

    return send


def _both_ends(flow: Flow, act: Callable[[], None], client: Node, server: Node) -> Iterator[Flow]:
    """The flow in the sender's table, then in the receiver's."""
    name = flow.name
    yield _send(flow, act, client, Direction.OUT)
    other = Flow(name, flow.proto, flow.src, flow.sport, flow.dst, timeout=flow.timeout)
    other.made, other.idle_since = flow.made, flow.idle_since
    other.netns, other.direction = server.inum, Direction.IN
    other.name = f"{name} {_ends_text(other)} in {server.name}"
    yield other


def _send(flow: Flow, act: Callable[[], None], node: Node, direction: Direction) -> Flow:
    began = boot_ns()
    act()
    flow.made = flow.idle_since = began, boot_ns()
    flow.netns, flow.direction = node.inum, direction
    flow.name += f" {_ends_text(flow)} in {node.name}"
    return flow


def _ends_text(flow: Flow) -> str:
    def end(host: str, port: int) -> str:
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    return f"{end(flow.src, flow.sport)} -> {end(flow.dst, flow.dport)}"
