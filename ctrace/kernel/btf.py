"""The kernel's own type information (BTF), read just enough to find offsets and ids.

The type section is walked once into three numpy columns (place, kind, name); a
type becomes a Python object only when it is asked for. 130 000 types take about
50 ms. Format: Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import ctypes
import os
import struct
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Optional

import numpy as np

from ctrace.errors import CtraceError
from ctrace.kernel import bpf, disk_cache

KERNEL: Final = Path("/sys/kernel/btf")

INT, PTR, ARRAY, STRUCT, UNION, ENUM, TYPEDEF = 1, 2, 3, 4, 5, 6, 8
VOLATILE, CONST, RESTRICT, FUNC, FUNC_PROTO, VAR = 9, 10, 11, 12, 13, 14
DATASEC, TYPE_TAG, ENUM64 = 15, 18, 19

_MODIFIERS: Final = frozenset({TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG})

# Words of a type's description beyond the common three: fixed, and per element (vlen).
_FIXED: Final = [0] * 32
_EACH: Final = [0] * 32
for _kind, _words in {INT: 1, ARRAY: 3, VAR: 1, 17: 1}.items():
    _FIXED[_kind] = _words
for _kind, _words in {STRUCT: 3, UNION: 3, ENUM: 2, FUNC_PROTO: 2, DATASEC: 3, ENUM64: 3}.items():
    _EACH[_kind] = _words


@dataclass(frozen=True)
class Member:
    """A struct or union member."""

    name: str
    type: int
    bits: int
    """Offset from the start of the struct, in bits."""


class Btf:
    """One BTF blob; a module's is *split* and continues the ids of its base."""

    def __init__(self, data: bytes, base: Optional[Btf] = None) -> None:
        magic, _, _, header, type_off, type_len, str_off, str_len = struct.unpack_from(
            "<HBBIIIII", data
        )
        if magic != 0xEB9F:
            raise CtraceError("the kernel's BTF is not in this machine's byte order")
        self.base = base
        self._first = base.count if base else 1
        self._string_base = base.string_end if base else 0
        self.string_end: int = self._string_base + str_len
        start = header + str_off
        self._strings = data[start : start + str_len]
        start = header + type_off
        self._words = np.frombuffer(data, np.uint32, type_len // 4, start)
        self._place = _places(data[start : start + type_len])
        self._kinds = (self._words[self._place + 1] >> 24) & 31
        self._names = self._words[self._place]
        self.count: int = self._first + len(self._place)
        """One more than the last type id."""

    # -- lookups -------------------------------------------------------------------------

    def find(self, kind: int, name: str) -> Optional[int]:
        """The id of the first type of that kind and name, the module's own before its base's."""
        for offset in self._string_offsets(name):
            hits = np.flatnonzero((self._names == offset) & (self._kinds == kind))
            if len(hits):
                return self._first + int(hits[0])
        return self.base.find(kind, name) if self.base else None

    def func(self, name: str) -> Optional[int]:
        """The id of a function defined in this blob itself (what ``attach_btf_id`` wants)."""
        for offset in self._string_offsets(name):
            hits = np.flatnonzero((self._names == offset) & (self._kinds == FUNC))
            if len(hits):
                return self._first + int(hits[0])
        return None

    def args(self, func: int) -> tuple[str, ...]:
        """The names of a function's arguments."""
        proto = self._row(self._row(func)[2])
        return tuple(self.string(int(name)) for name in proto[3 : 3 + 2 * (proto[1] & 0xFFFF) : 2])

    def members(self, type_id: int) -> Iterator[Member]:
        """The members of a struct or union, in order."""
        row = self._row(type_id)
        bitfields = row[1] >> 31
        for i in range(row[1] & 0xFFFF):
            name, member, offset = row[3 + 3 * i : 6 + 3 * i]
            yield Member(self.string(name), member, offset & 0xFFFFFF if bitfields else offset)

    def member(self, struct_name: str, path: str) -> Optional[Member]:
        """A member by dotted path, through anonymous structs and unions and array indices.

        ``member("net", "ct.stat")``; None when this kernel has no such struct or member.
        """
        type_id = self.find(STRUCT, struct_name) or self.find(UNION, struct_name)
        if type_id is None:
            return None
        bits = 0
        for part in path.split("."):
            name, _, index = part.partition("[")
            found = self._search(self.resolve(type_id), name)
            if found is None:
                return None
            bits, type_id = bits + found.bits, found.type
            if index:
                element = self._row(self.resolve(type_id))[3]
                bits += int(index.rstrip("]")) * self.size(element) * 8
                type_id = element
        return Member(path, type_id, bits)

    def offset(self, struct_name: str, path: str) -> Optional[int]:
        """Offset of a member in bytes, or None."""
        found = self.member(struct_name, path)
        return None if found is None else found.bits // 8

    def size_of(self, struct_name: str) -> Optional[int]:
        """Size of a struct in bytes, or None."""
        type_id = self.find(STRUCT, struct_name)
        return None if type_id is None else self.size(type_id)

    def enum_value(self, name: str, enum: str = "") -> Optional[int]:
        """An enumerator's value, in the enum of that name or in any when none is given."""
        if enum:
            type_id = self.find(ENUM, enum)
            return None if type_id is None else self._enumerators(type_id).get(name)
        for type_id in self._all(ENUM):
            value = self._enumerators(type_id).get(name)
            if value is not None:
                return value
        return None

    def percpu_offset(self, name: str) -> Optional[int]:
        """Where a per-CPU variable lies in the kernel's per-CPU section."""
        section, variable = self.find(DATASEC, ".data..percpu"), self.find(VAR, name)
        if section is None or variable is None:
            return None
        row = self._row(section)
        entries = zip(row[3::3], row[4::3])
        return next((offset for type_id, offset in entries if type_id == variable), None)

    # -- types ---------------------------------------------------------------------------

    def resolve(self, type_id: int) -> int:
        """The type below typedefs, const, volatile and tags."""
        while self.kind(type_id) in _MODIFIERS:
            type_id = self._row(type_id)[2]
        return type_id

    def kind(self, type_id: int) -> int:
        """BTF_KIND_* of a type; 0 for void."""
        if type_id == 0:
            return 0
        if type_id < self._first and self.base:
            return self.base.kind(type_id)
        return int(self._kinds[type_id - self._first])

    def size(self, type_id: int) -> int:
        """Size of a type in bytes."""
        type_id = self.resolve(type_id)
        row = self._row(type_id)
        kind = self.kind(type_id)
        if kind == PTR:
            return 8
        if kind == ARRAY:
            return row[5] * self.size(row[3])
        return row[2]

    def string(self, offset: int) -> str:
        """The string at an offset of the (concatenated) string section."""
        if offset < self._string_base and self.base:
            return self.base.string(offset)
        offset -= self._string_base
        return self._strings[offset : self._strings.index(b"\0", offset)].decode()

    # -- inside --------------------------------------------------------------------------

    def _row(self, type_id: int) -> list[int]:
        """The words that describe a type: name, info, size or type, then what its kind adds."""
        if type_id < self._first and self.base:
            return self.base._row(type_id)
        place = int(self._place[type_id - self._first])
        info = int(self._words[place + 1])
        kind = (info >> 24) & 31
        length = 3 + _FIXED[kind] + _EACH[kind] * (info & 0xFFFF)
        words: list[int] = self._words[place : place + length].tolist()
        return words

    def _search(self, type_id: int, name: str) -> Optional[Member]:
        for member in self.members(type_id):
            if member.name == name:
                return member
            inner = self.resolve(member.type)
            if not member.name and self.kind(inner) in (STRUCT, UNION):
                found = self._search(inner, name)
                if found:
                    return Member(name, found.type, member.bits + found.bits)
        return None

    def _enumerators(self, type_id: int) -> dict[str, int]:
        row = self._row(type_id)
        count = row[1] & 0xFFFF
        values = np.array(row[4 : 4 + 2 * count : 2], np.uint32).view(np.int32).tolist()
        return dict(zip(map(self.string, row[3 : 3 + 2 * count : 2]), values))

    def _all(self, kind: int) -> Iterator[int]:
        for index in np.flatnonzero(self._kinds == kind):
            yield self._first + int(index)

    def _string_offsets(self, name: str) -> Iterator[int]:
        """Every offset at which the string occurs, including as the tail of a longer string."""
        if self.base:
            yield from self.base._string_offsets(name)
        needle = name.encode() + b"\0"
        at = self._strings.find(needle)
        while at >= 0:
            yield self._string_base + at
            at = self._strings.find(needle, at + 1)


def _places(types: bytes) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Where each type starts, in 32-bit words; cached, because the walk is the slow part."""
    name = disk_cache.name("btf", zlib.crc32(types).to_bytes(4, "little"), disk_cache.this_kernel())
    data = disk_cache.load(name)
    if data is None:
        data = _walk(types).tobytes()
        disk_cache.store(name, data)
    return np.frombuffer(data, np.int32)


def _walk(types: bytes) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Where each type starts, in 32-bit words: the one loop over all types."""
    words = memoryview(types).cast("I")
    fixed, each = _FIXED, _EACH
    places = array("i")
    add = places.append
    at, end = 0, len(words)
    while at < end:
        add(at)
        info = words[at + 1]
        kind = (info >> 24) & 31
        at += 3 + fixed[kind] + each[kind] * (info & 0xFFFF)
    return np.frombuffer(places, np.int32)


@cache
def kernel(name: str = "vmlinux") -> Optional[Btf]:
    """The running kernel's BTF, or a module's on top of it; None where there is none."""
    try:
        data = (KERNEL / name).read_bytes()
    except OSError:
        return None
    if name == "vmlinux":
        return Btf(data)
    base = kernel()
    return None if base is None else Btf(data, base)


def open_object(name: str) -> Optional[int]:
    """A descriptor of the kernel's BTF object of that name (a module's), or None."""
    last = 0
    while True:
        result, after = bpf.bpf(bpf.Cmd.BTF_GET_NEXT_ID, struct.pack("<III", last, 0, 0))
        if result < 0:
            return None
        (last,) = struct.unpack_from("<I", after, 4)
        fd, _ = bpf.bpf(bpf.Cmd.BTF_GET_FD_BY_ID, struct.pack("<III", last, 0, 0))
        if fd < 0:
            continue
        text = ctypes.create_string_buffer(64)
        info = ctypes.create_string_buffer(
            struct.pack("<QIIQII", 0, 0, 0, ctypes.addressof(text), len(text), 0), 32
        )
        bpf.bpf(bpf.Cmd.OBJ_GET_INFO_BY_FD, struct.pack("<IIQ", fd, 32, ctypes.addressof(info)))
        if text.value.decode(errors="replace") == name:
            return fd
        os.close(fd)


@contextmanager
def opened(module: str) -> Iterator[int]:
    """The descriptor of a module's BTF while a program is loaded; 0, the kernel's own, for no name.

    Raises CtraceError where the module has gone.
    """
    fd = open_object(module) if module else 0
    if fd is None:
        raise CtraceError(f"{module} was unloaded: load it again (modprobe {module})")
    try:
        yield fd
    finally:
        if module:
            os.close(fd)
