"""What connection tracking costs: arithmetic on histograms, samples and counters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

POINTS: Final = (
    "cost",
    "in new",
    "in established",
    "in other",
    "confirm",
    "early_drop",
    "gc_worker",
)
"""``enum point`` in bpf/perf.c."""
PROTOCOLS: Final = ("tcp", "udp", "other")
BINS: Final = 128
"""Four to each power of two of nanoseconds; see :func:`edges`."""

QUANTILES: Final = (0.5, 0.9, 0.99, 0.999, 0.9999)
RELATIVE_ERROR: Final = 0.125
"""Half a bin's width over its middle: the error of a percentile."""

IDLE: Final = (
    "default_idle", "pv_native_safe_halt", "native_safe_halt", "acpi_safe_halt", "mwait_idle",
    "intel_idle", "acpi_idle_do_entry", "poll_idle", "arch_cpu_idle", "default_idle_call",
    "cpuidle_enter_state", "do_idle", "haltpoll_enter_idle", "cpu_idle_poll",
)  # fmt: skip
"""Innermost functions of an idle CPU."""


LOCKING: Final = re.compile(
    r"(__)?(traceiter|probestub|bpf_trace|bpf_prog|pv_|native_queued|queued_spin|_raw_spin|raw_spin"
    r"|do_raw_spin|rt_spin|rtlock)"
)
"""Code between the function that wants a lock and the tracepoint."""
SPINNING: Final = "queued_spin_lock_slowpath"
"""The end of the names of functions that wait for a spin lock."""


@dataclass(frozen=True)
class Times:
    """Cumulative histograms as read from the kernel."""

    bins: npt.NDArray[np.uint64]
    """(points, protocols, bins)."""
    services: npt.NDArray[np.uint32]
    """protocol << 16 | port, one per service."""
    totals: npt.NDArray[np.uint64]
    """(services, 2): packets, nanoseconds."""


@dataclass(frozen=True)
class Stack:
    """One kernel stack, innermost address first, and how often it was seen."""

    frames: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class Latency:
    """Time that packets spent at one point, nanoseconds, measuring cost subtracted."""

    point: str
    proto: str
    packets: int
    mean: float
    percentiles: tuple[float, ...]
    """p50, p90, p99, p99.9, p99.99, each accurate to 12.5 %."""


@dataclass(frozen=True)
class ServiceCost:
    """What one service's packets cost in conntrack's hook."""

    proto: str
    port: int
    packets_per_s: float
    ns_per_packet: float
    cores: float
    """CPU seconds a second that NOTRACK on it would save in the hook."""


@dataclass(frozen=True)
class Hot:
    """One function by samples."""

    function: str
    share: float
    """Of all CPU time, idle included."""


@dataclass(frozen=True)
class HashTable:
    """The hash table and what look-ups in it encountered, over the time measured."""

    netns: str
    count: int
    buckets: int
    load: float
    """Expected chain length: two nodes an entry over buckets."""
    chain_p99: int
    """99th percentile of chain length if hashing is even (Poisson)."""
    search_restart: int
    chaintoolong: int
    clash_resolve: int


@dataclass(frozen=True)
class Chains:
    """Lengths of the hash table's chains as found; the table serves all namespaces."""

    buckets: int
    measured: int
    """Buckets walked, evenly spaced over the table."""
    disturbed: int
    """Buckets left out because entries moved while they were walked."""
    lengths: tuple[int, ...]
    """Chains by length, from 0; the 256th counts all longer ones too."""
    mean: float
    p99: int
    longest: int
    expected_p99: int
    """The same if hashing were even (Poisson), with this mean."""


@dataclass(frozen=True)
class Wait:
    """Waiting for one of conntrack's locks, at one place."""

    lock: str
    count: int
    total_ns: int
    longest_ns: int
    stack: str
    """Outermost first, joined by ``;``; ends with the function that wants the lock."""


