"""Feeds without a source, for driving the screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from ctrace.live.protocol import Phase, Position
from ctrace.model.snapshot import Snapshot


class FixedFeed:
    """Gives the snapshots it was made with, one after the other when told to."""

    def __init__(self, snapshots: Sequence[Snapshot], phase: str = "live") -> None:
        self.snapshots = list(snapshots)
        self.at = 0
        self.phase = Phase(phase, "attaching to the kernel: netfilter hooks")
        self.views: list[tuple[str, str, str]] = []
        self.rows = 0
        self.closed = False

    def latest(self) -> Optional[Snapshot]:
        return self.snapshots[self.at] if self.snapshots else None

    def set_view(self, group: str, sort: str, filter_text: str) -> None:
        self.views.append((group, sort, filter_text))

    def set_rows(self, rows: int) -> None:
        self.rows = rows

    def close(self) -> None:
        self.closed = True


class RecordingFeed(FixedFeed):
    """A live feed that can record."""

    recording = ""

    def record(self, path: str) -> None:
        self.recording = path

    def stop_recording(self) -> str:
        path, self.recording = self.recording, ""
        return path


class TravelFeed(FixedFeed):
    """A replay over a list of snapshots, a second apart."""

    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        super().__init__(snapshots, "replay")
        self.start = snapshots[0].ts / 1e9
        self.speed = 1.0
        self.paused = False
        self.calls: list[str] = []

    @property
    def position(self) -> Position:
        return Position(
            self.start + self.at, self.start, self.start + len(self.snapshots) - 1,
            self.speed, self.paused, drops=(self.start + 2,),
        )  # fmt: skip

    def pause(self, paused: bool) -> None:
        self.paused = paused

    def step(self, intervals: int) -> None:
        self.paused = True
        self.at = max(0, min(len(self.snapshots) - 1, self.at + intervals))

    def seek(self, utc: float) -> None:
        self.at = max(0, min(len(self.snapshots) - 1, round(utc - self.start)))

    def set_speed(self, speed: float) -> None:
        self.speed = speed

    def next_drop(self) -> bool:
        found = self.at < 2
        self.at = 2 if found else self.at
        return found

    def prev_drop(self) -> bool:
        found = self.at > 2
        self.at = 2 if found else self.at
        return found
