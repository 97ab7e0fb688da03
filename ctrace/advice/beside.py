"""Causes that rules and the table show together, read beside what is captured: entries translated
to where no rule leads any more, limits of rules, and what rules drop as INVALID.

Reads only. What took long to read is read again the later.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Final, Optional

import numpy as np

from ctrace.advice import source_ports
from ctrace.batch import TableReading, inode_of
from ctrace.errors import CtraceError
from ctrace.host import ctnetlink
from ctrace.host.netns import find, local_addresses
from ctrace.model.causes.words import percent, plural
from ctrace.model.remedies import change
from ctrace.model.snapshot import Cause, Remedy, Snapshot, Table
from ctrace.record import Status, address_text, proto_name
from ctrace.ruleset.reader import dump
from ctrace.ruleset.told import Met, Told, told

SPACES: Final = 4
"""Namespaces that are read: those that hold most."""
EVERY: Final = 3.0
"""Seconds between two readings, or more:"""
SOON: Final = 4
"""Readings after which reading takes at most one part of :data:`COST` of the time."""
COST: Final = 50.0
MOST: Final = 200_000
"""Entries above which a table is not read entry by entry for this."""
FEW: Final = 20
"""Entries, and packets refused, below which nothing is said."""
FEW_REFUSED: Final = 5
SHOWN: Final = 3
TCP: Final = 6
CLOSED: Final = (7, 8)
"""TIME_WAIT and CLOSE: what is over goes by itself."""

Stale = tuple[str, str, int, str]
"""Protocol, original destination and port, and the address that it is translated to."""


class Beside:
    """What is read of some namespaces, again and again, in a thread of its own."""

    def __init__(self) -> None:
        self._spaces: dict[int, _Space] = {}
        self._wanted: dict[int, int] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: Optional[threading.Thread] = None

    def close(self) -> None:
        """End the thread; what it reads just now it reads to the end."""
        self._over.set()

    def watch(self, tables: Sequence[TableReading]) -> None:
        """Have the tables that hold most read."""
        most = sorted((t for t in tables if not t.gone), key=lambda t: -t.count)[:SPACES]
        with self._lock:
            self._wanted = {table.netns: table.count for table in most} or self._wanted
        if self._thread is None and most:
            self._thread = threading.Thread(target=self._work, name="ctrace-rules", daemon=True)
            self._thread.start()

    def with_causes(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with what is known by now."""
        several = len(snapshot.tables) > 1
        with self._lock:
            causes = [
                cause
                for table in snapshot.tables
                if table.netns in self._spaces
                for cause in self._spaces[table.netns].causes(table, several)
            ]
        return merged(snapshot, causes)

    def _work(self) -> None:
        for number in count():
            begin = time.monotonic()
            with self._lock:
                wanted = dict(self._wanted)
            for netns, held in wanted.items():
                with contextlib.suppress(CtraceError, OSError):
                    self._read(netns, held)
            took = time.monotonic() - begin
            if self._over.wait(EVERY if number < SOON else max(EVERY, COST * took)):
                return

    def _read(self, netns: int, held: int) -> None:
        space = next((one for one in find() if one.inum == inode_of(netns)), None)
        if space is None:
            return
        rules = told(dump(space.path))
        few = held <= MOST
        left = leftovers(space.path, rules) if few else Counter()
        ports = source_ports.used(space.path, rules.ports) if few else {}
        with self._lock:
            self._spaces.setdefault(netns, _Space(rules)).see(rules, left, ports)


class _Space:
    """One namespace: its rules now, and their counters when they were first read."""

    def __init__(self, rules: Told) -> None:
        self._first = {_name(one): one.packets or 0 for one in rules.met}
        self._now = rules
        self._left: Counter[Stale] = Counter()
        self._ports: list[tuple[float, dict[source_ports.Towards, source_ports.Ports]]] = []

    def see(
        self,
        rules: Told,
        left: Counter[Stale],
        ports: Optional[dict[source_ports.Towards, source_ports.Ports]] = None,
    ) -> None:
        """A reading."""
        self._ports = [*self._ports[-1:], (time.monotonic(), ports or {})]
        for one in rules.met:
            self._first.setdefault(_name(one), 0)
        self._now, self._left = rules, left

    def causes(self, table: Table, several: bool) -> Iterator[Cause]:
        """What it shows."""
        where = f" in {table.name}" if several else ""
        yield from stale(table, self._left, where)
        if self._ports:
            (then, before), (now, ports) = self._ports[0], self._ports[-1]
            yield from source_ports.filling(table, ports, before, now - then)
        for one in self._now.met:
            since = None if one.packets is None else one.packets - self._first.get(_name(one), 0)
            if one.kind == "invalid":
                yield _dropped(table, one, since)
            elif since is not None and since >= FEW_REFUSED:
                yield _limited(table, one, since)


