"""A review as one page that opens offline: charts, tables, and nothing from elsewhere.

A recording may come from a stranger: every name and address is cleaned and escaped, also
in the charts' labels, and the page's own policy forbids it to load or send anything.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Optional

from ctrace.errors import CtraceError
from ctrace.model.snapshot import Cause, Culprit, Snapshot
from ctrace.recording.evidence import FACT, parse
from ctrace.recording.review import Review, beyond
from ctrace.view import format as fmt
from ctrace.view.report.cost_html import perf_html
from ctrace.view.report.evidence import sentences
from ctrace.view.report.html_data import chart_data, escaped, script_json
from ctrace.view.report.text import limit, made_by, telling
from ctrace.view.report.whatif_html import whatif_html
from ctrace.view.unseen import nobody, number, rate
from ctrace.whatif.answer import WhatIf

ROWS = 25


def report_html(review: Review, answer: Optional[WhatIf] = None) -> str:
    """The page, with a what-if's answer in it when there is one.

    Raises CtraceError when the chart library is not installed.
    """
    chart_library = _plotly()
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    start = datetime.fromtimestamp(review.start, timezone.utc)
    parts = {
        "@TITLE@": f"{escaped(review.recording.header.host or 'ctrace')} "
        f"{start:%Y-%m-%d %H:%M} UTC",
        "@BODY@": _body(review, answer),
        "@DATA@": script_json(chart_data(review)),
        "@PLOTLY@": chart_library,
    }
    # One pass: what a part brings in is never looked at again.
    out, rest = [], page
    for mark, part in parts.items():
        before, rest = rest.split(mark, 1)
        out += [before, part]
    return "".join([*out, rest])


def _plotly() -> str:
    """The chart library's script, which needs none of its Python."""
    found = importlib.util.find_spec("plotly")
    for folder in (found and found.submodule_search_locations) or ():
        script = Path(folder) / "package_data" / "plotly.min.js"
        if script.exists():
            return script.read_text(encoding="utf-8")
    raise CtraceError("plotly is missing: install it with pip install plotly")


def _body(review: Review, answer: Optional[WhatIf]) -> str:
    return "\n".join(
        (
            _head(review),
            _why(review),
            _said(review),
            whatif_html(answer, _table) if answer else "",
            _tiles(review),
            _chart(
                "Fill, rates, refusals", "timeline",
                "Drag to zoom, double-click to reset. Keys: ← → pan, + and - zoom, 0 all, d dark "
                "or light. Dotted red lines: where drops began.",
            ),
            _chart(
                "Who held the table", "shares",
                f"Entries held, by {escaped(review.final.group)}, the largest over the whole time.",
            ),
            _culprits(review.final) if review.final.hooks.changes
            else _moment(review.final, "What the table held"),
            _chart(
                "How long connections live, and how long their entries stay", "lives",
                "Dotted: from the first to the last packet. Filled: from insert to destroy. "
                "Click a name to add it.",
            ),
            _worst(review),
            _victims(review.final),
            _tables(review),
            _causes(review),
            *(perf_html(host, perf, _table) for host, perf in review.measured.items()),
            _about(review),
        )
    )  # fmt: skip


def _head(review: Review) -> str:
    header = review.recording.header
    start = datetime.fromtimestamp(review.start, timezone.utc)
    return (
        f"<header><h1>{escaped(header.host or 'unknown host')}</h1>"
        f"<p>{start:%Y-%m-%d} {fmt.clock(review.start)} to {fmt.clock(review.end)} UTC, "
        f"{fmt.span(review.end - review.start)}; {escaped(made_by(header))}</p>"
        '<button id="theme" type="button">dark / light</button></header>'
    )


def _why(review: Review) -> str:
    worst = telling(review)
    when = f"At {fmt.clock(worst.ts / 1e9)}" if worst is not review.final else "At the end"
    lines = [f'<p class="note">{when}</p>']
    for label, holders in (("Held by", worst.who), ("Refused", worst.who_refused)):
        told = "; ".join(f"{fmt.share(one.share)} {fmt.prose(one.text)}" for one in holders)
        lines += [f"<p>{label}: {escaped(told)}</p>"] if told else []
    for cause in worst.why[:3]:
        lines.append(f"<p>{escaped(fmt.prose(cause.text))}</p>")
        if cause.remedy:
            lines.append(f'<p class="remedy">{escaped(cause.remedy)}</p>')
    return f'<section class="why"><h2>Why</h2>{"".join(lines)}</section>'


