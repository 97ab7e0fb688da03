"""Events as lines: columns for people, JSON lines for programs.

Per batch each distinct address, time column and name is turned into text once; per
event remains one formatted string.

A JSON line has, always: ``ts`` (UTC, nanoseconds), ``kind`` (insert, destroy, drop,
insert_failed, existing), ``reason``, ``family``, ``proto``, ``src``, ``dst``,
``sport``, ``dport``, ``reply`` (src, dst, sport, dport), ``netns`` (inode),
``netns_name``, ``zone``, ``status`` (list of IPS_* names), ``state`` (TCP, else null)
and ``direction`` (in, out, forward or null). A destroy adds ``idle_ms``,
``overdue_ms``, ``timeout_ms`` (null: unknown) and ``mark``; the others add ``owner``
(pid, comm, unit; null: unknown) and ``cgroup`` (id, null: unknown).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np

from ctrace.batch import Clock, Names, Netns, Owner
from ctrace.record import (
    TCP_STATES,
    Direction,
    Events,
    Kind,
    Reason,
    Status,
    address_text,
    proto_name,
    words,
)

HEADER: Final = (
    f"{'TIME':<15} {'EVENT':<13} {'REASON':<14} {'PROTO':<6} {'SOURCE':<23} {'DESTINATION':<23} "
    f"{'WAY':<8} {'NETNS':<16} {'STATE':<12} OWNER"
)

_WAYS: Final = ("", "in", "out", "forward")
NAMES_KEPT: Final = 65536


class EventLines:
    """Formats batches; remembers the names that earlier batches brought."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._netns: dict[int, Netns] = {}
        self._owners: dict[int, Owner] = {}

    def learn(self, names: Names) -> None:
        """Take in a batch's names."""
        self._netns.update(names.netns)
        self._owners.update(names.owners)
        while len(self._owners) > NAMES_KEPT:
            del self._owners[next(iter(self._owners))]

    def columns(self, events: Events) -> list[str]:
        """One aligned line per event."""
        times = [text[11:26] for text in self._times(events)]
        (src, dst), ports = _addresses(events, ("src", "dst")), _lists(events, "sport", "dport")
        return [
            f"{time:<15} {_kind(kind):<13} {_reason(reason):<14} {proto_name(proto):<6} "
            f"{_end(s, sport):<23} {_end(d, dport):<23} {_WAYS[way]:<8} "
            f"{self._netns_name(inum):<16} {_state(state) or '-':<12} "
            f"{self._owner_text(owner) if kind != Kind.DESTROY else _lifetime(idle)}".rstrip()
            for time, kind, reason, proto, s, sport, d, dport, way, inum, state, owner, idle in zip(
                times,
                *_lists(events, "kind", "reason", "proto"),
                src,
                ports[0],
                dst,
                ports[1],
                *_lists(events, "direction", "netns", "state", "owner", "idle_ms"),
            )
        ]

    def json(self, events: Events) -> list[str]:
        """One JSON object per event."""
        addresses = _addresses(events, ("src", "dst", "reply_src", "reply_dst"))
        common = _lists(
            events,
            *("kind", "reason", "family", "proto", "sport", "dport", "reply_sport"),
            *("reply_dport", "netns", "zone", "status", "state", "direction"),
        )
        return [
            f'{{"ts":"{ts}Z","kind":"{_kind(kind)}","reason":"{_reason(reason)}",'
            f'"family":"{"ipv4" if family == 2 else "ipv6"}","proto":"{proto_name(proto)}",'
            f'"src":"{src}","dst":"{dst}","sport":{sport},"dport":{dport},'
            f'"reply":{{"src":"{rsrc}","dst":"{rdst}","sport":{rsport},"dport":{rdport}}},'
            f'"netns":{netns},"netns_name":{json.dumps(self._netns_name(netns))},'
            f'"zone":{zone},"status":{_status(status)},"state":{_state_json(state)},'
            f'"direction":{_way_json(way)},{rest}}}'
            for (
                ts, src, dst, rsrc, rdst, kind, reason, family, proto, sport, dport, rsport,
                rdport, netns, zone, status, state, way, rest,
            ) in zip(self._times(events), *addresses, *common, self._rest(events))
        ]  # fmt: skip

    def _rest(self, events: Events) -> list[str]:
        """Fields that only a destroy has, or only the others."""
        columns = _lists(
            events, "kind", "owner", "cgroup", "idle_ms", "overdue_ms", "timeout_ms", "mark"
        )
        return [
            f'"idle_ms":{idle if idle >= 0 else "null"},"overdue_ms":{overdue},'
            f'"timeout_ms":{timeout or "null"},"mark":{mark}'
            if kind == Kind.DESTROY
            else f'"owner":{self._owner_json(owner)},"cgroup":{cgroup or "null"}'
            for kind, owner, cgroup, idle, overdue, timeout, mark in zip(*columns)
        ]

    def _times(self, events: Events) -> list[str]:
        utc = events["ts"].astype(np.int64) + self._clock.offset
        texts: list[str] = np.datetime_as_string(utc.view("M8[ns]"), unit="ns").tolist()
        return texts

    def _netns_name(self, inum: int) -> str:
        known = self._netns.get(inum)
        return known.name if known else f"netns:{inum}"

    def _owner_text(self, key: int) -> str:
        if not key:
            return ""
        known = self._owners.get(key)
        return f"{known.comm}[{key >> 32}]" if known else f"[{key >> 32}]"

    def _owner_json(self, key: int) -> str:
        if not key:
            return "null"
        known = self._owners.get(key)
        comm, unit = (known.comm, known.unit) if known else ("", "")
        return json.dumps({"pid": key >> 32, "comm": comm, "unit": unit}, separators=(",", ":"))


def _lists(events: Events, *names: str) -> list[list[int]]:
    return [events[name].tolist() for name in names]


def _addresses(events: Events, names: Sequence[str]) -> list[list[str]]:
    """The address columns as text, each distinct address converted once."""
    columns = {"src": 2, "dst": 4, "reply_src": 6, "reply_dst": 8}
    rows = words(events)
    pairs = np.concatenate([rows[:, columns[name] : columns[name] + 2] for name in names])
    keys = np.ascontiguousarray(pairs).view("V16").reshape(-1)
    distinct, index = np.unique(keys, return_inverse=True)
    texts = np.array([address_text(key.tobytes()) for key in distinct], object)
    return [part.tolist() for part in np.split(texts[index.reshape(-1)], len(names))]


def _end(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _lifetime(idle: int) -> str:
    return f"idle {idle / 1000:.1f}s" if idle >= 0 else ""


@cache
def _kind(number: int) -> str:
    return Kind(number).name.lower()


@cache
def _reason(number: int) -> str:
    return Reason(number).name.lower()


@cache
def _state(number: int) -> str:
    return TCP_STATES[number] if number < len(TCP_STATES) else ""


@cache
def _state_json(number: int) -> str:
    return json.dumps(_state(number) or None)


@cache
def _way_json(number: int) -> str:
    return json.dumps(_WAYS[number] or None) if number in set(Direction) else "null"


@cache
def _status(bits: int) -> str:
    return json.dumps([bit.name for bit in Status if bits & bit], separators=(",", ":"))
