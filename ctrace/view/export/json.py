"""A snapshot as JSON: the schema of ctrace/share/snapshot.md, stable within a major version.

Names end in their unit where it is not plain: ``_s`` seconds, ``_per_s`` per second.
What is unknown is ``null``, never zero.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import math
from datetime import datetime, timezone
from typing import Any, Optional

from ctrace.batch import DUMP
from ctrace.model.snapshot import (
    Cause,
    Composition,
    Culprit,
    Histogram,
    OwnerView,
    Percentiles,
    Remedy,
    Rising,
    Snapshot,
    Table,
    Tuple5,
    Victim,
)
from ctrace.record import Status
from ctrace.view.unseen import CHANGES, REFUSALS, told, trusted, unseen
from ctrace.view.verdict import counted

SCHEMA = 1
"""Rises when a field changes its meaning or goes; not when one is added."""


def snapshot_json(snapshot: Snapshot) -> dict[str, Any]:
    """The snapshot as an object that ``json.dumps`` takes as it is."""
    absent = unseen(snapshot.hooks)
    texts = snapshot.hooks.family == DUMP
    nothing = texts and not any(counted(table) for table in snapshot.tables)
    by_row = absent if snapshot.held_total_error is None else absent | CHANGES | REFUSALS
    return {
        "schema": SCHEMA,
        "ts": utc(snapshot.ts),
        "host": snapshot.host,
        "hooks": dataclasses.asdict(snapshot.hooks),
        "lost": snapshot.lost,
        "unseen": snapshot.unseen,
        "exact": _exact(snapshot),
        "interval_s": _round(snapshot.interval_s),
        "uptime_s": _round(snapshot.uptime_s),
        "group": snapshot.group,
        "sort": snapshot.sort,
        "filter": snapshot.filter,
        "tables": [_table(table, absent, texts) for table in snapshot.tables],
        "totals": told(dataclasses.asdict(snapshot.totals), absent),
        "rates_per_s": told(_rounded(dataclasses.asdict(snapshot.rates)), absent),
        "culprits": [told(_culprit(culprit), by_row) for culprit in snapshot.culprits],
        "culprits_total": snapshot.culprits_total,
        "held_total": None if nothing else snapshot.held_total,
        "held_total_error": snapshot.held_total_error,
        "table_seconds_total": _known(absent, "table_seconds_total", snapshot.table_seconds_total),
        "top": {
            group: [{"key": key, "new_per_s": _round(value)} for key, value in keys]
            for group, keys in snapshot.top.items()
        },
        "victims": [_victim(victim) for victim in snapshot.victims],
        "who": [dataclasses.asdict(one) for one in snapshot.who],
        "who_refused": [dataclasses.asdict(one) for one in snapshot.who_refused],
        "why": [_cause(cause) for cause in snapshot.why],
        "history": told(_rounded(dataclasses.asdict(snapshot.history)), absent),
        "memory": dataclasses.asdict(snapshot.memory),
        "self": _rounded(dataclasses.asdict(snapshot.cost)),
        "logged": _rounded(dataclasses.asdict(snapshot.logged)) if snapshot.logged else None,
    }


def _exact(snapshot: Snapshot) -> bool:
    reckoned = snapshot.held_total_error is not None or trusted(snapshot.hooks) is not None
    return not (snapshot.lost or snapshot.unseen or snapshot.memory.pruned or reckoned)


def _known(absent: frozenset[str], name: str, value: float) -> Optional[float]:
    return None if name in absent else _round(value)


def utc(nanoseconds: int) -> str:
    """``2026-11-22T19:48:49.000000000Z``: RFC 3339 with all nine digits."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


