"""BTF of kernels that are not running: from the files that scripts/kernels fetched."""

from __future__ import annotations

import gzip
import lzma
import os
import struct
from functools import cache
from pathlib import Path
from typing import Optional

from ctrace.kernel.btf import Btf

FETCHED = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctrace" / "kernels"
VERSIONS = ("5.10", "6.1", "6.12", "7.2")


@cache
def types(version: str) -> Optional[tuple[Btf, Optional[Btf]]]:
    """The kernel's BTF, and nf_conntrack's where it is in the module; None: it is not here."""
    images = sorted((FETCHED / version).glob("boot/vmlinuz-*"))
    if not images:
        return None
    section = _section(_vmlinux(images[0].read_bytes()), b".BTF")
    assert section is not None
    kernel = Btf(section)
    found = next((FETCHED / version).glob("lib/modules/*/kernel/net/netfilter/nf_conntrack.ko*"))
    inside = _section(_plain(found.read_bytes()), b".BTF")
    return kernel, Btf(inside, kernel) if inside else None


def _vmlinux(image: bytes) -> bytes:
    """The ELF file in a bzImage: payload_offset and payload_length of its header
    (Documentation/arch/x86/boot.rst); the last four bytes are its size."""
    setup = (image[0x1F1] or 4) + 1
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = setup * 512 + offset
    return _plain(image[start : start + length - 4])


def _plain(data: bytes) -> bytes:
    if data[:6] == b"\xfd7zXZ\0":
        return lzma.LZMADecompressor().decompress(data)
    if data[:2] == b"\x1f\x8b":
        return gzip.decompress(data)
    if data[:4] == b"\x28\xb5\x2f\xfd":
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data


def _section(elf: bytes, wanted: bytes) -> Optional[bytes]:
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)

    def header(number: int) -> tuple[int, ...]:
        return struct.unpack_from("<IIQQQQ", elf, table + size * number)

    strings = header(names)[4]
    for number in range(count):
        name, _, _, _, offset, length = header(number)
        start = strings + name
        if elf[start : elf.index(b"\0", start)] == wanted:
            return elf[offset : offset + length]
    return None
