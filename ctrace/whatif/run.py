"""What would have happened: a recording through the table model, with other settings.

The same model first runs the recording as it was; how far that is from what the
kernel really counted is the model's error, and is always shown with the answer.
Entries leave the modelled table when they really left; under another timeout,
their residence changes by the difference of the timeouts, and the time that they
waited for collection in the proportion in which gc_worker's pauses change in the
model. In a table of another size collection is modelled altogether.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Optional

import numpy as np

from ctrace.batch import Source
from ctrace.errors import CtraceError, UsageError
from ctrace.record import proto_name
from ctrace.whatif import table as tablemodel
from ctrace.whatif.flows import F64, Flows, Recorded, gather
from ctrace.whatif.settings import Levers
from ctrace.whatif.table import Course, Setting

TRUST: Final = 0.05
POINTS: Final = 600
"""Of a series in the answer."""
ENTRY_BYTES: Final = (256, 384)
"""struct nf_conn's slab object, without and with the optional extensions, x86-64."""
BUCKET_BYTES: Final = 8
DEFAULT_LIMIT: Final = 262144
SKEWS: Final = np.arange(0.0, 2.01, 0.05)


@dataclass(frozen=True)
class Outcome:
    """One course of the table, in numbers. Ranges are (lowest, highest)."""

    mean: float
    peak: float
    drops: int
    """New flows' packets refused."""
    evictions: int
    full_s: float
    """Seconds at 99 % or above."""
    mean_range: tuple[float, float] = (math.nan, math.nan)
    peak_range: tuple[float, float] = (math.nan, math.nan)


@dataclass(frozen=True)
class Series:
    """Entries over time, at most 600 points."""

    ts: tuple[float, ...]
    """UTC seconds."""
    count: tuple[float, ...]


@dataclass(frozen=True)
class Place:
    """One namespace's answer."""

    netns: int
    name: str
    limit: int
    new_limit: int
    recorded: Outcome
    """As the kernel counted."""
    modelled: Outcome
    """The model, with nothing changed."""
    changed: Outcome
    """The model, with the levers."""
    error: Optional[float]
    """Mean distance of the modelled from the recorded count, relative; None: nothing to
    compare with."""
    drop_error: float
    """Modelled minus recorded refusals, as a share of all tries."""
    series_recorded: Series
    series_modelled: Series
    series_changed: Series

    @property
    def trusted(self) -> bool:
        """Whether the model reproduces the recording within 5 %."""
        return self.error is not None and max(self.error, abs(self.drop_error)) <= TRUST


