"""Proof by real traffic that every field of every record is what was sent.

Connections, deletions, an expiry and a refusal at table-full are made in private
namespaces, with nothing of the host changed, and each record's fields are compared
with the sockets' own view, with ctnetlink's dump and with the kernel's counters.

A namespace cannot have a lower limit than the host, so one is filled up with entries
of its own: each namespace's count is compared with nf_conntrack_max by itself.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final, Optional

import numpy as np

from ctrace.capture.family import Capture
from ctrace.errors import CtraceError
from ctrace.filters import Filter
from ctrace.host import ctnetlink, kernel, process
from ctrace.host.netns import Namespace
from ctrace.lab import Lab, Node
from ctrace.record import (
    STATE_UNKNOWN,
    Direction,
    Events,
    Kind,
    Reason,
    Status,
    address_text,
    boot_ns,
    join,
)
from ctrace.selftest.report import FAILED, OK, SKIPPED, Check, Report
from ctrace.selftest.traffic import (
    EXPIRES,
    PATIENCE,
    PORT,
    Flow,
    mark_and_translate,
    refused,
    traffic,
)

SLACK_MS: Final = 100
"""Clocks: the kernel's jiffies are up to 10 ms coarse, and its task may wait for a CPU."""
FILL_LIMIT: Final = 1 << 20
"""A table larger than this is not filled: a host that sized it so has better to do."""
ENTRY_BYTES: Final = 512
NAT_BITS: Final = Status.SRC_NAT | Status.DST_NAT


def run(hooks: Optional[str] = None, show: Callable[[Check], None] = lambda _: None) -> Report:
    """Run every check with the family in use here, or with ``hooks``.

    ``show`` is called with each check as it is made. Raises CtraceError when the test
    itself cannot run (no root, no family).
    """
    from ctrace.capture.live import open_capture

    if os.geteuid() != 0:
        raise CtraceError("the self-test makes network namespaces: run it with sudo")
    wanted = Filter(dport=PORT)
    capture, _ = open_capture(wanted, hooks, 1 << 20)
    try:
        return prove(capture, wanted, show)
    finally:
        capture.close()


def prove(
    capture: Capture, wanted: Filter, show: Callable[[Check], None] = lambda _: None
) -> Report:
    """The same with a capture that is already open, of ``wanted`` (which must let PORT pass)."""
    with Lab() as lab:
        test = _SelfTest(capture, wanted, lab, show)
        test.run()
    return Report(capture.info.family, tuple(test.checks))


