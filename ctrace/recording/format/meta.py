"""What a recording holds besides its events, as JSON and plain arrays, checked when read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from ipaddress import ip_address
from typing import Any, Final, Optional

import numpy as np

from ctrace import __version__
from ctrace.batch import Batch, Clock, Counts, HookInfo, Names, Netns, Owner, TableReading
from ctrace.names import clean
from ctrace.record import N_REASONS
from ctrace.recording.format.layout import LIMIT_TIME, MAJOR, MINOR, Damaged

ENDS: Final = np.dtype(
    [
        ("end", "<u4"),
        ("counts", "<u4"),
        ("until", "<u8"),
        ("lost", "<u8"),
        ("cpu", "<f8"),
        ("rss", "<u8"),
        ("kernel", "<f8"),
    ]
)
"""The end of a batch: rows of its block up to there, and the numbers of Batch."""

NO_COUNTS, ALL_COUNTS, CHANGED_COUNTS = 0, 1, 2
"""``counts``: whether COUNTS has all of the batch's namespaces, or only those that changed."""

COUNTS: Final = np.dtype([("batch", "<u4"), ("netns", "<u4"), ("counts", "<u8", (N_REASONS,))])
"""Counters of one namespace at the end of one batch (its index in the block)."""

LIMIT_TEXT: Final = 1 << 16
LIMIT_STATS: Final = 64
"""Counters of one table; the kernel has 17."""
LIMIT_TABLES: Final = 1 << 14
"""Tables read in one batch."""
AT: Final = "read_at"
"""Beside a table's counters: when it was read."""
MET, MET_ASSURED = "met", "met_assured"
"""And what walks over it found."""
GONE: Final = "gone"
"""And whether its namespace has gone."""
NO_MAX: Final = "max_unknown"
"""And whether its limit was not read."""
UNREAD: Final = "unread"
"""And whether entries of it had not come yet."""
_TOO_MANY: Final = "more tables or counters than there can be"
_BESIDE: Final = (AT, MET, MET_ASSURED, GONE, NO_MAX, UNREAD)


@dataclass(frozen=True)
class Header:
    """Facts known when the recording began."""

    hooks: HookInfo
    clock: Clock
    started: int
    """Boot clock, ns."""
    host: str = ""
    kernel: str = ""
    filter: str = ""
    """The filter as the user gave it."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Sysctls and other facts of the host, by name."""
    base: Mapping[int, Counts] = field(default_factory=dict)
    """Counters at ``started``, for a segment of a longer recording: its batches hold
    counters since attaching, its reader subtracts these."""
    hosts: tuple[str, ...] = ()
    """For a merged recording, the hosts that it came from."""
    version: str = __version__
    """Version of ctrace that wrote it."""

    @property
    def flow_filter(self) -> str:
        """The filter, where it selected among a namespace's flows: then the counters and readings
        of tables cover more than the events. Empty where it selected a namespace at most."""
        chose = any(not word.startswith("netns=") for word in self.filter.split())
        return self.filter if chose else ""


def header_json(header: Header) -> bytes:
    """The HEAD block's blob."""
    return dumps(
        {
            "format": [MAJOR, MINOR],
            "needs": "0.1.0",
            "version": header.version,
            "host": header.host,
            "kernel": header.kernel,
            "hooks": asdict(header.hooks),
            "clock_offset": header.clock.offset,
            "started": header.started,
            "filter": header.filter,
            "facts": dict(header.facts),
            "base": [[netns, counts.tolist()] for netns, counts in header.base.items()],
            "hosts": list(header.hosts),
        }
    )


