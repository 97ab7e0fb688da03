"""One whole screen from one snapshot and the person's choices: lines of exact size.

The live screen and the plain frame are this same function. The order of lines is the
order of importance, so a small screen is a large one's most important part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Optional, TypeVar

from rich.console import Group
from rich.text import Text

from ctrace.model.snapshot import Culprit, Snapshot, Table, Victim
from ctrace.view import columns
from ctrace.view import format as fmt
from ctrace.view.columns import Column
from ctrace.view.screen import curves, parts, tables
from ctrace.view.screen.palette import TERMINAL, Palette
from ctrace.view.screen.state import State
from ctrace.view.unseen import blind, nobody
from ctrace.view.verdict import in_trouble

Row = TypeVar("Row", Culprit, Victim, Table)


@dataclass(frozen=True)
class Spot:
    """What a click on a stretch of a line means."""

    y: int
    start: int
    end: int
    action: str
    """``row``, ``sort``, ``key`` (a footer key) or ``pane``."""
    value: str


@dataclass
class Painted:
    """A finished screen."""

    lines: list[Text]
    spots: list[Spot] = field(default_factory=list)
    state: State = field(default_factory=State)
    """The state with its cursor and scroll brought within what there is."""


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
    tall = height - 24
    others = len(snapshot.tables) > 1
    return Layout(
        why=3 if tall < -4 else 4 if tall < 6 else 5,
        chart=0 if tall < 2 else min(10, 5 + tall // 8),
        blind=0
        if snapshot.hooks.drop_tuples
        else bool(snapshot.hooks.note)
        + (min(len(blind(snapshot.hooks, snapshot.unseen)), 1 + tall // 4) if tall >= 0 else 0),
        victims=min(max(1, len(snapshot.victims)), max(1, 4 + tall // 5)),
        namespaces=min(8, tall // 5, len(snapshot.tables)) if tall >= 16 and others else 0,
        beside=width >= 160 and height >= 40,
    )


def top_part(
    snapshot: Snapshot, width: int, height: int, plan: Layout, palette: Palette
) -> list[Text]:
    """Gauge, rates, cause and chart: everything between the header and the tables."""
    lines = [
        *parts.table_lines(snapshot, width, palette),
        parts.rate_line(snapshot, width, palette),
        # As many lines whether the cause takes one or all: the rows below keep their place.
        *parts.pad(parts.why_lines(snapshot, width, palette, plan.why), width, plan.why),
        *parts.blind_lines(snapshot, width, palette, plan.blind),
    ]
    chart = curves.chart_lines(snapshot, width, plan.chart, palette) if plan.chart else []
    if chart:
        apart = [parts.blank(width)] if height >= 34 else []
        lines += [*apart, *chart, *apart]
    return lines


class Screen:
    """Stacks lines and remembers what a click on them means."""

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
            self._more(y, hidden, width)
        if has_cursor:
            held = identity(rows[cursor]) if rows and cursor else ("", 0)
            self.state = replace(state, cursor=cursor, held=held)

    def _more(self, y: int, hidden: int, width: int) -> None:
        """How many rows are below the last shown, in the head where nothing else stands."""
        head = self.lines[y]
        note = f" {fmt.count(hidden)} more ↓"
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
    """What a cursor stays with: a row's key and namespace."""
    name = item.name if isinstance(item, Table) else getattr(item, "key", "")
    return (str(name), int(getattr(item, "netns", 0)))


def culprits_of(snapshot: Snapshot, state: State) -> tuple[Culprit, ...]:
    """The culprits in the order that the person asked for."""
    turned = snapshot.sort.startswith("-")
    there = snapshot.culprits
    if snapshot.sort.removeprefix("-") in ("held", "new"):  # what is gone is told of by the others
        there = tuple(one for one in there if one.held or one.new_per_s or one.drop_per_s) or there
    return there if turned == state.reverse else there[::-1]


def tables_of(snapshot: Snapshot) -> list[Table]:
    """The namespaces, those in trouble first, then the fullest."""
    return sorted(snapshot.tables, key=lambda t: (t.full_since is None, -t.fill, -t.count))


def victim_note(snapshot: Snapshot) -> str:
    """What stands in the place of victims when there are none to show."""
    if not snapshot.hooks.drop_tuples:
        return nobody(snapshot.hooks, snapshot.totals.drop)
    if snapshot.totals.drop or snapshot.totals.early_drop:
        return "none of the dropped or evicted flows match the filter"
    return "nobody was refused, nothing was evicted"