@dataclass(frozen=True)
class Perf:
    """The whole answer of ``ctrace perf``."""

    duration_s: float
    family: str
    """The family that timed packets; empty: they were not timed."""
    cost_ns: Optional[float]
    """Median overhead of the measurement for one packet; already subtracted."""
    latencies: tuple[Latency, ...]
    services: tuple[ServiceCost, ...]
    cpu_share: Optional[float]
    """Samples with a conntrack function anywhere in the stack, over all samples."""
    samples: int
    busy_share: Optional[float]
    hot: tuple[Hot, ...]
    tables: tuple[HashTable, ...]
    gc_lag: tuple[float, ...]
    """Seconds from timeout to removal of expired entries: p50, p90, p99; empty: none seen."""
    expired: int
    chains: Optional[Chains] = None
    waits: Optional[tuple[Wait, ...]] = None
    """Waits for conntrack's locks, the costliest first; None: not measured."""
    stacks_of: str = ""
    """insert, drop or evict: the event that ``stacks`` were taken at."""
    stacks: tuple[tuple[str, int], ...] = ()
    """The most frequent ones, outermost function first, joined by ``;``."""
    sampled_stacks: tuple[tuple[str, int], ...] = ()
    """The most frequent ones by the CPU clock that pass through conntrack, as ``stacks``."""
    gc_share: Optional[float] = None
    """Share of all CPU time spent in the collector (gc_worker)."""
    waiting_share: Optional[float] = None
    """Share of all CPU time spent spinning for conntrack's locks; tracepoints miss a lock's first
    waiter."""
    lost_samples: int = 0
    """Stacks that the kernel had no room for; not in ``samples``."""
    blind: tuple[str, ...] = ()
    """What could not be measured here, and why."""


def edges() -> npt.NDArray[np.float64]:
    """Lower edges of the bins in nanoseconds, and the upper edge of the last: 129 values."""
    exponent, part = np.divmod(np.arange(BINS), 4)
    lower = np.exp2(exponent) * (1 + part / 4)
    # Below 4 ns a power of two has no quarters: its first bin takes all of it.
    lower[:8] = (0, 2, 2, 2, 2, 4, 4, 4)
    return np.append(lower, 2.0**32)


def quantile(counts: npt.NDArray[np.uint64], q: float) -> float:
    """The q-quantile in nanoseconds: the middle of its bin. 0 for an empty histogram."""
    total = int(counts.sum())
    if not total:
        return 0.0
    at = int(np.searchsorted(np.cumsum(counts), q * total, side="left"))
    bounds = edges()
    return float((bounds[at] + bounds[min(at + 1, BINS)]) / 2)


def mean(counts: npt.NDArray[np.uint64]) -> float:
    """The mean in nanoseconds, each observation at the middle of its bin."""
    bounds = edges()
    middles = (bounds[:-1] + bounds[1:]) / 2
    total = int(counts.sum())
    return float((counts * middles).sum() / total) if total else 0.0


def latencies(times: Times) -> tuple[Optional[float], tuple[Latency, ...]]:
    """The median measuring cost, and a Latency for each point and protocol with packets."""
    cost_bins = times.bins[0].sum(axis=0)
    cost = quantile(cost_bins, 0.5) if cost_bins.any() else None
    spent = cost or 0.0
    found = []
    for point, by_proto in zip(POINTS[1:], times.bins[1:]):
        for proto, counts in zip(PROTOCOLS, by_proto):
            if not counts.any():
                continue
            found.append(
                Latency(
                    point,
                    proto,
                    int(counts.sum()),
                    max(0.0, mean(counts) - spent),
                    tuple(max(0.0, quantile(counts, q) - spent) for q in QUANTILES),
                )
            )
    return cost, tuple(found)


def service_costs(
    times: Times, cost: Optional[float], duration: float, name: Callable[[int], str]
) -> tuple[ServiceCost, ...]:
    """The most expensive services first."""
    found = []
    for key, (packets, ns) in zip(times.services.tolist(), times.totals.tolist()):
        each = max(0.0, ns / packets - (cost or 0.0)) if packets else 0.0
        rate = packets / duration
        found.append(ServiceCost(name(key >> 16), key & 0xFFFF, rate, each, each * rate / 1e9))
    return tuple(sorted(found, key=lambda service: -service.cores)[:20])


