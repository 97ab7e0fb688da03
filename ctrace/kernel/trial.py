"""What the verifier accepts here, found out by loading the smallest program that needs it."""

from __future__ import annotations

import os
import struct

from ctrace.kernel.bpf import BpfError, ProgType, prog_load


def can_cast(function: int, struct_type: int) -> bool:
    """Whether programs may read any address through bpf_rdonly_cast, given by BTF ids (6.2)."""
    return _loads(
        (0xB7, 0x01, 0, 0),  # r1 = 0
        (0xB7, 0x02, 0, struct_type),  # r2 = struct_type
        (0x85, 0x20, 0, function),  # r0 = function(r1, r2)
        (0x79, 0x00, 0, 0),  # r0 = *(u64 *)r0
    )


def can_fetch_add() -> bool:
    """Whether programs may use an atomic add that returns the old value (5.12)."""
    return _loads(
        (0xB7, 0x01, 0, 1),  # r1 = 1
        (0x7B, 0x1A, -8, 0),  # *(u64 *)(r10 - 8) = r1
        (0xDB, 0x1A, -8, 1),  # r1 = fetch_add(r10 - 8, r1)
    )


def _loads(*code: tuple[int, int, int, int]) -> bool:
    """Whether the kernel accepts these instructions: operation, registers, offset, constant."""
    end = ((0xB7, 0x00, 0, 0), (0x95, 0, 0, 0))  # r0 = 0; exit
    program = b"".join(struct.pack("<BBhi", *instruction) for instruction in (*code, *end))
    try:
        os.close(prog_load(program, ProgType.RAW_TRACEPOINT, "trial"))
    except BpfError:
        return False
    return True