@dataclass(frozen=True)
class WhatIf:
    """The whole answer."""

    levers: Levers
    seconds: float
    places: tuple[Place, ...]
    interval_s: float
    """Mean time between two collections with the levers."""
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data; NaN is null."""
        answer: dict[str, Any] = {
            "levers": str(self.levers),
            "seconds": self.seconds,
            "collection_interval": self.interval_s,
            "notes": list(self.notes),
            "namespaces": [
                {
                    **asdict(place),
                    "trusted": place.trusted,
                    "memory": memory_of(place.new_limit, self.levers.buckets),
                }
                for place in self.places
            ],
        }
        cleaned: dict[str, Any] = _clean(answer)
        return cleaned

    def render(self) -> str:
        """Text."""
        return "\n".join(_render(self)) + "\n"


def whatif(source: Source, levers: Levers, *, interval: float = 1.0) -> WhatIf:
    """Run a source's batches through the model under ``levers``.

    Raises CtraceError when there is nothing to model.
    """
    recorded = gather(source.batches(interval))
    _check_services(recorded.flows, levers)
    return of_recording(recorded, levers, offset=source.clock.offset)


def _check_services(flows: Flows, levers: Levers) -> None:
    """Raise UsageError for a service without a single flow: nothing can be said about it."""
    asked = [*levers.notrack]
    asked += [(t.proto, t.port) for t in levers.timeouts if t.proto is not None and t.port]
    for proto, port in asked:
        if len(flows) and not flows.of_service(proto, port).any():
            keys, numbers = np.unique(flows.proto.astype(np.int64) << 16 | flows.dport,
                                      return_counts=True)  # fmt: skip
            most = keys[np.argsort(-numbers)][:5].tolist()
            there = ", ".join(f"{proto_name(key >> 16)}/{key & 0xFFFF}" for key in most)
            raise UsageError(
                f"{proto_name(proto)}/{port} is not in the recording; most flows go to {there}"
            )


def of_recording(
    recorded: Recorded,
    levers: Levers,
    *,
    offset: int = 0,
) -> WhatIf:
    """The same from what was gathered already, for several levers over one recording."""
    flows = recorded.flows
    if not len(flows) or recorded.seconds <= 0:
        raise CtraceError("the recording has no conntrack events: nothing to model")
    if not recorded.readings.timed:
        recorded = aligned(recorded)
    setting = _setting(recorded)
    extra = _unlisted(recorded)
    # Namespaces without a single event were none of the recording's business.
    places = tuple(int(n) for n in np.unique(flows.netns))
    lag = recorded.lag_s if math.isfinite(recorded.lag_s) else 0.0
    seen = math.isfinite(recorded.lag_s)
    options: dict[str, Any] = {
        # Without a single expiry in the recording, collection can only be modelled.
        "measured": seen or not levers.timeouts,
        "lag": lag,
        "extra": extra,
        "netns": places,
        "passes": recorded.collections,
    }
    lazy = not options["measured"]
    as_was = tablemodel.run(flows, recorded.seconds, setting, **options)
    pace = _pace(recorded, levers, setting) if levers.timeouts else 1.0
    altered = change(flows, levers, pace)
    target = Setting(
        setting.limit if levers.limit is None else levers.limit,
        setting.buckets if levers.buckets is None else levers.buckets,
    )
    options["lag"] = lag * pace
    # Lookups collect expired entries that they meet, and meet more in a small, full table:
    # how long they stayed in it says little about another one, where gc_worker is alone.
    resized = target != setting
    if resized:
        options["measured"] = False
    would_be = tablemodel.run(altered, recorded.seconds, target, **options)
    if seen and not resized:
        # What is not in the recording keeps gc_worker at its pace: the range allows for it.
        part = _part(recorded)
        would_be = replace(would_be, interval=2 * lag * (part * pace + (1 - part) * max(1.0, pace)))
    answer = []
    for i, inum in enumerate(places):
        answer.append(
            _place(i, inum, recorded.names.get(inum, f"netns:{inum}"), recorded, setting, target,
                   as_was, would_be, offset, lazy)
        )  # fmt: skip
    answer.sort(key=lambda place: -place.recorded.peak)
    return WhatIf(
        levers,
        recorded.seconds,
        tuple(answer),
        would_be.interval,
        tuple(_notes(recorded, levers, extra)),
    )


def change(flows: Flows, levers: Levers, pace: float = 1.0) -> Flows:
    """The flows under the levers: without untracked services, and with other timeouts.

    An expired entry then waits ``pace`` times as long for its collection as it did.
    """
    keep = np.ones(len(flows), bool)
    for proto, port in levers.notrack:
        keep &= ~flows.of_service(proto, port)
    expire, timeout = flows.expire.copy(), flows.timeout.copy()
    with np.errstate(invalid="ignore"):  # neither seen: it stays, whatever is changed
        waited = np.maximum(flows.leave - flows.expire, 0.0)
    for lever in levers.timeouts:
        hit = lever.matches(flows)
        expire[hit] += lever.seconds - timeout[hit]
        timeout[hit] = lever.seconds
        waited[hit & np.isinf(flows.leave)] = np.nan
    over = np.isinf(flows.end) & ~np.isinf(waited)
    leave = np.where(over, expire + waited * pace, flows.leave)
    # Gone before the recording began, had the setting been there all along.
    keep &= (expire > 0) | (flows.arrive > 0)
    number = np.cumsum(keep) - 1
    tries = keep[flows.attempt_of]
    return Flows(
        flows.netns[keep], flows.arrive[keep], expire[keep], flows.end[keep], leave[keep],
        timeout[keep], flows.proto[keep], flows.state[keep], flows.assured[keep],
        flows.sport[keep], flows.dport[keep], flows.reply_sport[keep], flows.known[keep],
        flows.attempt_at[tries], number[flows.attempt_of[tries]],
    )  # fmt: skip


def _pace(recorded: Recorded, levers: Levers, setting: Setting) -> float:
    """How much longer or shorter gc_worker would pause, in the model, under the levers."""
    options: dict[str, Any] = {"measured": False, "passes": recorded.collections}
    roomy = Setting(0, setting.buckets)
    was, would_be = (
        tablemodel.run(flows, recorded.seconds, roomy, **options)
        for flows in (recorded.flows, change(recorded.flows, levers))
    )
    return min(max(would_be.interval / was.interval, 0.01), 10.0)


def _part(recorded: Recorded) -> float:
    """Share of all entries on the host that is in namespaces with recorded events."""
    readings = recorded.readings
    total = float(readings.count.sum())
    mine = np.isin(readings.netns, np.unique(recorded.flows.netns))
    return float(readings.count[mine].sum()) / total if total else 1.0


def aligned(recorded: Recorded) -> Recorded:
    """The table readings of a recording that does not tell their times, moved to them.

    A reading was taken a moment after the time that its batch covers: how long, at
    most a second or two on a loaded host, is where the counts fit the events best.
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