def parse_header(blob: bytes) -> Header:
    """The header of a HEAD block. Raises Damaged."""
    data = loads(blob, dict)
    hooks = _typed(data.get("hooks", {}), dict)
    facts = _typed(data.get("facts", {}), dict)
    base = {}
    for netns, counts in _pairs(data.get("base", []), 2):
        if len(_typed(counts, list)) != N_REASONS:
            raise Damaged("counters of another number")
        base[_uint(netns, 32)] = np.array([_uint(count) for count in counts], np.uint64)
    return Header(
        HookInfo(
            family=_name(hooks.get("family", "")),
            attached=_texts(hooks.get("attached", [])),
            blind=_texts(hooks.get("blind", [])),
            drop_tuples=bool(hooks.get("drop_tuples", True)),
            evictions=bool(hooks.get("evictions", True)),
            owners=bool(hooks.get("owners", True)),
            changes=bool(hooks.get("changes", True)),
            refusals=bool(hooks.get("refusals", True)),
            note=_name(hooks.get("note", "")),
        ),
        Clock(_time(data.get("clock_offset", 0))),
        _time(data.get("started", 0)),
        host=_name(data.get("host", "")),
        kernel=_name(data.get("kernel", "")),
        filter=_name(data.get("filter", "")),
        facts={_text(name): _text(value) for name, value in facts.items()},
        base=base,
        hosts=_texts(data.get("hosts", [])),
        version=_text(data.get("version", "")),
    )


def tables_json(tables: Iterable[TableReading]) -> list[Any]:
    """Readings of one batch. Their times and what walks met are stored among the counters, where
    earlier readers ignore names that they do not know."""
    return [
        [t.netns, t.count, t.max, t.buckets,
         {**t.stats, AT: t.at, MET: t.met, MET_ASSURED: t.met_assured,
          **({GONE: 1} if t.gone else {}), **({} if t.max_known else {NO_MAX: 1}),
          **({UNREAD: 1} if t.unread else {})}]
        for t in tables
    ]  # fmt: skip


def parse_tables(data: Any) -> tuple[TableReading, ...]:
    """The readings of :func:`tables_json`. Raises Damaged."""
    if len(_typed(data, list)) > LIMIT_TABLES:
        raise Damaged(_TOO_MANY)
    return tuple(
        TableReading(
            _uint(netns, 32),
            _uint(count),
            _uint(limit),
            _uint(buckets),
            {_name(n): _uint(v) for n, v in _stats(stats).items() if n not in _BESIDE},
            _uint(stats.get(AT, 0)),
            _uint(stats.get(MET, 0)),
            _uint(stats.get(MET_ASSURED, 0)),
            bool(stats.get(GONE)),
            not stats.get(NO_MAX),
            bool(stats.get(UNREAD)),
        )
        for netns, count, limit, buckets, stats in _pairs(data, 5)
    )


def names_json(names: Names) -> dict[str, Any]:
    """Names learned in one batch."""
    return {
        "netns": [[n.inum, n.name, list(n.addresses), n.active] for n in names.netns.values()],
        "owners": [_owner_json(owner) for owner in names.owners.values()],
        "cgroups": [[cgroup, name] for cgroup, name in names.cgroups.items()],
        "listeners": [[*key, _owner_json(owner)] for key, owner in names.listeners.items()],
    }


def parse_names(data: Any) -> Names:
    """The names of :func:`names_json`. Raises Damaged."""
    data = _typed(data, dict)
    owners = [_owner(item) for item in _typed(data.get("owners", []), list)]
    return Names(
        netns={
            _uint(inum, 32): Netns(inum, _name(name), _addresses(addresses), bool(active))
            for inum, name, addresses, active in _pairs(data.get("netns", []), 4)
        },
        owners={owner.key: owner for owner in owners},
        cgroups={_uint(key, 64): _name(name) for key, name in _pairs(data.get("cgroups", []), 2)},
        listeners={
            (_uint(netns, 32), _uint(proto, 8), _uint(port, 16)): _owner(owner)
            for netns, proto, port, owner in _pairs(data.get("listeners", []), 4)
        },
    )


def has_names(batch: Batch) -> bool:
    """Whether a batch brings any names."""
    names = batch.names
    return bool(names.netns or names.owners or names.cgroups or names.listeners)


