"""What tracing costs the traffic, what ``top`` costs beside a flood, and how soon it starts.

Given as ratios within one run: to no tracer at all, and to conntrack(8)'s event stream.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import socket
import statistics
import subprocess
import sys as python
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ctrace.capture import open_live
from ctrace.filters import Filter
from ctrace.kernel import bpf
from ctrace.lab import Lab, Node

Row = dict[str, Any]


class MsgHdr(ctypes.Structure):
    """struct mmsghdr for sendmmsg(2)."""

    _fields_ = [
        ("name", ctypes.c_void_p), ("namelen", ctypes.c_uint32), ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t), ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t), ("flags", ctypes.c_int), ("padding", ctypes.c_int),
        ("len", ctypes.c_size_t),
    ]  # fmt: skip


class Flood:
    """Sends one datagram on each of many new flows, as fast as the kernel takes them."""

    PORTS = 50_000

    def __init__(self, node: Node, target: str) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._node = node
        address = socket.inet_aton(target)
        self._payload = ctypes.create_string_buffer(b"x", 1)
        self._iov = (ctypes.c_size_t * 2)(ctypes.addressof(self._payload), 1)
        names = bytearray()
        for port in range(1, self.PORTS + 1):
            names += socket.AF_INET.to_bytes(2, "little") + port.to_bytes(2, "big") + address
            names += bytes(8)
        self._names = ctypes.create_string_buffer(bytes(names), len(names))
        base = ctypes.addressof(self._names)
        self._messages = (MsgHdr * self.PORTS)()
        for i in range(self.PORTS):
            self._messages[i] = MsgHdr(base + 16 * i, 16, ctypes.addressof(self._iov), 1)

    def send(self, flows: int) -> float:
        """CPU seconds of this thread for ``flows`` new flows: other load does not count."""
        sockets = [self._node.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in
                   range(-(-flows // self.PORTS))]  # fmt: skip
        at = ctypes.addressof(self._messages)
        size = ctypes.sizeof(MsgHdr)
        started = time.thread_time()
        for sender in sockets:
            done = 0
            while done < self.PORTS:
                count = min(1024, self.PORTS - done)
                sent = self._libc.sendmmsg(
                    sender.fileno(), ctypes.c_void_p(at + done * size), count, 0
                )
                if sent <= 0:
                    raise OSError(ctypes.get_errno(), "sendmmsg")
                done += sent
        passed = time.thread_time() - started
        for sender in sockets:
            sender.close()
        return passed


FLOWS = 100_000
ROUNDS = 11


def over(without: list[float], with_it: list[float]) -> float:
    """What it adds: the median of the rounds' own differences, as the machine's pace drifts."""
    return statistics.median(b - a for a, b in zip(without, with_it, strict=True))


def _children() -> float:
    """CPU seconds of the children that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def _none(_node: Node) -> Iterator[Callable[[], int]]:
    yield lambda: FLOWS


@contextlib.contextmanager
def _ctrace(node: Node) -> Iterator[Callable[[], int]]:
    source = open_live(Filter(netns=node.inum), seed=False)
    seen = {"insert": 0, "lost": 0}

    def consume() -> None:
        for batch in source.batches(0.1):
            seen["insert"] += int((batch.events["kind"] == 1).sum())
            seen["lost"] += batch.lost

    thread = threading.Thread(target=consume, daemon=True)
    thread.start()
    time.sleep(0.3)
    try:
        yield lambda: seen["insert"]
    finally:
        source.close()
        thread.join(timeout=5)


@contextlib.contextmanager
def _conntrack(node: Node) -> Iterator[Callable[[], int]]:
    with tempfile.NamedTemporaryFile() as out:
        child = node.start(["conntrack", "-E", "-e", "NEW,DESTROY"], stdout=out,
                           stderr=subprocess.DEVNULL)  # fmt: skip
        time.sleep(0.3)
        try:
            yield lambda: Path(out.name).read_bytes().count(b"[NEW]")
        finally:
            child.kill()
            child.wait()


def flows() -> list[Row]:
    """A flow's lifecycle (insert, then flush) without a tracer, with ctrace, with conntrack -E."""
    rows = []
    with Lab() as lab:
        a, b = lab.namespace("a", track=True), lab.namespace("b")
        lab.link(a, b)
        address = b.addresses["a"][0]
        # the other end throws packets for a stranger's station away at once
        a.run(["ip", "neigh", "replace", address, "lladdr", "02:00:00:00:00:99", "dev", "to-b",
               "nud", "permanent"])  # fmt: skip
        flood = Flood(a, address)
        flood.send(FLOWS)
        a.run(["conntrack", "-F"])
        times: dict[str, list[float]] = {}
        seen: dict[str, list[int]] = {}
        for _ in range(ROUNDS):
            for name, tracer in (("none", _none), ("ctrace", _ctrace), ("conntrack", _conntrack)):
                with tracer(a) as count:
                    passed = flood.send(FLOWS)
                    time.sleep(0.4)
                    got = count()
                    started = _children()
                    a.run(["conntrack", "-F"])
                    passed += _children() - started
                times.setdefault(name, []).append(passed / FLOWS * 1e9)
                seen.setdefault(name, []).append(got)
        base = statistics.median(times["none"])
        added = {name: over(times["none"], values) for name, values in times.items()}
        for name in times:
            rows.append(
                {
                    "name": f"flow lifecycle, {name}",
                    "ns": round(base + added[name]),
                    "added": f"{added[name] / base:+.1%}",
                    "flows_per_s": round(1e9 / (base + added[name])),
                    "inserts_not_seen": f"{1 - statistics.median(seen[name]) / FLOWS:.2%}",
                    "note": {
                        "conntrack": "conntrack -E, its default buffer",
                        "ctrace": "target: at most a fifth of what conntrack -E adds; "
                        f"measured {added['ctrace'] / max(1, added['conntrack']):.2f}",
                    }.get(name, ""),
                }
            )
    return rows


