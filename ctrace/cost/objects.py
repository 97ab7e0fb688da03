"""The maps and programs of bpf/perf.c, shared by all measurements."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from typing import Final

from ctrace.capture.hooks import fentry, kprobe
from ctrace.capture.hooks.function_hooks import Hook, arguments
from ctrace.cost.result import BINS, POINTS, PROTOCOLS
from ctrace.kernel import bpf, layout, programs

SOURCE: Final = "perf.c"
PORTED: Final = (6, 17, 132)
SERVICES: Final = (len(PORTED) << 16) + 256
"""Ports of PORTED (TCP, UDP, SCTP), then the other protocols: ``service_index`` in bpf/perf.c."""
STACK_DEPTH: Final = 127
STACKS: Final = 1 << 14
BOUNDS: Final = ("alloc", "free", "locks", "all_lock", "expect")
"""``struct bounds`` in bpf/perf.h."""
WAITS: Final = 4096
RECENT: Final = 64

EARLY_DROP: Final = Hook("early_drop", ("net", "hash"))

TIMED: Final = ("in", "confirm", "early_drop", "gc", "cost")
FUNCTION_PROGRAMS: Final = (
    *(f"{side}_{name}" for name in TIMED for side in ("enter", "leave")),
    "stack_insert",
    "stack_enter",
    "stack_leave",
)
"""Programs that find their arguments elsewhere with kprobes."""
NETFILTER: Final = programs.TIMERS
OTHERS: Final = ("alloc_stack", "free_stack", "on_clock", "wait_begin", "wait_end")

# (kind, key, value, entries), in the order of bpf/perf.h
_MAPS: Final = (
    ("stacks", bpf.MapType.STACK_TRACE, 4, 8 * STACK_DEPTH, STACKS),
    ("samples", bpf.MapType.HASH, 8, 8, STACKS),
    ("slots", bpf.MapType.PERCPU_ARRAY, 4, 24, 8),
    ("times", bpf.MapType.PERCPU_ARRAY, 4, 8, len(POINTS) * len(PROTOCOLS) * BINS),
    ("services", bpf.MapType.ARRAY, 4, 16, SERVICES),
    ("calls", bpf.MapType.LRU_HASH, 16, 56, 8192),
    ("bounds", bpf.MapType.ARRAY, 4, 16 * len(BOUNDS), 1),
    ("waiting", bpf.MapType.LRU_HASH, 16, 16, 4096),
    ("waits", bpf.MapType.HASH, 8, 24, WAITS),
    ("recent", bpf.MapType.PERCPU_ARRAY, 4, 8, RECENT),
)


class Objects:
    """Everything lives in descriptors of this process and goes away with it."""

    def __init__(self) -> None:
        """Compile, and create the maps. Raises CtraceError (BpfError)."""
        self.fds: list[int] = []
        self.cpus = bpf.possible_cpus()
        self.maps: dict[str, int] = {}
        self._bounds: dict[str, tuple[int, int]] = {}
        self._probes: programs.Instructions = {}
        found = layout.running()
        names = [*FUNCTION_PROGRAMS, *NETFILTER, *OTHERS]
        if "DROP_REASON" in found:
            names.append("drop_stack")
        self.code = self._instructions(
            names, fentry.context_constants({"early_drop": arguments(EARLY_DROP)})
        )
        try:
            for name, kind, key, value, entries in _MAPS:
                self.maps[name] = self.keep(bpf.map_create(kind, key, value, entries, name=name))
        except BaseException:
            self.close()
            raise

    def keep(self, fd: int) -> int:
        """Close this descriptor with the rest."""
        self.fds.append(fd)
        return fd

    def load(
        self,
        name: str,
        kind: bpf.ProgType,
        attach: bpf.AttachType = bpf.AttachType.NONE,
        btf_id: int = 0,
        btf_fd: int = 0,
    ) -> int:
        """Load one of the programs. Raises BpfError."""
        code = self._kprobes() if kind == bpf.ProgType.KPROBE else self.code
        linked = programs.link(
            code[name], list(self.maps.values()), fetch_add="FETCH_ADD" in layout.running()
        )
        return self.keep(
            bpf.prog_load(
                linked, kind, name, attach_type=attach, attach_btf_id=btf_id, attach_btf_fd=btf_fd
            )
        )

    def _kprobes(self) -> programs.Instructions:
        if not self._probes:
            self._probes = self._instructions(
                FUNCTION_PROGRAMS, kprobe.register_constants(["early_drop"])
            )
        return self._probes

    @staticmethod
    def _instructions(names: Sequence[str], context: Mapping[str, int]) -> programs.Instructions:
        return programs.instructions(SOURCE, names, {**layout.running().constants, **context})

    def bound(self, name: str, start: int, size: int) -> None:
        """Tell the programs where code or data lies; ``name`` is one of BOUNDS."""
        self._bounds[name] = (start, size)
        words = [word for each in BOUNDS for word in self._bounds.get(each, (0, 0))]
        bpf.map_update(self.maps["bounds"], bytes(4), struct.pack(f"<{len(words)}Q", *words))

    def close(self) -> None:
        """Detach and free everything; safe to call twice."""
        while self.fds:
            os.close(self.fds.pop())
