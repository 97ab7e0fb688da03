"""Limits that are not the table: what a network card says of its provider's, and expectations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from ctrace.beside import EPHEMERAL, Short
from ctrace.host import ethtool
from ctrace.host.netns import enter

EXCEEDED: Final = "conntrack_allowance_exceeded"
AVAILABLE: Final = "conntrack_allowance_available"
"""Statistics of Amazon's network card: packets dropped at the instance's own limit of tracked
connections, and how many more it allows."""
DRIVER: Final = "ena"
EXPECTED: Final = "/proc/thread-self/net/nf_conntrack_expect"
MOST_EXPECTED: Final = "/proc/sys/net/netfilter/nf_conntrack_expect_max"
CHOSEN: Final = "/proc/sys/net/ipv4/ip_local_port_range"


def short(netns_path: str, first: dict[str, int]) -> list[Short]:
    """Each such limit of a namespace. ``first`` remembers what counters were when first read."""
    with enter(netns_path):
        return [*clouds(ethtool.statistics(DRIVER), first), *_expectations()]


def ephemeral(netns_path: str) -> tuple[int, int]:
    """The ports that the kernel chooses from in a namespace, first and last."""
    try:
        with enter(netns_path), open(CHOSEN) as file:
            first, last = map(int, file.read().split())
    except (OSError, ValueError):
        return EPHEMERAL
    return first, last


def clouds(devices: Mapping[str, Mapping[str, int]], first: dict[str, int]) -> Iterator[Short]:
    """Of the devices that tell of a provider's limit."""
    for name, counted in devices.items():
        if EXCEEDED in counted:
            now = counted[EXCEEDED]
            since = now - first.setdefault(name, now)
            if since < 0:  # the driver was loaded anew
                first[name], since = 0, now
            left = counted.get(AVAILABLE, 0)
            yield Short("cloud", name, used=now, of=left, since=since)


def _expectations() -> Iterator[Short]:
    try:
        with open(MOST_EXPECTED) as file:
            of = int(file.read())
        with open(EXPECTED) as file:
            used = sum(1 for _ in file)
    except (OSError, ValueError):
        return  # no helper is loaded
    if used:
        yield Short("expectations", used=used, of=of)