@dataclass
class _SelfTest:
    capture: Capture
    wanted: Filter
    lab: Lab
    show: Callable[[Check], None]
    checks: list[Check] = field(default_factory=list)
    events: Events = field(default_factory=lambda: join([]))
    lost: int = 0

    def run(self) -> None:
        client = self.lab.namespace("client", track=True)
        server = self.lab.namespace("server", track=True)
        full = self.lab.namespace("full", track=True)
        nodes = (client, server, full)
        self.lab.link(client, server)
        zoned = mark_and_translate(client)
        self.capture.follow([Namespace(node.inum, node.name, node.path) for node in nodes])
        with ExitStack() as stack:
            flows = list(traffic(client, server, stack, zoned))
            self._inserts(flows)
            self._ends(flows, client, server)
        self._refusals(full)
        self._counters(nodes)

    # -- the three parts ---------------------------------------------------------------------

    def _inserts(self, flows: list[Flow]) -> None:
        for flow in flows:
            found = self._await(flow, Kind.INSERT)
            if found is None:
                continue
            expected: dict[str, Any] = {**flow.tuple_(), "reason": Reason.NEW, "nat": flow.nat}
            expected["state"] = 1 if flow.proto == socket.IPPROTO_TCP else STATE_UNKNOWN
            problems = _compare(found, expected)
            problems += self._direction(found, flow)
            problems += self._owner(found, flow)
            if not flow.made[0] <= found["ts"] <= flow.made[1] + self._late():
                problems.append(f"ts: {found['ts']} is not within {flow.made}")
            if not found["ct"]:
                problems.append("ct: 0")
            self._report(f"insert  {flow.name}", problems)

    def _ends(self, flows: list[Flow], client: Node, server: Node) -> None:
        time.sleep(EXPIRES + 0.4)
        for node in (client, server):
            # A dump drops the entries that it finds expired: one here is left to that.
            before = boot_ns()
            table = ctnetlink.read_table(node.path)
            dumped = boot_ns()
            rows = {
                (
                    int(row["proto"]),
                    address_text(row["src"]),
                    int(row["sport"]),
                    int(row["dport"]),
                ): i
                for i, row in enumerate(table.events)
            }
            for flow in flows:
                if flow.netns != node.inum:
                    continue
                at = rows.get((flow.proto, flow.src, flow.sport, flow.dport))
                if at is None:
                    self._expiry(flow, (before, dumped))
                    continue
                row, left, mark = table.events[at], int(table.left[at]), int(table.mark[at])
                began = boot_ns()
                ctnetlink.delete(node.path, row)
                self._deletion(flow, row, left, mark, (before, dumped), (began, boot_ns()), node)

    def _deletion(
        self,
        flow: Flow,
        row: np.void,
        left: int,
        mark: int,
        dumped: tuple[int, int],
        deleted: tuple[int, int],
        node: Node,
    ) -> None:
        found = self._await(flow, Kind.DESTROY)
        if found is None:
            return
        # ctnetlink before 5.11 tells neither the time left nor the TCP state.
        told = self.capture.tells_left
        inserted = self._find(flow, Kind.INSERT)
        expected: dict[str, Any] = {
            **flow.tuple_(),
            "reason": Reason.DELETED,
            "nat": flow.nat,
            "state": int(row["state"]) if told else STATE_UNKNOWN,
            "mark": mark,
        }
        problems = _compare(found, expected)
        if len(inserted) and found["ct"] != inserted[0]["ct"]:
            problems.append("ct: not that of the insert")
        status = (int(found["status"]) ^ int(row["status"])) & ~int(Status.DYING)
        if status:
            problems.append(f"status: {int(found['status']):#x}, listed as {int(row['status']):#x}")
        if not deleted[0] <= found["ts"] <= deleted[1] + self._late():
            problems.append(f"ts: {found['ts']} is not within {deleted}")
        idle = int(found["idle_ms"])
        soonest = (deleted[0] - flow.idle_since[1]) // 1_000_000 - SLACK_MS
        latest = (deleted[1] - flow.idle_since[0]) // 1_000_000 + SLACK_MS
        if idle != -1 and not soonest <= idle <= latest:
            problems.append(f"idle_ms: {idle}, really {soonest + SLACK_MS} to {latest - SLACK_MS}")
        due = -int(found["overdue_ms"])
        since = (deleted[1] - dumped[0]) // 1_000_000
        if (
            told
            and not left * 1000 - since - 1000 - SLACK_MS <= due <= left * 1000 + 1000 + SLACK_MS
        ):
            problems.append(f"overdue_ms: {-due}, listed with {left} s left")
        if found["timeout_ms"]:
            setting = 1000 * int(node.sysctl(f"net.netfilter.nf_conntrack_{flow.timeout}"))
            if found["timeout_ms"] != setting:
                problems.append(f"timeout_ms: {found['timeout_ms']}, set is {setting}")
        elif self.capture.info.family != "netlink":
            problems.append("timeout_ms: unknown")
        self._report(f"delete  {flow.name}", problems)

    def _expiry(self, flow: Flow, when: tuple[int, int]) -> None:
        found = self._await(flow, Kind.DESTROY)
        if found is None:
            return
        problems = _compare(found, {**flow.tuple_(), "nat": flow.nat})
        untold = Reason.GONE if self.capture.info.family == "netlink" else Reason.EXPIRED
        if found["reason"] not in (Reason.EXPIRED, untold):
            problems.append(f"reason: {Reason(found['reason']).name}, really EXPIRED")
        if int(found["overdue_ms"]) < -SLACK_MS:
            problems.append(f"overdue_ms: {found['overdue_ms']}, but it had expired")
        if found["ts"] > when[1] + self._late():
            problems.append(f"ts: {found['ts']} is after {when[1]}")
        self._report(f"expire  {flow.name}", problems)

    def _refusals(self, full: Node) -> None:
        name = "refusal at table-full"
        limit, _ = kernel.limits()
        if not limit or limit > FILL_LIMIT or limit * ENTRY_BYTES > _memory_available() // 4:
            self._add(Check(name, SKIPPED, f"filling a table of {limit} entries costs too much"))
            return
        step = 1 << 15
        for first in range(0, limit, step):
            # In portions, so that a family that hears of each (netlink) can keep up.
            if ctnetlink.fill(full.path, min(step, limit - first), first=first) < step:
                break
            self._poll()
        drops = full.stats()["drop"]
        flows = list(refused(full))
        really = full.stats()["drop"] - drops
        problems = [] if really == len(flows) else [f"the kernel refused {really}"]
        problems += [f"{flow.name} was let through" for flow in flows if not flow.netns]
        self._report(f"{name}: {len(flows)} packets refused by the kernel", problems)
        counted = self._settled(lambda: int(self._counted(full)[Reason.TABLE_FULL]), really)
        problems = [] if counted == really else [f"counted {counted}, the kernel {really}"]
        self._report(f"{name}: exact count", problems)
        if not self.capture.info.drop_tuples:
            said = f"{self.capture.info.family} does not see a refused packet's tuple"
            self._add(Check(f"{name}: tuples", SKIPPED, said))
            return
        for flow in flows:
            found = self._await(flow, Kind.DROP)
            if found is None:
                continue
            # A refused packet never had a reply tuple, an entry or a state.
            expected = {
                name: value for name, value in flow.tuple_().items() if not name.startswith("reply")
            }
            expected["reason"] = Reason.TABLE_FULL
            problems = _compare(found, expected)
            problems += self._direction(found, flow) + self._owner(found, flow)
            if not flow.made[0] <= found["ts"] <= flow.made[1] + self._late():
                problems.append(f"ts: {found['ts']} is not within {flow.made}")
            self._report(f"refused {flow.name}", problems)

    def _counters(self, nodes: tuple[Node, ...]) -> None:
        self._poll()
        problems = [f"{self.lost} lost"] if self.lost else []
        for node in nodes[:2]:
            mine = self.events[self.events["netns"] == node.inum]
            counts = self._counted(node)
            for name, kind, reasons in (
                ("inserts", Kind.INSERT, (Reason.NEW, Reason.USER, Reason.NAT_CLASH)),
                ("ends", Kind.DESTROY, tuple(range(Reason.EXPIRED, Reason.GONE + 1))),
            ):
                seen = int((mine["kind"] == kind).sum())
                counted = sum(int(counts[reason]) for reason in reasons)
                # Counters also hold what the filter keeps out: neighbour discovery and such.
                if counted < seen:
                    problems.append(f"{node.name}: {counted} {name} counted, {seen} seen")
        self._report("counters hold every record", problems)

    # -- what records there are --------------------------------------------------------------

    def _poll(self) -> None:
        events, lost = self.capture.poll()
        self.events = join([self.events, events[self.wanted.mask(events)]])
        self.lost += lost

    def _find(self, flow: Flow, kind: Kind) -> Events:
        events = self.events
        keep = (
            (events["kind"] == kind)
            & (events["netns"] == flow.netns)
            & (events["proto"] == flow.proto)
            & (events["sport"] == flow.sport)
            & (events["family"] == flow.tuple_()["family"])
        )
        kept: Events = events[keep]
        return kept

    def _await(self, flow: Flow, kind: Kind) -> Optional[np.void]:
        """The flow's record of that kind; reports when there is none, or more than one."""
        number = self._settled(lambda: len(self._find(flow, kind)), 1)
        if number == 1:
            row: np.void = self._find(flow, kind)[0]
            return row
        self._report(f"{kind.name.lower():7} {flow.name}", [f"{number} records instead of one"])
        return None

    def _settled(self, value: Callable[[], int], wanted: int) -> int:
        """``value()`` once it is ``wanted``, or what it is when patience ends."""
        until = time.monotonic() + PATIENCE
        while True:
            self._poll()
            if value() >= wanted or time.monotonic() > until:
                return value()
            time.sleep(0.005)

    def _counted(self, node: Node) -> Any:
        counts = self.capture.counts().get(node.inum)
        return np.zeros(16, np.uint64) if counts is None else counts

    # -- comparisons -------------------------------------------------------------------------

    def _late(self) -> int:
        """By how much a time may lie after the fact: netlink's is when we read it."""
        return int(PATIENCE * 1e9) if self.capture.info.family == "netlink" else 0

    def _direction(self, found: np.void, flow: Flow) -> list[str]:
        if self.capture.info.family == "netlink" and found["direction"] == Direction.UNKNOWN:
            return []
        if found["direction"] == flow.direction:
            return []
        return [f"direction: {Direction(found['direction']).name}, really {flow.direction.name}"]

    def _owner(self, found: np.void, flow: Flow) -> list[str]:
        if not self.capture.info.owners:
            return [] if found["owner"] == 0 else ["owner: told by a family that cannot know"]
        key = int(found["owner"])
        if flow.direction is not Direction.OUT:
            return [] if key == 0 else [f"owner: {key >> 32} for a packet received"]
        pid = os.getpid()
        if key >> 32 != pid:
            return [f"owner: pid {key >> 32}, really {pid}"]
        problems = []
        apart = (key - (process.start_ms(pid) or 0)) & 0xFFFFFFFF
        if min(apart, (1 << 32) - apart) > SLACK_MS:
            problems.append(f"owner: start time is {apart} ms off")
        comm, cgroup_id = self.capture.owner_comms([key]).get(key, ("", 0))
        with open("/proc/self/comm") as file:
            mine = file.read().rstrip("\n")
        if comm != mine:
            problems.append(f"comm: {comm!r}, really {mine!r}")
        own = _own_cgroup()
        if own and (int(found["cgroup"]), cgroup_id) != (own, own):
            problems.append(f"cgroup: {found['cgroup']} and {cgroup_id}, really {own}")
        return problems

    def _report(self, name: str, problems: list[str]) -> None:
        self._add(Check(name, FAILED if problems else OK, "; ".join(problems)))

    def _add(self, check: Check) -> None:
        self.checks.append(check)
        self.show(check)


def _compare(found: np.void, expected: dict[str, Any]) -> list[str]:
    """Each field that differs, as a line."""
    problems = []
    for name, wanted in expected.items():
        got: Any
        if name in ("src", "dst", "reply_src", "reply_dst"):
            got = address_text(found[name])
        elif name == "nat":
            got = Status(int(found["status"]) & int(NAT_BITS))
        else:
            got = int(found[name])
        if got != wanted:
            problems.append(f"{name}: {got}, really {wanted}")
    return problems


def _own_cgroup() -> int:
    """This process's cgroup v2 id; 0 where there is none."""
    root = process.cgroup_root()
    if not root:
        return 0
    with open("/proc/self/cgroup") as file:
        path = next((line[3:].rstrip("\n") for line in file if line.startswith("0::")), "")
    try:
        return os.stat(root + path).st_ino if path else 0
    except OSError:
        return 0


def _memory_available() -> int:
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0
