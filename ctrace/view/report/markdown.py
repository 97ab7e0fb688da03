"""A review in some 25 lines of Markdown, to paste into a postmortem."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ctrace.recording.format.evidence import parse
from ctrace.recording.review import Review
from ctrace.view import format as fmt
from ctrace.view.report.evidence import sentences
from ctrace.view.report.story import headline, period, story
from ctrace.view.report.text import telling, used_tables

ROWS = 5
LINES = 25
"""At most so many lines: more is not read."""
TOLD = ("Kernel", "Table", "Read", "Events", "Modules", "May help", "Not read")
"""Of what texts say, that which the lines about causes and holders do not repeat."""


def report_markdown(review: Review) -> str:
    """The verdict, what happened when, why, what helps, who held it and who was refused."""
    lines = list(_lines(review))
    return "\n".join(lines[:LINES]) + "\n"


def _lines(review: Review) -> Iterator[str]:
    header, said = review.recording.header, headline(review)
    yield f"## Connection tracking on {_text(header.host or 'unknown host')}, {period(review)}"
    yield ""
    yield f"**{said.word}** {_text(said.text)}"
    yield ""
    for one in story(review):
        yield f"- `{one.time}` {_text(one.text)}"
    texts = parse(header.facts)
    if texts is not None:
        for head, text in sentences(texts):
            if head in TOLD:
                yield f"- {head}: {_text(text)}"
    yield ""
    worst = telling(review)
    for cause in worst.why[:2]:
        yield f"- **Why:** {_text(fmt.prose(cause.text))}"
        if cause.remedy:
            yield f"  - What helps: {_text(fmt.prose(cause.remedy))}"
    for label, holders in (("Held", worst.who), ("Refused", worst.who_refused)):
        if holders:
            parts = "; ".join(f"{fmt.share(o.share)} {_text(fmt.prose(o.text))}" for o in holders)
            yield f"- **{label}:** {parts}"
    rows = [v for v in review.final.victims if v.drops][:3]
    if rows:
        yield ""
        yield "| refused flow | packets | of its tries | process |"
        yield "|---|---:|---:|---|"
        for v in rows:
            owner = f"{v.owner.comm}[{v.owner.pid}]" if v.owner else ""
            key = _text(fmt.key(v.key, 120))
            yield (
                f"| {key} | {fmt.count(v.drops)} | {fmt.share(v.share_of_new)} | {_text(owner)} |"
            )
    elif texts is None and used_tables(review)[0]:
        yield ""
        tables = used_tables(review)[0][:3]
        yield "Tables at the end: " + ", ".join(
            f"{_text(t.name)} {fmt.count(t.count)}" + (f" of {fmt.count(t.max)}" if t.max else "")
            for t in tables
        )


def _text(text: str) -> str:
    """Harmless in Markdown, too: a name is a name, never a link, a table's edge or HTML."""
    plain = fmt.clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", plain)
