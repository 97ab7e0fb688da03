"""Which figures and charts a review gives; charts over the same time and with the same marks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ctrace.batch import DUMP
from ctrace.model.snapshot import Histogram
from ctrace.recording.review import Review
from ctrace.view import format as fmt
from ctrace.view.report.story import Moment, at, grouping
from ctrace.view.report.svg import (
    COLOURS,
    DASHES,
    GREY,
    RED,
    Axis,
    Line,
    Mark,
    decades,
    lines_chart,
    stacked_chart,
    times,
)
from ctrace.view.unseen import number

FILLS = 5
"""Namespaces with a fill curve, at most."""
TRACE = 0.02
"""Share of the fullest table's fill below which a namespace gets no line of its own."""
LIVES = 4
NAMES = {
    "who": "the few keys that hold most",
    "pair": "source and service",
    "service": "service",
    "netns": "namespace",
    "src": "source",
}


def figures(review: Review, texts: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(value, what it is, how good) of the most telling numbers; what a source cannot tell has
    none."""
    totals, hooks, log = review.final.totals, review.final.hooks, review.final.logged
    good = "good" if hooks.refusals else ""
    tiles = [
        (
            fmt.share(review.peak_fill or None),
            "fullest" if hooks.changes else "full, as read",
            "bad" if review.peak_fill > 0.95 else "",
        ),
        (fmt.count(texts["entries"]) if texts.get("entries") else fmt.UNKNOWN, "entries shown", ""),
        (fmt.count(log.refused) if log else fmt.UNKNOWN, "refused at least, by the log", "bad"),
        (number(hooks, "insert", totals.insert), "inserted", ""),
        (number(hooks, "drop", totals.drop), "refused", "bad" if totals.drop else good),
        (
            number(hooks, "early_drop", totals.early_drop),
            "evicted",
            "warn" if totals.early_drop else good,
        ),
        (number(hooks, "insert_failed", totals.insert_failed), "failed to insert", ""),
        (
            at(review, review.first_drop)
            if review.first_drop is not None
            else "none"
            if hooks.refusals
            else fmt.UNKNOWN,
            "first refusal",
            "bad" if review.drops else good,
        ),
        (
            fmt.UNKNOWN if hooks.family == DUMP else fmt.count(review.final.lost),
            "events lost",
            "warn" if review.final.lost else "good",
        ),
    ]
    return [one for one in tiles if one[0] != fmt.UNKNOWN]


def over_time(review: Review, told: list[Moment]) -> Iterator[str]:
    """Fill; new and gone entries; refused and evicted: each a chart where there was any."""
    line, axis = review.timeline, _axis(review)
    if len(line.ts) < 2:
        return
    names = {str(table.netns): table.name for table in review.final.tables}
    peaks = {
        name: max((v or 0.0 for v in values), default=0.0) for name, values in line.fill.items()
    }
    fullest = sorted(peaks, key=lambda name: -peaks[name])
    shown = [name for name in fullest[:FILLS] if peaks[name] > TRACE * peaks[fullest[0]]]
    fills = [
        Line(names.get(name, name), line.fill[name], COLOURS[i % len(COLOURS)], DASHES[i % 4])
        for i, name in enumerate(shown)
    ]
    marks = _marks(review, told)
    limits = [1.0] if fullest and peaks[fullest[0]] > 0.5 else []
    yield lines_chart(
        "Fill, share of the limit", axis, line.ts, fills, _tick, marks=marks, limits=limits
    )
    if review.final.hooks.changes:
        flows = [
            Line("new", line.insert, COLOURS[0]),
            Line("gone", line.destroy, COLOURS[2], "5 3"),
        ]
        yield lines_chart(
            "New and gone entries, per second", axis, line.ts, flows, _rate, marks=marks
        )
    if not review.final.hooks.refusals:
        return
    lost = [Line("refused", line.drop, RED), Line("evicted", line.early_drop, COLOURS[4], "5 3")]
    yield lines_chart("Refused and evicted, per second", axis, line.ts, lost, _rate, marks=marks)


def holders_over_time(review: Review, told: list[Moment]) -> str:
    """Entries held by the largest keys, by the grouping that names most of them."""
    name, shares = grouping(review)
    stack = {key: values for key, values in shares.stacked().items() if any(values)}
    others = stack.pop("others", None)
    parts = [
        Line(key, values, COLOURS[i % len(COLOURS)])
        for i, (key, values) in enumerate(stack.items())
    ]
    if others is not None:
        parts.append(Line("all others", others, GREY))
    return stacked_chart(
        f"Entries held, by {NAMES.get(name, name)}",
        _axis(review),
        shares.ts,
        parts,
        fmt.short,
        marks=_marks(review, told),
    )


def _marks(review: Review, told: list[Moment]) -> list[Mark]:
    """The moments of the story that lie within the charts' time."""
    return [
        Mark(one.ts, one.letter) for one in told if one.ts >= review.start and one.ts <= review.end
    ]


def lives(review: Review) -> str:
    """How long entries were in the table, by key; on a scale of decades."""
    told: list[tuple[str, list[float], list[float]]] = []
    for culprit in review.final.culprits:
        if sum(culprit.residence_histogram.counts) and len(told) < LIVES:
            told.append((culprit.key, *_steps(culprit.residence_histogram)))
    if not told:
        return ""
    low = min(min(xs) for _, xs, _ in told)
    high = max(max(xs) for _, xs, _ in told)
    axis = decades(10**low, 10**high)
    found = [
        Line(key, ys, COLOURS[i % len(COLOURS)], DASHES[i % 4], xs)
        for i, (key, xs, ys) in enumerate(told)
    ]
    return lines_chart("Share of the entries that ended", axis, (), found, _tick)


def _steps(histogram: Histogram) -> tuple[list[float], list[float]]:
    """Steps of shares over the logarithm of seconds, from the first bin used to the last."""
    counts, edges = histogram.counts, histogram.edges
    used = [i for i, n in enumerate(counts) if n]
    xs: list[float] = []
    ys: list[float] = []
    total = sum(counts)
    for i in range(used[0], used[-1] + 1):
        left = edges[i] or edges[i + 1] / 4
        xs += [math.log10(left), math.log10(max(edges[i + 1], left))]
        ys += [counts[i] / total] * 2
    return [xs[0], *xs, xs[-1]], [0.0, *ys, 0.0]


def _axis(review: Review) -> Axis:
    return times(review.start, max(review.end, review.start + 1e-3))


def _rate(value: float) -> str:
    if not value:
        return "0"
    return f"{value:g}/s" if value < 1 else f"{fmt.short(value)}/s"


def _tick(part: float) -> str:
    """``0.25 %``: a share at an axis, which is a round number, in full."""
    return f"{100 * part:.6g} %"
