"""Writers of the export formats: each takes chunks of columns and streams them out."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, TextIO

import numpy as np

from ctrace.errors import CtraceError
from ctrace.recording.counters import Counted
from ctrace.recording.derived import Recorded
from ctrace.view.export.rows import NUMBERS, OF_DESTROYS, ORDER, TEXTS, Rows
from ctrace.view.format import clean

Show = Callable[[float], None]


def to_parquet(recording: Recorded, path: str, show: Show) -> int:
    """A Parquet file; the number of events. Raises CtraceError without pyarrow."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise CtraceError("pyarrow is missing: install it with pip install pyarrow") from None
    schema = pa.schema([(name, _arrow_type(pa, name)) for name in ORDER])
    total = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        pending: list[Any] = []
        rows = 0
        for batch, columns in Rows(recording).chunks():
            show(_done(recording, batch.until))
            if not len(columns["time"]):
                continue
            arrays = [_arrow(pa, name, columns[name]) for name in ORDER]
            pending.append(pa.record_batch(arrays, schema=schema))
            rows += len(arrays[0])
            if rows >= 1 << 18:
                writer.write_table(pa.Table.from_batches(pending))
                total, rows, pending = total + rows, 0, []
        if pending:
            writer.write_table(pa.Table.from_batches(pending))
    return total + rows


def _arrow_type(pa: Any, name: str) -> Any:
    if name == "time":
        return pa.timestamp("ns", tz="UTC")
    if name in TEXTS:
        return pa.string()
    return pa.from_numpy_dtype(np.dtype(NUMBERS.get(name) or OF_DESTROYS[name]))


def _arrow(pa: Any, name: str, column: Any) -> Any:
    if name in TEXTS:
        values, codes = column
        return pa.DictionaryArray.from_arrays(codes, pa.array(map(plain, values))).cast(pa.string())
    if name in OF_DESTROYS:
        values, valid = column
        return pa.array(values, mask=~valid)
    return pa.array(column, _arrow_type(pa, name))


def to_csv(recording: Recorded, out: TextIO, show: Show) -> int:
    """CSV with a header line; times in RFC 3339 with nanoseconds."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(ORDER)
    return _lines(recording, show, writer.writerows)


def to_jsonl(recording: Recorded, out: TextIO, show: Show) -> int:
    """One JSON object a line; what is unknown is null."""

    def write(rows: list[tuple[Any, ...]]) -> None:
        out.writelines(json.dumps(dict(zip(ORDER, row, strict=True))) + "\n" for row in rows)

    return _lines(recording, show, write)


def _lines(recording: Recorded, show: Show, write: Callable[[list[tuple[Any, ...]]], None]) -> int:
    total = 0
    for batch, columns in Rows(recording).chunks(1 << 14):
        show(_done(recording, batch.until))
        rows = list(zip(*(_values(name, columns[name]) for name in ORDER), strict=True))
        write(rows)
        total += len(rows)
    return total


def _values(name: str, column: Any) -> list[Any]:
    if name == "time":
        return [_time(value) for value in column.tolist()]
    if name in TEXTS:
        values, codes = column
        values = [clean(value) for value in values]
        return [values[code] for code in codes.tolist()]
    if name in OF_DESTROYS:
        values, valid = column
        return [v if ok else None for v, ok in zip(values.tolist(), valid.tolist(), strict=True)]
    listed: list[Any] = column.tolist()
    return listed


def _time(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


def plain(text: str) -> str:
    """A name that is UTF-8 and has no control characters."""
    return clean(text)


def to_openmetrics(recording: Recorded, out: TextIO, show: Show) -> int:
    """Counters and fill once a second, with their times, for backfilling Prometheus.

    Samples of one family stand together, as the format asks: the recording is read once
    per family.
    """
    total = 0
    for family, kind, text in FAMILIES:
        out.write(f"# TYPE {family} {kind}\n# HELP {family} {text}\n")
        for batch_until, labels, value in _samples(recording, family, show):
            suffix = "_total" if kind == "counter" else ""
            moment = recording.clock.utc(batch_until) / 1e9
            out.write(f"{family}{suffix}{{{labels}}} {value} {moment:.3f}\n")
            total += 1
    out.write("# EOF\n")
    return total


FAMILIES = (
    ("ctrace_entries", "gauge", "Entries in the table."),
    ("ctrace_entries_max", "gauge", "nf_conntrack_max of the table."),
    ("ctrace_events", "counter", "Conntrack events by reason, exact."),
    ("ctrace_lost", "counter", "Events lost by the recorder."),
)


def _samples(recording: Recorded, family: str, show: Show) -> Any:
    from ctrace.record import KIND_OF, Reason

    names: dict[int, str] = {}
    lost, due = 0, 0
    host = _label(recording.header.host)
    # Samples of one label set must stand together, in the order of time.
    gathered: dict[str, list[tuple[int, int]]] = {}
    counted = Counted(recording.header)
    for batch in recording.batches():
        show(_done(recording, batch.until))
        names.update({inum: netns.name for inum, netns in batch.names.netns.items()})
        lost += batch.lost
        told = counted.after(batch)
        if family.startswith("ctrace_entries"):
            pass  # tables are read about once a second as it is
        elif batch.until < due:
            continue
        else:
            due = batch.until + 1_000_000_000
        found: list[tuple[str, int]] = []
        if family == "ctrace_lost":
            found = [(f'host="{host}"', lost)]
        elif family == "ctrace_events":
            for netns, counts in told.items():
                where = f'host="{host}",netns="{_label(names.get(netns, str(netns)))}"'
                for reason in KIND_OF:
                    kind = KIND_OF[reason].name.lower()
                    labels = f'{where},kind="{kind}",reason="{Reason(reason).name.lower()}"'
                    found.append((labels, int(counts[reason])))
        for table in batch.tables if family.startswith("ctrace_entries") else ():
            where = f'host="{host}",netns="{_label(names.get(table.netns, str(table.netns)))}"'
            found.append((where, table.max if family.endswith("max") else table.count))
        for labels, value in found:
            gathered.setdefault(labels, []).append((batch.until, value))
    for labels, points in gathered.items():
        for until, value in points:
            yield until, labels, value


def _label(text: str) -> str:
    return clean(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _done(recording: Recorded, until: int) -> float:
    length = max(1, recording.until - recording.started)
    return min(1.0, max(0.0, (until - recording.started) / length))
