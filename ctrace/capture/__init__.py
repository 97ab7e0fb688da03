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
    ring_bytes: Optional[int] = None,
    seed: bool = True,
    sample: bool = False,
) -> LiveSource:
    """Attach to the running kernel with the best hook family that works here.

    ``hooks`` forces one of fentry, kprobe, netfilter, netlink; ``ring_bytes`` is for
    each CPU (chosen by their number when not given); ``seed`` starts with the entries
    that are already in the tables; ``sample`` adds SAMPLED records of a few young
    entries each second, which tell the life of a connection whose entry lingers.
    Raises CtraceError (UsageError for an unknown family).
    """
    from ctrace.capture import live

    return live.open_live(filter, hooks=hooks, ring_bytes=ring_bytes, seed=seed, sample=sample)
