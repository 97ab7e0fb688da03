"""A review as JSON: the last snapshot's own fields, plus what hindsight adds."""

from __future__ import annotations

from typing import Any

from ctrace.recording.format.evidence import parse
from ctrace.recording.review import Review
from ctrace.view.export.json import snapshot_json, utc_seconds
from ctrace.view.report.cost import perf_json
from ctrace.view.unseen import unseen


def report_json(review: Review, limit: int) -> dict[str, Any]:
    """``totals``, ``tables``, ``culprits``, ``victims``, ``lost`` ... as in a live snapshot."""
    out = snapshot_json(review.final)
    out["culprits"] = out["culprits"][:limit]
    header, recording = review.recording.header, review.recording
    out["recording"] = {
        "path": recording.path,
        "version": header.version,
        "host": header.host,
        "hosts": list(header.hosts),
        "kernel": header.kernel,
        "start": utc_seconds(review.start),
        "end": utc_seconds(review.end),
        "seconds": round(review.end - review.start, 3),
        "events": review.events,
        "filter": header.filter,
        "facts": dict(header.facts),
        "ended": recording.ended,
        "missing": {
            "bytes": recording.missing.bytes,
            "events": recording.missing.events,
            "truncated": recording.missing.truncated,
            "damage": recording.missing.damage,
        },
        "notes": list(recording.notes()),
    }
    out["evidence"] = parse(header.facts)
    out["perf"] = {host: perf_json(perf) for host, perf in review.measured.items()}
    out["peak"] = _moment(review.peak, limit, fill=review.peak_fill)
    out["before_first_drop"] = _moment(review.before_drop, limit)
    out["drop_bursts"] = [utc_seconds(moment) for moment in review.drops]
    line, absent = review.timeline, unseen(review.final.hooks)
    out["timeline"] = {
        "ts": [utc_seconds(ts) for ts in line.ts],
        **{
            name: None if name in absent else _rounded(values)
            for name, values in (
                ("insert_per_s", line.insert),
                ("destroy_per_s", line.destroy),
                ("drop_per_s", line.drop),
                ("early_drop_per_s", line.early_drop),
            )
        },
        "lost": line.lost,
        "fill": {
            name: [None if value is None else round(value, 6) for value in values]
            for name, values in line.fill.items()
        },
    }
    return out


def _moment(snapshot: Any, limit: int, **more: float) -> Any:
    """The parts of a snapshot that tell about its moment."""
    if snapshot is None:
        return None
    data = snapshot_json(snapshot)
    names = ("ts", "tables", "totals", "rates_per_s", "culprits", "victims", "why")
    out = {name: data[name] for name in names} | more
    out["culprits"] = out["culprits"][:limit]
    return out


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 3) for value in values]
