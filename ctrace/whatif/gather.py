"""From batches to flows.

Pairing is by tuple: a table holds at most one entry with a given original tuple,
protocol, zone and namespace, so an INSERT ends with the next DESTROY of the same
tuple.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ctrace.batch import Batch
from ctrace.record import Events, Kind, Reason, Status, words
from ctrace.whatif.ends import FEW, Looks, completed
from ctrace.whatif.flows import F64, I64, Basis, Bool, Flows, Readings, Recorded, default_timeout

MOST_EVENTS: Final = 20_000_000
"""About 1.2 GB; of a longer recording the last part is taken."""

SLIM: Final = np.dtype(
    [
        ("ts", "<u8"), ("key", "<u8"), ("netns", "<u4"), ("status", "<u4"),
        ("overdue", "<i4"), ("idle", "<i4"), ("timeout", "<u4"),
        ("sport", "<u2"), ("dport", "<u2"), ("reply_sport", "<u2"),
        ("kind", "u1"), ("reason", "u1"), ("proto", "u1"), ("state", "u1"),
    ]
)  # fmt: skip

SAME_PASS_S: Final = 0.3
"""gc_worker takes at most 10 ms, then goes on in the next jiffy: one pass is one burst."""

TICK_S: Final = 0.05
"""What a time in ticks, and its reader, may be late by."""
OTHER: Final = 0.5
"""Share of a service's ends and looks showing another timeout, from which all are taken to have
one."""

RETRY_S: Final = 130.0
"""A SYN is retried for 127 s (tcp_syn_retries 6): a refused packet and a later insert of
the same tuple within this time are one flow."""


def gather(batches: Iterable[Batch], *, texts: bool = False) -> Recorded:
    """All batches of a source, or of ``texts``, paired. Memory: 60 bytes an event, bounded."""
    parts: list[npt.NDArray[Any]] = []
    rows: list[tuple[int, int, int, int, int]] = []
    names: dict[int, str] = {}
    size = lost = cut = 0
    first, last, timed = None, 0, True
    for batch in batches:
        slim = _slim(batch.events)
        parts.append(slim)
        size += len(slim)
        while size - len(parts[0]) > MOST_EVENTS:
            gone = parts.pop(0)
            size -= len(gone)
            cut += len(gone)
        lost += batch.lost
        names.update({inum: space.name for inum, space in batch.names.netns.items()})
        last = max(last, batch.until)
        for table in batch.tables:
            if table.gone or not table.max_known:
                continue
            timed &= table.at > 0
            read_at = table.at or batch.until
            rows.append((read_at, table.netns, table.count, table.max, table.buckets))
        first = batch.until if first is None else first
    events = np.concatenate(parts) if parts else np.zeros(0, SLIM)
    if (events["ts"][1:] < events["ts"][:-1]).any():
        events = events[np.argsort(events["ts"], kind="stable")]
    # Readings from before the first event show that there was nothing.
    begins = [int(events["ts"][0])] if len(events) else [first or 0]
    start = min([*begins, *(row[0] for row in rows if timed and not cut)])
    readings = _readings(rows, start, timed)
    at = (events["ts"].astype(np.int64) - start) / 1e9
    seconds = max((last - start) / 1e9, float(at[-1]) if len(at) else 0.0)
    expired = events["reason"] == Reason.EXPIRED
    lag = events["overdue"][expired] / 1e3
    evicted = np.isin(events["reason"], [Reason.EVICTED, Reason.GC_PRESSURE])
    refused, half = events["kind"] == Kind.DROP, seconds / 2
    early = int(np.searchsorted(at, half, "right"))
    flows = _flows(events, at, seconds, texts)
    return Recorded(
        flows=flows,
        readings=readings,
        seconds=seconds,
        started=start,
        drops=_tally(events["netns"][refused]),
        evictions=_tally(events["netns"][evicted]),
        drop_at={
            int(inum): at[refused & (events["netns"] == inum)]
            for inum in np.unique(events["netns"][refused])
        },
        lag_s=float(lag.mean()) if len(lag) >= 20 else float("nan"),
        collections=_passes(at[expired], flows),
        lost=lost,
        cut=cut,
        names=names,
        texts=texts,
        half_s=half,
        first=_flows(events[:early], at[:early], half, texts) if early else None,
    )


def _passes(at: F64, flows: Flows) -> F64:
    """When gc_worker passed: the ends of bursts of expired entries going, at ``at``.

    Single expired entries also go when a lookup meets them. So bursts far smaller than the largest
    do not count, but for the first; nor does one that left more behind than it took.
    """
    if not len(at):
        return at
    last = np.flatnonzero(np.append(np.diff(at) > SAME_PASS_S, True))
    ends, sizes = at[last], np.diff(np.append(-1, last))
    known = flows.sure & np.isin(flows.basis, [Basis.SEEN, Basis.LOOKED]) & ~np.isnan(flows.leave)
    over = flows.expire[known] + SAME_PASS_S
    gone = np.maximum(np.minimum(flows.leave, flows.end)[known], over)
    left_behind = _by(over, ends) - _by(gone, ends)
    large = sizes >= 0.2 * sizes.max()
    large[0] = True
    passes: F64 = ends[large & (left_behind <= sizes)]
    return passes


def _by(times: F64, moments: F64) -> npt.NDArray[np.intp]:
    """How many of the times are over at each of the moments."""
    return np.searchsorted(np.sort(times), moments, "right")


def _slim(events: Events) -> npt.NDArray[Any]:
    slim = np.zeros(len(events), SLIM)
    for name in ("ts", "netns", "status", "kind", "reason", "proto", "state",
                 "sport", "dport", "reply_sport"):  # fmt: skip
        slim[name] = events[name]
    ends = np.isin(events["kind"], [Kind.DESTROY, Kind.MET, Kind.SAMPLED])
    for ours, theirs in (("overdue", "overdue_ms"), ("idle", "idle_ms"), ("timeout", "timeout_ms")):
        slim[ours][ends] = events[theirs][ends]
    slim["key"] = _keys(events)
    return slim


def _keys(events: Events) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of what makes an entry unique: tuple, protocol, zone, namespace."""
    whole = words(events)
    extra = events["netns"].astype(np.uint64) << np.uint64(24)
    extra ^= events["zone"].astype(np.uint64) << np.uint64(8)
    extra ^= events["proto"].astype(np.uint64)
    ports = whole[:, 10] & np.uint64(0xFFFFFFFF)  # of the original direction
    key = np.full(len(events), 0x9E3779B97F4A7C15, np.uint64)
    for part in (whole[:, 2], whole[:, 3], whole[:, 4], whole[:, 5], ports, extra):
        key ^= part
        key *= np.uint64(0xBF58476D1CE4E5B9)
        key ^= key >> np.uint64(29)
    return key


