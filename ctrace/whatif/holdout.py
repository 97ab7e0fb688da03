"""How far predictions are off: the rest of a recording, predicted from its first half.

What tried to enter is given, as in a what-if. When entries leave is predicted: for those alive at
half-time from what was known of them then, for later ones from an earlier one drawn at random. The
kernel's own counts are the judge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, Optional

import numpy as np

from ctrace.whatif import table as tablemodel
from ctrace.whatif.flows import F64, I64, Basis, Flows, Recorded
from ctrace.whatif.table import Known, Setting

FEW: Final = 20
"""Flows. Fewer in the first half say nothing about the second."""
READINGS: Final = 5
"""Counts by the kernel. Fewer are not enough to judge by."""


@dataclass(frozen=True)
class Miss:
    """The error in one namespace's second half, relative to what was counted."""

    course: float
    """Mean distance of the two courses."""
    mean: float
    """Predicted minus counted."""
    peak: float
    drops: float
    """Predicted minus real refusals, as a share of all attempts."""


def misses(recorded: Recorded, setting: Setting) -> dict[int, Miss]:
    """The errors of each namespace whose second half can be predicted."""
    first, half = recorded.first, recorded.half_s
    if first is None or not len(first):
        return {}
    lag = _lag(first)
    rest = _second(recorded, first, lag if math.isfinite(lag) else 0.0)
    places = tuple(int(n) for n in np.unique(recorded.flows.netns))
    readings = recorded.readings
    extra = {}
    for inum in places:
        mine = (readings.netns == inum) & (readings.ts <= half)
        if mine.any():
            here = (rest.netns == inum) & rest.existed
            extra[inum] = max(0, int(readings.count[mine][-1]) - int(np.count_nonzero(here)))
    # How long expired entries wait is as it was, unless collections make room in a full table.
    full = any((drops <= half).any() for drops in recorded.drop_at.values())
    measured = math.isfinite(lag) and not full
    course = tablemodel.run(
        rest,
        recorded.seconds - half,
        setting,
        Known(
            measured,
            lag if measured else 0.0,
            _next_pass(recorded, lag) - half,
            extra,
            places,
            readings.limits(half),
        ),
    )
    found = {}
    for i, inum in enumerate(places):
        if np.count_nonzero(first.netns == inum) < FEW:
            continue
        mine = (readings.netns == inum) & (readings.ts > half)
        real, at = readings.count[mine].astype(float), readings.ts[mine] - half
        if len(real) < READINGS or real.mean() <= 0:
            continue
        told = np.interp(at, course.ts, course.count[i])
        # When collections fall is chance; what they leave on average over one interval is not.
        window = 2 * lag if measured else course.interval
        refused = np.count_nonzero(recorded.drop_at.get(inum, np.zeros(0)) > half)
        tries = max(1, int(np.count_nonzero(rest.netns[rest.attempt_of] == inum)))
        found[inum] = Miss(
            distance(at, real, course.ts, course.count[i], window) or 0.0,
            float(told.mean() / real.mean() - 1),
            float(told.max() / real.max() - 1),
            float(course.drops[i].sum() - refused) / tries,
        )
    return found


def distance(at: F64, real: F64, ts: F64, count: F64, window: float) -> Optional[float]:
    """Mean distance of two courses, relative to the real one's mean, over a moving window."""
    if not len(at) or real.mean() <= 0:
        return None
    difference = np.interp(at, ts, count) - real
    pace = float(np.median(np.diff(at))) if len(at) > 1 else 1.0
    n = min(max(1, round(window / max(pace, 1e-3))), len(at))
    smooth = np.convolve(difference, np.ones(n) / n, "valid")
    return float(np.abs(smooth).mean() / real.mean())


def _lag(first: Flows) -> float:
    """Seconds that expired entries waited for their collection, on average; NaN: none was seen."""
    over = first.known & np.isinf(first.end) & np.isfinite(first.leave)
    waited = first.leave[over] - first.expire[over]
    return float(waited.mean()) if len(waited) >= FEW else math.nan


def _next_pass(recorded: Recorded, lag: float) -> F64:
    """When gc_worker first runs in the second half, as predicted from the first."""
    before = recorded.collections[recorded.collections <= recorded.half_s]
    if not len(before):
        return np.array([recorded.half_s + 2 * lag]) if math.isfinite(lag) else np.zeros(0)
    pause = float(np.diff(before).mean()) if len(before) > 1 else 2 * np.nan_to_num(lag)
    return np.maximum(before[-1:] + pause, recorded.half_s)


def _second(recorded: Recorded, first: Flows, lag: float) -> Flows:
    """The flows of the second half as predicted; its times begin at 0."""
    half = recorded.half_s
    inside = np.isinf(first.leave)
    old = first.only(inside)
    old = replace(
        old,
        arrive=np.zeros(len(old)),
        expire=old.expire - half,
        leave=np.where(np.isinf(old.expire), np.inf, old.expire + lag - half),
        existed=np.ones(len(old), bool),
        attempt_at=np.zeros(0),
        attempt_of=np.zeros(0, np.int64),
    )
    new = recorded.flows.only((recorded.flows.arrive > half) & ~recorded.flows.existed)
    late = new.attempt_at > half
    new = replace(
        new,
        arrive=new.arrive - half,
        attempt_at=new.attempt_at[late] - half,
        attempt_of=new.attempt_of[late],
    )
    told = _as_before(new, first)
    # What came is told, so it is known which tuples were used again, and when.
    both = _joined(old, told)
    entered = _joined(old, replace(told, leave=new.leave))
    return replace(both, end=np.minimum(both.end, entered.again()))


def _as_before(new: Flows, first: Flows) -> Flows:
    """New flows, each with the course of one of the same service or protocol in the first half."""
    donors = np.flatnonzero(~first.existed & (first.basis != Basis.NOTHING))
    of = np.full(len(new), -1, np.int64)
    random = np.random.default_rng(1)
    for by_port in (True, False):
        keys = (_service(first, by_port)[donors], _service(new, by_port))
        for number in np.unique(keys[1][of < 0]):
            some = donors[keys[0] == number]
            mine = np.flatnonzero((of < 0) & (keys[1] == number))
            if len(some):
                of[mine] = random.choice(some, len(mine))
    told = of >= 0

    def after(times: F64, unknown: float) -> F64:
        found: F64 = np.where(told, new.arrive + times[of] - first.arrive[of], unknown)
        return found

    expire = after(first.expire, np.inf)
    waits = told & np.isfinite(first.leave[of]) & np.isfinite(first.expire[of])
    waits &= np.isinf(first.end[of])
    waited = np.zeros(len(new))
    waited[waits] = first.leave[of[waits]] - first.expire[of[waits]]
    return replace(
        new,
        expire=expire,
        end=after(first.end, np.inf),
        leave=np.where(waits, expire + waited, np.where(np.isinf(expire), np.inf, np.nan)),
        timeout=np.where(told, first.timeout[of], np.inf),
        state=np.where(told, first.state[of], new.state).astype(np.uint8),
        assured=np.where(told, first.assured[of], new.assured),
    )


def _service(flows: Flows, by_port: bool) -> I64:
    if not by_port:
        return flows.proto.astype(np.int64)
    return flows.proto.astype(np.int64) | flows.dport << 8 | flows.netns << 24


def _joined(one: Flows, other: Flows) -> Flows:
    columns = {
        name: np.concatenate([column, getattr(other, name)])
        for name, column in one.__dict__.items()
    }
    columns["attempt_of"] = np.concatenate([one.attempt_of, other.attempt_of + len(one)])
    return Flows(**columns)
