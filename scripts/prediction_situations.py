"""Eight situations, each in two namespaces: one is recorded, the other has the change.

At several moments the recording up to then foretells the other's mean and peak up to then, and
the kernel's own counts there are the judge. A range that is wider than twice the effect of the
change has to say so.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, Optional

import numpy as np
from kit.traffic import pings, tcp_connections, tcp_server, udp_flows, udp_server

from ctrace.batch import Batch
from ctrace.capture import open_live
from ctrace.filters import Filter
from ctrace.lab import Lab, Node
from ctrace.whatif.gather import gather
from ctrace.whatif.run import of_recording
from ctrace.whatif.settings import parse_levers

MOMENTS: Final = (15.0, 30.0, 60.0, 120.0)
"""Seconds after the start at which is foretold; those that the run lasts for."""
PACE: Final = 0.1
"""Seconds between two rounds of a load."""
PREFIX: Final = "net.netfilter.nf_conntrack_"
PORT: Final = 8063
NOTRACK: Final = (
    "table inet n { chain o { type filter hook output priority raw - 10;\n"
    " udp dport 53 notrack; udp sport 53 notrack;\n }\n}\n"
)
SILENT: Final = (
    "table inet s { chain i { type filter hook input priority 10; tcp dport 9 drop\n }\n}\n"
)


@dataclass
class Load:
    """What one namespace's traffic keeps from round to round."""

    node: Node
    round: int = 0
    kept: list[socket.socket] = field(default_factory=list)

    def open(self, port: int = PORT) -> Optional[socket.socket]:
        """A connection that was used once; None where it failed."""
        connection = self.node.socket(socket.AF_INET, socket.SOCK_STREAM)
        connection.settimeout(2)
        with suppress(OSError):
            connection.connect(("127.0.0.1", port))
            connection.send(b"q")
            return connection
        connection.close()
        return None

    def next_port(self, n: int) -> int:
        """The first of ``n`` source ports that were not used lately."""
        return 20000 + (self.round * n) % 12000


def closes_and_resets(load: Load) -> None:
    """Two connections; one ends by RST."""
    tcp_connections(load.node, ("127.0.0.1", PORT), 1)
    reset = load.open()
    if reset is not None:
        with suppress(OSError):
            reset.recv(64)
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reset.close()


def talks(load: Load) -> None:
    """UDP conversations, answered for 2.5 s: they reach the stream's timeout."""
    if load.round % 2 == 0:
        one = load.node.socket(socket.AF_INET, socket.SOCK_DGRAM)
        one.connect(("127.0.0.1", 54))
        load.kept.append(one)
    for one in load.kept[::5]:
        with suppress(OSError):
            one.send(b"q")
    while len(load.kept) > 13:
        load.kept.pop(0).close()
    load.kept = load.kept[1:] + load.kept[:1]


def used_again(load: Load) -> None:
    """Connections from few ports: each is used again long before TIME_WAIT is over."""
    tcp_connections(load.node, ("127.0.0.1", PORT), 3)


def leaks(load: Load) -> None:
    """Connections that nobody closes, beside one-way UDP."""
    one = load.open(8064) if load.round % 2 == 0 else None
    if one is not None:
        load.kept.append(one)
    udp_flows(load.node, ("127.0.0.1", 53), 2, first_port=load.next_port(2))


def half_closed(load: Load) -> None:
    """One side has closed, the other never does."""
    one = load.open(8064)
    if one is not None:
        one.shutdown(socket.SHUT_WR)
        load.kept.append(one)


def unanswered(load: Load) -> None:
    """SYNs to a port that drops them."""
    for _ in range(2):
        one = load.node.socket(socket.AF_INET, socket.SOCK_STREAM)
        one.setblocking(False)
        with suppress(OSError):
            one.connect(("127.0.0.1", 9))
        one.close()


def echoes(load: Load) -> None:
    """Pings, each with an id of its own."""
    pings(load.node, "127.0.0.1", 2, first_id=1 + (load.round * 2) % 60000)


