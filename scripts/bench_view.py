#!/usr/bin/env python3
"""What the screen costs: CPU at one frame a second with a thousand keys changing.

Two ways: composing a frame alone, and the whole application writing to a
pseudo-terminal as it does in use. Cores are CPU seconds over wall-clock seconds.
"""

from __future__ import annotations

import json
import os
import pty
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from kit.loads import snapshots  # noqa: E402

from ctrace.live.protocol import Phase  # noqa: E402
from ctrace.model.snapshot import Snapshot  # noqa: E402

KEYS = 1000
SIZE = (120, 40)
SECONDS = 12
LIMIT = 0.03
"""Cores that the screen may cost at one frame a second."""


class Churn:
    """A new snapshot every second, made before: only the screen is measured."""

    phase = Phase("live")

    def __init__(self, snapshots: list[Snapshot], interval: float = 1.0) -> None:
        self.snapshots = snapshots
        self.interval = interval
        self.started = time.monotonic()

    def latest(self) -> Optional[Snapshot]:
        """The snapshot of this second."""
        at = int((time.monotonic() - self.started) / self.interval)
        return self.snapshots[at % len(self.snapshots)]

    def set_view(self, group: str, sort: str, filter_text: str) -> None:
        """Nothing to do."""

    def set_rows(self, rows: int) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


def frames(snapshots: list[Snapshot], width: int, height: int) -> float:
    """Median CPU seconds to compose one frame."""
    from ctrace.view.palette import DARK
    from ctrace.view.screen.frame import compose
    from ctrace.view.screen.state import State

    times = []
    for snapshot in snapshots * 3:
        began = time.thread_time()
        compose(snapshot, width, height, DARK, State())
        times.append(time.thread_time() - began)
    return statistics.median(times)


def in_a_terminal(seconds: float, size: tuple[int, int]) -> tuple[float, float]:
    """Cores used by the application on a pseudo-terminal, and bytes a second written to it."""
    pid, master = pty.fork()
    if pid == 0:
        _child(seconds, size)
        os._exit(0)
    import fcntl
    import struct
    import termios

    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
    total = 0
    while True:
        try:
            data = os.read(master, 1 << 16)
        except OSError:
            break
        if not data:
            break
        total += len(data)
    os.waitpid(pid, 0)
    os.close(master)
    report = Path(_report(pid))
    cores = float(report.read_text())
    report.unlink()
    return cores, total / seconds


def _report(pid: int) -> str:
    return f"/dev/shm/ctrace-bench-view.{pid}"


def _child(seconds: float, size: tuple[int, int]) -> None:
    os.environ |= {"TERM": "xterm-256color", "COLORTERM": "truecolor", "LANG": "C.UTF-8",
                   "COLUMNS": str(size[0]), "LINES": str(size[1])}  # fmt: skip
    from ctrace.view.screen.app import TopApp

    feed = Churn([snapshots.churning(KEYS, tick) for tick in range(int(seconds) + 4)])
    app = TopApp(feed)

    def measure() -> None:
        time.sleep(2.0)  # start-up is measured elsewhere
        cpu, began = time.process_time(), time.monotonic()
        time.sleep(seconds)
        used = (time.process_time() - cpu) / (time.monotonic() - began)
        Path(_report(os.getpid())).write_text(str(used))
        app.call_from_thread(app.exit)

    threading.Thread(target=measure, daemon=True).start()
    app.run()


def run() -> list[dict[str, Any]]:
    """One row for each measurement, for scripts/bench."""
    turning = [snapshots.churning(KEYS, tick) for tick in range(10)]
    rows: list[dict[str, Any]] = []
    for width, height in ((80, 24), SIZE, (200, 60)):
        seconds = frames(turning, width, height)
        rows.append({
            "name": f"compose a frame, {width}x{height}, {KEYS} keys changing",
            "value": round(seconds * 1e3, 2), "unit": "ms CPU",
        })  # fmt: skip
    cores, rate = in_a_terminal(SECONDS, SIZE)
    rows.append({
        "name": f"the screen at 1 frame/s, {SIZE[0]}x{SIZE[1]}, {KEYS} keys changing",
        "value": round(cores * 100, 2), "unit": "% of a core", "limit": LIMIT * 100,
    })  # fmt: skip
    rows.append({
        "name": "written to the terminal", "value": round(rate / 1024, 1), "unit": "KiB/s",
    })  # fmt: skip
    return rows


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
