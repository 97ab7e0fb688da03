"""One whole screen from one snapshot and the person's choices: lines of exact size.

The live screen and the plain frame are this same function. The order of lines is the
order of importance, so a small screen is a large one's most important part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Optional

from rich.console import Group
from rich.text import Text

from ctrace.model.snapshot import Culprit, Snapshot, Table
from ctrace.view import format as fmt
from ctrace.view.palette import TERMINAL, Palette
from ctrace.view.screen import curves, parts, tables
from ctrace.view.screen.canvas import Painted, Screen
from ctrace.view.screen.state import State
from ctrace.view.unseen import blind, nobody
from ctrace.view.verdict import in_trouble

TINY: Final = 8
"""Lines. With fewer, a page has them to itself."""


@dataclass(frozen=True)
class Layout:
    """How many lines each part gets at a given size."""

    why: int
    chart: int
    blind: int
    victims: int
    namespaces: int
    beside: bool
    """Whether the top lists are shown beside the victims."""


def layout(snapshot: Snapshot, width: int, height: int) -> Layout:
    """Share out ``height`` lines, at 80x24 as at 200x60."""
    tall = height - 24
    others = len(snapshot.tables) > 1
    return Layout(
        why=3 if tall < -4 else (4 if tall < 6 else 5) + 2 * (width < 80),
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


def culprits_of(snapshot: Snapshot, state: State) -> tuple[Culprit, ...]:
    """The culprits in the order that the person asked for."""
    turned = snapshot.sort.startswith("-")
    there = snapshot.culprits
    if snapshot.sort.removeprefix("-") in ("held", "new"):  # the other sorts show what is gone
        there = tuple(one for one in there if one.held or one.new_per_s or one.drop_per_s) or there
    return there if turned == state.reverse else there[::-1]


def tables_of(snapshot: Snapshot) -> list[Table]:
    """The namespaces, those in trouble first, then the fullest."""
    return sorted(snapshot.tables, key=lambda t: (t.full_since is None, -t.fill, -t.count))


def victim_note(snapshot: Snapshot) -> str:
    """Text in place of victims when there are none to show."""
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
    """Who was refused or evicted: first the keys that explain most of them, then single flows."""
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
    """The few keys that explain most refusals. The rows above are ranked by entries held, so
    they may not show these."""
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
    """The screen except for footer and time line, which go below it.

    ``page`` makes the lines of a page mode for a width.
    """
    screen = Screen(snapshot, width, height, palette, state)
    screen.add([parts.header(snapshot, width, palette, note, "top")])
    if state.mode == "top":
        top_body(screen)
        return screen.painted()
    if state.mode != "help" and height >= TINY:
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
