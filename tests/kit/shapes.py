"""Traces of known shape, as batches: what the model is tested and measured with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrace.batch import Batch, Counts, TableReading
from ctrace.record import KIND_OF, N_REASONS, RECORD, Events, Kind, Reason, address_bytes

SECOND = 1_000_000_000
NETNS = 4026531840
START = 5000 * SECOND
SEEN_REPLY, ASSURED = 2, 4
ESTABLISHED, TIME_WAIT, SYN_SENT = 3, 7, 1


def address(text: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(address_bytes(text), np.uint8)


def ipv4(numbers: Any) -> npt.NDArray[np.uint8]:
    """Addresses for an array of 32-bit numbers, shape (n, 16)."""
    numbers = np.asarray(numbers, np.uint32)
    out = np.zeros((len(numbers), 16), np.uint8)
    out[:, 10:12] = 0xFF
    out[:, 12:] = numbers.astype(">u4").view(np.uint8).reshape(-1, 4)
    return out


def joined(parts: list[Events]) -> Events:
    """Concatenate as raw bytes: numpy's own promotion would repack the union's fields."""
    raw = [np.ascontiguousarray(part).view("V120") for part in parts if len(part)]
    return np.concatenate(raw).view(RECORD) if raw else np.zeros(0, RECORD)


@dataclass
class Trace:
    """Flows by when they open and how long they stay, turned into events."""

    seed: int = 1
    parts: list[Events] = field(default_factory=list)
    _next_ct: int = 0xFFFF888000000000

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def identities(self, n: int) -> npt.NDArray[np.uint64]:
        first = self._next_ct
        self._next_ct += 320 * n
        return np.uint64(first) + np.arange(n, dtype=np.uint64) * np.uint64(320)

    def flows(
        self,
        at: npt.NDArray[Any],
        life: Any,
        linger: Any,
        *,
        src: Any = "10.0.0.7",
        dst: Any = "10.0.0.9",
        proto: int = 6,
        dport: Any = 8063,
        status: int = SEEN_REPLY | ASSURED,
        state: int = TIME_WAIT,
        reason: Reason = Reason.EXPIRED,
        direction: int = 1,
        netns: int = NETNS,
        owner: Any = 0,
        cgroup: int = 0,
        zone: int = 0,
    ) -> Events:
        """Open flows at ``at`` seconds; each lives ``life`` and lingers ``linger`` seconds."""
        n = len(at)
        born = np.zeros(n, RECORD)
        born["ts"] = START + np.asarray(at * SECOND, np.int64)
        born["ct"] = self.identities(n)
        born["src"] = address(src) if isinstance(src, str) else ipv4(src)
        born["dst"] = address(dst) if isinstance(dst, str) else ipv4(dst)
        born["reply_src"], born["reply_dst"] = born["dst"], born["src"]
        born["sport"] = self.rng.integers(32768, 60999, n)
        born["dport"] = dport
        born["reply_sport"], born["reply_dport"] = born["dport"], born["sport"]
        born["netns"], born["proto"], born["zone"] = netns, proto, zone
        born["family"] = 10 if isinstance(src, str) and ":" in src else 2
        born["direction"], born["state"] = direction, 1 if proto == 6 else 255
        born["kind"], born["reason"] = int(Kind.INSERT), int(Reason.NEW)
        dies = born.copy()
        born["owner"], born["cgroup"] = owner, cgroup
        dies["owner"] = dies["cgroup"] = 0
        life, linger = np.broadcast_to(life, n), np.broadcast_to(linger, n)
        dies["ts"] += np.asarray((life + linger) * SECOND, np.uint64)
        dies["kind"], dies["reason"] = int(Kind.DESTROY), int(reason)
        dies["status"], dies["state"] = status, state if proto == 6 else 255
        dies["idle_ms"] = np.asarray(linger * 1000, np.int32)
        self.parts += [born, dies]
        return dies

    def looks(self, ages: tuple[float, ...] = (1.0,)) -> None:
        """Looks at every living entry so long after its insert, as a live source takes."""
        born, died = self._lives()
        for age in ages:
            at = born["ts"] + np.uint64(age * SECOND)
            living = (at < died["ts"]) & (died["idle_ms"] >= 0)
            self.parts.append(_seen(died[living], at[living], Kind.SAMPLED))

    def walks(self, until: float, n: int = 256) -> None:
        """Looks at some of all living entries in each second, as a live source's walk meets."""
        born, died = self._lives()
        rows = self.events()
        older = rows[rows["kind"] == Kind.EXISTING]
        for second in range(1, int(until)):
            at = START + second * SECOND
            living = np.flatnonzero((born["ts"] <= at) & (at < died["ts"]))
            chosen = self.rng.permutation(len(living) + len(older))[:n]
            known = died[living[chosen[chosen < len(living)]]]
            self.parts.append(_seen(known, np.full(len(known), at, np.uint64), Kind.MET))
            old = older[chosen[chosen >= len(living)] - len(living)].copy()
            old["kind"], old["ts"], old["idle_ms"] = int(Kind.MET), at, -1
            self.parts.append(old)

    def _lives(self) -> tuple[Events, Events]:
        """Every insert, and the end of each."""
        rows = self.events()
        born = rows[rows["kind"] == Kind.INSERT]
        died = rows[rows["kind"] == Kind.DESTROY]
        died = died[np.argsort(died["ct"])]
        return born, died[np.searchsorted(died["ct"], born["ct"])]

    def drops(self, at: npt.NDArray[Any], **fields: Any) -> Events:
        """Refusals at ``at`` seconds."""
        dies = self.flows(at, 0, 0, **fields)
        self.parts.pop()
        rows = self.parts.pop()
        rows["kind"], rows["reason"], rows["ct"] = int(Kind.DROP), int(Reason.TABLE_FULL), 0
        del dies
        self.parts.append(rows)
        return rows

    def failures(self, at: npt.NDArray[Any], **fields: Any) -> Events:
        """Inserts that lost a race at ``at`` seconds."""
        rows = self.drops(at, **fields)
        rows["kind"], rows["reason"] = int(Kind.INSERT_FAILED), int(Reason.CLASH)
        return rows

    def existing(self, n: int, **fields: Any) -> Events:
        """Entries of the first dump: they have no identity."""
        status, state = fields.pop("status", SEEN_REPLY | ASSURED), fields.pop("state", ESTABLISHED)
        rows = self.drops(np.zeros(n), **fields)
        rows["kind"], rows["reason"] = int(Kind.EXISTING), 0
        rows["status"], rows["state"] = status, state
        return rows

    def events(self, until: float | None = None) -> Events:
        """All events in time order, up to ``until`` seconds."""
        rows = joined(self.parts)
        rows = rows[np.argsort(rows["ts"], kind="stable")]
        if until is not None:
            rows = rows[rows["ts"] <= START + int(until * SECOND)]
        return rows

    def batches(
        self, until: float, *, limit: int = 262_144, step: float = 1.0, buckets: int = 262_144,
        stats: bool = True,
    ) -> list[Batch]:  # fmt: skip
        """Batches of ``step`` seconds with exact counters and table readings."""
        return list(cut(self.events(until), until, limit=limit, step=step, buckets=buckets,
                        stats=stats))  # fmt: skip


