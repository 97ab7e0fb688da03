"""The few system calls of BPF, through ctypes: no library between us and the kernel.

Everything returns plain file descriptors, which their owner closes; nothing is
pinned, so all of it vanishes with the process. Layouts: ``union bpf_attr`` and
``struct bpf_prog_info`` in include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import resource
import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Final, NoReturn, Optional

import numpy as np
import numpy.typing as npt

from ctrace.errors import CtraceError

# (bpf, perf_event_open), of machines with the byte order in which everything here is written
_NUMBERS: Final = {
    "x86_64": (321, 298),
    "aarch64": (280, 241),
    "riscv64": (280, 241),
    "ppc64le": (361, 319),
    "loongarch64": (280, 241),
}
_ATTR_SIZE: Final = 144
_LOG_SIZE: Final = 1 << 20
_TRIES: Final = range(20)  # a signal that is pending breaks a load off: EAGAIN
_libc: Final = ctypes.CDLL(None, use_errno=True)


class Cmd(IntEnum):
    """``enum bpf_cmd``."""

    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    MAP_GET_NEXT_KEY = 4
    PROG_LOAD = 5
    PROG_TEST_RUN = 10
    PROG_GET_NEXT_ID = 11
    MAP_GET_NEXT_ID = 12
    PROG_GET_FD_BY_ID = 13
    OBJ_GET_INFO_BY_FD = 15
    PROG_QUERY = 16
    RAW_TRACEPOINT_OPEN = 17
    BTF_GET_FD_BY_ID = 19
    BTF_GET_NEXT_ID = 23
    MAP_LOOKUP_BATCH = 24
    LINK_CREATE = 28
    LINK_GET_FD_BY_ID = 30
    LINK_GET_NEXT_ID = 31
    ENABLE_STATS = 32


class MapType(IntEnum):
    """``enum bpf_map_type``: those in use."""

    HASH = 1
    ARRAY = 2
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    STACK_TRACE = 7
    LRU_HASH = 9
    ARRAY_OF_MAPS = 12
    RINGBUF = 27


class ProgType(IntEnum):
    """``enum bpf_prog_type``: those in use."""

    KPROBE = 2
    PERF_EVENT = 7
    RAW_TRACEPOINT = 17
    TRACING = 26
    NETFILTER = 32


class AttachType(IntEnum):
    """``enum bpf_attach_type``: those in use."""

    NONE = 0
    TRACE_FENTRY = 24
    TRACE_FEXIT = 25
    NETFILTER = 45


F_MMAPABLE: Final = 1 << 10

ENOTSUPP: Final = 524
"""The kernel's own "not supported", unknown to the C library. Machines without trampolines (arm64
before 6.4) return it when a program attaches to a function."""


class BpfError(CtraceError):
    """A bpf(2) call that failed: ``errno`` and, for programs, the end of the verifier's log."""

    def __init__(self, what: str, number: int, log: str = "") -> None:
        self.errno = number
        self.log = log
        hint = f": {log.strip().splitlines()[-1]}" if log.strip() else ""
        why = "not supported by this kernel on this machine" if number == ENOTSUPP else None
        super().__init__(f"{what}: {why or os.strerror(number)}{hint}")


def _numbers() -> tuple[int, int]:
    machine = platform.machine()
    if machine not in _NUMBERS:
        raise CtraceError(f"no BPF on {machine}: use --hooks netlink")
    return _NUMBERS[machine]


def bpf(cmd: Cmd, attr: bytes | bytearray) -> tuple[int, bytes]:
    """bpf(2): (result, the attributes as the kernel left them); result < 0 is -errno."""
    buffer = ctypes.create_string_buffer(bytes(attr), _ATTR_SIZE)
    ctypes.set_errno(0)
    result = _libc.syscall(_numbers()[0], int(cmd), buffer, _ATTR_SIZE)
    return (int(result) if result >= 0 else -ctypes.get_errno()), buffer.raw


def _checked(cmd: Cmd, attr: bytes | bytearray, what: str) -> int:
    result, _ = bpf(cmd, attr)
    if result < 0:
        _fail(what, -result)
    return result


def _fail(what: str, number: int, log: str = "") -> NoReturn:
    raise BpfError(what, number, log)


def _name(text: str) -> bytes:
    return re.sub(r"\W", "_", text).encode()[:15]