def _readings(rows: list[tuple[int, int, int, int, int]], start: int, timed: bool) -> Readings:
    array = np.array(rows, np.int64).reshape(-1, 5)
    ts, netns, count, limit, buckets = array.T
    return Readings((ts - start) / 1e9, netns, count, limit, buckets, timed)


def _tally(netns: npt.NDArray[Any]) -> dict[int, int]:
    values, counts = np.unique(netns, return_counts=True)
    return {int(value): int(count) for value, count in zip(values, counts)}


def _flows(events: npt.NDArray[Any], at: F64, seconds: float, texts: bool) -> Flows:
    begin, over = _pairs(events)
    # A flow is known by its last record: that has the final state, status and timeouts.
    row = np.where(over >= 0, over, begin)
    facts = events[row]
    ended = over >= 0
    arrive = np.where(begin >= 0, at[np.maximum(begin, 0)], 0.0)
    existed = (begin < 0) | (events["kind"][np.maximum(begin, 0)] == Kind.EXISTING)
    arrive[existed] = 0.0
    left = np.where(ended, at[row], np.inf)
    reason = np.where(ended, facts["reason"], 0)
    evicted = np.isin(reason, [Reason.EVICTED, Reason.GC_PRESSURE])
    expired = reason == Reason.EXPIRED
    overdue = facts["overdue"] / 1e3
    assured = (facts["status"] & int(Status.ASSURED)) != 0
    timeout = facts["timeout"] / 1e3
    timeout = np.where(
        timeout > 0, timeout, default_timeout(facts["proto"], facts["state"], assured)
    )
    timeout[~ended] = np.nan
    tries_at, tries_of, lone = _attempts(events, at, begin, existed)
    extra, never = len(lone), events[lone]

    def joined(entered: npt.NDArray[Any], refused: object) -> npt.NDArray[Any]:
        return np.concatenate([entered, np.broadcast_to(np.asarray(refused), extra)])

    flows = Flows(
        netns=joined(facts["netns"], never["netns"]).astype(np.int64),
        arrive=joined(arrive, at[lone]),
        expire=joined(np.where(ended, left - overdue, np.inf), np.nan),
        end=joined(np.where(ended & ~expired & ~evicted, left, np.inf), np.inf),
        leave=joined(np.where(evicted, np.nan, left), np.nan),
        timeout=joined(timeout, np.nan),
        proto=joined(facts["proto"], never["proto"]),
        state=joined(facts["state"], never["state"]),
        assured=joined(assured, False),
        sport=joined(facts["sport"], never["sport"]).astype(np.int64),
        dport=joined(facts["dport"], never["dport"]).astype(np.int64),
        reply_sport=joined(facts["reply_sport"], never["reply_sport"]).astype(np.int64),
        existed=joined(existed, False),
        basis=joined(np.where(ended, Basis.SEEN, Basis.NOTHING), Basis.NOTHING).astype(np.uint8),
        among=np.zeros(len(begin) + extra, np.int64),
        sure=joined(~_other_timeout(facts, ended, at[row] - arrive, existed), True),
        key=joined(facts["key"], never["key"]),
        attempt_at=tries_at,
        attempt_of=tries_of,
    )
    looks = _looks(events, at, begin, over)
    # In texts few ends tell which timeout they had, with netlink none.
    if not texts and (events["timeout"] > 0).any():
        flows = replace(flows, sure=_sure(flows, looks))
    else:
        flows = replace(flows, sure=np.ones(len(flows), bool))
    return completed(flows, looks, seconds)


