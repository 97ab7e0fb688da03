"""Snapshots, and what a scrape says of them by name and labels."""

from __future__ import annotations

from prometheus_client.openmetrics.parser import text_string_to_metric_families

from ctrace.batch import HookInfo, SelfCost
from ctrace.model.snapshot import Counted, Culprit, Snapshot, Table, Victim


def snapshot(culprits: int = 3) -> Snapshot:
    return Snapshot(
        ts=0,
        host="h",
        interval_s=1.0,
        uptime_s=60.0,
        hooks=HookInfo("netfilter"),
        group="service",
        sort="held",
        lost=7,
        unseen=3,
        tables=(
            Table(
                netns=1,
                name="init",
                count=900,
                max=1000,
                buckets=512,
                totals=Counted(insert=100, destroy=50, drop=4, early_drop=10, expired=30),
                seconds_to_full=12.5,
            ),
        ),
        culprits=tuple(
            Culprit(key=f"tcp/{port}", proto="tcp", port=port, src="192.0.2.9", held=10, share=0.1)
            for port in range(8000, 8000 + culprits)
        ),
        victims=(
            Victim("v", "udp", "192.0.2.1", "192.0.2.2", 53, 1, drops=4, drop_per_s=2.0),
            Victim("w", "udp", "192.0.2.3", "192.0.2.2", 53, 1, drops=4, drop_per_s=1.0),
        ),
        cost=SelfCost(0.02, 40 << 20),
    )


def values(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }
