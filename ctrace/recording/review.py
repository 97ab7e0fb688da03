"""One pass over a recording: the contents of a report, including what only hindsight shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Optional

import numpy as np

from ctrace.batch import Batch, Counts
from ctrace.cost.result import Perf
from ctrace.errors import CtraceError
from ctrace.model.model import Model
from ctrace.model.snapshot import OVER_TIME, Snapshot, Table
from ctrace.record import REASONS_OF, Events, Kind, Reason, address_text, proto_name
from ctrace.recording.counters import Counted
from ctrace.recording.derived import Recorded
from ctrace.recording.modelled import model_of

POINTS = 600
"""Points of the time line, at most."""
SHARES = 80
"""Moments at which the culprits' shares are sampled."""
STACKED = 8
"""Culprits shown separately over time; the others are summed up."""
RANKED = 2000
"""Culprits ranked by table-seconds; a report shows the first of them."""
HOLDERS = 50
"""Keys examined at each moment."""
RISEN = 1.005
"""Factor over the last fill examined, from which a new fullest moment is taken."""
BURST_S = 5.0
"""Seconds. Drops farther apart than this belong to different bursts."""

_INSERTS, _DESTROYS = REASONS_OF[Kind.INSERT], REASONS_OF[Kind.DESTROY]
_DROPS, _FAILED = REASONS_OF[Kind.DROP], REASONS_OF[Kind.INSERT_FAILED]


@dataclass
class Timeline:
    """Per point: UTC second at its end, average rates, and the highest fill."""

    ts: list[float] = field(default_factory=list)
    insert: list[float] = field(default_factory=list)
    destroy: list[float] = field(default_factory=list)
    drop: list[float] = field(default_factory=list)
    early_drop: list[float] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    fill: dict[str, list[Optional[float]]] = field(default_factory=dict)
    """By namespace: the highest count / max in the point; None where none was read."""


@dataclass
class Shares:
    """Entries held by the largest culprits over time."""

    ts: list[float] = field(default_factory=list)
    held: list[dict[str, int]] = field(default_factory=list)
    total: list[int] = field(default_factory=list)

    def stacked(self) -> dict[str, list[int]]:
        """The largest by their sum over time, largest first, then ``others``."""
        sums: dict[str, int] = {}
        for moment in self.held:
            for key, value in moment.items():
                sums[key] = sums.get(key, 0) + value
        keys = sorted(sums, key=lambda key: -sums[key])[:STACKED]
        out = {key: [moment.get(key, 0) for moment in self.held] for key in keys}
        shown = [sum(moment.get(key, 0) for key in keys) for moment in self.held]
        out["others"] = [max(0, all_ - part) for all_, part in zip(self.total, shown)]
        return out


@dataclass
class Review:
    """Everything that a report shows."""

    recording: Recorded
    final: Snapshot
    """At the end, culprits by table-seconds."""
    groups: dict[str, Snapshot]
    """The same by other groupings."""
    timeline: Timeline
    groupings: dict[str, Shares]
    """Who held how much over time: by the grouping asked for, by service, by namespace."""
    start: float
    end: float
    events: int
    peak: Optional[Snapshot] = None
    """When a table was fullest."""
    peak_fill: float = 0.0
    before_drop: Optional[Snapshot] = None
    """Just before the first refused flow."""
    first_drop: Optional[float] = None
    first_failed: Optional[float] = None
    """UTC second of the first insert that failed for another reason than a full table."""
    drops: list[float] = field(default_factory=list)
    """UTC seconds of the first drop of each burst."""
    complaint: Optional[tuple[float, str, str]] = None
    """UTC second at which a packet of a process known by name was first refused, the process,
    and where the packet went."""
    measured: dict[str, Perf] = field(default_factory=dict)
    """By host: what conntrack cost there, where it was measured during the recording."""


