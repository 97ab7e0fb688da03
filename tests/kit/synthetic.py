"""Events as a busy host makes them, and arbitrary ones, for tests and benchmarks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ctrace.batch import Batch, Clock, HookInfo, Names, Netns, Owner, SelfCost, TableReading
from ctrace.model.model import Model
from ctrace.model.snapshot import Snapshot
from ctrace.record import (
    MAPPED_PREFIX,
    N_REASONS,
    RECORD,
    WORDS,
    Direction,
    Events,
    Kind,
    Reason,
    Status,
    empty,
    join,
)
from ctrace.recording.format.meta import Header
from ctrace.recording.writer import Writer

NETNS = 4026531840
SECOND = 1_000_000_000
UTC = 1_563_000_000 * SECOND


def header(started: int = 100 * SECOND, **more: object) -> Header:
    """A header as a recorder on one host would write it."""
    return Header(
        HookInfo("fentry", ("nf_conntrack_hash_check_insert",), ("nothing",)),
        Clock(UTC),
        started,
        host="web1",
        kernel="6.18.0",
        facts={"net.netfilter.nf_conntrack_max": "65536"},
        **more,  # type: ignore[arg-type]
    )


def traffic(n: int, *, rate: float = 50_000, clients: int = 4000, seed: int = 1) -> Events:
    """About ``n`` events in time order: short TCP calls to one service and some UDP.

    Clients follow a Zipf law; each entry stays 120 s (TIME_WAIT) or 30 s (UDP) from
    its last packet, give or take the collector's rounds; identities are slab
    addresses, used again after they are freed.
    """
    random = np.random.default_rng(seed)
    flows = n // 2
    start = np.cumsum(random.exponential(2 * SECOND / rate, flows)).astype(np.uint64)
    start += np.uint64(100 * SECOND)
    udp = random.random(flows) < 0.15
    client = np.minimum(random.zipf(1.2, flows) - 1, clients - 1)
    ids = random.permutation(1 << 20)[:clients]
    address = np.frombuffer((0x0A000000 + ids).astype(">u4").tobytes(), np.uint8).reshape(-1, 4)

    made = empty(flows)
    made["ts"] = start
    made["kind"], made["reason"] = Kind.INSERT, Reason.NEW
    made["src"] = made["reply_dst"] = _mapped(address[client])
    server = np.where(udp, 53, 8063)
    made["dst"] = made["reply_src"] = _mapped(np.full((flows, 4), [10, 9, 0, 1], np.uint8))
    made["sport"] = made["reply_dport"] = random.integers(32768, 61000, flows)
    made["dport"] = made["reply_sport"] = server
    made["netns"], made["family"] = NETNS, 2
    made["proto"] = np.where(udp, 17, 6)
    made["direction"] = np.where(udp, Direction.OUT, Direction.IN)
    made["state"] = np.where(udp, 255, 1)
    made["status"] = int(Status.CONFIRMED)
    made["owner"] = np.where(udp, (4242 << 32) | 99, 0)
    made["cgroup"] = np.where(udp, 7331, 0)

    life = random.exponential(0.02, flows)
    late = random.exponential(1.5, flows)
    timeout = np.where(udp, 30_000, 120_000)
    # The table drains within the recording, as most of it would in a longer one.
    span = float(start[-1] - start[0]) / SECOND
    stay = np.minimum(timeout / 1000, 0.4 * span) + life + late * min(1.0, span / 60)
    gone = empty(flows)
    for name in RECORD.names or ():
        if name not in ("owner", "cgroup"):
            gone[name] = made[name]
    gone["ts"] = start + (stay * SECOND).astype(np.uint64)
    gone["kind"], gone["reason"] = Kind.DESTROY, Reason.EXPIRED
    gone["status"] |= int(Status.SEEN_REPLY | Status.ASSURED | Status.DYING)
    gone["state"] = np.where(udp, 255, 7)
    gone["timeout_ms"] = timeout
    gone["overdue_ms"] = (late * 1000).astype(np.int32)
    gone["idle_ms"] = gone["timeout_ms"] + gone["overdue_ms"]

    free = 0
    slots = np.empty(flows, np.uint64)
    held: list[int] = []
    order = np.argsort(np.concatenate((made["ts"], gone["ts"])), kind="stable")
    for row in order.tolist():  # the allocator: the freed slot last in is first out
        if row < flows:
            if held:
                slots[row] = held.pop()
            else:
                slots[row], free = free, free + 1
        else:
            held.append(int(slots[row - flows]))
    made["ct"] = gone["ct"] = np.uint64(0xFFFF888100000000) + slots * np.uint64(256)
    events = join((made, gone))[order]
    return events[: n // 2 * 2]


def arbitrary(n: int, seed: int = 0, *, alphabet: int = 4) -> Events:
    """Records of random bytes, with repeats so that references and dictionaries occur."""
    random = np.random.default_rng(seed)
    pool = random.integers(0, 256, (max(1, n // alphabet), WORDS * 8), dtype=np.uint8)
    events = pool[random.integers(0, len(pool), n)].copy().reshape(-1).view(RECORD)
    events["kind"] = random.integers(1, 6, n)
    events["reason"] = random.integers(0, N_REASONS, n)
    events["ts"] = random.integers(0, 1 << 62, n)
    four = random.random(n) < 0.5
    events["src"][four, :12] = np.frombuffer(MAPPED_PREFIX, np.uint8)
    mirrored = random.random(n) < 0.5
    for a, b in (("reply_src", "dst"), ("reply_dst", "src"), ("reply_sport", "dport"),
                 ("reply_dport", "sport")):  # fmt: skip
        events[a][mirrored] = events[b][mirrored]
    zero = random.random(n) < 0.2
    for name in ("reply_src", "reply_dst", "reply_sport", "reply_dport"):
        events[name][zero] = 0
    return events


def batches(
    events: Events, interval: int = SECOND // 4, started: int = 100 * SECOND
) -> list[Batch]:
    """The events as a live source yields them: counters each time, tables each second."""
    out: list[Batch] = []
    counts = np.zeros(N_REASONS, np.uint64)
    held = 0
    until = started = 100 * SECOND
    done = 0
    while done < len(events):
        until += interval
        stop = int(np.searchsorted(events["ts"], np.uint64(until), "right"))
        part = events[done:stop]
        counts = counts + np.bincount(part["reason"], minlength=N_REASONS).astype(np.uint64)
        held += int((part["kind"] == Kind.INSERT).sum()) - int((part["kind"] == Kind.DESTROY).sum())
        second = (until - started) % SECOND == 0
        stats = {"insert_failed": 0, "drop": int(counts[Reason.TABLE_FULL]), "early_drop": 0}
        names = Names()
        if not out:
            names = Names(
                {NETNS: Netns(NETNS, "init", ("10.9.0.1", "fd00::1"))},
                {(4242 << 32) | 99: Owner((4242 << 32) | 99, "resolver", 7331, "dns.service")},
                {7331: "dns.service"},
                {(NETNS, 6, 8063): Owner((812 << 32) | 5, "nginx", 9, "web.service", "nginx -g")},
            )
        out.append(
            Batch(
                part,
                until,
                0,
                {NETNS: counts},
                (TableReading(NETNS, held, 65536, 16384, stats, until, done + 9, done // 2),)
                if second
                else (),
                names,
                SelfCost(0.01 * (len(out) % 7), 50 << 20, 0.003),
            )
        )
        done = stop
    return out


def same(a: Batch, b: Batch) -> bool:
    """Whether two batches are equal in everything."""
    return (
        a.events.tobytes() == b.events.tobytes()
        and (a.until, a.lost, a.tables, a.names, a.cost)
        == (b.until, b.lost, b.tables, b.names, b.cost)
        and a.counts.keys() == b.counts.keys()
        and all(np.array_equal(a.counts[key], b.counts[key]) for key in a.counts)
    )


def _mapped(four: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    out = np.empty((len(four), 16), np.uint8)
    out[:, :12] = np.frombuffer(MAPPED_PREFIX, np.uint8)
    out[:, 12:] = four
    return out


def incident() -> list[Batch]:
    """Twenty seconds of 400 clients with refusals in the middle."""
    events = traffic(20_000, rate=1000, clients=400)
    inserts = np.flatnonzero(events["kind"] == Kind.INSERT)
    refused = inserts[len(inserts) // 2 : len(inserts) // 2 + 1400 : 7]
    gone = np.isin(events["ct"], []) | False
    for row in refused:  # its destroy never comes
        same = np.flatnonzero(
            (events["ct"] == events["ct"][row]) & (events["kind"] == Kind.DESTROY)
        )
        after = same[same > row]
        gone[after[:1]] = True
    events["kind"][refused], events["reason"][refused] = Kind.DROP, Reason.TABLE_FULL
    events["ct"][refused] = 0
    return batches(events[~gone])


def write(path: Path, batches: list[Batch], host: str = "web1") -> Path:
    """A recording of these batches."""
    with Writer(str(path), replace(header(), host=host)) as writer:
        for batch in batches:
            writer.write(batch)
    return path


def model() -> Model:
    """A model of the recording's host, without events."""
    head = header()
    return Model(head.hooks, head.clock, head.started, host=head.host)


def at(truth: list[Batch], until: int, rows: int = 200) -> Snapshot:
    """What a live screen with so many rows would have shown then."""
    live = model()
    for batch in truth:
        if batch.until <= until:
            live.update(batch)
    return live.snapshot(limit=rows)
