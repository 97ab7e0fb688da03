"""Reads namespaces again and again, in a thread beside the capture.

Reads only. What takes long to read is read less often.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Final, Optional

from ctrace.advice.beside.pings import Pings, Seen
from ctrace.advice.beside.short import ephemeral, short
from ctrace.advice.beside.strays import FEW, SECONDS, invalid_so_far, strays
from ctrace.advice.beside.table import Ports, Reading, Towards, read
from ctrace.batch import Batch, TableReading, inode_of, invalid
from ctrace.beside import MOST, Beside, PortsTaken, Refusing, Short, Stray
from ctrace.errors import CtraceError, for_later
from ctrace.host.netns import Way, find
from ctrace.host.tables import held_now
from ctrace.ruleset.reader import dump, forget
from ctrace.ruleset.told import Met, Told, told

SPACES: Final = 4
"""Namespaces that are read: those that hold most entries."""
SOON: Final = 1.0
"""Seconds between the first readings: counters have to be read twice."""
FIRST: Final = 4
"""How many these are."""
EVERY: Final = 3.0
"""Seconds between two later ones, or more:"""
COST: Final = 50.0
"""readings take at most one part in this many of the time."""
LATELY: Final = 60.0
"""Seconds for which a namespace is read after some of its packets were INVALID."""
LOOKS: Final = 10
"""The last looks at packets that count."""
READ: Final = 200_000
"""Entries that are read of a table; of a larger one this even sample."""


class Reader:
    """Reads some namespaces again and again, in a thread of its own.

    ``only``: the one that is looked at, until batches tell which hold most. ``every``: seconds
    between two later readings. Without ``pings`` nothing is rehearsed.
    """

    def __init__(
        self, only: Optional[int] = None, *, every: float = EVERY, pings: bool = True
    ) -> None:
        self._only = only
        self._every = every
        self._rehearse = pings
        self._spaces: dict[int, Space] = {}
        self._wanted: dict[int, int] = {}
        self._news: dict[int, Beside] = {}
        self._lock = threading.Lock()
        self._pings = Seen()
        self._rose: dict[int, tuple[int, float]] = {}
        """INVALID packets of each namespace, and when they last became more."""
        self._waited = 0.0
        """Seconds of the last readings that were spent waiting for packets."""
        self._over = threading.Event()
        self._thread: Optional[threading.Thread] = None

    def start(self) -> None:
        """Begin now: the first batch may be long in coming."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="ctrace-beside", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread, after the reading in progress."""
        self._over.set()

    def along(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, each with what was read of its namespaces by then."""
        try:
            for batch in batches:
                yield self.with_news(batch)
        finally:
            self.close()

    def with_news(self, batch: Batch) -> Batch:
        """A batch with what was read since the last one."""
        self._watch(batch.tables)
        if self._rehearse:
            self._pings.learn(batch)
        with self._lock:
            news, self._news = self._news, {}
        return replace(batch, beside=tuple(news.values())) if news else batch

    def _watch(self, tables: Sequence[TableReading]) -> None:
        """Schedule readings of the tables that hold most."""
        here = [table for table in tables if not table.gone]
        most = sorted(here, key=lambda t: -t.count)[:SPACES]
        most += self._losing(here)
        with self._lock:
            self._wanted = {table.netns: table.count for table in most} or self._wanted
        if most:
            self.start()

    def _losing(self, tables: Sequence[TableReading]) -> list[TableReading]:
        """Tables in whose namespaces packets were INVALID lately."""
        now, rose = time.monotonic(), {}
        for table in tables:
            lost = invalid(table.stats)
            before, when = self._rose.get(table.netns, (lost, -LATELY))
            rose[table.netns] = lost, now if lost - before >= FEW else when
        self._rose = rose
        lately = (t for t in tables if now - rose[t.netns][1] < LATELY)
        return sorted(lately, key=lambda t: -invalid(t.stats))[:SPACES]

    def _work(self) -> None:
        for number in count():
            begin, self._waited = time.monotonic(), 0.0
            with self._lock:
                wanted = dict(self._wanted)
            with for_later():
                wanted = wanted or self._largest()
            self._forget(wanted)
            for netns, held in wanted.items():
                with for_later():
                    self._read(netns, held)
            took = time.monotonic() - begin - self._waited
            if self._over.wait(SOON if number < FIRST else max(self._every, COST * took)):
                return

    def _forget(self, wanted: Mapping[int, int]) -> None:
        """What was read of namespaces that are not read any more holds no longer."""
        for netns in [one for one in self._spaces if one not in wanted]:
            del self._spaces[netns]
            with self._lock:
                self._news[netns] = Beside(netns)

    def _largest(self) -> dict[int, int]:
        """The namespaces that hold most, until batches show which do."""
        held = held_now([one for one in find() if self._only in (None, one.inum)])
        most = sorted(held, key=lambda netns: -held[netns])[:SPACES]
        return {netns: held[netns] for netns in most}

    def _read(self, netns: int, held: int) -> None:
        before = self._spaces.get(netns)
        with Way(inode_of(netns)).held() as there:
            if there is None:
                return
            rules = told(dump(there.path))
            forget()
            table = read(there.path, rules, held, READ)
            space = self._spaces.setdefault(netns, Space(netns, rules))
            found = space.see(rules, table)
            if space.look(there.path, rules):
                self._waited += SECONDS
            ports = ephemeral(there.path)
            echo = self._rehearse and rules.echo
            echo = echo and space.pings_fare(there.path, self._pings.of(netns))
        found = replace(found, strays=space.strays, short=space.short, ephemeral=ports, echo=echo)
        with self._lock:
            if found or before is not None:
                self._news[netns] = found


class Space:
    """One namespace: the counters of its rules when they were first read, and its last ports."""

    def __init__(self, netns: int, rules: Told) -> None:
        self._netns = netns
        self._first = {_name(one): one.packets or 0 for one in rules.met}
        self._ports: Mapping[Towards, Ports] = {}
        self._invalid: Optional[int] = None
        self._looks: deque[tuple[Stray, ...]] = deque(maxlen=LOOKS)
        self._devices: dict[str, int] = {}
        self._echo = Pings()
        self.short: tuple[Short, ...] = ()
        self._at = 0.0

    def see(self, rules: Told, table: Optional[Reading] = None) -> Beside:
        """A reading, with the changes since earlier ones."""
        for one in rules.met:
            self._first.setdefault(_name(one), 0)
        table = table or Reading(rules)
        ports, now = table.ports(), time.monotonic()
        whole = table.part == 1.0  # of a sample the changes tell nothing
        taken = [
            PortsTaken(*towards, *used, was[0] if was else None, now - self._at if was else 0.0)
            for towards, used in ports.items()
            for was in (self._ports.get(towards),)
        ]
        self._ports, self._at = ports if whole else {}, now
        return Beside(
            self._netns,
            tuple(sorted(map(self._refusing, rules.met), key=lambda one: -(one.since or 0))[:MOST]),
            tuple(sorted(table.left(), key=lambda one: -one.entries)[:MOST]),
            tuple(sorted(taken, key=lambda one: -one.used / one.of)[:MOST]),
            part=table.part,
        )

    def look(self, netns_path: str, rules: Told) -> bool:
        """Read what else limits, and look at packets if some were INVALID lately; whether it did.
        What there is no right to read is left out."""
        with for_later():
            self.short = tuple(short(netns_path, self._devices)[:MOST])
        looked = False
        with for_later():
            now = invalid_so_far(netns_path)
            if self._invalid is not None and now - self._invalid >= FEW:
                looked = True
                self._looks.append(strays(netns_path, rules))
            self._invalid = now
        return looked

    def pings_fare(self, netns_path: str, seen: set[bytes]) -> bool:
        """Whether those would fare the same without entries; no, where it cannot be rehearsed."""
        try:
            return self._echo.fare_the_same(netns_path, seen)
        except (CtraceError, OSError, ValueError, LookupError, struct.error, MemoryError):
            return False

    @property
    def strays(self) -> tuple[Stray, ...]:
        """INVALID packets of the last looks, the most frequent kinds first."""
        found: Counter[Stray] = Counter()
        for one in (one for look in self._looks for one in look):
            found[replace(one, packets=0)] += one.packets
        return tuple(replace(one, packets=n) for one, n in found.most_common(MOST))

    def _refusing(self, rule: Met) -> Refusing:
        since = None if rule.packets is None else rule.packets - self._first[_name(rule)]
        if since is not None and since < 0:  # the rule's counter was set back
            self._first[_name(rule)], since = 0, rule.packets
        return Refusing(rule.place, rule.handle, rule.kind, rule.limit, rule.packets, since)


def _name(rule: Met) -> tuple[str, int]:
    return rule.place, rule.handle
