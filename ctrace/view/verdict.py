"""The first line that anybody reads: how each table fares, in a word and half a sentence.

Screen, plain frame and reports take it from here, so they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from ctrace.batch import DUMP, HookInfo
from ctrace.model.causes.room import HIGH, filling, rising
from ctrace.model.causes.words import moment, where
from ctrace.model.snapshot import Counted, Snapshot, Table
from ctrace.view import format as fmt


@dataclass(frozen=True)
class Verdict:
    """One table's state, or that of the whole host."""

    word: str
    """At most seven capital letters, so that colour is never needed."""
    text: str
    """The text after the word: ``3 % full, nothing refused``."""
    level: str
    """``good``, ``plain``, ``warn`` or ``bad``."""

    def __str__(self) -> str:
        return f"{self.word} {self.text}"


def state_word(table: Table) -> str:
    """One word for a table's state, so that colour is never needed."""
    if not table.active:
        return "off"
    if table.full_since is not None:
        if table.max_known and table.fill < HIGH:
            return "EASING"  # it was full within the interval, and has emptied since
        if table.rates.drop or table.fill >= 0.999:
            return "FULL"
        return "EVICTING" if table.rates.early_drop else "EASING"
    if table.seconds_to_full is not None:
        return "filling"
    return "steady" if table.rates.insert <= table.rates.destroy * 1.02 + 1 else "growing"


def at_limit(table: Table) -> bool:
    """Whether a table refuses or evicts now; one that is easing gives no alarm any more."""
    return state_word(table) in ("FULL", "EVICTING")


def in_trouble(snapshot: Snapshot) -> bool:
    """Whether some table is close to its limit, or beyond."""
    return any(at_limit(t) or t.fill >= HIGH for t in snapshot.tables)


def fullest(snapshot: Snapshot) -> Optional[Table]:
    """The table in trouble, else the fullest."""
    active = snapshot.tables
    if not active:
        return None
    return max(active, key=lambda t: (t.full_since is not None, t.rates.drop, t.fill, t.count))


def verdict(snapshot: Snapshot, table: Optional[Table] = None) -> Verdict:
    """The verdict on one table; without one, on the table in trouble or the fullest."""
    table = table or fullest(snapshot)
    if table is None or _unread(snapshot, table):
        none = "no connection tracking table has been read yet"
        if table is None and "netns=" in snapshot.filter:
            none = "no table has been read of a namespace that matches the filter"
        return Verdict("NONE", none, "warn")
    if table.full_since is not None:
        return _limited(snapshot, table)
    fill = f"{fmt.share(table.fill)} full"
    if not table.max:
        fill = fmt.plural(table.count, "entry", "entries")
    if only_read(snapshot, table):
        read = (
            f"{fill}, as it was read"
            if counted(snapshot.hooks, table)
            else "nothing tells how many entries"
        )
        return as_read(snapshot, read)
    if table.rates.drop or table.rates.insert_failed:
        lost = table.rates.drop + table.rates.insert_failed
        return Verdict("LOSING", f"{fmt.per_second(lost)} new entries fail at {fill}", "bad")
    if table.seconds_to_full is not None and filling(table):
        when = until(table.seconds_to_full, table.seconds_to_full_error)
        level = "bad" if table.seconds_to_full < 120 else "warn"
        return Verdict("FILLING", f"{fill}, at its limit in {when}", level)
    return _with_room(snapshot, table, fill)


def _unread(snapshot: Snapshot, table: Table) -> bool:
    """Whether a live table has not been read: of nothing nobody can say that it is well."""
    live = snapshot.hooks.family != DUMP
    return live and not table.read and not table.max_known and not table.count


def only_read(snapshot: Snapshot, table: Table) -> bool:
    """Whether nothing shows if it has room: one dump is one moment, and texts without the limit do
    not show how near it was."""
    return not snapshot.hooks.changes or (snapshot.hooks.family == DUMP and not table.max_known)


