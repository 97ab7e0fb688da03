"""Empties the rings in time, no matter how busy the reader of the batches is.

One thread per source polls the hook family and follows the namespaces, so that neither a slow
screen nor an interval of a minute loses records or holds on to a namespace that its owner deleted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Optional

from ctrace.capture.family import Capture
from ctrace.capture.table.assured import Survey
from ctrace.capture.table.young import Sampler
from ctrace.host.netns import Mounts
from ctrace.kernel.rings import one_piece
from ctrace.record import Events, boot_ns, by_time, join

LOOK: Final = 1.0
"""Seconds between two checks of which namespaces exist."""
MANY: Final = 25_000
"""Records that wake a reader early (3 MB): they are still in the processor's cache, and memory
stays bounded however many come in an interval."""
SOON: Final = 0.05
"""Seconds between two checks after mounts changed: a named namespace may be new then."""
AT_ONCE: Final = 32_768
"""Records handed to a reader at once, at most: what it makes of them is many times as large."""
PENDING: Final = 4 * AT_ONCE
"""Records kept for a reader that does not come (16 MB); after that the rings overflow, and the loss
is counted."""


@dataclass
class Taken:
    """What has come since the last :meth:`Poller.take`."""

    parts: list[Events] = field(default_factory=list)
    lost: int = 0
    until: int = 0
    """Boot clock, ns: no later record is earlier than this, except a late straggler."""
    more: bool = False
    """Whether there is more than fits; the next :meth:`Poller.take` brings it."""


class Poller:
    """Polls ``capture`` until stopped; ``lock`` guards every use of it."""

    def __init__(
        self,
        capture: Capture,
        follow: Callable[[], bool],
        sampler: Optional[Sampler] = None,
        survey: Optional[Survey] = None,
    ) -> None:
        """``follow`` checks the namespaces; it returns whether new ones need the reader.

        ``sampler`` sees every event once and looks at young entries each second; ``survey`` learns
        from them where the table is.
        """
        self.lock = threading.RLock()
        self._capture = capture
        self._follow = follow
        self._sampler = sampler
        self._survey = survey
        self._hold: int = int(capture.hold * 1e9)
        self._taken = Taken()
        self._rows = 0
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._error: Optional[BaseException] = None
        self._mounts = Mounts()
        self._thread = threading.Thread(target=self._run, name="ctrace-poll", daemon=True)
        self._thread.start()

    def take(self) -> Taken:
        """What came since the last call, up to now or to :meth:`stop`; only the first part if it is
        a lot.

        Raises whatever stopped the polling.
        """
        with self.lock:
            if self._error is not None:
                raise self._error
            if not self.stopped and self._rows < AT_ONCE:
                self._step()
                self._capture.part()
            taken, self._taken = self._split()
            self._rows = sum(map(len, self._taken.parts))
            if self._rows < MANY and not self.stopped:
                self._wake.clear()
        return taken

    def catch_up(self) -> bool:
        """Bring the counters of a family that counts what it receives up to now; whether they are.
        What comes by it is for the next :meth:`take`."""
        with self.lock:
            if not self._capture.lags:
                return True
            if self._rows >= PENDING or self.stopped:
                return False
            self._step()
        return True

    def _split(self) -> tuple[Taken, Taken]:
        """The first records, as many as a reader gets at once, and the rest."""
        taken, room = self._taken, AT_ONCE
        for i, part in enumerate(taken.parts):
            if len(part) > room:
                rest = [part[room:], *taken.parts[i + 1 :]]
                first = [*taken.parts[:i], part[:room]]
                until = min(taken.until, int(rest[0]["ts"][0]))
                return Taken(first, taken.lost, until, True), Taken(rest, 0, taken.until)
            room -= len(part)
        return taken, Taken()

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` was called; the capture may be closed then."""
        return self._stop.is_set()

    def wait(self, seconds: float) -> bool:
        """Sleep; True as soon as polling is stopped."""
        return self._stop.wait(seconds)

    def wait_for_many(self, seconds: float) -> bool:
        """Sleep, but less once there are :data:`MANY` records or new namespaces.

        Returns whether polling was stopped.
        """
        self._wake.wait(max(seconds, 0.0))
        with self.lock:
            if self._rows < MANY and self._error is None and not self.stopped:
                self._wake.clear()
        return self.stopped

    def stop(self) -> None:
        """End the thread; safe to call twice."""
        self._stop.set()
        with self.lock:
            self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        looked = followed = time.monotonic()
        mounts, pending = self._mounts, False
        try:
            while not self._stop.wait(self._capture.interval):
                with self.lock:
                    if self._rows < PENDING:
                        self._step()
                    now = time.monotonic()
                    pending |= mounts.changed()
                    if now - looked >= LOOK or (pending and now - followed >= SOON):
                        pending, followed = False, now
                        if self._follow():
                            self._wake.set()
                    if now - looked >= LOOK:
                        looked = now
                        if self._sampler:
                            self._sampler.look(boot_ns())
        except BaseException as error:
            self._error = error
            self._wake.set()
        finally:
            mounts.close()

    def _step(self) -> None:
        self._taken.until = boot_ns() - self._hold
        events, lost = self._capture.poll()
        self._taken.lost += lost
        if self._sampler:
            events = self._sampler.take(events)
        if self._survey:
            self._survey.note(events)
        if len(events):
            self._taken.parts.append(events)
            self._rows += len(events)
            if self._rows >= MANY:
                self._wake.set()


def in_order(parts: Sequence[Events]) -> Events:
    """The parts as one array by time; existing entries first among equals."""
    whole = one_piece(parts)
    if whole is None:
        return by_time(join(parts))
    # each is in order; after one that held back for too long an earlier record may follow
    met = all(one["ts"][-1] <= other["ts"][0] for one, other in zip(parts, parts[1:]))
    return whole if met else by_time(whole)