def cpu(
    stacks: Iterable[Stack], name: Callable[[int], str], is_conntrack: Callable[[int], bool]
) -> tuple[int, Optional[float], Optional[float], tuple[Hot, ...]]:
    """(samples, conntrack's share, busy share, its functions by samples)."""
    total = ours = idle = 0
    functions: dict[str, int] = {}
    for stack in stacks:
        total += stack.count
        if stack.frames and name(stack.frames[0]) in IDLE:
            idle += stack.count
        inside = [address for address in stack.frames if is_conntrack(address)]
        if inside:
            ours += stack.count
            innermost = name(inside[0])
            functions[innermost] = functions.get(innermost, 0) + stack.count
    if not total:
        return 0, None, None, ()
    hot = sorted(functions.items(), key=lambda item: -item[1])[:12]
    return (
        total,
        ours / total,
        1 - idle / total,
        tuple(Hot(function, count / total) for function, count in hot),
    )


def gc_share(stacks: Sequence[Stack], name: Callable[[int], str]) -> Optional[float]:
    """Of all samples, those with the collector in their stack; None without samples."""
    total = sum(stack.count for stack in stacks)
    inside = sum(s.count for s in stacks if any(name(at) == "gc_worker" for at in s.frames))
    return inside / total if total else None


def who_waits(frames: tuple[int, ...], name: Callable[[int], str]) -> tuple[int, ...]:
    """A stack from the code that wants a lock outwards."""
    for depth, address in enumerate(frames):
        if not LOCKING.match(name(address)):
            return frames[depth:]
    return ()


def waiting_share(
    stacks: Sequence[Stack], name: Callable[[int], str], is_conntrack: Callable[[int], bool]
) -> Optional[float]:
    """Of all samples, those that spin for a lock that conntrack's code wants."""
    total = sum(stack.count for stack in stacks)
    found = 0
    for stack in stacks:
        if stack.frames and name(stack.frames[0]).endswith(SPINNING):
            wanted = who_waits(stack.frames, name)
            found += stack.count if wanted and is_conntrack(wanted[0]) else 0
    return found / total if total else None


def folded(stacks: Iterable[Stack], name: Callable[[int], str]) -> list[str]:
    """Lines for flame-graph viewers: outermost;...;innermost count."""
    lines: dict[str, int] = {}
    for stack in stacks:
        text = ";".join(name(address) for address in reversed(stack.frames)) or "[user]"
        lines[text] = lines.get(text, 0) + stack.count
    return [f"{text} {count}" for text, count in sorted(lines.items())]


def hash_table(netns: str, count: int, buckets: int, stats: Mapping[str, int]) -> HashTable:
    """The table's load, with the Poisson chain length that even hashing would give."""
    load = 2 * count / buckets if buckets else 0.0
    return HashTable(
        netns,
        count,
        buckets,
        load,
        poisson_p99(load),
        stats.get("search_restart", 0),
        stats.get("chaintoolong", 0),
        stats.get("clash_resolve", 0),
    )


def poisson_p99(mean: float) -> int:
    """The 99th percentile of a Poisson distribution, up to 1000."""
    found, term = 0, float(np.exp(-mean))
    total = term
    while total < 0.99 and found < 1000:
        found += 1
        term *= mean / found
        total += term
    return found


def chains(buckets: int, counts: npt.NDArray[np.int64], disturbed: int) -> Chains:
    """Statistics from the number of chains of each length."""
    measured = int(counts.sum())
    longest = int(np.flatnonzero(counts)[-1]) if measured else 0
    average = float((counts * np.arange(len(counts))).sum() / measured) if measured else 0.0
    p99 = int(np.searchsorted(np.cumsum(counts), 0.99 * measured)) if measured else 0
    lengths = tuple(counts[: longest + 1].tolist())
    expected = poisson_p99(average)
    return Chains(buckets, measured, disturbed, lengths, average, p99, longest, expected)


def gc_lag(overdue_ms: npt.NDArray[np.int32]) -> tuple[float, ...]:
    """p50, p90, p99 of seconds between an entry's timeout and its removal."""
    if not len(overdue_ms):
        return ()
    return tuple(float(q) / 1000 for q in np.quantile(overdue_ms, (0.5, 0.9, 0.99)))


def top_stacks(
    stacks: Iterable[Stack], name: Callable[[int], str], limit: int = 10
) -> tuple[tuple[str, int], ...]:
    """The most frequent stacks by function."""
    found: dict[str, int] = {}
    for stack in stacks:
        text = ";".join(name(address) for address in reversed(stack.frames))
        found[text] = found.get(text, 0) + stack.count
    return tuple(sorted(found.items(), key=lambda item: -item[1])[:limit])
