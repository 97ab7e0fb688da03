"""Reads a recording: as a source of batches, by time, or a few columns at full speed."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from typing import Any, Optional

import numpy.typing as npt

from ctrace import files
from ctrace.batch import Batch, Counts, TableReading
from ctrace.cost.result import Perf
from ctrace.names import clean
from ctrace.recording.assembly import Assembly, Missing, Tally, Told
from ctrace.recording.budget import TOO_LONG, Budget, Spent, latest
from ctrace.recording.derived import Headed
from ctrace.recording.format import cost_block, meta
from ctrace.recording.format.codecs import Decompressor
from ctrace.recording.format.columns import Columns
from ctrace.recording.format.events import Rows
from ctrace.recording.format.layout import (
    FILE_HEAD,
    LIMIT_BLOB,
    LIMIT_RESYNC,
    LIMIT_TIME,
    MAGIC,
    MAJOR,
    SIGNATURE,
    TRAILER,
    TRAILER_MAGIC,
    WINDOW,
    Block,
    BlockKind,
    Column,
    Damaged,
    File,
    FormatError,
    read_block,
)
from ctrace.recording.format.places import Place, places
from ctrace.recording.scan import Scan


class Recording(Headed):
    """A recorded file. A :class:`ctrace.batch.Source`, and more.

    Iterating yields the batches exactly as they were captured. A file that is cut
    off, damaged or still being written gives what it has; :attr:`missing` tells the
    rest. Not for use from several threads at once.
    """

    def __init__(self, path: str) -> None:
        """Open it. Raises CtraceError when it is no recording or of a later version."""
        self.path = path
        self.missing = Missing()
        self.ended: Optional[str] = None
        """Why the recording ended; None when it was not ended cleanly (yet)."""
        self.remark = ""
        """A remark about the recording that is not in the file itself."""
        self._expand = Decompressor()
        self._budget = Budget()
        self._written = 0
        """Events that it holds, as its end says."""
        self._resyncs = 0
        self._from = 0
        self._reading: Optional[Iterator[Batch]] = None
        try:
            self._fd = files.opened(path)
        except OSError as error:
            raise FormatError(f"cannot open {path}: {error.strerror}") from None
        try:
            self._file = File(self._fd)
            self._places: list[Place] = []
            self._next = len(FILE_HEAD)
            self._check_version()
            self.header = self._read_header()
            if not self._use_index():
                self.refresh()
        except OSError as error:
            self.close()
            raise FormatError(f"cannot read {path}: {error.strerror}") from None
        except FormatError:
            self.close()
            raise

    # -- a source ---------------------------------------------------------------------

    @property
    def until(self) -> int:
        """Boot clock, ns, of the last batch in the file."""
        return max((p.until for p in self._places), default=self.started) or self.started

    @property
    def writing(self) -> bool:
        """Whether a recorder has the file open now."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return False

    def batches(self, interval: float = 0.0) -> Iterator[Batch]:  # noqa: ARG002
        """The recorded batches, from the beginning or the last :meth:`seek`, at full speed.

        The boundaries are the recorder's, whatever ``interval`` says. A batch's ``lost``
        includes recorded events that damage made unreadable.
        """
        assembly = Assembly(self.header, self.missing, self.path, self._budget)
        skip = self._warm_up(assembly) if self._from > self.started else 0
        for i, place in enumerate(self._of_kind(BlockKind.BATCHES)):
            if i < skip:
                continue
            try:
                yield from assembly.block(self._block(place, whole=True), self._from)
            except Damaged as error:
                self._lacks(place, error, f", in the block at byte {place.offset:,}")
        if self.missing.truncated and self.unread and not self.writing:
            self.missing.add("the end is cut off", self.unread, (self.path, -1))
        rest = assembly.rest(self._written)
        if rest:
            yield rest

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def seek(self, utc: int) -> None:
        """Let :meth:`batches` begin with the first batch that ends at or after ``utc`` (ns).

        Reads no more than the names, and the window of tuples before that batch.
        """
        self._from = utc - self.clock.offset

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # -- by column --------------------------------------------------------------------

    def columns(self, *names: str) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Some fields of every event, one dict of equally long arrays per block.

        ``names`` are those of :data:`ctrace.record.RECORD`. Only what these need is read: two
        columns pass at well over a hundred million events a second. Fields that a row's kind lacks
        (``owner`` of a destroy, ``idle_ms`` of an insert) are 0. Raises CtraceError for an unknown
        name.
        """
        scan = Scan(names)
        for place in self._of_kind(BlockKind.BATCHES):
            try:
                columns = self._block(place)
                if columns.block.head.rows:
                    yield scan.block(Rows(columns))
            except Damaged as error:
                self._lacks(place, error)

    def tables(self) -> Iterator[tuple[int, tuple[TableReading, ...]]]:
        """(boot clock ns, readings of every namespace's table), about one per second."""
        for batch_until, _, tables in self._numbers():
            if tables:
                yield batch_until, tables

    def counts(self) -> Iterator[tuple[int, dict[int, Counts]]]:
        """(boot clock ns, exact counters by namespace since the start), one per batch."""
        for batch_until, counts, _ in self._numbers():
            if counts:
                yield batch_until, counts

    def rulesets(self) -> Iterator[tuple[int, str]]:
        """(namespace, the text of its packet filter rules) as recorded."""
        for data in self._json(BlockKind.RULESET):
            if isinstance(data, dict) and isinstance(data.get("text"), str):
                netns = data.get("netns")
                yield netns if isinstance(netns, int) else 0, data["text"]

    def measurements(self) -> Iterator[tuple[str, Perf]]:
        """(host, what conntrack cost there), each over all the time measured up to then."""
        for place in self._of_kind(BlockKind.PERF):
            for data in self._json(BlockKind.PERF, [place]):
                try:
                    host, perf = cost_block.parse(data)
                except Damaged as error:
                    self._lacks(place, error)
                else:
                    yield host or self.header.host, perf

    def notes(self) -> Iterator[str]:
        """Remarks that the recorder left, and one on other files beside this recording."""
        if self.remark:
            yield self.remark
        for data in self._json(BlockKind.NOTE):
            if isinstance(data, str):
                yield data

    def _warm_up(self, assembly: Assembly) -> int:
        """Prepare to begin near the time wanted; returns how many blocks to skip."""
        places = [p for p in self._places if p.kind == BlockKind.BATCHES]
        at = next((i for i, p in enumerate(places) if p.until >= self._from), len(places))
        assembly.start_late()
        heads: list[Optional[Block]] = []
        for place in places[:at]:
            try:
                heads.append(read_block(self._file, place.offset))
            except Damaged:
                heads.append(None)
        # The first batch may have begun in an earlier block: begin with one that ends another.
        skip = max(0, at - 1)
        while skip and (last := heads[skip]) is not None and not last.head.batches:
            skip -= 1
        tuples, first = 0, skip
        while first and tuples < WINDOW:
            first -= 1
            known = heads[first]
            tuples += known.head.tuples if known else 0
        for i, block in enumerate(heads[:skip]):
            if block is not None:
                try:
                    assembly.warm_up(Columns(self._file.read, block, self._expand), i >= first)
                except Damaged as error:
                    self._lacks(places[i], error)
        return skip

    # -- the file ---------------------------------------------------------------------

    def refresh(self) -> bool:
        """Look for blocks written since; True when there are new ones."""
        self._file.size = os.fstat(self._fd).st_size
        known = len(self._places)
        while self._next < self._file.size:
            try:
                block = read_block(self._file, self._next)
            except Damaged as error:
                if not self._skip(str(error)):
                    break
                continue
            self._next += block.length
            place = Place(block.offset, block.length, block.head.kind, block.head.until)
            if place.until > latest(self.header):
                self.missing.add(TOO_LONG, place.length, (self.path, place.offset))
                self.missing.exceed(TOO_LONG)
                continue
            self._places.append(place)
            if block.head.kind == BlockKind.FOOT:
                self._read_foot(self._places[-1])
                rest = self._file.size - self._next - TRAILER.size
                if rest > 0:  # as of another recording that was appended
                    self.missing.add("something follows its end", rest, (self.path, self._next))
                self._next = self._file.size
        self.missing.truncated = self.ended is None and not self.writing
        return len(self._places) > known

    @property
    def unread(self) -> int:
        """Bytes after the last complete block: cut off, or still being written."""
        return max(0, self._file.size - self._next)

    def _check_version(self) -> None:
        head = self._file.read(0, len(FILE_HEAD))
        if not head:
            raise FormatError(f"{self.path} is empty")
        if head[: len(SIGNATURE)] != SIGNATURE[: len(head)]:
            raise FormatError(f"{self.path} is not a ctrace recording")
        if len(head) < len(FILE_HEAD):
            raise FormatError(f"{self.path} was cut off before anything was recorded")
        if (major := head[len(SIGNATURE)]) != MAJOR:
            needs = f"format {major}; this ctrace reads format {MAJOR}"
            with contextlib.suppress(Damaged):
                data = meta.loads(self._head_blob(), dict)
                if isinstance(data.get("needs"), str) and major > MAJOR:
                    needs += f": use ctrace {clean(data['needs'][:20])} or later"
            raise FormatError(f"{self.path} is a recording in {needs}")

    def _head_blob(self) -> bytes:
        block = read_block(self._file, len(FILE_HEAD))
        if block.head.kind != BlockKind.HEAD:
            raise Damaged("the first block is no header")
        return Columns(self._file.read, block, self._expand).blob(Column.JSON, LIMIT_BLOB)

    def _read_header(self) -> meta.Header:
        try:
            return meta.parse_header(self._head_blob())
        except Damaged as error:
            if self._file.size < 4096 and "ends inside" in str(error):
                raise FormatError(f"{self.path} was cut off before anything was recorded") from None
            raise FormatError(f"{self.path} is damaged at its beginning: {error}") from None

    def _use_index(self) -> bool:
        """Take the places of all blocks from the index at the end of the file, if it is intact."""
        end = self._file.size - TRAILER.size
        tail = self._file.read(max(0, end), TRAILER.size)
        if len(tail) < TRAILER.size:
            return False
        offset, magic = TRAILER.unpack(tail)
        if magic != TRAILER_MAGIC or offset >= end:
            return False
        try:
            foot = read_block(self._file, offset)
            if foot.head.kind != BlockKind.FOOT or foot.offset + foot.length != end:
                return False
            blob = Columns(self._file.read, foot, self._expand).blob(Column.INDEX, LIMIT_BLOB)
        except Damaged:
            return False
        found = places(blob, offset, latest(self.header))
        if found is None:
            return False
        found.append(Place(foot.offset, foot.length, BlockKind.FOOT, foot.head.until))
        self._places = found
        self._read_foot(self._places[-1])
        self._next = self._file.size
        return True

    def _read_foot(self, place: Place) -> None:
        for data in self._json(BlockKind.FOOT, [place]):
            told = data if isinstance(data, dict) else {}
            reason, events = told.get("reason"), told.get("events")
            self.ended = reason if isinstance(reason, str) else ""
            self._written = events if type(events) is int and events < LIMIT_TIME else 0

    def _skip(self, what: str) -> bool:
        """Move on to the next intact block; False when there is none (yet)."""
        place = self._next + 1
        while self._resyncs < LIMIT_RESYNC:
            found = self._find(place)
            if found is None:
                break
            self._resyncs += 1
            try:
                read_block(self._file, found)
            except Damaged:
                place = found + 1
                continue
            at = (self.path, self._next)
            self.missing.add(f"{what} at byte {self._next:,}", found - self._next, at)
            self._next = found
            return True
        return False

    def _find(self, place: int) -> Optional[int]:
        step = 1 << 20
        while place < self._file.size:
            data = self._file.read(place, step + len(MAGIC) - 1)
            at = data.find(MAGIC)
            if at >= 0:
                return place + at
            place += step
        return None

    def _of_kind(self, kind: BlockKind) -> Iterator[Place]:
        """Places of these blocks, also of those written while this is read."""
        i = 0
        while i < len(self._places) or (self.ended is None and self.refresh()):
            if self._places[i].kind == kind:
                yield self._places[i]
            i += 1

    def _json(self, kind: BlockKind, places: Optional[Iterable[Place]] = None) -> Iterator[Any]:
        for place in self._of_kind(kind) if places is None else places:
            try:
                block = read_block(self._file, place.offset)
                if block.head.kind == kind:
                    self._budget.text(block)
                blob = Columns(self._file.read, block, self._expand).blob(Column.JSON, LIMIT_BLOB)
                yield meta.loads(blob, object)
            except Damaged as error:
                self._lacks(place, error)

    def _block(self, place: Place, *, whole: bool = False) -> Columns:
        """The block of batches there, in memory if it is to be read ``whole``. Raises Damaged,
        also where the index states another time for it, and Spent."""
        block = read_block(self._file, place.offset)
        if block.head.until != place.until:
            raise Damaged("a block and the index differ")
        columns = Columns(self._file.load(block) if whole else self._file.read, block, self._expand)
        blob = columns.blob(Column.BATCHES, LIMIT_BLOB)
        ends = meta.ends(blob, block.head.batches, block.head.rows)["until"]
        self._budget.block(block, ends, self._file.size)
        return columns

    def _lacks(self, place: Place, error: Damaged, where: str = "") -> None:
        """Keep in mind that a block is not used, and why."""
        if isinstance(error, Spent):
            self.missing.exceed(str(error))
        else:
            self.missing.add(f"{error}{where}", place.length, (self.path, place.offset))

    def _numbers(self) -> Iterator[tuple[int, dict[int, Counts], tuple[TableReading, ...]]]:
        tally = Tally(self.header)
        for place in self._of_kind(BlockKind.BATCHES):
            try:
                told = Told(self._block(place), self._budget, named=False)
            except Damaged as error:
                self._lacks(place, error)
                continue
            for i, end in enumerate(told.ends):
                yield int(end["until"]), tally.at(told, i), told.tables.get(i, ())
