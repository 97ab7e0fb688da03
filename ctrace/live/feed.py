"""A live source through the model to a screen, in threads of its own.

The screen takes the newest snapshot when it wants one. However slowly it paints, the
source is drained in time: a slow terminal costs frames, never events.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Optional

from ctrace.batch import Batch, Source
from ctrace.errors import CtraceError
from ctrace.live.filtering import View, check, view
from ctrace.live.protocol import Phase, Progress
from ctrace.model.snapshot import Snapshot
from ctrace.record import Kind
from ctrace.recording.recorder.told_once import Known

if TYPE_CHECKING:
    from ctrace.advice.beside import Reader
    from ctrace.model.model import Model
    from ctrace.recording.recorder.late_start import LateRecording

EARLY = 0.1
"""Seconds until the first snapshot."""


class LiveFeed(Progress):
    """A :class:`ctrace.live.protocol.Feed` over a source that is opened in the background."""

    def __init__(
        self,
        open_source: Callable[[], Source],
        *,
        interval: float = 1.0,
        asked: Optional[View] = None,
        memory: int = 32 << 20,
        early: bool = True,
        shown_filter: str = "",
        flows_filtered: bool = False,
    ) -> None:
        """``early`` asks for a first snapshot before the interval is over; ``shown_filter``
        is what was filtered in the kernel, in the user's words; with ``flows_filtered`` that
        chose among a table's flows, so that its counters tell more than what was asked for."""
        self._beside: Optional[Reader] = None
        self._open = open_source
        self._interval = interval
        self._view = asked or View()
        self._most = self._view.limit
        self._memory = memory
        self._early = early
        self._shown_filter = shown_filter
        self._flow_filter = shown_filter if flows_filtered else ""
        super().__init__(Phase("attaching", "attaching to the kernel"))
        self._listening = self._phase
        self._read = self._held = 0
        """Entries from before that were read, and of how many, as far as the tables tell."""
        self._source: Optional[Source] = None
        self._model: Optional[Model] = None
        self._writer: Optional[LateRecording] = None
        self._known = Known(0)
        self._lock = threading.Lock()
        """Held for the model's arithmetic; the screen never takes it."""
        self._news = threading.Condition()
        self._again = threading.Event()
        self._closing = threading.Event()
        self._worker = threading.Thread(target=self._work, name="ctrace-feed", daemon=True)
        self._viewer = threading.Thread(target=self._review, name="ctrace-view", daemon=True)
        self._worker.start()
        self._viewer.start()

    # -- Feed ---------------------------------------------------------------------------

    def wait(self, seen: Optional[Snapshot], timeout: float) -> Optional[Snapshot]:
        """The newest snapshot once it is another than ``seen``; None when time is up or over."""
        deadline = time.monotonic() + timeout
        with self._news:
            while self._latest is seen or self._latest is None:
                left = deadline - time.monotonic()
                if left <= 0 or self._phase.name in ("failed", "ended"):
                    return None
                # Short waits: a signal's handler runs only between them.
                self._news.wait(min(left, 0.2))
            return self._latest

    def set_view(self, group: str, sort: str, filter_text: str) -> None:
        """Group, sort and filter otherwise; a snapshot follows at once. Raises UsageError."""
        check(group, filter_text)
        self._view = self._view._replace(group=group, sort=sort, text=filter_text)
        self._again.set()

    def set_rows(self, rows: int) -> None:
        """Rows that the screen can show; a snapshot follows at once when these are more."""
        before, limit = self._view.limit, min(rows, self._most)
        self._view = self._view._replace(limit=limit)
        if limit > before:
            self._again.set()

    def read_beside(self, reader: Reader) -> None:
        """From now on, read what the rules say about the same tables, too."""
        self._beside = reader
        reader.start()

    def close(self) -> None:
        """Detach, finish a recording, stop the threads."""
        self._closing.set()
        self._again.set()
        if self._beside:
            self._beside.close()
        with self._news:
            self._news.notify_all()
        source = self._source
        if source is not None:
            source.close()
        if threading.current_thread() is not self._worker:
            self._worker.join(5.0)
        self.stop_recording()

    # -- Records ------------------------------------------------------------------------

    @property
    def recording(self) -> str:
        """The file being written."""
        writer = self._writer
        return writer.path if writer is not None else ""

    def record(self, path: str) -> None:
        """Write every batch from now on to ``path``. Raises CtraceError."""
        source = self._source
        if source is None:
            raise CtraceError("nothing to record yet: still attaching")
        from ctrace.recording.recorder.late_start import LateRecording

        with self._lock:
            self._writer = LateRecording(path, source, self._known, self._shown_filter)

    def stop_recording(self) -> str:
        """Finish the file once it has what was in the tables before: this takes seconds at most."""
        if self._writer is None:
            return ""
        from ctrace.recording.recorder.late_start import PATIENCE

        until = time.monotonic() + PATIENCE
        while (
            self._writer is not None
            and not self._writer.complete
            and self._worker.is_alive()
            and self._worker is not threading.current_thread()
            and time.monotonic() < until
        ):
            self._closing.wait(0.05)
        with self._lock:
            writer, self._writer = self._writer, None
        if writer is None:
            return ""
        writer.close("ended at the screen")
        return writer.path

    # -- threads ------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            source = self._open()
            if self._closing.is_set():
                source.close()
                return
            self._source = source
            from ctrace.model.model import Model

            self._model = Model(
                source.hooks,
                source.clock,
                source.started,
                host=socket.gethostname(),
                memory=self._memory,
                interval=self._interval,
            )
            self._phase = self._listening = Phase("live", f"listening with {source.hooks.family}")
            for batch in self._batches(source):
                self._take(batch)
                if self._closing.is_set():
                    break
            self._phase = Phase("ended", "the source has ended")
        except Exception as error:  # shown on the screen, and by the command line after it
            self._fail(error)
        finally:
            with self._news:
                self._news.notify_all()

    def _batches(self, source: Source) -> Iterator[Batch]:
        """A first short batch, so that the screen has something to show, then the interval's."""
        if self._early and self._interval > EARLY:
            for batch in source.batches(EARLY):
                yield batch
                if not batch.more:
                    break
        yield from source.batches(self._interval)

    def _take(self, batch: Batch) -> None:
        if self._beside:
            batch = self._beside.with_news(batch)
        with self._lock:
            assert self._model is not None
            self._model.update(batch)
            self._known.learn(batch)
            writer = self._writer
            if writer is not None:
                try:
                    writer.write(batch)
                except CtraceError as error:
                    self._writer = None
                    with contextlib.suppress(CtraceError):
                        writer.close()
                    self._phase = Phase("live", f"recording stopped: {error}")
            if batch.more:
                self._say_read(batch)
                return
            snapshot = self._snapshot()
        if self._phase.name == "reading":
            self._phase = self._listening
        self._publish(snapshot)

    def _say_read(self, batch: Batch) -> None:
        """Large tables take seconds to read at the start: until the first snapshot, how far."""
        self._read += int((batch.events["kind"] == int(Kind.EXISTING)).sum())
        self._held = sum(table.count for table in batch.tables) or self._held
        if self._read and self._latest is None:
            of = f" of about {self._held:,}" if self._held > self._read else ""
            text = f"reading the entries that are in the tables: {self._read:,}{of} so far"
            self._phase = Phase("reading", text)

    def _snapshot(self) -> Snapshot:
        assert self._model is not None
        return view(self._model, self._view, self._flow_filter, self._shown_filter)

    def at(self, group: str, limit: int) -> Snapshot:
        """This moment by another grouping, for advice. Raises CtraceError before the first."""
        with self._lock:
            if self._model is None:
                raise CtraceError("nothing has been observed yet")
            return self._model.snapshot(group=group, sort="held", limit=limit)

    def _publish(self, snapshot: Snapshot) -> None:
        with self._news:
            self._latest = snapshot
            self._news.notify_all()

    def _review(self) -> None:
        """Answer a change of view at once, not at the next batch."""
        while not self._closing.is_set():
            self._again.wait()
            self._again.clear()
            if self._closing.is_set():
                return
            if self._latest is None:
                continue
            try:
                with self._lock:
                    snapshot = self._snapshot()
            except CtraceError:
                continue  # a filter that cannot be understood leaves the screen as it is
            self._publish(snapshot)
