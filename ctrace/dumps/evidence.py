"""What the texts say besides events: stored with the recording, and shown by its report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, Optional

import numpy as np

from ctrace.dumps.found import Space
from ctrace.dumps.host.log import Message
from ctrace.dumps.source import Told, last_entries, last_looks
from ctrace.record import TCP, TCP_STATES, Kind, Status, proto_name
from ctrace.recording.format.meta import LIMIT_TEXT

TOP: Final = 12
MODULES: Final = ("nf_conntrack", "ip_conntrack", "nf_conntrack_ipv4", "nf_conntrack_ipv6")
COUNTED: Final = (
    "insert",
    "insert_failed",
    "drop",
    "early_drop",
    "chaintoolong",
    "clash_resolve",
    "invalid",
    "search_restart",
)
WRAPS: Final = ("clash_resolve", "search_restart")
"""Those that grow so fast that their 32 bits (of each CPU) do not last."""


def evidence(told: Told) -> dict[str, Any]:
    """JSON-ready; whatever the texts do not say is None or left out."""
    found = told.found
    out: dict[str, Any] = {
        "files": found.files[:50],
        "passed_over": found.passed,
        "lines": found.lines,
        "not_understood": found.unread.count,
        "unread": [list(one) for one in found.unread.first],
        "dumps": [
            {
                "source": look.dump.source,
                "at": round(look.at, 3),
                "known_by": look.known_by,
                "entries": len(look.rows),
                "said": look.dump.said,
                "cut": look.dump.cut,
                "apart": None if look.apart is None else round(look.apart, 3),
            }
            for look in told.looks[-50:]
        ],
        "left_out": told.left_out,
        **{
            name: sum(len(one) for one in found.dumps if one.list == name)
            for name in ("dying", "unconfirmed", "deleted")
        },
        "expectations": sum(one.expectations for one in found.spaces.values()),
        "losses_told": any(one.lost for one in found.dumps),
        "log": _log(told),
        "full_seen": bool(found.log.full),
        "refused_at_least": found.log.refused or None,
        "modules": _modules(found.modules),
        "held_by": _held_by(found.modules),
        "rules": {name or "": one.has_rules for name, one in found.spaces.items()},
        "rules_listed": sorted(set().union(*(one.listed for one in found.spaces.values()))),
        "max": told.limit(next(iter(told.netns))),
        "count": next((one.counts[-1] for one in found.spaces.values() if one.counts), None),
        "tables": _tables(told),
        "counts": _counts(told),
        "entry_bytes": found.slab,
        "kernel_counted": _kernel(found.spaces),
        "counted_between": _between(found.spaces),
    }
    out.update(_events(told))
    out.update(_entries(told))
    return out


def to_text(data: dict[str, Any]) -> str:
    """As the fact is stored: within what a header holds."""
    for name in ("unread", "dumps", "modules", "files"):
        text = json.dumps(data, separators=(",", ":"))
        if len(text) <= LIMIT_TEXT // 2:
            return text
        data[name] = data[name][:5] if isinstance(data[name], list) else {}
    return json.dumps(data, separators=(",", ":"))[: LIMIT_TEXT // 2]


def _tables(told: Told) -> list[dict[str, Any]]:
    """Each namespace's own, where something is told of several."""
    found: list[dict[str, Any]] = []
    for name in told.netns:
        last, counts = last_looks(told, name), told.found.space(name).counts
        if last or counts:
            row: dict[str, Any] = {
                "netns": name or "the host",
                "cut": any(one.dump.cut for one in last),
            }
            row["entries"] = sum(len(one.rows) for one in last)
            row["count"], row["max"] = counts[-1] if counts else None, told.limit(name)
            found.append(row)
    return found[:20] if len(found) > 1 else []


def _counts(told: Told) -> Optional[list[int]]:
    """(how many readings of a table's count, the least, the most) where they differ."""
    for space in told.found.spaces.values():
        if len(set(space.counts)) > 1:
            return [len(space.counts), min(space.counts), max(space.counts)]
    return None


# -- entries --------------------------------------------------------------------------