@cache
def kernel_version() -> tuple[int, int, int]:
    """The running kernel's release as numbers; a missing part is 0."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", os.uname().release)
    if not found:
        return (0, 0, 0)
    major, minor, patch = (int(part or 0) for part in found.groups())
    return (major, minor, patch)


@cache
def possible_cpus() -> int:
    """How many values a per-CPU map holds per key."""
    try:
        with open("/sys/devices/system/cpu/possible", encoding="ascii") as file:
            return int(re.split(r"[-,]", file.read().strip())[-1]) + 1
    except (OSError, ValueError):
        return os.cpu_count() or 1


def online_cpus() -> frozenset[int]:
    """The CPUs that are online; all possible ones where that cannot be read."""
    try:
        with open("/sys/devices/system/cpu/online", encoding="ascii") as file:
            spans = [part.split("-") for part in file.read().strip().split(",")]
            return frozenset(
                cpu for span in spans for cpu in range(int(span[0]), int(span[-1]) + 1)
            )
    except (OSError, ValueError):
        return frozenset(range(possible_cpus()))


@cache
def unlimited_memlock() -> None:
    """Kernels before 5.11 charge maps to RLIMIT_MEMLOCK, whose default is too small."""
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)
    except (OSError, ValueError):
        return


def map_create(
    kind: MapType,
    key_size: int,
    value_size: int,
    max_entries: int,
    *,
    flags: int = 0,
    inner: int = 0,
    name: str = "",
) -> int:
    """A new map's descriptor. Raises BpfError."""
    unlimited_memlock()
    attr = struct.pack(
        "<IIIIIII16s", kind, key_size, value_size, max_entries, flags, inner, 0, _name(name)
    )
    return _checked(Cmd.MAP_CREATE, attr, f"cannot create BPF map {name or kind.name}")


def _element(cmd: Cmd, fd: int, key: bytes, value: Optional[ctypes.Array[ctypes.c_char]]) -> int:
    keys = ctypes.create_string_buffer(key, len(key))
    at = ctypes.addressof(value) if value is not None else 0
    return bpf(cmd, struct.pack("<IIQQQ", fd, 0, ctypes.addressof(keys), at, 0))[0]


def map_update(fd: int, key: bytes, value: bytes) -> None:
    """Set one element; a per-CPU map wants all CPUs' values joined. Raises BpfError."""
    raw = ctypes.create_string_buffer(value, len(value))
    result = _element(Cmd.MAP_UPDATE_ELEM, fd, key, raw)
    if result < 0:
        _fail("cannot update BPF map", -result)


def map_lookup(fd: int, key: bytes, value_size: int) -> Optional[bytes]:
    """One element (all CPUs' values for a per-CPU map), or None."""
    value = ctypes.create_string_buffer(value_size)
    return value.raw if _element(Cmd.MAP_LOOKUP_ELEM, fd, key, value) >= 0 else None


def map_delete(fd: int, key: bytes) -> bool:
    """Remove one element; whether it was there."""
    return _element(Cmd.MAP_DELETE_ELEM, fd, key, None) >= 0


