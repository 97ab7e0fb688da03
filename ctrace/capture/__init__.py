"""Sources of batches: BPF in three hook families, and netlink."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from ctrace.filters import Filter

if TYPE_CHECKING:
    from ctrace.capture.live import LiveSource

_EVERYTHING = Filter()


def open_live(
    filter: Filter = _EVERYTHING,
    *,
    hooks: Optional[str] = None,
    ring_bytes: int = 1 << 21,
    seed: bool = True,
) -> LiveSource:
    """Attach to the running kernel with the best hook family that works here.

    ``hooks`` forces one of fentry, kprobe, netfilter, netlink; ``ring_bytes`` is for
    each CPU; ``seed`` starts with the entries that are already in the tables.
    Raises CtraceError (UsageError for an unknown family).
    """
    from ctrace.capture import live

    return live.open_live(filter, hooks=hooks, ring_bytes=ring_bytes, seed=seed)