def _other_timeout(facts: npt.NDArray[Any], ended: Bool, stayed: F64, existed: Bool) -> Bool:
    """Which ends tell that the entry had another timeout than the setting's: it can't have been
    idle for longer than it existed."""
    wrong: Bool = (facts["timeout"] == 0) | (~existed & (facts["idle"] / 1e3 > stayed + TICK_S))
    return wrong & ended


def _sure(flows: Flows, looks: Looks) -> Bool:
    """Which flows have the timeouts that the settings give, by looks at their service, or ends.

    An end tells only of a timeout that is shorter than the setting, a look of any.
    """
    service = flows.proto.astype(np.int64) | flows.dport << 8 | flows.netns << 24
    number = np.unique(service, return_inverse=True)[1].ravel()
    size = int(number.max(initial=0)) + 1
    aged = np.where(flows.existed[looks.flow], np.inf, looks.at - flows.arrive[looks.flow])
    wrong = (looks.timeout == 0) | (looks.timeout - looks.left > aged + TICK_S)
    waits = looks.left > 0
    other = np.zeros(size)
    for of, which, few in (
        (number[flows.known], ~flows.sure[flows.known], 0),
        (number[looks.flow[waits]], wrong[waits], FEW),
    ):
        many = np.bincount(of, minlength=size)
        share = np.bincount(of, which, size) / np.maximum(many, 1)
        other = np.where(many > few, share, other)
    sure: Bool = flows.sure & (other < OTHER)[number]
    return sure


