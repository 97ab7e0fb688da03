"""Memory that this process no longer uses goes back to the kernel at once."""

from __future__ import annotations

import ctypes
from typing import Final

LARGE: Final = 1 << 19
"""Bytes from which on a block is mapped by itself, and unmapped when it is freed. Left alone,
glibc raises this to 32 MiB, and then keeps what floods took for ever."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""M_* of malloc.h."""


def give_back() -> None:
    """For the rest of this process's life; nothing changes where the C library is another."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, LARGE), (_TRIM_THRESHOLD, 2 * LARGE)):
        mallopt(option, value)
