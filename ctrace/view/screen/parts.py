"""The parts of the screen above and beside its tables, as lines of text.

Each function takes a snapshot and a width and returns finished lines. The live screen
and the plain frame are both stacked from them, so they can never disagree.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Final, Optional

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from ctrace.batch import DUMP
from ctrace.live.protocol import Phase
from ctrace.model.snapshot import Snapshot, Table
from ctrace.view import format as fmt
from ctrace.view.palette import Palette
from ctrace.view.screen.tables import no_limit
from ctrace.view.unseen import blind, trusted
from ctrace.view.verdict import at_limit, counted, fullest, verdict

Piece = tuple[str, Style]
LABEL: Final = 8
"""Cells of the label column at the left: TABLE, RATES, WHY, HELPS."""
RATE: Final = 7
"""Cells of the longest rate, ``9 812/s``."""
CURVE: Final = 3
"""Cells of the shortest curve that is worth its place."""
SKEW: Final = 0.2
"""Seconds that two readings may be apart."""
RACES: Final = 64
"""Unconfirmed entries that the kernel counts and we don't yet: normal under load."""
_UNIT: Final = re.compile(r"(?<=\d) (?=(?:%|µs|ms|s|min|h|d)\b|%)")
"""The space between a number and its unit."""


def blank(width: int) -> Text:
    """An empty line."""
    return Text(" " * width, no_wrap=True, end="")


def line(pieces: Sequence[Piece], width: int, right: Sequence[Piece] = ()) -> Text:
    """Pieces from the left, others up against the right edge; the left is cut first."""
    tail = Text.assemble(*right, no_wrap=True, end="")
    text = Text.assemble(" ", *pieces, no_wrap=True, end="")
    text.truncate(max(0, width - tail.cell_len - (1 if right else 0)), pad=True)
    if right:
        text.append_text(tail)
        text.truncate(width, pad=True)
    return text


def joined(groups: Sequence[Sequence[Piece]], width: int, gap: str = "   ") -> list[Piece]:
    """As many groups, in their order, as fit into the width: never half a group."""
    out: list[Piece] = []
    used = 1
    for group in groups:
        need = sum(cell_len(text) for text, _ in group) + (len(gap) if out else 0)
        if used + need > width:
            continue
        if out:
            out.append((gap, Style()))
        out.extend(group)
        used += need
    return out


