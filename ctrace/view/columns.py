"""Tables that fit: columns chosen by importance, widths by content, numbers aligned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Optional, TypeVar

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from ctrace.view import format as fmt
from ctrace.view.palette import Palette

Row = TypeVar("Row")
GAP = 2


@dataclass(frozen=True)
class Column(Generic[Row]):
    """One column of a table."""

    name: str
    head: str
    cell: Callable[[Row, int], str]
    """The cell's text for a row, in at most so many cells."""
    rank: int
    """Priority. 0 is always shown; columns with the highest rank go first when room is short."""
    least: int
    most: int = 0
    """Grows up to this where there is room; 0 means as wide as its content."""
    right: bool = True
    style: Optional[Callable[[Row, Palette], Style]] = None
    sort: str = ""
    """One of ``snapshot.SORTS`` where the column can be sorted by."""
    when: Optional[Callable[[Row], bool]] = None
    """Shown only when this holds for some row."""


@dataclass(frozen=True)
class Placed(Generic[Row]):
    """A column with its place on the line."""

    column: Column[Row]
    start: int
    width: int


def place(
    columns: Sequence[Column[Row]], rows: Sequence[Row], width: int, indent: int = 1
) -> tuple[Placed[Row], ...]:
    """The columns that fit into ``width`` cells, with the room shared out."""
    width -= 1  # the last cell stays free, as the first does
    wanted = [one for one in columns if one.when is None or any(map(one.when, rows))]
    need = {one.name: _need(one, rows) for one in wanted}
    for one in wanted:  # the key comes before any column that is only nice to have
        if one.rank == 0 and one.most and width > 100:
            need[one.name] = max(one.least, min(_longest(one, rows, one.most), width * 3 // 10))
    chosen = sorted(wanted, key=lambda one: one.rank)
    while len(chosen) > 1 and _total(chosen, need) > width - indent:
        if chosen[-1].rank == 0:
            break
        chosen.pop()
    spare = width - indent - _total(chosen, need)
    for one in chosen:  # the most important grow first
        if one.most > need[one.name] and spare > 0:
            longest = min(one.most, _longest(one, rows, one.most))
            extra = min(spare, max(0, longest - need[one.name]))
            need[one.name] += extra
            spare -= extra
    kept = {one.name for one in chosen}
    placed = []
    start = indent
    first = True
    for one in columns:
        if one.name in kept:
            # What is left over goes behind the key, so that the numbers stay at the right edge.
            cells = max(1, need[one.name] + (spare if first else 0))
            placed.append(Placed(one, start, cells))
            start += cells + GAP
            first = False
    return tuple(placed)


def _need(column: Column[Row], rows: Sequence[Row]) -> int:
    if column.most:
        return column.least
    longest = _longest(column, rows, 40)
    return max(column.least, cell_len(column.head) + bool(column.sort), longest)


def _longest(column: Column[Row], rows: Sequence[Row], width: int) -> int:
    return max((cell_len(column.cell(row, width)) for row in rows), default=0)


def _total(columns: Sequence[Column[Row]], need: dict[str, int]) -> int:
    return sum(need[one.name] for one in columns) + GAP * (len(columns) - 1)


def head(
    placed: Sequence[Placed[Row]],
    width: int,
    palette: Palette,
    title: str = "",
    sort: str = "",
    reverse: bool = False,
    focus: bool = False,
) -> Text:
    """The line of column heads; ``title`` comes before the first one's."""
    line = Text(no_wrap=True, end="")
    used = 0
    for index, one in enumerate(placed):
        line.append(" " * (one.start - used))
        column = one.column
        sorted_by = bool(column.sort) and column.sort == sort
        label = column.head + (("▲" if reverse else "▼") if sorted_by else "")
        if index == 0 and title:
            line.append(title + "  ", palette.accent + Style(underline=focus))
            room = one.width - cell_len(title) - 2
            whole = cell_len(label) <= room  # a head that is cut says less than none
            line.append(fmt.fit(label if whole else "", room) if room > 0 else "", palette.band)
            used = one.start + max(one.width, cell_len(title) + 2)
            continue
        line.append(fmt.fit(label, one.width, column.right), Style(bold=sorted_by))
        used = one.start + one.width
    line.truncate(width, pad=True)
    line.style = palette.band
    return line


def row(placed: Sequence[Placed[Row]], item: Row, width: int, palette: Palette) -> Text:
    """One row."""
    line = Text(no_wrap=True, end="")
    used = 0
    for one in placed:
        line.append(" " * (one.start - used))
        column = one.column
        style = column.style(item, palette) if column.style else palette.text
        text = fmt.fit(column.cell(item, one.width), one.width, column.right)
        line.append(text, style)
        used = one.start + one.width
    line.truncate(width, pad=True)
    return line
