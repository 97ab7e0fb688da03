#!/usr/bin/env python3
"""What ``ctrace perf`` adds to what it measures, and how long a scrape of the metrics takes."""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

from bench_traffic import FLOWS, Flood  # noqa: E402
from kit.loads import snapshots  # noqa: E402

from ctrace.cost.measure import Measurement  # noqa: E402
from ctrace.kernel import symbols  # noqa: E402
from ctrace.lab import Lab, Node  # noqa: E402
from ctrace.view.export.openmetrics import CONTENT_TYPE_LATEST, Exposition  # noqa: E402
from ctrace.view.export.scrape import CONNECTIONS, Scrapes  # noqa: E402

Row = dict[str, Any]
CULPRITS = 1000
SCRAPES = 300
BUDGET_MS = 50
PACKETS = 20_000


@contextlib.contextmanager
def measuring(on: bool) -> Iterator[None]:
    """With all that ``ctrace perf`` attaches, or without."""
    if not on:
        yield
        return
    with Measurement(symbols.kernel()):
        yield


def overhead() -> list[Row]:
    """CPU time a packet and a new flow, with and without."""
    packet: dict[bool, list[float]] = {False: [], True: []}
    flow: dict[bool, list[float]] = {False: [], True: []}
    with Lab() as lab:
        a, b = lab.namespace("a", track=True), lab.namespace("b", track=True)
        sink_only = lab.namespace("c")
        lab.link(a, b)
        lab.link(a, sink_only)
        sink_only.run(
            ["nft", "add table ip sink; add chain ip sink in { type filter hook prerouting "
             "priority -400; }; add rule ip sink in drop"]
        )  # fmt: skip
        flood = Flood(a, sink_only.addresses["a"][0])
        sink = b.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sink.bind(("", 9))
        with sink:
            _packets(a, b, 2000)
            flood.send(FLOWS)
            for turn in range(10):
                on = bool(turn % 2)
                a.run(["conntrack", "-F"])
                with measuring(on):
                    packet[on].append(_packets(a, b, PACKETS))
                    flow[on].append(flood.send(FLOWS) / FLOWS * 1e9)
            a.run(["conntrack", "-F"])
    return [
        _row("established packet, sent and received, while ctrace perf runs", packet),
        _row("first packet of a new flow, sent, while ctrace perf runs", flow),
    ]


def _packets(a: Node, b: Node, packets: int) -> float:
    """Nanoseconds of CPU time a packet of one flow."""
    with a.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect((b.addresses["a"][0], 9))
        started = time.thread_time()
        for _ in range(packets):
            sender.send(b"x")
        return (time.thread_time() - started) / packets * 1e9


def _row(name: str, times: dict[bool, list[float]]) -> Row:
    without, with_it = statistics.median(times[False]), statistics.median(times[True])
    return {
        "name": name,
        "ns_without": round(without),
        "ns_with": round(with_it),
        "added": f"{(with_it - without) / without:+.1%}",
    }


def scrape() -> list[Row]:
    """Making the answer for a thousand culprits, and fetching it, also beside hung scrapers."""
    exposition = Exposition(limit=CULPRITS)
    making = []
    for tick in range(20):
        churning = snapshots.churning(CULPRITS, tick)
        culprits = tuple(
            replace(culprit, proto="tcp", port=port)  # each is a label of its own
            for port, culprit in enumerate(churning.culprits, 1)
        )
        snapshot = replace(churning, culprits=culprits)
        began = time.thread_time()
        text = exposition.text(snapshot)
        making.append(time.thread_time() - began)
    server = Scrapes(("127.0.0.1", 0), CONTENT_TYPE_LATEST)
    server.text = text
    try:
        alone = _fetches(server)
        address = ("127.0.0.1", server.server_address[1])
        hung = [socket.create_connection(address) for _ in range(CONNECTIONS - 2)]
        beside = _fetches(server)
        for connection in hung:
            connection.close()
    finally:
        server.close()
    rows: list[Row] = [
        {
            "name": f"OpenMetrics text of {CULPRITS} culprits, made once an interval",
            "value": round(statistics.median(making) * 1e3, 1),
            "unit": "ms CPU",
            "KiB": len(text) >> 10,
        }
    ]
    for name, times in (("alone", alone), (f"beside {CONNECTIONS - 2} hung scrapers", beside)):
        rows.append(
            {
                "name": f"a scrape of it, {name}",
                "p50_ms": round(statistics.median(times) * 1e3, 2),
                "p99_ms": round(statistics.quantiles(times, n=100)[98] * 1e3, 2),
                "limit_ms": BUDGET_MS,
            }
        )
    return rows


def _fetches(server: Scrapes) -> list[float]:
    times = []
    for _ in range(SCRAPES):
        began = time.perf_counter()
        url = f"http://127.0.0.1:{server.server_address[1]}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            answer.read()
        times.append(time.perf_counter() - began)
    return times


def run() -> list[Row]:
    """One row for each measurement, for scripts/bench."""
    return overhead() + scrape()


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
