"""Writes batches to a recording: append-only, about one block a second."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Optional

import numpy as np

from ctrace import files
from ctrace.batch import Batch, Counts
from ctrace.cost.result import Perf
from ctrace.errors import CtraceError
from ctrace.record import WORDS
from ctrace.recording.format import beside_block, cost_block, meta
from ctrace.recording.format.codecs import Compressor, zstd_available
from ctrace.recording.format.columns import encode_blob
from ctrace.recording.format.events import encode_events, transposed
from ctrace.recording.format.layout import (
    FILE_HEAD,
    LIMIT_BATCH,
    LIMIT_BLOB,
    MAX_ROWS,
    TRAILER,
    TRAILER_MAGIC,
    BlockHead,
    BlockKind,
    Buffer,
    Codec,
    Column,
    Section,
)
from ctrace.recording.format.window import U64, TupleIndex

FLUSH_NS = 1_000_000_000
"""ns of recording that a crash loses at most."""
FLUSH_ROWS = MAX_ROWS // 2
"""Rows after which a block is written sooner: what is not written yet takes 240 bytes a row."""
FULL = (errno.ENOSPC, errno.EDQUOT)
SYNC_S = 5.0
"""Seconds that a power cut loses at most in addition."""


class Writer:
    """A recording being written. Not for use from several threads at once.

    The file is new, readable by its owner alone, and locked while it is written, so
    that a reader can tell a recording in progress from one that was cut off.
    """

    def __init__(
        self,
        path: str,
        header: meta.Header,
        *,
        codec: Optional[Codec] = None,
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        """Create ``path``. Raises CtraceError when it exists or cannot be made.

        ``codec`` is zstd where the zstandard package is installed, else zlib. ``make_room``
        is asked when the disk is full: true says that it freed some, and writing goes on.
        """
        self.path = path
        self.events = 0
        self.batches = 0
        self.lost = 0
        self.size = 0
        self.until = header.started
        self._codec = codec if codec is not None else default_codec()
        self._compress = Compressor(self._codec)
        self._tuples = TupleIndex()
        self._pending: list[Batch] = []
        self._rows = 0
        self._counts: Optional[dict[int, Counts]] = None
        self._index: list[tuple[int, int, int, int]] = []
        self._failed: Optional[CtraceError] = None
        self.full = False
        """Whether writing failed because the disk was full."""
        self._make_room = make_room
        self._closed = False
        # kept, for fresh pages would cost more than what is written to them
        self._room = np.empty((WORDS, 2 * FLUSH_ROWS), np.uint64)
        self._fd = _create(path)
        self._sync = _Sync(self._fd)
        try:
            self._append([FILE_HEAD])
            self._block(BlockHead(BlockKind.HEAD), Column.JSON, meta.header_json(header))
        except CtraceError:
            self.abandon()
            with contextlib.suppress(OSError):
                os.unlink(path)  # of no use to anyone
            raise

    @property
    def stored(self) -> int:
        """Bytes in the file now."""
        return self.size

    def write(self, batch: Batch) -> None:
        """Take a batch; about once a second everything taken goes to the file.

        Raises CtraceError when the disk is full or fails: what is in the file by
        then stays readable, and nothing more can be written.
        """
        if self._failed:
            raise self._failed
        for part in _parts(batch):
            self._pending.append(part)
            self._rows += len(part.events)
            if part.until - self.until >= FLUSH_NS or self._rows >= FLUSH_ROWS:
                self.flush()

    def flush(self) -> None:
        """Write every complete batch taken so far. Raises CtraceError as write does."""
        pending, self._pending, self._rows = self._pending, [], 0
        if not pending:
            return
        ends = np.cumsum([len(batch.events) for batch in pending])
        table = transposed([batch.events for batch in pending], self._room)
        rows = table.shape[1]
        blocks = max(1, -(-rows // MAX_ROWS))
        first = 0
        for i in range(blocks):
            start, stop = rows * i // blocks, rows * (i + 1) // blocks
            last = len(pending)
            if i + 1 < blocks:
                last = int(np.searchsorted(ends, stop, "right"))
            self._batches(table[:, start:stop], pending[first:last], ends[first:last] - start)
            first = last

    def note(self, text: str) -> None:
        """A remark for the reader of the recording: why it starts, has a gap or ends."""
        self.flush()
        self._block(BlockHead(BlockKind.NOTE, until=self.until), Column.JSON, meta.dumps(text))

    def ruleset(self, netns: int, text: str) -> None:
        """A namespace's packet filter rules, as text, at this moment."""
        self.flush()
        blob = meta.dumps({"netns": netns, "text": text[: LIMIT_BLOB // 8]})
        self._block(BlockHead(BlockKind.RULESET, until=self.until), Column.JSON, blob)

    def measurement(self, host: str, perf: Perf) -> None:
        """What conntrack cost on a host, from the start of measuring to now."""
        self.flush()
        blob = meta.dumps({"host": host, "perf": cost_block.to_json(perf)})
        self._block(BlockHead(BlockKind.PERF, until=self.until), Column.JSON, blob)

    def close(self, reason: str = "") -> None:
        """End the recording cleanly, with an index. Safe to call twice.

        ``reason`` says why it ended, for a person. Raises CtraceError when the last
        events could not be written.
        """
        if self._closed:
            return
        try:
            if not self._failed:
                self.flush()
            self._foot(str(self._failed) if self._failed else reason)
        except CtraceError:
            if not self._failed:
                raise
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the file as it is: complete blocks stay, nothing is added."""
        self._closed = True
        self._room = np.empty((WORDS, 0), np.uint64)  # the next segment has its own
        self._sync.stop()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _batches(self, rows: U64, batches: list[Batch], ends: Any) -> None:
        """One block: these rows, and the batches that end in them."""
        if rows.shape[1]:
            sections, head = encode_events(rows, self._tuples, self._compress)
        else:
            sections, head = [], BlockHead(0, first_tuple=self._tuples.total, ts=self.until)
        table = np.zeros(len(batches), meta.ENDS)
        counts: list[tuple[int, int, Counts]] = []
        tables, names, beside = [], [], []
        full = True  # the first counters of a block stand for themselves
        for i, batch in enumerate(batches):
            kind, changed = self._changed(batch.counts, full)
            full = full and kind == meta.NO_COUNTS
            counts += [(i, netns, values) for netns, values in changed.items()]
            cost = batch.cost
            table[i] = (ends[i], kind, batch.until, batch.lost, cost.cpu, cost.rss, cost.kernel)
            if batch.tables:
                tables.append([i, meta.tables_json(batch.tables)])
            if meta.has_names(batch):
                names.append([i, meta.names_json(batch.names)])
            if batch.beside:
                beside.append([i, beside_block.to_json(batch.beside)])
        self.until = batches[-1].until if batches else self.until
        head = BlockHead(
            BlockKind.BATCHES,
            rows=head.rows,
            tuples=head.tuples,
            batches=len(batches),
            first_row=self.events,
            first_tuple=head.first_tuple,
            first_batch=self.batches,
            ts=head.ts,
            until=self.until,
        )
        compress = self._compress
        sections += encode_blob(Column.BATCHES, table.tobytes(), compress)
        sections += encode_blob(
            Column.COUNTS, np.array(counts, meta.COUNTS).tobytes() if counts else b"", compress
        )
        sections += encode_blob(Column.TABLES, meta.dumps(tables) if tables else b"", compress)
        sections += encode_blob(Column.NAMES, meta.dumps(names) if names else b"", compress)
        if beside:
            sections += encode_blob(Column.BESIDE, meta.dumps(beside), compress)
        self._write_block(head, sections)
        self.events += rows.shape[1]
        self.batches += len(batches)
        self.lost += sum(batch.lost for batch in batches)

    def _changed(self, counts: Mapping[int, Counts], full: bool) -> tuple[int, dict[int, Counts]]:
        if not counts:
            return meta.NO_COUNTS, {}
        last, now = self._counts, dict(counts)
        self._counts = now
        if full or last is None or last.keys() != now.keys():
            return meta.ALL_COUNTS, now
        return meta.CHANGED_COUNTS, {
            netns: values
            for netns, values in now.items()
            if values is not last[netns] and not np.array_equal(values, last[netns])
        }

    def _foot(self, reason: str) -> None:
        offset = self.size
        index = np.array(self._index, np.uint64).reshape(-1, 4)
        info = {"reason": reason, "events": self.events, "batches": self.batches, "lost": self.lost}
        sections = encode_blob(Column.JSON, meta.dumps(info), self._compress)
        sections += encode_blob(Column.INDEX, index.tobytes(), self._compress)
        self._write_block(BlockHead(BlockKind.FOOT, until=self.until), sections)
        self._append([TRAILER.pack(offset, TRAILER_MAGIC)])

    def _block(self, head: BlockHead, column: Column, blob: bytes) -> None:
        self._write_block(head, encode_blob(column, blob, self._compress))

    def _write_block(self, head: BlockHead, sections: list[Section]) -> None:
        offset = self.size
        self._append(head.pack(sections))
        self._index.append((offset, self.size - offset, head.kind, head.until))

    def _append(self, buffers: list[Buffer]) -> None:
        """Write all of these or none. Raises CtraceError when the system refuses."""
        total = sum(len(buffer) for buffer in buffers)
        written, rest = 0, memoryview(b"")
        try:
            while written < total:
                try:
                    # The disk may fill within the block, or a signal come: then the rest.
                    written += os.write(self._fd, rest) if rest else os.writev(self._fd, buffers)
                except OSError as error:
                    if error.errno not in FULL or not self._make_room():
                        raise
                rest = memoryview(b"".join(buffers))[written:] if written < total else rest
        except OSError as error:
            self.full = error.errno in FULL
            self._failed = CtraceError(
                f"cannot write {self.path}: {error.strerror}; the recording ends here and keeps "
                f"its {self.events:,} events"
            )
            # Half a block would be skipped by readers anyway; its space is better free.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.size)
                os.lseek(self._fd, self.size, os.SEEK_SET)
            raise self._failed from None
        self.size += total


class _Sync:
    """Makes the kernel write the file out every few seconds, off the capturing thread."""

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ctrace-sync", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(SYNC_S):
            try:
                os.fdatasync(self._fd)
            except OSError:
                # A pipe has nothing to sync; a failing disk shows at the next write.
                return

    def stop(self) -> None:
        """End the thread; safe to call twice."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            os.close(self._fd)


def default_codec() -> Codec:
    """zstd where its package is installed, else zlib."""
    return Codec.ZSTD if zstd_available() else Codec.ZLIB


def _create(path: str) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)
    except FileExistsError:
        raise CtraceError(f"{path} exists: give another name with -o, or remove it") from None
    except OSError as error:
        raise CtraceError(f"cannot create {path}: {error.strerror}") from None
    files.give_to_caller(fd)
    # Advisory, for readers. Where the file system has no locks a recording in
    # progress merely looks like one that was cut off.
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def _parts(batch: Batch) -> list[Batch]:
    """A batch larger than a reader accepts, as several; all but the last carry events alone."""
    n = len(batch.events)
    if n <= LIMIT_BATCH:
        return [batch]
    *others, last = (batch.events[i : i + LIMIT_BATCH] for i in range(0, n, LIMIT_BATCH))
    return [*(Batch(events, batch.until) for events in others), replace(batch, events=last)]
