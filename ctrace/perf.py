"""One measurement: timers and samples from the kernel, arithmetic, one answer."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from ctrace.batch import TableReading
from ctrace.capture import open_live
from ctrace.capture.sampling import Sampler, stacks
from ctrace.capture.timing import Objects, Timing, active
from ctrace.errors import CtraceError
from ctrace.filters import Filter
from ctrace.host import netns
from ctrace.host.symbols import Symbols
from ctrace.host.tables import TableReader
from ctrace.model import perf as model
from ctrace.record import Kind, Reason, proto_name


def measure(
    duration: float,
    hertz: int,
    names: Symbols,
    *,
    drops: bool = False,
    pause: Callable[[float], None] = time.sleep,
) -> tuple[model.Perf, list[str]]:
    """Measure for ``duration`` seconds; the answer, and the folded stacks.

    ``drops`` samples the stacks of refused packets instead of the CPU clock.
    Raises CtraceError when nothing can be measured.
    """
    spaces = active(netns.find())
    blind: list[str] = []
    lag, blind_lag = _collector()
    objects = Objects()
    try:
        with Timing(objects, spaces) as timing, TableReader() as reader:
            if drops:
                timing.stacks_of_drops()
                sampler = None
            else:
                sampler = _sampler(objects, hertz, blind)
            before = {row.netns: row for row in reader.read(spaces)}
            started = time.monotonic()
            overdue = lag(duration, pause)
            passed = time.monotonic() - started
            if sampler is not None:
                sampler.close()
            times = timing.read()
            seen = stacks(objects)
            tables = _tables(before, reader.read(spaces), {s.inum: s.name for s in spaces})
            family, unseen = timing.family, timing.blind
    finally:
        objects.close()
    cost, latencies = model.latencies(times)
    total, share, busy, hot = model.cpu([] if drops else seen, names.name, names.is_conntrack)
    blind += [*unseen, *blind_lag]
    if family == "netfilter" and not drops:
        blind.append("time in early_drop scans: its function cannot be traced here")
    answer = model.Perf(
        duration_s=passed,
        family=family,
        cost_ns=cost,
        latencies=latencies,
        services=model.service_costs(times, cost, passed, proto_name),
        cpu_share=share,
        samples=total,
        busy_share=busy,
        hot=hot,
        tables=tables,
        gc_lag=model.gc_lag(overdue),
        expired=len(overdue),
        drop_stacks=model.drop_stacks(seen, names.name) if drops else (),
        blind=tuple(dict.fromkeys(blind)),
    )
    return answer, model.folded(seen, names.name)


def _sampler(objects: Objects, hertz: int, blind: list[str]) -> Sampler | None:
    try:
        return Sampler(objects, hertz)
    except (CtraceError, OSError) as error:
        blind.append(f"CPU share: {error}")
        return None


Overdue = np.ndarray[tuple[int], np.dtype[np.int32]]


def _collector() -> tuple[Callable[[float, Callable[[float], None]], Overdue], list[str]]:
    """Waits out the measurement while reading expired entries' lag, where that is possible."""
    try:
        source = open_live(Filter(kinds=frozenset({Kind.DESTROY})), seed=False)
    except CtraceError as error:

        def only_wait(duration: float, pause: Callable[[float], None]) -> Overdue:
            pause(duration)
            return np.zeros(0, np.int32)

        return only_wait, [f"collection lag: {error}"]

    def watch(duration: float, _pause: Callable[[float], None]) -> Overdue:
        found = []
        deadline = time.monotonic() + duration
        try:
            for batch in source.batches(min(0.5, duration)):
                expired = batch.events["reason"] == Reason.EXPIRED
                found.append(batch.events["overdue_ms"][expired])
                if time.monotonic() >= deadline:
                    break
        finally:
            source.close()
        return np.concatenate(found) if found else np.zeros(0, np.int32)

    unseen = [] if source.hooks.family != "netlink" else ["collection lag: netlink cannot tell"]
    return watch, unseen


def _tables(
    before: dict[int, TableReading], after: tuple[TableReading, ...], names: dict[int, str]
) -> tuple[model.HashTable, ...]:
    found = []
    for row in after:
        earlier = before.get(row.netns)
        if earlier is None or not (row.count or earlier.count):
            continue
        change = {name: value - earlier.stats.get(name, 0) for name, value in row.stats.items()}
        found.append(
            model.hash_table(names.get(row.netns, str(row.netns)), row.count, row.buckets, change)
        )
    return tuple(found)
