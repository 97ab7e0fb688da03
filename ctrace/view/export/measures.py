"""The measures of a table: one name, type and meaning for a live scrape and for an export."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ctrace.batch import DUMP, HookInfo
from ctrace.model.snapshot import Counted, Snapshot


@dataclass(frozen=True)
class Measure:
    """A metric family. A counter's samples carry ``_total`` behind its name."""

    name: str
    kind: str
    """``gauge`` or ``counter``."""
    text: str


ENTRIES: Final = Measure("ctrace_table_entries", "gauge", "Entries in the conntrack table.")
LIMIT: Final = Measure("ctrace_table_max", "gauge", "nf_conntrack_max; 0 means no limit.")
INSERTS: Final = Measure("ctrace_inserts", "counter", "Entries inserted since ctrace attached.")
DESTROYS: Final = Measure("ctrace_destroys", "counter", "Entries that ended, by reason.")
DROPS: Final = Measure("ctrace_drops", "counter", "Packets refused because the table was full.")
FAILED: Final = Measure("ctrace_insert_failed", "counter", "Entries that could not be inserted.")
CAUSES: Final = Measure(
    "ctrace_cause_share_ratio",
    "gauge",
    "Part of its table that a cause explains; 0: it is about something else than entries. Of kind "
    "load nothing is wrong while there is room.",
)
LOST: Final = Measure(
    "ctrace_lost_events",
    "counter",
    "Events that the stream lost; per-table totals stay exact without them.",
)

UNKNOWN: Final = "unknown"


def of_causes(snapshot: Snapshot) -> dict[tuple[str, str, str], float]:
    """The causes: namespace (empty: of none alone), id and kind (``load`` or ``fault``) to share.

    Several services with one cause are one sample.
    """
    names = {table.netns: table.name for table in snapshot.tables}
    found: dict[tuple[str, str, str], float] = {}
    for cause in snapshot.why:
        if cause.id == UNKNOWN:
            continue
        netns = names.get(cause.netns, str(cause.netns or ""))
        key = netns, cause.id, "load" if cause.load else "fault"
        found[key] = round(min(1.0, found.get(key, 0.0) + cause.share), 4)
    return found


def of_counters(done: Counted, hooks: HookInfo) -> Iterator[tuple[Measure, str, int]]:
    """Each counter of a table: its measure, the reason (or empty), and its value.

    A counter that the source cannot see has no sample: a zero would be taken for a count.
    """
    if hooks.changes:
        yield INSERTS, "", done.insert
        other = done.destroy - done.expired - done.early_drop - done.deleted
        if hooks.family != DUMP:  # which tells of what was deleted by name alone
            yield DESTROYS, "expired", done.expired
        if hooks.evictions:
            yield DESTROYS, "evicted", done.early_drop
        yield DESTROYS, "deleted", done.deleted
        yield DESTROYS, "other", max(0, other)
    if hooks.refusals:
        yield DROPS, "", done.drop
        yield FAILED, "", done.insert_failed
