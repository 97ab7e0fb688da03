"""A review as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Optional, Union

from rich.console import Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from ctrace.batch import DUMP, HookInfo
from ctrace.model.snapshot import Culprit, Snapshot, Table, Victim
from ctrace.recording.format.evidence import parse
from ctrace.recording.format.meta import Header
from ctrace.recording.review import Review, beyond
from ctrace.view import format as fmt
from ctrace.view.prose import Prose, prose
from ctrace.view.report import cost as cost_text
from ctrace.view.report.evidence import sentences
from ctrace.view.report.story import at, headline, losing, period, story
from ctrace.view.unseen import blind, nobody, number, rate
from ctrace.view.verdict import counted

Cell = Union[str, Text]
SPARK = 48
WIDTH = 100
"""Columns: no line is wider, whatever the terminal."""
TABLES = 8
KEY = 38
"""Columns of a key; its middle goes."""


def report_text(review: Review, limit: int = 10) -> Group:
    """What happened, most important first."""
    final, peak = review.final, review.peak or review.final
    blocks: list[RenderableType] = [_head(review), _verdict(review), Text()]
    texts = parse(review.recording.header.facts)
    if texts is not None:
        blocks += [_title("What the texts say"), _said(texts), Text()]
    blocks += [_why(review), Text()]
    if story(review):
        blocks += [_title("What happened, UTC"), *_story(review), Text()]
    blocks += [_tables(review), Text()]
    if len(review.timeline.ts) > 1:  # one moment has no course
        blocks += [_timeline(review), Text()]
    if final.culprits and final.hooks.changes:
        title = "What filled the table, by table-seconds"
        blocks += [_title(title), culprits(final, limit), Text()]
    elif final.culprits:
        blocks += [_title("What the table held"), moment(final, limit), Text()]
    if review.before_drop is not None and review.before_drop.culprits:
        title = f"Just before the first drop, at {at(review, review.before_drop.ts / 1e9)}"
        blocks += [_title(title), moment(review.before_drop, min(5, limit)), Text()]
    elif review.peak is not None and review.peak.culprits and final.hooks.changes:
        title = f"At the peak, {at(review, peak.ts / 1e9)}"
        blocks += [_title(title), moment(peak, min(5, limit)), Text()]
    if final.victims:
        blocks += [_title("Who was refused or evicted"), victims(final.victims[:limit]), Text()]
    elif not final.hooks.drop_tuples:
        said = nobody(final.hooks, final.totals.drop)
        blocks += [_title("Who was refused or evicted"), Text(said), Text()]
    for host, perf in review.measured.items():
        title = "What conntrack cost" + (f" on {fmt.clean(host)}" if host else "")
        blocks += [_title(title), cost_text.render(perf), Text()]
    blocks += [_title("This recording"), *_about(review)]
    return Group(*blocks)


def _head(review: Review) -> Text:
    header = review.recording.header
    when = period(review)
    if " to " in when:
        when += f" ({fmt.span(review.end - review.start)}), {fmt.plural(review.events, 'event')}, "
        some = "at least " if review.final.hooks.family == DUMP and review.final.lost else ""
        lost = f"{some}{fmt.count(review.final.lost)} lost"
    else:
        lost = ", one moment"
    return Text.assemble(
        (fmt.clean(header.host or "unknown host"), "bold"),
        f"  {when}",
        (lost, "bold yellow" if review.final.lost else ""),
        (", incomplete: see the end" if review.recording.missing else "", "bold yellow"),
    )


def _verdict(review: Review) -> Text:
    said = headline(review)
    style = {"bad": "bold red", "warn": "bold yellow", "good": "bold green"}.get(said.level, "bold")
    return Text.assemble((said.word, style), f" {said.text}")


def _story(review: Review) -> Iterator[RenderableType]:
    """The moments, each with its time, wrapped under itself."""
    grid = Grid.grid(padding=(0, 2, 0, 0))
    for one in story(review):
        grid.add_row(Text(one.letter, style="bold"), one.time, Prose(one.text))
    yield grid


def _said(data: dict[str, Any]) -> Grid:
    """What dumps and logs show besides entries."""
    grid = Grid.grid(padding=(0, 2))
    for head, text in sentences(data):
        grid.add_row(Text(head, style="dim"), Prose(text))
    return grid


def _title(text: str) -> Text:
    return Text(text, style="bold")


def telling(review: Review) -> Snapshot:
    """The moment whose causes are reported: the worst, because at the end all may look well.

    Where nothing was recognised at that moment, the next one with a known cause. Inserts that fail
    need no full table: of them, the end tells all.
    """
    moments = [review.before_drop, review.peak, review.final]
    if review.before_drop is None and losing(review.final):
        moments = [review.final, review.peak]
    told = [one for one in moments if one is not None]
    return next((one for one in told if one.why and one.why[0].id != "unknown"), told[-1])


def moment_told(review: Review) -> str:
    """``At 11:02:03``: the moment of :func:`telling`."""
    worst = telling(review)
    if not review.final.hooks.changes:
        return f"As read at {at(review, worst.ts / 1e9)}"
    return "At the end" if worst is review.final else f"At {at(review, worst.ts / 1e9)}"


def _why(review: Review) -> Group:
    grid = Grid.grid(padding=(0, 2, 0, 0))
    worst = telling(review)
    lines: list[RenderableType] = [Text(f"{moment_told(review)}:", style="dim"), grid]
    for label, holders in (("WHO", worst.who), ("REFUSED", worst.who_refused)):
        if holders:
            parts = [f"{fmt.share(one.share)} {fmt.prose(one.text)}" for one in holders]
            grid.add_row(Text(label, "bold"), Prose("; ".join(parts)))
    for cause in worst.why[:3]:
        grid.add_row(Text("WHY", "bold"), prose(cause.text))
        if cause.remedy:
            grid.add_row(Text("HELPS", "bold"), prose(cause.remedy))
    if review.first_drop is not None:
        bursts = fmt.plural(len(review.drops), "burst")
        lines.append(
            Text(f"First refused at {at(review, review.first_drop)}, in {bursts} of drops.")
        )
    return Group(*lines)


def peak_fills(review: Review) -> dict[str, Optional[float]]:
    """How full each namespace's table ever was; None where that was not read."""
    return {
        name: max((value for value in values if value is not None), default=None)
        for name, values in review.timeline.fill.items()
    }