def map_items(
    fd: int, key_size: int, value_size: int, max_entries: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Every element of a hash: keys (n, key_size) and values (n, value_size) as bytes.

    ``value_size`` counts all CPUs for a per-CPU map. One system call from 5.6 on,
    one per key before.
    """
    keys = np.empty((max_entries, key_size), np.uint8)
    values = np.empty((max_entries, value_size), np.uint8)
    cursor = ctypes.create_string_buffer(max(key_size, 8))
    total, batch_in = 0, 0
    while total < max_entries:
        attr = struct.pack(
            "<QQQQIIQQ",
            batch_in,
            ctypes.addressof(cursor),
            keys.ctypes.data + total * key_size,
            values.ctypes.data + total * value_size,
            max_entries - total,
            fd,
            0,
            0,
        )
        result, after = bpf(Cmd.MAP_LOOKUP_BATCH, attr)
        if result < 0 and result not in (-errno.ENOENT, -errno.EFAULT):
            return _items_by_key(fd, keys, values)
        total += int(struct.unpack_from("<I", after, 32)[0])
        if result < 0:
            break
        batch_in = ctypes.addressof(cursor)
    return keys[:total], values[:total]


def _items_by_key(
    fd: int, keys: npt.NDArray[np.uint8], values: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    previous = ctypes.create_string_buffer(keys.shape[1])
    following = ctypes.create_string_buffer(keys.shape[1])
    at, total = 0, 0
    while total < len(keys):
        attr = struct.pack("<IIQQ", fd, 0, at, ctypes.addressof(following))
        if bpf(Cmd.MAP_GET_NEXT_KEY, attr)[0] < 0:
            break
        value = map_lookup(fd, following.raw, values.shape[1])
        if value is not None:
            keys[total] = np.frombuffer(following.raw, np.uint8)
            values[total] = np.frombuffer(value, np.uint8)
            total += 1
        previous.raw, at = following.raw, ctypes.addressof(previous)
    return keys[:total], values[:total]


# -- programs ----------------------------------------------------------------------------


def prog_load(
    instructions: bytes,
    kind: ProgType,
    name: str,
    *,
    attach_type: AttachType = AttachType.NONE,
    attach_btf_id: int = 0,
    attach_btf_fd: int = 0,
) -> int:
    """Load one program. Raises BpfError with the verifier's log when it is refused."""
    unlimited_memlock()
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(b"GPL")
    major, minor, patch = kernel_version()
    for level in (0, 1):
        log = ctypes.create_string_buffer(_LOG_SIZE) if level else None
        told = (level, _LOG_SIZE, ctypes.addressof(log)) if log is not None else (0, 0, 0)
        attr = bytearray(_ATTR_SIZE)
        struct.pack_into(
            "<IIQQIIQII16sII",
            attr,
            0,
            kind,
            len(instructions) // 8,
            ctypes.addressof(code),
            ctypes.addressof(licence),
            *told,
            major << 16 | minor << 8 | min(patch, 255),
            0,
            _name(name),
            0,
            attach_type,
        )
        struct.pack_into("<II", attr, 108, attach_btf_id, attach_btf_fd)
        for _ in _TRIES:
            result, _ = bpf(Cmd.PROG_LOAD, attr)
            if result != -errno.EAGAIN:
                break
        if result >= 0:
            return result
    text = log.value.decode(errors="replace") if log is not None else ""
    _fail(f"the kernel refuses BPF program {name}", -result, text)


def raw_tracepoint_open(prog: int, name: str = "") -> int:
    """Attach to a raw tracepoint, or a TRACING program where it was loaded for (no name)."""
    text = ctypes.create_string_buffer(name.encode())
    attr = struct.pack("<QII", ctypes.addressof(text) if name else 0, prog, 0)
    return _checked(Cmd.RAW_TRACEPOINT_OPEN, attr, f"cannot attach to {name or 'function'}")


def link_netfilter(prog: int, family: int, hook: int, priority: int) -> int:
    """A netfilter link in this thread's network namespace, which it keeps alive (6.4)."""
    attr = struct.pack("<IIIIIIiI", prog, 0, AttachType.NETFILTER, 0, family, hook, priority, 0)
    return _checked(Cmd.LINK_CREATE, attr, "cannot attach to netfilter")


def prog_run(prog: int, args: tuple[int, ...] = (), cpu: Optional[int] = None) -> int:
    """Run a raw tracepoint program once, here or on a given CPU (5.10); its result.

    Raises BpfError.
    """
    context = struct.pack(f"<{len(args)}Q", *args)
    held = ctypes.create_string_buffer(context, max(len(context), 1))
    attr = bytearray(_ATTR_SIZE)
    struct.pack_into("<I", attr, 0, prog)
    struct.pack_into("<I", attr, 40, len(context))
    struct.pack_into("<Q", attr, 48, ctypes.addressof(held) if args else 0)
    if cpu is not None:
        struct.pack_into("<II", attr, 64, 1, cpu)  # BPF_F_TEST_RUN_ON_CPU
    result, after = bpf(Cmd.PROG_TEST_RUN, attr)
    if result < 0:
        _fail("cannot run BPF program", -result)
    return int(struct.unpack_from("<I", after, 4)[0])


@dataclass(frozen=True)
class ProgInfo:
    """What the kernel reports about a program; times are 0 unless statistics are enabled."""

    id: int
    name: str
    run_time_ns: int
    run_count: int
    recursion_misses: int


def prog_info(fd: int) -> ProgInfo:
    """The kernel's own record of a loaded program. Raises BpfError."""
    info = ctypes.create_string_buffer(232)
    attr = struct.pack("<IIQ", fd, len(info), ctypes.addressof(info))
    _checked(Cmd.OBJ_GET_INFO_BY_FD, attr, "cannot read BPF program")
    (number,) = struct.unpack_from("<I", info, 4)
    name = info.raw[64:80].split(b"\0")[0].decode(errors="replace")
    return ProgInfo(number, name, *struct.unpack_from("<QQQ", info, 192))


def enable_stats() -> int:
    """Let the kernel measure every program's run time until the descriptor closes (5.8)."""
    return _checked(Cmd.ENABLE_STATS, struct.pack("<I", 0), "cannot enable BPF statistics")


def perf_event_open(attr: bytes, pid: int, cpu: int) -> int:
    """perf_event_open(2), close-on-exec. Raises BpfError."""
    buffer = ctypes.create_string_buffer(attr, len(attr))
    ctypes.set_errno(0)
    cloexec = ctypes.c_ulong(8)
    result = _libc.syscall(_numbers()[1], buffer, pid, cpu, -1, cloexec)
    if result < 0:
        _fail("cannot open a perf event", ctypes.get_errno())
    return int(result)
