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
from collections.abc import Callable, Sequence
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.capture import sys
from ctrace.errors import CtraceError
from ctrace.record import RECORD, WORDS, Events, empty

PAGE: Final = mmap.PAGESIZE
SLOT_WORDS: Final = WORDS + 1
SLOT: Final = SLOT_WORDS * 8

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
        self._slots = np.frombuffer(self._readable, np.uint64, offset=PAGE).reshape(-1, SLOT_WORDS)
        self._headers = np.frombuffer(self._readable, np.uint32, offset=PAGE)[:: SLOT_WORDS * 2]
        self._at = int(self._consumer[0])
        self.was_full = False
        """Whether there was no room for one more at some time since this was last cleared."""

    @property
    def pending(self) -> bool:
        """Whether something was written since the last reading."""
        return int(self._producer[0]) != self._at

    def read(self) -> npt.NDArray[np.uint64]:
        """Committed records, copied out and released: (n, 15) words."""
        pending = (int(self._producer[0]) - self._at) // SLOT
        if pending <= 0:
            return np.empty((0, WORDS), np.uint64)
        self._fence()
        first = (self._at & (self.size - 1)) // SLOT
        headers = self._headers[first : first + pending].copy()
        busy = np.flatnonzero(headers & _BUSY)
        count = int(busy[0]) if len(busy) else pending
        self._fence()
        records = self._slots[first : first + count, 1:].copy()
        self._fence()
        before = self._at
        self._at += count * SLOT
        self._consumer[0] = self._at
        # bpf_ringbuf_reserve() refuses what would make it larger than size - 1. Asked
        # after the release, so that what was refused during the copy is not missed.
        self._fence()
        self.was_full |= int(self._producer[0]) - before + SLOT > self.size - 1
        discarded = headers[:count] & _DISCARD
        return records[discarded == 0] if discarded.any() else records

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
        cpus = sys.possible_cpus()
        self._fds: list[int] = []
        self.rings: list[Ring] = []
        self._held = empty()
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
        if not len(self._held) and not any(ring.pending for ring in self.rings):
            return self._held  # idle costs a glance at each ring
        limit = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - int(hold * 1e9)
        parts = [part for ring in self.rings if len(part := ring.read())]
        events = merge(self._held, parts)
        if settle is not None:
            events = settle(events)
        cut = int(np.searchsorted(events["ts"], limit, side="right"))
        # a copy: a view would keep the whole batch alive for a few rows
        self._held = events[cut:].copy()
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


def merge(held: Events, parts: Sequence[npt.NDArray[np.uint64]]) -> Events:
    """Arrays of (n, 15) words and already sorted records as one array sorted by time."""
    arrays = [held.view(np.uint64).reshape(-1, WORDS)] if len(held) else []
    arrays.extend(parts)
    if not arrays:
        return empty()
    joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    times = joined[:, 0]
    if len(times) > 1 and (times[1:] < times[:-1]).any():
        joined = joined[np.argsort(times, kind="stable")]
    return joined.reshape(-1).view(RECORD)
