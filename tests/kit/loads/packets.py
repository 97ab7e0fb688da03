"""Loads as packets, for :class:`kit.loads.entries.Table`: flows that end in every way."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kit.loads.entries import (
    ANY,
    ASSURED,
    CLOSE,
    CLOSE_WAIT,
    ESTABLISHED,
    REPLIED,
    SYN_SENT,
    TIME_WAIT,
    Packet,
)

SETTINGS = {
    "tcp_syn_sent": 20.0, "tcp_established": 432_000.0, "tcp_close_wait": 30.0,
    "tcp_time_wait": 40.0, "tcp_close": 10.0, "udp": 15.0, "udp_stream": 30.0, "icmp": 30.0,
}  # fmt: skip
SECONDS = 120
Random = np.random.Generator


def arrivals(random: Random, rate: float) -> Iterator[tuple[float, int]]:
    """(second, number) of flows that come by chance."""
    for n, at in enumerate(np.sort(random.uniform(0, SECONDS, int(rate * SECONDS))).tolist()):
        yield at, n


def call(at: float, n: int, life: float, port: int = 8063, *, reset: bool = False,
         sport: int = 0) -> list[Packet]:  # fmt: skip
    """A connection that is closed after so long."""
    five = (6, sport or 1024 + n % 60_000, port)
    end = (CLOSE, ASSURED, "tcp_close") if reset else (TIME_WAIT, ASSURED, "tcp_time_wait")
    return [
        Packet(at, *five, SYN_SENT, 0, "tcp_syn_sent"),
        Packet(at + 0.001, *five, ESTABLISHED, ASSURED, "tcp_established"),
        Packet(at + 0.002 + life, *five, *end),
    ]


def closes_and_resets(random: Random) -> Iterator[Packet]:
    for at, n in arrivals(random, 15):
        yield from call(at, n, 0.0, reset=n % 2 == 0)


def long_tail(random: Random) -> Iterator[Packet]:
    for at, n in arrivals(random, 15):
        yield from call(at, n, float(min(60.0, 0.2 * random.pareto(0.9))))


def talks(random: Random) -> Iterator[Packet]:
    for at, n in arrivals(random, 6):
        five = (17, 1024 + n % 60_000, 54, ANY)
        yield Packet(at, *five, REPLIED, "udp")
        for later in np.arange(1, 6) * 0.5:
            stream = later > 2
            yield Packet(at + float(later), *five, ASSURED if stream else REPLIED,
                         "udp_stream" if stream else "udp")  # fmt: skip


def used_again(random: Random) -> Iterator[Packet]:
    for n in range(SECONDS * 20):
        yield from call(n / 20 + random.uniform(0, 0.01), n, 0.0, sport=30_000 + n % 60)


def leaks(random: Random) -> Iterator[Packet]:
    for at, n in arrivals(random, 5):
        yield from call(at, n, 10_000.0, 8064)
    yield from one_way(random)


def half_closed(random: Random) -> Iterator[Packet]:
    for at, n in arrivals(random, 10):
        yield from call(at, n, 0.0)[:2]
        yield Packet(at + 0.1, 6, 1024 + n, 8063, CLOSE_WAIT, ASSURED, "tcp_close_wait")


def unanswered(random: Random) -> Iterator[Packet]:
    for at, n in arrivals(random, 20):
        yield call(at, n, 0.0, 9)[0]


def echoes(random: Random) -> Iterator[Packet]:
    for at, n in arrivals(random, 20):
        yield Packet(at, 1, n + 1, 0, ANY, REPLIED, "icmp")


def stops(random: Random) -> Iterator[Packet]:
    for at, n in arrivals(random, 40):
        if at % 50 < 25:
            yield from call(at, n, 0.0)


def one_way(random: Random) -> Iterator[Packet]:
    for at, n in arrivals(random, 20):
        yield Packet(at, 17, 1024 + n % 60_000, 53, ANY, 0, "udp")
