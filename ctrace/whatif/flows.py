"""A recording as flows: when each tried to enter the table, and how long it would stay.

Pairing is by tuple: a table holds at most one entry with a given original tuple,
protocol, zone and namespace, so an INSERT ends with the next DESTROY of the same
tuple. All times are seconds since the first event.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ctrace.batch import Batch
from ctrace.record import Events, Kind, Reason, Status, by_time, words

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
U8 = npt.NDArray[np.uint8]

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

RETRY_S: Final = 130.0
"""A SYN is retried for 127 s (tcp_syn_retries 6): a refused packet and a later insert of
the same tuple within this time are one flow."""

# Seconds by default (net/netfilter/nf_conntrack_proto_tcp.c tcp_timeouts, in state order).
TCP_TIMEOUTS: Final = (120.0, 120.0, 60.0, 432000.0, 120.0, 60.0, 30.0, 120.0, 10.0, 120.0)
OTHER_TIMEOUTS: Final = {1: 30.0, 58: 30.0, 17: 30.0}
UDP_STREAM: Final = 120.0
GENERIC: Final = 600.0


@dataclass(frozen=True)
class Readings:
    """The kernel's own counts over time: parallel arrays."""

    ts: F64
    netns: I64
    count: I64
    limit: I64
    buckets: I64
    timed: bool = True
    """Whether ``ts`` is when each was taken, and not when its batch of events ended."""


@dataclass(frozen=True)
class Flows:
    """One element a flow, sorted by ``arrive``; then the attempts to enter, sorted by time."""

    netns: I64
    arrive: F64
    """When the entry was made; for a flow that never got in, its first refused packet."""
    expire: F64
    """When its timeout passes: last refresh + timeout. inf: it outlives the recording."""
    end: F64
    """When it was deleted before that (RST, reopened, conntrack -D); inf when it was not."""
    leave: F64
    """When it really left the table; inf when it was still there; NaN when it was evicted
    or never in."""
    timeout: F64
    """Of the state that it died in, seconds."""
    proto: U8
    state: U8
    assured: Bool
    sport: I64
    dport: I64
    reply_sport: I64
    known: Bool
    """Whether its end was seen; the rest is taken from flows like it."""
    attempt_at: F64
    attempt_of: I64
    """Index of the flow."""

    def __len__(self) -> int:
        return len(self.arrive)

    def of_service(self, proto: int, port: int) -> Bool:
        """Flows that NOTRACK rules for a service keep out: to its port, before or after NAT."""
        found: Bool = (self.proto == proto) & ((self.dport == port) | (self.reply_sport == port))
        return found


@dataclass(frozen=True)
class Recorded:
    """What was gathered from a recording."""

    flows: Flows
    readings: Readings
    seconds: float
    started: int
    """Boot clock, ns, of second 0."""
    drops: dict[int, int]
    evictions: dict[int, int]
    drop_at: dict[int, F64]
    """Per namespace, when packets were refused."""
    lag_s: float
    """Mean time between an entry's timeout and its collection, as recorded; NaN: none seen."""
    collections: F64
    """When gc_worker passed: the ends of bursts of expired entries going, and the first
    time that one went."""
    lost: int
    cut: int
    """Events at the beginning that were left out."""
    names: dict[int, str]
    """Namespaces, as the recording names them."""


def gather(batches: Iterable[Batch]) -> Recorded:
    """All batches of a source, paired. Memory: 60 bytes an event, bounded."""
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
            if table.gone:
                continue
            timed &= table.at > 0
            read_at = table.at or batch.until
            rows.append((read_at, table.netns, table.count, table.max, table.buckets))
        if first is None:
            first = int(slim["ts"][0]) if len(slim) else batch.until
    events = np.concatenate(parts) if parts else np.zeros(0, SLIM)
    events = by_time(events)
    start = int(events["ts"][0]) if len(events) else (first or 0)
    readings = _readings(rows, start, timed)
    at = (events["ts"].astype(np.int64) - start) / 1e9
    seconds = max((last - start) / 1e9, float(at[-1]) if len(at) else 0.0)
    expired = events["reason"] == Reason.EXPIRED
    lag = events["overdue"][expired] / 1e3
    evicted = np.isin(events["reason"], [Reason.EVICTED, Reason.GC_PRESSURE])
    refused = events["kind"] == Kind.DROP
    return Recorded(
        flows=_flows(events, at, seconds),
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
        collections=np.unique(np.append(at[expired][:1], _bursts(at[expired]))),
        lost=lost,
        cut=cut,
        names=names,
    )


def default_timeout(proto: U8, state: U8, assured: Bool) -> F64:
    """The kernel's default timeout of each flow's last state, seconds."""
    result = np.full(len(proto), GENERIC)
    tcp = proto == 6
    result[tcp] = np.array(TCP_TIMEOUTS)[np.minimum(state[tcp], len(TCP_TIMEOUTS) - 1)]
    for number, seconds in OTHER_TIMEOUTS.items():
        result[proto == number] = seconds
    result[(proto == 17) & assured] = UDP_STREAM
    return result


def _bursts(at: F64) -> F64:
    """Ends of clusters of times, without those that are small beside the largest.

    Single expired entries also go when a lookup meets them.
    """
    if not len(at):
        return at
    last = np.flatnonzero(np.append(np.diff(at) > SAME_PASS_S, True))
    sizes = np.diff(np.append(-1, last))
    ends: F64 = at[last[sizes >= 0.2 * sizes.max()]]
    return ends


