"""How long the hash table's chains are, from a walk over an even sample of its buckets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Optional

from ctrace.cost.result import Chains, chains
from ctrace.errors import CtraceError
from ctrace.kernel.chains import Walker

SAMPLE: Final = 1 << 16
"""Buckets walked at most, evenly spaced: about 10 ms in short steps."""


def measure(buckets: int, symbol: int, entries: Sequence[int], *, sample: int = SAMPLE) -> Chains:
    """Chain lengths now. ``symbol``: where nf_conntrack_hash is, or 0; ``entries``: ``ct``s.

    Raises CtraceError when the table cannot be found, or the kernel runs no program on
    request (before 5.10).
    """
    if not buckets:
        raise CtraceError("the table's size is unknown")
    with Walker() as walker:
        for base in walker.bases(symbol, entries):
            found = _measured(walker, base, buckets, sample)
            if found is not None:
                return found
    raise CtraceError(
        "the table was not found: the kernel lists no nf_conntrack_hash, and "
        + (
            "entries lately seen are gone"
            if entries
            else "no packet of a tracked connection passed"
        )
    )


def _measured(walker: Walker, base: int, buckets: int, sample: int) -> Optional[Chains]:
    """None when the memory there is not the table."""
    walker.forget_lengths()
    walked = walker.walk(base, 0, -(-buckets // sample), buckets)
    counts = walker.lengths()
    if not walked.is_table(int(counts.sum()) + walked.disturbed):
        return None
    return chains(buckets, counts, walked.disturbed)
