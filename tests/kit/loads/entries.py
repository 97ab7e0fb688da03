"""A table of any flows, packet by packet, under any timeouts: what a kernel would do, in Python.

A flow is its packets: when each comes, and the state and timeout that it leaves the entry with. A
packet that meets an expired entry, or a SYN that meets a closed one, ends it, as a lookup does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Optional

import numpy as np

from ctrace.batch import Batch, TableReading
from ctrace.record import Kind, Reason, Status, empty

NETNS = 4026532000
SECOND = 10**9
REPLIED = int(Status.SEEN_REPLY)
ASSURED = REPLIED | int(Status.ASSURED)
SYN_SENT, ESTABLISHED, CLOSE_WAIT, TIME_WAIT, CLOSE = 1, 3, 5, 7, 8
ANY = 255


class Packet(NamedTuple):
    """What one packet, or an exchange of some, leaves behind."""

    at: float
    proto: int
    sport: int
    dport: int
    state: int
    status: int
    timeout: str
    """Its name among the settings."""


@dataclass
class _Entry:
    packet: Packet
    expires: float
    made: float
    ct: int = 0


@dataclass
class Table:
    """One run: batches as a source yields them, and the count at each second."""

    settings: Mapping[str, float]
    seconds: int
    since: int = 0
    """Second at which the recording begins."""
    looks: int = 40
    """Living entries that are looked at each second."""
    untracked: frozenset[tuple[int, int]] = frozenset()
    seed: int = 0
    first_pass: float = 10.0
    """When gc_worker first comes by."""
    later: tuple[float, Mapping[str, float]] = (math.inf, {})
    """A second, and the settings that are changed then."""
    counts: list[int] = field(default_factory=list)
    """From ``since`` on."""
    walks: bool = False
    """Whether it looks at the next ones of the table, rather than at some drawn by chance."""
    moments: frozenset[int] = frozenset()
    """Seconds at which it is listed,"""
    listed: dict[int, list[Packet]] = field(default_factory=dict)
    """with the last packet of each entry,"""
    stayed: dict[int, tuple[float, float]] = field(default_factory=dict)
    """and when each entry was made, and how long it stayed; inf: it is still there."""

    def __post_init__(self) -> None:
        self._held: dict[tuple[int, int, int], _Entry] = {}
        self._rows: list[tuple[float, Kind, Reason, _Entry]] = []
        self._random = np.random.default_rng(self.seed)
        self._pass, self._made, self._place = self.first_pass, 0, -1

    def _setting(self, name: str, at: float) -> float:
        since, changed = self.later
        return changed.get(name, self.settings[name]) if at >= since else self.settings[name]

    def run(self, packets: Iterable[Packet]) -> list[Batch]:
        """All packets through the table."""
        second = 0
        for packet in sorted(one for one in packets if one.at < self.seconds):
            while second <= packet.at:
                self._second(second)
                second += 1
            if (packet.proto, packet.dport) not in self.untracked:
                self._packet(packet)
        for rest in range(second, self.seconds + 1):
            self._second(rest)
        return self._batches()

    def _packet(self, packet: Packet) -> None:
        key = packet[1:4]
        entry = self._held.get(key)
        if entry and entry.expires <= packet.at:
            entry = self._end(key, packet.at, Reason.EXPIRED)
        elif entry and packet.state == SYN_SENT and entry.packet.state in (TIME_WAIT, CLOSE):
            entry = self._end(key, packet.at, Reason.DELETED)
        expires = packet.at + self._setting(packet.timeout, packet.at)
        if entry is None:
            self._made += 1
            self._held[key] = entry = _Entry(packet, expires, packet.at, self._made)
            self._rows.append((packet.at, Kind.INSERT, Reason.NEW, replace(entry)))
            self.stayed[entry.ct] = packet.at, math.inf
        entry.packet, entry.expires = packet, expires

    def _end(self, key: tuple[int, int, int], at: float, reason: Reason) -> Optional[_Entry]:
        entry = self._held.pop(key)
        self._rows.append((at, Kind.DESTROY, reason, entry))
        self.stayed[entry.ct] = entry.made, at - entry.made
        return None

    def _second(self, now: int) -> None:
        while self._pass <= now:  # gc_worker
            for key in [key for key, one in self._held.items() if one.expires <= self._pass]:
                self._end(key, self._pass, Reason.EXPIRED)
            left = np.clip([one.expires - self._pass for one in self._held.values()], 1, 300)
            self._pass += float(np.clip((6000 + left.sum()) / (100 + len(left)), 1, 60))
        if now == self.since and now:
            self._rows = [
                (float(now), Kind.EXISTING, Reason.NONE, replace(entry))
                for entry in self._held.values()
            ]
        if now < self.since:
            return
        self.counts.append(len(self._held))
        if now in self.moments:
            self.listed[now] = [one.packet for one in self._held.values()]
        for one in self._walked() if self.walks else self._drawn():
            self._rows.append((float(now), Kind.MET, Reason.NONE, replace(one)))

    def _drawn(self) -> list[_Entry]:
        living = list(self._held.values())
        chosen = self._random.permutation(len(living))[: self.looks].tolist()
        return [living[at] for at in chosen]

    def _walked(self) -> list[_Entry]:
        """The next ones in the order of a hash, up to its end."""
        places = sorted((one.ct * 0x9E3779B1 % (1 << 32), one) for one in self._held.values())
        left = [one for one in places if one[0] > self._place][: self.looks]
        self._place = left[-1][0] if len(left) == self.looks else -1
        return [one for _, one in left]

    def _batches(self) -> list[Batch]:
        events = empty(len(self._rows))
        for row, (now, kind, reason, entry) in zip(events, self._rows):
            packet = entry.packet
            row["ts"], row["kind"], row["reason"] = int((now + 1) * SECOND), kind, reason
            row["proto"], row["sport"], row["dport"] = packet.proto, packet.sport, packet.dport
            row["ct"] = 0 if kind == Kind.EXISTING else entry.ct << 8
            row["netns"], row["state"], row["status"] = NETNS, packet.state, packet.status
            if kind in (Kind.DESTROY, Kind.MET):
                timeout = self._setting(packet.timeout, now)
                idle = now - entry.expires + timeout
                row["overdue_ms"] = round((now - entry.expires) * 1000)
                known = idle > -0.001  # as emit_life tells it
                row["timeout_ms"] = round(timeout * 1000) if known else 0
                row["idle_ms"] = max(0, round(idle * 1000)) if known else -1
        of = np.maximum(events["ts"].astype(np.int64) - 1, 0) // SECOND
        return [
            Batch(
                events[of == self.since + n],
                until=(self.since + n + 1) * SECOND,
                tables=(TableReading(NETNS, count, 1 << 20, 1 << 20,
                                     at=(self.since + n + 1) * SECOND),),
            )
            for n, count in enumerate(self.counts)
        ]  # fmt: skip
