"""What the CPUs execute: kernel stacks at a fixed rate, counted in the kernel.

Uses the software CPU clock, so it needs no performance counters: virtual machines
have none.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from ctrace.cost.objects import STACK_DEPTH, STACKS, Objects
from ctrace.cost.result import Stack
from ctrace.kernel import bpf

SET_BPF: Final = 0x40042408
ENABLE: Final = 0x2400
FREQUENCY: Final = 1 << 10
"""perf_event_attr: sample_period is a frequency."""


class What(IntEnum):
    """``enum sampled`` in bpf/perf.h."""

    CLOCK = 0
    INSERT = 1
    DROP = 2
    EVICT = 3


class Sampler:
    """Samples every CPU ``hertz`` times a second until closed. Raises BpfError."""

    def __init__(self, objects: Objects, hertz: int) -> None:
        self._events: list[int] = []
        prog = objects.load("on_clock", bpf.ProgType.PERF_EVENT)
        # type SOFTWARE, size, config CPU_CLOCK, sample_freq; then flags
        attr = bytearray(128)
        struct.pack_into("<IIQQQQQ", attr, 0, 1, 128, 0, hertz, 0, 0, FREQUENCY)
        try:
            for cpu in sorted(bpf.online_cpus()):
                event = bpf.perf_event_open(bytes(attr), -1, cpu)
                self._events.append(event)
                fcntl.ioctl(event, SET_BPF, prog)
                fcntl.ioctl(event, ENABLE, 0)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop sampling; safe to call twice."""
        while self._events:
            os.close(self._events.pop())


def stacks(objects: Objects, what: What = What.CLOCK) -> tuple[list[Stack], int]:
    """All stacks seen of one sort, with how often, and how many the kernel had no room for.

    A stack without frames stands for user mode.
    """
    keys, values = bpf.map_items(objects.maps["samples"], 8, 8, STACKS)
    counts = values.reshape(-1, 8).view(np.uint64).ravel()
    pairs = keys.reshape(-1, 8).view(np.int32).reshape(-1, 2)
    found, lost = [], 0
    for (number, sort), count in zip(pairs.tolist(), counts.tolist()):
        if sort != what:
            continue
        if number < 0 and number != -errno.EFAULT:  # a collision in the map
            lost += count
        else:
            found.append(Stack(frames(objects, number), count))
    return found, lost


def frames(objects: Objects, number: int) -> tuple[int, ...]:
    """The addresses of one stack, innermost first; none for a negative number."""
    if number < 0:
        return ()
    raw = bpf.map_lookup(objects.maps["stacks"], number.to_bytes(4, "little"), 8 * STACK_DEPTH)
    if raw is None:
        return ()
    found: npt.NDArray[np.uint64] = np.frombuffer(raw, np.uint64)
    return tuple(found[found != 0].tolist())
