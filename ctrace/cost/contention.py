"""Who waits for conntrack's locks, and for how long (tracepoints of Linux 5.19).

With symbols of data (KALLSYMS_ALL) a lock is known by its address. Without, every wait for a spin
lock is taken, and those kept whose waiting code is conntrack's. A wait is timed from when its stack
has been taken, some microseconds after it began, so what is reported is slightly too short.
"""

from __future__ import annotations

import errno
import struct
from typing import Final

import numpy as np

from ctrace.cost.objects import WAITS, Objects
from ctrace.cost.result import Wait, who_waits
from ctrace.cost.sampling import frames
from ctrace.errors import CtraceError
from ctrace.kernel import bpf
from ctrace.kernel.symbols import Symbols

UNKNOWN: Final = "a lock"
LOCKS: Final = ("table lock", "all table locks", "expectations lock", UNKNOWN)
"""``enum lock`` in bpf/perf.c."""
NO_ROOM: Final = -1
"""In place of a stack's number: there was no room for another stack."""
NOT_KEPT: Final = "[stack not kept]"
SPINLOCK: Final = 4
"""Bytes of a spinlock_t without lock debugging."""
TABLE_LOCKS: Final = 1024
"""CONNTRACK_LOCKS in include/net/netfilter/nf_conntrack_core.h."""

BOUNDS: Final = (
    ("locks", "nf_conntrack_locks", SPINLOCK * TABLE_LOCKS),
    ("all_lock", "nf_conntrack_locks_all_lock", SPINLOCK),
    ("expect", "nf_conntrack_expect_lock", SPINLOCK),
)


class Contention:
    """Counts waits from now on, until the objects are closed."""

    def __init__(self, objects: Objects, names: Symbols) -> None:
        """Raises CtraceError when this kernel has no such tracepoints."""
        self._objects = objects
        self._names = names
        for bound, symbol, size in BOUNDS:
            if start := names.data(symbol):
                objects.bound(bound, start, size)
        self.unplaced = 0
        """Waits that may be conntrack's, as of the last :meth:`read`: there was no room for their
        stacks."""
        for lock in range(len(LOCKS)):
            bpf.map_update(objects.maps["waits"], struct.pack("<iI", NO_ROOM, lock), bytes(24))
        try:
            # the end first: what began before has no beginning and is left out
            for program, tracepoint in (
                ("wait_end", "contention_end"),
                ("wait_begin", "contention_begin"),
            ):
                fd = objects.load(program, bpf.ProgType.RAW_TRACEPOINT)
                objects.keep(bpf.raw_tracepoint_open(fd, tracepoint))
        except bpf.BpfError as error:
            if error.errno != errno.ENOENT:
                raise
            raise CtraceError(
                "this kernel has no contention tracepoints (they need 5.19)"
            ) from error

    def read(self) -> tuple[Wait, ...]:
        """All waits so far by lock and stack, the longest waited for first."""
        waits = self._objects.maps["waits"]
        keys, values = bpf.map_items(waits, 8, 24, WAITS)
        rows: list[list[int]] = values.reshape(-1, 24).view(np.uint64).tolist()
        found: dict[tuple[str, str], tuple[int, int, int]] = {}
        unplaced = 0
        for key, (count, total, longest) in zip(keys, rows):
            number, lock = struct.unpack("<iI", key.tobytes())
            stack = who_waits(frames(self._objects, number), self._names.name)
            if LOCKS[lock] == UNKNOWN and not (stack and self._names.is_conntrack(stack[0])):
                if stack:
                    bpf.map_delete(waits, key.tobytes())  # makes room for conntrack's
                else:
                    unplaced += count
            elif count:
                told = ";".join(self._names.name(at) for at in reversed(stack)) or NOT_KEPT
                others, ns, most = found.get((LOCKS[lock], told), (0, 0, 0))
                found[LOCKS[lock], told] = others + count, ns + total, max(most, longest)
        self.unplaced = unplaced
        made = (Wait(lock, *numbers, told) for (lock, told), numbers in found.items())
        return tuple(sorted(made, key=lambda wait: -wait.total_ns))
