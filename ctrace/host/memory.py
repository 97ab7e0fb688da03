"""Returns memory that this process no longer uses to the kernel at once."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

LARGE: Final = 1 << 19
"""Bytes. Larger blocks are mapped on their own and unmapped when freed. By default glibc raises
this to 32 MiB, and then keeps for ever what a flood needed once."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""M_* of malloc.h."""


def give_back() -> None:
    """Applies for the rest of this process's life; does nothing with other C libraries than
    glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, LARGE), (_TRIM_THRESHOLD, 2 * LARGE)):
        mallopt(option, value)


@contextmanager
def unswept() -> Iterator[None]:
    """While the block makes very many objects that stay, none of them is looked at for cycles: that
    took a third of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
