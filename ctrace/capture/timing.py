"""How long packets spend in connection tracking, as histograms made in the kernel.

Where functions can be traced it is entry to exit of ``nf_conntrack_in``,
``__nf_conntrack_confirm`` and ``early_drop``; elsewhere the time between two
netfilter hooks right before and after conntrack's own (priority -200), which also
holds the walk from hook to hook. The measuring cost, taken on the same packets, is
kept apart so that it can be subtracted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.capture import btf, compiler, layout, sys
from ctrace.errors import CtraceError
from ctrace.host.netns import Namespace, enter
from ctrace.model.perf import BINS, POINTS, PROTOCOLS, Times

SOURCE: Final = "perf.c"
NETFILTER: Final = ("netfilter_first", "netfilter_before", "netfilter_after")
PRIORITIES: Final = (-203, -202, -199)
FUNCTIONS: Final = (
    ("nf_conntrack_in", "fentry_in", "fexit_in"),
    ("__nf_conntrack_confirm", "fentry_confirm", "fexit_confirm"),
    ("early_drop", "fentry_early_drop", "fexit_early_drop"),
)
SAMPLING: Final = ("on_clock",)
SERVICES: Final = 4096
STACK_DEPTH: Final = 127


class Objects:
    """The maps and programs of bpf/perf.c, shared by timing and sampling."""

    def __init__(self) -> None:
        self.fds: list[int] = []
        found = layout.running()
        self.programs: list[str] = [*NETFILTER, *SAMPLING]
        self.programs += [name for _, *pair in FUNCTIONS for name in pair]
        if "DROP_REASON" in found:
            self.programs.append("on_kfree_skb")
        if "BPF_NF_SKB" not in found:  # before 6.4
            found = layout.Layout({**found.defines, "BPF_NF_SKB": 8})
        self.code = compiler.compile_programs(SOURCE, self.programs, found.defines)
        cpus = sys.possible_cpus()
        self.stacks = self._map(sys.MapType.STACK_TRACE, 4, 8 * STACK_DEPTH, 1 << 14, "stacks")
        self.samples = self._map(sys.MapType.HASH, 4, 8, 1 << 14, "samples")
        self.slots = self._map(sys.MapType.PERCPU_ARRAY, 4, 24, 16, "slots")
        self.times = self._map(
            sys.MapType.PERCPU_ARRAY, 4, 8, len(POINTS) * len(PROTOCOLS) * BINS, "times"
        )
        self.services = self._map(sys.MapType.LRU_HASH, 4, 16, SERVICES, "services")
        self.maps = [self.stacks, self.samples, self.slots, self.times, self.services]
        self.cpus = cpus

    def _map(self, kind: sys.MapType, key: int, value: int, size: int, name: str) -> int:
        fd = sys.map_create(kind, key, value, size, name=name)
        self.fds.append(fd)
        return fd

    def load(
        self,
        name: str,
        kind: sys.ProgType,
        attach: sys.AttachType = sys.AttachType.NONE,
        btf_id: int = 0,
        btf_fd: int = 0,
    ) -> int:
        """Load one of the programs; its descriptor is closed with this object."""
        linked = compiler.link(self.code[name], self.maps)
        fd = sys.prog_load(
            linked, kind, name, attach_type=attach, attach_btf_id=btf_id, attach_btf_fd=btf_fd
        )
        self.fds.append(fd)
        return fd

    def close(self) -> None:
        """Detach and free everything; safe to call twice."""
        while self.fds:
            os.close(self.fds.pop())


class Timing:
    """Attaches the timers; :meth:`read` gives what they measured so far."""

    def __init__(self, objects: Objects, namespaces: Sequence[Namespace]) -> None:
        self._objects = objects
        self.blind: list[str] = []
        self._links: list[int] = []
        try:
            self.family = "fentry"
            self._functions()
        except CtraceError as refused:
            self._detach()
            self.family = "netfilter"
            self.blind = [
                "confirm and early_drop are not timed: this kernel's functions cannot be traced"
            ]
            try:
                self._netfilter(namespaces)
            except CtraceError:
                self._detach()
                raise CtraceError(
                    f"neither functions nor netfilter hooks can be timed here ({refused})"
                ) from None

    def __enter__(self) -> Timing:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self._detach()

    def _detach(self) -> None:
        while self._links:
            os.close(self._links.pop())

    def _functions(self) -> None:
        kernel = btf.kernel()
        module = btf.kernel("nf_conntrack")
        if kernel is None:
            raise CtraceError("no BTF")
        for function, before, after in FUNCTIONS:
            owner = module if module is not None and module.func(function) else kernel
            target = owner.func(function)
            if target is None:
                if function == "early_drop":
                    self.blind.append("early_drop is not timed: the compiler inlined it")
                    continue
                raise CtraceError(f"no function {function} in BTF")
            fd = sys.btf_open("nf_conntrack") if owner is module else None
            try:
                for name, attach in (
                    (before, sys.AttachType.TRACE_FENTRY),
                    (after, sys.AttachType.TRACE_FEXIT),
                ):
                    prog = self._objects.load(
                        name, sys.ProgType.TRACING, attach, target, fd if fd is not None else 0
                    )
                    self._links.append(sys.raw_tracepoint_open(prog))
            finally:
                if fd is not None:
                    os.close(fd)

    def _netfilter(self, namespaces: Sequence[Namespace]) -> None:
        progs = [
            self._objects.load(name, sys.ProgType.NETFILTER, sys.AttachType.NETFILTER)
            for name in NETFILTER
        ]
        for namespace in namespaces:
            with enter(namespace.path):
                for family in (2, 10):
                    for hook in (0, 3):  # PRE_ROUTING, LOCAL_OUT
                        for prog, priority in zip(progs, PRIORITIES, strict=True):
                            self._links.append(sys.link_netfilter(prog, family, hook, priority))

    def stacks_of_drops(self) -> None:
        """From now on also sample the stack of packets that conntrack's hook gives up."""
        if self.family != "netfilter" or "on_kfree_skb" not in self._objects.programs:
            self.blind.append("stacks of refusals need the netfilter hooks and drop reasons")
            return
        prog = self._objects.load("on_kfree_skb", sys.ProgType.RAW_TRACEPOINT)
        self._links.append(sys.raw_tracepoint_open(prog, "kfree_skb"))

    def read(self) -> Times:
        """Everything measured since attaching."""
        size = len(POINTS) * len(PROTOCOLS) * BINS
        bins = np.zeros(size, np.uint64)
        for index in range(size):
            raw = sys.map_lookup(
                self._objects.times, index.to_bytes(4, "little"), 8 * self._objects.cpus
            )
            if raw is not None:
                bins[index] = np.frombuffer(raw, np.uint64).sum()
        keys, values = sys.map_items(self._objects.services, 4, 16, SERVICES)
        return Times(
            bins.reshape(len(POINTS), len(PROTOCOLS), BINS),
            keys.reshape(-1, 4).view(np.uint32).ravel(),
            values.reshape(-1, 16).view(np.uint64).reshape(-1, 2),
        )


def active(namespaces: Sequence[Namespace]) -> list[Namespace]:
    """All namespaces in which timers can be placed: those that can be entered."""
    found = []
    for namespace in namespaces:
        try:
            with enter(namespace.path):
                found.append(namespace)
        except CtraceError:
            continue
    return found


def addresses(raw: bytes) -> npt.NDArray[np.uint64]:
    """The frames of one stack trace, innermost first."""
    frames: npt.NDArray[np.uint64] = np.frombuffer(raw, np.uint64)
    kept: npt.NDArray[np.uint64] = frames[frames != 0]
    return kept
