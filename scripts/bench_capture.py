"""From the kernel's rings to a batch, and what tracing costs the traffic.

Everything is measured in one run and given as ratios to something known: BCC's own
ring-buffer callback, no tracer at all, and conntrack(8)'s event stream.
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
from typing import Any, cast

from ctrace.capture import open_live
from ctrace.capture.family import Capture
from ctrace.capture.live import in_order
from ctrace.capture.poller import Poller
from ctrace.filters import Filter
from ctrace.kernel import bpf, compiler, layout, programs
from ctrace.kernel.rings import Rings
from ctrace.lab import Lab, Node

Row = dict[str, Any]

RING = 32 << 20
RECORDS = 100_000
PER_RUN = 100

PRODUCER = r"""
#include <linux/types.h>
#include "ring.h"
struct record { u64 words[15]; };
INLINE void fill(struct record *r, u64 i)
{
	int k;
	for (k = 0; k < 15; k++)
		r->words[k] = i + k;
	r->words[0] = boot_ns();
}
int ours(void *ctx)
{
	u64 i, number;
	for (i = 0; i < PER_RUN; i++) {
		struct ctrace_record *r = ring_room(&number);
		if (r) {
			fill((struct record *)r, i);
			ring_done(r, number);
		} else {
			u32 zero = 0;
			u64 *lost = map_lookup(MAP(1), &zero);
			if (lost)
				__sync_fetch_and_add(lost, 1);
		}
	}
	return 0;
}
BPF_RINGBUF_OUTPUT(events, RING_PAGES);
BPF_ARRAY(lost, u64, 1);
int theirs(void *ctx)
{
	u64 i;
	for (i = 0; i < PER_RUN; i++) {
		struct record *r = events.ringbuf_reserve(sizeof(*r));
		if (r) {
			fill(r, i);
			events.ringbuf_submit(r, BPF_RB_NO_WAKEUP);
		} else {
			int zero = 0;
			u64 *n = lost.lookup(&zero);
			if (n)
				__sync_fetch_and_add(n, 1);
		}
	}
	return 0;
}
"""


class Record(ctypes.Structure):
    """The record as a BCC callback sees it."""

    _fields_ = [("words", ctypes.c_uint64 * 15)]


class Producer:
    """Fills our rings, or BCC's, at will."""

    def __init__(self) -> None:
        os.environ["BCC_KERNEL_SOURCE"] = str(compiler.source_dir())
        from bcc import BPF

        own = "FETCH_ADD" in layout.running()
        self.rings = Rings(RING, own=own)
        self._lost = bpf.map_create(bpf.MapType.ARRAY, 4, 8, 1, name="lost")
        self.bpf = BPF(
            text=PRODUCER,
            cflags=[
                f"-I{compiler.source_dir()}",
                f"-DPER_RUN={PER_RUN}",
                f"-DRING_PAGES={RING // 4096}",
                "-Wno-everything",
            ],
        )
        kind = bpf.ProgType.RAW_TRACEPOINT
        names, constants = programs.constant_names(), {"FETCH_ADD": 1} if own else {}
        made = programs.settle(self.bpf.dump_func(b"ours"), names, constants)
        code = programs.link(made, [self.rings.map, self._lost], fetch_add=own)
        self.ours = bpf.prog_load(code, kind, "ours")
        self.theirs = self.bpf.load_func("theirs", int(kind)).fd
        self.seen: dict[int, int] = {}
        self.called = 0

        def callback(_ctx: int, data: int, _size: int) -> int:
            record = ctypes.cast(data, ctypes.POINTER(Record)).contents
            key = record.words[2] ^ record.words[10]
            self.seen[key] = self.seen.get(key, 0) + 1
            self.called += 1
            return 0  # None costs BCC a failing int() an event

        self.bpf["events"].open_ring_buffer(callback)

    def lost(self, ours: bool) -> int:
        """Records that found no room so far."""
        if ours:
            raw = bpf.map_lookup(self._lost, bytes(4), 8) or bytes(8)
            return int.from_bytes(raw, "little")
        return int(self.bpf["lost"][0].value)

    def drain(self, ours: bool) -> int:
        """Take everything there is; how many records."""
        if ours:
            return len(self.rings.poll(hold=0.0))
        before = self.called
        self.bpf.ring_buffer_consume()
        return self.called - before