def _said(review: Review) -> str:
    """What dumps and logs told beside entries."""
    texts = parse(review.recording.header.facts)
    rows = sentences(texts) if texts is not None else []
    return _table("What the texts say", ("about", "said"),
                  ([escaped(head), escaped(text)] for head, text in rows))  # fmt: skip


def _tiles(review: Review) -> str:
    totals, hooks = review.final.totals, review.final.hooks
    good = "good" if hooks.refusals else ""
    tiles = [
        (fmt.share(review.peak_fill), "fullest", "bad" if review.peak_fill > 0.95 else ""),
        (number(hooks, "insert", totals.insert), "inserted", ""),
        (number(hooks, "drop", totals.drop), "refused", "bad" if totals.drop else good),
        (
            number(hooks, "early_drop", totals.early_drop),
            "evicted",
            "warn" if totals.early_drop else good,
        ),
        (number(hooks, "insert_failed", totals.insert_failed), "failed to insert", ""),
        (
            fmt.clock(review.first_drop)
            if review.first_drop is not None
            else "none"
            if hooks.refusals
            else fmt.UNKNOWN,
            "first refusal",
            "bad" if review.drops else good,
        ),
        (fmt.count(review.final.lost), "events lost", "warn" if review.final.lost else "good"),
    ]
    inner = "".join(
        f'<div class="tile"><b class="{kind}">{value}</b><span>{label}</span></div>'
        for value, label, kind in tiles
    )
    return f'<div class="tiles">{inner}</div>'


def _chart(title: str, name: str, note: str) -> str:
    return (
        f'<section><h2>{title}</h2><div class="chart" id="{name}" role="img" tabindex="0" '
        f'aria-label="{title}"></div><p class="note">{note}</p></section>'
    )


def _table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], note: str = ""
) -> str:
    """A section with a table; columns that begin with ``>`` hold numbers. Cells are HTML."""
    names = list(columns)
    head = "".join(
        f'<th class="n">{name[1:]}</th>' if name.startswith(">") else f"<th>{name}</th>"
        for name in names
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{"n" if name.startswith(">") else "k"}">{cell}</td>'
            for name, cell in zip(names, row)
        )
        + "</tr>"
        for row in rows
    )
    if not body:
        return ""
    after = f'<p class="note">{note}</p>' if note else ""
    return (
        f"<section><h2>{title}</h2><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>{after}</section>"
    )


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
            escaped(c.nat),
            _owner(c),
        ]

    rest, left = beyond(snapshot, ROWS)
    return _table(
        "What filled the table, by table-seconds",
        (escaped(snapshot.group), ">share", ">inserts", ">life p50", ">stays p50", ">stays p99",
         ">refused", ">evicted", "NAT", "process"),
        map(row, snapshot.culprits[:ROWS]),
        f"and {fmt.count(rest)} more, {fmt.share(left)}" if rest else "",
    )  # fmt: skip


def _worst(review: Review) -> str:
    moment = review.before_drop or review.peak
    if moment is None or not moment.hooks.changes:
        return ""
    what = "Just before the first refusal" if review.before_drop else "When it was fullest"
    return _moment(moment, f"{what}, at {fmt.clock(moment.ts / 1e9)}")


def _moment(moment: Snapshot, title: str) -> str:
    return _table(
        title,
        (escaped(moment.group), ">held", ">share", ">new/s", ">refused/s"),
        (
            [_key(c, moment), fmt.held(c), fmt.share(c.share),
             rate(moment.hooks, "new_per_s", c.new_per_s),
             rate(moment.hooks, "drop_per_s", c.drop_per_s)]
            for c in moment.culprits[:15]
        ),
    )  # fmt: skip


