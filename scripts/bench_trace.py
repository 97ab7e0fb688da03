#!/usr/bin/env python3
"""Recording: bytes per event, time to write, rate to scan, against other formats, in one run."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

# The traffic is the one that the tests use.
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

# ruff: noqa: E402
import numpy as np
from kit import synthetic

from ctrace.batch import Batch
from ctrace.record import Events
from ctrace.recording.format.codecs import zstd_available
from ctrace.recording.format.layout import Codec
from ctrace.recording.reader import Recording
from ctrace.recording.writer import Writer

EVENTS = 1_000_000
REPEATS = 5


def run(events: int = EVENTS, repeats: int = REPEATS) -> list[dict[str, Any]]:
    """One row per format: bytes per event, ns per event to write, events/s to scan two columns.

    Medians of ``repeats`` in turn, each format's second writing, process CPU time,
    everything in the page cache. Ratios
    are to the first row.
    """
    traffic = synthetic.traffic(events)
    batches = synthetic.batches(traffic)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as at:
        formats: list[tuple[str, Callable[[str], None], Callable[[str], int], float]] = []
        codecs = [Codec.ZSTD] if zstd_available() else []
        for codec in [*codecs, Codec.ZLIB]:
            formats.append((f"ctrace {codec.name.lower()}", _writer(batches, codec), _scan, 1.0))
        formats.append(("fixed 120-byte records", _fixed(traffic), _scan_fixed, 1.0))
        parquet = _parquet(traffic)
        if parquet is not None:
            formats.append(("parquet zstd", parquet, _scan_parquet, 1.0))
        # A line at a time is so slow that a part of the events is enough.
        formats.append(("json lines", _jsonl(traffic[: events // 20]), _scan_jsonl, 0.05))
        results: dict[str, list[tuple[float, float]]] = {name: [] for name, *_ in formats}
        sizes: dict[str, int] = {}
        for _ in range(repeats):
            for name, write, scan, _part in formats:
                path = os.path.join(at, name.replace(" ", "_"))
                # Once for the memory that a long recording has already: the format before
                # gave its own back to the kernel.
                for _again in range(2):
                    if os.path.exists(path):
                        os.unlink(path)
                    begun = time.process_time()
                    write(path)
                    wrote = time.process_time()
                rows = scan(path)
                results[name].append(
                    ((wrote - begun) / rows * 1e9, rows / (time.process_time() - wrote))
                )
                sizes[name] = os.path.getsize(path)
    out: list[dict[str, Any]] = []
    for name, _, _, part in formats:
        row: dict[str, Any] = {
            "format": name,
            "events": round(events * part),
            "bytes_per_event": sizes[name] / (events * part),
            "write_ns": statistics.median(ns for ns, _ in results[name]),
            "scan_per_s": statistics.median(rate for _, rate in results[name]),
        }
        first = out[0] if out else row
        row["size_ratio"] = row["bytes_per_event"] / first["bytes_per_event"]
        row["write_ratio"] = row["write_ns"] / first["write_ns"]
        row["scan_ratio"] = first["scan_per_s"] / row["scan_per_s"]
        out.append(row)
    return out


def _writer(batches: list[Batch], codec: Codec) -> Callable[[str], None]:
    def write(path: str) -> None:
        with Writer(path, synthetic.header(), codec=codec) as writer:
            for batch in batches:
                writer.write(batch)

    return write


def _scan(path: str) -> int:
    with Recording(path) as recording:
        return sum(int((part["kind"] > 0).sum()) for part in recording.columns("kind", "reason"))


def _fixed(events: Events) -> Callable[[str], None]:
    def write(path: str) -> None:
        with open(path, "wb") as file:
            file.write(events.tobytes())

    return write


def _scan_fixed(path: str) -> int:
    events = np.memmap(path, synthetic.RECORD, "r")
    np.ascontiguousarray(events["reason"])
    return int((np.ascontiguousarray(events["kind"]) > 0).sum())


def _parquet(events: Events) -> Optional[Callable[[str], None]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return None

    def write(path: str) -> None:
        columns = {}
        for name in events.dtype.names or ():
            values = np.ascontiguousarray(events[name])
            if values.ndim == 2:
                values = pa.FixedSizeBinaryArray.from_buffers(
                    pa.binary(16), len(values), [None, pa.py_buffer(values.tobytes())]
                )
            columns[name] = values
        pq.write_table(pa.table(columns), path, compression="zstd", row_group_size=1 << 16)

    return write


def _scan_parquet(path: str) -> int:
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["kind", "reason"], use_threads=False)
    return int((table["kind"].to_numpy() > 0).sum())


def _jsonl(events: Events) -> Callable[[str], None]:
    names = events.dtype.names or ()

    def write(path: str) -> None:
        with open(path, "w") as file:
            columns = [
                [bytes(value).hex() for value in events[name]]
                if events[name].ndim == 2
                else events[name].tolist()
                for name in names
            ]
            for row in zip(*columns, strict=True):
                file.write(json.dumps(dict(zip(names, row, strict=True))) + "\n")

    return write


def _scan_jsonl(path: str) -> int:
    with open(path) as file:
        return sum(json.loads(line)["kind"] > 0 for line in file)


def main() -> None:
    """Print the rows."""
    for row in run():
        print(
            f"{row['format']:24} {row['bytes_per_event']:7.1f} B/event ({row['size_ratio']:.1f}x)  "
            f"write {row['write_ns']:8.0f} ns ({row['write_ratio']:.1f}x)  "
            f"scan {row['scan_per_s'] / 1e6:8.1f} M/s (1/{row['scan_ratio']:.1f})"
        )


if __name__ == "__main__":
    main()
