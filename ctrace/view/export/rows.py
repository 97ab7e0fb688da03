"""A recording's events as columns for other tools; the schema is stable and documented here.

=============  ===================  ======================================================
column         type                 meaning
=============  ===================  ======================================================
time           timestamp ns, UTC    when it happened
kind           text                 insert, destroy, drop, insert_failed, existing
reason         text                 why: new, expired, evicted, table_full, ...
host           text                 the recording's host
netns          text                 namespace by name
proto          text                 protocol by name
src, dst       text                 original addresses
sport, dport   unsigned 16          original ports (ICMP: id, type << 8 | code)
reply_*                             the same of the reply tuple
status         text                 IPS_* bits by name, ``|`` between
state          text                 TCP state, or empty
direction      text                 in, out, forward, or empty
zone           unsigned 16          conntrack zone
entry          unsigned 64          identity of the entry while it lives; 0: there was none
pid, process   unsigned 32, text    who opened it, where known; else 0 and empty
cgroup         text                 its container or unit by name; empty where unknown
idle_ms        signed 32 or null    since the last packet that renewed it (destroys only)
overdue_ms     signed 32 or null    since its timeout passed; negative: time it had left
timeout_ms     unsigned 32 or null  of the state that it died in
mark           unsigned 32 or null  ct mark
=============  ===================  ======================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrace.batch import Batch, Names
from ctrace.record import (
    STATE_UNKNOWN,
    TCP_STATES,
    Direction,
    Events,
    Kind,
    Reason,
    Status,
    address_text,
    proto_name,
)
from ctrace.recording.derived import Recorded

Texts = tuple[list[str], npt.NDArray[np.int32]]
"""A dictionary-coded column: distinct values, and an index into them per row."""

TEXTS = (
    "kind", "reason", "host", "netns", "proto", "src", "dst", "reply_src", "reply_dst", "status",
    "state", "direction", "process", "cgroup",
)  # fmt: skip
NUMBERS = {
    "sport": np.uint16,
    "dport": np.uint16,
    "reply_sport": np.uint16,
    "reply_dport": np.uint16,
    "zone": np.uint16,
    "entry": np.uint64,
    "pid": np.uint32,
}
OF_DESTROYS = {
    "idle_ms": np.int32,
    "overdue_ms": np.int32,
    "timeout_ms": np.uint32,
    "mark": np.uint32,
}
ORDER = (
    "time", "kind", "reason", "host", "netns", "proto", "src", "sport", "dst", "dport",
    "reply_src", "reply_sport", "reply_dst", "reply_dport", "status", "state", "direction", "zone",
    "entry", "pid", "process", "cgroup", "idle_ms", "overdue_ms", "timeout_ms", "mark",
)  # fmt: skip


class Rows:
    """Turns batches into columns, with the names learned so far."""

    def __init__(self, recording: Recorded) -> None:
        self._of = recording
        self._names = Names({}, {}, {}, {})

    def chunks(self, size: int = 1 << 16) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """(batch, columns) of at most ``size`` rows: arrays, Texts, or (array, valid mask)."""
        for batch in self._of.batches():
            self._learn(batch.names)
            for i in range(0, max(1, len(batch.events)), size):
                yield batch, self.columns(batch.events[i : i + size])

    def columns(self, events: Events) -> dict[str, Any]:
        """The columns of these events."""
        is_destroy = events["kind"] == Kind.DESTROY
        packets = np.isin(events["kind"], (Kind.INSERT, Kind.DROP, Kind.INSERT_FAILED))
        owner = np.where(packets, events["owner"], 0).astype(np.uint64)
        group = np.where(packets, events["cgroup"], 0).astype(np.uint64)
        host = self._of.header.host
        out: dict[str, Any] = {
            "time": events["ts"].astype(np.int64) + self._of.clock.offset,
            "kind": _coded(events["kind"], lambda v: Kind(v).name.lower()),
            "reason": _coded(events["reason"], lambda v: Reason(v).name.lower()),
            "host": ([host], np.zeros(len(events), np.int32)),
            "netns": _coded(events["netns"], self._netns),
            "proto": _coded(events["proto"], proto_name),
            "status": _coded(events["status"], _status),
            "state": _coded(events["state"], _state),
            "direction": _coded(events["direction"], _direction),
            "entry": events["ct"],
            "pid": (owner >> np.uint64(32)).astype(np.uint32),
            "process": _coded(owner, self._process),
            "cgroup": _coded(group, self._cgroup),
        }
        for name in ("src", "dst", "reply_src", "reply_dst"):
            out[name] = _addresses(events[name])
        for name in ("sport", "dport", "reply_sport", "reply_dport", "zone"):
            out[name] = np.ascontiguousarray(events[name])
        for name in OF_DESTROYS:
            out[name] = (np.ascontiguousarray(events[name]), is_destroy)
        return {name: out[name] for name in ORDER}

    def _learn(self, names: Names) -> None:
        for old, new in (
            (self._names.netns, names.netns),
            (self._names.owners, names.owners),
            (self._names.cgroups, names.cgroups),
        ):
            known: Any = old
            known.update(new)

    def _netns(self, inum: int) -> str:
        known = self._names.netns.get(inum)
        return known.name if known else f"netns:{inum}"

    def _process(self, key: int) -> str:
        known = self._names.owners.get(key)
        return known.comm if known else ""

    def _cgroup(self, key: int) -> str:
        return self._names.cgroups.get(key, "")


def _coded(values: npt.NDArray[Any], name: Any) -> Texts:
    distinct, inverse = np.unique(values, return_inverse=True)
    return [name(value) for value in distinct.tolist()], inverse.reshape(-1).astype(np.int32)


def _addresses(values: npt.NDArray[Any]) -> Texts:
    whole = np.ascontiguousarray(values).view("V16").reshape(-1)
    distinct, inverse = np.unique(whole, return_inverse=True)
    names = [address_text(value.tobytes()) for value in distinct]
    return names, inverse.reshape(-1).astype(np.int32)


def _status(bits: int) -> str:
    return "|".join(flag.name for flag in Status if flag & bits and flag.name)


def _state(value: int) -> str:
    if value == STATE_UNKNOWN or value >= len(TCP_STATES):
        return ""
    return TCP_STATES[value]


def _direction(value: int) -> str:
    names = {Direction.IN: "in", Direction.OUT: "out", Direction.FORWARD: "forward"}
    return names.get(Direction(value), "") if value <= max(Direction) else ""
