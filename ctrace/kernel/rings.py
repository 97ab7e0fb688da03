"""The per-CPU rings, memory-mapped: from the kernel's pages to one sorted array.

Two sorts, as in bpf/ring.h: arrays of our own and, where the kernel or the machine cannot
have those, BPF ring buffers. A record with the 8 bytes before it fills 128, so a ring is an
array; the kernel maps a ring buffer's data twice in a row, so a batch that wraps is still
one slice. Order of accesses (kernel/bpf/ringbuf.c): producer position, headers, payload,
consumer position; for our own likewise: next number, numbers of places, records, read. On
x86 loads and stores keep their order; elsewhere a fence stands between the steps.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys as python
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Final, Optional, Protocol

import numpy as np
import numpy.typing as npt

from ctrace.errors import CtraceError
from ctrace.kernel import bpf
from ctrace.record import RECORD, ROW, Events, Rows, boot_ns, by_time, empty

PAGE: Final = mmap.PAGESIZE
SLOT: Final = 8 + RECORD.itemsize

CHUNK: Final = 4096
"""Slots (512 KiB) read at a time, so that the payload is copied while it is still in the cache,
right after the headers were checked."""
BURST: Final = 2_000_000
"""Records per second on one CPU that a ring must absorb between two readings. A flush deletes 1.5
million entries a second, and nothing creates entries as fast."""
BRIEF: Final = 0.005
OFTEN: Final = 0.02
SELDOM: Final = 0.03
"""Seconds between two readings: BRIEF in a flood, OFTEN from a small ring, SELDOM from one with
room enough. A flood gives no warning, so these are short, too. Each reading costs the same,
and records cost no more after they have left the cache of who wrote them."""
ROOM: Final = 1 << 15
"""Records. Minimum contiguous space for one batch (4 MB)."""
SLEEPING: Final = 1 << 16
"""Bytes at most for the ring of a CPU that is offline when the rings are made: some machines could
have hundreds of CPUs and have few. A CPU that comes online later keeps the small ring."""
ROOMS: Final = 3
"""Buffers: one being filled, one waiting, one being read."""

_BUSY: Final = 1 << 31
_DISCARD: Final = 1 << 30
_SEQ_CST: Final = 5


def _fence() -> Callable[[], None]:
    """What keeps accesses in order on this machine; nothing is needed on x86."""
    if platform.machine() in ("x86_64", "i686"):
        return lambda: None
    try:  # by its name: a search through the host's tools finds none that came with ctrace
        fence = ctypes.CDLL("libatomic.so.1").atomic_thread_fence
    except OSError:
        raise CtraceError(
            "libatomic is missing, which reading the rings needs here: install libatomic1 "
            "(Debian, Ubuntu) or libatomic (Fedora, RHEL)"
        ) from None
    return lambda: fence(_SEQ_CST)


class Ring(Protocol):
    """One CPU's ring."""

    was_full: bool
    """Whether the ring was ever too full for one more record since this was last cleared."""

    @property
    def pending(self) -> int:
        """How many records were started since the last reading."""

    def read(self, into: Rows) -> tuple[int, bool]:
        """Copy out and release at most as many records as ``into`` has room for, which
        must be pending: how many there were before the first that is not written yet, and
        whether they are in time order, asked while they are in the cache."""

    def close(self) -> None:
        """Unmap."""


