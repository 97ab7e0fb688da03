"""A comparison as text for a terminal."""

from __future__ import annotations

from typing import Optional

from rich.console import Group
from rich.table import Table as Grid
from rich.text import Text

from ctrace.recording.compare import Comparison, Side
from ctrace.view import format as fmt


def diff_text(found: Comparison, limit: int) -> Group:
    """The sums, then the keys that changed most in the table."""
    grid = Grid(box=None, padding=(0, 2, 0, 0), header_style="dim")
    grid.add_column(found.group)
    for name in ("held", "", "new/s", "", "refused/s", "", "life", "", "stays", ""):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_row("everything", *_cells(found.before, found.after), style="bold")
    for change in found.changes[:limit]:
        grid.add_row(fmt.arrowed(change.key), *_cells(change.before, change.after))
    rest = len(found.changes) - limit
    if rest > 0:
        grid.add_row(f"and {'' if found.complete else 'at least '}{fmt.count(rest)} more")
    hosts = [fmt.clean(host) or "unknown host" for host in found.hosts]
    head = (
        f"before: {hosts[0]}, {fmt.span(found.seconds[0])}; "
        f"after: {hosts[1]}, {fmt.span(found.seconds[1])}; each column before, then after"
    )
    return Group(Text(head), *_failed(found), Text(), grid)


def _failed(found: Comparison) -> list[Text]:
    """Inserts that failed while the table had room, where there were some."""
    before, after = found.before.failed_per_s, found.after.failed_per_s
    if not before and not after:
        return []
    return [Text(f"inserts that failed each second: {_rate(before)} before, {_rate(after)} after")]


def _cells(before: Side, after: Side) -> list[str]:
    return [
        _held(before.held),
        _held(after.held) + _arrow(before.held, after.held),
        _rate(before.inserts_per_s),
        _rate(after.inserts_per_s),
        _rate(before.drops_per_s),
        _rate(after.drops_per_s),
        fmt.duration(before.life),
        fmt.duration(after.life),
        fmt.duration(before.residence),
        fmt.duration(after.residence),
    ]


def _rate(value: Optional[float]) -> str:
    return fmt.UNKNOWN if value is None else fmt.rate(value)


def _held(value: Optional[float]) -> str:
    return fmt.UNKNOWN if value is None else fmt.short(value)


def _arrow(before: Optional[float], after: Optional[float]) -> str:
    if before is None or after is None:
        return ""
    if max(before, after) < 0.5 or abs(after - before) < 0.05 * max(before, after):
        return " ="
    if before < 0.5:
        return " new"
    if after < 0.5:
        return " gone"
    return f" {100 * (after / before - 1):+.0f} %"