def review(
    recording: Recorded,
    *,
    group: str = "pair",
    memory: int = 64 << 20,
    show: Callable[[float], None] = lambda _: None,
) -> Review:
    """Run the recording through a model. ``show`` gets the share done, now and then.

    Raises CtraceError when nothing was recorded.
    """
    clock = recording.clock
    model = model_of(recording, memory)
    pass_ = _Pass(recording, model, group)
    events = 0
    for batch in recording.batches():
        pass_.look(batch)
        model.update(batch)
        events += len(batch.events)
        pass_.take(batch)
        show(pass_.done)
    if not pass_.until:
        raise CtraceError(f"{recording.path}: nothing was recorded; {recording.missing}")
    flows = recording.header.flow_filter
    # A single dump tells what is held now, and nothing over time.
    sort = OVER_TIME if recording.hooks.changes else "held"
    final = model.snapshot(group, sort, RANKED, flows)
    pass_.finish(final.tables)
    others = {
        name: model.snapshot(name, sort, RANKED, flows)
        for name in ("service", "src", "process", "container", "netns")
        if name != group
    }
    return Review(
        recording,
        final,
        {group: final, **others},
        pass_.timeline,
        pass_.shares,
        clock.utc(recording.started) / 1e9,
        clock.utc(pass_.until) / 1e9,
        events,
        pass_.peak,
        pass_.peak_fill,
        pass_.before_drop,
        pass_.drops[0] if pass_.drops else None,
        pass_.first_failed,
        pass_.drops,
        pass_.complaint,
        dict(recording.measurements()),  # the last one of a host tells the whole time
    )


def beyond(snapshot: Snapshot, shown: int) -> tuple[int, float]:
    """How many keys come after the first ``shown``, and their share of the table-seconds."""
    first = snapshot.culprits[:shown]
    whole = snapshot.table_seconds_total or 1.0
    share = 1 - sum(culprit.table_seconds for culprit in first) / whole
    return max(0, snapshot.culprits_total - len(first)), max(0.0, share)


