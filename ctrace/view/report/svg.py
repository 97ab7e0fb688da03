"""Charts as SVG that need no script: the lines stretch with the page, the words keep their size."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Final, Optional

from ctrace.view import format as fmt

COLOURS: Final = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#b8860b",
    "#56b4e9",
    "#7a4fbf",
    "#8c564b",
)
"""After Okabe and Ito: distinguishable with colour-blindness, too."""
GREY: Final = "#9aa3af"
RED: Final = "#d0342c"
DASHES: Final = ("", "7 4", "2 3", "9 3 2 3")
STEPS: Final = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200,
                86400, 172800, 604800, 2592000)  # fmt: skip
"""Seconds that times on an axis may be apart."""
CLOSE: Final = 0.05
LETTER: Final = 0.022
"""Shares of a small phone's width that a mark takes, and each letter in it."""
SAME: Final = 0.004
"""Share of a chart's width within which two marks count as one."""
ROWS: Final = 3
"""Rows of letters above a chart."""
WIDE: Final = 1000
HIGH: Final = 300
"""The drawing's own units; a browser stretches them."""


@dataclass(frozen=True)
class Line:
    """One course. A value that is None was not read: the line goes straight past it."""

    name: str
    values: Sequence[Optional[float]]
    colour: str
    dash: str = ""
    xs: Optional[Sequence[float]] = None
    """Where its points are, when not where the chart's are."""
    zero: bool = False
    """Whether it is drawn also when it is nothing but zero."""


@dataclass(frozen=True)
class Axis:
    """The labels along the bottom of a chart."""

    first: float
    last: float
    ticks: tuple[tuple[float, str], ...]
    name: str

    def part(self, x: float) -> float:
        """Where a value is, 0 to 1."""
        return (x - self.first) / max(1e-9, self.last - self.first)


@dataclass(frozen=True)
class Mark:
    """A moment that is explained beside the chart, by its letter."""

    at: float
    letter: str


def times(first: float, last: float) -> Axis:
    """An axis of UTC seconds, with at most seven round times on it."""
    span = max(1e-3, last - first)
    step = next((s for s in STEPS if span / s <= 6), STEPS[-1])
    form = "%H:%M:%S" if step < 60 else "%H:%M" if span < 2 * 86400 else "%m-%d %H:%M"
    at = math.ceil(first / step) * step
    ticks: list[tuple[float, str]] = []
    while at <= last and len(ticks) < 12:
        ticks.append((float(at), datetime.fromtimestamp(at, timezone.utc).strftime(form)))
        at += step
    if not ticks:
        ticks = [(first, datetime.fromtimestamp(first, timezone.utc).strftime("%H:%M:%S"))]
    return Axis(first, last, tuple(ticks), "time, UTC")


