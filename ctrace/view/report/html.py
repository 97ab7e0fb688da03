"""A review as one page that opens offline: charts, tables, and nothing from elsewhere.

A recording may come from a stranger: every name and address is cleaned and escaped, and the
page's own policy forbids it to run, load or send anything. On paper it takes at most four pages.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

from ctrace.model.snapshot import Cause, Culprit, Snapshot
from ctrace.recording.format.evidence import FACT, parse
from ctrace.recording.review import Review, beyond
from ctrace.view import format as fmt
from ctrace.view.report.charts import figures, holders_over_time, lives, over_time
from ctrace.view.report.cost_html import perf_html
from ctrace.view.report.evidence import sentences
from ctrace.view.report.story import Moment, at, headline, period, story
from ctrace.view.report.svg import quoted
from ctrace.view.report.text import (
    entries,
    limit,
    made_by,
    moment_told,
    peak_fills,
    telling,
    used_tables,
)
from ctrace.view.report.whatif_html import whatif_html
from ctrace.view.unseen import blind, nobody, number, rate
from ctrace.whatif.answer import WhatIf

ROWS = 10
"""Rows of a table; as many again are folded."""
LIVES = 4
FILLS = 6
GROUPS = {
    "pair": "source and service",
    "service": "service",
    "src": "source",
    "dst": "destination",
    "process": "process",
    "container": "container",
    "netns": "namespace",
}


def report_html(review: Review, answer: Optional[WhatIf] = None) -> str:
    """The page, including a what-if's answer when there is one."""
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    start = datetime.fromtimestamp(review.start, timezone.utc)
    parts = {
        "@TITLE@": f"{quoted(review.recording.header.host or 'ctrace')} {start:%Y-%m-%d %H:%M} UTC",
        "@BODY@": _body(review, answer),
    }
    # One pass: what a part brings in is never looked at again.
    out, rest = [], page
    for mark, part in parts.items():
        before, rest = rest.split(mark, 1)
        out += [before, part]
    return "".join([*out, rest])


def _body(review: Review, answer: Optional[WhatIf]) -> str:
    told = story(review)
    texts = parse(review.recording.header.facts)
    return "\n".join(
        (
            _head(review),
            _why(review),
            _story(told),
            _said(texts) if texts is not None else "",
            whatif_html(answer, _table) if answer else "",
            _tiles(review, texts or {}),
            _section("Over time", "".join(over_time(review, told))),
            _section("Who held the table", holders_over_time(review, told)),
            _culprits(review.final)
            if review.final.hooks.changes
            else _moment(review.final, "What the table held"),
            *(
                _grouped(name, one)
                for name, one in review.groups.items()
                if name != review.final.group
            ),
            _worst(review),
            _victims(review.final),
            _section("How long", lives(review)),
            _tables(review),
            _causes(review),
            *(perf_html(host, perf, _table) for host, perf in review.measured.items()),
            _about(review),
        )
    )


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{title}</h2>{inner}</section>" if inner else ""


def _folded(title: str, inner: str) -> str:
    """Details for some readers only; they stay folded on paper."""
    return f"<section><details><summary>{title}</summary>{inner}</details></section>"


def _story(told: list[Moment]) -> str:
    rows = "".join(
        f"<tr><td><b class='letter'>{one.letter}</b></td><td class='n'>{one.time}</td>"
        f"<td class='w'>{quoted(one.text)}</td></tr>"
        for one in told
    )
    return _section("What happened, UTC", rows and f'<table class="story">{rows}</table>')


def _said(texts: dict[str, Any]) -> str:
    """What dumps and logs show besides entries."""
    rows = "".join(
        f"<dt>{head}</dt><dd>{quoted(fmt.prose(text))}</dd>" for head, text in sentences(texts)
    )
    return _section("Evidence: what the texts say", f"<dl>{rows}</dl>")


def _head(review: Review) -> str:
    header = review.recording.header
    when = period(review)
    if " to " in when:
        when += f", {fmt.span(review.end - review.start)}"
    return (
        f"<header><h1>{quoted(header.host or 'unknown host')}</h1>"
        f"<p>{when}; {quoted(made_by(header))}</p>"
        "</header>"
    )


def _why(review: Review) -> str:
    worst, state = telling(review), headline(review)
    lines = [f'<p><b class="{state.level}">{state.word}</b> {quoted(state.text)}</p>']
    for label, holders in (("Held by", worst.who), ("Refused", worst.who_refused)):
        if holders:
            parts = "; ".join(f"{fmt.share(o.share)} {quoted(fmt.prose(o.text))}" for o in holders)
            lines.append(f"<p>{label}: {parts}</p>")
    lines.append(f'<p class="note">{moment_told(review)}:</p>')
    for cause in worst.why[:3]:
        lines.append(f"<p>{quoted(fmt.prose(cause.text))}</p>")
        if cause.remedy:
            lines.append(f'<p class="remedy">{quoted(fmt.prose(cause.remedy))}</p>')
    return f'<section class="why"><h2>In short</h2>{"".join(lines)}</section>'