def _owner_json(owner: Owner) -> list[Any]:
    return [owner.key, owner.comm, owner.cgroup, owner.unit, owner.cmdline]


def _owner(data: Any) -> Owner:
    ((key, comm, cgroup, unit, cmdline),) = _pairs([data], 5)
    return Owner(_uint(key, 64), _name(comm), _uint(cgroup, 64), _name(unit), _name(cmdline))


def dumps(value: Any) -> bytes:
    """Compact JSON; a surrogate from an undecodable name stays escaped."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode()


def loads(blob: bytes, kind: type) -> Any:
    """JSON of the type expected. Raises Damaged."""
    try:
        return _typed(json.loads(blob), kind)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"not JSON: {error}") from None


def ends(blob: bytes, batches: int, rows: int) -> np.ndarray[Any, Any]:
    """The batch ends of a block, checked against its header. Raises Damaged."""
    if len(blob) != batches * ENDS.itemsize:
        raise Damaged("batches of another number than the header says")
    out = np.frombuffer(blob, ENDS)
    if batches and (
        int(out["end"].max()) > rows
        or (np.diff(out["end"].astype(np.int64)) < 0).any()
        or (out["until"][1:] < out["until"][:-1]).any()
        or int(out["until"].max()) > LIMIT_TIME
        or int(out["lost"].max()) > LIMIT_TIME
        or int(out["rss"].max()) > LIMIT_TIME
        or not (np.isfinite(out["cpu"]).all() and np.isfinite(out["kernel"]).all())
    ):
        raise Damaged("a batch's numbers are out of range")
    return out


def counts(blob: bytes, batches: int) -> np.ndarray[Any, Any]:
    """The counters of a block. Raises Damaged."""
    if len(blob) % COUNTS.itemsize:
        raise Damaged("half a counter")
    out = np.frombuffer(blob, COUNTS)
    if len(out) and (int(out["batch"].max()) >= batches or int(out["counts"].max()) > LIMIT_TIME):
        raise Damaged("a counter out of range")
    if (out["batch"][1:] < out["batch"][:-1]).any():
        raise Damaged("counters in another order than their batches")
    return out


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise Damaged(f"expected {kind.__name__}")
    return value


def _stats(value: Any) -> dict[str, Any]:
    found: dict[str, Any] = _typed(value, dict)
    if len(found) > LIMIT_STATS:
        raise Damaged(_TOO_MANY)
    return found


def _pairs(value: Any, n: int) -> list[list[Any]]:
    if any(len(_typed(item, list)) != n for item in _typed(value, list)):
        raise Damaged(f"expected lists of {n}")
    out: list[list[Any]] = value
    return out


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > LIMIT_TEXT:
        raise Damaged("expected a text")
    return value


def _name(value: Any) -> str:
    """A text to be shown, made harmless: the recording may come from a stranger."""
    return clean(_text(value))


def _addresses(value: Any) -> tuple[str, ...]:
    """Those texts that are addresses; all code that reads them relies on that."""
    found = []
    for text in _texts(value):
        with suppress(ValueError):
            found.append(str(ip_address(text)))
    return tuple(found)


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(_name(item) for item in _typed(value, list))


def _uint(value: Any, bits: Optional[int] = None) -> int:
    limit = 1 << bits if bits else LIMIT_TIME
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        raise Damaged("a number out of range")
    return value


def _time(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > LIMIT_TIME:
        raise Damaged("a time out of range")
    return value


def indexed(blob: bytes, batches: int) -> list[tuple[int, Any]]:
    """[[index of a batch in its block, data], ...]; nothing for an empty blob. Raises Damaged."""
    out = []
    for i, data in _pairs(loads(blob, list), 2) if blob else ():
        if _uint(i) >= batches:
            raise Damaged("names or tables of a batch that is not there")
        out.append((i, data))
    return out
