"""Kernel addresses to function names, from /proc/kallsyms."""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import cache
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.errors import CtraceError

_LINE = re.compile(r"^([0-9a-f]+) [tTwW] (\S+)(?:\t\[(\w+)\])?$", re.M)
_DATA = re.compile(r"^([0-9a-f]+) [bBdDrR] (nf_conntrack_\w+)(?:\t\[\w+\])?$", re.M)

CONNTRACK = re.compile(
    r"(__)?(nf_conntrack_|nf_ct_|nf_confirm|ipv[46]_conntrack_|ipv[46]_confirm|early_drop"
    r"|hash_conntrack|resolve_normal_ct|init_conntrack|get_next_corpse|destroy_conntrack"
    r"|ctnetlink_|gc_worker|tcp_in_window|nf_tcp_)"
)
"""Functions of connection tracking itself, without NAT and the rules that use it."""


LARGEST: Final = 1 << 17
"""Bytes. No function is longer, so an address farther behind one belongs to none that is listed."""

_PROGRAM: Final = re.compile(r"bpf_prog_[0-9a-f]{16}|bpf_trampoline_|bpf_trace_run\d|__bpf_prog_")


def is_tracer(name: str) -> bool:
    """Whether a function is a BPF program, or code that calls one."""
    return _PROGRAM.match(name) is not None


class Symbols:
    """All functions of the running kernel and its modules, by address."""

    def __init__(self, text: str) -> None:
        found = [(int(at, 16), name, module) for at, name, module in _LINE.findall(text)]
        found.sort()
        self._starts = [at for at, _, _ in found]
        self._names = [name.partition(".")[0] for _, name, _ in found]
        self._modules = [module for _, _, module in found]
        self._data = {name: int(at, 16) for at, name in _DATA.findall(text)}

    @property
    def hidden(self) -> bool:
        """True when the kernel shows no addresses (kptr_restrict)."""
        return not self._starts or self._starts[-1] == 0

    def name(self, address: int) -> str:
        """The function at an address; hexadecimal where there is none."""
        at = self._at(address)
        if at < 0:
            return f"0x{address:x}"
        found: str = self._names[at]
        return found

    def _at(self, address: int) -> int:
        """Which function holds the address; -1: none, as between modules."""
        at = bisect_right(self._starts, address) - 1
        if at < 0 or not self._starts[at] or address - self._starts[at] >= LARGEST:
            return -1
        return at

    def learn_programs(self) -> None:
        """Read the BPF programs and trampolines that were added since (some 50 ms)."""
        found = sorted(
            (int(at, 16), name, module)
            for at, name, module in _LINE.findall(_late_lines())
            if module in ("bpf", "__builtin__ftrace")
        )
        for start, name, module in found:
            at = bisect_right(self._starts, start)
            if at and self._starts[at - 1] == start and self._modules[at - 1] == module:
                self._names[at - 1] = name
                continue
            self._starts.insert(at, start)
            self._names.insert(at, name)
            self._modules.insert(at, module)

    def data(self, name: str) -> int:
        """Address of one of conntrack's variables; 0 if not listed (KALLSYMS_ALL)."""
        return self._data.get(name, 0)

    def range(self, name: str) -> Optional[tuple[int, int]]:
        """A function's start and size, without parts moved elsewhere (.cold)."""
        places = [at for at, other in enumerate(self._names[:-1]) if other == name]
        sizes = [(self._starts[at + 1] - self._starts[at], self._starts[at]) for at in places]
        size, start = max(sizes, default=(0, 0))
        return (start, size) if start else None

    def is_conntrack(self, address: int) -> bool:
        """Whether the address lies in connection tracking's own code."""
        at = self._at(address)
        if at < 0:
            return False
        module = self._modules[at]
        return module == "nf_conntrack" or (
            not module and CONNTRACK.match(self._names[at]) is not None
        )

    def names(self, addresses: npt.NDArray[np.uint64]) -> list[str]:
        """Names for an array of addresses."""
        return [self.name(int(address)) for address in addresses]


def _late_lines() -> str:
    """The end of /proc/kallsyms, where BPF programs are listed."""
    with open("/proc/kallsyms", encoding="ascii", errors="replace") as file:
        text = file.read()
    first = text.find("\t[bpf]")
    ftrace = text.find("\t[__builtin__ftrace]")
    begin = min((at for at in (first, ftrace) if at >= 0), default=len(text))
    return text[text.rfind("\n", 0, begin) + 1 :]


@cache
def kernel() -> Symbols:
    """The running kernel's symbols (about 0.2 s). Raises CtraceError when they are hidden."""
    with open("/proc/kallsyms", encoding="ascii", errors="replace") as file:
        symbols = Symbols(file.read())
    if symbols.hidden:
        raise CtraceError(
            "kernel symbols are hidden: run as root, or set kernel.kptr_restrict to 1 or 0"
        )
    return symbols