def _entries(told: Told) -> dict[str, Any]:
    """The last look at each table, counted."""
    by: Counter[str] = Counter()
    services: Counter[tuple[int, int, int]] = Counter()
    status: Counter[str] = Counter()
    left: dict[tuple[int, int], list[Any]] = {}
    total = 0
    for rows in last_entries(told):
        total += len(rows)
        proto, state, port = (rows[name].astype(np.int64) for name in ("proto", "state", "dport"))
        for (one, port_, of), n in _counted(proto, port, state).items():
            services[one, port_, of] += n
        for name, bit, there in _STATUS:
            status[name] += int((((rows["status"] & bit) != 0) == there).sum())
        for (one, of), n in _counted(proto, state).items():
            by[_kind(one, of)] += n
            mine = (proto == one) & (state == of) & (rows["overdue_ms"] <= 0)
            left.setdefault((one, of), []).append(-rows["overdue_ms"][mine] // 1000)
    if not total:
        return {"entries": 0}
    first = services.most_common(1)[0][0]
    return {
        "entries": total,
        "by": dict(by.most_common(40)),
        "service": _service(first[0], first[1]),
        "services": [
            [_service(proto, port), "" if proto != TCP else _state(state), n]
            for (proto, port, state), n in services.most_common(TOP)
        ],
        **{name: status[name] for name, _, _ in _STATUS},
        "remaining": _remaining(told, left),
    }


_STATUS: Final = (
    ("unreplied", int(Status.SEEN_REPLY), False),
    ("assured", int(Status.ASSURED), True),
    ("src_nat", int(Status.SRC_NAT), True),
    ("dst_nat", int(Status.DST_NAT), True),
    ("offloaded", int(Status.OFFLOAD | Status.HW_OFFLOAD), True),
    ("helped", int(Status.HELPER), True),
)


def _counted(*columns: Any) -> dict[tuple[int, ...], int]:
    """How often each combination of their values (below 65,536) occurs."""
    keys, counts = np.unique(
        sum(one << 16 * i for i, one in enumerate(columns)), return_counts=True
    )
    parts = [(keys >> 16 * i & 0xFFFF).tolist() for i in range(len(columns))]
    return dict(zip(zip(*parts), counts.tolist()))


def _state(state: int) -> str:
    return TCP_STATES[state] if state < len(TCP_STATES) else ""


def _kind(proto: int, state: int) -> str:
    """``tcp TIME_WAIT``, ``udp``, ``89``."""
    word = _state(state) if proto == TCP else ""
    return f"{proto_name(proto)} {word}".strip()


def _service(proto: int, port: int) -> str:
    return f"{proto_name(proto)}/{port}" if proto in (6, 17, 33, 132, 136) else proto_name(proto)


def _remaining(told: Told, left: Mapping[tuple[int, int], list[Any]]) -> list[dict[str, Any]]:
    """Seconds until entries expire, by state: and since their last packet, where the timeout
    was given."""
    out = []
    for (proto, state), parts in left.items():
        values = np.concatenate(parts)
        if not len(values):
            continue
        row: dict[str, Any] = {
            "kind": _kind(proto, state),
            "entries": len(values),
            "left": [int(values.min()), int(np.median(values)), int(values.max())],
        }
        whole = _timeout(told, proto, state)
        if whole is not None and int(values.max()) <= whole:
            row["timeout"] = whole
            row["idle"] = [whole - one for one in reversed(row["left"])]
        out.append(row)
    return sorted(out, key=lambda row: -row["entries"])[:TOP]


def _timeout(told: Told, proto: int, state: int) -> Optional[int]:
    """The timeout of a TCP state as the texts give it; never the kernel's default."""
    if proto != TCP or not _state(state):
        return None
    name = f"net.netfilter.nf_conntrack_tcp_timeout_{_state(state).lower()}"
    for space in told.found.spaces.values():
        text = space.sysctls.get(name, "")
        if text.isdigit() and len(text) < 10:
            return int(text)
    return None


def _events(told: Told) -> dict[str, Any]:
    """The contents of event streams."""
    if not told.streams:
        return {}
    kinds: Counter[int] = Counter()
    for dump in told.streams:
        for _, rows in told.found.spool.parts(dump.start, dump.stop):
            kinds.update(dict(enumerate(np.bincount(rows["kind"]).tolist())))
    return {
        "inserts": kinds[Kind.INSERT],
        "updates": kinds[Kind.SAMPLED],
        "destroys": kinds[Kind.DESTROY],
    }


# -- the host -------------------------------------------------------------------------


def _log(told: Told) -> Optional[dict[str, Any]]:
    log = told.found.log
    if not log.full and not log.suppressed:
        return None
    full = [one for one in log.main if not one.suppressed]
    return {
        "full": log.full,
        "suppressed": log.suppressed,
        "first": _moment(told, full[0]) if full else None,
        "last": _moment(told, full[-1]) if full else None,
        "netns": sorted(log.spaces)[:100],
        "hosts": sorted(log.hosts)[:20],
        "messages": [[_moment(told, one), one.suppressed, one.netns] for one in log.main[:100]],
    }


def _moment(told: Told, message: Message) -> dict[str, Any]:
    """The time as it stands in the log, and in UTC where that is known."""
    utc = message.utc
    if utc is None and message.boot is not None and told.boot_known:
        utc = told.boot + message.boot
    return {"text": message.when, "boot": message.boot, "utc": utc and round(utc, 3)}


def _modules(modules: Mapping[str, tuple[int, tuple[str, ...]]]) -> dict[str, list[str]]:
    """Modules of connection tracking that are loaded, each with those that use it."""
    return {
        name: list(users)
        for name, (_, users) in modules.items()
        if "conntrack" in name or "nf_nat" in name or users
    }


def _held_by(modules: Mapping[str, tuple[int, tuple[str, ...]]]) -> list[str]:
    """What keeps nf_conntrack from being unloaded."""
    users = (user for name in MODULES if name in modules for user in modules[name][1])
    return sorted(dict.fromkeys(users))


def _kernel(spaces: Mapping[str, Space]) -> dict[str, int]:
    """The kernel's own counters, as last read: since it started."""
    out: dict[str, int] = {}
    for space in spaces.values():
        last = space.readings[-1][1] if space.counters else {}
        for name in COUNTED:
            if name in last:
                out[name] = out.get(name, 0) + last[name]
    return out


def _between(spaces: Mapping[str, Space]) -> Optional[dict[str, Any]]:
    """By how much the kernel's counters went up from the first reading to the last; None where
    there is one only, or where they began anew."""
    counts: dict[str, int] = {}
    spans: list[Optional[float]] = []
    for space in spaces.values():
        if len(space.counters) < 2:
            continue
        (begun, first), (ended, last) = space.readings[0], space.readings[-1]
        up = {name: last[name] - first[name] for name in COUNTED if name in first and name in last}
        if any(n < 0 and name not in WRAPS for name, n in up.items()):
            return None
        spans.append(ended - begun if begun is not None and ended is not None else None)
        for name, n in up.items():
            if n >= 0:
                counts[name] = counts.get(name, 0) + n
    if not counts:
        return None
    apart = spans[0] if len(spans) == 1 else None
    return {"seconds": round(apart, 3) if apart and apart > 0 else None, "counts": counts}
