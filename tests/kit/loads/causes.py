"""Loads on made events, each of the shape of one cause or of what only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np

from ctrace.batch import Batch, Clock, HookInfo, Names, Netns
from ctrace.model.model import Model
from ctrace.model.snapshot import Snapshot
from ctrace.record import Direction, Kind, empty
from kit.shapes import ESTABLISHED, NETNS, SECOND, START, SYN_SENT, TIME_WAIT, Trace, steady

UNREPLIED, SEEN_REPLY = 0, 2
FIN_WAIT, CLOSE_WAIT, CLOSE = 4, 5, 8
OTHER = 4026532500
ROOMY = 262_144


def run(trace: Trace, until: float, limit: int = 0, invalid: int = 0) -> Snapshot:
    """What is told at the end. Without a ``limit`` the table is short of room by then.
    ``invalid``: packets that are INVALID each second."""
    batches = trace.batches(until, limit=limit)
    if not limit:
        limit = max(one.tables[0].count for one in batches) * 5 // 4
        batches = [
            replace(one, tables=tuple(replace(table, max=limit) for table in one.tables))
            for one in batches
        ]
    if invalid:
        batches = [
            replace(one, tables=tuple(
                replace(table, stats={**table.stats, "invalid": invalid * second})
                for table in one.tables))
            for second, one in enumerate(batches)
        ]  # fmt: skip
    m = Model(HookInfo("fentry"), Clock(0), START)
    seen = {int(n) for part in trace.parts for n in np.unique(part["netns"])}
    known = {NETNS: Netns(NETNS, "init"), OTHER: Netns(OTHER, "web")}
    names = Names(netns={k: v for k, v in known.items() if k in seen})
    m.update(Batch(empty(), START, names=names))
    for batch in batches:
        m.update(batch)
    return m.snapshot()


Shape = Callable[[Trace], None]


@cache
def told(shape: Shape, until: float, limit: int = 0) -> Snapshot:
    """What is told of this shape: once, for it is frozen."""
    trace = Trace(seed=7)
    shape(trace)
    return run(trace, until, limit)


def no_keepalive(t: Trace) -> None:
    t.flows(steady(300, 60, t.rng), 0.004, 20.0)
    t.flows(steady(10, 60, t.rng), 9.0, 20.0, dport=443, src="10.0.0.8")


def kept_alive(t: Trace) -> None:
    """The same service over few, long connections."""
    t.flows(steady(12, 60, t.rng), 15.0, 5.0)


def one_way(t: Trace) -> None:
    t.flows(steady(200, 60, t.rng), 0, 10.0, proto=17, dport=8125, status=UNREPLIED)


def answered_udp(t: Trace) -> None:
    t.flows(steady(200, 60, t.rng), 0.02, 10.0, proto=17, dport=5060)


def dns(t: Trace) -> None:
    n = 300 * 60
    src = 0x0A2A0000 + t.rng.integers(1, 64, n)
    t.flows(steady(300, 60, t.rng), 0.002, 10.0, proto=17, dport=53, src=src)


def tunnel(t: Trace) -> None:
    t.flows(steady(200, 60, t.rng), 0, 10.0, proto=17, dport=4789, status=UNREPLIED)


def loopback(t: Trace) -> None:
    t.flows(steady(60, 60, t.rng), 0.001, 20.0, src="127.0.0.1", dst="127.0.0.1", dport=10248)


def probes_from_outside(t: Trace) -> None:
    t.flows(steady(60, 60, t.rng), 0.001, 20.0, src="10.0.0.3", dport=10248)


def flood(t: Trace) -> None:
    n = 1000 * 40
    src = t.rng.integers(0x0B000000, 0xDF000000, n)
    t.flows(steady(1000, 40, t.rng), 0, 15.0, src=src, dport=80, status=UNREPLIED, state=SYN_SENT)


def popular(t: Trace) -> None:
    """As many sources, but they are answered and stay a while."""
    n = 500 * 40
    src = t.rng.integers(0x0B000000, 0xDF000000, n)
    t.flows(steady(500, 40, t.rng), t.rng.uniform(6, 12, n), 5.0, src=src, dport=80)


def clash(t: Trace) -> None:
    t.flows(steady(50, 30, t.rng), 0.01, 10.0, proto=17, dport=53)
    t.failures(steady(1, 30, t.rng), proto=17, dport=53)


def clash_when_full(t: Trace) -> None:
    """The same failures, but the table is full: there is a simpler reason."""
    t.flows(steady(50, 30, t.rng), 0.01, 40.0, proto=17, dport=53)
    t.failures(steady(1, 30, t.rng), proto=17, dport=53)
    t.drops(steady(20, 30, t.rng), proto=17, dport=53)


def leak(t: Trace) -> None:
    t.existing(3000, dport=5432)
    t.flows(steady(2, 60, t.rng), 5.0, 5.0, dport=443)


def busy_established(t: Trace) -> None:
    """Old entries too, but they end and are replaced."""
    t.existing(500, dport=5432)
    t.flows(steady(50, 60, t.rng), 8.0, 4.0, dport=5432)


def other_full(t: Trace) -> None:
    t.flows(steady(100, 40, t.rng), 0.2, 60.0, netns=OTHER, dport=8080)
    t.drops(20 + steady(30, 20, t.rng), netns=OTHER, dport=8080)
    t.flows(steady(2, 40, t.rng), 1.0, 5.0, dport=22)


def both_roomy(t: Trace) -> None:
    t.flows(steady(10, 40, t.rng), 0.2, 5.0, netns=OTHER, dport=8080)
    t.flows(steady(2, 40, t.rng), 1.0, 5.0, dport=22)


def legitimate(t: Trace) -> None:
    """Many services and clients, connections that last: just more than fits."""
    for port in range(9000, 9012):
        at = steady(100 / 12, 60, t.rng)
        src = 0x0A010000 + t.rng.integers(1, 3000, len(at))
        t.flows(at, t.rng.uniform(10, 20, len(at)), 2.0, src=src, dport=port)


def udp_flood(t: Trace) -> None:
    src = t.rng.integers(0x0B000000, 0xDF000000, 500 * 40)
    t.flows(steady(500, 40, t.rng), 0, 10.0, src=src, proto=17, dport=1900, status=UNREPLIED)


def agents(t: Trace) -> None:
    """As many sources of unanswered datagrams, but each sends on from where it is."""
    src = 0x0A010000 + t.rng.permutation(3000)
    t.flows(np.linspace(0, 5, 3000), 60.0, 30.0, src=src, proto=17, dport=8125, status=UNREPLIED)


def refused(t: Trace) -> None:
    """Connections that are reset at once: nothing is held."""
    t.flows(steady(300, 40, t.rng), 0, 0.0005, status=SEEN_REPLY, state=CLOSE, dport=7777)


def no_answer(t: Trace) -> None:
    t.flows(steady(100, 40, t.rng), 0, 120.0, status=UNREPLIED, state=SYN_SENT, dport=7777,
            direction=int(Direction.OUT))  # fmt: skip
    t.walks(40)


def exchanges(t: Trace) -> None:
    """Answered requests, none of which has ended by the end."""
    t.flows(steady(200, 12, t.rng), 0.02, 30.0, proto=17, dport=123, status=SEEN_REPLY)
    t.walks(12)


def streams(t: Trace) -> None:
    t.flows(np.linspace(0, 3, 800), 100.0, 120.0, proto=17, dport=443)
    t.walks(12)


def old_streams(t: Trace) -> None:
    """Those that were there before: nobody saw how long they have gone on."""
    t.existing(800, proto=17, dport=443)
    t.walks(12)


def old_time_wait(t: Trace) -> None:
    """Closed before anybody looked: how long they lived is not known."""
    t.existing(800, state=TIME_WAIT, dport=9443)
    t.walks(12)


def old_leak(t: Trace) -> None:
    """It began long ago; some come now, and none goes."""
    t.existing(2000, dport=9200)
    t.flows(steady(80, 12, t.rng), 0.01, 432000.0, dport=9200, state=ESTABLISHED)
    t.walks(12)


def unused(t: Trace) -> None:
    """Connections that carry nothing once they are open, and are never closed."""
    t.flows(steady(80, 12, t.rng), 0.01, 432000.0, dport=9200, state=ESTABLISHED)
    t.walks(12)


def rising(t: Trace) -> None:
    """As many that come, all in use."""
    t.flows(steady(80, 12, t.rng), 600.0, 432000.0, dport=9200, state=ESTABLISHED)
    t.walks(12)


def burst(t: Trace, since: float = 30.0) -> None:
    """Connections that have just been opened, by the hundred, and carry nothing yet."""
    t.flows(steady(2, since, t.rng), 0.004, 20.0, dport=443)
    t.flows(since + steady(120, 4, t.rng), 0.01, 432000.0, dport=9200, state=ESTABLISHED)
    t.walks(since + 4)


def first_burst(t: Trace) -> None:
    burst(t, since=5.0)


def opened_and_closed(t: Trace) -> None:
    """Most are open and carry nothing, but the first of them have been closed."""
    unused(t)
    t.flows(steady(4, 12, t.rng), 0.01, 120.0, dport=9200)
    t.walks(12)


def quiet(t: Trace, idle: float = 400.0) -> None:
    """Old connections of which looks tell how long they had no packet."""
    rows = t.existing(2000, dport=5432)
    for second in range(2, 12, 5):
        met = rows.copy()
        met["ts"], met["kind"] = START + second * SECOND, int(Kind.MET)
        met["idle_ms"] = int(1000 * idle)
        met["timeout_ms"], met["overdue_ms"] = 0, int(-1000 * (432000 - idle))
        t.parts.append(met)


def in_use(t: Trace) -> None:
    quiet(t, idle=0.5)


def one_way_tcp(t: Trace) -> None:
    """Open connections whose answers pass elsewhere: picked up by their first packet."""
    t.flows(steady(90, 12, t.rng), 0.0, 300.0, dport=5432, status=UNREPLIED, state=ESTABLISHED)
    t.walks(12)


def ack_flood(t: Trace) -> None:
    """Lone packets of ever new sources, each taken up as an open connection."""
    src = t.rng.integers(0x0B000000, 0xDF000000, 300 * 12)
    t.flows(steady(300, 12, t.rng), 0.0, 300.0, src=src, dport=443, status=UNREPLIED,
            state=ESTABLISHED)  # fmt: skip
    t.walks(12)


def udp_scan(t: Trace) -> None:
    ports = t.rng.integers(1, 65535, 200 * 40)
    t.flows(steady(200, 40, t.rng), 0, 10.0, src="10.6.6.6", dport=ports, proto=17,
            status=UNREPLIED)  # fmt: skip


def few_lookups(t: Trace) -> None:
    t.flows(steady(3, 60, t.rng), 0.002, 10.0, proto=17, dport=53)