def _looks(events: npt.NDArray[Any], at: F64, begin: I64, over: I64) -> Looks:
    """What looks found in entries whose beginning was seen, or that were listed at the start."""
    rows = np.flatnonzero(np.isin(events["kind"], [Kind.MET, Kind.SAMPLED]))
    flow = np.flatnonzero(begin >= 0)
    # Each look is at the latest entry of its tuple that began before it.
    keys = np.concatenate([events["key"][rows], events["key"][begin[flow]]])
    number = np.unique(keys, return_inverse=True)[1].astype(np.int64) * len(events)
    looked, began = number[: len(rows)] + rows, number[len(rows) :] + begin[flow]
    order = np.argsort(began)
    before = np.searchsorted(began[order], looked, "right") - 1
    of = flow[order][before] if len(flow) else np.zeros(len(rows), np.int64)
    good = (before >= 0) & (events["key"][begin[of]] == events["key"][rows])
    good &= (over[of] < 0) | (rows < over[of])
    rows, of = rows[good], of[good]
    seen = events[rows]
    return Looks(
        at[rows],
        of,
        seen["state"],
        (seen["status"] & int(Status.ASSURED)) != 0,
        -seen["overdue"] / 1e3,
        seen["timeout"] / 1e3,
        seen["kind"] == Kind.MET,
    )


def _pairs(events: npt.NDArray[Any]) -> tuple[I64, I64]:
    """(row where it began, row where it ended) for each entry; -1 where unseen."""
    rows = np.flatnonzero(np.isin(events["kind"], [Kind.INSERT, Kind.EXISTING, Kind.DESTROY]))
    order = rows[np.lexsort((rows, events["key"][rows]))]
    key, kind = events["key"][order], events["kind"][order]
    ends = kind == Kind.DESTROY
    same = np.zeros(len(order), bool)
    if len(order):
        same[:-1] = key[1:] == key[:-1]
    follower = np.roll(ends, -1) & same  # the next row of the same tuple is its end
    starts = np.flatnonzero(~ends)
    over = np.where(follower[starts], order[np.minimum(starts + 1, len(order) - 1)], -1)
    # An EXISTING beside an INSERT that we saw is the same entry, listed.
    preceded = np.zeros(len(order), bool)
    preceded[1:] = same[:-1] & ~ends[:-1]
    listed = preceded[starts] & (kind[starts] == Kind.EXISTING)
    # A start followed by another start lost its end: it is closed there.
    lone_end = ends.copy()
    lone_end[1:] &= ~(same[:-1] & ~ends[:-1])
    older = order[np.flatnonzero(lone_end)]
    begin = np.concatenate([order[starts][~listed], np.full(len(older), -1, np.int64)])
    over = np.concatenate([over[~listed], older])
    return begin.astype(np.int64), over.astype(np.int64)


def _attempts(events: npt.NDArray[Any], at: F64, begin: I64, existed: Bool) -> tuple[F64, I64, I64]:
    """(time, flow) of every try to enter, and the rows of flows that never got in.

    Refused packets belong to the next insert of their tuple, if that came soon.
    """
    entered = np.flatnonzero(~existed)
    refused = np.flatnonzero(events["kind"] == Kind.DROP)
    rows = np.concatenate([begin[entered], refused])
    flow = np.concatenate([entered, np.full(len(refused), -1, np.int64)])
    order = np.lexsort((rows, events["key"][rows])) if len(rows) else np.zeros(0, np.int64)
    rows, flow = rows[order], flow[order]
    key, when = events["key"][rows], at[rows]
    # The next insert at or after each position, walking backwards.
    n = len(rows)
    position = np.where(flow >= 0, np.arange(n), n)
    following = np.minimum.accumulate(position[::-1])[::-1] if n else position
    nearest = np.minimum(following, max(n - 1, 0))
    joins = (following < n) & (key[nearest] == key) & (when[nearest] - when <= RETRY_S)
    flow = np.where(joins, flow[nearest], -1) if n else flow
    alone = np.flatnonzero(flow < 0)
    # Retries that never succeeded: one flow a tuple.
    _, first, number = np.unique(key[alone], return_index=True, return_inverse=True)
    flow[alone] = len(begin) + number
    lone = rows[alone[first]] if len(alone) else np.zeros(0, np.int64)
    sorted_by_time = np.argsort(when, kind="stable")
    return when[sorted_by_time], flow[sorted_by_time], lone
