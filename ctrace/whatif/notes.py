"""Caveats to a what-if's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Optional

import numpy as np

from ctrace.whatif.flows import Basis, Recorded
from ctrace.whatif.settings import Levers

LONG_S: Final = 5.0
"""Seconds. Readings further apart are told,"""
PART: Final = 0.1
"""if that is more than this share of the recording,"""
USUAL: Final = 5.0
"""and more than this many times the usual distance: dumps may be minutes apart."""


def notes(recorded: Recorded, levers: Levers, extra: dict[int, int]) -> Iterator[str]:
    """Each as one sentence; ``extra``: entries per namespace that are in no event."""
    flows = recorded.flows
    yield from _of_the_recording(recorded, levers)
    inside = np.isinf(flows.leave)
    if levers.timeouts and inside.any():
        looked, others = (
            int(np.count_nonzero(inside & (flows.basis == basis)))
            for basis in (Basis.LOOKED, Basis.LIKE)
        )
        yield (
            f"{int(np.count_nonzero(inside)):,} of {len(flows):,} flows did not end in the "
            f"recording: samples show how {looked:,} would end; {others:,} are assumed to end like "
            "flows to the same port that were sampled at that age, or that ended older."
        )
    nothing = int(np.count_nonzero(inside & (flows.basis == Basis.NOTHING)))
    if nothing:
        yield (
            f"{nothing:,} of {len(flows):,} flows outlived every similar flow that ended: the "
            "recording is too short to tell when they end, so they are assumed to stay"
            + (", and the range is as wide as if they did not." if levers.timeouts else ".")
        )
    if levers.timeouts and (other := int(np.count_nonzero(~flows.sure))):
        yield (
            f"{other:,} of {len(flows):,} flows had another timeout than the setting's, from a ct "
            "timeout policy or since the setting was changed: they are taken to keep it, and the "
            "range is as wide as if they did not."
        )
    if extra:
        yield (
            f"{sum(extra.values()):,} entries were there before the recording and never ended in "
            "it: they are assumed to stay, and the range is as wide as if they did not."
        )
    for lever in levers.timeouts:
        if not lever.matches(flows).any():
            yield (
                f"--timeout {lever}: no entry was seen to end in that state, so the answer can't "
                "show what it changes; record for longer than the table's timeouts."
            )
    if levers.timeouts:
        yield "a shorter timeout can also create new entries after a pause: that is not modelled."
    if levers.buckets is not None:
        yield "buckets change what early_drop finds and how long lookups take, not the count."


def _of_the_recording(recorded: Recorded, levers: Levers) -> Iterator[str]:
    """What it lacks, whatever the levers."""
    if recorded.lost:
        were = "event was" if recorded.lost == 1 else "events were"
        yield f"at least {recorded.lost:,} {were} lost while recording: flows are missing here."
    if recorded.cut:
        yield f"the first {recorded.cut:,} events were left out: the recording is very long."
    if not len(recorded.readings.ts):
        yield "the recording has no readings of the table: the model can't be checked against it."
    elif pause := _uncounted(recorded):
        begin, end = pause
        yield (
            f"nobody counted the table from {begin:.0f} to {end:.0f} s of {recorded.seconds:.0f}, "
            "as on a host too busy for the recorder: means and peaks leave that out."
        )
    if levers.limit is None and len(limits := np.unique(recorded.readings.limit)) > 1:
        yield (
            f"nf_conntrack_max was between {limits[0]:,} and {limits[-1]:,} while recording: the "
            "model has it as it was, and shares are of the last."
        )


def _uncounted(recorded: Recorded) -> Optional[tuple[float, float]]:
    """The longest time without a reading (seconds, from and to); None where none is long."""
    at = np.unique(recorded.readings.ts)
    edges = np.concatenate([[0.0], at, [recorded.seconds]])
    pauses = np.diff(edges)
    longest = int(pauses.argmax())
    usual = float(np.median(np.diff(at))) if len(at) > 1 else 0.0
    if pauses[longest] <= max(LONG_S, PART * recorded.seconds, USUAL * usual):
        return None
    return float(edges[longest]), float(edges[longest + 1])
