"""How long packets spend in connection tracking, as histograms made in the kernel.

Where functions can be traced it is entry to exit of ``nf_conntrack_in``,
``__nf_conntrack_confirm`` and ``early_drop``, by fentry and fexit or by probe and
return probe; elsewhere the time between two netfilter hooks right before and after
conntrack's own (priority -200), which also holds the walk from hook to hook. What
measuring itself takes is kept apart so that it can be subtracted: at functions it is
the same pair of programs around a function that does nothing, at the hooks it is taken
on the same packets.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.capture.hooks import kprobe
from ctrace.capture.hooks.function_hooks import MODULE, Hook, fits
from ctrace.cost.objects import EARLY_DROP, NETFILTER, PORTED, RECENT, SERVICES, Objects
from ctrace.cost.result import BINS, POINTS, PROTOCOLS, Times
from ctrace.errors import CtraceError, UsageError
from ctrace.host.netns import Namespace, at, enter
from ctrace.kernel import bpf, btf
from ctrace.kernel.symbols import Symbols

FAMILIES: Final = ("fentry", "kprobe", "netfilter")
PRIORITIES: Final = tuple((-203 - 2 * n, -202 - 2 * n, -199 + n) for n in range(16))
"""Directly around conntrack's hook; the kernel gives each priority to one BPF program only."""
BESIDE_OTHERS: Final = "time in conntrack alone: another ctrace perf is attached there"
FUNCTIONS: Final = (
    (Hook("nf_conntrack_in", ("skb", "state")), "in"),
    (Hook("__nf_conntrack_confirm", ("skb",)), "confirm"),
    (EARLY_DROP, "early_drop"),
    (Hook("gc_worker", ("work",)), "gc"),
)
OPTIONAL: Final = {"early_drop": "time in early_drop scans", "gc_worker": "time of the collector"}
"""What cannot be reported without them; compilers may have inlined them."""
NOTHING: Final = "bpf_fentry_test1"
"""A function of the kernel that returns its argument and one; run by BPF_PROG_TEST_RUN."""
CALIBRATIONS: Final = 400

_RETURN_ZERO: Final = bytes.fromhex("b700000000000000 9500000000000000")

TRACEPOINTS: Final = {
    "insert": ("alloc_stack", "kmem_cache_alloc", "alloc", "__nf_conntrack_alloc"),
    "drop": ("drop_stack", "kfree_skb", "", ""),
    "evict": ("free_stack", "kmem_cache_free", "free", "nf_conntrack_free"),
}
"""Program, tracepoint, and the caller for which its calls count."""