def _slim(events: Events) -> npt.NDArray[Any]:
    slim = np.zeros(len(events), SLIM)
    for name in ("ts", "netns", "status", "kind", "reason", "proto", "state",
                 "sport", "dport", "reply_sport"):  # fmt: skip
        slim[name] = events[name]
    ends = events["kind"] == Kind.DESTROY
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


def _flows(events: npt.NDArray[Any], at: F64, seconds: float) -> Flows:
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
    expire = np.where(ended, left - overdue, np.inf)
    end = np.where(ended & ~expired & ~evicted, left, np.inf)
    leave = np.where(evicted, np.nan, left)

    tries_at, tries_of, lone = _attempts(events, at, begin, existed)
    n, extra = len(begin), len(lone)
    never = events[lone]

    def joined(entered: npt.NDArray[Any], refused: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.concatenate([entered, refused])

    flows = Flows(
        netns=joined(facts["netns"], never["netns"]).astype(np.int64),
        arrive=joined(arrive, at[lone]),
        expire=joined(expire, np.full(extra, np.nan)),
        end=joined(end, np.full(extra, np.inf)),
        leave=joined(leave, np.full(extra, np.nan)),
        timeout=joined(timeout, np.full(extra, np.nan)),
        proto=joined(facts["proto"], never["proto"]),
        state=joined(facts["state"], never["state"]),
        assured=joined(assured, np.zeros(extra, bool)),
        sport=joined(facts["sport"], never["sport"]).astype(np.int64),
        dport=joined(facts["dport"], never["dport"]).astype(np.int64),
        reply_sport=joined(facts["reply_sport"], never["reply_sport"]).astype(np.int64),
        known=joined(ended, np.zeros(extra, bool)),
        attempt_at=tries_at,
        attempt_of=tries_of,
    )
    assert len(flows) == n + extra
    return _completed(flows, seconds)


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


def _completed(flows: Flows, seconds: float) -> Flows:
    """Fill in what a flow's end would have told, from flows like it that lived longer than it has.

    Like it: same namespace, protocol and port, else same protocol. Those that ended are the
    short-lived ones first: each stands for as many as began too late to be seen ending.
    Flows that outlived all that ended keep an unknown end (inf).
    """
    missing = ~flows.known
    if not missing.any():
        return flows
    expire, timeout, state = flows.expire.copy(), flows.timeout.copy(), flows.state.copy()
    assured = flows.assured.copy()
    life = np.where(flows.known, np.minimum(flows.expire, flows.end) - flows.arrive, np.nan)
    found = np.zeros(len(flows), bool)
    seen_for = np.where(np.isnan(flows.expire), 0.0, seconds - flows.arrive)
    random = np.random.default_rng(1)
    for group in (_groups(flows, True), _groups(flows, False)):
        todo = missing & ~found
        for number in np.unique(group[todo]):
            like = flows.known & (group == number) & (flows.arrive > 0)
            if np.count_nonzero(like) < 5:
                continue
            stayed = np.where(np.isnan(flows.leave), flows.expire, flows.leave) - flows.arrive
            mine = np.flatnonzero(todo & (group == number))
            donors = np.flatnonzero(like)
            chance = seconds - flows.arrive[(group == number) & (flows.arrive > 0)]
            of = _like(stayed[donors], chance, seen_for[mine], random)
            mine, donor = mine[of >= 0], donors[of[of >= 0]]
            state[mine], timeout[mine] = flows.state[donor], flows.timeout[donor]
            expire[mine] = flows.arrive[mine] + life[donor]
            # At its first packet no entry is ASSURED yet: what others became counts.
            assured[mine] |= flows.assured[donor]
            found[mine] = True
    inside = np.isinf(flows.expire)
    # It was still there at the end: its timeout can't have passed long before.
    expire = np.where(inside & found, np.maximum(expire, seconds), expire)
    nothing = missing & ~found
    expire[nothing] = np.where(inside[nothing], np.inf, flows.arrive[nothing] + GENERIC)
    fallback = default_timeout(state, np.minimum(state, 9).astype(np.uint8), assured)
    timeout = np.where(np.isnan(timeout), fallback, timeout)
    return _replace(flows, expire=expire, timeout=timeout, state=state, assured=assured)


def _like(stayed: F64, chance: F64, age: F64, random: np.random.Generator) -> I64:
    """For each age, one of those that stayed longer, drawn at random; -1 where none did.

    One that stayed long was seen to end only if it began early: it weighs the inverse of the
    part of all that were watched for so long (``chance``), as in Kaplan and Meier's estimate.
    """
    order = np.argsort(stayed, kind="stable")
    watched = len(chance) - np.searchsorted(np.sort(chance), stayed[order], "left")
    weight = np.cumsum(len(chance) / np.maximum(watched, 1))
    first = np.searchsorted(stayed[order], age, "right")
    below = np.concatenate([[0.0], weight])[first]
    drawn = below + random.random(len(age)) * (weight[-1] - below)
    at = np.searchsorted(weight, drawn, "right").clip(first, len(order) - 1)
    chosen: I64 = np.where(first < len(order), order[at], -1).astype(np.int64)
    return chosen


def _groups(flows: Flows, by_port: bool) -> I64:
    group = flows.proto.astype(np.int64)
    if by_port:
        _, ns = np.unique(flows.netns, return_inverse=True)
        group = group | flows.dport << 8 | ns.astype(np.int64) << 24
    return group


def _replace(flows: Flows, **changes: Any) -> Flows:
    return Flows(**{**flows.__dict__, **changes})
