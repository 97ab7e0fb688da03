"""A Snapshot as OpenMetrics, with a bounded number of label values.

Addresses never become labels unless asked for: what leaves the host by default is
the protocol, the port, the reason and the namespace's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Optional

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST, generate_latest

from ctrace.batch import HookInfo
from ctrace.change.condition import HOLDS, ON_TRIAL, Condition
from ctrace.model.snapshot import Culprit, Snapshot, Table, Victim
from ctrace.view.export import measures
from ctrace.view.export.sums import Sums

__all__ = ["CONTENT_TYPE_LATEST", "Exposition", "LabelBudget"]

OTHER = "other"


class LabelBudget:
    """At most ``limit`` values of a label over the life of the process.

    A monitoring system pays for every value that it ever saw, so the first ones to
    matter keep their names and all later ones share ``other``.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        """The value itself, or ``other`` when the budget is spent."""
        if value in self._known:
            return value
        if len(self._known) < self.limit:
            self._known.add(value)
            return value
        return OTHER


class _Registry:
    """The part of prometheus_client's registry that its exposition calls."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


class Exposition:
    """Turns snapshots (grouped by ``service``) into the text of one scrape.

    ``limit`` bounds the distinct culprits, victims, namespaces and causes each; ``addresses``
    adds the sources of the largest source→service pairs when the snapshot is
    grouped by ``pair``.
    """

    def __init__(self, *, limit: int = 50, addresses: bool = False) -> None:
        self.addresses = addresses
        self._sums: Sums[tuple[measures.Measure, str]] = Sums()
        self._culprit = LabelBudget(limit)
        self._victim = LabelBudget(limit)
        self._netns = LabelBudget(limit)
        self._cause = LabelBudget(limit)

    def text(self, snapshot: Snapshot, changes: Sequence[Condition] = ()) -> bytes:
        """The exposition, UTF-8, ending in ``# EOF``; ``changes``: what ctrace has applied."""
        registry: Any = _Registry([*self.metrics(snapshot), *self._changes(changes)])
        body: bytes = generate_latest(registry)
        return body

    def metrics(self, snapshot: Snapshot) -> Iterator[Metric]:
        """Metric families for one snapshot."""
        yield from self._tables(snapshot.tables, snapshot.hooks)
        yield from self._culprits(snapshot.culprits)
        yield from self._victims(snapshot.victims)
        yield self._causes(snapshot)
        yield from _itself(snapshot)

    def _changes(self, changes: Sequence[Condition]) -> Iterator[Metric]:
        holds = GaugeMetricFamily(
            "ctrace_change_holds",
            "1: what ctrace applied there is whole, or on trial; 0: see ctrace applied.",
            labels=["netns", "state"],
        )
        # several may share ``other``, and a series may be there only once
        for name, state in dict.fromkeys((self._netns(one.name), one.state) for one in changes):
            holds.add_metric([name, state], float(state in (HOLDS, ON_TRIAL)))
        if changes:
            yield holds

    def _tables(self, tables: tuple[Table, ...], hooks: HookInfo) -> Iterator[Metric]:
        entries, limit = (
            GaugeMetricFamily(one.name, one.text, labels=["netns"])
            for one in (measures.ENTRIES, measures.LIMIT)
        )
        buckets = GaugeMetricFamily(
            "ctrace_table_buckets", "Hash buckets, shared by all namespaces.", labels=["netns"]
        )
        pinned = GaugeMetricFamily(
            "ctrace_table_pinned_ratio",
            "Share of entries that are ASSURED, which early_drop never evicts.",
            labels=["netns"],
        )
        to_full = GaugeMetricFamily(
            "ctrace_table_seconds_to_full",
            "Forecast at the present trend; absent when it is not filling.",
            labels=["netns"],
        )
        counters = {
            one: CounterMetricFamily(one.name, one.text, labels=["netns"])
            for one in (measures.INSERTS, measures.DROPS, measures.FAILED)
        }
        counters[measures.DESTROYS] = CounterMetricFamily(
            measures.DESTROYS.name, measures.DESTROYS.text, labels=["netns", "reason"]
        )
        gauges: tuple[tuple[GaugeMetricFamily, str], ...] = (
            (entries, "count"),
            (limit, "max"),
            (buckets, "buckets"),
            (pinned, "pinned"),
            (to_full, "seconds_to_full"),
        )
        # Of tables that share a label the fullest is told: its limit belongs to its entries.
        fullest: dict[str, Table] = {}
        counted: dict[tuple[str, int], dict[tuple[measures.Measure, str], int]] = {}
        for table in tables:
            name = self._netns(table.name)
            if name not in fullest or table.fill > fullest[name].fill:
                fullest[name] = table
            told = measures.of_counters(table.totals, hooks)
            counted[name, table.netns] = {(one, reason): value for one, reason, value in told}
        for name, table in fullest.items():
            for family, field in gauges:
                read: Optional[float] = getattr(table, field)
                if read is not None and (family is not limit or table.max_known):
                    family.add_metric([name], read)
        for name, sums in self._sums.of(counted).items():
            for (measure, reason), value in sums.items():
                counters[measure].add_metric([name, *([reason] if reason else [])], value)
        yield from (entries, limit, buckets, pinned, to_full, *counters.values())

    def _culprits(self, culprits: tuple[Culprit, ...]) -> Iterator[Metric]:
        labels = ["service", "src"] if self.addresses else ["service"]
        held = GaugeMetricFamily(
            "ctrace_culprit_entries", "Entries held now, by service.", labels=labels
        )
        new = GaugeMetricFamily(
            "ctrace_culprit_inserts_per_second", "New entries per second.", labels=labels
        )
        share = GaugeMetricFamily(
            "ctrace_culprit_share_ratio", "Part of all entries held now.", labels=labels
        )
        rows: dict[tuple[str, ...], list[float]] = {}
        for culprit in culprits:
            service = _service(culprit.proto, culprit.port)
            key: tuple[str, ...] = (service, culprit.src) if self.addresses else (service,)
            if self._culprit("\0".join(key)) == OTHER:
                key = (OTHER,) * len(key)
            row = rows.setdefault(key, [0.0, 0.0, 0.0])
            row[0] += culprit.held
            row[1] += culprit.new_per_s
            row[2] += culprit.share
        for key, row in rows.items():
            for family, value in zip((held, new, share), row):
                family.add_metric(key, value)
        yield from (held, new, share)

    def _victims(self, victims: tuple[Victim, ...]) -> Iterator[Metric]:
        refused = GaugeMetricFamily(
            "ctrace_victim_refused_per_second",
            "New flows refused per second because the table was full, by service.",
            labels=["service"],
        )
        rows: dict[str, float] = {}
        for victim in victims:
            name = self._victim(_service(victim.proto, victim.port))
            rows[name] = rows.get(name, 0.0) + victim.drop_per_s
        for name, rate in rows.items():
            refused.add_metric([name], rate)
        yield refused

    def _causes(self, snapshot: Snapshot) -> Metric:
        family = GaugeMetricFamily(
            measures.CAUSES.name, measures.CAUSES.text, labels=["netns", "cause", "kind"]
        )
        rows: dict[tuple[str, ...], float] = {}
        for (netns, cause, kind), share in measures.of_causes(snapshot).items():
            key: tuple[str, ...] = (netns, cause, kind)
            if self._cause("\0".join(key)) == OTHER:
                key = (OTHER,) * len(key)
            rows[key] = max(share, rows.get(key, 0.0))
        for key, share in rows.items():
            family.add_metric(key, share)
        return family


def _service(proto: str, port: Optional[int]) -> str:
    return proto or "any" if not port else f"{proto}/{port}"


def _itself(snapshot: Snapshot) -> Iterator[Metric]:
    yield CounterMetricFamily(measures.LOST.name, measures.LOST.text, value=snapshot.lost)
    yield CounterMetricFamily(
        "ctrace_unseen_inserts",
        "Entries that new namespaces had when they were found; totals lack their inserts.",
        value=snapshot.unseen,
    )
    yield InfoMetricFamily(
        "ctrace_hooks", "How events are captured.", value={"family": snapshot.hooks.family}
    )
    yield GaugeMetricFamily(
        "ctrace_self_cpu_cores", "CPU that ctrace uses, in cores.", value=snapshot.cost.cpu
    )
    yield GaugeMetricFamily(
        "ctrace_self_resident_bytes", "Memory that ctrace uses.", value=snapshot.cost.rss
    )
    off = sum(
        abs(table.off_by.drop) + abs(table.off_by.early_drop) + abs(table.off_by.insert_failed)
        for table in snapshot.tables
    )
    yield GaugeMetricFamily(
        "ctrace_off_by_events",
        "Difference between ctrace's counts and the kernel's own; 0 when they agree.",
        value=off,
    )