def top_body(screen: Screen) -> None:
    """Culprits, and below them namespaces and victims."""
    snapshot, width, palette = screen.snapshot, screen.width, screen.palette
    plan = layout(snapshot, width, screen.height)
    screen.add(top_part(snapshot, width, screen.height, plan, palette))
    many = len(snapshot.tables) > 1
    below = (plan.namespaces + 1 if plan.namespaces else 0) + 1
    spare = screen.room - below - 1 - len(snapshot.culprits) - plan.victims
    victims = min(max(1, len(snapshot.victims)), plan.victims + max(0, spare))
    if plan.beside:
        victims = max(victims, 7)
    group = screen.snapshot.group
    screen.table(
        [
            one
            for one in tables.culprit_columns(group, many, in_trouble(snapshot))
            if snapshot.hooks.changes or one.name not in tables.OF_CHANGES
        ],
        culprits_of(snapshot, screen.state),
        screen.room - below - victims,
        "CULPRITS",
        pane="culprits",
        empty="no flow matches the filter" if snapshot.filter else "no flow has been seen yet",
    )
    if plan.namespaces:
        screen.table(
            tables.namespace_columns(), tables_of(snapshot), plan.namespaces + 1, "NAMESPACES"
        )
    y = len(screen.lines)
    left = width * 5 // 8 if plan.beside else width
    victims_table(screen, left, min(victims + 1, screen.room), many)
    if plan.beside:
        _beside(screen, y, left)


def victims_table(screen: Screen, width: int, height: int, many: bool) -> None:
    """Who was refused or evicted, before single flows what explains most of them."""
    told = refused_line(screen.snapshot, width, screen.palette)
    if told and height > 2:
        screen.add(told)
        height -= 1
    screen.table(
        tables.victim_columns(many),
        screen.snapshot.victims,
        height,
        "VICTIMS",
        pane="victims",
        width=width,
        empty=victim_note(screen.snapshot),
    )


def refused_line(snapshot: Snapshot, width: int, palette: Palette) -> list[Text]:
    """The few that explain most of what was refused, where rows are those that hold most."""
    if snapshot.group != "who" or not snapshot.who_refused:
        return []
    parts_of = [f"{fmt.share(one.share)} {fmt.prose(one.text)}" for one in snapshot.who_refused]
    return [parts.line([("REFUSED ", palette.accent), ("; ".join(parts_of), palette.text)], width)]


def _beside(screen: Screen, y: int, left: int) -> None:
    """The busiest sources and services at the right of the lines from ``y`` on."""
    rows = len(screen.lines) - y
    each = (screen.width - left - 2) // 2
    lists = [
        parts.pad(
            parts.top_lines(screen.snapshot, group, title, each - 1, rows, screen.palette),
            each - 1,
            rows,
        )
        for group, title in (("src", "SOURCES"), ("service", "SERVICES"))
    ]
    for index in range(rows):
        whole = Text("  ", no_wrap=True, end="").join(
            [screen.lines[y + index], *(column[index] for column in lists)]
        )
        whole.truncate(screen.width, pad=True)
        screen.lines[y + index] = whole


def namespaces_body(screen: Screen) -> None:
    """Every namespace's table."""
    screen.table(
        tables.namespace_columns(),
        tables_of(screen.snapshot),
        screen.room,
        "NAMESPACES",
        pane="namespaces",
        empty="no namespace with conntrack was found",
    )


def victims_body(screen: Screen) -> None:
    """Every victim."""
    victims_table(screen, screen.width, screen.room, len(screen.snapshot.tables) > 1)


def page_body(screen: Screen, lines: Sequence[Text]) -> None:
    """A page of text, scrolled within its length."""
    room = screen.room
    scroll = max(0, min(screen.state.scroll, len(lines) - room))
    screen.state = replace(screen.state, scroll=scroll)
    screen.add(lines[scroll : scroll + room])


def compose(
    snapshot: Snapshot,
    width: int,
    height: int,
    palette: Palette,
    state: State,
    *,
    note: Sequence[parts.Piece] = (),
    page: Optional[Callable[[int], Sequence[Text]]] = None,
) -> Painted:
    """The screen below which only footer and time line may come.

    ``page`` makes the lines of a page mode for a width.
    """
    screen = Screen(snapshot, width, height, palette, state)
    screen.add([parts.header(snapshot, width, palette, note, "top")])
    if state.mode == "top":
        top_body(screen)
        return screen.painted()
    if state.mode != "help":
        screen.add(parts.table_lines(snapshot, width, palette))
        if height > 12:
            screen.add([parts.rate_line(snapshot, width, palette)])
        screen.add([parts.blank(width)])
    if state.mode == "namespaces":
        namespaces_body(screen)
    elif state.mode == "victims":
        victims_body(screen)
    elif page is not None:
        page_body(screen, page(width))
    return screen.painted()


def frame(
    snapshot: Snapshot,
    width: int,
    height: Optional[int] = None,
    *,
    palette: Palette = TERMINAL,
    ascii_only: bool = False,
) -> Group:
    """A plain frame as a rich renderable; without a height, as tall as its content needs."""
    if height is None:
        height = (
            16
            + bool(refused_line(snapshot, width, palette))
            + len(snapshot.culprits)
            + len(snapshot.victims)
            + bool(snapshot.hooks.note)
        )
    state = State(group=snapshot.group, sort=snapshot.sort, pane="")
    body = compose(snapshot, width, height, palette, state).lines
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
    edges = sorted({0, len(text.plain), *(at for s in text.spans for at in (s.start, s.end))})
    for start, end in zip(edges, edges[1:]):
        piece = text[start:end]
        begin = len(out)
        out.append(fmt.ascii_only(piece.plain))
        for span in piece.spans:
            out.stylize(span.style, begin, len(out))
    return out
