"""Two recordings, before and after a change, key by key and per second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from ctrace.errors import CtraceError
from ctrace.model.model import Model
from ctrace.model.snapshot import Culprit, Snapshot
from ctrace.recording.derived import Recorded
from ctrace.recording.format.evidence import logged

KEYS = 5000


@dataclass(frozen=True)
class Side:
    """One key in one recording."""

    inserts_per_s: Optional[float] = 0.0
    """None, as with drops, where the source cannot tell."""
    drops_per_s: Optional[float] = 0.0
    held: float = 0.0
    """Entries held on average: table-seconds per second."""
    share: float = 0.0
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
        return self.after.held - self.before.held


@dataclass(frozen=True)
class Comparison:
    """All keys, those that changed the table most first, and the sums."""

    group: str
    before: Side
    after: Side
    changes: tuple[Change, ...]
    seconds: tuple[float, float]
    hosts: tuple[str, str]

    def to_json(self, limit: int) -> dict[str, Any]:
        """The same as JSON, for programs."""
        return {
            "group": self.group,
            "hosts": list(self.hosts),
            "seconds": list(self.seconds),
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
    old, new = _sides(first), _sides(second)
    changes = [Change(key, old.get(key, Side()), new.get(key, Side())) for key in {**old, **new}]
    changes.sort(key=lambda c: (-abs(c.held), -c.before.held - c.after.held, c.key))
    return Comparison(
        group,
        _whole(first),
        _whole(second),
        tuple(changes),
        (first.uptime_s, second.uptime_s),
        (first.host, second.host),
    )


def _final(recording: Recorded, group: str) -> Snapshot:
    model = Model(
        recording.hooks,
        recording.clock,
        recording.started,
        host=recording.header.host,
        memory=64 << 20,
        logged=logged(recording.header.facts),
    )
    seen = False
    for batch in recording.batches():
        model.update(batch)
        seen = True
    if not seen:
        raise CtraceError(f"{recording.path}: nothing was recorded; {recording.missing}")
    flows = recording.header.flow_filter
    return model.snapshot(group=group, sort="held", limit=KEYS, filter_text=flows)


def _sides(snapshot: Snapshot) -> dict[str, Side]:
    whole = sum(c.table_seconds for c in snapshot.culprits) or 1.0
    out: dict[str, Side] = {}
    several = len({c.netns for c in snapshot.culprits}) > 1 and snapshot.group != "netns"
    for c in snapshot.culprits:
        key = f"{c.key} in {c.netns_name}" if several and c.netns_name else c.key
        out.setdefault(key, _side(c, snapshot, whole))
    return out


def _side(culprit: Culprit, snapshot: Snapshot, whole: float) -> Side:
    hooks, seconds = snapshot.hooks, max(snapshot.uptime_s, 1e-9)
    held, share = culprit.table_seconds / seconds, culprit.table_seconds / whole
    if not hooks.changes:  # a single moment has no average
        held, share = float(culprit.held), culprit.share
    return Side(
        culprit.inserts / seconds if hooks.changes else None,
        culprit.drops / seconds if hooks.refusals else None,
        held,
        share,
        culprit.life.p50,
        culprit.residence.p50,
    )


def _whole(snapshot: Snapshot) -> Side:
    hooks, seconds = snapshot.hooks, max(snapshot.uptime_s, 1e-9)
    held = sum(c.table_seconds for c in snapshot.culprits) / seconds
    return Side(
        snapshot.totals.insert / seconds if hooks.changes else None,
        snapshot.totals.drop / seconds if hooks.refusals else None,
        held if hooks.changes else float(snapshot.held_total),
        1.0,
    )
