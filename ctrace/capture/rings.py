"""The per-CPU ring buffers, memory-mapped: from the kernel's pages to one sorted array.

The kernel maps a BPF ring buffer's data twice in a row, so a batch that wraps is
still one slice; a record with its 8-byte header fills 128 bytes, so a ring is an
array. Order of accesses (kernel/bpf/ringbuf.c): producer position, headers, payload,
consumer position. On x86 loads and stores keep their order; elsewhere a fence stands
between the steps.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
import os
import platform
import time
from bisect import bisect_right
from collections.abc import Callable
from typing import Final, Optional

import numpy as np

from ctrace.capture import sys
from ctrace.errors import CtraceError
from ctrace.record import RECORD, ROW, Events, Rows, by_time, empty

PAGE: Final = mmap.PAGESIZE
SLOT: Final = 8 + RECORD.itemsize

CHUNK: Final = 4096
"""Slots (512 KiB) read at a time: their payload is copied while still in the cache to
which looking at their headers brought them."""
BURST: Final = 800_000
"""Records a second on one CPU that a ring must have room for between two readings: a
flush deletes half a million entries a second, nothing makes as many."""
QUICK: Final = 0.02
SLOW: Final = 0.05
"""Seconds between two readings while much, and while little comes: each reading costs
the same for few records, and many are better read before they leave the cache."""
MUCH: Final = 8192
"""Records of one reading, 1 MiB in the rings."""

_BUSY: Final = 1 << 31
_DISCARD: Final = 1 << 30
_SEQ_CST: Final = 5


def _fence() -> Callable[[], None]:
    """What keeps accesses in order on this machine; nothing is needed on x86."""
    if platform.machine() in ("x86_64", "i686"):
        return lambda: None
    library = ctypes.util.find_library("atomic")
    if library is None:
        raise CtraceError("libatomic is missing, which reading the rings needs here: install it")
    fence = ctypes.CDLL(library).atomic_thread_fence
    return lambda: fence(_SEQ_CST)


class Ring:
    """One mapped ring buffer of fixed 128-byte slots."""

    def __init__(self, fd: int, size: int) -> None:
        self.size = size
        self._fence = _fence()
        self._writable = mmap.mmap(
            fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0
        )
        self._readable = mmap.mmap(
            fd, PAGE + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=PAGE
        )
        self._consumer = np.frombuffer(self._writable, np.uint64, 1)
        self._producer = np.frombuffer(self._readable, np.uint64, 1)
        self._slots: Rows = np.ndarray(
            2 * size // SLOT, ROW, self._readable, PAGE + SLOT - RECORD.itemsize, (SLOT,)
        )
        self._headers = np.frombuffer(self._readable, np.uint32, offset=PAGE)[:: SLOT // 4]
        self._at = int(self._consumer[0])
        self.was_full = False
        """Whether there was no room for one more at some time since this was last cleared."""

    @property
    def pending(self) -> int:
        """How many records were begun since the last reading."""
        return (int(self._producer[0]) - self._at) // SLOT

    def read(self, into: Rows) -> tuple[int, bool]:
        """Copy out and release at most as many records as ``into`` has room for, which
        must be pending: how many there were before the first that is not written yet, and
        whether they are in time order, asked while they are in the cache."""
        left, stored, ordered = len(into), 0, True
        times = into.view(RECORD)["ts"]
        while left:
            slots = min(left, CHUNK)
            left -= slots
            first = (self._at & (self.size - 1)) // SLOT
            self._fence()
            headers, good = self._headers[first : first + slots], None
            if int(headers.max()) >= _DISCARD:
                headers = headers.copy()
                busy = np.flatnonzero(headers & _BUSY)
                if len(busy):
                    slots, left = int(busy[0]), 0
                good = np.flatnonzero(headers[:slots] & _DISCARD == 0)
            self._fence()
            rows = self._slots[first : first + slots]
            if good is not None:
                rows = rows[good]
            into[stored : stored + len(rows)] = rows
            if ordered:
                new = times[max(stored - 1, 0) : stored + len(rows)]
                ordered = not (new[1:] < new[:-1]).any()
            stored += len(rows)
            self._release(slots)
        return stored, ordered

    def _release(self, slots: int) -> None:
        self._fence()
        before = self._at
        self._at += slots * SLOT
        self._consumer[0] = self._at
        # bpf_ringbuf_reserve() refuses what would make it larger than size - 1. Asked
        # after the release, so that what was refused during the copy is not missed.
        self._fence()
        self.was_full |= int(self._producer[0]) - before + SLOT > self.size - 1

    def close(self) -> None:
        """Unmap."""
        del self._consumer, self._producer, self._slots, self._headers
        self._writable.close()
        self._readable.close()


class Rings:
    """One ring per possible CPU, and the array of maps through which programs find theirs."""

    def __init__(self, size: int) -> None:
        """``size`` bytes each, rounded up to a power of two. Raises BpfError."""
        self.size = max(PAGE, 1 << (size - 1).bit_length())
        self._slow = min(max(self.size // SLOT / BURST, QUICK), SLOW)
        self.interval = self._slow
        """Seconds that may pass until the next reading."""
        cpus = sys.possible_cpus()
        self._fds: list[int] = []
        self.rings: list[Ring] = []
        self._held: Rows = np.empty(0, ROW)
        self.map = -1
        try:
            for cpu in range(cpus):
                self._fds.append(
                    sys.map_create(sys.MapType.RINGBUF, 0, 0, self.size, name="ctrace_ring")
                )
                self.rings.append(Ring(self._fds[-1], self.size))
                if cpu == 0:
                    self.map = sys.map_create(
                        sys.MapType.ARRAY_OF_MAPS, 4, 4, cpus, inner=self._fds[0], name="rings"
                    )
                sys.map_update(
                    self.map, cpu.to_bytes(4, "little"), self._fds[-1].to_bytes(4, "little")
                )
        except BaseException:
            self.close()
            raise

    def poll(
        self, hold: float = 0.002, settle: Optional[Callable[[Events], Events]] = None
    ) -> Events:
        """New records of all CPUs by time, except those younger than ``hold`` seconds.

        What is held back comes with the next call, so that records of successive
        calls are in time order although CPUs commit theirs at slightly different times.
        ``settle`` sees all of them, also the held ones, before that.
        """
        limit = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - int(hold * 1e9)
        pending = [ring.pending for ring in self.rings]
        self.interval = QUICK if sum(pending) > MUCH else self._slow
        count = len(self._held)
        if not count and not any(pending):
            return empty()  # idle costs a glance at each ring
        rows = np.empty(count + sum(pending), ROW)
        rows[:count] = self._held
        times, ordered = rows.view(RECORD)["ts"], True
        for ring, slots in zip(self.rings, pending, strict=True):
            if not slots:
                continue
            taken, in_order = ring.read(rows[count : count + slots])
            if taken:
                ordered &= in_order and not (count and times[count] < times[count - 1])
            count += taken
        events = rows[:count].view(RECORD)
        if not ordered:
            events = by_time(events)
        if settle is not None:
            events = settle(events)
        times = events["ts"]
        cut = len(times)
        if cut and times[-1] > limit:
            cut = bisect_right(times, limit)  # numpy's would copy the column first
        # a copy: a view would keep the whole batch alive for a few rows
        self._held = events[cut:].view(ROW).copy()
        return events[:cut]

    def take_was_full(self) -> bool:
        """Whether a ring was full since the last call: only then can records be missing."""
        found = any(ring.was_full for ring in self.rings)
        for ring in self.rings:
            ring.was_full = False
        return found

    def close(self) -> None:
        """Unmap and close everything."""
        for ring in self.rings:
            ring.close()
        for fd in (*self._fds, self.map):
            if fd >= 0:
                os.close(fd)
        self.rings, self._fds, self.map = [], [], -1
