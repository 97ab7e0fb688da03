"""The measures of a table: one name, type and meaning for a live scrape and for an export."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ctrace.batch import DUMP, HookInfo
from ctrace.model.snapshot import Counted


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
LOST: Final = Measure(
    "ctrace_lost_events",
    "counter",
    "Events that the stream lost; per-table totals stay exact without them.",
)


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
