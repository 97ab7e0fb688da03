"""Reads what rules and tables show together, beside what is captured: entries translated to where
no rule leads any more, source ports in use, limits of rules, and what rules drop as INVALID.

Reads only. What took long to read is read again the later.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Final, Optional

import numpy as np

from ctrace.advice import source_ports
from ctrace.batch import Batch, TableReading, inode_of
from ctrace.beside import MOST, Beside, Left, PortsTaken, Refusing
from ctrace.errors import CtraceError
from ctrace.host import ctnetlink
from ctrace.host.netns import find, local_addresses
from ctrace.host.tables import TableReader
from ctrace.record import Status, address_text, proto_name
from ctrace.ruleset.reader import dump
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
READ: Final = 200_000
"""Entries. A larger table is not read entry by entry for this."""
TCP: Final = 6
CLOSED: Final = (7, 8)
"""TIME_WAIT and CLOSE: closed connections' entries go by themselves."""

Stale = tuple[str, str, int, str]
"""Protocol, original destination and port, and the address that it is translated to."""


class Reader:
    """Reads some namespaces again and again, in a thread of its own.

    ``only``: the one that is looked at, until batches tell which hold most.
    """

    def __init__(self, only: Optional[int] = None) -> None:
        self._only = only
        self._spaces: dict[int, Space] = {}
        self._wanted: dict[int, int] = {}
        self._news: dict[int, Beside] = {}
        self._lock = threading.Lock()
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
        with self._lock:
            news, self._news = self._news, {}
        return replace(batch, beside=tuple(news.values())) if news else batch

    def _watch(self, tables: Sequence[TableReading]) -> None:
        """Schedule readings of the tables that hold most."""
        most = sorted((t for t in tables if not t.gone), key=lambda t: -t.count)[:SPACES]
        with self._lock:
            self._wanted = {table.netns: table.count for table in most} or self._wanted
        if most:
            self.start()

    def _work(self) -> None:
        for number in count():
            begin = time.monotonic()
            with self._lock:
                wanted = dict(self._wanted)
            with contextlib.suppress(CtraceError, OSError):
                wanted = wanted or self._largest()
            self._forget(wanted)
            for netns, held in wanted.items():
                with contextlib.suppress(CtraceError, OSError):
                    self._read(netns, held)
            took = time.monotonic() - begin
            if self._over.wait(SOON if number < FIRST else max(EVERY, COST * took)):
                return

    def _forget(self, wanted: Mapping[int, int]) -> None:
        """What was read of namespaces that are not read any more holds no longer."""
        for netns in [one for one in self._spaces if one not in wanted]:
            del self._spaces[netns]
            with self._lock:
                self._news[netns] = Beside(netns)

    def _largest(self) -> dict[int, int]:
        """The namespaces that hold most, until batches show which do."""
        with TableReader() as reader:
            tables = reader.read([one for one in find() if self._only in (None, one.inum)])
        most = sorted(tables, key=lambda t: -t.count)[:SPACES]
        return {table.netns: table.count for table in most}

    def _read(self, netns: int, held: int) -> None:
        path = next((one.path for one in find() if one.inum == inode_of(netns)), None)
        if path is None:
            return
        rules = told(dump(path))
        few = held <= READ
        left = leftovers(path, rules) if few else ()
        ports = source_ports.used(path, rules.ports) if few else {}
        before = self._spaces.get(netns)
        space = self._spaces.setdefault(netns, Space(netns, rules))
        found = space.see(rules, left, ports)
        with self._lock:
            if found or before is not None:
                self._news[netns] = found


class Space:
    """One namespace: the counters of its rules when they were first read, and its last ports."""

    def __init__(self, netns: int, rules: Told) -> None:
        self._netns = netns
        self._first = {_name(one): one.packets or 0 for one in rules.met}
        self._ports: Mapping[source_ports.Towards, source_ports.Ports] = {}
        self._at = 0.0

    def see(
        self,
        rules: Told,
        left: Sequence[Left] = (),
        ports: Optional[Mapping[source_ports.Towards, source_ports.Ports]] = None,
    ) -> Beside:
        """A reading, with the changes since earlier ones."""
        for one in rules.met:
            self._first.setdefault(_name(one), 0)
        now = time.monotonic()
        taken = [
            PortsTaken(*towards, *used, was[0] if was else None, now - self._at if was else 0.0)
            for towards, used in (ports or {}).items()
            for was in (self._ports.get(towards),)
        ]
        self._ports, self._at = ports or {}, now
        return Beside(
            self._netns,
            tuple(sorted(map(self._refusing, rules.met), key=lambda one: -(one.since or 0))[:MOST]),
            tuple(sorted(left, key=lambda one: -one.entries)[:MOST]),
            tuple(sorted(taken, key=lambda one: -one.used / one.of)[:MOST]),
        )

    def _refusing(self, rule: Met) -> Refusing:
        since = None if rule.packets is None else rule.packets - self._first[_name(rule)]
        if since is not None and since < 0:  # the rule's counter was set back
            self._first[_name(rule)], since = 0, rule.packets
        return Refusing(rule.place, rule.handle, rule.kind, rule.limit, rule.packets, since)


def _name(rule: Met) -> tuple[str, int]:
    return rule.place, rule.handle


def leftovers(netns_path: str, rules: Told) -> tuple[Left, ...]:
    """Living entries that are translated to a destination no rule leads to now."""
    found: Counter[Stale] = Counter()
    if rules.targets is None:
        return ()
    own = set(local_addresses(netns_path))
    for table in ctnetlink.slices(netns_path):
        rows = table.events
        status = rows["status"].astype(int)
        mine = (status & int(Status.DST_NAT) != 0) & (status & int(Status.EXPECTED) == 0)
        mine &= (rows["proto"] != TCP) | ~np.isin(rows["state"], CLOSED)
        rows = rows[mine]
        if not len(rows):
            continue
        parts = (rows[name] for name in ("dst", "reply_src", "dport", "proto"))
        ends = np.concatenate(
            [np.ascontiguousarray(one).view(np.uint8).reshape(len(rows), -1) for one in parts],
            axis=1,
        )
        _, first, counts = np.unique(ends, axis=0, return_index=True, return_counts=True)
        for row, n in zip(rows[first], counts.tolist()):
            backend = address_text(row["reply_src"])
            if backend not in own and not rules.leads_to(backend):
                dst, proto = address_text(row["dst"]), proto_name(int(row["proto"]))
                found[proto, dst, int(row["dport"]), backend] += n
    return tuple(Left(*towards, n) for towards, n in found.most_common())
