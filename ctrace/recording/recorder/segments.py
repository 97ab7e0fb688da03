"""The flight recorder: segments on disk within a limit.

Each segment is a whole recording: it begins with the entries alive at that moment (as
EXISTING), and its header has the counters so far. So any segment can be read alone, and
old ones can go without hurting the rest.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

from ctrace import files
from ctrace.batch import Batch
from ctrace.cost.result import Perf
from ctrace.errors import CtraceError, UsageError
from ctrace.record import Events, Reason, empty
from ctrace.recording.counters import Counted
from ctrace.recording.format.meta import Header
from ctrace.recording.recorder.living import Living
from ctrace.recording.recorder.told_once import Known
from ctrace.recording.recorder.triggers import Trigger
from ctrace.recording.series import NUMBER, SESSION, SUFFIX
from ctrace.recording.writer import Writer

KEPT = ".kept" + SUFFIX
_SEGMENT = re.compile(r"\d{8}T\d{6}\.\d{3}Z-[0-9a-f]+(\.kept)?" + re.escape(SUFFIX))
"""What a recorder calls its files; others are left alone."""
SMALLEST = 64 << 10
"""Bytes of the smallest segment, on a disk that turned out to be small."""


@dataclass(frozen=True)
class Retention:
    """What a flight recorder keeps."""

    size: Optional[int] = 1 << 30
    """Bytes on disk, for all segments in the directory."""
    seconds: Optional[float] = None
    triggers: tuple[Trigger, ...] = ()
    """With any triggers, only what surrounds them is kept."""
    before: float = 120.0
    after: float = 120.0

    @property
    def segment_size(self) -> int:
        """A segment ends when so much has come after its beginning, which may itself be larger."""
        return max(1 << 20, min(256 << 20, (self.size or 4 << 30) // 16))

    @property
    def segment_seconds(self) -> float:
        """And after this many seconds: old data is thrown away a segment at a time."""
        if self.triggers:
            return max(1.0, min(60.0, self.before / 4))
        return max(1.0, min(600.0, (self.seconds or 86400.0) / 12))


def _check(header: Header, triggers: tuple[Trigger, ...]) -> None:
    seen = {"drop": header.hooks.drop_tuples, "evict": header.hooks.evictions}
    for trigger in triggers:
        if header.flow_filter and not seen.get(trigger.name, True):
            raise UsageError(
                f"{header.hooks.family} hooks do not see whose packets and entries these are, so "
                f"--trigger {trigger.name} goes with --netns and with no other filter"
            )


def _make(directory: Path) -> None:
    """The folder, of whoever asked for it, unless it is there."""
    if directory.is_dir():
        return
    directory.mkdir(mode=0o700, parents=True)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        files.give_to_caller(fd)
    finally:
        os.close(fd)


class FlightRecorder:
    """Writes segments into a directory, never more than its limit. A sink."""

    def __init__(self, directory: str, header: Header, retention: Retention) -> None:
        """Raises CtraceError when the directory cannot be used, UsageError for a trigger that
        these hooks cannot see under this filter."""
        _check(header, retention.triggers)
        self._directory = Path(directory)
        try:
            _make(self._directory)
        except OSError as error:
            raise CtraceError(f"cannot create {directory}: {error.strerror}") from None
        self.path = directory
        self.events = 0
        self.lost = 0
        self._header = header
        self._retention = retention
        self._session = os.urandom(8).hex()
        self._number = 0
        self._living = Living()
        self._known = Known(header.started)
        self._counted = Counted(header)
        self._last: dict[Reason, int] = {}
        self._rules: dict[int, bytes] = {}  # compressed: the texts may be many megabytes
        self._until: dict[str, int] = {}
        """Boot clock, ns, at which each segment ended: the wall clock may be set meanwhile."""
        self._spans: list[tuple[Path, int, int]] = []
        """Finished segments that no trigger has asked to keep: path, from, until."""
        self._fired: Optional[int] = None
        self._rate = (header.started, 0)
        self._others = 0
        """Bytes of the finished segments."""
        self._segment_size = retention.segment_size
        self.full = 0
        """How often the disk was full, and older segments went for newer ones."""
        self._note_earlier(header.started)
        self._writer = self._open(header.started)
        self._began = header.started
        self._before = self._writer.size  # its beginning
        self._prune(header.started)

    @property
    def stored(self) -> int:
        """Bytes in the directory now."""
        return sum(size for _, size in self._files())

    def write(self, batch: Batch) -> None:
        """Take a batch. Raises CtraceError when the disk refuses."""
        fired = bool(self._retention.triggers) and self._fires(batch)
        self._put(batch)
        self._living.take(batch)
        self._known.learn(batch)
        self.events += len(batch.events)
        self.lost += batch.lost
        if fired:
            self._fired = batch.until
        age = (batch.until - self._began) / 1e9
        come = self._writer.size - self._before
        if come >= self._segment_size or age >= self._retention.segment_seconds:
            self._roll(batch.until)
        elif self._retention.size is not None and self._over():
            self._prune(batch.until)

    def ruleset(self, netns: int, text: str) -> None:
        """Rules go into every segment."""
        self._rules[netns] = zlib.compress(text.encode(errors="surrogatepass"))
        self._between(lambda: self._writer.ruleset(netns, text))

    def measurement(self, host: str, perf: Perf) -> None:
        """Into the segment being written: the latest measurement covers the whole time."""
        self._between(lambda: self._writer.measurement(host, perf))

    def close(self, reason: str = "") -> None:
        """End the last segment; with triggers, drop the segments that none has asked for."""
        self._put(None)
        self._end(reason)
        self._finish(self._known.batch.until)
        if self._retention.triggers:
            for path, _, _ in self._spans:
                path.unlink(missing_ok=True)
            self._spans = []
        self._prune(self._known.batch.until)

    # -- inside -----------------------------------------------------------------------

    def _open(self, now: int) -> Writer:
        path = self._path(self._header.clock.utc(now))
        header = replace(
            self._header,
            started=now,
            base=self._known.counts,
            facts={**self._header.facts, SESSION: self._session, NUMBER: str(self._number)},
        )
        writer = Writer(str(path), header, make_room=lambda: self._drop_oldest(path))
        try:
            for netns, text in self._rules.items():
                writer.ruleset(netns, zlib.decompress(text).decode(errors="surrogatepass"))
        except CtraceError:
            if not writer.full:
                raise
            writer.abandon()
            path.unlink(missing_ok=True)
            self._rules.clear()  # the disk is too small for them
            return self._open(now)
        return writer

    def _path(self, utc: int) -> Path:
        """Of a segment that begins then (ns); its milliseconds may be taken by the one before."""
        while True:
            stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(utc / 1e9))
            name = f"{stamp}.{utc // 1_000_000 % 1000:03d}Z-{self._session}"
            if not any((self._directory / (name + end)).exists() for end in (SUFFIX, KEPT)):
                return self._directory / (name + SUFFIX)
            utc += 1_000_000

    def _put(self, batch: Optional[Batch]) -> None:
        """Write a batch, dropping whatever it takes; None writes what was taken so far. Raises
        CtraceError.

        On a disk that is full, and has no older segment any more, the one being written goes: a new
        one begins with who is alive. Where even that has no room, it begins without them, and the
        batch's events are counted as lost; the counters stay exact.
        """
        try:
            if batch is None:
                self._writer.flush()
            else:
                self._writer.write(batch)
            return
        except CtraceError:
            if not self._writer.full:
                raise
        self.full += 1
        self._shrink(self._writer.size)
        now = self._known.batch.until
        rest = batch or Batch.idle(now)
        without = replace(rest, events=empty(), lost=rest.lost + len(rest.events))
        for rows, then in ((self._living.rows(now), rest), (iter(()), without)):
            self._writer.abandon()
            Path(self._writer.path).unlink(missing_ok=True)
            self._begin(now, rows)
            try:
                self._writer.write(then)
                self._writer.flush()
                return
            except CtraceError as error:
                if not self._writer.full or then is without:
                    raise CtraceError(f"{error}; there is nothing left to drop") from None

    def _between(self, write: Callable[[], None]) -> None:
        """Write what is no batch; on a full disk it is left out, and the next batch makes room."""
        self._put(None)
        try:
            write()
        except CtraceError:
            if not self._writer.full:
                raise

    def _drop_oldest(self, writing: Path) -> bool:
        """Free a segment's room on a full disk; False when only the one being written is left."""
        for path, size in self._files():
            if path != writing:
                self.full += 1
                self._shrink(size)
                path.unlink(missing_ok=True)
                return True
        return False

    def _shrink(self, size: int) -> None:
        """Shrink the limit to the disk's real size, so that several segments fit."""
        self._segment_size = max(SMALLEST, min(self._segment_size, size // 4))

    def _begin(self, now: int, living: Iterator[Events]) -> None:
        """Begin a segment: entries alive, the state of the tables, all names."""
        self._number += 1
        self._began = now
        self._writer = self._open(now)
        rows, lacks = next(living, empty()), self._living.lacks
        try:
            self._writer.write(replace(self._known.batch, events=rows, until=now, lost=lacks))
            for rows in living:
                self._writer.write(Batch(rows, now))
        except CtraceError:
            if not self._writer.full:  # else whatever is written next makes room
                raise
        self._before = self._writer.size

    def _end(self, reason: str = "") -> None:
        """End the segment; on a full disk its closing block may be missing."""
        try:
            self._writer.close(reason)
        except CtraceError:
            if not self._writer.full:
                raise

    def _roll(self, now: int) -> None:
        began = self._began
        self._put(None)
        if self._began != began:
            return  # a full disk has begun another already
        self._end()
        self._finish(now)
        self._begin(now, self._living.rows(now))
        self._prune(now)

    def _note_earlier(self, now: int) -> None:
        """The age of segments left by earlier recorders, by the present wall clock."""
        utc = time.time_ns()
        for path, _ in self._files():
            with contextlib.suppress(OSError):
                self._until[path.name] = now - max(0, utc - path.stat().st_mtime_ns)

    def _finish(self, now: int) -> None:
        path = Path(self._writer.path)
        self._until[path.name] = now
        self._spans.append((path, self._began, now))
        if not self._retention.triggers or self._fired is None:
            return
        low = self._fired - int(self._retention.before * 1e9)
        high = self._fired + int(self._retention.after * 1e9)
        rest = []
        for span in self._spans:
            if span[1] <= high and span[2] >= low:
                kept = span[0].name.removesuffix(SUFFIX) + KEPT
                with contextlib.suppress(OSError):
                    os.replace(span[0], self._directory / kept)
                    self._until[kept] = span[2]
            else:
                rest.append(span)
        self._spans = rest
        if now > high:
            self._fired = None

    def _prune(self, now: int) -> None:
        """Delete segments that are too old, then the oldest until the rest fits the size limit."""
        if self._retention.triggers:
            horizon = now - int(self._retention.before * 1e9)
            while self._spans and self._spans[0][2] < horizon:
                self._spans.pop(0)[0].unlink(missing_ok=True)
        files = [file for file in self._files() if str(file[0]) != self._writer.path]
        # (one that another recorder left there meanwhile is as old as our knowing it)
        self._until = {path.name: self._until.get(path.name, now) for path, _ in files}
        if self._retention.seconds is not None:
            old = now - int(self._retention.seconds * 1e9)
            for path, _ in list(files):
                if self._until[path.name] < old:
                    path.unlink(missing_ok=True)
                    files = [file for file in files if file[0] != path]
        if self._retention.size is None:
            return
        total = sum(size for _, size in files)
        for path, size in files:
            if total + self._room() <= self._retention.size:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._others = total

    def _room(self) -> int:
        """Bytes that the segment being written takes, or will take."""
        return max(self._writer.size, self._segment_size)

    def _over(self) -> bool:
        return self._others + self._room() > (self._retention.size or 0)

    def _files(self) -> list[tuple[Path, int]]:
        """Every segment in the directory with its size, oldest first; the one being written last.

        Not by name: what was written before the wall clock was set back has the later one.
        """
        out = []
        for path in self._directory.iterdir():
            with contextlib.suppress(OSError):
                found = path.lstat()
                if _SEGMENT.fullmatch(path.name) and stat.S_ISREG(found.st_mode):
                    out.append((path, found.st_size))
        out.sort(key=lambda one: (self._until.get(one[0].name, float("inf")), one[0].name))
        return out

    def _fires(self, batch: Batch) -> bool:
        told = self._counted.after(batch)
        now = {reason: sum(int(c[reason]) for c in told.values()) for reason in Reason}
        new = {reason: now[reason] - self._last.get(reason, 0) for reason in Reason} if told else {}
        self._last = now if told else self._last
        inserts = sum(new.get(r, 0) for r in (Reason.NEW, Reason.USER, Reason.NAT_CLASH))
        since, seen = self._rate
        seconds = (batch.until - since) / 1e9
        rate = (seen + inserts) / seconds if seconds > 0 else 0.0
        self._rate = (batch.until, 0) if seconds >= 1 else (since, seen + inserts)
        for trigger in self._retention.triggers:
            fired = {
                "drop": new.get(Reason.TABLE_FULL, 0) > 0 or self._kernel("drop", batch),
                "evict": new.get(Reason.EVICTED, 0) > 0 or self._kernel("early_drop", batch),
                "fill": any(t.max and t.count >= trigger.value * t.max for t in batch.tables),
                "inserts": seconds >= 1 and rate >= trigger.value,
            }[trigger.name]
            if fired:
                return True
        return False

    def _kernel(self, name: str, batch: Batch) -> bool:
        """Whether the kernel's own counter rose: hooks may not see every kind of drop.

        It says nothing about the flows that a filter chose among a namespace's.
        """
        if self._header.flow_filter:
            return False
        before = {table.netns: table.stats.get(name) for table in self._known.batch.tables}
        return any(
            table.stats.get(name, 0) > (before.get(table.netns) or 0)
            for table in batch.tables
            if before.get(table.netns) is not None
        )