def used_tables(review: Review) -> tuple[list[Table], int]:
    """The tables that ever held or refused something, fullest first; and how many did not."""
    peaks = peak_fills(review)
    used = [
        t
        for t in review.final.tables
        if t.count or peaks.get(str(t.netns)) or t.totals.insert or t.totals.drop
    ]
    order = sorted(used, key=lambda t: (-(peaks.get(str(t.netns)) or 0), -t.count))
    return order, sum(t.read or t.count > 0 for t in review.final.tables if t not in used)


def _tables(review: Review) -> Grid:
    peaks, hooks = peak_fills(review), review.final.hooks
    shown, idle = used_tables(review)

    def row(table: Table) -> list[Cell]:
        totals = table.totals
        return [
            fmt.cut(fmt.clean(table.name), 22),
            entries(hooks, table),
            limit(table),
            fmt.share(peaks.get(str(table.netns))),
            number(hooks, "insert", totals.insert),
            number(hooks, "destroy", totals.destroy),
            _red(number(hooks, "drop", totals.drop), totals.drop),
            number(hooks, "early_drop", totals.early_drop),
            number(hooks, "insert_failed", totals.insert_failed),
        ]

    grid = _known(
        ("namespace", ">at end" if hooks.changes else ">entries", ">max", ">fullest", ">inserted",
         ">destroyed", ">refused", ">evicted", ">failed"),
        [row(table) for table in shown[:TABLES]],
    )  # fmt: skip
    if len(shown) > TABLES:
        grid.add_row(f"and {fmt.count(len(shown) - TABLES)} less full")
    if idle:
        grid.add_row(f"{fmt.count(idle)} held nothing")
    return grid


def entries(hooks: HookInfo, table: Table) -> str:
    """How many it held, as far as that is known."""
    return fmt.count(table.count) if counted(hooks, table) else fmt.UNKNOWN


def limit(table: Table) -> str:
    """The most that a table may hold, as far as it is known."""
    if not table.max_known:
        return fmt.UNKNOWN
    return fmt.count(table.max) if table.max else "no limit"


def _timeline(review: Review) -> Grid:
    line = review.timeline
    fullest = max(line.fill, key=lambda n: max((v or 0) for v in line.fill[n]), default=None)
    grid = Grid.grid(padding=(0, 2))
    rows = [("inserts/s", line.insert), ("refused/s", line.drop), ("evicted/s", line.early_drop)]
    if fullest is not None:
        name = next((t.name for t in review.final.tables if str(t.netns) == fullest), fullest)
        values = [value for value in line.fill[fullest] if value is not None]
        grid.add_row(
            f"fill {fmt.cut(fmt.clean(name), 22)}",
            _spark(values, 1.0),
            "up to " + fmt.share(max(values)),
        )
    for label, values in rows:
        if any(values):
            grid.add_row(label, _spark(values), f"up to {_up_to(max(values))}/s")
    return grid


