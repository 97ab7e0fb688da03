"""Loads for figures to be held against the truth: each in a namespace of its own, with a record
of what its generator did.

The clock of every record is time.monotonic().
"""

from __future__ import annotations

import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Optional

from ctrace.lab import Lab, Node
from kit.traffic import tcp_server, udp_server

HERE = "127.0.0.1"


@dataclass
class Done:
    """What a generator did so far."""

    made: list[float] = field(default_factory=list)
    """When the first packet of each flow left."""
    lives: list[float] = field(default_factory=list)
    """Seconds from the first packet of each finished flow to its last."""
    failed: int = 0


@dataclass(frozen=True)
class Situation:
    """One load and what is known of it beforehand."""

    name: str
    proto: str
    port: Optional[int]
    """Of the row that shows it; None for a protocol without ports."""
    play: Callable[[Node, Done, threading.Event], None]
    stay: Optional[tuple[float, float]] = None
    """Seconds that an entry stays, lowest and highest; None where it stays as long as one looks
    or it varies."""
    before: float = 0.0
    """Seconds that it begins before ctrace."""
    prepare: Optional[Callable[[Node], None]] = None
    grows: bool = False
    """It never levels off."""


def every(seconds: float, stop: threading.Event, n: Optional[int] = None) -> Iterator[int]:
    """Numbers, one each so many seconds, until stopped or ``n`` are given."""
    due = time.monotonic()
    for number in itertools.count() if n is None else range(n):
        due += seconds
        if stop.wait(max(0.0, due - time.monotonic())):
            return
        yield number


def connect(port: int, sport: int = 0) -> socket.socket:
    one = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    one.settimeout(60)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sport:
        one.bind((HERE, sport))
    one.connect((HERE, port))
    return one


def calls(port: int, each: float, *, sports: int = 0, reset: bool = False
          ) -> Callable[[Node, Done, threading.Event], None]:  # fmt: skip
    """Short connections, from so many source ports in turn, or from ever new ones."""

    def play(node: Node, done: Done, stop: threading.Event) -> None:
        with tcp_server(node, port), node.enter():
            for number in every(each, stop):
                begin = time.monotonic()
                sport = 20_000 + number % sports if sports else 0
                try:
                    with connect(port, sport) as one:
                        one.sendall(b"x\n")
                        one.recv(64)
                        if reset:
                            linger = struct.pack("ii", 1, 0)
                            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                except OSError:
                    done.failed += 1
                    continue
                done.made.append(begin)
                done.lives.append(time.monotonic() - begin)

    return play


def kept(port: int, each: float, n: Optional[int] = None, *, half: bool = False
         ) -> Callable[[Node, Done, threading.Event], None]:  # fmt: skip
    """Connections that stay open, or of which one side closes (``half``)."""

    def hold(connection: socket.socket) -> None:
        held.append(connection.dup())

    held: list[socket.socket] = []

    def play(node: Node, done: Done, stop: threading.Event) -> None:
        mine = []
        with tcp_server(node, port, handle=hold), node.enter():
            for _ in every(each, stop, n):
                done.made.append(time.monotonic())
                mine.append(connect(port))
                if half:
                    mine[-1].shutdown(socket.SHUT_WR)
            stop.wait()
        for one in (*mine, *held):
            one.close()

    return play


def datagrams(port: int, each: float, *, answered: bool, packets: int = 1, gap: float = 0.0,
              n: Optional[int] = None
              ) -> Callable[[Node, Done, threading.Event], None]:  # fmt: skip
    """UDP flows from new ports; each sends ``packets``, ``gap`` seconds apart (0 packets: on)."""

    def play(node: Node, done: Done, stop: threading.Event) -> None:
        with udp_server(node, port, reply=answered), node.enter():
            open_: list[tuple[float, int, socket.socket]] = []
            for number in every(each, stop):
                if n is None or number < n:
                    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                    one.bind((HERE, 20_000 + number))
                    one.connect((HERE, port))
                    open_.append((time.monotonic(), 0, one))
                    done.made.append(open_[-1][0])
                left = []
                for begin, sent, one in open_:
                    now = time.monotonic()
                    due = now - begin >= sent * gap
                    if due:
                        with suppress(OSError):
                            one.send(b"x")
                    if sent + due == packets:
                        done.lives.append(now - begin)
                        one.close()
                    else:
                        left.append((begin, sent + due, one))
                open_ = left

    return play


def raw(proto: int, packet: Callable[[int], bytes], each: float, *, targets: bool = False
        ) -> Callable[[Node, Done, threading.Event], None]:  # fmt: skip
    """One packet of a protocol for each flow; ``targets``: each to an address of its own."""

    def play(node: Node, done: Done, stop: threading.Event) -> None:
        with node.socket(socket.AF_INET, socket.SOCK_RAW, proto) as one:
            for number in every(each, stop):
                where = f"127.0.{1 + number // 250}.{1 + number % 250}" if targets else HERE
                done.made.append(time.monotonic())
                one.sendto(packet(number), (where, 0))

    return play


def echo(number: int) -> bytes:
    total = (8 << 8) + number + 2
    return struct.pack("!BBHHH", 8, 0, ~total & 0xFFFF, number + 1, 1)


