"""One measurement: timers, samples and counters from the kernel, arithmetic, one answer.

Each part stands alone: what this kernel cannot give is named in the answer, and the
rest goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Optional, Protocol, TypeVar

import numpy as np

from ctrace.batch import Batch, TableReading
from ctrace.capture import open_live
from ctrace.cost import chains
from ctrace.cost import result as model
from ctrace.cost.contention import Contention
from ctrace.cost.objects import Objects
from ctrace.cost.sampling import Sampler, What, stacks
from ctrace.cost.timing import Timing, active
from ctrace.errors import CtraceError, UsageError
from ctrace.filters import Filter
from ctrace.host import netns
from ctrace.host.tables import TableReader
from ctrace.kernel.symbols import Symbols, is_tracer
from ctrace.record import Events, Kind, Reason, proto_name

KEPT: Final = 1 << 18
"""Delays of expired entries that are kept, an even sample of all."""

HERTZ: Final = 199
"""Samples per second on each CPU: not a multiple of any usual tick."""
SHOWN_STACKS: Final = 30
FOLLOW_S: Final = 2.0
ANSWER_S: Final = 60.0

Part = TypeVar("Part")


class Measurement:
    """Measures from its creation until closed; :meth:`answer` reports the result so far."""

    def __init__(
        self,
        names: Symbols,
        hertz: int = HERTZ,
        *,
        stacks_of: str = "",
        family: Optional[str] = None,
    ) -> None:
        """Attach. ``stacks_of`` insert, drop or evict samples those instead of the clock.

        Raises CtraceError when nothing can be measured here.
        """
        self._names = names
        self._stacks_of = stacks_of
        self._blind: list[str] = []
        self._overdue: list[np.ndarray[tuple[int], np.dtype[np.int32]]] = []
        self._expired, self._every, self._held = 0, 1, 0
        self._spaces = active(netns.find())
        self._reader = TableReader()
        self._timing: Optional[Timing] = None
        self._waits: Optional[Contention] = None
        self._sampler: Optional[Sampler] = None
        self._objects = self._part("all but the tables' counters", Objects)
        try:
            if self._objects is not None:
                self._attach(self._objects, hertz, family)
            self._before = {row.netns: row for row in self._reader.read(self._spaces)}
            if not self._before and self._timing is None and self._sampler is None:
                raise CtraceError("nothing can be measured: " + "; ".join(self._blind))
        except BaseException:
            self.close()
            raise
        self._started = time.monotonic()

    def _attach(self, objects: Objects, hertz: int, family: Optional[str]) -> None:
        names, event = self._names, self._stacks_of
        timing = self._timing = self._part(
            "time in conntrack",
            lambda: Timing(objects, self._spaces, family, for_stacks=bool(event)),
        )
        self._waits = self._part("waits for conntrack's locks", lambda: Contention(objects, names))
        if not event:
            self._sampler = self._part("CPU share", lambda: Sampler(objects, hertz))
        elif timing is not None:
            self._part(f"stacks of {event}s", lambda: timing.stacks_of(event, names))

    def _part(self, what: str, begin: Callable[[], Part]) -> Optional[Part]:
        try:
            return begin()
        except UsageError:
            raise
        except (CtraceError, OSError) as error:
            self._blind.append(f"{what}: {error}")
            return None

    def __enter__(self) -> Measurement:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Detach everything; safe to call twice."""
        if self._sampler is not None:
            self._sampler.close()
        if self._timing is not None:
            self._timing.close()
        if self._objects is not None:
            self._objects.close()
        self._reader.close()

    def follow(self) -> None:
        """Time namespaces that are new, and release those that have gone."""
        self._spaces = active(netns.find())
        if self._timing is not None:
            self._timing.follow(self._spaces)

    def take(self, events: Events) -> None:
        """Learn from captured events how late expired entries are collected."""
        expired = events["overdue_ms"][events["reason"] == Reason.EXPIRED]
        self._expired += len(expired)
        part = expired[:: self._every]
        if len(part):
            self._overdue.append(part)
            self._held += len(part)
        if self._held > KEPT:
            kept = np.concatenate(self._overdue)[::2]
            self._overdue, self._held, self._every = [kept], len(kept), 2 * self._every

    @property
    def hands_off(self) -> bool:
        """Whether other hooks would spoil the measurement."""
        return self._timing is not None and self._timing.hands_off

    def unseen(self, sentence: str) -> None:
        """Note one more thing that cannot be measured here."""
        self._blind.append(sentence)

    # -- what was found ---------------------------------------------------------------------

    def answer(self) -> model.Perf:
        """All of it, over the time until now."""
        passed = time.monotonic() - self._started
        self._names.learn_programs()
        blind = list(self._blind)
        cost: Optional[float] = None
        latencies: tuple[model.Latency, ...] = ()
        services: tuple[model.ServiceCost, ...] = ()
        if self._timing is not None:
            times = self._timing.read()
            cost, latencies = model.latencies(times)
            services = model.service_costs(times, cost, passed, proto_name)
            blind += self._timing.blind
        clock, lost = self._stacks()
        samples, share, busy, hot = model.cpu(clock, self._names.name, self._names.is_conntrack)
        readings = self._reader.read(self._spaces)
        waits = self._waits.read() if self._waits is not None else None
        if self._waits is not None and self._waits.unplaced:
            blind.append(f"{self._waits.unplaced} waits for some lock: no room for their stacks")
        return model.Perf(
            duration_s=passed,
            family=self._timing.family if self._timing is not None else "",
            cost_ns=cost,
            latencies=latencies,
            services=services,
            cpu_share=share,
            samples=samples,
            busy_share=busy,
            hot=hot,
            tables=self._tables(readings),
            gc_lag=model.gc_lag(np.concatenate([np.zeros(0, np.int32), *self._overdue])),
            expired=self._expired,
            sampled_stacks=model.top_stacks(
                (s for s in clock if any(map(self._names.is_conntrack, s.frames))),
                self._names.name,
                SHOWN_STACKS,
            ),
            gc_share=model.gc_share(clock, self._names.name),
            chains=self._chains(readings, blind),
            waits=waits,
            waiting_share=model.waiting_share(clock, self._names.name, self._names.is_conntrack),
            stacks_of=self._stacks_of,
            stacks=model.top_stacks(self._event_stacks(), self._names.name),
            lost_samples=lost,
            blind=tuple(dict.fromkeys(blind)),
        )

    def folded(self) -> list[str]:
        """Stacks as lines for flame-graph viewers."""
        found = self._event_stacks() if self._stacks_of else self._stacks()[0]
        return model.folded(found, self._names.name)

    def _stacks(self, what: What = What.CLOCK) -> tuple[list[model.Stack], int]:
        return stacks(self._objects, what) if self._objects is not None else ([], 0)

    def _event_stacks(self) -> list[model.Stack]:
        """The stacks without the frames of the measurement itself."""
        if not self._stacks_of:
            return []
        name = self._names.name
        found, _ = self._stacks(What[self._stacks_of.upper()])
        if self._stacks_of == "evict":  # at a tracepoint other early deletions are seen too
            found = [s for s in found if any(name(at) == "early_drop" for at in s.frames)]
        inside = [
            model.Stack(tuple(at for at in s.frames if not is_tracer(name(at))), s.count)
            for s in found
        ]
        if self._stacks_of != "drop" or self._timing is None or self._timing.family == "netfilter":
            return inside
        # Taken at the entry of early_drop: where a trampoline is jumped to, not called (as on
        # 7.2), the function itself is not on the stack.
        place = self._names.range("early_drop")
        return [
            s
            if place is None or any(name(at) == "early_drop" for at in s.frames)
            else model.Stack((place[0], *s.frames), s.count)
            for s in inside
        ]

    def _chains(
        self, readings: tuple[TableReading, ...], blind: list[str]
    ) -> Optional[model.Chains]:
        if self._objects is None:
            return None
        buckets = max((row.buckets for row in readings), default=0)
        entries = self._timing.entries() if self._timing is not None else []
        try:
            return chains.measure(buckets, self._names.data("nf_conntrack_hash"), entries)
        except CtraceError as error:
            blind.append(f"chain lengths: {error}")
            return None

    def _tables(self, after: tuple[TableReading, ...]) -> tuple[model.HashTable, ...]:
        names = {space.inum: space.name for space in self._spaces}
        found = []
        for row in after:
            earlier = self._before.get(row.netns)
            if earlier is None or not (row.count or earlier.count):
                continue
            change = {name: value - earlier.stats.get(name, 0) for name, value in row.stats.items()}
            name = names.get(row.netns, str(row.netns))
            found.append(model.hash_table(name, row.count, row.buckets, change))
        return tuple(found)