def header(
    snapshot: Snapshot, width: int, palette: Palette, note: Sequence[Piece] = (), mode: str = ""
) -> Text:
    """Host and time at the left; how far the numbers can be trusted, and our cost, right."""
    p = palette
    cost = snapshot.cost
    own = f"self {fmt.share(cost.cpu + cost.kernel)} {fmt.size(cost.rss)}" if cost.rss else ""
    trust: list[list[Piece]] = [
        list(_trust(snapshot, width, p)),
        [(snapshot.hooks.family, p.text if snapshot.hooks.drop_tuples else p.warn)],
        [(f"lost {fmt.count(snapshot.lost)}", p.warn if snapshot.lost else p.dim)],
        [(own, p.dim)] if own and not (snapshot.filter and width < 100) else [],
    ]
    right = joined([one for one in trust if one], width * 3 // 4, "  ")
    room = width - sum(cell_len(text) for text, _ in right) - 4
    title, host, clock = (
        [("ctrace", p.accent), (f" {mode}" if mode else "", p.accent)],
        [(fmt.cut(fmt.clean(snapshot.host), 24), p.text)],
        [(f"{fmt.clock(snapshot.ts / 1e9)}{'Z' if width < 100 else ' UTC'}", p.text)],
    )
    details = [
        [(f"for {fmt.span(snapshot.uptime_s)}", p.dim)],
        [(f"each {fmt.duration(round(snapshot.interval_s, 1))}", p.dim)],
    ]
    left: list[list[Piece]] = [title, host, clock, list(note), *details]
    if snapshot.filter:  # what the person did goes before the host and the details
        taken = sum(cell_len(text) + 2 for text, _ in (title[0], *note)) + len(mode) + 2
        words = fmt.cut(f"filter {fmt.clean(snapshot.filter)}", max(16, room - taken))
        left = [title, list(note), [(words, p.warn)], clock, host, *details]
    return line(joined([one for one in left if one], room, "  "), width, [*right, (" ", p.text)])


def _trust(snapshot: Snapshot, width: int, palette: Palette) -> list[Piece]:
    off = sum(abs(table.off_by.count) for table in snapshot.tables)
    entries = sum(table.count for table in snapshot.tables)
    missed = sum(
        abs(t.off_by.drop) + abs(t.off_by.early_drop) + abs(t.off_by.insert_failed)
        for t in snapshot.tables
    )
    # Events and the kernel's own counters are not read at the same instant.
    rates = snapshot.rates
    moving = SKEW * (rates.drop + rates.early_drop + rates.insert_failed)
    if off > max(RACES, entries // 200) or missed > moving:
        words = "differs by" if width < 100 else "differs from kernel by"
        return [(f"{words} {fmt.count(max(off, missed))}", palette.warn)]
    if snapshot.memory.pruned:
        bounded = "keys bounded" if width < 100 else "totals exact, keys bounded"
        return [(bounded, palette.warn)]
    exact = "lower bounds" if snapshot.hooks.family == DUMP else "totals exact"
    if any(table.stale for table in snapshot.tables):
        words = "keys stale" if width < 100 else f"{exact}, keys stale"
        return [(words, palette.warn)]
    if snapshot.unseen or snapshot.lost:
        return [("inserts unseen" if snapshot.unseen else exact, palette.warn)]
    sampled = "keys by a sample" if snapshot.held_total_error is not None else None
    if read := trusted(snapshot.hooks) or sampled:
        return [(read, palette.text)]
    return [("exact", palette.good)]


def table_lines(snapshot: Snapshot, width: int, palette: Palette) -> list[Text]:
    """The verdict on the table in trouble (or the fullest), and its gauge."""
    p = palette
    table = fullest(snapshot)
    if table is None:
        said = verdict(snapshot)
        return [
            line([(fmt.fit(said.word, LABEL), p.dim), (said.text, p.warn)], width),
            blank(width),
        ]
    held = fmt.count(table.count) if counted(snapshot.hooks, table) else fmt.UNKNOWN
    unit = "entry" if held == "1" else "entries"
    numbers: list[Piece] = [
        (f" {held}", p.strong),
        (f" of {fmt.count(table.max)}" if table.max else f" {unit}, {no_limit(table)}", p.text),
        (f"  {fmt.share(table.fill):>5} " if table.max else " ", _fill_style(table, p)),
    ]
    label = fmt.fit("TABLE" if len(snapshot.tables) < 2 else fmt.clean(table.name), LABEL - 1)
    room = width - LABEL - 2 - sum(cell_len(text) for text, _ in numbers)
    gauge = _gauge(table, max(3, room), p)
    return [
        line(_state(snapshot, table, width, p), width),
        line([(label + " ", p.accent), *gauge], width, numbers),
    ]


def _fill_style(table: Table, palette: Palette) -> Style:
    return palette.fill(table.fill, at_limit(table)) + Style(bold=True)


def _gauge(table: Table, width: int, palette: Palette) -> list[Piece]:
    if not table.max_known:
        return [(" " * width, palette.faint)]
    fill = min(1.0, table.fill)
    pinned = fill if table.pinned is None else fill * table.pinned
    solid, soft = fmt.bar((pinned, fill - pinned), width)
    return [
        ("█" * solid, palette.gauge(table.fill, at_limit(table))),
        ("▒" * soft, palette.evictable),
        ("░" * (width - solid - soft), palette.faint),
    ]


def _state(snapshot: Snapshot, table: Table, width: int, palette: Palette) -> list[Piece]:
    """The verdict, then what else fits on its line."""
    p = palette
    said = verdict(snapshot, table)
    style = {"good": p.good, "plain": p.text, "warn": p.warn, "bad": p.bad}[said.level]
    word = p.alarm if said.level == "bad" and at_limit(table) else style + Style(bold=True)
    pad = " " * (LABEL - len(said.word))
    words = clauses(said.text, width - LABEL - 2)
    first = [(said.word, word), (pad, p.text), (words, style)]
    groups: list[list[Piece]] = [first]
    others = len(snapshot.tables) - 1
    name = fmt.clean(table.name)
    more = f"+{fmt.plural(others, 'namespace')}"
    refusing = sum(at_limit(t) for t in snapshot.tables if t is not table)
    if refusing:
        groups.append([(f"{fmt.plural(refusing, 'other')} full", p.bad)])
    if others and cell_len(name) >= LABEL:
        groups.append([(f"in {fmt.cut(name, 26)}", p.text), (f" {more}", p.dim)])
    if table.pinned is not None:
        long = [
            ("█ ", _fill_style(table, p)),
            (f"{_pinned(table)}   ", p.text),
            ("▒ ", p.evictable),
            ("evictable", p.text),
        ]
        brief = [("█ ", _fill_style(table, p)), (f"pinned {fmt.share(table.pinned)}", p.text)]
        groups.append(long if joined([*groups, long], width)[-1:] == long[-1:] else brief)
    if others and cell_len(name) < LABEL:
        groups.append([(more, p.dim)])
    if table.buckets:
        groups.append([(f"{fmt.count(table.buckets)} buckets, chains {table.load:.1f}", p.dim)])
    return joined(groups, width, "   ")


def _pinned(table: Table) -> str:
    """``pinned 92 % ± 2 %``; ``pinned about 92 %`` where the error is unknown."""
    if table.pinned_error is None:
        return f"pinned about {fmt.share(table.pinned)}"
    return f"pinned {fmt.share(table.pinned)} ± {max(1, round(100 * table.pinned_error))} %"


def rate_line(snapshot: Snapshot, width: int, palette: Palette) -> Text:
    """New, gone, EVICTED and DROPPED per second, each with its last minutes."""
    p = palette
    rates, past = snapshot.rates, snapshot.history
    rows = (
        ("new ", rates.insert, past.insert, p.text, p.area),
        ("gone ", rates.destroy, past.destroy, p.text, p.area),
        ("EVICTED ", rates.early_drop, past.early_drop, p.warn, p.warn),
        ("DROPPED ", rates.drop, past.drop, p.bad, p.bad),
    )
    names = sum(len(name) for name, *_ in rows)
    # Narrow screens give up two of the curves, then all, then the fixed places: never a number.
    room = width - LABEL - 2 - names - 3 * 2
    field = RATE if room >= 4 * RATE else 0
    spark = (room - 4 * RATE) // 4 - 1
    curved = [name for name, *_ in rows]
    if spark < CURVE:
        curved, spark = ["new ", "DROPPED "], (room - 4 * RATE) // 2 - 1
    spark = min(24, spark) if spark >= CURVE else 0
    groups: list[list[Piece]] = []
    for name, value, series, style, spark_style in rows:
        quiet = not value and not any(series[-spark or len(series) :])
        bars = " " + fmt.sparkline(series, spark) if spark and name in curved else ""
        groups.append(
            [
                (name, p.dim if quiet else style),
                (fmt.per_second(value), p.dim if quiet else style + Style(bold=True)),
                (" " * (field - len(fmt.per_second(value))), style),
                (bars, p.faint if quiet else spark_style),
            ]
        )
    if not snapshot.hooks.changes:
        groups[:2] = [[("what came and went is not in the dump", p.dim)]]
    if not snapshot.hooks.refusals:
        nor = "who was refused is unknown" if snapshot.hooks.changes else "nor who was refused"
        groups[-2:] = [[(nor, p.dim)]]
    elif not snapshot.hooks.evictions:
        groups[2] = [("evictions unseen", p.dim)]
    # A narrow screen keeps the refused, then the new ones, in the usual order.
    kept: list[int] = []
    for index in (len(groups) - 1, *range(len(groups) - 1)):
        cells = sum(cell_len(t) for at in (*kept, index) for t, _ in groups[at]) + 2 * len(kept)
        if cells < width - LABEL:
            kept.append(index)
    shown = [groups[index] for index in sorted(kept)]
    return line([(fmt.fit("RATES", LABEL), p.accent), *joined(shown, width - LABEL, "  ")], width)


def why_lines(snapshot: Snapshot, width: int, palette: Palette, most: int = 3) -> list[Text]:
    """The cause in one sentence, what usually helps, and further causes if there is room."""
    p = palette
    if not snapshot.why:
        return [line([(fmt.fit("WHY", LABEL), p.accent), ("observing", p.dim)], width)]
    out: list[Text] = []
    first = snapshot.why[0]
    calm = first.id == "unknown"
    # its end says what it is: two lines have it, also where few are left for the rest
    body = sentence(first.text, width - LABEL - 2, 2 if width >= 80 else max(2, most - 2))
    for index, words in enumerate(body):
        label = fmt.fit("WHY" if index == 0 else "", LABEL)
        out.append(line([(label, p.accent), (words, p.text if calm else p.strong)], width))
    if first.remedy and len(out) < most:
        room = width - LABEL - 2
        helps = sentence(
            first.remedy + ("; press a" if width >= 100 else ""), room, most - len(out)
        )
        for index, words in enumerate(helps):
            label = fmt.fit("" if index else "HELPS", LABEL)
            out.append(line([(label, p.accent), (words, p.text)], width))
    for cause in snapshot.why[1:]:
        if len(out) >= most:
            break
        words = sentence(cause.text, width - LABEL - 2, 1)[0]
        out.append(line([(fmt.fit("ALSO", LABEL), p.dim), (words, p.text)], width))
    return out


def sentence(text: str, width: int, most: int) -> list[str]:
    """A sentence in at most ``most`` lines; it loses its end, where a name loses its middle.

    A number stays with its unit.
    """
    text = _UNIT.sub("\u00a0", fmt.prose(text))
    lines = textwrap.wrap(
        text,
        max(8, width),
        break_on_hyphens=False,
        max_lines=max(1, most),
        placeholder=f" {fmt.ELLIPSIS}",
    ) or [""]
    return [fmt.cut(one.replace("\u00a0", " "), width) for one in lines]


def wrapped(text: str, width: int, most: int) -> list[str]:
    """Words in at most ``most`` lines; the rest is cut off."""
    lines = textwrap.wrap(text, max(8, width), break_on_hyphens=False) or [""]
    if len(lines) > most:
        lines[most - 1] = fmt.cut(" ".join(lines[most - 1 :]), width)
    return [fmt.cut(one, width) for one in lines[:most]]


def clauses(text: str, width: int) -> str:
    """As many of a sentence's clauses, from its beginning, as fit: never half a number."""
    whole = text
    while cell_len(text) > width and ", " in text:
        text = text.rpartition(", ")[0]
    return fmt.cut(text if cell_len(text) <= width else whole, width)


def folded(text: str, width: int) -> list[str]:
    """A line of rules or of a list, whole: what is too long goes on below, further in."""
    text = fmt.clean(text.rstrip())
    inner = text.lstrip(" ")
    margin = text[: len(text) - len(inner)]
    return textwrap.wrap(
        inner,
        max(16, width),
        initial_indent=margin,
        subsequent_indent=margin + "    ",
        break_on_hyphens=False,
    ) or [""]


def blind_lines(snapshot: Snapshot, width: int, palette: Palette, most: int) -> list[Text]:
    """Why no better hook family is in use, and what this one cannot show here."""
    hooks = snapshot.hooks
    rows = [("UNSEEN", text, palette.dim) for text in blind(hooks, snapshot.unseen)]
    if hooks.note:  # it can be mended: what is lacking comes first
        rows.insert(0, ("HOOKS", f"only {hooks.family}, for {hooks.note}", palette.warn))
    return [
        line(
            [
                (fmt.fit(label, LABEL), palette.dim),
                (sentence(text, width - LABEL - 2, 1)[0], style),
            ],
            width,
        )
        for label, text, style in rows[:most]
    ]


def top_lines(
    snapshot: Snapshot, group: str, title: str, width: int, rows: int, palette: Palette
) -> list[Text]:
    """The first keys of another grouping, by new entries per second."""
    p = palette
    keys = snapshot.top.get(group, ())[: rows - 1]
    first = Text.assemble((fmt.fit(title, max(1, width - 7)), p.accent), (" NEW/s ", ""), end="")
    first.style = p.band
    first.no_wrap = True
    first.truncate(width, pad=True)
    out = [first]
    for key, value in keys:
        number = fmt.rate(value)
        name = fmt.key(key, width - 9)
        out.append(
            Text.assemble(
                (fmt.fit(name, width - 8), p.text), (f"{number:>7} ", p.text), no_wrap=True, end=""
            )
        )
    return out


def waiting(phase: Phase, width: int, height: int, palette: Palette) -> list[Text]:
    """The screen before the first snapshot."""
    p = palette
    words = {"failed": "cannot start", "ended": "ended", "reading": "starting"}
    word = words.get(phase.name, "attaching")
    text = fmt.prose(phase.text) or "preparing the hooks"
    body = wrapped(text, min(72, width - 4), 6)
    lines = [
        line([("ctrace", p.accent), ("  ", p.text), (word, p.warn)], width),
        blank(width),
        *(line([(part, p.text)], width) for part in body),
    ]
    return lines[:height]


def pad(lines: list[Text], width: int, height: Optional[int]) -> list[Text]:
    """Exactly ``height`` lines."""
    if height is None:
        return lines
    return lines[:height] + [blank(width)] * (height - len(lines))