def decades(low: float, high: float) -> Axis:
    """A logarithmic axis of seconds; values on it are given as their logarithms."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    ticks = tuple((float(n), fmt.duration(10.0**n)) for n in range(first, last + 1))
    return Axis(float(first), float(last), ticks, "time in the table, from insert to destroy")


def lines_chart(
    title: str,
    axis: Axis,
    xs: Sequence[float],
    lines: Sequence[Line],
    show: Callable[[float], str],
    *,
    marks: Sequence[Mark] = (),
    limits: Sequence[float] = (),
) -> str:
    """Lines over one axis; empty where there is nothing to draw. ``show`` writes a value."""
    told = [line for line in lines if line.zero or any(line.values)]
    if not any(any(line.values) for line in told):
        return ""
    most = max(value or 0.0 for line in told for value in line.values)
    top, ticks = _scale(max([most, *limits]))
    drawn = []
    for line in told:
        places = line.xs if line.xs is not None else xs
        points = " ".join(
            f"{WIDE * axis.part(x):.1f},{HIGH * (1 - value / top):.1f}"
            for x, value in zip(places, line.values)
            if value is not None
        )
        drawn.append(
            f'<polyline fill="none" stroke="{line.colour}" stroke-dasharray="{line.dash}" '
            f'points="{points}"/>'
        )
    drawn += [
        f'<line class="limit" x1="0" x2="{WIDE}" y1="{HIGH * (1 - limit / top):.1f}" '
        f'y2="{HIGH * (1 - limit / top):.1f}"/>'
        for limit in limits
    ]
    legend = [(line.name, line.colour, line.dash) for line in told]
    return _figure(title, axis, "".join(drawn), (top, ticks, show), legend, marks)


def stacked_chart(
    title: str,
    axis: Axis,
    xs: Sequence[float],
    parts: Sequence[Line],
    show: Callable[[float], str],
    *,
    marks: Sequence[Mark] = (),
) -> str:
    """Areas one upon the other, the first lowest; empty where there is nothing to draw."""
    told = [part for part in parts if any(part.values)]
    if not told or len(xs) < 2:
        return ""
    base = [0.0] * len(xs)
    shapes = []
    for part in told:
        upper = [low + (value or 0.0) for low, value in zip(base, part.values)]
        shapes.append((part.colour, base, upper))
        base = upper
    top, ticks = _scale(max(base))
    drawn = []
    for colour, low, high in shapes:
        there = [*zip(xs, high), *zip(reversed(xs), reversed(low))]
        points = " ".join(
            f"{WIDE * axis.part(x):.1f},{HIGH * (1 - value / top):.1f}" for x, value in there
        )
        drawn.append(f'<polygon fill="{colour}" points="{points}"/>')
    legend = [(part.name, part.colour, "area") for part in told]
    return _figure(title, axis, "".join(drawn), (top, ticks, show), legend, marks)


def _scale(most: float) -> tuple[float, list[float]]:
    """The top of the axis and its ticks, all round numbers."""
    rough = most / 4 or 1.0
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(n * unit for n in (1, 2, 2.5, 5, 10) if n * unit >= rough * 0.999)
    number = max(1, math.ceil(most / step - 1e-9))
    return number * step, [step * n for n in range(number + 1)]


def _figure(
    title: str,
    axis: Axis,
    drawn: str,
    scale: tuple[float, list[float], Callable[[float], str]],
    legend: Sequence[tuple[str, str, str]],
    marks: Sequence[Mark],
) -> str:
    top, ticks, show = scale
    lines, words = [], []
    for value in ticks:
        at = 1 - value / top
        lines.append(
            f'<line class="grid" x1="0" x2="{WIDE}" y1="{HIGH * at:.1f}" y2="{HIGH * at:.1f}"/>'
        )
        words.append(f'<span class="y" style="top:{100 * at:.1f}%">{quoted(show(value))}</span>')
    some = max(1, math.ceil(len(axis.ticks) / 3))  # as many as a phone has room for
    for i, (x, name) in enumerate(axis.ticks):
        if 0 <= axis.part(x) <= 1:
            words.append(
                f'<span class="x{"" if i % some else " some"}" '
                f'style="left:{100 * axis.part(x):.1f}%">{name}</span>'
            )
    rows: list[list[tuple[float, str]]] = [[]]
    for mark in marks:
        part = axis.part(mark.at)
        if 0 <= part <= 1:
            lines.append(
                f'<line class="mark" x1="{WIDE * part:.1f}" x2="{WIDE * part:.1f}" '
                f'y1="0" y2="{HIGH}"/>'
            )
            _place(rows, part, mark.letter)
    words += [
        f'<span class="m r{row}" style="left:{100 * part:.1f}%">{text}</span>'
        for part, row, text in sorted(
            (part, row, text) for row, letters in enumerate(rows) for part, text in letters
        )
    ]
    keys = "".join(_key(*one) for one in legend)
    return (
        f"<figure><figcaption>{quoted(title)}</figcaption>"
        f'<div class="plot r{len(rows) - 1}" role="img" '
        f'aria-label="{quoted(title)}, over {quoted(axis.name)}">'
        f'<svg viewBox="0 0 {WIDE} {HIGH}" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(lines[: len(ticks)])}{drawn}{''.join(lines[len(ticks) :])}</svg>"
        f'{"".join(words)}</div><p class="axis">{quoted(axis.name)}</p>'
        f'<ul class="legend">{keys}</ul></figure>'
    )


def _place(rows: list[list[tuple[float, str]]], part: float, letter: str) -> None:
    """Put a mark's letter above its line: beside one at the same place, else in the first row with
    room, else with the mark before."""
    for letters in rows:
        if letters and part - letters[-1][0] < SAME:
            letters[-1] = (letters[-1][0], letters[-1][1] + letter)
            return
    for letters in rows:
        if not letters or part - letters[-1][0] >= CLOSE + LETTER * (len(letters[-1][1]) + 1):
            letters.append((part, letter))
            return
    if len(rows) < ROWS:
        rows.append([(part, letter)])
    else:
        last = max(rows, key=lambda letters: letters[-1][0])
        last[-1] = (last[-1][0], last[-1][1] + letter)


def _key(name: str, colour: str, dash: str) -> str:
    if dash == "area":
        drawn = f'<rect width="26" height="10" fill="{colour}"/>'
    else:
        drawn = (
            f'<line x1="0" x2="26" y1="5" y2="5" stroke="{colour}" stroke-width="3" '
            f'stroke-dasharray="{dash}"/>'
        )
    return f'<li><svg width="26" height="10" aria-hidden="true">{drawn}</svg>{quoted(name)}</li>'


def quoted(text: str) -> str:
    """A stranger's text, harmless in a page."""
    return html.escape(fmt.arrowed(text))
