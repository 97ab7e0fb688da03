"""How much wider a what-if's range is than the kernel's lazy collection makes it.

Four things are not known: how well the model predicts this load (its second half from its first),
how the entries went on that did not end, what the entries are that nothing was seen of, and how
much the same load would differ if it came again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, Optional

import numpy as np

from ctrace.whatif.answer import Outcome
from ctrace.whatif.change import altered
from ctrace.whatif.flows import F64, Basis, Bool, Flows, Recorded
from ctrace.whatif.holdout import Miss
from ctrace.whatif.settings import Levers, Timeout
from ctrace.whatif.table import Setting, most_of

PAUSE: Final = 0.2
"""Share: gc_worker's longest pause is modelled no more accurately than this."""


@dataclass(frozen=True)
class Doubt:
    """Entries, averaged over the recording, unless stated otherwise."""

    altered: float
    """Held by flows that stay for a different time under the levers."""
    drawn: float
    """Possible error of their share among flows that did not end: two standard errors."""
    unknown: float
    """Held by flows of unknown stay, which the levers might change."""
    unknown_peak: float
    """The same of the peak, at most."""
    unlisted: int
    """Entries without any event, which the levers might remove."""
    stay: float
    """Seconds that an entry stays, on average."""
    seconds: float
    mean: float
    """Relative error of the predicted mean of the second half; and of its peak."""
    peak: float


def doubt_of(
    recorded: Recorded, levers: Levers, inum: int, extra: int, missed: Optional[Miss]
) -> Doubt:
    """The uncertainty of one namespace's answer; ``extra`` entries are in no event."""
    flows, seconds = recorded.flows, recorded.seconds
    here = flows.netns == inum
    left = np.where(np.isnan(flows.leave), flows.expire, flows.leave)
    stays = np.clip(np.minimum(left, flows.end), 0.0, seconds) - flows.arrive
    stays = np.where(here, np.nan_to_num(stays), 0.0)
    matched = altered(flows, levers) & here
    hit = matched & flows.sure
    drawn = hit & (flows.basis == Basis.LIKE) & np.isinf(flows.leave)
    maybe = here & (flows.basis == Basis.LIKE) & np.isinf(flows.leave)
    unknown = here & (flows.basis == Basis.NOTHING) & np.isinf(flows.leave)
    unknown &= altered(flows, levers, Timeout.could_match)
    unknown |= matched & ~flows.sure
    many = np.count_nonzero(here & (stays > 0))
    return Doubt(
        altered=float(stays[hit].sum()) / seconds,
        drawn=_share_error(flows, drawn, maybe) * float(stays[maybe].sum()) / seconds,
        unknown=float(stays[unknown].sum() - _least(levers, stays[unknown])) / seconds,
        unknown_peak=_most_at_once(flows.arrive[unknown], stays[unknown]),
        unlisted=extra if levers.timeouts or levers.notrack else 0,
        stay=float(stays.sum()) / many if many else 0.0,
        seconds=seconds,
        mean=abs(missed.mean) if missed else 0.0,
        peak=abs(missed.peak) if missed else 0.0,
    )


def widened(told: Outcome, doubt: Doubt, target: Setting) -> Outcome:
    """The outcome with ranges that allow for the uncertainty."""
    limit = most_of(target, told.peak)
    low, high = told.mean_range
    # A mean over some stays of one load differs from that of another like it.
    alike = 2 * math.sqrt(told.mean * min(1.0, 2 * doubt.stay / doubt.seconds))
    around = math.hypot(doubt.mean * doubt.altered, doubt.drawn, alike)
    least, most = told.peak_range
    scale = told.peak / told.mean if told.mean else 1.0
    above = math.hypot(
        doubt.peak * doubt.altered * scale,
        doubt.drawn * scale,
        2 * math.sqrt(told.peak),
        PAUSE * (most - least),
    )
    return replace(
        told,
        mean_range=(
            max(0.0, low - around - doubt.unknown - doubt.unlisted),
            min(high + around, limit),
        ),
        peak_range=(
            max(0.0, least - above - doubt.unknown_peak - doubt.unlisted),
            min(max(most, told.peak) + above, limit),
        ),
    )


def at_most(told: Outcome, other: Outcome) -> Outcome:
    """The outcome of levers under which the table never holds more than in another outcome."""
    (low, high), (least, most) = told.mean_range, told.peak_range
    return replace(
        told,
        mean_range=(min(low, other.mean), min(high, other.mean)),
        peak_range=(min(least, other.peak), min(most, other.peak)),
    )


def _share_error(flows: Flows, drawn: Bool, maybe: Bool) -> float:
    """Two standard errors of the share of affected flows."""
    if not maybe.any():
        return 0.0
    n = float(np.median(flows.among[maybe]))
    likely = (np.count_nonzero(drawn) / np.count_nonzero(maybe) * n + 2) / (n + 4)
    return 2 * math.sqrt(likely * (1 - likely) / (n + 4))


def _least(levers: Levers, stays: F64) -> float:
    """Seconds that these stay at least, if each waits for the timeout shortened most."""
    shortest = min((lever.seconds for lever in levers.timeouts), default=0)
    return float(np.minimum(stays, shortest).sum())


def _most_at_once(arrive: F64, stays: F64) -> float:
    """How many of these were in the table at once, at most."""
    steps = np.argsort(np.concatenate([arrive, arrive + stays]), kind="stable")
    held = np.cumsum(np.where(steps < len(arrive), 1, -1))
    return float(held.max(initial=0))