def kernel_cost() -> list[Row]:
    """BPF run time for each event and each established packet, from the kernel's own statistics."""
    with Lab() as lab:
        a, b = lab.namespace("a", track=True), lab.namespace("b", track=True)
        lab.link(a, b)
        target = (b.addresses["a"][0], 9)
        sink = b.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sink.bind(("", 9))
        sender = a.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender.connect(target)

        sink.setblocking(False)

        def send(packets: int) -> float:
            """Nanoseconds a packet: the median of hundreds, so what interrupts some counts not."""
            passed = []
            for _ in range(packets // 100):
                started = time.thread_time_ns()
                for _ in range(100):
                    sender.send(b"x")
                passed.append((time.thread_time_ns() - started) / 100)
                with contextlib.suppress(BlockingIOError):  # a full buffer would drop packets
                    while True:
                        sink.recv(16)
            return statistics.median(passed)

        sender.send(b"x")
        select.select([sink], [], [])
        reply_to = sink.recvfrom(16)[1]
        sink.sendto(b"x", reply_to)  # both ends have it ESTABLISHED from here on
        sender.recv(16)
        send(2000)
        plain, traced, inside = [], [], []
        for _ in range(ROUNDS):
            plain.append(send(20_000))
            source = open_live(seed=False)
            try:
                traced.append(send(20_000))
                stats = bpf.enable_stats()
                capture: Any = source._capture  # type: ignore[attr-defined]
                before = capture.run_time()
                send(20_000)
                inside.append((capture.run_time() - before) / 20_000)
                os.close(stats)
            finally:
                source.close()
        sink.close()
        sender.close()
    base, added = statistics.median(plain), over(plain, traced)
    return [
        {
            "name": "established packet, sent and received",
            "ns_without": round(base),
            "ns_added": round(added),
            "added": f"{added / base:+.1%}",
            "bpf_run_ns": round(statistics.median(inside)),
            "note": "two hosts' worth of hooks a packet; target: under 3 %",
        }
    ]


def flood() -> list[Row]:
    """``ctrace top`` beside a table that is filled and flushed over and over."""
    with Lab() as lab:
        a, b = lab.namespace("a", track=True), lab.namespace("b")
        lab.link(a, b)
        source = Flood(a, b.addresses["a"][0])
        top = subprocess.Popen(
            [python.executable, "-I", "-m", "ctrace", "top", "10", "--once", "-o", "json",
             "--netns", str(a.inum)],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        time.sleep(2)  # it has started
        flows, until = 0, time.monotonic() + 6
        while time.monotonic() < until:
            source.send(2 * Flood.PORTS)
            flows += 2 * Flood.PORTS
            a.run(["conntrack", "-F"])
        said = json.loads(top.communicate()[0])
    totals, cost = said["totals"], said["self"]
    return [
        {
            "name": "ctrace top in a flood",
            "events": 2 * flows,
            "counted": totals["insert"] + totals["destroy"],
            "lost": said["lost"],
            "core_over_10_s": round(cost["cpu"], 3),
            "rss_mib": round(cost["rss"] / (1 << 20), 1),
            "note": "inserts by one processor, a flush of every 100,000; the interval is 10 s",
        }
    ]


def start_up() -> list[Row]:
    """From the command to the first snapshot, warm."""
    times, rss, floor = [], 0, []
    # as when installed: modules are compiled once, not at each start
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def timed(*command: str) -> tuple[float, str]:
        started = time.perf_counter()
        done = subprocess.run(
            [python.executable, *command],
            capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
        return time.perf_counter() - started, done.stdout

    for _ in range(7):
        seconds, output = timed("-I", "-m", "ctrace", "top", "0.1", "--once", "-o", "json")
        times.append(seconds - 0.1)
        rss = json.loads(output)["self"]["rss"]
        floor.append(timed("-c", "import numpy, click")[0])
    ours, least = statistics.median(times[1:]), statistics.median(floor[1:])
    return [
        {
            "name": "start to first snapshot",
            "seconds": round(ours, 3),
            "times_imports": round(ours / least, 1),
            "rss_mib": round(rss / (1 << 20), 1),
            "note": "warm caches, the 100 ms interval taken off; Python importing numpy and click "
            f"alone: {least:.3f} s; target: under 0.5 s",
        }
    ]


def run() -> list[Row]:
    """Every measurement."""
    return [*kernel_cost(), *flows(), *flood(), *start_up()]


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