def setting(name: str, value: int) -> Callable[[Node], None]:
    def change(node: Node) -> None:
        node.sysctl(f"net.netfilter.nf_conntrack_{name}", value)

    return change


def policy(node: Node) -> None:
    """Unanswered UDP to port 7009 stays for 7 s, by a timeout policy."""
    node.run(
        ["nft", "-f", "-"],
        stdin=(
            "table ip p {\n ct timeout short {\n protocol udp;\n l3proto ip;\n"
            " policy = { unreplied : 7, replied : 7 }\n }\n"
            " chain o {\n type filter hook output priority 0;\n"
            ' udp dport 7009 ct timeout set "short"\n }\n}\n'
        ),
    )


def redirect(node: Node) -> None:
    node.run(
        ["nft", "-f", "-"],
        stdin=(
            "table ip r {\n chain o { type nat hook output priority -100; "
            "tcp dport 7110 redirect to :7010;\n }\n}\n"
        ),
    )


def through_nat(node: Node, done: Done, stop: threading.Event) -> None:
    with tcp_server(node, 7010), node.enter():
        for _ in every(0.1, stop):
            begin = time.monotonic()
            with connect(7110) as one:
                one.sendall(b"x\n")
                one.recv(64)
            done.made.append(begin)
            done.lives.append(time.monotonic() - begin)


def later(change: Callable[[Node], None], seconds: float,
          play: Callable[[Node, Done, threading.Event], None]
          ) -> Callable[[Node, Done, threading.Event], None]:  # fmt: skip
    """A load under which a setting changes."""

    def played(node: Node, done: Done, stop: threading.Event) -> None:
        timer = threading.Timer(seconds, change, (node,))
        timer.start()
        try:
            play(node, done, stop)
        finally:
            timer.cancel()

    return played


SITUATIONS = (
    Situation("short", "tcp", 7001, calls(7001, 0.05), (120, 123)),
    Situation("long", "tcp", 7002, kept(7002, 0.1, 60)),
    Situation("half-closed", "tcp", 7003, kept(7003, 0.1, 60, half=True), (60, 63)),
    Situation("reset", "tcp", 7004, calls(7004, 0.05, reset=True), (10, 13)),
    Situation("one-way", "udp", 7005, datagrams(7005, 0.05, answered=False), (30, 33)),
    Situation("answered", "udp", 7006, datagrams(7006, 0.05, answered=True), (30, 33)),
    Situation("streams", "udp", 7007,
              datagrams(7007, 0.1, answered=True, packets=0, gap=0.5, n=40)),
    Situation("lasting", "udp", 7008,
              datagrams(7008, 0.1, answered=True, packets=9, gap=0.5), (123, 128)),
    Situation("policy", "udp", 7009, datagrams(7009, 0.05, answered=False), (7, 10),
              prepare=policy),
    Situation("nat", "tcp", 7110, through_nat, (120, 123), prepare=redirect),
    Situation("pings", "icmp", None, raw(1, echo, 0.1), (30, 33)),
    Situation("gre", "gre", None, raw(47, lambda _: struct.pack("!HH", 0, 0x0800), 0.1,
                                      targets=True)),
    Situation("sctp", "sctp", 2905,
              raw(132, lambda n: struct.pack("!HHIIBBHIIHHI", 20_000 + n, 2905, 0, 0, 1, 0, 20, 7,
                                             1500, 1, 1, 1), 0.1)),
    Situation("reused ports", "tcp", 7012, calls(7012, 0.05, sports=60), (3, 6)),
    Situation("leak", "tcp", 7013, kept(7013, 0.2), grows=True),
    Situation("lowered", "udp", 7014, later(setting("udp_timeout", 8), 20,
                                            datagrams(7014, 0.05, answered=False))),
    Situation("midway", "tcp", 7015, calls(7015, 0.05), (40, 43), before=15,
              prepare=setting("tcp_timeout_time_wait", 40)),
)  # fmt: skip


@dataclass
class Playing:
    """A situation that goes on."""

    situation: Situation
    node: Node
    done: Done


@contextmanager
def playing(
    lab: Lab, situations: tuple[Situation, ...]
) -> Iterator[tuple[list[Playing], Callable[[], None]]]:
    """Those that begin earlier, playing, and what starts the others."""
    stop, threads = threading.Event(), list[threading.Thread]()
    every_one = []

    def start(one: Playing) -> None:
        thread = threading.Thread(
            target=one.situation.play, args=(one.node, one.done, stop), daemon=True
        )
        thread.start()
        threads.append(thread)

    def stop_all() -> None:
        stop.set()
        for thread in threads:
            thread.join(60)

    with ExitStack() as stack:
        stack.callback(stop_all)
        for situation in situations:
            node = lab.namespace(situation.name.replace(" ", "-"), track=True)
            if situation.prepare:
                situation.prepare(node)
            every_one.append(Playing(situation, node, Done()))
        for one in every_one:
            if one.situation.before:
                start(one)

        def rest() -> None:
            for one in every_one:
                if not one.situation.before:
                    start(one)

        yield every_one, rest