def stops(load: Load) -> None:
    """Connections for 25 s, then none for 25 s."""
    if load.round * PACE % 50 < 25:
        tcp_connections(load.node, ("127.0.0.1", PORT), 3)


@dataclass(frozen=True)
class Situation:
    """A load, the settings under which it is recorded, and what is changed."""

    name: str
    load: Callable[[Load], None]
    settings: dict[str, object]
    change: dict[str, object]
    timeout: tuple[str, ...] = ()
    notrack: tuple[str, ...] = ()
    rules: str = ""
    """Of the changed one."""
    both: str = ""
    """Rules of both."""


WAIT: Final = PREFIX + "tcp_timeout_time_wait"
SITUATIONS: Final = (
    Situation("half end by RST; TIME_WAIT 40 s to 5 s", closes_and_resets,
              {WAIT: 40}, {WAIT: 5}, ("tcp_time_wait=5",)),
    Situation("answered UDP; stream timeout 30 s to 8 s", talks,
              {PREFIX + "udp_timeout_stream": 30}, {PREFIX + "udp_timeout_stream": 8},
              ("udp_stream=8",)),
    Situation("64 ports, used again; TIME_WAIT 30 s to 15 s", used_again,
              {WAIT: 30, "net.ipv4.ip_local_port_range": "30000 30063"}, {WAIT: 15},
              ("tcp_time_wait=15",)),
    Situation("connections that stay; NOTRACK udp/53", leaks,
              {PREFIX + "udp_timeout": 15}, {}, notrack=("udp/53",), rules=NOTRACK),
    Situation("half-closed; CLOSE_WAIT 30 s to 10 s", half_closed,
              {PREFIX + "tcp_timeout_close_wait": 30}, {PREFIX + "tcp_timeout_close_wait": 10},
              ("tcp_close_wait=10",)),
    Situation("SYNs without an answer; SYN_SENT 20 s to 5 s", unanswered,
              {PREFIX + "tcp_timeout_syn_sent": 20}, {PREFIX + "tcp_timeout_syn_sent": 5},
              ("tcp_syn_sent=5",), both=SILENT),
    Situation("pings; ICMP 30 s to 6 s", echoes,
              {PREFIX + "icmp_timeout": 30}, {PREFIX + "icmp_timeout": 6}, ("icmp=6",)),
    Situation("a load that stops and begins; TIME_WAIT 20 s to 60 s", stops,
              {WAIT: 20}, {WAIT: 60}, ("tcp_time_wait=60",)),
)  # fmt: skip


def run(seconds: float) -> list[dict[str, Any]]:
    """Rows: one for each situation, moment and figure."""
    with ExitStack() as stack:
        lab = stack.enter_context(Lab())
        pairs = [_pair(lab, stack, n, one) for n, one in enumerate(SITUATIONS)]
        nodes = [node for pair in pairs for node in pair]
        source = open_live(Filter(), sample=True)
        stack.callback(source.close)
        begin = time.monotonic()
        threads = [
            threading.Thread(target=_carry, args=(node, one.load, begin + seconds))
            for one, pair in zip(SITUATIONS, pairs)
            for node in pair
        ]
        for thread in threads:
            thread.start()
        batches: list[tuple[float, Batch]] = []
        counts: list[tuple[float, list[int]]] = []
        inums = [node.inum for node in nodes]
        for batch in source.batches(0.5):
            at = time.monotonic() - begin
            mine = batch.events[np.isin(batch.events["netns"], inums)]
            batches.append((at, replace(batch, events=mine)))
            counts.append((at, [node.count() for node in nodes]))
            if at > seconds:
                break
        for thread in threads:
            thread.join()
    rows = []
    for n, one in enumerate(SITUATIONS):
        for moment in [moment for moment in MOMENTS if moment <= seconds]:
            told = [batch for at, batch in batches if at <= moment]
            real = np.array([held[2 * n : 2 * n + 2] for at, held in counts if at <= moment])
            mine = [_only(batch, pairs[n][0].inum) for batch in told]
            if any(len(batch.events) for batch in mine):
                rows += _rows(one, moment, mine, real)
            else:
                print(f"{one.name}: nothing was seen up to {moment:.0f} s", file=sys.stderr)
    return rows


