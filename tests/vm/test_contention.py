"""Waits for conntrack's locks, against what perf records of the same time.

Several CPUs work on one entry: its timeout is zero, so each packet deletes it and makes
it anew, under the same two of the table's locks. A lock's second waiter is only traced
with paravirtual spin locks, the third on every machine: elsewhere this takes four CPUs
(``scripts/vm KERNEL --cpus 4``). There the table is resized over and over as well, which
takes all locks, so that many wait at once even where the CPUs seldom run at the same time.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from kit.costs import PORT, pair

from ctrace.cost import contention
from ctrace.cost import objects as measuring
from ctrace.cost.contention import LOCKS, NOT_KEPT, Contention
from ctrace.cost.objects import WAITS, Objects
from ctrace.cost.result import Wait
from ctrace.errors import CtraceError
from ctrace.kernel import bpf, symbols
from ctrace.kernel.bpf import kernel_version
from ctrace.lab import Node

CPUS = sorted(os.sched_getaffinity(0))
MACHINE = bool(os.environ.get("CTRACE_VM"))
BUCKETS = Path("/proc/sys/net/netfilter/nf_conntrack_buckets")

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
traced = pytest.mark.skipif(
    kernel_version() < (5, 19), reason="no contention tracepoints before Linux 5.19"
)
enough = pytest.mark.skipif(
    MACHINE and len(CPUS) < 4, reason="an emulated machine of two CPUs traces no waits"
)

LOCKS_AT = contention.BOUNDS
HAMMER = """
import os, socket, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
sender.bind(("", 20001))
sender.connect((sys.argv[2], int(sys.argv[3])))
sender.setblocking(False)
while True:
    try:
        sender.send(b"x")
    except OSError:
        pass
"""


RESIZE = """
import sys
while True:
    for size in "512", "1024":
        with open(sys.argv[1], "w") as file:
            file.write(size)
"""


@contextlib.contextmanager
def hammering(a: Node, b: Node) -> Iterator[None]:
    """Every CPU sends the same flow from a to b."""
    a.sysctl("net.netfilter.nf_conntrack_udp_timeout", 0)
    target = b.addresses[a.name][0]
    load = [a.start([sys.executable, "-c", HAMMER, str(c), target, str(PORT)]) for c in CPUS]
    kept = BUCKETS.read_text()
    if MACHINE:
        load.append(subprocess.Popen([sys.executable, "-c", RESIZE, str(BUCKETS)]))
    try:
        yield
    finally:
        for process in load:
            process.kill()
        for process in load:
            process.wait()
        if MACHINE:
            BUCKETS.write_text(kept)


@dataclass(frozen=True)
class Seen:
    """One wait for a lock of conntrack's that perf saw."""

    began: float
    ended: float


