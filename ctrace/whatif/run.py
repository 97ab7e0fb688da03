"""What would have happened: a recording through the table model, with other settings.

The same model first foretells the second half of the recording from the first; how far
that is from what the kernel really counted is its error: it is always shown with the answer,
and the ranges are as wide (:mod:`ctrace.whatif.doubt`).
Entries leave the modelled table when they really left; under another timeout,
their residence changes by the difference of the timeouts, and the time that they
waited for collection in the proportion in which gc_worker's pauses change in the
model. In a table of another size collection is modelled altogether.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final, Optional

import numpy as np

from ctrace.batch import DUMP, Source
from ctrace.errors import CtraceError, UsageError
from ctrace.model.groups.passes import GC_SCAN_INTERVAL_MAX
from ctrace.record import proto_name
from ctrace.whatif import table as tablemodel
from ctrace.whatif.answer import Outcome, Place, Series, WhatIf
from ctrace.whatif.change import change, pace_of, shortens
from ctrace.whatif.doubt import at_most, doubt_of, widened
from ctrace.whatif.flows import Flows, Recorded
from ctrace.whatif.gather import gather
from ctrace.whatif.growth import Range, of_flows, rising
from ctrace.whatif.holdout import Miss, distance, misses
from ctrace.whatif.notes import notes
from ctrace.whatif.settings import Levers
from ctrace.whatif.table import Course, Known, Setting

POINTS: Final = 600
"""Points of a series in the answer, at most."""
PASSES: Final = 4
"""Passes of gc_worker: fewer do not show how long its pauses are."""
DEFAULT_LIMIT: Final = 262144
SKEWS: Final = np.arange(0.0, 2.01, 0.05)


def whatif(source: Source, levers: Levers, *, interval: float = 1.0) -> WhatIf:
    """Run a source's batches through the model under ``levers``.

    Raises CtraceError when there is nothing to model.
    """
    recorded = gather(source.batches(interval), texts=source.hooks.family == DUMP)
    _check_services(recorded.flows, levers)
    return of_recording(recorded, levers, offset=source.clock.offset)


def _check_services(flows: Flows, levers: Levers) -> None:
    """Raise UsageError for a service without a single flow: nothing can be said about it."""
    asked = [*levers.notrack]
    asked += [(t.proto, t.port) for t in levers.timeouts if t.proto is not None and t.port]
    for proto, port in asked:
        if len(flows) and not flows.of_service(proto, port).any():
            keys, numbers = np.unique(
                flows.proto.astype(np.int64) << 16 | flows.dport, return_counts=True
            )
            most = keys[np.argsort(-numbers)][:5].tolist()
            there = ", ".join(f"{proto_name(key >> 16)}/{key & 0xFFFF}" for key in most)
            raise UsageError(
                f"{proto_name(proto)}/{port} is not in the recording; most flows go to {there}"
            )


def of_recording(recorded: Recorded, levers: Levers, *, offset: int = 0) -> WhatIf:
    """The same for a recording gathered before, so that several levers can be tried on it."""
    if not len(recorded.flows) or recorded.seconds <= 0:
        raise CtraceError(
            "nothing tells when entries came or went, so there is nothing to model: from texts it "
            "takes two dumps some seconds apart, or conntrack -E -o timestamp"
        )
    if not recorded.readings.timed:
        recorded = aligned(recorded)
    case = _case(recorded, levers)
    missed = misses(recorded, case.setting)
    answer = [
        _place(case, i, missed.get(inum), (recorded.started + offset) / 1e9)
        for i, inum in enumerate(case.would_be.netns)
    ]
    answer.sort(key=lambda place: -place.recorded.peak)
    return WhatIf(
        levers,
        recorded.seconds,
        tuple(answer),
        case.would_be.interval,
        tuple(notes(recorded, levers, case.extra)),
    )


@dataclass(frozen=True)
class _Case:
    """One recording under one set of levers."""

    recorded: Recorded
    levers: Levers
    setting: Setting
    target: Setting
    extra: dict[int, int]
    changed: Flows
    as_was: Course
    would_be: Course
    lazy: bool
    """Whether collection is modelled for the recording as it was, too."""
    pause: float
    """Seconds between two collections with the levers, on average, at most."""


def _case(recorded: Recorded, levers: Levers) -> _Case:
    flows, setting, extra = recorded.flows, _setting(recorded), _unlisted(recorded)
    seen = math.isfinite(recorded.lag_s)
    lag = recorded.lag_s if seen else 0.0
    known = Known(
        # Without a single expiry in the recording, collection can only be modelled.
        measured=seen or not levers.timeouts,
        lag=lag,
        passes=recorded.collections,
        extra=extra,
        # Namespaces without a single event were not part of the recording.
        netns=tuple(int(n) for n in np.unique(flows.netns)),
        limits=recorded.readings.limits(),
    )
    lazy = not known.measured
    as_was = tablemodel.run(flows, recorded.seconds, setting, known)
    pace, most = pace_of(recorded, levers, setting) if levers.timeouts else (1.0, 1.0)
    changed = change(flows, levers, pace)
    target = Setting(
        setting.limit if levers.limit is None else levers.limit,
        setting.buckets if levers.buckets is None else levers.buckets,
    )
    # Lookups collect expired entries that they meet, and meet more in a small, full table:
    # how long they stayed in it says little about another one, where gc_worker is alone.
    resized = target != setting
    known = replace(known, lag=lag * pace, measured=known.measured and not resized)
    if levers.limit is not None:
        known = replace(known, limits={})
    would_be = tablemodel.run(changed, recorded.seconds, target, known)
    pause = would_be.interval
    if seen and not resized:
        # What is not in the recording keeps gc_worker at its pace: the range allows for it.
        part = _part(recorded)
        interval = 2 * lag * (part * pace + (1 - part) * max(1.0, pace))
        longest, pause = most * interval, interval
        if len(recorded.collections) < PASSES:  # what waited was cut short by the beginning
            longest = pause = max(longest, GC_SCAN_INTERVAL_MAX)
        would_be = replace(would_be, interval=interval, longest=longest)
    return _Case(recorded, levers, setting, target, extra, changed, as_was, would_be, lazy, pause)


def _part(recorded: Recorded) -> float:
    """Share of all entries on the host that is in namespaces with recorded events."""
    readings = recorded.readings
    total = float(readings.count.sum())
    mine = np.isin(readings.netns, np.unique(recorded.flows.netns))
    return float(readings.count[mine].sum()) / total if total else 1.0


def aligned(recorded: Recorded) -> Recorded:
    """The table readings of a recording without their times, moved to where they belong.

    A reading was taken a moment after the time that its batch covers, at most a second or two on a
    loaded host; the delay used is the one at which the counts fit the events best.
    """
    flows, readings = recorded.flows, recorded.readings
    best = np.zeros(len(SKEWS))
    for inum in np.unique(flows.netns):
        mine = readings.netns == inum
        here = flows.netns == inum
        entered = np.sort(flows.arrive[here & ~(np.isnan(flows.leave) & ~flows.known)])
        left = np.sort(flows.leave[here & np.isfinite(flows.leave)])
        if np.count_nonzero(mine) < 5:
            continue
        for k, skew in enumerate(SKEWS):
            at = readings.ts[mine] + skew
            held = np.searchsorted(entered, at, "right") - np.searchsorted(left, at, "right")
            away = readings.count[mine] - held
            best[k] += float(np.abs(away - np.median(away)).sum())
    skew = float(SKEWS[int(np.argmin(best))])
    return replace(recorded, readings=replace(readings, ts=readings.ts + skew))


def _setting(recorded: Recorded) -> Setting:
    readings = recorded.readings
    if not len(readings.ts):
        return Setting(DEFAULT_LIMIT, DEFAULT_LIMIT)
    return Setting(int(readings.limit[-1]), int(readings.buckets[-1]))


def _unlisted(recorded: Recorded) -> dict[int, int]:
    """Entries that the kernel counted at the start and no event mentions."""
    flows, readings = recorded.flows, recorded.readings
    extra: dict[int, int] = {}
    for inum in np.unique(flows.netns):
        mine = np.flatnonzero(readings.netns == inum)
        if not len(mine):
            continue
        first = mine[np.argmin(readings.ts[mine])]
        at = readings.ts[first]
        here = flows.netns == inum
        inside = np.where(np.isnan(flows.leave), flows.expire, flows.leave) > at
        refused = np.isnan(flows.leave) & ~flows.known
        known = int(np.count_nonzero(here & (flows.arrive <= at) & inside & ~refused))
        surplus = int(readings.count[first]) - known
        if surplus > 0:
            extra[int(inum)] = surplus
    return extra


def _place(case: _Case, i: int, missed: Optional[Miss], base: float) -> Place:
    recorded, inum = case.recorded, case.would_be.netns[i]
    readings = recorded.readings
    mine = readings.netns == inum
    real = readings.count[mine].astype(float)
    at = readings.ts[mine]
    # When collections fall is chance; what they leave on average over one interval is not.
    window = case.as_was.interval if case.lazy else 0.0
    limits = readings.limit[mine]
    limit = int(limits[-1]) if len(limits) else case.setting.limit
    full = np.mean((real >= 0.99 * limits) & (limits > 0)) if len(real) else math.nan
    was = Outcome(
        mean=float(real.mean()) if len(real) else math.nan,
        peak=float(real.max()) if len(real) else math.nan,
        drops=None if recorded.texts else recorded.drops.get(inum, 0),
        evictions=None if recorded.texts else recorded.evictions.get(inum, 0),
        full_s=float(full * recorded.seconds),
    )
    span = (float(at.min()), float(at.max())) if len(at) > 1 else (0.0, recorded.seconds)
    would = _outcome(case.would_be, i, span, case.pause)
    doubt = doubt_of(recorded, case.levers, inum, case.extra.get(inum, 0), missed)
    resized = case.target != case.setting
    if resized:
        doubt = replace(doubt, altered=would.mean)
    modelled = _outcome(case.as_was, i, span, case.as_was.interval)
    if not resized and shortens(recorded.flows, case.levers):
        would = at_most(would, modelled)
    would = widened(would, doubt, case.target)
    end = float(case.would_be.count[i][-1])
    growth = of_flows(
        case.changed.only(case.changed.netns == inum), recorded.half_s, recorded.seconds
    )
    return Place(
        inum,
        recorded.names.get(inum, f"netns:{inum}"),
        limit,
        limit if case.levers.limit is None else case.target.limit,
        was,
        modelled,
        would,
        missed.course if missed else None,
        missed.drops if missed else None,
        distance(at, real, case.as_was.ts, case.as_was.count[i], window),
        rising(growth, Range(end - float(case.would_be.expired[i][-1]), end), case.target.limit),
        _series(base, at, real),
        _series(base, case.as_was.ts, case.as_was.count[i]),
        _series(base, case.would_be.ts, case.would_be.count[i]),
    )


def _outcome(course: Course, i: int, span: tuple[float, float], pause: float) -> Outcome:
    """Numbers over the time for which the kernel's own count is known, to compare alike."""
    inside = (course.ts >= span[0]) & (course.ts <= span[1])
    if not inside.any():
        inside[:] = True
    count = course.count[i][inside]
    prompt = count - course.expired[i][inside]
    limit = course.limits[i][inside]
    expiring = float(course.expiring[i])
    step, peak = course.ts[0], float(count.max())
    most = float(limit.max()) if peak <= limit.max() else math.inf
    return Outcome(
        mean=float(count.mean()),
        peak=peak,
        drops=int(course.drops[i].sum()),
        evictions=int(course.evictions[i].sum()),
        full_s=float(np.count_nonzero(count >= 0.99 * limit) * step),
        mean_range=tablemodel.collected(float(prompt.mean()), expiring, pause, most),
        peak_range=tablemodel.collected(float(prompt.max()), expiring, course.longest, most),
    )


def _series(base: float, ts: Any, count: Any) -> Series:
    pick = np.unique(np.linspace(0, max(len(ts) - 1, 0), min(POINTS, len(ts))).astype(int))
    return Series(
        tuple(round(base + float(t), 3) for t in np.asarray(ts)[pick]),
        tuple(float(n) for n in np.asarray(count)[pick]),
    )