def _victims(snapshot: Snapshot) -> str:
    if not snapshot.hooks.drop_tuples and not snapshot.victims:
        said = nobody(snapshot.hooks, snapshot.totals.drop)
        return f"<section><h2>Who was refused or evicted</h2><p>{escaped(said)}</p></section>"
    return _table(
        "Who was refused or evicted",
        ("flow", ">refused", ">of its tries", ">evicted", ">failed", "process that got EPERM"),
        (
            [escaped(v.key), _number(v.drops, "bad"), fmt.share(v.share_of_new),
             fmt.count(v.evicted), fmt.count(v.failed),
             f"{escaped(v.owner.comm)}[{v.owner.pid}]" if v.owner else ""]
            for v in snapshot.victims[:ROWS]
        ),
    )  # fmt: skip


def _tables(review: Review) -> str:
    hooks = review.final.hooks
    peaks = {
        name: max((value for value in values if value is not None), default=None)
        for name, values in review.timeline.fill.items()
    }
    return _table(
        "Tables",
        ("namespace", ">at end", ">max", ">buckets", ">fullest", ">inserted", ">destroyed",
         ">refused", ">evicted", ">failed", ">off by"),
        (
            [escaped(t.name), fmt.count(t.count), limit(t),
             fmt.count(t.buckets) if t.buckets else fmt.UNKNOWN, fmt.share(peaks.get(str(t.netns))),
             number(hooks, "insert", t.totals.insert),
             number(hooks, "destroy", t.totals.destroy),
             _number(t.totals.drop, "bad") if hooks.refusals else fmt.UNKNOWN,
             number(hooks, "early_drop", t.totals.early_drop),
             number(hooks, "insert_failed", t.totals.insert_failed),
             number(hooks, "off_by", t.off_by.count)]
            for t in sorted(review.final.tables, key=lambda t: -(peaks.get(str(t.netns)) or 0))
        ),
        "Off by: our inserts less destroys, against the change of the kernel's own count.",
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
            [escaped(fmt.prose(cause.text)),
             "<br>".join(escaped(fmt.prose(fact)) for fact in cause.evidence),
             fmt.share(cause.share),
             escaped(cause.remedy), name]
            for name, cause in seen.values()
        ),
    )  # fmt: skip


def _about(review: Review) -> str:
    recording, header = review.recording, review.recording.header
    lines = [
        ("recording", escaped(recording.path)),
        ("written by", f"ctrace {escaped(header.version)}"),
        ("hooks", escaped(header.hooks.family)),
        ("filter", escaped(header.filter) or "none"),
        ("events", f"{fmt.count(review.events)}, {fmt.count(review.final.lost)} lost"),
        ("complete", escaped(str(recording.missing)) if recording.missing else "yes"),
        ("ended", escaped(recording.ended or "") if recording.ended is not None else "not cleanly"),
    ]
    if header.hooks.note and not header.hooks.drop_tuples:
        lines.append(("no better hooks", escaped(header.hooks.note)))
    lines += [("not seen", escaped(sentence)) for sentence in header.hooks.blind]
    lines += [("note", escaped(note)) for note in recording.notes()]
    settings = len(set(header.facts) - {FACT})
    facts = "".join(
        f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>"
        for name, value in header.facts.items()
        if name != FACT
    )
    told = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in lines)
    return (
        f"<section><h2>This recording</h2><dl>{told}</dl></section>"
        f"<section><h2>This host</h2><details><summary>{settings} settings</summary>"
        f"<dl>{facts}</dl></details></section>"
    )


def _key(culprit: Culprit, snapshot: Snapshot) -> str:
    several = len(snapshot.tables) > 1 and snapshot.group != "netns" and culprit.netns_name
    key = fmt.prose(culprit.words or culprit.key)
    return escaped(key + (f" in {culprit.netns_name}" if several else ""))


def _owner(culprit: Culprit) -> str:
    owner = culprit.owner
    if owner is None:
        return ""
    unit = f" {escaped(owner.unit)}" if owner.unit else ""
    return f"{escaped(owner.comm)}[{owner.pid}]{unit}"


def _number(value: int, kind: str) -> str:
    return f'<span class="{kind}">{fmt.count(value)}</span>' if value else fmt.count(value)