class ArrayRing:
    """One CPU's places in the array of bpf/ring.h."""

    NEXT, LIMIT, FIRST, MASK, READ = 0, 1, 2, 3, 8
    """Words of ``struct ring``."""
    SPARE: Final = 64
    """Slots above the limit. There must be more of them than contexts that can interrupt one
    another between checking for space and taking it."""

    def __init__(self, mapped: mmap.mmap, cpu: int, first: int, slots: int) -> None:
        """Set the ring up. ``mapped``: the whole array; ``first``: its first place in it."""
        self._slots = slots
        self._limit = slots - min(self.SPARE, slots // 2)
        self._ring = np.frombuffer(mapped, np.uint64, SLOT // 8, SLOT * cpu)
        self._ring[[self.LIMIT, self.FIRST, self.MASK]] = self._limit, first, slots - 1
        at = SLOT * first
        self._rows: Rows = np.ndarray(slots, ROW, mapped, at + SLOT - RECORD.itemsize, (SLOT,))
        self._ready = np.frombuffer(mapped, np.uint64, slots * SLOT // 8, at)[:: SLOT // 8]
        self._at = 0
        self.was_full = False

    @property
    def pending(self) -> int:
        """How many records were started since the last reading."""
        return int(self._ring[self.NEXT]) - self._at

    def read(self, into: Rows) -> tuple[int, bool]:
        """As :meth:`Ring.read`."""
        left, stored, ordered = len(into), 0, True
        times = into.view(RECORD)["ts"]
        while left:
            first = self._at & (self._slots - 1)
            count = min(left, CHUNK, self._slots - first)
            left -= count
            numbers = np.arange(self._at + 1, self._at + 1 + count, dtype=np.uint64)
            missing = self._ready[first : first + count] != numbers
            if missing.any():
                count, left = int(missing.argmax()), 0
            into[stored : stored + count] = self._rows[first : first + count]
            ordered = ordered and _in_order(times, stored, stored + count)
            stored += count
            before = self._at
            self._at += count
            self._ring[self.READ] = self._at
            # asked after the release, so that what was refused during the copy is not missed
            self.was_full |= int(self._ring[self.NEXT]) - before >= self._limit
        return stored, ordered

    def close(self) -> None:
        """Let go of the array."""
        del self._ring, self._rows, self._ready


class BufferRing:
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

    @property
    def pending(self) -> int:
        """How many records were started since the last reading."""
        return (int(self._producer[0]) - self._at) // SLOT

    def read(self, into: Rows) -> tuple[int, bool]:
        """As :meth:`Ring.read`."""
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
            ordered = ordered and _in_order(times, stored, stored + len(rows))
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
        del self._writable, self._readable


def _in_order(times: npt.NDArray[np.uint64], first: int, end: int) -> bool:
    """Whether records ``first`` to ``end`` are in time order, also relative to the one before."""
    new = times[max(first - 1, 0) : end].copy()  # side by side, they are compared in no time
    return not (new[1:] < new[:-1]).any()


def one_piece(parts: Sequence[Events]) -> Optional[Events]:
    """What :meth:`Rings.poll` returned in successive calls as one array, without a copy.

    None when it does not lie side by side.
    """
    room = parts[0].base if parts else None
    if not isinstance(room, np.ndarray) or room.dtype != ROW:
        return None
    begin = end = (_address(parts[0]) - _address(room)) // ROW.itemsize
    for part in parts:
        if part.base is not room or _address(part) != _address(room) + end * ROW.itemsize:
            return None
        end += len(part)
    return room[begin:end].view(RECORD)


def _address(array: npt.NDArray[np.void]) -> int:
    return int(array.__array_interface__["data"][0])


def _references(rooms: list[Rows], at: int) -> int:
    return python.getrefcount(rooms[at])


_UNUSED: Final = _references([np.empty(0, ROW)], 0)
"""The reference count of an array that only its list holds; it depends on the interpreter."""


class Rings:
    """One ring for each possible CPU, and the map where programs find their ring."""

    def __init__(self, size: int, *, own: bool = False) -> None:
        """``size`` bytes for each CPU that runs, rounded up to a power of two. Raises BpfError.

        ``own``: arrays, for programs compiled with FETCH_ADD; else ring buffers.
        """
        self.size = max(PAGE, 1 << (size - 1).bit_length())
        self._calm: Final = min(max(self.size // SLOT / BURST, OFTEN), SELDOM)
        self.interval = self._calm
        """Seconds that may pass until the next reading."""
        self._read_at = boot_ns()
        self._fds: list[int] = []
        self.rings: list[Ring] = []
        self._room: Rows = np.empty(0, ROW)
        self._first = self._end = 0
        """Where the records that are held back begin and end in the buffer."""
        self._rooms: list[Rows] = []
        """Buffers of the last batches, for reuse: the first touch of new memory costs as much as
        filling it."""
        self._parted, self._small = False, 0
        self.map = -1
        self._mapped: Optional[mmap.mmap] = None
        try:
            if own:
                self._make_arrays()
            else:
                self._make_buffers()
        except BaseException:
            self.close()
            raise

    def _sizes(self) -> list[int]:
        """Bytes of each possible CPU's ring."""
        running = bpf.online_cpus()
        small = min(self.size, max(SLEEPING, PAGE))
        return [self.size if cpu in running else small for cpu in range(bpf.possible_cpus())]

    def _make_arrays(self) -> None:
        slots = [size // SLOT for size in self._sizes()]
        cpus = len(slots)
        count = cpus + sum(slots)
        self.map = bpf.map_create(
            bpf.MapType.ARRAY, 4, SLOT, count, flags=bpf.F_MMAPABLE, name="rings"
        )
        self._mapped = mmap.mmap(self.map, -(-count * SLOT // PAGE) * PAGE, mmap.MAP_SHARED)
        first = cpus
        for cpu in range(cpus):
            self.rings.append(ArrayRing(self._mapped, cpu, first, slots[cpu]))
            first += slots[cpu]

    def _make_buffers(self) -> None:
        sizes = self._sizes()
        for cpu, size in enumerate(sizes):
            self._fds.append(bpf.map_create(bpf.MapType.RINGBUF, 0, 0, size, name="ctrace_ring"))
            self.rings.append(BufferRing(self._fds[-1], size))
            if cpu == 0:
                self.map = bpf.map_create(
                    bpf.MapType.ARRAY_OF_MAPS, 4, 4, len(sizes), inner=self._fds[0], name="rings"
                )
            bpf.map_update(self.map, cpu.to_bytes(4, "little"), self._fds[-1].to_bytes(4, "little"))

    def poll(
        self, hold: float = 0.002, settle: Optional[Callable[[Events], Events]] = None
    ) -> Events:
        """New records of all CPUs by time, except those younger than ``hold`` seconds.

        What is held back comes with the next call, so that records of successive
        calls are in time order although CPUs commit theirs at slightly different times.
        ``settle`` sees all of them, also the held ones, before that.

        What successive calls return lies side by side (see :func:`one_piece`), as long as
        there is room; one that keeps a few of the rows should copy them.
        """
        now = boot_ns()
        passed, self._read_at = (now - self._read_at) / 1e9, now
        limit = now - int(hold * 1e9)
        pending = [ring.pending for ring in self.rings]
        # (from now on, as before, the fullest would be a third full)
        third = passed * (self.size // SLOT) / 3 / max(1, *pending)
        self.interval = min(max(third, BRIEF), self._calm)
        if self._first == self._end and not any(pending):
            return empty()  # idle costs a glance at each ring
        self._make_room(sum(pending))
        room, first, end = self._room, self._first, self._end
        times, ordered = room.view(RECORD)["ts"], True
        for ring, slots in zip(self.rings, pending):
            if not slots:
                continue
            taken, in_order = ring.read(room[end : end + slots])
            if taken:
                ordered &= in_order and not (end > first and times[end] < times[end - 1])
            end += taken
        rows = room[first:end].view(RECORD)
        events = rows if ordered else by_time(rows)
        if settle is not None:
            events = settle(events)
        if events is not rows:
            end = first + len(events)
            room[first:end] = events.view(ROW)
        times = times[first:end]
        cut = len(times)
        if cut and times[-1] > limit:
            cut = bisect_right(times, limit)  # numpy's would copy the column first
        self._first, self._end = first + cut, end
        return room[first : first + cut].view(RECORD)

    def part(self) -> None:
        """Start a new batch: what is polled from now on need not be contiguous with the rest."""
        self._parted = self._first > ROOM // 8
        self._small = 0 if self._parted else self._small + 1
        if self._small > len(self._rooms):
            self._rooms.clear()  # the flood is over

    def _make_room(self, count: int) -> None:
        """Room for ``count`` records after those held back, or for a whole batch when a new one
        starts."""
        held = self._room[self._first : self._end]
        if self._end + count > len(self._room) or self._parted:
            self._room = self._unused(len(held) + count)
            self._room[: len(held)] = held
            self._first, self._end = 0, len(held)
        self._parted = False

    def _unused(self, count: int) -> Rows:
        for at in range(len(self._rooms)):
            if _references(self._rooms, at) == _UNUSED and len(self._rooms[at]) >= count:
                return self._rooms[at]  # nobody has rows of it any more
        whole = ROOM + ROOM // 4
        room = np.empty(max(whole, count), ROW)
        if count <= whole:  # a larger one goes when its rows do
            self._rooms = [*self._rooms[1 - ROOMS :], room]
        return room

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
        self._mapped = None  # an error on its way up may hold rows: it is unmapped with them
        for fd in (*self._fds, self.map):
            if fd >= 0:
                os.close(fd)
        self.rings, self._fds, self.map = [], [], -1
