"""Where a screen gets its snapshots: the same protocol for live capture and replay.

A feed works in its own thread. The screen asks for the newest snapshot when it is
about to paint, so a slow terminal costs frames and never events.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Optional, Protocol, runtime_checkable

from ctrace.errors import CtraceError
from ctrace.model.snapshot import Snapshot

SLOWEST: Final = 1 / 64
FASTEST: Final = 1024.0
"""How many times as fast as it happened a replay can be."""

MOST_ROWS: Final = 200
"""Rows of a snapshot unless others are asked for. Each takes a millisecond of every
interval."""


@dataclass(frozen=True)
class Phase:
    """The activity of a feed, for the header and for the screen before the first snapshot."""

    name: str = "attaching"
    """``attaching``, ``reading``, ``live``, ``replay``, ``ended`` or ``failed``."""
    text: str = ""
    """One line for a person: what is going on, what is missing, why it failed."""


@dataclass(frozen=True)
class Position:
    """The position of a replay. Times are UTC seconds."""

    now: float
    start: float
    end: float
    speed: float = 1.0
    paused: bool = False
    drops: tuple[float, ...] = ()
    """Times of the first drop of each burst, to jump to and to mark on the time line."""

    @property
    def share(self) -> float:
        """How far through the recording, 0..1."""
        length = self.end - self.start
        return min(1.0, max(0.0, (self.now - self.start) / length)) if length > 0 else 1.0


class Progress:
    """What a feed's thread leaves for the screen to look at."""

    def __init__(self, phase: Phase) -> None:
        self._phase = phase
        self._latest: Optional[Snapshot] = None
        self._error: Optional[BaseException] = None

    @property
    def phase(self) -> Phase:
        """The feed's activity."""
        return self._phase

    @property
    def error(self) -> Optional[BaseException]:
        """Why it failed, for the command line to report after the screen has closed."""
        return self._error

    def latest(self) -> Optional[Snapshot]:
        """The newest snapshot, without waiting."""
        return self._latest

    def _fail(self, error: BaseException) -> None:
        self._error = error
        kind = "" if isinstance(error, CtraceError) else f"{type(error).__name__}: "
        self._phase = Phase("failed", f"{kind}{error}")


class Feed(Protocol):
    """Snapshots for a screen. No method blocks, except ``close`` for a moment."""

    @property
    def phase(self) -> Phase:
        """The feed's activity."""

    def latest(self) -> Optional[Snapshot]:
        """The newest snapshot; None before the first one. The same object until a newer one."""

    def set_view(self, group: str, sort: str, filter_text: str) -> None:
        """Set how the next snapshots are grouped, sorted and filtered.

        ``group`` is one of ``snapshot.GROUPS``, ``sort`` of ``snapshot.SORTS``, with a
        leading ``-`` for the other end first; the filter is the text that was typed. A
        new snapshot with the new view should follow at once, not after the interval.
        """

    def set_rows(self, rows: int) -> None:
        """Set how many rows the next snapshots need; when these are more than before, one follows
        at once."""

    def close(self) -> None:
        """Stop the thread and close everything; safe to call twice."""


@runtime_checkable
class Travels(Protocol):
    """A feed over a recording: the screen shows the time line and the keys of travel."""

    @property
    def position(self) -> Position:
        """The position of the replay."""

    def pause(self, paused: bool) -> None:
        """Pause or resume."""

    def step(self, intervals: int) -> None:
        """Go that many seconds forward, or back when negative, but at least a batch; pauses."""

    def seek(self, utc: float) -> None:
        """Go to that time (UTC seconds), clamped to the recording."""

    def set_speed(self, speed: float) -> None:
        """Play that many times as fast as it happened."""

    def next_drop(self) -> bool:
        """Go to the next burst of drops; False when there is none."""

    def prev_drop(self) -> bool:
        """Go to the burst of drops before this moment; False when there is none."""


@runtime_checkable
class Records(Protocol):
    """A feed whose events can be written to a file from now on."""

    @property
    def recording(self) -> str:
        """The file being written; empty when there is none."""

    def record(self, path: str) -> None:
        """Start writing to ``path``. Raises CtraceError when that is impossible."""

    def stop_recording(self) -> str:
        """Finish the file and return its path; empty when none was being written."""