def memory_of(limit: int, buckets: Optional[int] = None) -> tuple[int, int]:
    """Bytes that a full table of this size takes, without and with extensions."""
    table = BUCKET_BYTES * (buckets or limit)
    return limit * ENTRY_BYTES[0] + table, limit * ENTRY_BYTES[1] + table


def _setting(recorded: Recorded) -> Setting:
    readings = recorded.readings
    if not len(readings.ts):
        return Setting(DEFAULT_LIMIT, DEFAULT_LIMIT)
    return Setting(int(np.median(readings.limit)), int(np.median(readings.buckets)))


def _unlisted(recorded: Recorded) -> dict[int, int]:
    """Entries that the kernel counted at the start and that no event speaks of."""
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


def _place(
    i: int,
    inum: int,
    name: str,
    recorded: Recorded,
    setting: Setting,
    target: Setting,
    as_was: Course,
    would_be: Course,
    offset: int,
    lazy: bool,
) -> Place:
    readings = recorded.readings
    mine = readings.netns == inum
    real = readings.count[mine].astype(float)
    at = readings.ts[mine]
    # When collections fall is chance; what they leave on average over one interval is not.
    error = _distance(at, real, as_was.ts, as_was.count[i], as_was.interval if lazy else 0.0)
    tries = max(1, int(np.count_nonzero(recorded.flows.netns[recorded.flows.attempt_of] == inum)))
    drops = recorded.drops.get(inum, 0)
    limit = setting.limit or math.inf
    base = (recorded.started + offset) / 1e9
    was = Outcome(
        mean=float(real.mean()) if len(real) else math.nan,
        peak=float(real.max()) if len(real) else math.nan,
        drops=drops,
        evictions=recorded.evictions.get(inum, 0),
        full_s=float(np.mean(real >= 0.99 * limit) * recorded.seconds) if len(real) else math.nan,
    )
    span = (float(at.min()), float(at.max())) if len(at) > 1 else (0.0, recorded.seconds)
    modelled = _outcome(as_was, i, setting, span)
    return Place(
        inum,
        name,
        setting.limit,
        target.limit,
        was,
        modelled,
        _outcome(would_be, i, target, span),
        error,
        (modelled.drops - drops) / tries,
        _series(base, at, real),
        _series(base, as_was.ts, as_was.count[i]),
        _series(base, would_be.ts, would_be.count[i]),
    )


def _distance(at: F64, real: F64, ts: F64, count: F64, window: float) -> Optional[float]:
    """Mean distance of two courses, relative to the real one's mean, over a moving window."""
    if not len(at) or real.mean() <= 0:
        return None
    difference = np.interp(at, ts, count) - real
    pace = float(np.median(np.diff(at))) if len(at) > 1 else 1.0
    n = min(max(1, round(window / max(pace, 1e-3))), len(at))
    smooth = np.convolve(difference, np.ones(n) / n, "valid")
    return float(np.abs(smooth).mean() / real.mean())


def _outcome(course: Course, i: int, setting: Setting, span: tuple[float, float]) -> Outcome:
    """Numbers over the time for which the kernel's own count is known, to compare alike."""
    inside = (course.ts >= span[0]) & (course.ts <= span[1])
    if not inside.any():
        inside[:] = True
    count = course.count[i][inside]
    prompt = count - course.expired[i][inside]
    limit = setting.limit or math.inf
    pace = (float(course.expiring[i]), course.interval, limit)
    step = course.ts[0]
    return Outcome(
        mean=float(count.mean()),
        peak=float(count.max()),
        drops=int(course.drops[i].sum()),
        evictions=int(course.evictions[i].sum()),
        full_s=float(np.count_nonzero(count >= 0.99 * limit) * step),
        mean_range=tablemodel.collected(float(prompt.mean()), *pace),
        peak_range=tablemodel.collected(float(prompt.max()), *pace),
    )


