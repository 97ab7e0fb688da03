"""One whole frame from one snapshot: what a person sees where there is no terminal.

The order of lines is the order of importance, so a small frame is a large one's top.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Optional, TypeVar

from rich.console import Group
from rich.segment import Segment
from rich.text import Text

from ctrace.model.snapshot import Snapshot
from ctrace.view import columns, parts, tables
from ctrace.view import format as fmt
from ctrace.view.columns import Column
from ctrace.view.palette import TERMINAL, Palette

Row = TypeVar("Row")


@dataclass(frozen=True)
class Layout:
    """How many lines each part gets at a given size."""

    why: int
    chart: int
    blind: int
    victims: int
    namespaces: int
    beside: bool
    """Whether the top lists stand beside the victims."""


def layout(snapshot: Snapshot, width: int, height: int) -> Layout:
    """Share out ``height`` lines, at 80x24 as at 200x60."""
    victims = max(1, len(snapshot.victims))
    tall = height - 24
    return Layout(
        why=3 if tall < 8 else 4,
        chart=0 if tall < 10 else min(10, 5 + tall // 8),
        blind=min(len(snapshot.hooks.blind), 1 if tall < 4 else 3)
        if not snapshot.hooks.drop_tuples
        else 0,
        victims=min(victims, 4 + max(0, tall) // 5),
        namespaces=min(8, tall // 5) if tall >= 16 and len(snapshot.tables) > 1 else 0,
        beside=width >= 160 and height >= 40,
    )


def top_part(snapshot: Snapshot, width: int, height: int, palette: Palette) -> list[Text]:
    """Gauge, rates, cause and chart: everything between the header and the culprits."""
    plan = layout(snapshot, width, height)
    lines = [
        *parts.table_lines(snapshot, width, palette),
        parts.rate_line(snapshot, width, palette),
        *parts.why_lines(snapshot, width, palette, plan.why),
        *parts.blind_lines(snapshot, width, palette, plan.blind),
    ]
    if plan.chart:
        lines += [
            parts.blank(width),
            *parts.chart_lines(snapshot, width, plan.chart, palette),
            parts.blank(width),
        ]
    return lines


def table(
    wanted: Sequence[Column[Row]],
    rows: Sequence[Row],
    width: int,
    height: int,
    palette: Palette,
    title: str,
    sort: str = "",
) -> list[Text]:
    """A head and as many rows as fit."""
    shown = rows[: max(0, height - 1)]
    placed = columns.place(wanted, shown, width)
    return [
        columns.head(placed, width, palette, title, sort),
        *(columns.row(placed, one, width, palette) for one in shown),
    ]


def victim_note(snapshot: Snapshot) -> str:
    """What stands in the place of victims when there are none to show."""
    if snapshot.totals.drop and not snapshot.hooks.drop_tuples:
        many = fmt.plural(snapshot.totals.drop, "packet")
        return f"{many} dropped; {snapshot.hooks.family} cannot see whose"
    if snapshot.totals.drop or snapshot.totals.early_drop:
        return "dropped or evicted packets match no flow shown"
    return "nobody was refused, nothing was evicted"


def lines(snapshot: Snapshot, width: int, height: int, palette: Palette = TERMINAL) -> list[Text]:
    """The frame as exactly ``height`` lines of exactly ``width`` cells."""
    plan = layout(snapshot, width, height)
    many = len(snapshot.tables) > 1
    out = [parts.header(snapshot, width, palette, mode="top")]
    out += top_part(snapshot, width, height, palette)
    spare = height - len(out) - len(snapshot.culprits) - 1 - plan.namespaces - plan.victims - 3
    if spare > 0:
        plan = replace(plan, victims=min(max(1, len(snapshot.victims)), plan.victims + spare))
    bottom = _bottom(snapshot, width, plan, palette, many)
    room = height - len(out) - len(bottom)
    group = snapshot.group
    out += parts.pad(
        table(
            tables.culprit_columns(group, many),
            snapshot.culprits,
            width,
            room,
            palette,
            "CULPRITS",
            snapshot.sort,
        ),
        width,
        max(0, room),
    )
    return parts.pad(out + bottom, width, height)


def _bottom(
    snapshot: Snapshot, width: int, plan: Layout, palette: Palette, many: bool
) -> list[Text]:
    out: list[Text] = []
    if plan.namespaces:
        shown = sorted(snapshot.tables, key=lambda t: (-(t.full_since is not None), -t.fill))
        out += table(
            tables.namespace_columns(), shown, width, plan.namespaces + 1, palette, "NAMESPACES"
        )
    left = width * 5 // 8 if plan.beside else width
    rows = plan.victims + 1
    victims = table(tables.victim_columns(many), snapshot.victims, left, rows, palette, "VICTIMS")
    if not snapshot.victims:
        victims.append(parts.line([(victim_note(snapshot), palette.dim)], left))
    if plan.beside:
        rows = max(rows, 8)
        gap = 2
        each = (width - left - gap) // 2
        lists = [
            parts.pad(parts.top_lines(snapshot, group, title, each - 1, rows, palette), each, rows)
            for group, title in (("src", "SOURCES"), ("service", "SERVICES"))
        ]
        victims = [
            Text(" " * gap, no_wrap=True, end="").join(row)
            for row in zip(parts.pad(victims, left, rows), *lists, strict=True)
        ]
        for one in victims:
            one.truncate(width, pad=True)
    return out + victims


def frame(
    snapshot: Snapshot,
    width: int,
    height: Optional[int] = None,
    *,
    palette: Palette = TERMINAL,
    ascii_only: bool = False,
) -> Group:
    """The frame as a rich renderable; without a height, as tall as its content needs."""
    if height is None:
        height = 16 + len(snapshot.culprits) + len(snapshot.victims)
    body = lines(snapshot, width, height, palette)
    if ascii_only:
        body = [in_ascii(one) for one in body]
    for one in body:
        one.end = "\n"
    return Group(*body)


def in_ascii(text: Text) -> Text:
    """The same line in ASCII, cell for cell, with its styles."""
    if text.plain.isascii():
        return text
    out = Text(no_wrap=True, end="", style=text.style)
    edges = {0, len(text.plain), *(edge for s in text.spans for edge in (s.start, s.end))}
    for start, end in itertools.pairwise(sorted(edges)):
        piece = text[start:end]
        begin = len(out)
        out.append(fmt.ascii_only(piece.plain))
        for span in piece.spans:
            out.stylize(span.style, begin, len(out))
    return out


def segments_in_ascii(segments: Sequence[Segment]) -> list[Segment]:
    """The same for rendered segments."""
    return [
        segment
        if segment.text.isascii()
        else Segment(fmt.ascii_only(segment.text), segment.style, segment.control)
        for segment in segments
    ]