class Perf:
    """``perf record`` of all waits while the block runs, by the monotonic clock."""

    def __init__(self, folder: Path) -> None:
        self._data = folder / "perf.data"

    def __enter__(self) -> Perf:
        ready = self._data.with_name("ready")
        self._process = subprocess.Popen(
            ["perf", "record", "-q", "-a", "-g", "-m", "4M", "-k", "CLOCK_MONOTONIC",
             "-e", "lock:contention_begin", "-e", "lock:contention_end", "-o", str(self._data),
             "sh", "-c", f"touch {ready}; exec sleep 600"],
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not ready.exists():  # perf starts its command when it sees all events
            assert self._process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait()

    def waits(self, names: symbols.Symbols) -> list[Seen]:
        """Those that ended, of what conntrack's code wanted."""
        text = subprocess.run(
            ["perf", "script", "-i", str(self._data), "-F", "cpu,time,event,trace,ip"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        event = re.compile(r"\[(\d+)\]\s+([\d.]+):\s+lock:contention_(begin|end):\s+(\w+)")
        waiting: dict[tuple[str, str], float] = {}
        found = []
        self.text = text
        for block in text.split("\n\n"):
            match = event.match(block.strip())
            if match is None:
                continue
            cpu, at, which, lock = match.groups()
            if which == "end" and (cpu, lock) in waiting:
                found.append(Seen(waiting.pop((cpu, lock)), float(at)))
            elif which == "begin":
                calls = [int(line, 16) for line in block.strip().splitlines()[1:]]
                if is_conntracks(int(lock, 16), calls, names):
                    waiting[cpu, lock] = float(at)
        return found


def is_conntracks(lock: int, calls: list[int], names: symbols.Symbols) -> bool:
    """By the lock's address where the kernel tells that, else by who wants it."""
    if names.data("nf_conntrack_locks"):
        bounds = ((names.data(symbol), size) for _, symbol, size in LOCKS_AT)
        return any(start <= lock < start + size for start, size in bounds)
    locking = re.compile(r"_*(raw|pv|native|queued|trace|bpf)_.*|_*traceiter.*")
    wanted_by = next((name for name in map(names.name, calls) if not locking.match(name)), "")
    return re.match(r"(__)?nf_(conntrack|ct)_", wanted_by) is not None


@dataclass(frozen=True)
class Counted:
    """What one way of counting said."""

    waits: tuple[Wait, ...]
    unplaced: int
    """What it could not place."""

    @property
    def count(self) -> int:
        return sum(wait.count for wait in self.waits)


@dataclass(frozen=True)
class Measured:
    """What was seen of conntrack's locks while the CPUs hammered, in each way at once."""

    ways: dict[str, Counted]
    theirs: list[Seen]
    """What perf saw while all surely looked."""
    most: int
    """How many it saw from before the first was attached until after the last was read."""

    def agrees(self, count: int) -> bool:
        """Whether perf saw as many: others may wait while ours are attached and read."""
        return 0.98 * len(self.theirs) - 2 <= count <= 1.02 * self.most + 2


WAYS = ("by address", "by code", "without room")
ENOUGH = 200
"""Waits: as many tell what more would."""


def attached(way: str, objects: list[Objects], names: symbols.Symbols) -> Contention:
    """One that counts in this way from now on."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "by code":
            patch.setattr(contention, "BOUNDS", ())
        elif way == "without room":
            entries = len(LOCKS) + 1
            maps = [(*m[:4], entries) if str(m[0]) == "waits" else m for m in measuring._MAPS]
            patch.setattr(measuring, "_MAPS", maps)
        objects.append(Objects())
        return Contention(objects[-1], names)


def enough_of(objects: Objects) -> bool:
    """Whether so many waits are counted by now; where the table is resized, also such of it."""
    keys, values = bpf.map_items(objects.maps["waits"], 8, 24, WAITS)
    counts = values.reshape(-1, 24).view(np.uint64)[:, 0]
    of_all = np.array([key.tobytes()[4] == LOCKS.index("all table locks") for key in keys], bool)
    return bool(counts.sum() >= ENOUGH and (not MACHINE or counts[of_all].sum()))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """All are attached before the load begins, and read when it has ended."""
    names = symbols.kernel()
    objects: list[Objects] = []
    try:
        with pair(track_server=False) as (a, b), Perf(tmp_path_factory.mktemp("perf")) as perf:
            first = time.monotonic()
            ours = {way: attached(way, objects, names) for way in WAYS}
            began = time.monotonic()
            with hammering(a, b):
                deadline = time.monotonic() + (60 if MACHINE else 2)
                while not enough_of(objects[0]) and time.monotonic() < deadline:
                    time.sleep(0.2)
            names.learn_programs()
            ended = time.monotonic()
            ways = {way: Counted(one.read(), one.unplaced) for way, one in ours.items()}
            read = time.monotonic()
    finally:
        for one in objects:
            one.close()
    found = perf.waits(names)
    theirs = [seen for seen in found if began <= seen.began and seen.ended <= ended]
    if len(theirs) <= 20 and not MACHINE and len(CPUS) < 4:
        pytest.skip("this machine traces no second waiter, or few")
    assert len(theirs) > 20, (ways, perf.text[:2000], began, ended)
    most = sum(first <= seen.ended and seen.began <= read for seen in found)
    return Measured(ways, theirs, most)


@traced
@enough
@pytest.mark.parametrize("known", WAYS[:2])
def test_waits_are_counted_as_perf_counts_them(known: str, measured: Measured) -> None:
    if known == "by address" and not symbols.kernel().data("nf_conntrack_locks"):
        pytest.skip("this kernel's symbols tell no addresses of data")
    seen, theirs = measured.ways[known], measured.theirs
    # A stack may collide with another: by code it is then unknown whose lock that was.
    placed, unplaced = seen.count, seen.unplaced
    assert known == "by code" or not unplaced
    assert any(map(measured.agrees, range(placed, placed + unplaced + 1))), (placed, unplaced)
    assert placed > 0.5 * len(theirs)
    locks = {wait.lock for wait in seen.waits}
    assert locks <= set(LOCKS[:2] if known == "by address" else LOCKS[3:])
    # What the load is about: an entry that is made, or its end.
    stacks = [wait.stack.split(";") for wait in seen.waits]
    mine = [calls for calls in stacks if "udp_sendmsg" in calls]
    assert mine
    assert all({"__nf_conntrack_confirm", "nf_conntrack_in"} & set(calls) for calls in mine)
    assert all(calls[-1].startswith(("nf_conntrack_", "nf_ct_")) for calls in mine)
    assert not any("bpf" in wait.stack for wait in seen.waits)
    # Perf's waits also hold what taking the stacks takes; ours begin after that.
    lengths = [one.ended - one.began for one in theirs]
    assert 0.1 < sum(wait.total_ns for wait in seen.waits) / 1e9 / sum(lengths) < 1.1
    # Ours may end after perf has taken a stack at the end of the wait.
    assert max(wait.longest_ns for wait in seen.waits) / 1e9 < 2 * max(lengths)


@traced
@enough
def test_waits_without_room_for_their_stack_are_counted_too(measured: Measured) -> None:
    seen = measured.ways["without room"]
    if symbols.kernel().data("nf_conntrack_locks"):
        assert measured.agrees(seen.count), (seen.count, len(measured.theirs), measured.most)
        assert NOT_KEPT in {wait.stack for wait in seen.waits}
        assert seen.unplaced == 0
    else:  # for whichever locks
        assert seen.count + seen.unplaced >= 0.98 * len(measured.theirs)
        assert seen.unplaced > 0


@traced
@enough
@pytest.mark.skipif(not MACHINE, reason="changes the whole machine: in scripts/vm only")
def test_a_table_that_is_resized_keeps_all_waiting(measured: Measured) -> None:
    """nf_conntrack_hash_resize takes all locks of the table and one that bars the others."""
    waits = [wait for wait in measured.ways["by address"].waits if wait.lock == LOCKS[1]]
    assert waits, "nobody waited for the lock of all locks"
    assert all(wait.stack.split(";")[-1].startswith(("nf_conntrack_", "nf_ct_")) for wait in waits)


def test_an_older_kernel_is_said_to_have_no_such_tracepoints() -> None:
    objects = Objects()
    try:
        if kernel_version() < (5, 19):
            with pytest.raises(CtraceError, match="no contention tracepoints"):
                Contention(objects, symbols.kernel())
        else:
            assert isinstance(Contention(objects, symbols.kernel()).read(), tuple)
    finally:
        objects.close()