def _series(base: float, ts: Any, count: Any) -> Series:
    pick = np.unique(np.linspace(0, max(len(ts) - 1, 0), min(POINTS, len(ts))).astype(int))
    return Series(
        tuple(round(base + float(t), 3) for t in np.asarray(ts)[pick]),
        tuple(float(n) for n in np.asarray(count)[pick]),
    )


def _notes(recorded: Recorded, levers: Levers, extra: dict[int, int]) -> Iterator[str]:
    flows = recorded.flows
    if recorded.lost:
        yield f"{recorded.lost:,} events were lost while recording: flows are missing here."
    if recorded.cut:
        yield f"the first {recorded.cut:,} events were left out: the recording is very long."
    if not len(recorded.readings.ts):
        yield "the recording has no readings of the table: the model can't be checked against it."
    unseen = int(np.count_nonzero(~flows.known))
    if unseen and levers.timeouts:
        yield (
            f"{unseen:,} of {len(flows):,} flows did not end in the recording: under another "
            "timeout each is taken to end as a flow to the same port did that had lived longer."
        )
    forever = int(np.count_nonzero(~flows.known & np.isinf(flows.expire)))
    if forever:
        yield (
            f"{forever:,} of {len(flows):,} flows outlived all like them that ended: the recording "
            "is too short to tell when they end; they are taken to stay, and more may come."
        )
    if extra:
        yield (
            f"{sum(extra.values()):,} entries were there before the recording and never ended in "
            "it: taken to stay, whatever is changed."
        )
    for lever in levers.timeouts:
        if not lever.matches(flows).any():
            yield (
                f"--timeout {lever}: no entry was seen to end in that state, so the answer can't "
                "show what it changes; record for longer than the table's timeouts."
            )
    if levers.timeouts:
        yield "a shorter timeout can also make entries anew after a pause: that is not modelled."
    if levers.buckets is not None:
        yield "buckets change what early_drop finds and how long lookups take, not what is held."


def _render(answer: WhatIf) -> Iterator[str]:
    yield f"What if: {answer.levers}, over {answer.seconds:.0f} s"
    for place in answer.places:
        then, model, would = place.recorded, place.modelled, place.changed
        yield ""
        yield f"{place.name}"
        yield f"  {'':24}{'mean':>10}{'peak':>10}{'of max':>9}{'refused':>10}{'evicted':>10}"
        for label, outcome, limit in (
            ("then, as counted", then, place.limit),
            ("then, in the model", model, place.limit),
            ("with the change", would, place.new_limit),
        ):
            fill = (
                f"{100 * (outcome.peak / limit):.0f} %"
                if limit and not math.isnan(outcome.peak)
                else "-"
            )
            yield (
                f"  {label:24}{_whole(outcome.mean):>10}{_whole(outcome.peak):>10}{fill:>9}"
                f"{outcome.drops:>10,}{outcome.evictions:>10,}"
            )
        low, high = would.mean_range
        if high >= 1:
            yield (
                f"  with the change the mean lies between {_whole(low)} and {_whole(high)}: "
                f"the kernel collects expired entries about every {answer.interval_s:.0f} s"
            )
        if place.new_limit not in (0, place.limit):
            least, most = memory_of(place.new_limit, answer.levers.buckets)
            yield f"  a full table of {place.new_limit:,} takes {least >> 20} to {most >> 20} MiB"
        yield f"  {trust_text(place)}"
    for note in answer.notes:
        yield f"Note: {note}"


def trust_text(place: Place) -> str:
    """How far the model was from the recording as it was, in words."""
    if place.error is None:
        return "the model could not be checked against this recording: do not trust it"
    text = (
        f"the model's error on this recording as it was: {100 * place.error:.1f} % of the count, "
        f"{100 * place.drop_error:+.1f} % of all tries refused"
    )
    return text if place.trusted else f"{text}: above {100 * TRUST:.0f} %, do not trust it"


def _whole(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.0f}"


def _clean(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
