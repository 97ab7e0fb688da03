"""Which flows were refused, evicted, or lost an insertion race."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.batch import Owner
from ctrace.model.keys.columns import PORTED, Window, grouped, key_hash, spread
from ctrace.model.snapshot import OwnerView, Tuple5, Victim
from ctrace.record import RECORD, TCP_STATES, Events, Kind, Reason, address_text, proto_name

KEYS: Final = 4096
ROW_BYTES: Final = 600
"""Bytes of a row in CPython, with its sample."""


@dataclass
class _Row:
    """One victim."""

    drops: int = 0
    evicted: int = 0
    failed: int = 0
    error: int = 0
    """Upper bound of what was missed until it was last counted."""
    passed: int = 0
    """:attr:`Victims._passed` when it was counted last."""
    owner: int = 0
    sample: bytes = b""

    def most(self, passed: int) -> int:
        """An upper bound of what happened to it."""
        return self.drops + self.evicted + self.failed + self.error + passed - self.passed


class Victims:
    """The flows that table pressure hurt, keyed by (source, destination, service, namespace).

    Space-saving: when all ``limit`` keys are taken, the lightest quarter goes, and
    newcomers carry the heaviest weight that went as their error. Of a window only the
    heaviest ``limit / 4`` keys are counted; what the next one had is what each other may lack.
    """

    def __init__(self, limit: int = KEYS) -> None:
        self._limit = limit
        self._rows: dict[bytes, _Row] = {}
        self._floor = 0
        self._passed = 0
        """The sum of what one key may have lost by not being counted in each window."""
        self.pruned = 0
        self._rates: dict[bytes, float] = {}
        self._at_tick: dict[bytes, int] = {}

    def nbytes(self) -> int:
        """Memory held."""
        return ROW_BYTES * len(self._rows)

    def most_bytes(self) -> int:
        """Memory held when full."""
        return ROW_BYTES * self._limit

    def feed(self, w: Window) -> None:
        """Count a window's refusals, evictions and failed inserts."""
        evicted = w.because(Reason.EVICTED, Reason.GC_PRESSURE)
        at = np.concatenate((w.where(Kind.DROP), w.where(Kind.INSERT_FAILED), evicted))
        at.sort()
        if not at.size:
            return
        words = np.zeros((len(at), 5), np.uint64)
        for column, part in enumerate((*w.src, *w.dst, w.meta)):
            words[:, column] = part[at]
        h = spread(key_hash(words[:, 0], words[:, 1], words[:, 4]))
        h += key_hash(words[:, 2], words[:, 3], words[:, 4])  # not the same the other way round
        _, _, order, starts = grouped(h)
        first = order[starts]
        unique = words[first].view("V40").ravel()
        kinds = w.kinds(at[order])
        counts = np.zeros((len(unique), 3), np.int64)
        for column, kind in enumerate((Kind.DROP, Kind.DESTROY, Kind.INSERT_FAILED)):
            counts[:, column] = np.add.reduceat((kinds == kind).astype(np.int64), starts)
        heavy = np.argsort(-counts.sum(axis=1), kind="stable")
        most = self._limit // 4
        passed = self._passed
        if len(heavy) > most:
            passed += int(counts[heavy[most]].sum())
            self.pruned += len(heavy) - most
        self._count(unique, first, counts, heavy[:most], w.events, at, passed)
        self._floor += passed - self._passed
        self._passed = passed

    def _count(
        self,
        unique: npt.NDArray[Any],
        first: npt.NDArray[np.intp],
        counts: npt.NDArray[np.int64],
        chosen: npt.NDArray[np.intp],
        events: Events,
        at: npt.NDArray[np.intp],
        passed: int,
    ) -> None:
        for number in chosen:
            key = unique[number].tobytes()
            row = self._rows.get(key)
            if row is None:
                if len(self._rows) >= self._limit:
                    self._prune()
                row = self._rows[key] = _Row(error=self._floor, passed=self._passed)
            row.error += self._passed - row.passed
            row.passed = passed
            drops, evicted, failed = counts[number].tolist()
            row.drops += drops
            row.evicted += evicted
            row.failed += failed
            record = events[at[first[number]]]
            if record["kind"] != Kind.DESTROY and record["owner"]:
                row.owner = int(record["owner"])
            row.sample = record.tobytes()

    def _prune(self) -> None:
        rows = sorted(self._rows.items(), key=lambda item: item[1].most(self._passed))
        for key, row in rows[: self._limit // 4]:
            self._floor = max(self._floor, row.most(self._passed))
            del self._rows[key]
            self._at_tick.pop(key, None)
        self.pruned += self._limit // 4

    def tick(self, seconds: float) -> None:
        """Close an interval: refusals per second."""
        now = {key: row.drops for key, row in self._rows.items() if row.drops}
        self._rates = {
            key: (drops - self._at_tick.get(key, 0)) / seconds
            for key, drops in now.items()
            if drops > self._at_tick.get(key, 0)
        }
        self._at_tick = now

    def failed(self, port: Optional[int] = None, netns: Optional[int] = None) -> int:
        """Insertion races lost, by flows to a port or all, in a namespace or all."""
        return sum(
            row.failed
            for key, row in self._rows.items()
            if row.failed
            and (port is None or int(np.frombuffer(row.sample, RECORD)["dport"][0]) == port)
            and netns in (None, _netns(key))
        )

    def view(
        self,
        limit: int,
        owners: Mapping[int, Owner],
        netns_name: Callable[[int], str],
        refused: Callable[[bytes], tuple[Optional[float], Optional[float]]],
        netns: Optional[int] = None,
    ) -> tuple[Victim, ...]:
        """The worst first, of all or of a namespace: by refusals, then evictions, then failures.

        ``refused`` tells which share of the source's new flows was refused: of all of
        them, and of those to the service.
        """
        rows = sorted(
            (item for item in self._rows.items() if netns in (None, _netns(item[0]))),
            key=lambda item: (-item[1].drops, -item[1].evicted, -item[1].failed, item[0]),
        )
        return tuple(
            self._victim(key, row, owners, netns_name, refused) for key, row in rows[:limit]
        )

    def _victim(
        self,
        key: bytes,
        row: _Row,
        owners: Mapping[int, Owner],
        netns_name: Callable[[int], str],
        refused: Callable[[bytes], tuple[Optional[float], Optional[float]]],
    ) -> Victim:
        record = np.frombuffer(row.sample, RECORD)[0]
        proto, netns = int(record["proto"]), int(record["netns"])
        src, dst = address_text(record["src"]), address_text(record["dst"])
        port = int(record["dport"]) if proto in PORTED else 0
        name = proto_name(proto)
        of_source, of_service = refused(key)
        where = f"{bracket(dst)}:{port}" if proto in PORTED else dst
        return Victim(
            key=f"{name} {src} -> {where}",
            proto=name,
            src=src,
            dst=dst,
            port=port,
            netns=netns,
            netns_name=netns_name(netns),
            drops=row.drops,
            drop_per_s=self._rates.get(key, 0.0),
            share_of_new=of_source,
            share_of_service=of_service,
            evicted=row.evicted,
            failed=row.failed,
            error=row.error + self._passed - row.passed,
            owner=owner_view(row.owner, owners, "opened"),
            sample=tuple5(record),
        )


def _netns(key: bytes) -> int:
    """The namespace of a victim's key."""
    return int.from_bytes(key[32:40], "little") >> 32


def bracket(address: str) -> str:
    """An IPv6 address in brackets, as before a port."""
    return f"[{address}]" if ":" in address else address


def owner_view(key: int, owners: Mapping[int, Owner], role: str) -> Optional[OwnerView]:
    """A process as views show it; None for key 0."""
    if not key:
        return None
    known = owners.get(key)
    if known is None:
        return OwnerView(pid=key >> 32, comm="", role=role)
    return OwnerView(known.pid, known.comm, known.unit, known.cmdline, role)


def tuple5(record: Any) -> Tuple5:
    """One record's flow as text."""
    proto, state = int(record["proto"]), int(record["state"])
    return Tuple5(
        proto=proto_name(proto),
        src=address_text(record["src"]),
        dst=address_text(record["dst"]),
        sport=int(record["sport"]),
        dport=int(record["dport"]),
        reply_src=address_text(record["reply_src"]),
        reply_dst=address_text(record["reply_dst"]),
        reply_sport=int(record["reply_sport"]),
        reply_dport=int(record["reply_dport"]),
        status=int(record["status"]),
        state=TCP_STATES[state] if proto == 6 and state < len(TCP_STATES) else "",
    )
