"""A review in some 25 lines of Markdown, to paste into a postmortem."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.cells import cell_len

from ctrace.recording.format.evidence import parse
from ctrace.recording.review import Review
from ctrace.view import format as fmt
from ctrace.view.report.evidence import sentences
from ctrace.view.report.story import headline, period, story
from ctrace.view.report.text import telling, used_tables

LINES = 25
"""At most so many lines: more is not read."""
TOLD = ("Modules", "May help", "Events", "Not read", "Kernel", "Table", "Read")
"""Of what texts say, that which the lines about causes and holders do not repeat. The last two
the events repeat in part."""
WIDTH = 100
"""Columns of a line, as in a mail or a commit message."""
_MARK = re.compile(r"[-+=]+")
"""At the begin of a line these make a list or a heading."""
SHRINK = ((7, 2, 3), (5, 2, 3), (5, 2, 2), (5, 1, 3), (5, 1, 2), (5, 1, 1), (5, 1, 0))
"""How many of :data:`TOLD`, causes and refused flows are told, the most first: as many as leave
room for all."""


def report_markdown(review: Review) -> str:
    """The verdict, what happened when, why, what helps, who held it and who was refused."""
    lines: list[str] = []
    for told, causes, rows in SHRINK:
        lines = [*_happened(review, TOLD[:told]), *_why(review, causes), *_refused(review, rows)]
        if len(lines) <= LINES:
            break
    return "\n".join(lines[:LINES]) + "\n"


def _happened(review: Review, told: Sequence[str]) -> Iterator[str]:
    header, said, time = review.recording.header, headline(review), period(review)
    host = fmt.cut(fmt.clean(header.host or "unknown host"), 66 - len(time))
    yield from _wrapped("## ", f"Connection tracking on {host}, {time}")[:1]
    yield ""
    yield from _wrapped(f"**{said.word}** ", said.text, "")
    yield ""
    for one in story(review):
        yield from _wrapped(f"- `{one.time}` ", one.text)
    texts = parse(header.facts)
    if texts is not None:
        for head, text in sentences(texts):
            if head in told:
                yield from _wrapped(f"- {head}: ", text)
    yield ""


def _why(review: Review, causes: int) -> Iterator[str]:
    worst = telling(review)
    for cause in worst.why[:causes]:
        yield from _wrapped("- **Why:** ", fmt.prose(cause.text))
        if cause.remedy:
            yield from _wrapped("  - What helps: ", fmt.prose(cause.remedy), "    ")
    for label, holders in (("Held", worst.who), ("Refused", worst.who_refused)):
        if holders:
            parts = "; ".join(f"{fmt.share(o.share)} {fmt.prose(o.text)}" for o in holders)
            yield from _wrapped(f"- **{label}:** ", parts)


def _refused(review: Review, rows: int) -> Iterator[str]:
    victims = [v for v in review.final.victims if v.drops]
    if victims and rows:
        yield ""
        yield "| refused flow | packets | of its tries | process |"
        yield "|---|---:|---:|---|"
        for v in victims[:rows]:
            owner = _fitting(f"{fmt.clean(v.owner.comm)}[{v.owner.pid}]", 30) if v.owner else ""
            rest = f" | {fmt.count(v.drops)} | {fmt.share(v.share_of_new)} | {owner} |"
            key = _fitting(fmt.key(v.key, WIDTH), WIDTH - 2 - cell_len(rest))
            yield f"| {key}{rest}"
    elif not victims and parse(review.recording.header.facts) is None and used_tables(review)[0]:
        yield ""
        tables = used_tables(review)[0][:3]
        said = ", ".join(
            f"{t.name} {fmt.count(t.count)}" + (f" of {fmt.count(t.max)}" if t.max else "")
            for t in tables
        )
        yield from _wrapped("", f"Tables at the end: {said}", "")


def _wrapped(first: str, text: str, rest: str = "  ") -> list[str]:
    """``text`` behind ``first``, in lines of at most :data:`WIDTH` columns that belong together:
    those after the first begin with ``rest``. No line breaks within an escaped letter."""
    lines, line, empty = [], first, True
    for word in fmt.arrowed(text).split():
        harmless = _text(word)
        if not empty and cell_len(line) + 1 + cell_len(harmless) > WIDTH:
            lines.append(line)
            line, empty = rest + ("\\" if _MARK.fullmatch(word) else ""), True
        if not empty:
            line += " "
        for letter in map(_text, word):
            if cell_len(line) + cell_len(letter) > WIDTH:
                lines.append(line)
                line = rest
            line += letter
        empty = False
    return [*lines, line]


def _fitting(text: str, room: int) -> str:
    """Harmless and in so many columns: its middle goes."""
    for width in range(room, 0, -1):
        harmless = _text(fmt.key(text, width))
        if cell_len(harmless) <= room:
            return harmless
    return ""


def _text(text: str) -> str:
    """Harmless in Markdown, too: a name is a name, never a link, a table's edge or HTML."""
    plain = fmt.clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", plain)