def _tiles(review: Review, texts: dict[str, Any]) -> str:
    inner = "".join(
        f'<div class="tile"><b class="{kind}">{value}</b><span>{label}</span></div>'
        for value, label, kind in figures(review, texts)
    )
    return f'<div class="tiles">{inner}</div>'


def _table(
    title: str,
    columns: Iterable[str],
    rows: Iterable[Iterable[str]],
    note: str = "",
    folded: bool = False,
) -> str:
    """A section with a table; columns that begin with ``>`` hold numbers, and are left out where
    all of them are unknown. Cells are HTML."""
    cells = [list(row) for row in rows]
    every = list(columns)
    known = [
        index
        for index, name in enumerate(every)
        if name[:1] != ">" or any(row[index] != fmt.UNKNOWN for row in cells)
    ]
    names = [every[index] for index in known]
    head = "".join(
        f'<th class="n">{name[1:]}</th>' if name.startswith(">") else f"<th>{name}</th>"
        for name in names
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{"n" if name.startswith(">") else "k"}">{cell}</td>'
            for name, cell in zip(names, (row[index] for index in known))
        )
        + "</tr>"
        for row in cells
    )
    if not body:
        return ""
    after = f'<p class="note">{note}</p>' if note else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    inner = f'<div class="wide" tabindex="0">{table}</div>{after}'
    return _folded(title, inner) if folded else _section(title, inner)


def _culprits(snapshot: Snapshot) -> str:
    whole = snapshot.table_seconds_total or 1.0

    def row(c: Culprit) -> list[str]:
        part = c.table_seconds / whole
        return [
            _key(c, snapshot),
            f'<span class="bar" style="width:{max(1, round(90 * part))}px"></span>'
            f"{fmt.share(part)}",
            number(snapshot.hooks, "inserts", c.inserts),
            fmt.duration(c.life.p50),
            fmt.stays(c.residence),
            fmt.duration(c.residence.p99),
            _number(c.drops, "bad") if snapshot.hooks.refusals else fmt.UNKNOWN,
            number(snapshot.hooks, "evicted", c.ends.evicted),
            quoted(c.nat),
            _owner(c),
        ]

    rest, left = beyond(snapshot, ROWS)
    return _table(
        "What filled the table, by table-seconds",
        (quoted(snapshot.group), ">share", ">inserts", ">life, median", ">in table, median",
         ">99 % within", ">refused", ">evicted", "NAT", "process"),
        map(row, snapshot.culprits[:ROWS]),
        f"and {fmt.count(rest)} more, {fmt.share(left)}" if rest else "",
    )  # fmt: skip


def _grouped(name: str, snapshot: Snapshot) -> str:
    """The same by another grouping, folded; empty where it adds nothing."""
    if len(snapshot.culprits) < 2 or not snapshot.hooks.changes:
        return ""
    whole = snapshot.table_seconds_total or 1.0
    return _table(
        f"The same by {GROUPS.get(name, name)}",
        (GROUPS.get(name, name), ">share", ">inserts", ">in table, median", ">refused"),
        (
            [
                _key(c, snapshot),
                fmt.share(c.table_seconds / whole),
                fmt.count(c.inserts),
                fmt.stays(c.residence),
                _number(c.drops, "bad"),
            ]
            for c in snapshot.culprits[:ROWS]
            if c.table_seconds > 0 or c.drops
        ),
        folded=True,
    )


def _worst(review: Review) -> str:
    moment = review.before_drop or review.peak
    if moment is None or not moment.culprits or not moment.hooks.changes:
        return ""
    what = "Just before the first refusal" if review.before_drop else "When it was fullest"
    return _moment(moment, f"{what}, at {at(review, moment.ts / 1e9)}", folded=True)


def _moment(moment: Snapshot, title: str, folded: bool = False) -> str:
    return _table(
        title,
        (quoted(moment.group), ">held", ">share", ">new/s", ">refused/s"),
        (
            [
                _key(c, moment),
                fmt.held(c),
                fmt.share(c.share),
                rate(moment.hooks, "new_per_s", c.new_per_s),
                rate(moment.hooks, "drop_per_s", c.drop_per_s),
            ]
            for c in moment.culprits[:ROWS]
        ),
        folded=folded,
    )


