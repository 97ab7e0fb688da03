"""Finds the kernel's per-CPU section of every CPU, for bpf/percpu.h.

Needed to tell a process's own packet from one that an interrupt brought (on machines that
keep preempt_count there), and for conntrack's per-CPU counters. Without it (no per-CPU
variables in BTF) owners are unknown, and families that need the counters say so. A CPU that
is switched on later is met by :func:`meet`.
"""

from __future__ import annotations

import errno
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
    level = 0
    if all(name in where for name in _NEEDED):
        code = programs.instructions("percpu.c", ("locate_cpu",), where.constants)
        objects.load("locate_cpu", code["locate_cpu"], bpf.ProgType.RAW_TRACEPOINT)
        objects.cpus = bpf.online_cpus()
        level = _level(objects, objects.cpus)
    # x86 keeps preempt_count in the per-CPU section, other machines in the task
    tasks = level >= 1 if "PERCPU_PREEMPT" in where else "TASK_PREEMPT" in where
    return Located(tasks, level >= 2)


def meet(objects: Objects) -> frozenset[int]:
    """Fill the CPUS map of those that were switched on since the last call; which these are."""
    running = bpf.online_cpus()
    fresh, objects.cpus = running - objects.cpus, running
    if fresh and "locate_cpu" in objects.programs:
        _level(objects, fresh)
    return fresh


def run(program: int, args: tuple[int, ...], cpus: Iterable[int]) -> list[int]:
    """Run a program on each of these CPUs; its results. Raises BpfError.

    One that was switched off meanwhile is left out.
    """
    results = []
    for cpu in cpus:
        try:
            results.append(bpf.prog_run(program, args, cpu=cpu))
        except bpf.BpfError as error:
            if error.errno != errno.ENXIO:
                raise
    return results


def _level(objects: Objects, cpus: Iterable[int]) -> int:
    where = layout.running()
    image = 0 if "PERCPU_OFFSET" in where else layout.address("__per_cpu_start")
    try:
        return min(run(objects.programs["locate_cpu"], (image,), cpus), default=0)
    except bpf.BpfError:
        return 0
