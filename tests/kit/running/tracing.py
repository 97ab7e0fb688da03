"""Captures of nodes in namespaces of our own, and what is asked of their events."""

from __future__ import annotations

import socket
import struct
import time
from collections import Counter

import numpy as np

from ctrace.batch import inode_of
from ctrace.capture.hooks.netfilter import NetfilterCapture
from ctrace.filters import Filter
from ctrace.host.netns import Namespace
from ctrace.lab import Lab, Node
from ctrace.record import Events, Kind, Reason, address_text, empty, join, words


def spaces(*nodes: Node) -> list[Namespace]:
    return [Namespace(node.inum, node.name, node.path) for node in nodes]


RING = 1 << 25
"""Bytes of each CPU's ring: what others' tables lose at once, a quarter of a million entries,
comes between two polls of ours."""


class Trace:
    """A capture of some nodes, polled until it is quiet."""

    def __init__(self, *nodes: Node, wanted: Filter | None = None) -> None:
        self.nodes = nodes
        self.capture = NetfilterCapture(wanted or Filter(), ring_bytes=RING)
        self.capture.follow(spaces(*nodes))
        self.seen = empty()
        self.lost = 0

    def take(self, quiet: float = 0.12) -> Events:
        """Everything since the last call, of our nodes."""
        began = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        parts, until = [], time.monotonic() + quiet
        inums = [node.inum for node in self.nodes]
        last = False
        while not last:
            # on a busy machine the time may pass between two polls: one more settles it
            last = time.monotonic() >= until
            events, lost = self.capture.poll()
            self.lost += lost
            if np.isin(events["netns"], inums).any():
                parts.append(events)
                until, last = time.monotonic() + quiet, False
            elif len(events) and int(events["ts"].min()) < began:
                last = False  # what happened elsewhere before is still on its way
            time.sleep(0.013)
        events = join(parts)
        fresh = events[np.isin(events["netns"], inums)]
        self.seen = join([self.seen, fresh])
        return fresh

    def total(self, node: Node, reason: Reason) -> int:
        counts = self.capture.counts().get(node.inum)
        return 0 if counts is None else int(counts[reason])


def of(events: Events, node: Node, *kinds: Kind) -> Events:
    """Rows of these kinds in the node's namespace."""
    inodes = np.array([inode_of(int(netns)) for netns in events["netns"]], np.uint32)
    chosen: Events = events[(inodes == node.inum) & np.isin(events["kind"], kinds)]
    return chosen


def flows(events: Events) -> Counter[tuple[int, str, int, str, int]]:
    """Original tuples as the traffic generators write them."""
    return Counter(
        (int(e["proto"]), address_text(e["src"]), int(e["sport"]), address_text(e["dst"]),
         int(e["dport"]))
        for e in events
    )  # fmt: skip


def both_tuples(events: Events) -> set[bytes]:
    """Original and reply tuple, protocol and zone of each row."""
    columns = words(events)
    return {
        bytes(row[2:11]) + bytes(event["proto"]) + bytes(event["zone"])
        for row, event in zip(columns, events, strict=True)
    }


def udp_packet(src: str, dst: str, sport: int, dport: int) -> bytes:
    udp = struct.pack("!HHHH", sport, dport, 8, 0)  # without a checksum
    source, target = socket.inet_aton(src), socket.inet_aton(dst)
    return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 64, 17, 0, source, target) + udp


def tcp_packet(src: str, dst: str, sport: int, dport: int, flags: int) -> bytes:
    def checksum(data: bytes) -> int:
        total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
        total = (total >> 16) + (total & 0xFFFF)
        return ~(total + (total >> 16)) & 0xFFFF

    source, target = socket.inet_aton(src), socket.inet_aton(dst)
    tcp = struct.pack("!HHIIBBHHH", sport, dport, 1, 1, 0x50, flags, 1024, 0, 0)
    tcp = tcp[:16] + struct.pack("!H", checksum(source + target + b"\0\6\0\x14" + tcp)) + tcp[18:]
    return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 0, 0, 64, 6, 0, source, target) + tcp


def linked(lab: Lab) -> tuple[Node, Node]:
    """Two that are linked; what is sent outlives the test, however busy the machine is."""
    a, b = lab.namespace("a", track=True), lab.namespace("b", track=True)
    lab.link(a, b)
    for node in (a, b):
        node.sysctl("net.netfilter.nf_conntrack_udp_timeout", 600)
    return a, b


def identity(events: Events) -> Counter[bytes]:
    return Counter(
        bytes(row[2:11]) + bytes(event["proto"])
        for row, event in zip(words(events), events, strict=True)
    )
