"""What the screen draws over time: the entries of the last minutes, and the position of a
replay."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.text import Text

from ctrace.live.protocol import Position
from ctrace.model.snapshot import Snapshot
from ctrace.view import format as fmt
from ctrace.view.palette import Palette
from ctrace.view.screen.parts import LABEL, Piece, line


def chart(values: Sequence[float], width: int, height: int, top: float) -> list[tuple[str, float]]:
    """A filled curve, highest row first: each row's text, and the share that it begins at."""
    shown = list(values[-width:])
    steps = [min(height * 8, round(value / top * height * 8)) if top else 0 for value in shown]
    rows = []
    for level in range(height - 1, -1, -1):
        chars = []
        for value, step in zip(shown, steps):
            over = step - level * 8
            if over >= 8:
                chars.append("█")
            elif over > 0:
                chars.append(fmt.RAMP[over - 1])
            else:
                chars.append(fmt.RAMP[0] if level == 0 and value > 0 else " ")
        rows.append(("".join(chars).rjust(width), level / height))
    return rows


def chart_lines(snapshot: Snapshot, width: int, height: int, palette: Palette) -> list[Text]:
    """Entries over the last minutes, and where packets were dropped.

    A single table is drawn under its limit. Several are drawn as a sum, to which no single limit
    applies.
    """
    p = palette
    past = snapshot.history
    if len(past.count) < 2 or height < 3:
        return []
    many = len(snapshot.tables) > 1
    limit = 0 if many else max((t.max for t in snapshot.tables), default=0)
    peak = max(past.count)
    top = float(limit if limit and peak > limit / 8 else peak * 1.25 or 1)
    scale = max(len(fmt.short(top)), 5)
    plot = width - LABEL - scale - 3
    if plot < 1:
        return []
    stretched = _stretch(past.count, plot)
    out = []
    for index, (bars, _) in enumerate(chart(stretched, plot, height - 1, top)):
        mark = fmt.short(top) if index == 0 else "0" if index == height - 2 else ""
        label = "ENTRIES" if index == 0 else "in all" if many and index == 1 else ""
        out.append(
            line(
                [(fmt.fit(label, LABEL), p.accent), (f"{mark:>{scale}} ", p.dim), (bars, p.area)],
                width,
            )
        )
    note = f"{fmt.span(past.ts[-1] - past.ts[0])} ago " if len(past.ts) > 1 else ""
    axis: list[Piece] = [(" " * (LABEL + scale + 1), p.dim), (note, p.dim)]
    drops = _stretch(past.drop, plot)
    if any(drops):
        axis.append(("▲ dropped ", p.bad))
    taken = sum(len(text) for text, _ in axis) - LABEL - scale - 1
    for dropped, run in itertools.groupby(drops[taken:], key=bool):
        axis.append((("▲" if dropped else "─") * len(list(run)), p.bad if dropped else p.faint))
    return [*out, line(axis, width)]


def _stretch(values: Sequence[float], width: int) -> list[float]:
    """The series over exactly ``width`` columns: the highest of what falls into each."""
    n = len(values)
    if n >= width:
        edges = [index * n // width for index in range(width + 1)]
        return [max(values[edges[i] : max(edges[i] + 1, edges[i + 1])]) for i in range(width)]
    return [values[index * n // width] for index in range(width)]


def timeline(position: Position, width: int, palette: Palette) -> Text:
    """The position of a replay, with the drops marked on it."""
    p = palette
    head = f" {fmt.clock(position.start)} UTC "
    word = "paused" if position.paused else f"{position.speed:g} times as fast"
    tail = f" {fmt.clock(position.end)}  {word} "
    room = max(4, width - len(head) - len(tail))
    here = min(room - 1, int(position.share * room))
    length = position.end - position.start
    drops = {
        min(room - 1, int((when - position.start) / length * room))
        for when in position.drops
        if length > 0
    }
    text = Text(head, p.dim, no_wrap=True, end="")
    for index in range(room):
        if index == here:
            text.append("●", p.strong)
        elif index in drops:
            text.append("▲", p.bad)
        else:
            text.append("━" if index < here else "─", p.accent if index < here else p.faint)
    text.append(tail, p.dim)
    text.truncate(width, pad=True)
    return text