def counted(hooks: HookInfo, table: Table) -> bool:
    """Whether anything shows how many entries it holds: in texts neither events nor a part of the
    table do."""
    return table.read or (table.count > 0 and hooks.family != DUMP)


def as_read(snapshot: Snapshot, read: str) -> Verdict:
    """The verdict on imported texts: what they show, and what the log says about other times."""
    log = snapshot.logged
    if log is not None:
        refused = f"at least {fmt.plural(log.refused, 'packet')} refused"
        return Verdict(
            "READ",
            f"{read}; the log says it was full{where(log)}, last {moment(log.last)}, {refused}",
            "warn",
        )
    more = "" if snapshot.hooks.refusals else "; it does not say who was refused"
    return Verdict("READ", f"{read}{more}", "plain")


def _with_room(snapshot: Snapshot, table: Table, fill: str) -> Verdict:
    refused = _refused(snapshot, table)
    if not snapshot.hooks.refusals and not rising(table):
        return as_read(snapshot, f"{fill}, as it was read")
    if table.max and table.levels_off is not None:
        error = table.levels_off_error or 0.0
        ends = [max(table.levels_off + by, table.count) / table.max for by in (-error, error)]
        low, high = (fmt.share(end) for end in ends)
        fill += f", rising to {low}" if low == high else f", rising to {low[:-2]} to {high}"
    more = rising(table)
    if more:
        return Verdict(
            "RISING", f"{fill}, {fmt.per_second(more)} more come than go, {refused}", "warn"
        )
    if table.max and table.fill >= HIGH:
        return Verdict("HIGH", f"{fill}, {refused}", "warn")
    lost = table.totals.drop or table.totals.insert_failed
    return Verdict("HEALTHY", f"{fill}, {refused}", "plain" if lost else "good")


def _limited(snapshot: Snapshot, table: Table) -> Verdict:
    since = table.full_since or 0.0
    word = state_word(table)
    ago = fmt.span(max(0.0, snapshot.ts / 1e9 - since))
    if word == "EASING":
        text = f"{fmt.share(table.fill)} full, was full at {fmt.clock(since)}"
        return Verdict(word, f"{text}, {_refused(snapshot, table)}", "warn")
    what = (
        f"{fmt.per_second(table.rates.drop)} refused"
        if table.rates.drop or not table.rates.early_drop
        else f"{fmt.per_second(table.rates.early_drop)} evicted"
    )
    word = {"EVICTING": "EVICTS"}.get(word, word)
    if table.rates.drop and table.totals.drop:
        what += f", {_so_far(snapshot, table)}"
    elif not table.rates.drop:
        what += f", {_refused(snapshot, table)}"
    return Verdict(word, f"for {ago}: {what}", "bad")


def _refused(snapshot: Snapshot, table: Table) -> str:
    if not snapshot.hooks.refusals:
        return "who was refused is not known"
    told = _so_far(snapshot, table, " refused") if table.totals.drop else "nothing refused"
    return told + failed(table.totals)


def failed(totals: Counted) -> str:
    """The inserts that failed for another reason than a full table, after what was refused."""
    n = totals.insert_failed
    return f", {fmt.plural(n, 'insert')} failed" if n else ""


def _so_far(snapshot: Snapshot, table: Table, done: str = "") -> str:
    """How many were refused since the start; a watcher who came late cannot say more."""
    start = snapshot.ts / 1e9 - snapshot.uptime_s
    return f"{fmt.count(table.totals.drop)}{done} since {fmt.clock(start)}"


def until(seconds: float, error: Optional[float]) -> str:
    """``4 to 6 min``: when a table is full, including the possible error."""
    if not error:
        return fmt.duration(seconds)
    low, high = fmt.duration(max(0.0, seconds - error)), fmt.duration(seconds + error)
    if low == high:
        return low
    number, _, unit = low.rpartition(" ")
    return f"{number} to {high}" if number and high.endswith(f" {unit}") else f"{low} to {high}"
