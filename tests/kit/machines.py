"""Namespaces, a stretch of traffic in them, and the kernel's own account of it."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from types import TracebackType

import numpy as np

from ctrace.capture.family import Capture
from ctrace.capture.ladder import FamilyStatus, probe
from ctrace.host import netns
from ctrace.host.netns import Namespace
from ctrace.kernel import bpf
from ctrace.lab import Lab, Node
from ctrace.record import N_REASONS, Events, Kind, Reason, Status, address_text, empty, join

EMULATED = bool(os.environ.get("CTRACE_VM"))
UDP_TIMEOUT = 600
"""Seconds."""
ASSURED, OTHERS = 300, 500
"""Entries of the fixture that has some: enough for shares of a sample."""
Flow = tuple[int, str, int, str, int]
Seen = dict[str, dict[str, str]]
Objects = set[tuple[str, int]]
NEXT_ID = {
    "prog": bpf.Cmd.PROG_GET_NEXT_ID,
    "map": bpf.Cmd.MAP_GET_NEXT_ID,
    "link": bpf.Cmd.LINK_GET_NEXT_ID,
}


@cache
def rungs() -> tuple[FamilyStatus, ...]:
    """What holds of each family, tried once: a trial waits for the kernel's grace periods."""
    return tuple(probe()) if os.geteuid() == 0 else ()


def families() -> tuple[str, ...]:
    """Those that hold here."""
    return tuple(one.family for one in rungs() if one.holds)


def objects() -> Objects:
    """Every BPF program, map and link of the machine."""
    found = set()
    for sort, command in NEXT_ID.items():
        last = 0
        while True:
            result, after = bpf.bpf(command, last.to_bytes(4, "little") + bytes(8))
            if result < 0:
                break
            last = int.from_bytes(after[4:8], "little")
            found.add((sort, last))
    return found


def followed(*nodes: Node) -> list[Namespace]:
    """What a capture follows: an emulated machine has no namespaces but ours; on other hosts the
    events of others would fill the rings."""
    ours = {node.inum for node in nodes}
    return [space for space in netns.find() if EMULATED or space.inum in ours]


class Net:
    """A client and a server, linked directly and through a router that translates."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.client = lab.namespace("client", track=True)
        self.server = lab.namespace("server", track=True)
        self.router = lab.namespace("router", track=True)
        for a, b in (
            (self.client, self.server),
            (self.client, self.router),
            (self.router, self.server),
        ):
            lab.link(a, b)
        for node in self.nodes:  # what is sent outlives a test, however busy the machine is
            node.sysctl("net.netfilter.nf_conntrack_udp_timeout", UDP_TIMEOUT)
        self.router.sysctl("net.ipv4.ip_forward", 1)
        self.front = self.router.addresses["client"][0]
        self.back = self.server.addresses["router"][0]
        self.router.run(
            ["nft", "-f", "-"],
            stdin=f"""table ip nat {{
                chain pre {{ type nat hook prerouting priority -100;
                    ip daddr {self.front} tcp dport 80 dnat to {self.back}:7000; }}
                chain post {{ type nat hook postrouting priority 100; masquerade; }}
            }}""",
        )

    @property
    def nodes(self) -> tuple[Node, Node, Node]:
        return self.client, self.server, self.router


class Watch:
    """Events, counters, ``conntrack -C`` and ``-S`` of some nodes while the block runs."""

    def __init__(self, capture: Capture, nodes: Sequence[Node]) -> None:
        self.capture = capture
        self.nodes = nodes
        self.events = empty()
        self.lost = 0

    def __enter__(self) -> Watch:
        self.drain()
        self.lost = 0  # before, when others may have filled the rings while nobody read them
        self._counts = self.capture.counts()
        self._stats = {node.inum: node.stats() for node in self.nodes}
        self._sizes = {node.inum: node.count() for node in self.nodes}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.settle()

    def settle(self) -> None:
        """Take what happened until now, and compare it with the kernel's account."""
        self.events = join([self.events, self.drain()])
        assert self.lost == 0
        after = self.capture.counts()
        zero = np.zeros(N_REASONS, np.uint64)
        self.counts = {
            node.inum: (after.get(node.inum, zero) - self._counts.get(node.inum, zero)).astype(int)
            for node in self.nodes
        }
        self.stats = {
            node.inum: {
                name: value - self._stats[node.inum].get(name, 0)
                for name, value in node.stats().items()
            }
            for node in self.nodes
        }
        self.growth = {node.inum: node.count() - self._sizes[node.inum] for node in self.nodes}

    def drain(self, quiet: float = 0.3) -> Events:
        """Poll until nothing has come for ``quiet`` seconds."""
        parts, until = [], time.monotonic() + quiet
        last = False
        while not last:
            # on a busy machine the time may pass between two polls: one more settles it
            last = time.monotonic() >= until
            events, lost = self.capture.poll()
            self.lost += lost
            if len(events):
                parts.append(events)
                until, last = time.monotonic() + quiet, False
            time.sleep(0.01)
        return join(parts)

    def of(self, node: Node, kind: Kind, reason: Reason | None = None) -> Events:
        """The node's events of a kind (and reason)."""
        events = self.events
        keep = (events["netns"] == node.inum) & (events["kind"] == kind)
        if reason is not None:
            keep &= events["reason"] == reason
        found: Events = events[keep]
        return found

    def reasons(self, node: Node) -> Counter[Reason]:
        """How many records of each reason the node has."""
        mine = self.events[self.events["netns"] == node.inum]
        return Counter(Reason(int(reason)) for reason in mine["reason"])

    def reconcile(self) -> None:
        """The books balance in every namespace, whatever the traffic was."""
        tuples = self.capture.info.drop_tuples
        for node in self.nodes:
            counts, stats = self.counts[node.inum], self.stats[node.inum]
            inserts, destroys = (len(self.of(node, kind)) for kind in (Kind.INSERT, Kind.DESTROY))
            assert inserts - destroys == self.growth[node.inum], node.name
            refused = int(counts[Reason.TABLE_FULL] + counts[Reason.NO_MEMORY])
            clashes = int(counts[Reason.CLASH])
            failed = clashes + int(counts[Reason.CHAIN_TOO_LONG] + counts[Reason.FAILED])
            assert refused + clashes == stats["drop"], node.name
            assert failed == stats["insert_failed"], node.name
            assert counts[Reason.EVICTED] == stats["early_drop"], node.name
            resolved = int(counts[Reason.CLASH_RESOLVED])
            if self.capture.info.family in ("fentry", "kprobe"):
                resolved += int(counts[Reason.NAT_CLASH])
            elif self.capture.info.family == "netfilter":  # known as such by its end only
                status = self.of(node, Kind.DESTROY)["status"]
                resolved += int((status & int(Status.NAT_CLASH) != 0).sum())
            assert resolved == stats["clashres"], node.name
            if tuples:
                silent = (Reason.CLASH_RESOLVED, Reason.RING_FULL)
                counted = {r: int(counts[r]) for r in Reason if counts[r] and r not in silent}
                assert counted == dict(self.reasons(node)), (node.name, counted, self.reasons(node))