class Timing:
    """Attaches the timers; :meth:`read` gives what they measured so far."""

    def __init__(
        self,
        objects: Objects,
        namespaces: Sequence[Namespace],
        family: Optional[str] = None,
        *,
        for_stacks: bool = False,
    ) -> None:
        """The best family that works, or the one given.

        ``for_stacks``: whole stacks matter more than times. Older kernels cannot unwind a
        stack beyond a function with a return probe, so with kprobes nothing is timed then.

        Raises CtraceError when none does, UsageError for a family that cannot time.
        """
        if family is not None and family not in FAMILIES:
            raise UsageError(f"no timers with {family}: {', '.join(FAMILIES)}")
        self._objects = objects
        self.blind: list[str] = []
        self._links: list[int] = []
        self._spaces: dict[int, list[int]] = {}
        self._for_stacks = for_stacks
        self._refused = "none was found"
        refusals = []
        for name in FAMILIES if family is None else (family,):
            self.family, self.blind = name, []
            try:
                if name == "kprobe" and for_stacks:
                    kprobe.probe()
                    self.blind.append("time in conntrack: return probes would cut off the stacks")
                elif name == "netfilter":
                    self._netfilter(namespaces)
                else:
                    self._functions()
                return
            except CtraceError as refused:
                self.close()
                refusals.append(f"{name}: {refused}")
        raise CtraceError("packets cannot be timed here: " + "; ".join(refusals))

    @property
    def hands_off(self) -> bool:
        """Whether return probes must not be set now: they would cut off the stacks."""
        return self.family == "kprobe" and self._for_stacks

    def __enter__(self) -> Timing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Detach; safe to call twice."""
        while self._links:
            os.close(self._links.pop())
        for inum in list(self._spaces):
            self._leave(inum)

    # -- functions -------------------------------------------------------------------------

    def _functions(self) -> None:
        for hook, name in FUNCTIONS:
            try:
                if not fits(hook):
                    raise CtraceError(f"{hook.function} has arguments that ctrace does not know")
                self._pair(hook.function, f"enter_{name}", f"leave_{name}")
            except CtraceError as refused:
                if hook.function not in OPTIONAL:
                    raise
                self.blind.append(f"{OPTIONAL[hook.function]}: {refused}")
        try:
            self._pair(NOTHING, "enter_cost", "leave_cost")
            _run_nothing()
        except CtraceError as refused:
            self.blind.append(f"the measuring overhead, so it is not subtracted: {refused}")

    def _pair(self, function: str, entering: str, leaving: str) -> None:
        """Attach to entry and exit. The exit first: an exit without its entry is harmless."""
        self._attach(function, leaving, exit_=True)
        self._attach(function, entering, exit_=False)

    def _attach(self, function: str, program: str, *, exit_: bool) -> None:
        if self.family == "kprobe":
            symbol = kprobe.symbols().get(function, kprobe.Symbol(function))
            fd = self._objects.load(program, bpf.ProgType.KPROBE)
            self._links.append(kprobe.open_probe(fd, symbol, exit_=exit_))
            return
        with function_btf(function) as (target, module):
            attach = bpf.AttachType.TRACE_FEXIT if exit_ else bpf.AttachType.TRACE_FENTRY
            fd = self._objects.load(program, bpf.ProgType.TRACING, attach, target, module)
        self._links.append(bpf.raw_tracepoint_open(fd))

    # -- netfilter links -------------------------------------------------------------------

    def _netfilter(self, namespaces: Sequence[Namespace]) -> None:
        self._programs = [
            self._objects.load(name, bpf.ProgType.NETFILTER, bpf.AttachType.NETFILTER)
            for name in NETFILTER
        ]
        self.blind.append(
            "time in confirm, early_drop scans and the collector by themselves: this kernel's "
            "functions cannot be traced"
        )
        self.follow(namespaces)
        if not self._spaces:
            raise CtraceError(f"no network namespace can be timed: {self._refused}")

    def follow(self, namespaces: Sequence[Namespace]) -> None:
        """Time in these namespaces from now on, and release the others: a link keeps a namespace
        alive."""
        if self.family != "netfilter":
            return
        current = {space.inum: space for space in namespaces}
        for inum in self._spaces.keys() - current.keys():
            self._leave(inum)
        for inum in current.keys() - self._spaces.keys():
            try:
                self._spaces[inum] = self._links_in(current[inum])
            except CtraceError as refused:
                # one that ended meanwhile, or that this process may not enter
                self._refused = str(refused)

    def _links_in(self, namespace: Namespace) -> list[int]:
        for priorities in PRIORITIES:
            links: list[int] = []
            try:
                with at(namespace):
                    for family in (2, 10):
                        for hook in (0, 3):  # PRE_ROUTING, LOCAL_OUT
                            for prog, priority in zip(self._programs, priorities):
                                links.append(bpf.link_netfilter(prog, family, hook, priority))
            except CtraceError as refused:
                for link in links:
                    os.close(link)
                if not (isinstance(refused, bpf.BpfError) and refused.errno == errno.EBUSY):
                    raise
                if BESIDE_OTHERS not in self.blind:
                    self.blind.append(BESIDE_OTHERS)
            else:
                return links
        raise CtraceError("too many others are measuring here: stop one of them")

    def _leave(self, inum: int) -> None:
        for link in self._spaces.pop(inum):
            os.close(link)

    # -- stacks of what happens to the table -------------------------------------------------

    def stacks_of(self, event: str, names: Symbols) -> None:
        """From now on also sample the kernel's stack at each insert, drop or evict.

        Raises CtraceError when this kernel and family cannot.
        """
        if event == "evict" or self.family == "netfilter":
            self._stack_at_tracepoint(event, names)
        elif event == "insert":
            self._attach("__nf_conntrack_hash_insert", "stack_insert", exit_=False)
        else:
            self._pair("early_drop", "stack_enter", "stack_leave")

    def _stack_at_tracepoint(self, event: str, names: Symbols) -> None:
        program, tracepoint, bound, function = TRACEPOINTS[event]
        if program not in self._objects.code:
            raise CtraceError("this kernel gives no reasons for dropped packets (5.17)")
        if bound:
            place = names.range(function)
            if place is None:
                raise CtraceError(f"/proc/kallsyms has no {function}")
            self._objects.bound(bound, *place)
        fd = self._objects.load(program, bpf.ProgType.RAW_TRACEPOINT)
        self._links.append(bpf.raw_tracepoint_open(fd, tracepoint))

    # -- what was measured -------------------------------------------------------------------

    def read(self) -> Times:
        """Everything measured since attaching."""
        return read_times(self._objects)

    def entries(self) -> list[int]:
        """Addresses of some entries that recent packets belonged to; they may have gone since."""
        size, recent = 8 * self._objects.cpus, self._objects.maps["recent"]
        found = (bpf.map_lookup(recent, n.to_bytes(4, "little"), size) for n in range(RECENT))
        addresses = np.frombuffer(b"".join(raw for raw in found if raw), np.uint64)
        entries: list[int] = np.unique(addresses[addresses != 0]).tolist()
        return entries


@contextmanager
def function_btf(function: str) -> Iterator[tuple[int, int]]:
    """A function's BTF id, and the descriptor of its module's BTF while it is needed (or 0).

    Raises CtraceError when no BTF knows the function.
    """
    module, kernel = btf.kernel(MODULE), btf.kernel()
    in_module = module.func(function) if module is not None else None
    target = in_module or (kernel.func(function) if kernel is not None else None)
    if target is None:
        raise CtraceError(f"no function {function} in BTF")
    with btf.opened(MODULE if in_module else "") as fd:
        yield target, fd


def _run_nothing() -> None:
    """Make the kernel call NOTHING some hundred times. Raises BpfError."""
    with function_btf(NOTHING) as (target, module):
        program = bpf.prog_load(
            _RETURN_ZERO,
            bpf.ProgType.TRACING,
            "ctrace_nothing",
            attach_type=bpf.AttachType.TRACE_FENTRY,
            attach_btf_id=target,
            attach_btf_fd=module,
        )
    try:
        for _ in range(CALIBRATIONS):
            bpf.prog_run(program)
    finally:
        os.close(program)


def read_times(objects: Objects) -> Times:
    """The histograms and services as they are now."""
    size = len(POINTS) * len(PROTOCOLS) * BINS
    bins = np.zeros(size, np.uint64)
    for index in range(size):
        raw = bpf.map_lookup(objects.maps["times"], index.to_bytes(4, "little"), 8 * objects.cpus)
        if raw is not None:
            bins[index] = np.frombuffer(raw, np.uint64).sum()
    keys, values = bpf.map_items(objects.maps["services"], 4, 16, SERVICES)
    totals = values.view(np.uint64).reshape(-1, 2)
    seen = totals[:, 0] > 0
    return Times(
        bins.reshape(len(POINTS), len(PROTOCOLS), BINS),
        _service_keys(keys.view(np.uint32).ravel()[seen]),
        totals[seen],
    )


def _service_keys(indexes: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Protocol << 16 | port of services by their number in the map."""
    sort, rest = indexes >> 16, indexes & 0xFFFF
    by_port = sort < len(PORTED)
    proto = np.where(by_port, np.array((*PORTED, 0), np.uint32)[sort], rest)
    return (proto << 16 | np.where(by_port, rest, 0)).astype(np.uint32)


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
