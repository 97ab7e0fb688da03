"""Two recordings, before and after a change, key by key and per second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from ctrace.batch import DUMP
from ctrace.errors import CtraceError
from ctrace.model.snapshot import OVER_TIME, Culprit, Snapshot
from ctrace.recording.derived import Recorded
from ctrace.recording.modelled import model_of

LISTED = 0.9
"""Share of what a table held, from which on texts list all of it: they are of two moments."""
KEYS = 5000
"""Keys of each recording that are compared, the costliest first."""


@dataclass(frozen=True)
class Side:
    """One key in one recording."""

    inserts_per_s: Optional[float] = 0.0
    """None, as with drops, where the source cannot tell."""
    drops_per_s: Optional[float] = 0.0
    failed_per_s: Optional[float] = None
    """Inserts that failed for another reason than a full table; of everything only."""
    held: Optional[float] = 0.0
    """Entries held on average: table-seconds per second. None, as all else, of a key that is not
    among the :data:`KEYS` of a recording that has more; None where texts show a part."""
    share: Optional[float] = 0.0
    """Of all table-seconds."""
    life: Optional[float] = None
    """p50, seconds."""
    residence: Optional[float] = None


@dataclass(frozen=True)
class Change:
    """One key in both."""

    key: str
    before: Side
    after: Side

    @property
    def held(self) -> float:
        """How many more entries it holds."""
        return (self.after.held or 0.0) - (self.before.held or 0.0)


@dataclass(frozen=True)
class Comparison:
    """All keys, those that changed the table most first, and the sums."""

    group: str
    before: Side
    after: Side
    changes: tuple[Change, ...]
    seconds: tuple[float, float]
    hosts: tuple[str, str]
    complete: bool
    """Whether every key of both is among the changes."""

    def to_json(self, limit: int) -> dict[str, Any]:
        """The same as JSON, for programs."""
        return {
            "group": self.group,
            "hosts": list(self.hosts),
            "seconds": list(self.seconds),
            "complete": self.complete,
            "before": vars(self.before),
            "after": vars(self.after),
            "changes": [
                {"key": c.key, "before": vars(c.before), "after": vars(c.after)}
                for c in self.changes[:limit]
            ],
        }


def compare(before: Recorded, after: Recorded, group: str) -> Comparison:
    """Run both through a model. Raises CtraceError when one of them is empty."""
    first, second = _final(before, group), _final(after, group)
    several = group != "netns" and any(
        len({culprit.netns for culprit in one.culprits}) > 1 for one in (first, second)
    )
    old, new = _sides(first, several), _sides(second, several)
    no, none = _absent(first), _absent(second)
    changes = [Change(key, old.get(key, no), new.get(key, none)) for key in {**old, **new}]
    changes.sort(key=lambda c: (-abs(c.held), c.key))
    return Comparison(
        group,
        _whole(first),
        _whole(second),
        tuple(changes),
        (first.uptime_s, second.uptime_s),
        (first.host, second.host),
        not any(_cut(one) for one in (first, second)),
    )


def _final(recording: Recorded, group: str) -> Snapshot:
    model = model_of(recording)
    seen = False
    for batch in recording.batches():
        model.update(batch)
        seen = True
    if not seen:
        raise CtraceError(f"{recording.path}: nothing was recorded; {recording.missing}")
    flows = recording.header.flow_filter
    sort = OVER_TIME if recording.hooks.changes else "held"
    return model.snapshot(group=group, sort=sort, limit=KEYS, filter_text=flows)


def _cut(snapshot: Snapshot) -> bool:
    return snapshot.culprits_total > len(snapshot.culprits)


def _absent(snapshot: Snapshot) -> Side:
    """A key that a recording does not list: it was not there, unless the list is cut off."""
    if _cut(snapshot):
        return Side(None, None, held=None, share=None)
    return Side(
        0.0 if snapshot.hooks.changes else None,
        0.0 if snapshot.hooks.refusals else None,
        held=0.0 if _listed(snapshot) else None,
    )


def _listed(snapshot: Snapshot) -> bool:
    """Whether all that the tables held is listed: texts may show a part, or events alone."""
    if snapshot.hooks.family != DUMP:
        return True
    held = sum(table.count for table in snapshot.tables)
    return _read(snapshot) and snapshot.held_total >= LISTED * held


def _read(snapshot: Snapshot) -> bool:
    return bool(snapshot.tables) and all(table.read for table in snapshot.tables)


def _sides(snapshot: Snapshot, several: bool) -> dict[str, Side]:
    """Each key's side; of ``several`` namespaces with its namespace."""
    whole = snapshot.table_seconds_total or 1.0
    out: dict[str, Side] = {}
    for c in snapshot.culprits:
        key = f"{c.key} in {c.netns_name}" if several and c.netns_name else c.key
        out.setdefault(key, _side(c, snapshot, whole))
    return out


def _side(culprit: Culprit, snapshot: Snapshot, whole: float) -> Side:
    hooks, seconds = snapshot.hooks, max(snapshot.uptime_s, 1e-9)
    held, share = culprit.table_seconds / seconds, culprit.table_seconds / whole
    if not hooks.changes:  # a single moment has no average
        held, share = float(culprit.held), culprit.share
    listed = _listed(snapshot)
    return Side(
        culprit.inserts / seconds if hooks.changes else None,
        culprit.drops / seconds if hooks.refusals else None,
        None,
        held if listed else None,
        share,
        culprit.life.p50,
        culprit.residence.p50,
    )


def _whole(snapshot: Snapshot) -> Side:
    hooks, seconds = snapshot.hooks, max(snapshot.uptime_s, 1e-9)
    held: Optional[float] = snapshot.table_seconds_total / seconds
    if not hooks.changes:
        held = float(snapshot.held_total)
    if not _listed(snapshot):
        held = float(sum(table.count for table in snapshot.tables)) if _read(snapshot) else None
    return Side(
        snapshot.totals.insert / seconds if hooks.changes else None,
        snapshot.totals.drop / seconds if hooks.refusals else None,
        snapshot.totals.insert_failed / seconds if hooks.refusals else None,
        held,
        1.0,
    )
