"""Writers of the export formats: each takes chunks of columns and streams them out."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from typing import Any, BinaryIO, TextIO

import numpy as np

from ctrace.errors import CtraceError
from ctrace.names import clean
from ctrace.recording.derived import Recorded
from ctrace.view.export.json import utc
from ctrace.view.export.rows import NUMBERS, OF_DESTROYS, ORDER, TEXTS, Rows

Show = Callable[[float], None]


def to_parquet(recording: Recorded, out: BinaryIO, show: Show) -> int:
    """Parquet into an open file; the number of events. Raises CtraceError without pyarrow."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise CtraceError("pyarrow is missing: install it with pip install pyarrow") from None
    schema = pa.schema([(name, _arrow_type(pa, name)) for name in ORDER])
    total = 0
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        pending: list[Any] = []
        rows = 0
        for batch, columns in Rows(recording).chunks():
            show(done(recording, batch.until))
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
    """One JSON object per line; unknown values are null."""

    def write(rows: list[tuple[Any, ...]]) -> None:
        out.writelines(json.dumps(dict(zip(ORDER, row))) + "\n" for row in rows)

    return _lines(recording, show, write)


def _lines(recording: Recorded, show: Show, write: Callable[[list[tuple[Any, ...]]], None]) -> int:
    total = 0
    for batch, columns in Rows(recording).chunks(1 << 14):
        show(done(recording, batch.until))
        rows = list(zip(*(_values(name, columns[name]) for name in ORDER)))
        write(rows)
        total += len(rows)
    return total


def _values(name: str, column: Any) -> list[Any]:
    if name == "time":
        return [utc(value) for value in column.tolist()]
    if name in TEXTS:
        values, codes = column
        values = [clean(value) for value in values]
        return [values[code] for code in codes.tolist()]
    if name in OF_DESTROYS:
        values, valid = column
        return [v if ok else None for v, ok in zip(values.tolist(), valid.tolist())]
    listed: list[Any] = column.tolist()
    return listed


def plain(text: str) -> str:
    """A name that is UTF-8 and has no control characters."""
    return clean(text)


def done(recording: Recorded, until: int) -> float:
    """How far into the recording a boot-clock time is, 0..1."""
    length = max(1, recording.until - recording.started)
    return min(1.0, max(0.0, (until - recording.started) / length))