def _spark(values: list[float], top: float | None = None) -> str:
    """The values in SPARK columns, each the highest of its part."""
    columns = min(SPARK, len(values))
    edges = [len(values) * i // columns for i in range(columns + 1)] if columns else []
    highest = [max(values[a:b]) for a, b in zip(edges, edges[1:])]
    return fmt.sparkline(highest, len(highest), top)


def culprits(snapshot: Snapshot, limit: int) -> Grid:
    """Rows by what they cost in table-seconds."""
    grid = _grid(
        snapshot.group, ">share", ">inserts", ">life", ">in table", ">at end", ">refused", "owner"
    )
    whole = snapshot.table_seconds_total or 1.0
    for c in snapshot.culprits[:limit]:
        grid.add_row(
            fmt.key(_key(c, snapshot), KEY),
            fmt.share(c.table_seconds / whole),
            fmt.count(c.inserts),
            fmt.duration(c.life.p50),
            fmt.stays(c.residence),
            fmt.held(c),
            Text(number(snapshot.hooks, "drops", c.drops), style="red" if c.drops else ""),
            fmt.cut(_owner(c), 16),
        )
    rest, left = beyond(snapshot, limit)
    if rest:
        grid.add_row(f"and {fmt.count(rest)} more", fmt.share(left))
    return grid


def moment(snapshot: Snapshot, limit: int) -> Grid:
    """Who held how much of the table at one moment."""
    return _known(
        (snapshot.group, ">held", ">share", ">new/s", ">refused/s"),
        [
            [
                fmt.key(_key(c, snapshot), KEY + 12),
                fmt.held(c),
                fmt.share(c.share),
                rate(snapshot.hooks, "new_per_s", c.new_per_s),
                rate(snapshot.hooks, "drop_per_s", c.drop_per_s),
            ]
            for c in snapshot.culprits[:limit]
        ],
    )


def victims(rows: tuple[Victim, ...]) -> Grid:
    """Who was refused, with the process that got EPERM."""
    grid = _grid("flow", ">refused", ">of its tries", ">evicted", "process")
    for v in rows:
        owner = f"{fmt.clean(v.owner.comm)}[{v.owner.pid}]" if v.owner else ""
        grid.add_row(
            fmt.key(v.key, KEY + 10),
            Text(fmt.count(v.drops), style="bold red" if v.drops else ""),
            fmt.share(v.share_of_new),
            fmt.count(v.evicted),
            owner,
        )
    return grid


def _about(review: Review) -> Iterator[Text]:
    recording = review.recording
    header = recording.header
    yield Text(
        f"{fmt.clean(recording.path)}, by ctrace {fmt.clean(header.version)} "
        f"{fmt.clean(made_by(header))}"
    )
    if header.filter:
        yield Text(f"Only what matched: {fmt.clean(header.filter)}")
    limits = [
        f"{name.rsplit('.', 1)[1].removeprefix('nf_conntrack_')} {_setting(header.facts[name])}"
        for name in (
            "net.netfilter.nf_conntrack_max",
            "net.netfilter.nf_conntrack_buckets",
            "net.netfilter.nf_conntrack_tcp_timeout_time_wait",
            "net.netfilter.nf_conntrack_tcp_timeout_established",
            "net.netfilter.nf_conntrack_udp_timeout",
        )
        if name in header.facts
    ]
    if limits:
        several = len(review.final.tables) > 1  # each has its own
        where = " of the namespace that ctrace ran in" if several else ""
        yield Text(f"Settings{where}: " + ", ".join(limits))
    if header.hooks.note and not header.hooks.drop_tuples:
        yield Text("No better hooks: " + fmt.clean(header.hooks.note), style="dim")
    for sentence in blind(header.hooks, review.final.unseen):
        yield Text("Not seen: " + fmt.clean(sentence), style="dim")
    if recording.missing:
        yield prose(f"Incomplete: {recording.missing}", "yellow")
    elif recording.ended is None:
        yield Text("It is still being written.", style="yellow")
    for note in recording.notes():
        yield prose(f"Note: {note}")


def _setting(text: str) -> str:
    """A number as all are written, in case it is one."""
    plain = text.isascii() and text.isdecimal() and len(text) < 16
    return fmt.count(int(text)) if plain else fmt.clean(text)


def made_by(header: Header) -> str:
    """``with fentry hooks on Linux 6.1``, or that it was made of text."""
    family = header.hooks.family
    how = "from text" if family == DUMP else f"with {family} hooks"
    return how + (f" on Linux {header.kernel}" if header.kernel else "")


def _key(culprit: Culprit, snapshot: Snapshot) -> str:
    """The key, with its namespace where there are several."""
    where = f" in {culprit.netns_name}" if len(snapshot.tables) > 1 and culprit.netns_name else ""
    key = fmt.prose(culprit.words or culprit.key)
    return fmt.clean(key + ("" if snapshot.group == "netns" else where))


def _owner(culprit: Culprit) -> str:
    owner = culprit.owner
    if owner is None:
        return fmt.clean(culprit.pod)
    return fmt.clean(owner.unit) or f"{fmt.clean(owner.comm)}[{owner.pid}]"


def _red(text: str, value: int) -> Cell:
    return Text(text, style="bold red") if value else text


def _up_to(rate: float) -> str:
    return fmt.count(round(rate)) if rate >= 1 else fmt.rate(rate)


def _known(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Grid:
    """Without the columns of numbers that are unknown in all rows."""
    known = [
        index
        for index, name in enumerate(columns)
        if name[:1] != ">" or not rows or any(str(row[index]) != fmt.UNKNOWN for row in rows)
    ]
    grid = _grid(*(columns[index] for index in known))
    for row in rows:
        grid.add_row(*(row[index] for index in known))
    return grid


def _grid(*columns: str) -> Grid:
    grid = Grid(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        right = column.startswith(">")
        grid.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=right)
    return grid
