"""A table simulated event by event, entry by entry: slow, plain, and not the model's code."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ctrace.batch import Batch, TableReading
from ctrace.record import Kind, Reason, Status, empty

NETNS = 4026532000
SECOND = 10**9


@dataclass
class Kernel:
    """TCP connections that linger in TIME_WAIT beside one-way UDP, under a limit."""

    rate: float
    time_wait: float
    seconds: int
    udp_rate: float = 0.0
    udp_timeout: float = 30.0
    limit: int = 1 << 30
    buckets: int = 65536
    seed: int = 0
    looks: int = 0
    """Living entries that are looked at each second."""
    drops: int = 0
    evictions: int = 0
    counts: list[int] = field(default_factory=list)

    def run(self) -> list[Batch]:
        """One batch a second, with the table's count at its end."""
        random = np.random.default_rng(self.seed)
        tries = [(t, 6) for t in random.uniform(0, self.seconds, int(self.rate * self.seconds))]
        tries += [(t, 17) for t in random.uniform(0, self.seconds,
                                                  int(self.udp_rate * self.seconds))]  # fmt: skip
        table: dict[int, tuple[float, int]] = {}
        rows: list[tuple[float, Kind, Reason, int, int, float]] = []
        next_pass, refused_since = 15.0, False

        def collect(now: float) -> float:
            nonlocal refused_since
            for i in [i for i, (expires, _) in table.items() if expires <= now]:
                expires, proto = table.pop(i)
                rows.append((now, Kind.DESTROY, Reason.EXPIRED, proto, i, now - expires))
            while refused_since and len(table) >= self.limit * 0.95:
                i = next(iter(table))
                expires, proto = table.pop(i)
                self.evictions += 1
                rows.append((now, Kind.DESTROY, Reason.GC_PRESSURE, proto, i, now - expires))
            refused_since = False
            left = np.clip([expires - now for expires, _ in table.values()], 1, 300)
            return float(now + np.clip((6000 + left.sum()) / (100 + len(left)), 1, 60))

        for i, (now, proto) in enumerate(sorted(tries)):
            while next_pass <= now:
                next_pass = collect(next_pass)
            while len(self.counts) <= now:
                at = float(len(self.counts))
                for j in random.choice(list(table), min(self.looks, len(table)), replace=False):
                    expires, of = table[int(j)]
                    rows.append((at, Kind.MET, Reason.NONE, of, int(j), at - expires))
                self.counts.append(len(table))
            if len(table) >= self.limit:
                loose = [j for j, (_, p) in table.items() if p == 17]
                buckets = random.poisson(2 * len(loose) / self.buckets, 8)
                found = buckets[buckets > 0][:1]
                if not len(found):
                    self.drops += 1
                    refused_since = True
                    rows.append((now, Kind.DROP, Reason.TABLE_FULL, proto, i, 0.0))
                    continue
                for j in random.choice(loose, min(int(found[0]), len(loose)), replace=False):
                    expires, _ = table.pop(int(j))
                    self.evictions += 1
                    rows.append((now, Kind.DESTROY, Reason.EVICTED, 17, int(j), now - expires))
            table[i] = now + (self.time_wait if proto == 6 else self.udp_timeout), proto
            rows.append((now, Kind.INSERT, Reason.NEW, proto, i, 0.0))
        return self._batches(rows)

    def _batches(self, rows: list[tuple[float, Kind, Reason, int, int, float]]) -> list[Batch]:
        events = empty(len(rows))
        for record, (now, kind, reason, proto, i, overdue) in zip(events, rows, strict=True):
            record["ts"] = int(now * SECOND) + SECOND
            record["kind"], record["reason"], record["proto"] = kind, reason, proto
            record["src"][12:] = np.frombuffer(np.uint32(i // 60000 + 1).tobytes(), "u1")
            record["sport"], record["dport"] = i % 60000, 8063 if proto == 6 else 53
            record["netns"], record["state"] = NETNS, 255 if proto == 17 else 1
            if kind in (Kind.DESTROY, Kind.MET):
                record["overdue_ms"] = round(overdue * 1000)
                seconds = self.time_wait if proto == 6 else self.udp_timeout
                record["timeout_ms"] = round(seconds * 1000)
                if proto == 6:
                    record["state"], record["status"] = 7, int(Status.ASSURED)
        second = np.maximum(events["ts"].astype(np.int64) - 1, 0) // SECOND
        return [
            Batch(
                events[second == n],
                until=n * SECOND + SECOND,
                tables=(TableReading(NETNS, count, self.limit, self.buckets),),
            )
            for n, count in enumerate(self.counts)
        ]
