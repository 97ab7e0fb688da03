"""A recording as OpenMetrics with times, for backfilling Prometheus.

The families are those of a live scrape (:mod:`ctrace.view.export.measures`), so one query
serves both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Optional, TextIO

from ctrace.batch import DUMP, Counts
from ctrace.model import Model
from ctrace.model.tables import counted
from ctrace.names import clean
from ctrace.recording.counters import Counted
from ctrace.recording.derived import Recorded
from ctrace.view.export import measures
from ctrace.view.export.files import Show, done
from ctrace.view.export.measures import Measure

_SECOND = 1_000_000_000
CAUSES_EVERY = 15 * _SECOND
"""Nanoseconds: causes are looked for as often as Prometheus scrapes by default."""
_Points = dict[Measure, dict[str, list[tuple[int, float]]]]


def to_openmetrics(recording: Recorded, out: TextIO, show: Show) -> int:
    """Tables and counters once a second, causes less often; the number of samples.

    The format wants the samples of a family together, and of a label set in the order of
    time, so they are gathered first: some forty bytes a namespace, measure and second.
    """
    total = 0
    for measure, series in _gathered(recording, show).items():
        out.write(f"# TYPE {measure.name} {measure.kind}\n# HELP {measure.name} {measure.text}\n")
        suffix = "_total" if measure.kind == "counter" else ""
        for labels, points in series.items():
            told = {f"{recording.clock.utc(until) / 1e9:.3f}": value for until, value in points}
            for moment, value in told.items():  # a moment has one sample, its last
                out.write(f"{measure.name}{suffix}{{{labels}}} {value} {moment}\n")
            total += len(told)
    out.write("# EOF\n")
    return total


def _gathered(recording: Recorded, show: Show) -> _Points:
    names: dict[int, str] = {}
    lost, due = 0, 0
    host, hooks = _label(recording.header.host), recording.hooks
    points: _Points = {}
    counters = Counted(recording.header)

    def add(measure: Measure, labels: str, until: int, value: float) -> None:
        points.setdefault(measure, {}).setdefault(labels, []).append((until, value))

    def where(netns: int) -> str:
        return f'host="{host}",netns="{_label(names.get(netns, str(netns)))}"'

    def count(until: int, told: Mapping[int, Counts]) -> None:
        if lost or hooks.family != DUMP:
            add(measures.LOST, f'host="{host}"', until, lost)
        for netns, counts in told.items():
            for measure, reason, value in measures.of_counters(counted(counts), hooks):
                labels = f'{where(netns)},reason="{reason}"' if reason else where(netns)
                add(measure, labels, until, value)

    def explain(until: int) -> None:
        for (netns, cause, kind), share in measures.of_causes(model.snapshot(limit=1)).items():
            labels = f'host="{host}",netns="{_label(netns)}",cause="{cause}",kind="{kind}"'
            add(measures.CAUSES, labels, until, share)

    model = Model(recording.hooks, recording.clock, recording.started)
    explained = until = recording.started
    last: Optional[tuple[int, Mapping[int, Counts]]] = None
    for batch in recording.batches():
        until = batch.until
        show(done(recording, until))
        names.update({inum: netns.name for inum, netns in batch.names.netns.items()})
        lost += batch.lost
        model.update(batch)
        told = counters.after(batch)
        for table in batch.tables:
            add(measures.ENTRIES, where(table.netns), batch.until, table.count)
            if table.max_known:
                add(measures.LIMIT, where(table.netns), batch.until, table.max)
        last = batch.until, told
        if batch.until >= due:
            due = batch.until + _SECOND
            count(*last)
            last = None
        if until >= explained + CAUSES_EVERY:
            explained = until
            explain(until)
    if until > explained:
        explain(until)
    if last is not None:  # the totals, also where it ended within a second
        count(*last)
    return points


def _label(text: str) -> str:
    return clean(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