def _victims(snapshot: Snapshot) -> str:
    if not snapshot.hooks.drop_tuples and not snapshot.victims:
        said = nobody(snapshot.hooks, snapshot.totals.drop)
        return f"<section><h2>Who was refused or evicted</h2><p>{quoted(said)}</p></section>"
    return _table(
        "Who was refused or evicted",
        ("flow", ">refused", ">of its tries", ">evicted", ">failed", "process that got EPERM"),
        (
            [quoted(fmt.key(v.key, 120)), _number(v.drops, "bad"), fmt.share(v.share_of_new),
             fmt.count(v.evicted), fmt.count(v.failed),
             f"{quoted(v.owner.comm)}[{v.owner.pid}]" if v.owner else ""]
            for v in snapshot.victims[:ROWS]
        ),
    )  # fmt: skip


def _tables(review: Review) -> str:
    hooks, peaks = review.final.hooks, peak_fills(review)
    shown, idle = used_tables(review)
    left_out = f"; {fmt.plural(idle, 'namespace')} that held nothing left out" if idle else ""
    return _table(
        "Tables" + left_out,
        ("namespace", ">at end", ">max", ">buckets", ">fullest", ">inserted", ">destroyed",
         ">refused", ">evicted", ">failed", ">differs from kernel by"),
        (
            [quoted(t.name), entries(hooks, t), limit(t),
             fmt.count(t.buckets) if t.buckets else fmt.UNKNOWN, fmt.share(peaks.get(str(t.netns))),
             number(hooks, "insert", t.totals.insert),
             number(hooks, "destroy", t.totals.destroy),
             _number(t.totals.drop, "bad") if hooks.refusals else fmt.UNKNOWN,
             number(hooks, "early_drop", t.totals.early_drop),
             number(hooks, "insert_failed", t.totals.insert_failed),
             number(hooks, "off_by", t.off_by.count)]
            for t in shown[:ROWS]
        ),
        f"and {len(shown) - ROWS} more, less full" if len(shown) > ROWS else "",
    )  # fmt: skip


def _causes(review: Review) -> str:
    seen: dict[str, tuple[str, Cause]] = {}
    for name, snapshot in (
        ("before the first refusal", review.before_drop),
        ("when fullest", review.peak),
        ("at the end", review.final),
    ):
        for cause in snapshot.why if snapshot else ():
            seen.setdefault(f"{cause.id} {cause.proto} {cause.port} {cause.netns}", (name, cause))
    return _table(
        "Causes and their evidence",
        ("cause", "evidence", ">explains", "what usually helps", "seen"),
        (
            [quoted(fmt.prose(cause.text)),
             "<br>".join(quoted(fmt.prose(fact)) for fact in cause.evidence),
             fmt.share(cause.share), quoted(fmt.prose(cause.remedy)), name]
            for name, cause in list(seen.values())[:ROWS]
        ),
        folded=True,
    )  # fmt: skip


def _about(review: Review) -> str:
    recording, header = review.recording, review.recording.header
    lines = [
        ("recording", quoted(recording.path)),
        ("written by", f"ctrace {quoted(header.version)}"),
        ("hooks", quoted(header.hooks.family)),
        ("filter", quoted(header.filter) or "none"),
        ("events", f"{fmt.count(review.events)}, {fmt.count(review.final.lost)} lost"),
        ("complete", quoted(fmt.prose(str(recording.missing))) if recording.missing else "yes"),
        (
            "ended",
            quoted(recording.ended or "cleanly") if recording.ended is not None else "not cleanly",
        ),
    ]
    if header.hooks.note and not header.hooks.drop_tuples:
        lines.append(("no better hooks", quoted(header.hooks.note)))
    missed = blind(header.hooks, review.final.unseen)
    lines += [("not seen", quoted(sentence)) for sentence in missed]
    lines += [("note", quoted(fmt.prose(note))) for note in recording.notes()]
    settings = len(set(header.facts) - {FACT})
    facts = "".join(
        f"<dt>{quoted(name)}</dt><dd>{quoted(value)}</dd>"
        for name, value in header.facts.items()
        if name != FACT  # what was made of texts stands above, in sentences
    )
    told = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in lines)
    host = _folded(f"This host: {fmt.plural(settings, 'setting')}", f"<dl>{facts}</dl>")
    return _section("This recording", f"<dl>{told}</dl>") + (host if settings else "")


def _key(culprit: Culprit, snapshot: Snapshot) -> str:
    several = len(snapshot.tables) > 1 and snapshot.group != "netns" and culprit.netns_name
    key = fmt.prose(culprit.words or culprit.key)
    return quoted(key + (f" in {culprit.netns_name}" if several else ""))


def _owner(culprit: Culprit) -> str:
    owner = culprit.owner
    if owner is None:
        return quoted(culprit.pod)
    unit = f" {quoted(owner.unit)}" if owner.unit else ""
    return f"{quoted(owner.comm)}[{owner.pid}]{unit}"


def _number(value: int, kind: str) -> str:
    return f'<span class="{kind}">{fmt.count(value)}</span>' if value else fmt.count(value)
