"""What would have happened, as sections of the report's page: a chart and the numbers."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from datetime import datetime, timezone

from ctrace.view import format as fmt
from ctrace.view.report.whatif_text import rising_text, trust_text, vague_text
from ctrace.whatif.answer import Outcome, Place, Series, WhatIf

WIDTH, HEIGHT = 1200, 300
LEFT, TOP, BOTTOM = 70, 10, 24
# Okabe and Ito's colours, and dashes beside them: told apart also without colour.
LINES = (("then, as counted", "#8a94a3", ""), ("then, in the model", "#e69f00", "5 4"),
         ("with the change", "#0072b2", ""))  # fmt: skip


def whatif_html(answer: WhatIf, table: Callable[..., str]) -> str:
    """The sections; ``table`` makes one of a title, columns, rows of HTML cells and a note."""
    notes = "".join(f'<p class="note">{_text(note)}</p>' for note in answer.notes)
    return (
        f"<section><h2>What if: {_text(str(answer.levers))}</h2>"
        + "".join(_place(place) for place in answer.places)
        + f"{notes}</section>"
        + table(
            "What if, in numbers",
            ("namespace", "", ">mean", ">peak", ">of max", ">refused", ">evicted"),
            (
                [_text(place.name), label, *_numbers(outcome, limit)]
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
        "-" if math.isnan(value) else f"{value:,.0f}" for value in (outcome.mean, outcome.peak)
    )
    return [mean, peak, fill, f"{outcome.drops:,}", f"{outcome.evictions:,}"]


def _place(place: Place) -> str:
    (low, high), (least, most) = place.changed.mean_range, place.changed.peak_range
    kind = "note" if place.trusted else "bad"
    growing = f"; {rising_text(place.rising)}" if place.rising else ""
    growing += f"; {vague_text(place)}" if place.vague else ""
    return (
        f"<p>{_text(place.name)}: with the change the mean lies between {low:,.0f} and "
        f"{high:,.0f} entries, the peak between {least:,.0f} and {most:,.0f}{_text(growing)}</p>"
        f'{_chart(place)}<p class="{kind}">{_text(trust_text(place))}</p>'
    )


def _chart(place: Place) -> str:
    """Entries over time as lines; the maximum as a line where it is near."""
    found = (place.series_recorded, place.series_modelled, place.series_changed)
    known = [series for series in found if series.ts]
    if not known:
        return ""
    first = min(series.ts[0] for series in known)
    last = max(first + 1e-3, *(series.ts[-1] for series in known))
    most = max(max(series.count) for series in known) or 1.0
    limits = {limit for limit in (place.limit, place.new_limit) if 0 < limit <= 2 * most}
    top = max(most, *limits, 1) * 1.05 if limits else most * 1.05

    def x(ts: float) -> float:
        return LEFT + (ts - first) / (last - first) * (WIDTH - LEFT)

    def y(count: float) -> float:
        return TOP + (1 - count / top) * (HEIGHT - TOP - BOTTOM)

    def line(series: Series, colour: str, dash: str) -> str:
        points = " ".join(f"{x(t):.1f},{y(n):.1f}" for t, n in zip(series.ts, series.count))
        return (
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" '
            f'stroke-dasharray="{dash}" points="{points}"/>'
        )

    marks = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y(n):.1f}" y2="{y(n):.1f}" stroke="var(--{style})" '
        f'stroke-dasharray="{dash}"/><text x="{LEFT - 6}" y="{y(n) + 4:.1f}" '
        f'text-anchor="end" fill="var(--dim)">{fmt.count(round(n))}</text>'
        for n, style, dash in (
            *((most * part, "line", "") for part in (0, 0.5, 1)),
            *((limit, "bad", "2 4") for limit in sorted(limits)),
        )
    )
    times = "".join(
        f'<text x="{at}" y="{HEIGHT - 4}" text-anchor="{anchor}" fill="var(--dim)">'
        f"{datetime.fromtimestamp(ts, timezone.utc):%H:%M:%S}</text>"
        for at, anchor, ts in ((LEFT, "start", first), (WIDTH, "end", last))
    )
    legend = " ".join(
        f'<tspan fill="{colour}">{"┅" if dash else "━"} {label}</tspan>'
        for label, colour, dash in LINES
    )
    lines = "".join(
        line(series, colour, dash) for series, (_, colour, dash) in zip(found, LINES) if series.ts
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" font-size="13" role="img" '
        f'aria-label="Entries of {_text(place.name)}, as they were and with the change">'
        f"{marks}{lines}{times}"
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">{legend}</text></svg>'
    )


def _text(text: str) -> str:
    return html.escape(fmt.clean(text))
