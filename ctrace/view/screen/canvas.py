"""A screen while it is drawn: lines, scrolled tables, and what a click on each spot means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from rich.text import Text

from ctrace.model.snapshot import Culprit, Snapshot, Table, Victim
from ctrace.view import columns
from ctrace.view import format as fmt
from ctrace.view.columns import Column
from ctrace.view.palette import Palette
from ctrace.view.screen import parts
from ctrace.view.screen.state import State

Row = TypeVar("Row", Culprit, Victim, Table)


@dataclass(frozen=True)
class Spot:
    """What a click on part of a line does."""

    y: int
    start: int
    end: int
    action: str
    """``row``, ``sort``, ``key`` (a footer key) or ``seek`` (the time line of a replay)."""
    value: str


@dataclass
class Painted:
    """A finished screen."""

    lines: list[Text]
    spots: list[Spot] = field(default_factory=list)
    state: State = field(default_factory=State)
    """The state, with cursor and scroll position clamped to what exists."""


class Screen:
    """Stacks lines and remembers what a click on them does."""

    def __init__(
        self, snapshot: Snapshot, width: int, height: int, palette: Palette, state: State
    ) -> None:
        self.snapshot = snapshot
        self.width = width
        self.height = height
        self.palette = palette
        self.state = state
        self.lines: list[Text] = []
        self.spots: list[Spot] = []

    @property
    def room(self) -> int:
        """Lines still free."""
        return max(0, self.height - len(self.lines))

    def add(self, lines: Sequence[Text]) -> None:
        """Put lines below those that there are."""
        self.lines.extend(lines)

    def table(
        self,
        wanted: Sequence[Column[Row]],
        rows: Sequence[Row],
        height: int,
        title: str,
        *,
        pane: str = "",
        width: int = 0,
        empty: str = "",
    ) -> None:
        """A head and rows, scrolled so that the cursor (if it is in this pane) is seen."""
        if height < 2:
            return
        width = width or self.width
        room = height - 1
        sort = self.snapshot.sort.removeprefix("-") if pane == "culprits" else ""
        state, has_cursor = self.state, bool(pane) and pane == self._cursor_pane()
        cursor = self._follow(rows, state) if has_cursor else 0
        first = max(0, min(cursor - room + 1 + min(2, room // 3), len(rows) - room))
        first = min(first, cursor)
        shown = rows[first : first + room]
        placed = columns.place(wanted, shown, width)
        y = len(self.lines)
        self.add(
            [columns.head(placed, width, self.palette, title, sort, state.reverse, has_cursor)]
        )
        for one in placed:
            if one.column.sort and pane == "culprits":
                stretch = (one.start - 1, one.start + one.width + 1)
                self.spots.append(Spot(y, *stretch, "sort", one.column.sort))
        for index, item in enumerate(shown):
            text = columns.row(placed, item, width, self.palette)
            if has_cursor and first + index == cursor:
                text.stylize(self.palette.cursor)
            if pane:
                self.spots.append(Spot(y + 1 + index, 0, width, "row", f"{pane}:{first + index}"))
            self.add([text])
        if not rows and empty:
            self.add([parts.line([(empty, self.palette.dim)], width)])
        self.lines[y + 1 :] = parts.pad(self.lines[y + 1 :], width, room)
        hidden = len(rows) - first - len(shown)
        if hidden and has_cursor:
            snapshot = self.snapshot
            more = pane == "culprits" and snapshot.culprits_total > len(snapshot.culprits)
            self._more(y, f"{fmt.count(hidden)}{'+' * more}", width)
        if has_cursor:
            held = identity(rows[cursor]) if rows and cursor else ("", 0)
            self.state = replace(state, cursor=cursor, held=held)

    def _more(self, y: int, hidden: str, width: int) -> None:
        """How many rows are below the last shown, in the head where it has room."""
        head = self.lines[y]
        note = f" {hidden} more ↓"
        plain = head.plain
        start = plain.find("   ", len(plain.split("  ")[0]) + 2)
        run = len(plain[start:]) - len(plain[start:].lstrip(" ")) if start >= 0 else 0
        if run > len(note) + 2:
            self.lines[y] = Text.assemble(
                head[:start], (note, self.palette.dim), head[start + len(note) :], end=""
            )
            self.lines[y].no_wrap = True
            self.lines[y].style = head.style
            self.lines[y].truncate(width, pad=True)

    def _cursor_pane(self) -> str:
        return self.state.pane if self.state.mode == "top" else self.state.mode

    @staticmethod
    def _follow(rows: Sequence[Row], state: State) -> int:
        """The row that the cursor stays with, wherever it has moved."""
        if state.held[0]:
            for index, item in enumerate(rows):
                if identity(item) == state.held:
                    return index
        return max(0, min(state.cursor, len(rows) - 1))

    def painted(self) -> Painted:
        """The finished screen, of exactly the size asked for."""
        return Painted(parts.pad(self.lines, self.width, self.height), self.spots, self.state)


def identity(item: object) -> tuple[str, int]:
    """What a cursor stays on: a row's key and namespace."""
    name = item.name if isinstance(item, Table) else getattr(item, "key", "")
    return (str(name), int(getattr(item, "netns", 0)))
