"""Where the CPUs are: kernel stacks at a fixed rate, counted in the kernel.

Uses the software CPU clock, so it needs no performance counters: virtual machines
have none.
"""

from __future__ import annotations

import fcntl
import os
import struct
from types import TracebackType
from typing import Final, Optional

import numpy as np

from ctrace.capture import sys
from ctrace.capture.percpu import online_cpus
from ctrace.capture.timing import STACK_DEPTH, Objects, addresses
from ctrace.model.perf import Stack

SET_BPF: Final = 0x40042408
ENABLE: Final = 0x2400
FREQUENCY: Final = 1 << 10
"""perf_event_attr: sample_period is a frequency."""


class Sampler:
    """Samples every CPU ``hertz`` times a second until closed. Raises BpfError."""

    def __init__(self, objects: Objects, hertz: int) -> None:
        self._objects = objects
        self._events: list[int] = []
        prog = objects.load("on_clock", sys.ProgType.PERF_EVENT)
        # type SOFTWARE, size, config CPU_CLOCK, sample_freq; then flags
        attr = bytearray(128)
        struct.pack_into("<IIQQQQQ", attr, 0, 1, 128, 0, hertz, 0, 0, FREQUENCY)
        try:
            for cpu in online_cpus():
                event = sys.perf_event_open(bytes(attr), -1, cpu)
                self._events.append(event)
                fcntl.ioctl(event, SET_BPF, prog)
                fcntl.ioctl(event, ENABLE, 0)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Sampler:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop sampling; safe to call twice."""
        while self._events:
            os.close(self._events.pop())


def stacks(objects: Objects) -> list[Stack]:
    """All stacks seen, with how often; an empty stack stands for user mode."""
    keys, values = sys.map_items(objects.samples, 4, 8, 1 << 14)
    counts = values.reshape(-1, 8).view(np.uint64).ravel()
    found = []
    for number, count in zip(keys.reshape(-1, 4).view(np.int32).ravel(), counts, strict=True):
        frames: tuple[int, ...] = ()
        if number >= 0:
            raw = sys.map_lookup(objects.stacks, int(number).to_bytes(4, "little"), 8 * STACK_DEPTH)
            frames = tuple(int(address) for address in addresses(raw)) if raw else ()
        found.append(Stack(frames, int(count)))
    return found