class _Pass:
    """What is gathered while the batches go by."""

    def __init__(self, recording: Recorded, model: Model, group: str) -> None:
        self.timeline = Timeline()
        self.shares = {name: Shares() for name in (group, "service", "netns")}
        self.complaint: Optional[tuple[float, str, str]] = None
        self._owners: dict[int, str] = {}
        self.peak: Optional[Snapshot] = None
        self.peak_fill = 0.0
        self.before_drop: Optional[Snapshot] = None
        self.first_failed: Optional[float] = None
        self.drops: list[float] = []
        self.until = 0
        self.done = 0.0
        self._clock = recording.clock
        self._model = model
        self._group = group
        self._start = recording.started
        self._length = max(1, recording.until - recording.started)
        self._step = max(1_000_000_000, self._length // POINTS)
        self._share_step = max(1_000_000_000, self._length // SHARES)
        self._due, self._share_due = self._start + self._step, self._start
        self._at = self._start
        self._sums = np.zeros(16, np.int64)
        self._flows = recording.header.flow_filter
        self._counted = Counted(recording.header)
        self._counts: dict[int, Counts] = {}
        self._lost = 0
        self._fill: dict[str, float] = {}
        self._last_drop = 0
        self._new = np.zeros(16, np.int64)
        self._fullest, self._seen_at = 0, 0.0
        """The namespace with the highest fill so far, and that fill when it was last examined."""

    def look(self, batch: Batch) -> None:
        """Take a snapshot before the model has this batch, if it shows that the moment before
        mattered.

        A snapshot of many namespaces is costly, so there is one where a fill stops rising, and one
        before the first refusal.
        """
        self._new = new = self._counted_in(batch)
        if new[_DROPS].any() and not self.drops and self.until:
            self.before_drop = self._snapshot()
        if self.peak_fill > self._seen_at * RISEN:
            less = new[_DESTROYS].sum() > new[_INSERTS].sum()
            if less or any(
                table.netns == self._fullest and table.count < self.peak_fill * table.max
                for table in batch.tables
            ):
                self._look_at_peak()

    def _look_at_peak(self) -> None:
        self.peak, self._seen_at = self._snapshot(), self.peak_fill

    def take(self, batch: Batch) -> None:
        """Take a batch after the model has it."""
        new = self._new
        self._sums += new
        self._lost += batch.lost
        drops = int(new[_DROPS].sum())
        self._owners |= {key: f"{o.comm}[{o.pid}]" for key, o in batch.names.owners.items()}
        if self.complaint is None:
            self.complaint = self._complained(batch.events)
        if self.first_failed is None and new[_FAILED].any():
            self.first_failed = self._clock.utc(batch.until) / 1e9
        if drops:
            if batch.until - self._last_drop > BURST_S * 1e9 or not self.drops:
                self.drops.append(self._clock.utc(batch.until) / 1e9)
            self._last_drop = batch.until
        self._read_tables(batch)
        self.until = max(self.until, batch.until)
        self.done = min(1.0, (batch.until - self._start) / self._length)
        if batch.until >= self._due:
            self._point()
        if batch.until >= self._share_due:
            self._share_due = batch.until + self._share_step
            self._share()

    def finish(self, tables: tuple[Table, ...]) -> None:
        """The last, shorter point, and what the tables hold at the end: counted since the last
        reading, so it may be the most of all."""
        for table in tables:
            if table.read and table.max:
                self._see_fill(table.netns, table.fill)
        if self.until > self._at:
            self._point()
        else:
            self._put_fills()
        if self.peak_fill > self._seen_at * RISEN:
            self._look_at_peak()
        last = self.shares[self._group].ts
        if last and last[-1] < self._clock.utc(self.until) / 1e9:
            self._share()

    def _share(self) -> None:
        """Who holds how much now, by each grouping. Alike keys of namespaces are told apart."""
        counts = self._model.counts()
        for name, shares in self.shares.items():
            held: dict[str, int] = {}
            if name == "netns":  # as the kernel counts
                held = {name: count for name, count in counts.items() if count}
            else:
                for key, where, entries in self._model.held_by(name, HOLDERS):
                    apart = f" in {where}" if len(counts) > 1 and where else ""
                    if entries > 0:
                        held[key + apart] = entries
            shares.ts.append(self._clock.utc(self.until) / 1e9)
            shares.held.append(held)
            shares.total.append(max(sum(counts.values()), sum(held.values())))

    def _complained(self, events: Events) -> Optional[tuple[float, str, str]]:
        """The first packet among these that was refused to a process of known name."""
        refused = events[(events["kind"] == int(Kind.DROP)) & (events["owner"] != 0)]
        for one in refused[:100]:
            process = self._owners.get(int(one["owner"]))
            if process is not None:
                flow = f"{proto_name(int(one['proto']))} to {address_text(one['dst'])}"
                port = f":{int(one['dport'])}" if one["dport"] else ""
                return self._clock.utc(int(one["ts"])) / 1e9, process, flow + port
        return None

    def _snapshot(self) -> Snapshot:
        return self._model.snapshot(
            group=self._group, sort="held", limit=HOLDERS, filter_text=self._flows
        )

    def _counted_in(self, batch: Batch) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """What happened since the batch before, by reason: from the exact counters if any."""
        told = self._counted.after(batch)
        if not told:
            if self._counts:
                return np.zeros(16, np.int64)
            return np.bincount(batch.events["reason"], minlength=16)[:16].astype(np.int64)
        new = np.zeros(16, np.int64)
        for netns, counts in told.items():
            new += counts.astype(np.int64)
            if netns in self._counts:
                new -= self._counts[netns].astype(np.int64)
        self._counts = dict(told)
        return np.maximum(new, 0)

    def _read_tables(self, batch: Batch) -> None:
        for table in batch.tables:
            if table.max:
                self._see_fill(table.netns, table.count / table.max)

    def _see_fill(self, netns: int, fill: float) -> None:
        self._fill[str(netns)] = max(self._fill.get(str(netns), 0.0), fill)
        if fill > self.peak_fill:
            self.peak_fill, self._fullest = fill, netns

    def _put_fills(self) -> None:
        """Add the fills seen since to the last point, which may have some already."""
        line = self.timeline
        for name, fill in self._fill.items():
            values = line.fill.setdefault(name, [None] * len(line.ts))
            values[-1] = max(fill, values[-1] or 0.0)
        self._fill = {}

    def _point(self) -> None:
        line, seconds = self.timeline, (self.until - self._at) / 1e9
        line.ts.append(self._clock.utc(self.until) / 1e9)
        line.insert.append(float(self._sums[_INSERTS].sum()) / seconds)
        line.destroy.append(float(self._sums[_DESTROYS].sum()) / seconds)
        line.drop.append(float(self._sums[_DROPS].sum()) / seconds)
        line.early_drop.append(float(self._sums[Reason.EVICTED]) / seconds)
        line.lost.append(self._lost)
        for values in line.fill.values():
            values.append(None)
        self._put_fills()
        self._lost = 0
        self._sums[:] = 0
        self._at = self.until
        self._due = self.until + self._step