def drained(producer: Producer) -> list[Row]:
    """Time to take RECORDS records out of a full ring."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for measured in (False, *[True] * 7):  # memory is new to the process once
        for ours in (True, False):
            program = producer.ours if ours else producer.theirs
            for _ in range(RECORDS // PER_RUN):
                bpf.prog_run(program)
            started = time.perf_counter()
            taken = producer.drain(ours)
            if measured:
                times[ours].append((time.perf_counter() - started) / taken)
    ours_ns = statistics.median(times[True]) * 1e9
    theirs_ns = statistics.median(times[False]) * 1e9
    return [
        {
            "name": "ring to batch",
            "ns_per_event": round(ours_ns, 1),
            "events_per_s": round(1e9 / ours_ns),
            "bcc_callback_ns": round(theirs_ns, 1),
            "times_faster": round(theirs_ns / ours_ns, 1),
            "target": "at least 40 times",
        }
    ]


class FromRings:
    """The producer's rings as a hook family's, for the thread that empties those."""

    hold = 0.002

    def __init__(self, producer: Producer) -> None:
        self.poll = lambda: (producer.rings.poll(self.hold), 0)
        self.part = producer.rings.part
        self._rings = producer.rings

    @property
    def interval(self) -> float:
        """Seconds that may pass until the next poll."""
        return self._rings.interval


def batches(producer: Producer, until: float) -> Iterator[int]:
    """Lengths of the batches that a screen of one frame a second gets."""
    poller = Poller(cast(Capture, FromRings(producer)), lambda: False)
    due = time.monotonic() + 1.0
    while time.monotonic() < until:
        poller.wait_for_many(min(due, until) - time.monotonic())
        if time.monotonic() >= due:
            due += 1.0
        yield len(in_order(poller.take().parts))
    poller.stop()


def calls(producer: Producer, until: float) -> Iterator[int]:
    """How many records BCC's callback got each time."""
    while time.monotonic() < until:
        time.sleep(producer.rings.interval)
        yield producer.drain(ours=False)


def paced(producer: Producer, rate: int, seconds: float = 3.0) -> Row:
    """CPU of this process while ``rate`` records a second arrive, up to the batch.

    After a first second, in which memory is new to it.
    """
    row: Row = {"name": f"CPU at {rate:,} events/s"}
    for ours in (True, False):
        program = producer.ours if ours else producer.theirs
        lost = producer.lost(ours)
        # (a fork would share our memory, which it costs us to have back)
        child = subprocess.Popen(
            [python.executable, __file__, str(program), str(rate), str(seconds + 1)],
            pass_fds=[program], stdout=subprocess.PIPE,
        )  # fmt: skip
        assert child.stdout is not None
        child.stdout.read(1)  # it has started
        begun: list[float] = []
        threading.Timer(1.0, lambda: begun.append(time.process_time())).start()  # noqa: B023
        until = time.monotonic() + seconds + 1
        taken = sum((batches if ours else calls)(producer, until))
        used = (time.process_time() - begun[0]) / seconds
        child.communicate()
        producer.drain(ours)
        gone = producer.lost(ours) - lost
        who = "ctrace" if ours else "bcc_callback"
        row[f"{who}_core"] = round(used, 4)
        row[f"{who}_lost"] = round(gone / max(1, gone + taken), 4)
        row[f"{who}_events_per_s"] = round(taken / (seconds + 1))
    return row


def produce(program: int, rate: int, seconds: float) -> None:
    """In a process of its own: run the producer at the rate."""
    print(flush=True)
    started = time.monotonic()
    done = 0
    while (passed := time.monotonic() - started) < seconds:
        while done < rate * passed:
            bpf.prog_run(program)
            done += PER_RUN
        time.sleep(0.001)


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
    producer = Producer()
    rows = drained(producer)
    rows += [paced(producer, 100_000), paced(producer, 1_000_000)]
    rows += kernel_cost()
    rows += flows()
    rows += flood()
    rows += start_up()
    return rows


if __name__ == "__main__":
    if python.argv[1:]:  # what paced() starts
        produce(int(python.argv[1]), int(python.argv[2]), float(python.argv[3]))
        python.exit()
    for row in run():
        print(json.dumps(row))
