"""What would have happened, as sections of the report's page: a chart and the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

from ctrace.view import format as fmt
from ctrace.view.report.svg import Line, lines_chart, quoted, times
from ctrace.view.report.whatif_text import rising_text, trust_text, vague_text
from ctrace.whatif.answer import Outcome, Place, WhatIf

# Okabe and Ito's colours, and dashes beside them: told apart also without colour.
LINES = (
    ("then, as counted", "#8a94a3", ""),
    ("then, in the model", "#e69f00", "5 4"),
    ("with the change", "#0072b2", ""),
)


def whatif_html(answer: WhatIf, table: Callable[..., str]) -> str:
    """The sections; ``table`` makes one from a title, columns, rows of HTML cells and a note."""
    notes = "".join(f'<p class="note">{quoted(fmt.prose(note))}</p>' for note in answer.notes)
    return (
        f"<section><h2>What if: {quoted(str(answer.levers))}</h2>"
        + "".join(_place(place) for place in answer.places)
        + f"{notes}</section>"
        + table(
            "What if, in numbers",
            ("namespace", "", ">mean", ">peak", ">of max", ">refused", ">evicted"),
            (
                [quoted(place.name), label, *_numbers(outcome, limit)]
                for place in answer.places
                for (label, _, _), outcome, limit in zip(
                    LINES,
                    (place.recorded, place.modelled, place.changed),
                    (place.limit, place.limit, place.new_limit),
                )
            ),
            f"Expired entries are collected about every {answer.interval_s:.0f} s.",
        )
    )


def _numbers(outcome: Outcome, limit: int) -> list[str]:
    fill = (
        f"{100 * (outcome.peak / limit):.0f} %" if limit and not math.isnan(outcome.peak) else "-"
    )
    mean, peak = (
        "-" if math.isnan(value) else fmt.count(value) for value in (outcome.mean, outcome.peak)
    )
    refused, evicted = (
        "-" if value is None else fmt.count(value) for value in (outcome.drops, outcome.evictions)
    )
    return [mean, peak, fill, refused, evicted]


def _place(place: Place) -> str:
    (low, high), (least, most) = place.changed.mean_range, place.changed.peak_range
    kind = "note" if place.trusted else "bad"
    growing = f"; {rising_text(place.rising)}" if place.rising else ""
    growing += f"; {vague_text(place)}" if place.vague else ""
    return (
        f"<p>{quoted(place.name)}: with the change the mean lies between {fmt.count(low)} and "
        f"{fmt.count(high)} entries, the peak between {fmt.count(least)} and "
        f"{fmt.count(most)}{quoted(growing)}</p>"
        f'{_chart(place)}<p class="{kind}">{quoted(trust_text(place))}</p>'
    )


def _chart(place: Place) -> str:
    """Entries over time as lines; the maximum as a line where it is near."""
    found = (place.series_recorded, place.series_modelled, place.series_changed)
    known = [series for series in found if series.ts]
    if not known:
        return ""
    first = min(series.ts[0] for series in known)
    last = max(first + 1e-3, *(series.ts[-1] for series in known))
    most = max(max(series.count) for series in known)
    limits = sorted({limit for limit in (place.limit, place.new_limit) if 0 < limit <= 2 * most})
    lines = [
        Line(label, series.count, colour, dash, series.ts, zero=True)
        for series, (label, colour, dash) in zip(found, LINES)
        if series.ts
    ]
    title = f"Entries of {place.name}, as they were and with the change"
    return lines_chart(title, times(first, last), (), lines, fmt.short, limits=limits)