class Sink(Protocol):
    """A recording that is being made."""

    def measurement(self, host: str, perf: model.Perf) -> None:
        """Take a measurement of what conntrack cost so far."""


class Beside:
    """Measures while a recording is made: the answer goes into it each minute and at its end."""

    def __init__(self, measurement: Measurement, host: str) -> None:
        self._measurement = measurement
        self._host = host
        self._followed = self._answered = time.monotonic()

    def take(self, batch: Batch, sink: Sink) -> None:
        """After each batch."""
        self._measurement.take(batch.events)
        now = time.monotonic()
        if now - self._followed >= FOLLOW_S:
            self._followed = now
            self._measurement.follow()
        if now - self._answered >= ANSWER_S:
            self._answered = now
            self.end(sink)

    def end(self, sink: Sink) -> None:
        """The answer until now."""
        sink.measurement(self._host, self._measurement.answer())


def measure(
    duration: float,
    hertz: int,
    names: Symbols,
    *,
    stacks_of: str = "",
    family: Optional[str] = None,
) -> tuple[model.Perf, list[str]]:
    """Measure for ``duration`` seconds; the answer, and the folded stacks.

    Raises CtraceError when nothing can be measured.
    """
    with Measurement(names, hertz, stacks_of=stacks_of, family=family) as measurement:
        _wait(measurement, duration)
        return measurement.answer(), measurement.folded()


def _wait(measurement: Measurement, duration: float) -> None:
    """Let the time pass while reading expired entries' lag, where that is possible."""
    deadline = time.monotonic() + duration
    if measurement.hands_off:
        measurement.unseen("collection lag: return probes would cut off the stacks")
        time.sleep(duration)
        return
    try:
        source = open_live(Filter(kinds=frozenset({Kind.DESTROY})), seed=False)
    except CtraceError as error:
        measurement.unseen(f"collection lag: {error}")
    else:
        if source.hooks.family == "netlink":
            measurement.unseen("collection lag: netlink cannot tell")
        try:
            for batch in source.batches(min(0.5, duration)):
                measurement.take(batch.events)
                if time.monotonic() >= deadline:
                    break
        finally:
            source.close()
    time.sleep(max(0.0, deadline - time.monotonic()))
