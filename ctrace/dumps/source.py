"""What was found, as a source of batches: the same for a dump as for a live host."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Optional

from ctrace.batch import DUMP, TYPED_IN, Batch, Clock, HookInfo, Names, Netns, TableReading
from ctrace.dumps.found import Dump, Found
from ctrace.dumps.ledger import Ledger, Timeouts
from ctrace.dumps.looks import Look, looks
from ctrace.errors import CtraceError
from ctrace.record import Events, empty

DAY: Final = 86400.0
MAX: Final = "net.netfilter.nf_conntrack_max"
BUCKETS: Final = "net.netfilter.nf_conntrack_buckets"


@dataclass
class Told:
    """A :class:`ctrace.batch.Source` over what was found."""

    found: Found
    now: float = field(default_factory=time.time)
    said: dict[str, Any] = field(default_factory=dict)
    """What was told beside events, once it is written."""

    def __post_init__(self) -> None:
        found = self.found
        self.looks, self.left_out = looks(found.spool, found.dumps, self.now)
        self.streams = [dump for dump in found.dumps if dump.events and len(dump)]
        self._times = {id(dump): self._span(dump) for dump in self.streams}
        moments = [look.at for look in self.looks]
        moments += [edge for span in self._times.values() for edge in span]
        self.last = max(moments, default=self._reference())
        first = min(moments, default=self.last)
        self.boot, self.boot_known = first - DAY, False
        if found.uptime is not None:
            booted = (found.uptime[1] or self.last) - found.uptime[0]
            if booted < first:
                self.boot, self.boot_known = booted, True
        self.clock = Clock(round(self.boot * 1e9))
        self.started = max(1, round(first * 1e9) - self.clock.offset - 1)
        names = dict.fromkeys([*(one.netns for one in found.dumps), *found.spaces])
        own = "" in names
        names.pop("", None)
        self.netns = {name: at for at, name in enumerate(names, TYPED_IN + 1)}
        if own or not names:
            self.netns = {"": TYPED_IN, **self.netns}

    def _reference(self) -> float:
        """The time of a recording without entries."""
        return self.found.date or self.now

    def _span(self, dump: Dump) -> tuple[float, float]:
        """First and last time of an event stream."""
        low, high = 0, 0
        for _, part in self.found.spool.parts(dump.start, dump.stop):
            timed = part["ts"][part["ts"] != 0]
            if len(timed):
                low = min(low or int(timed.min()), int(timed.min()))
                high = max(high, int(timed.max()))
        if not low:
            at = dump.at or dump.file_time or self.now
            return at, at
        return low / 1e9, high / 1e9

    # -- a source ---------------------------------------------------------------------

    @property
    def hooks(self) -> HookInfo:
        """No hooks: what text can and cannot tell."""
        compared = any(look.apart is not None for look in self.looks)
        blind = []
        if not compared and not self.streams:
            blind.append("what came and went: a dump shows only one moment")
        if compared:
            gap = max(look.apart or 0.0 for look in self.looks)
            blind.append(
                f"what came and went between two dumps: births and ends are known to within "
                f"{gap:.3g} s, and ages and lives are lower bounds"
            )
        if any(dump.lost for dump in self.streams):
            blind.append("events that conntrack lost (ENOBUFS): it does not say how many")
        blind.append("refused packets: only the kernel's log and counters report them")
        blind.append("which process opened a flow")
        return HookInfo(
            DUMP,
            (f"dumps: {len(self.looks)}, streams of events: {len(self.streams)}",),
            tuple(blind),
            drop_tuples=False,
            evictions=False,
            owners=False,
            changes=compared or bool(self.streams),
            refusals=False,
        )

    def batches(self, interval: float = 0.0) -> Iterator[Batch]:  # noqa: ARG002
        """Everything, in the order of time."""
        ledgers = {
            name: Ledger(
                self.found.spool,
                number,
                self.clock.offset,
                Timeouts.of(self.found.space(name).sysctls),
            )
            for name, number in self.netns.items()
        }
        until = self.started
        steps: list[tuple[float, int, Optional[Look], Optional[Dump]]] = [
            (look.at, look.dump.start, look, None) for look in self.looks
        ]
        steps += [(self._times[id(one)][0], one.start, None, one) for one in self.streams]
        yield Batch(empty(), until, names=self._names())
        for at, _, look, dump in sorted(steps, key=lambda step: step[:2]):
            if look is not None:
                ledger = ledgers[look.dump.netns]
                parts = ledger.look(look)
            else:
                assert dump is not None
                parts = ledgers[dump.netns].events(dump, max(1, self._boot(at)))
            for events in parts:
                until = max(until, int(events["ts"].max()) if len(events) else 0)
                yield Batch(events, until, more=True)
            if look is not None:
                until = max(until, self._boot(at))
                met = ledgers[look.dump.netns].met(look)
                yield Batch(met, until, tables=self._reading(look, until))
            elif dump is not None:
                until = max(until, self._boot(self._times[id(dump)][1]))
                yield Batch(empty(), until, lost=dump.lost, tables=self._unlooked(dump, until))
        if not steps:
            yield Batch(empty(), until + 1, tables=self._unlooked(None, until))

    def close(self) -> None:
        """The temporary file goes."""
        self.found.close()

    def _boot(self, utc: float) -> int:
        return round(utc * 1e9) - self.clock.offset

    def _reading(self, look: Look, until: int) -> tuple[TableReading, ...]:
        """The table at a look: its own count where the texts tell one, else its lines."""
        mine = [one for one in self.looks if one.dump.netns == look.dump.netns]
        counts = self.found.space(look.dump.netns).counts
        count = len(look.rows)
        if len(counts) == len(mine):
            count = counts[next(i for i, one in enumerate(mine) if one is look)]
        elif counts and look is mine[-1]:
            count = counts[-1]
        elif look.dump.said is not None and not look.dump.filtered:
            count = look.dump.said
        elif look.dump.cut:
            return ()  # a part of it, and nothing tells of how many
        # A count that is less than the lines is of another moment.
        return self._table(look.dump.netns, max(count, len(look.rows) + look.beside), until)

    def _unlooked(self, dump: Optional[Dump], until: int) -> tuple[TableReading, ...]:
        """Tables for which only a count and settings are known."""
        names = [dump.netns] if dump is not None else list(self.netns)
        found: list[TableReading] = []
        for name in names:
            counts = self.found.space(name).counts
            if counts:
                found += self._table(name, counts[-1], until)
        return tuple(found)

    def _table(self, name: str, count: int, until: int) -> tuple[TableReading, ...]:
        limit = self.limit(name)
        buckets = _number(self.found.space(name).sysctls.get(BUCKETS)) or 0
        return (
            TableReading(
                self.netns[name], count, limit or 0, buckets, at=until, max_known=limit is not None
            ),
        )

    def limit(self, name: str) -> Optional[int]:
        """nf_conntrack_max of a namespace (it is one for all), or None."""
        for space in (self.found.space(name), *self.found.spaces.values()):
            limit = _number(space.sysctls.get(MAX))
            if limit is not None:
                return limit
        return self.found.log.sizes[1] if self.found.log.sizes else None

    def _names(self) -> Names:
        own = "init" if self.found.whole else self.found.host or "dump"
        netns, listeners = {}, {}
        for name, number in self.netns.items():
            space = self.found.space(name)
            netns[number] = Netns(number, name or own, tuple(space.addresses))
            for (proto, port), owner in space.listeners.items():
                listeners[number, proto, port] = owner
        owners = {owner.key: owner for owner in listeners.values()}
        return Names(netns=netns, owners=owners, listeners=listeners)


def _number(text: Optional[str]) -> Optional[int]:
    return int(text) if text and text.isdigit() and len(text) < 12 else None


def last_looks(told: Told, netns: str) -> list[Look]:
    """The last look of each series of a namespace."""
    return list({one.series: one for one in told.looks if one.dump.netns == netns}.values())


def last_entries(told: Told) -> Iterator[Events]:
    """The entries of each namespace's last look, piece by piece."""
    for name in told.netns:
        for look in last_looks(told, name):
            for at in range(0, len(look.rows), 1 << 16):
                rows = look.rows[at : at + (1 << 16)]
                first, final = int(rows[0]), int(rows[-1])
                found = told.found.spool.read(look.start + first, look.start + final + 1)
                yield found if len(found) == len(rows) else found[rows - first]


def nothing(found: Found, paths: Sequence[str]) -> CtraceError:
    """The error when no line was of use."""
    unread = found.unread
    if found.empty and not unread.count:
        return CtraceError(
            f"{', '.join(paths)}: conntrack had nothing to show, the table was empty"
        )
    if unread.first and not unread.first[0][1]:
        return CtraceError(unread.first[0][2])
    text = f"{', '.join(paths)} is not a ctrace recording, and contains nothing about conntrack"
    if unread.first:
        _, line, reason = unread.first[0]
        lines = "1 line" if unread.count == 1 else f"{unread.count:,} lines"
        text += f" ({lines} not understood, the first is line {line}: {reason})"
    return CtraceError(text)
