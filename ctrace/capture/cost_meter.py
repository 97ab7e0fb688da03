"""What this process and its programs in the kernel cost the host."""

from __future__ import annotations

import os
import resource
import time

from ctrace.batch import SelfCost
from ctrace.capture.family import Capture


class CostMeter:
    """What was used since the last reading."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture if _measures_programs() else None
        self._at, self._cpu = time.monotonic(), _cpu_seconds()
        self._kernel = self._capture.run_time() if self._capture else 0

    def read(self) -> SelfCost:
        """Since the previous call."""
        at, cpu = time.monotonic(), _cpu_seconds()
        kernel = self._capture.run_time() if self._capture else 0
        seconds = max(at - self._at, 1e-6)
        cost = SelfCost(
            cpu=(cpu - self._cpu) / seconds,
            rss=_rss(),
            kernel=(kernel - self._kernel) / 1e9 / seconds,
        )
        self._at, self._cpu, self._kernel = at, cpu, kernel
        return cost


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _rss() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _measures_programs() -> bool:
    """Whether kernel.bpf_stats_enabled is set. We never set it, because it slows every program."""
    try:
        with open("/proc/sys/kernel/bpf_stats_enabled", encoding="ascii") as file:
            return file.read().strip() != "0"
    except OSError:
        return False