def flows(events: Events) -> Counter[Flow]:
    """Original tuples as the traffic generators write them."""
    return Counter(
        (
            int(e["proto"]), address_text(e["src"]), int(e["sport"]),
            address_text(e["dst"]), int(e["dport"]),
        )
        for e in events
    )  # fmt: skip


def listed(node: Node) -> Counter[Flow]:
    """``conntrack -L`` of both families, as the traffic generators write flows."""
    found: Counter[Flow] = Counter()
    for family in ("ipv4", "ipv6"):
        for line in node.run(["conntrack", "-L", "-f", family]).splitlines():
            words = line.split()
            first: dict[str, str] = {}
            for word in words:
                name, equals, value = word.partition("=")
                if equals:
                    first.setdefault(name, value)  # the original tuple comes first
            if "type" in first:
                ports = int(first["id"]), int(first["type"]) << 8 | int(first["code"])
            else:
                ports = int(first["sport"]), int(first["dport"])
            found[int(words[1]), first["src"], ports[0], first["dst"], ports[1]] += 1
    return found


def first_packet(
    proto: str, src: str, dst: str, sport: int, dport: int, *, flags: int = 2
) -> bytes:
    """An IPv4 packet that begins a flow: a datagram of no data, or a SYN (or other ``flags``)."""
    source, target = socket.inet_aton(src), socket.inet_aton(dst)
    if proto == "udp":
        number, data = socket.IPPROTO_UDP, struct.pack("!HHHH", sport, dport, 8, 0)
    else:
        number = socket.IPPROTO_TCP
        data = struct.pack("!HHIIBBHHH", sport, dport, 1, 0, 0x50, flags, 1024, 0, 0)
        total = sum(struct.unpack("!16H", source + target + struct.pack("!HH", 6, 20) + data))
        total = (total >> 16) + (total & 0xFFFF)
        checksum = ~(total + (total >> 16)) & 0xFFFF
        data = data[:16] + struct.pack("!H", checksum) + data[18:]
    size = 20 + len(data)
    return struct.pack("!BBHHHBBH4s4s", 0x45, 0, size, 0, 0, 64, number, 0, source, target) + data


def note(seen: Seen, family: str, what: str, how: str = "exact") -> None:
    """For the README's table: how this family sees it here."""
    seen.setdefault(family, {})[what] = how
