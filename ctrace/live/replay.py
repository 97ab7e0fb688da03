"""A recording as a feed for the live screen: pause, speed, steps, jumps, drop bursts."""

from __future__ import annotations

import bisect
import copy
import threading
import time
from collections.abc import Iterator
from typing import Optional

from ctrace.batch import Batch
from ctrace.errors import CtraceError
from ctrace.live.filtering import View, check, view
from ctrace.live.protocol import MOST_ROWS, Phase, Position, Progress
from ctrace.model.model import Model
from ctrace.model.snapshot import Snapshot
from ctrace.record import REASONS_OF, Kind
from ctrace.recording.counters import Counted
from ctrace.recording.derived import Recorded
from ctrace.recording.modelled import model_of

CHECKPOINTS = 6
"""Copies of the model kept along the way, so that going back need not start from the beginning."""
BURST_NS = 5_000_000_000
STEP_NS = 1_000_000_000

_ROUNDING = 1000
"""UTC seconds as a float are good to a quarter of a microsecond."""

_DROPS = REASONS_OF[Kind.DROP]


class ReplayFeed(Progress):
    """A :class:`ctrace.live.protocol.Feed` that :class:`~ctrace.live.protocol.Travels`.

    One thread plays; the methods only leave requests for it. To go back, it starts from the last
    copy of the model before that moment and plays on at full speed.
    """

    def __init__(
        self,
        recording: Recorded,
        *,
        group: str = "pair",
        sort: str = "held",
        speed: float = 1.0,
        paused: bool = False,
        start: Optional[float] = None,
        memory: int = 32 << 20,
    ) -> None:
        """``start`` is the UTC second to begin at, otherwise the recording's beginning."""
        super().__init__(Phase("replay", "reading the recording"))
        self._of = recording
        self._memory = memory
        self._clock = recording.clock
        self._start = recording.started
        self._end = max(recording.until, self._start)
        self._view = View(group, sort)
        self._speed = speed
        self._paused = paused
        self._target: Optional[int] = None if start is None else self._boot(start)
        self._drops: Optional[tuple[int, ...]] = None
        """Beginnings of bursts; None while they are still being searched for."""
        self._burst = 0
        """Bursts to go forward or back, requested before they were known."""
        self._wanted = self._given = 0
        """Changes of view requested, and shown."""
        self._closing = False
        self._wake = threading.Condition()
        self._now = self._start
        self._model = model_of(self._of, self._memory)
        self._batches: Iterator[Batch] = iter(())
        self._next: Optional[Batch] = None
        self._saved: list[tuple[int, Model]] = []
        self._shown = 0.0
        self._worker = threading.Thread(target=self._work, name="ctrace-replay", daemon=True)
        self._worker.start()

    # -- Feed -------------------------------------------------------------------------

    def set_view(self, group: str, sort: str, filter_text: str) -> None:
        """Change grouping, sort and filter; a snapshot follows at once. Raises UsageError."""
        check(group, filter_text)
        with self._wake:
            self._view = View(group, sort, filter_text, self._view.limit)
            self._wanted += 1
            self._wake.notify_all()

    def set_rows(self, rows: int) -> None:
        """Rows that the screen can show; a snapshot follows at once when these are more."""
        with self._wake:
            before, limit = self._view.limit, min(rows, MOST_ROWS)
            self._view = self._view._replace(limit=limit)
            if limit > before:
                self._wanted += 1
                self._wake.notify_all()

    def at(self, group: str, limit: int) -> Snapshot:
        """This moment by another grouping, for advice."""
        with self._wake:
            return self._model.snapshot(group=group, sort="held", limit=limit)

    def close(self) -> None:
        """Stop the thread; safe to call twice. The recording stays open."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if threading.current_thread() is not self._worker:
            self._worker.join(5.0)

    # -- Travels ----------------------------------------------------------------------

    @property
    def position(self) -> Position:
        """The position of the replay; a jump shows its target at once."""
        target = self._target
        return Position(
            self._utc(self._now if target is None else target),
            self._utc(self._start),
            self._utc(self._end),
            self._speed,
            self._paused,
            tuple(self._utc(drop) for drop in self._drops or ()),
        )

    def pause(self, paused: bool) -> None:
        """Pause or resume."""
        with self._wake:
            self._paused = paused
            self._wake.notify_all()

    def step(self, intervals: int) -> None:
        """Go that many seconds of the recording forward or back, and stay there.

        Where batches are further apart than that (text dumps, long intervals), forward means to
        the next one.
        """
        with self._wake:
            self._paused = True
            base = self._now if self._target is None else self._target
            target = base + intervals * STEP_NS
            following = self._next
            if intervals > 0 and following is not None:
                target = max(target, following.until)
            self._go(target)

    def seek(self, utc: float) -> None:
        """Go to that time, clamped to the recording."""
        with self._wake:
            self._go(self._boot(utc))

    def set_speed(self, speed: float) -> None:
        """Play that many times as fast as it happened."""
        with self._wake:
            self._speed = speed
            self._wake.notify_all()

    def next_drop(self) -> bool:
        """Go to the next burst of drops."""
        return self._to_burst(1)

    def prev_drop(self) -> bool:
        """Go to the burst of drops before this moment."""
        return self._to_burst(-1)

    @property
    def following(self) -> Optional[float]:
        """UTC second at which the next batch ends; None at the recording's end."""
        following = self._next
        return None if following is None else self._utc(following.until)

    def settle(self, timeout: float = 60.0) -> bool:
        """Wait until a jump has arrived; False when time is up."""
        deadline = time.monotonic() + timeout
        while self._target is not None or self._burst or self._fresh or self._latest is None:
            if time.monotonic() > deadline or self._phase.name == "failed" or self._closing:
                return False
            time.sleep(0.01)
        return True

    # -- the thread -------------------------------------------------------------------

    def _go(self, boot: int) -> None:
        self._target = min(max(boot, self._start), self._end)
        self._wake.notify_all()

    def _to_burst(self, step: int) -> bool:
        """Go to the next burst (1) or the one before (-1); False when there is none."""
        with self._wake:
            if self._drops is None:
                self._burst = step
                return True
            here = self._now if self._target is None else self._target
            if step > 0:
                at = bisect.bisect_right(self._drops, here)
            else:
                at = bisect.bisect_left(self._drops, here) - 1
            if not 0 <= at < len(self._drops):
                return False
            self._go(self._drops[at])
            return True

    def _work(self) -> None:
        try:
            found = tuple(drop_bursts(self._of))
            self._rewind(None)
            with self._wake:
                self._drops, step, self._burst = found, self._burst, 0
                if step:
                    self._to_burst(step)
            self._play()
        except Exception as error:  # shown on the screen, reported after it
            self._fail(error)

    def _play(self) -> None:
        due = time.monotonic()
        while True:
            with self._wake:
                if self._closing:
                    return
                target, paused = self._target, self._paused
            if target is not None:
                self._travel(target)
                due = time.monotonic()
            elif self._fresh and self._latest is not None:
                self._show()
            elif paused or self._next is None:
                if self._next is None and not paused:
                    self._phase = Phase("ended", "the recording has ended")
                if self._latest is None:
                    self._show()
                with self._wake:
                    if not (self._target is not None or self._fresh or self._closing):
                        self._wake.wait(0.25)
                due = time.monotonic()
            else:
                due = self._advance(due)

    def _advance(self, due: float) -> float:
        """Play the next batch when its time has come; until then wait for a wish."""
        assert self._next is not None
        length = max(0, self._next.until - self._now) / 1e9 / self._speed
        left = due + length - time.monotonic()
        if left > 0:
            with self._wake:
                self._wake.wait(min(left, 0.25))
            if left > 0.25 or self._target is not None or self._fresh or self._paused:
                return due
            left = due + length - time.monotonic()
            if left > 0:
                return due
        self._phase = Phase("replay", "")
        self._take()
        due += length
        if time.monotonic() - due < 0.2 or self._latest is None or self._next is None:
            self._show()
        elif time.monotonic() - self._shown > 0.25:
            # Faster than can be computed: show what there is a few times a second.
            self._show()
            due = time.monotonic()
        return due

    def _travel(self, target: int) -> None:
        if target + _ROUNDING < self._now:
            self._rewind(target)
        while self._next is not None and self._next.until <= target + _ROUNDING:
            self._take()
            if self._closing or (self._target is not None and self._target < self._now):
                return
        self._show()
        with self._wake:
            if self._target == target:
                self._target = None
        if self._next is not None:
            self._phase = Phase("replay", "")

    def _take(self) -> None:
        batch = self._next
        assert batch is not None
        with self._wake:
            self._model.update(batch)
        self._now = batch.until
        self._next = next(self._batches, None)
        self._save()

    def _save(self) -> None:
        spacing = max(STEP_NS, (self._end - self._start) // CHECKPOINTS)
        last = self._saved[-1][0] if self._saved else self._start
        if self._now - last >= spacing:
            self._saved.append((self._now, copy.deepcopy(self._model)))

    def _rewind(self, target: Optional[int]) -> None:
        """Back to the last copy of the model before ``target``, or to the beginning."""
        saved = [one for one in self._saved if target is not None and one[0] <= target]
        if saved:
            self._now, model = saved[-1]
            self._model = copy.deepcopy(model)
            self._of.seek(self._clock.utc(self._now + 1))
        else:
            self._now, self._model = self._start, model_of(self._of, self._memory)
            self._of.seek(self._clock.utc(0))
        self._batches = self._of.batches()
        self._next = next(self._batches, None)

    @property
    def _fresh(self) -> bool:
        """Whether a changed view has not been shown yet."""
        return self._wanted != self._given

    def _show(self) -> None:
        try:
            with self._wake:
                asked, wanted = self._wanted, self._view
                header = self._of.header
                snapshot = view(self._model, wanted, header.flow_filter, header.filter)
        except CtraceError:
            self._given = asked
            return  # a filter that cannot be understood leaves the screen as it is
        self._latest = snapshot
        self._given = asked
        self._shown = time.monotonic()

    def _utc(self, boot: int) -> float:
        return self._clock.utc(boot) / 1e9

    def _boot(self, utc: float) -> int:
        boot = round(utc * 1e9) - self._clock.offset
        return min(max(boot, self._start), max(self._end, self._start))


def drop_bursts(recording: Recorded) -> list[int]:
    """Boot clock, ns, of the end of the batch in which each burst of drops began.

    Only the counters are read, but for a recording of some flows of a namespace.
    """
    told = recording.counts()
    if recording.header.flow_filter:
        counted = Counted(recording.header)
        told = ((batch.until, dict(counted.after(batch))) for batch in recording.batches())
    bursts: list[int] = []
    before: Optional[int] = None
    last = -BURST_NS
    for until, counts in told:
        now = sum(int(values[reason]) for values in counts.values() for reason in _DROPS)
        if now > (before or 0):
            if until - last > BURST_NS:
                bursts.append(until)
            last = until
        before = max(before or 0, now)
    return bursts
