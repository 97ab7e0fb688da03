"""Finds the kernel's per-CPU section of every CPU, for bpf/percpu.h.

Needed to tell a process's own packet from one that an interrupt brought (on machines that
keep preempt_count there), and for conntrack's per-CPU counters. Without it (no per-CPU
variables in BTF) owners are unknown, and families that need the counters say so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ctrace.kernel import bpf, layout, programs
from ctrace.kernel.objects import Objects

_NEEDED = ("PERCPU_RUNQUEUES", "TASK_CFS", "CFS_RQ")


@dataclass(frozen=True)
class Located:
    """What can be told on every online CPU."""

    tasks: bool
    """Whether a program runs for the current task or in an interrupt."""
    counters: bool
    """The kernel's own counters of this CPU."""


def locate(objects: Objects) -> Located:
    """Fill the CPUS map. Raises CtraceError."""
    where = layout.running()
    level = _level(objects, where) if all(name in where for name in _NEEDED) else 0
    # x86 keeps preempt_count in the per-CPU section, other machines in the task
    tasks = level >= 1 if "PERCPU_PREEMPT" in where else "TASK_PREEMPT" in where
    return Located(tasks, level >= 2)


def _level(objects: Objects, where: layout.Layout) -> int:
    if "locate_cpu" not in objects.programs:
        code = programs.instructions("percpu.c", ("locate_cpu",), where.constants)
        objects.load("locate_cpu", code["locate_cpu"], bpf.ProgType.RAW_TRACEPOINT)
    program = objects.programs["locate_cpu"]
    image = 0 if "PERCPU_OFFSET" in where else layout.address("__per_cpu_start")
    try:
        return min(bpf.prog_run(program, (image,), cpu=cpu) for cpu in online_cpus())
    except bpf.BpfError:
        return 0


def online_cpus() -> Iterable[int]:
    """The numbers of the CPUs that run."""
    with open("/sys/devices/system/cpu/online", encoding="ascii") as file:
        for part in file.read().strip().split(","):
            first, _, last = part.partition("-")
            yield from range(int(first), int(last or first) + 1)
