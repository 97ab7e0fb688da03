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
    later: tuple[float, int] = (float("inf"), 0)
    """A second, and what the limit is from then on."""
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
        loose: dict[int, None] = {}  # those of them that may be evicted
        rows: list[tuple[float, Kind, Reason, int, int, float]] = []
        next_pass, refused_since = 15.0, False

        def collect(now: float) -> float:
            nonlocal refused_since
            for i in [i for i, (expires, _) in table.items() if expires <= now]:
                expires, proto = table.pop(i)
                loose.pop(i, None)
                rows.append((now, Kind.DESTROY, Reason.EXPIRED, proto, i, now - expires))
            while refused_since and len(table) >= self.limit_at(now) * 0.95:
                i = next(iter(table))
                expires, proto = table.pop(i)
                loose.pop(i, None)
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
            if len(table) >= self.limit_at(now):
                buckets = random.poisson(2 * len(loose) / self.buckets, 8)
                found = buckets[buckets > 0][:1]
                if not len(found):
                    self.drops += 1
                    refused_since = True
                    rows.append((now, Kind.DROP, Reason.TABLE_FULL, proto, i, 0.0))
                    continue
                for j in random.choice(list(loose), min(int(found[0]), len(loose)), replace=False):
                    expires, _ = table.pop(int(j))
                    del loose[int(j)]
                    self.evictions += 1
                    rows.append((now, Kind.DESTROY, Reason.EVICTED, 17, int(j), now - expires))
            table[i] = now + (self.time_wait if proto == 6 else self.udp_timeout), proto
            if proto == 17:
                loose[i] = None
            rows.append((now, Kind.INSERT, Reason.NEW, proto, i, 0.0))
        return self._batches(rows)

    def limit_at(self, now: float) -> int:
        since, changed = self.later
        return changed if now >= since else self.limit

    def _batches(self, rows: list[tuple[float, Kind, Reason, int, int, float]]) -> list[Batch]:
        events = empty(len(rows))
        now, kind, reason, proto, number, overdue = (np.array(column) for column in zip(*rows))
        tcp, n = proto == 6, number.astype(np.int64)
        events["ts"] = (now * SECOND).astype(np.int64) + SECOND
        events["kind"], events["reason"], events["proto"] = kind, reason, proto
        events["src"][:, 12:] = (n // 60000 + 1).astype("<u4").view("u1").reshape(-1, 4)
        events["sport"], events["dport"] = n % 60000, np.where(tcp, 8063, 53)
        events["netns"], events["state"] = NETNS, np.where(tcp, 1, 255)
        known = (kind == Kind.DESTROY) | (kind == Kind.MET)
        seconds = np.where(tcp, self.time_wait, self.udp_timeout)
        events["overdue_ms"] = np.where(known, np.round(overdue * 1000), 0)
        events["timeout_ms"] = np.where(known, np.round(seconds * 1000), 0)
        events["state"][known & tcp], events["status"][known & tcp] = 7, int(Status.ASSURED)
        second = np.maximum(events["ts"].astype(np.int64) - 1, 0) // SECOND
        return [
            Batch(
                events[second == n],
                until=n * SECOND + SECOND,
                tables=(TableReading(NETNS, count, self.limit_at(n), self.buckets),),
            )
            for n, count in enumerate(self.counts)
        ]