def _pair(lab: Lab, stack: ExitStack, n: int, one: Situation) -> tuple[Node, Node]:
    nodes = (lab.namespace(f"s{n}a", track=True), lab.namespace(f"s{n}b", track=True))
    for node, settings in zip(nodes, (one.settings, {**one.settings, **one.change})):
        for name, value in settings.items():
            node.sysctl(name, value)
        if one.both:
            node.run(["nft", "-f", "-"], stdin=one.both)
        stack.enter_context(tcp_server(node, PORT))
        stack.enter_context(_holding(node, 8064))
        stack.enter_context(udp_server(node, 53, reply=False))
        stack.enter_context(udp_server(node, 54))
    if one.rules:
        nodes[1].run(["nft", "-f", "-"], stdin=one.rules)
    return nodes


@contextmanager
def _holding(node: Node, port: int) -> Iterator[None]:
    """A server that accepts, and neither answers nor closes."""
    kept: list[socket.socket] = []
    listener = node.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("0.0.0.0", port))
    listener.listen(4096)

    def accept() -> None:
        with suppress(OSError):
            while True:
                kept.append(listener.accept()[0])

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for one in (listener, *kept):
            one.close()


def _carry(node: Node, once: Callable[[Load], None], until: float) -> None:
    load, begin = Load(node), time.monotonic()
    while time.monotonic() < until:
        with suppress(OSError):
            once(load)
        # Both namespaces of a pair do as many rounds, however busy the machine is.
        load.round += 1
        time.sleep(max(0.0, begin + load.round * PACE - time.monotonic()))
    for one in load.kept:
        one.close()


def _only(batch: Batch, inum: int) -> Batch:
    tables = tuple(table for table in batch.tables if table.netns == inum)
    return replace(batch, events=batch.events[batch.events["netns"] == inum], tables=tables)


def _rows(
    one: Situation, moment: float, batches: list[Batch], real: np.ndarray[Any, Any]
) -> list[dict[str, Any]]:
    answer = of_recording(gather(batches), parse_levers(one.notrack, one.timeout))
    (place,) = answer.places
    rows = []
    for figure, told, (low, high), of in (
        ("mean", place.changed.mean, place.changed.mean_range, np.mean),
        ("peak", place.changed.peak, place.changed.peak_range, np.max),
    ):
        was, truth = (float(of(real[:, i])) for i in (0, 1))
        rows.append({
            "situation": one.name, "at_s": moment, "figure": figure, "then": round(was),
            "predicted": round(told), "range": [round(low), round(high)],
            "measured": round(truth),
            "inside": bool(low - 0.5 <= truth <= high + 0.5),
            "wide": bool(high - low > 2 * abs(was - truth)),
            "wide_told": figure in place.vague or not place.trusted,
            "error": place.error,
            "rising": place.rising.per_s if place.rising else None,
        })  # fmt: skip
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table, and the shares inside."""
    lines = [
        "| situation | after | figure | unchanged | predicted (range) | measured | inside |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["range"]
        wide = " (wide, told)" if row["wide"] and row["wide_told"] else ""
        wide = " (wide)" if row["wide"] and not row["wide_told"] else wide
        lines.append(
            f"| {row['situation']} | {row['at_s']:.0f} s | {row['figure']} | {row['then']} | "
            f"{row['predicted']} ({low} to {high}){wide} | {row['measured']} | "
            f"{'yes' if row['inside'] else 'no'} |"
        )
    inside = sum(row["inside"] for row in rows)
    wide_untold = sum(row["wide"] and not row["wide_told"] for row in rows)
    lines += [
        "",
        f"Inside: {inside} of {len(rows)} (figure, moment) pairs, {inside / len(rows):.0%}; "
        f"wider than twice the effect without saying so: {wide_untold}.",
    ]
    return "\n".join(lines)
