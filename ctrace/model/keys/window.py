"""A slice of records turned into columns: the only pass over its memory, for every model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from ctrace.model.keys.columns import (
    AF_INET,
    C1,
    C2,
    CLOSE,
    KIND,
    NAT,
    NOWHERE,
    OWNER,
    PORTED,
    REASON,
    TIME_SHIFT,
    TIME_WAIT,
    U16,
    U64,
    Window,
    address_hash,
    has_port,
)
from ctrace.record import RECORD, Direction, Events, Kind, Reason, Status, words

U32 = npt.NDArray[np.uint32]

_APART: Final = 136
_SLAB: Final = 8192
"""Records (1 MiB) whose columns are made while both are in the cache."""

# Places in a record seen as 64-bit words (ctrace.record.WORDS).
_TS, _CT, _SRC, _DST, _PORTS, _PLACE, _WHAT = 0, 1, 2, 4, 10, 11, 12

# Places of 16-bit words: of the status its lowest bits, for records are little-endian.
_FIELDS: Final = dict(RECORD.fields or {})
_STATUS, _WAY = (_FIELDS[name][1] // 2 for name in ("status", "direction"))
_H16, _PROTO = np.uint32(16), np.uint32(0xFF0000)

_PORT_MASK = np.zeros(256, np.uint32)
_PORT_MASK[list(PORTED)] = 0xFFFF

# A code, kind | reason << 8, tells what an event adds to its keys.
_FLOW = np.zeros(1 << 12, np.uint64)
"""Packed counters: inserts | destroys << 21 | expired << 42."""
for _reason in range(16):
    _FLOW[Kind.INSERT | _reason << 8] = 1
    _FLOW[Kind.DESTROY | _reason << 8] = 1 << 21 | (_reason == Reason.EXPIRED) << 42

# And at its end SEEN_REPLY | ASSURED | whether it is one << 3 | state << 8.
_END = np.zeros(1 << 12, np.uint64)
"""Packed counters: assured | unreplied << 21 | closed << 42."""
_REPLIED_ASSURED: Final = int(Status.SEEN_REPLY) | int(Status.ASSURED)
for _state in range(16):
    for _status in (0, Status.SEEN_REPLY, Status.ASSURED, _REPLIED_ASSURED):
        _END[_status | 8 | _state << 8] = (
            bool(_status & Status.ASSURED)
            | (not _status & Status.SEEN_REPLY) << 21
            | (_state in (TIME_WAIT, CLOSE)) << 42
        )

_USUAL: Final = [
    int(kind) | int(reason) << 8
    for kind, reason in ((Kind.INSERT, Reason.NEW), (Kind.DESTROY, Reason.EXPIRED))
]
_RECEIVED: Final = int(Direction.IN) & int(Direction.FORWARD) & ~int(Direction.OUT)
"""Bit of a direction that is neither OUT nor UNKNOWN."""


def window(events: Events) -> Window:
    """The columns of a slice of events, in one pass over its memory.

    (A code is compared with an int: numpy would widen the column for a member of an enum. What
    is taken from a table is asked for by intp: numpy takes by bytes five times slower.)
    """
    table = words(events)
    n = len(table)
    # (rows whose distance is a power of two would share the same few places in a cache)
    columns = np.empty((7, n + _APART), np.uint64)[:, :n]
    ts, ct, meta, src_hash, dst_hash, pair_hash, target_hash = columns
    code, status, way = narrow = np.empty((3, n), np.uint16)
    named, ordered, alone = _fill(table, columns, narrow)

    kind = code & KIND
    ended, comes = kind == int(Kind.DESTROY), kind == int(Kind.INSERT)
    owned = _owned(table, way, comes)
    comes |= kind == int(Kind.EXISTING)
    births = (ts >> np.uint64(TIME_SHIFT)).view(np.int64)
    births *= (comes.view(np.int8) - ended.view(np.int8)).astype(np.int64)
    comes |= kind == int(Kind.DROP)
    counts = _counted(code)
    if counts[:, Kind.FOUND].any():
        comes |= kind == int(Kind.FOUND)
    return Window(
        n=n,
        events=events,
        words=table,
        ts=ts,
        ordered=ordered,
        ct=ct,
        named=named,
        meta=meta,
        alone=alone,
        code=code,
        status=status,
        way=way,
        counts=counts,
        flow=_FLOW.take(code.astype(np.intp)),
        births=births,
        ended=ended,
        ends=np.flatnonzero(ended),
        end=_END.take(_ending(status, way, ended).astype(np.intp)),
        comes=comes,
        translated=bool(np.bitwise_or.reduce(status) & np.uint16(NAT)),
        owned=owned,
        src_hash=src_hash,
        dst_hash=dst_hash,
        pair_hash=pair_hash,
        target_hash=target_hash,
    )


def _fill(table: U64, columns: U64, narrow: U16) -> tuple[bool, bool, bool]:
    """Fill a window's columns; whether every ``ct`` names an entry, the times never step back,
    and all are of one namespace."""
    ts, ct, meta, src_hash, dst_hash, pair_hash, target_hash = columns
    code, status, way = narrow
    halves, quarters = table.view(np.uint32), table.view(np.uint16)
    named, ordered, alone = True, True, True
    for at in range(0, len(table), _SLAB):
        here = slice(at, at + _SLAB)
        part, half, quarter = table[here], halves[here], quarters[here]
        time = ts[here]
        time[:] = part[:, _TS]
        ordered = ordered and not (time[1:] < time[:-1]).any() and (not at or time[0] >= ts[at - 1])
        ct[here] = part[:, _CT]
        named = named and int(ct[here].min()) > 0
        status[here], way[here] = quarter[:, _STATUS], quarter[:, _WAY]
        ipv4 = _services(half, code[here], meta[here])
        mixed = meta[here] ^ meta[0]
        alone = alone and int(np.bitwise_or.reduce(mixed)) >> 32 == 0
        np.multiply(meta[here], C2, out=mixed)
        for first, hashed, with_service in (
            (_SRC, src_hash[here], pair_hash[here]),
            (_DST, dst_hash[here], target_hash[here]),
        ):
            if ipv4:
                hashed[:] = half[:, 2 * first + 3]
                np.multiply(hashed, C1, out=hashed)
            else:
                hashed[:] = address_hash(part[:, first], part[:, first + 1])
            np.add(hashed, mixed, out=with_service)
    return named, bool(ordered), alone


def _services(half: U32, code: U16, meta: U64) -> bool:
    """Fill codes and meta words from records as 32-bit words; whether all are IPv4."""
    what = half[:, 2 * _WHAT].copy()  # kind, reason, protocol, family
    np.bitwise_and(what.view(np.uint16)[0::2], KIND | REASON, out=code)
    service = half[:, 2 * _PORTS] >> _H16
    proto = what & _PROTO
    every, some = int(np.bitwise_and.reduce(what)), int(np.bitwise_or.reduce(what))
    if (every ^ some) & int(_PROTO) or not has_port(some >> 16 & 0xFF):
        service &= _PORT_MASK.take((proto >> _H16).astype(np.intp))
    service |= proto  # it has the same place in a meta word
    both = meta.view(np.uint32)
    both[0::2], both[1::2] = service, half[:, 2 * _PLACE]
    return every >> 24 == some >> 24 == AF_INET


def _ending(status: U16, way: U16, ended: npt.NDArray[np.bool_]) -> U16:
    """What :data:`_END` is asked by, of each event."""
    asked = way & np.uint16(0xF00)
    asked |= status & np.uint16(_REPLIED_ASSURED)
    asked |= ended.astype(np.uint16) * np.uint16(8)
    return asked


def _owned(table: U64, way: U16, inserts: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """Inserts with an owner: only what this host sends may have one."""
    if int(np.bitwise_and.reduce(way)) & _RECEIVED:
        return NOWHERE
    some = np.flatnonzero((way & np.uint16(_RECEIVED) == 0) & inserts)
    return some[table[some, OWNER] != 0] if some.size else some


def _counted(code: U16) -> npt.NDArray[np.intp]:
    """Events by (reason, kind); what is usual is compared, the rest binned one by one."""
    counts = np.zeros(1 << 12, np.intp)
    rest = np.ones(len(code), bool)
    for usual in _USUAL:
        others = code != usual
        counts[usual] = len(code) - np.count_nonzero(others)
        rest &= others
    counts += np.bincount(code.take(np.flatnonzero(rest)), minlength=len(counts))
    return counts.reshape(16, 256)[:, :16]


def sorted_from(events: Events, at: int) -> Events:
    """The events, with those from ``at`` on sorted by time.

    Sources promise order, but CPUs polled in turn may break it.
    """
    order = np.argsort(events["ts"][at:], kind="stable")
    events = events.copy()
    events[at:] = events[at:][order]
    return events


def by_netns(w: Window, at: npt.NDArray[np.intp]) -> Iterator[tuple[int, npt.NDArray[np.intp]]]:
    """Split the events at ``at`` by namespace."""
    if not at.size:
        return
    netns = w.netns(at)
    if (netns == netns[0]).all():
        yield int(netns[0]) >> 32, at
        return
    for one in np.unique(netns):
        yield int(one) >> 32, at[netns == one]
