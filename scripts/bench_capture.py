"""From the kernel's rings to a batch, beside BCC's own ring-buffer callback in the same run."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys as python
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

from ctrace.capture.family import Capture
from ctrace.capture.poller import Poller, in_order
from ctrace.kernel import bpf, compiler, layout, programs
from ctrace.kernel.rings import Rings

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


def run() -> list[Row]:
    """Every measurement."""
    producer = Producer()
    rows = drained(producer)
    rows += [paced(producer, 100_000), paced(producer, 1_000_000)]
    return rows


if __name__ == "__main__":
    if python.argv[1:]:  # what paced() starts
        produce(int(python.argv[1]), int(python.argv[2]), float(python.argv[3]))
        python.exit()
    for row in run():
        print(json.dumps(row))
