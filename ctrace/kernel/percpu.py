"""Finds the kernel's per-CPU section of every CPU, for bpf/percpu.h.

Needed to tell a process's own packet from one that an interrupt brought, and for
conntrack's per-CPU counters. Without it (no per-CPU variables in BTF) owners are
unknown, and families that need the counters say so.
"""

from __future__ import annotations

from collections.abc import Iterable

from ctrace.kernel import bpf, compiler, layout
from ctrace.kernel.objects import Objects

_NEEDED = ("PERCPU_RUNQUEUES", "PERCPU_CURRENT", "PERCPU_PREEMPT", "TASK_CFS", "CFS_RQ")


def locate(objects: Objects) -> bool:
    """Fill the CPUS map; whether every online CPU was found. Raises CtraceError."""
    where = layout.running()
    if any(name not in where for name in _NEEDED):
        return False
    if "locate_cpu" not in objects.programs:
        code = compiler.compile_programs("percpu.c", ("locate_cpu",), where.defines)
        objects.load("locate_cpu", code["locate_cpu"], bpf.ProgType.RAW_TRACEPOINT)
    program = objects.programs["locate_cpu"]
    try:
        return all(bpf.prog_run(program, (), cpu=cpu) == 1 for cpu in online_cpus())
    except bpf.BpfError:
        return False


def online_cpus() -> Iterable[int]:
    """The numbers of the CPUs that run."""
    with open("/sys/devices/system/cpu/online", encoding="ascii") as file:
        for part in file.read().strip().split(","):
            first, _, last = part.partition("-")
            yield from range(int(first), int(last or first) + 1)