def _name(rule: Met) -> tuple[str, int]:
    return rule.place, rule.handle


def leftovers(netns_path: str, rules: Told) -> Counter[Stale]:
    """Living entries whose destination was translated to where no rule leads now."""
    found: Counter[Stale] = Counter()
    if rules.targets is None:
        return found
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
    return found


def stale(table: Table, left: Counter[Stale], where: str = "") -> Iterator[Cause]:
    """Entries that keep to a backend which the rules have left."""
    for (proto, dst, port, backend), n in left.most_common(SHOWN):
        if n < FEW or proto not in ("tcp", "udp"):
            continue
        family = "ipv6" if ":" in dst else "ipv4"
        command = (
            f"conntrack -D -f {family} -p {proto} --orig-dst {dst} --orig-port-dst {port} "
            f"--reply-src {backend}"
        )
        part = percent(n / table.count) if table.count else "some"
        yield Cause(
            id="stale-nat",
            text=f"{proto}/{port}{where}: {n:,} entries to {dst} are translated to {backend}, "
            f"which no rule names any more ({part} of the table): their packets go there as long "
            "as any come",
            evidence=(
                f"{n:,} living entries with destination {dst}:{port} and replies from {backend}",
                "no rule of this namespace translates to that address now",
                "NAT is decided at the first packet: rules that change later do not move a flow",
            ),
            share=n / table.count if table.count else 0.0,
            proto=proto,
            port=port,
            netns=table.netns,
            remedies=(
                Remedy(
                    "delete",
                    f"delete just these {n:,} (conntrack -D)",
                    table.netns,
                    f"{proto}/{port}",
                    f"deletes about {n:,} entries at once; the next packet of each flow is "
                    "translated as the rules say now, and open TCP connections to it break",
                    now=n,
                    frees=(n, n),
                    commands=(command,),
                ),
            ),
        )


def _limited(table: Table, rule: Met, since: int) -> Cause:
    most = f" {rule.limit:,}" if rule.limit else ""
    return Cause(
        id="rule-limit",
        text=f"{table.name}: a rule's own limit of{most} connections refused "
        f"{plural(since, 'packet')} lately ({rule.place}, handle {rule.handle}): the table itself "
        f"is {percent(table.fill)} full",
        evidence=(
            f"the rule's counter rose by {since:,} to {rule.packets or 0:,}",
            f"{table.count:,} of {table.max:,} entries, {table.totals.drop:,} refused by the table",
        ),
        netns=table.netns,
        remedies=(change("raise that rule's limit, or have its clients keep fewer connections",
                         table.netns),),
    )  # fmt: skip


def _dropped(table: Table, rule: Met, since: Optional[int]) -> Cause:
    """What is told beside INVALID packets, never alone."""
    place = f"({rule.place}, handle {rule.handle})"
    told_so = (
        f"a rule without a counter drops such packets {place}"
        if since is None
        else f"a rule dropped {plural(max(since, 0), 'such packet')} lately {place}"
    )
    return Cause(id="invalid", text=told_so, evidence=(told_so,), netns=table.netns)


def merged(snapshot: Snapshot, causes: Collection[Cause]) -> Snapshot:
    """The snapshot with more causes: refusals first, and what dropped INVALID packets with them."""
    if not causes:
        return snapshot
    why = [_with_drops(one, causes) if one.id == "invalid" else one for one in snapshot.why]
    first = []
    for cause in causes:
        failing = [n for n, one in enumerate(why) if source_ports.same(one, cause)]
        for n in failing:  # they are told already, and this is how many there are
            told_so = cause.text.partition(": ")[2]
            why[n] = replace(why[n], text=f"{why[n].text}; {told_so}")
        if not failing and cause.id != "invalid":
            first.append(cause)
    return replace(
        snapshot, why=(*first, *(one for one in why if one.id != "unknown" or not first))
    )


def _with_drops(cause: Cause, causes: Collection[Cause]) -> Cause:
    """INVALID packets with the rules of their namespace that drop them."""
    rules = [one for one in causes if one.id == "invalid" and one.netns == cause.netns]
    if not rules:
        return cause
    text = cause.text.replace(", and a rule may drop them", "")
    more = "" if len(rules) == 1 else f" (and {plural(len(rules) - 1, 'other rule')})"
    evidence = (*cause.evidence, *(one.text for one in rules[:SHOWN]))
    return replace(cause, text=f"{text}; {rules[0].text}{more}", evidence=evidence)
