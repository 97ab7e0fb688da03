"""Kernel addresses to function names, from /proc/kallsyms."""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import cache

import numpy as np
import numpy.typing as npt

from ctrace.errors import CtraceError

_LINE = re.compile(r"^([0-9a-f]+) [tTwW] (\S+)(?:\t\[(\w+)\])?$", re.M)

CONNTRACK = re.compile(
    r"(__)?(nf_conntrack_|nf_ct_|nf_confirm|ipv[46]_conntrack_|ipv[46]_confirm|early_drop"
    r"|hash_conntrack|resolve_normal_ct|init_conntrack|get_next_corpse|destroy_conntrack"
    r"|ctnetlink_|gc_worker|tcp_in_window|nf_tcp_)"
)
"""Functions of connection tracking itself; NAT and the rules that ask for it are not."""


class Symbols:
    """All functions of the running kernel and its modules, by address."""

    def __init__(self, text: str) -> None:
        found = [(int(at, 16), name, module) for at, name, module in _LINE.findall(text)]
        found.sort()
        self._starts = [at for at, _, _ in found]
        self._names = [name.partition(".")[0] for _, name, _ in found]
        self._modules = [module for _, _, module in found]

    @property
    def hidden(self) -> bool:
        """True when the kernel shows no addresses (kptr_restrict)."""
        return not self._starts or self._starts[-1] == 0

    def name(self, address: int) -> str:
        """The function at an address; hexadecimal where there is none."""
        at = bisect_right(self._starts, address) - 1
        if at < 0 or not self._starts[at]:
            return f"0x{address:x}"
        found: str = self._names[at]
        return found

    def is_conntrack(self, address: int) -> bool:
        """Whether the address lies in connection tracking's own code."""
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return False
        module = self._modules[at]
        return module == "nf_conntrack" or (
            not module and CONNTRACK.match(self._names[at]) is not None
        )

    def names(self, addresses: npt.NDArray[np.uint64]) -> list[str]:
        """Names for an array of addresses."""
        return [self.name(int(address)) for address in addresses]


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