def _seen(end: Events, at: npt.NDArray[Any], kind: Kind) -> Events:
    """What looks ``at`` these times find of entries that end so."""
    seen = end.copy()
    last = end["ts"].astype(np.int64) - end["idle_ms"].astype(np.int64) * 1_000_000
    idle = at.astype(np.int64) - last
    over = idle >= 0
    seen["ts"] = at
    seen["kind"], seen["reason"] = int(kind), 0
    replied = end["status"] & SEEN_REPLY != 0  # else it never was ESTABLISHED
    open_state = np.where((end["state"] == 255) | ~replied, end["state"], ESTABLISHED)
    seen["state"] = np.where(over, end["state"], open_state)
    seen["idle_ms"] = np.where(over, idle // 1_000_000, 0)
    seen["timeout_ms"] = end["idle_ms"]
    seen["overdue_ms"] = seen["idle_ms"] - seen["timeout_ms"]
    return seen


def cut(
    rows: Events, until: float, *, limit: int = 262_144, step: float = 1.0,
    buckets: int = 262_144, stats: bool = True,
) -> list[Batch]:  # fmt: skip
    """Split events into batches as a source would yield them."""
    batches = []
    counts: dict[int, Counts] = {}
    held: dict[int, int] = {int(n): 0 for n in np.unique(rows["netns"])} or {NETNS: 0}
    edges = np.arange(0.0, until, step)
    times = START + ((edges + step) * SECOND).astype(np.int64)
    at = np.searchsorted(rows["ts"], times.astype(np.uint64), side="right")
    before = 0
    for time, stop in zip(times, at, strict=True):
        part = rows[before:stop]
        for netns in held:
            mine = part[part["netns"] == netns]
            previous = counts.get(netns, np.zeros(N_REASONS, np.uint64))
            new = np.bincount(mine["reason"], minlength=N_REASONS).astype(np.uint64)
            counts[netns] = previous + new
            held[netns] += int(np.count_nonzero(mine["kind"] == Kind.EXISTING))
            for reason, kind in KIND_OF.items():
                sign = {Kind.INSERT: 1, Kind.DESTROY: -1}.get(kind, 0)
                held[netns] += sign * int(new[reason])
        tables = tuple(
            TableReading(netns, held[netns], limit, buckets, kernel_stats(counts[netns], stats))
            for netns in held
        )
        batches.append(Batch(part, int(time), counts=dict(counts), tables=tables))
        before = stop
    return batches


def kernel_stats(counts: Counts, on: bool = True) -> dict[str, int]:
    """What ``conntrack -S`` would show beside our counters."""
    if not on:
        return {}
    return {
        "drop": int(counts[Reason.TABLE_FULL] + counts[Reason.NO_MEMORY] + counts[Reason.CLASH]),
        "early_drop": int(counts[Reason.EVICTED]),
        "insert_failed": int(
            counts[Reason.CLASH] + counts[Reason.CHAIN_TOO_LONG] + counts[Reason.FAILED]
        ),
        "clash_resolve": int(counts[Reason.CLASH_RESOLVED]),
    }


def steady(rate: float, seconds: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Poisson arrivals over ``seconds``."""
    return np.sort(rng.uniform(0, seconds, int(rate * seconds)))