def utc_seconds(seconds: Optional[float]) -> Optional[str]:
    """A UTC time in seconds the same way, to the millisecond; None stays None."""
    if seconds is None:
        return None
    moment = datetime.fromtimestamp(round(seconds, 3), timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _table(table: Table, absent: frozenset[str], texts: bool) -> dict[str, Any]:
    """``texts``: it comes from texts, which may all lack its number of entries."""
    data = {
        "netns": table.netns,
        "name": table.name,
        "count": None if texts and not counted(table) else table.count,
        "max": table.max if table.max_known else None,
        "buckets": table.buckets or None,
        "fill": _round(table.fill) if table.max_known else None,
        "load": _round(table.load) if table.buckets else None,
        "active": table.active,
        "read": table.read,
        "max_known": table.max_known,
        "pinned": _round(table.pinned),
        "pinned_error": _round(table.pinned_error),
        "composition": _composition(table.composition),
        "full_since": utc_seconds(table.full_since),
        "seconds_to_full": _round(table.seconds_to_full),
        "seconds_to_full_error": _round(table.seconds_to_full_error),
        "levels_off": _round(table.levels_off),
        "levels_off_error": _round(table.levels_off_error),
        "totals": told(dataclasses.asdict(table.totals), absent),
        "rates_per_s": told(_rounded(dataclasses.asdict(table.rates)), absent),
        "off_by": dataclasses.asdict(table.off_by),
        "chain_too_long": table.chain_too_long,
        "invalid": table.invalid,
        "stale": table.stale,
        "hashed": table.hashed,
    }
    return told(data, absent)


def _composition(made_of: Composition) -> dict[str, Any]:
    return {
        "n": made_of.n,
        "assured": _round(made_of.assured),
        "assured_error": _round(made_of.assured_error),
        "unreplied": _round(made_of.unreplied),
        "unreplied_error": _round(made_of.unreplied_error),
        "closed": _round(made_of.closed),
        "closed_error": _round(made_of.closed_error),
        "states": dict(made_of.states),
        **_percentiles("left", made_of.left),
        **_of_quantiles("waited", made_of.waited),
        **_of_quantiles("idle", made_of.idle),
        "once": _round(made_of.once),
        "other_timeout": _round(made_of.other_timeout),
    }


def _of_quantiles(name: str, evenly: tuple[float, ...]) -> dict[str, Any]:
    """Three of quantiles at even steps."""
    return {
        f"{name}_{label}_s": _round(evenly[round(q * (len(evenly) - 1))]) if evenly else None
        for label, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    }


def _culprit(culprit: Culprit) -> dict[str, Any]:
    return {
        "key": culprit.key,
        "words": culprit.words,
        "proto": culprit.proto,
        "port": culprit.port,
        "src": culprit.src,
        "dst": culprit.dst,
        "pod": culprit.pod,
        "netns": culprit.netns,
        "netns_name": culprit.netns_name,
        "direction": culprit.direction,
        "held": culprit.held,
        "held_error": culprit.held_error,
        "share": _round(culprit.share),
        "table_seconds": _round(culprit.table_seconds),
        "inserts": culprit.inserts,
        "new_per_s": _round(culprit.new_per_s),
        "destroys": culprit.destroys,
        "drops": culprit.drops,
        "drop_per_s": _round(culprit.drop_per_s),
        "error": culprit.error,
        "stale": culprit.stale,
        "older": culprit.older,
        **_percentiles("life", culprit.life),
        **_percentiles("residence", culprit.residence),
        "residence_living": culprit.residence.living,
        "residence_at_least_s": _round(culprit.residence.at_least),
        "residence_by_load_s": _round(culprit.residence.by_load),
        "residence_by": culprit.residence.by,
        "residence_error_s": _round(culprit.residence.error),
        "ends": dataclasses.asdict(culprit.ends),
        "nat": culprit.nat,
        "composition": _composition(culprit.composition),
        "assured": _round(culprit.assured),
        "unreplied": _round(culprit.unreplied),
        "closed": _round(culprit.closed),
        "distinct_src": culprit.distinct_src,
        "owner": _owner(culprit.owner),
        "trend": _rounded(list(culprit.trend)),
        "first_seen": utc_seconds(culprit.first_seen),
        "life_histogram": _histogram(culprit.life_histogram),
        "residence_histogram": _histogram(culprit.residence_histogram),
        "states": dict(culprit.states),
        "ended_states": dict(culprit.ended_states),
        "samples": [_tuple(sample) for sample in culprit.samples],
    }


def _victim(victim: Victim) -> dict[str, Any]:
    return {
        "key": victim.key,
        "proto": victim.proto,
        "src": victim.src,
        "dst": victim.dst,
        "pod": victim.pod,
        "port": victim.port,
        "netns": victim.netns,
        "netns_name": victim.netns_name,
        "drops": victim.drops,
        "drop_per_s": _round(victim.drop_per_s),
        "share_of_new": _round(victim.share_of_new),
        "share_of_service": _round(victim.share_of_service),
        "evicted": victim.evicted,
        "failed": victim.failed,
        "error": victim.error,
        "owner": _owner(victim.owner),
        "sample": _tuple(victim.sample) if victim.sample else None,
    }


def _cause(cause: Cause) -> dict[str, Any]:
    return {
        "id": cause.id,
        "text": cause.text,
        "evidence": list(cause.evidence),
        "share": _round(cause.share),
        "proto": cause.proto,
        "port": cause.port,
        "netns": cause.netns,
        "src": cause.src,
        "load": cause.load,
        "remedy": cause.remedy,
        "remedies": [_remedy(one) for one in cause.remedies],
        "at_need": [_remedy(one) for one in cause.at_need],
    }


def _remedy(one: Remedy) -> dict[str, Any]:
    return {
        "id": one.id,
        "text": one.text,
        "detail": one.detail,
        "service": one.service,
        "netns": one.netns,
        "now": one.now,
        "frees": list(one.frees or ()),
        "fill_after": list(one.fill_after or ()),
        "rising": _rising(one.rising),
        "commands": list(one.commands),
        "undo": list(one.undo),
        "memory": list(one.memory or ()),
        "initial": one.initial,
        "option": one.option,
    }


def _rising(one: Optional[Rising]) -> Optional[dict[str, Any]]:
    if one is None:
        return None
    return {"per_s": list(one.per_s), "full_s": list(one.full_s) if one.full_s else None}


def _tuple(flow: Tuple5) -> dict[str, Any]:
    """A sample with conntrack's addresses in canonical text and its status as names."""
    return {
        "proto": flow.proto,
        "src": canonical(flow.src),
        "dst": canonical(flow.dst),
        "sport": flow.sport,
        "dport": flow.dport,
        "reply": {
            "src": canonical(flow.reply_src),
            "dst": canonical(flow.reply_dst),
            "sport": flow.reply_sport,
            "dport": flow.reply_dport,
        }
        if flow.reply_src
        else None,
        "status": status_names(flow.status),
        "state": flow.state,
    }


def status_names(bits: int) -> list[str]:
    """``["SEEN_REPLY", "ASSURED"]``: the IPS_* bits that are set, lowest first."""
    return [flag.name for flag in Status if flag & bits and flag.name]


def canonical(text: str) -> str:
    """An address in RFC 5952 form; anything else as it is."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return text


def _owner(owner: Optional[OwnerView]) -> Optional[dict[str, Any]]:
    return dataclasses.asdict(owner) if owner else None


def _percentiles(name: str, values: Percentiles) -> dict[str, Any]:
    return {
        f"{name}_p50_s": _round(values.p50),
        f"{name}_p90_s": _round(values.p90),
        f"{name}_p99_s": _round(values.p99),
        f"{name}_n": values.n,
    }


def _histogram(histogram: Histogram) -> dict[str, Any]:
    return {"edges_s": _rounded(list(histogram.edges)), "counts": list(histogram.counts)}


def _rounded(value: Any) -> Any:
    """Floats at six digits after the point, however deep."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return _round(value) if isinstance(value, float) else value


def _round(value: Optional[float]) -> Optional[float]:
    """Microseconds and millionths are the finest that we measure; JSON has no infinity."""
    if value is None or not math.isfinite(value):
        return None
    return round(float(value), 6)
