"""The ``kprobe`` hook family: probes and return probes through perf_event_open(2).

Each probe is a perf event of the kernel's kprobe PMU (4.17), so it is a descriptor of this process:
it has no name in tracefs, and nothing remains however the process ends.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import re
import struct
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import ClassVar, Final, NamedTuple, Optional

from ctrace.capture.hooks.function_hooks import HOOKS, MODULE, FunctionCapture, Hook, fits
from ctrace.errors import CtraceError
from ctrace.kernel import bpf

PMU: Final = Path("/sys/bus/event_source/devices/kprobe")
SET_BPF: Final = 0x40042408
ENABLE: Final = 0x2400
_ATTR_SIZE: Final = 112
_RETURN_ZERO: Final = bytes.fromhex("b700000000000000 9500000000000000")

# Where struct pt_regs has the six arguments, the result and the stack pointer, in
# 64-bit words.
_REGISTERS: Final[Mapping[str, tuple[tuple[int, ...], int, int]]] = {
    "x86_64": ((14, 13, 12, 11, 9, 8), 10, 19),
    "aarch64": ((0, 1, 2, 3, 4, 5), 0, 31),
    "riscv64": ((10, 11, 12, 13, 14, 15), 10, 2),
}


class Symbol(NamedTuple):
    """A function by name, or by address where the name is ambiguous."""

    name: str
    address: int = 0


class KprobeCapture(FunctionCapture[Symbol]):
    """Implements :class:`ctrace.capture.family.Capture` with kprobes and return probes."""

    family: ClassVar[str] = "kprobe"

    def find(self, hook: Hook) -> Optional[Symbol]:
        """The function's symbol, if it takes the arguments that we expect."""
        return symbols().get(hook.function) if fits(hook) else None

    def arguments(self, hooks: Iterable[Hook]) -> Mapping[str, int]:
        """In registers, as this machine passes them."""
        return register_constants(hook.function for hook in hooks)

    def attach(self, name: str, code: bytes, target: Symbol, *, exit_: bool) -> int:
        """Load the program and open the probe that runs it."""
        program = self._objects.load(name, code, bpf.ProgType.KPROBE)
        return open_probe(program, target, exit_=exit_)


def open_probe(program: int, symbol: Symbol, *, exit_: bool) -> int:
    """A kprobe (or return probe) that runs a program; closing the descriptor removes it.

    Raises BpfError (ENOENT: no such function), or CtraceError without the PMU.
    """
    try:
        kind = int((PMU / "type").read_text())
        bit = int((PMU / "format" / "retprobe").read_text().strip().rpartition(":")[2])
    except OSError as error:
        raise CtraceError(
            "this kernel has no kprobes (CONFIG_KPROBE_EVENTS): use another hook family"
        ) from error
    name = ctypes.create_string_buffer(symbol.name.encode())
    attr = bytearray(_ATTR_SIZE)
    struct.pack_into("<IIQ", attr, 0, kind, _ATTR_SIZE, 1 << bit if exit_ else 0)
    # config1 and config2: the name and an offset in it, or no name and an address
    by_address = bool(symbol.address)
    struct.pack_into("<QQ", attr, 56, 0 if by_address else ctypes.addressof(name), symbol.address)
    event = bpf.perf_event_open(bytes(attr), -1, 0)
    try:
        fcntl.ioctl(event, SET_BPF, program)
        fcntl.ioctl(event, ENABLE, 0)
    except OSError as error:
        os.close(event)
        raise bpf.BpfError(f"cannot probe {symbol.name}", error.errno or errno.EIO) from error
    return event


@cache
def symbols() -> Mapping[str, Symbol]:
    """The functions to probe that this kernel has.

    Where several functions share a name, the one in nf_conntrack is probed by address; it is left
    out where the address is unknown (built in, or addresses hidden).
    """
    names = "|".join(hook.function for hook in HOOKS)
    pattern = re.compile(rf"^([0-9a-f]+) [tT] ({names})(?:\t\[(\w+)\])?$", re.M)
    try:
        text = Path("/proc/kallsyms").read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise CtraceError("cannot read /proc/kallsyms, which --hooks kprobe needs") from error
    places: dict[str, list[tuple[int, str]]] = {}
    for address, name, module in pattern.findall(text):
        places.setdefault(name, []).append((int(address, 16), module))
    found = {}
    for name, candidates in places.items():
        if len(candidates) == 1:
            found[name] = Symbol(name)
            continue
        ours = [address for address, module in candidates if module == MODULE and address]
        if len(ours) == 1:
            found[name] = Symbol(name, ours[0])
    return found


def register_constants(functions: Iterable[str]) -> dict[str, int]:
    """Where a probe finds the arguments of these functions, and a return probe the result.

    Raises CtraceError on a machine whose way to pass arguments is not known here.
    """
    args, result, stack = registers()
    return {
        "KPROBE": 1,
        "STACK_POINTER": 8 * stack,
        **{f"ARG_{n}": 8 * word for n, word in enumerate(args)},
        **{f"RESULT_{function}": 8 * result for function in functions},
    }


def registers() -> tuple[tuple[int, ...], int, int]:
    """Words of struct pt_regs: the arguments, the result, the stack pointer.

    Raises CtraceError on a machine whose way to pass arguments is not known here.
    """
    try:
        return _REGISTERS[platform.machine()]
    except KeyError:
        raise CtraceError(
            f"--hooks kprobe does not know how {platform.machine()} passes arguments"
        ) from None


def probe() -> None:
    """Attach a program that does nothing. Raises CtraceError saying why not."""
    registers()
    program = bpf.prog_load(_RETURN_ZERO, bpf.ProgType.KPROBE, "ctrace_probe")
    try:
        symbol = symbols().get("nf_conntrack_free", Symbol("nf_conntrack_free"))
        for exit_ in (False, True):
            try:
                os.close(open_probe(program, symbol, exit_=exit_))
            except bpf.BpfError as error:
                if error.errno != errno.ENOENT:
                    raise
                raise CtraceError(
                    "nf_conntrack is not loaded: load it (modprobe nf_conntrack)"
                ) from error
    finally:
        os.close(program)
