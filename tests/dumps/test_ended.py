"""Whoever is told to stop in the middle of reading leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctrace.recording.format.layout import SIGNATURE

LINE = "udp 17 25 src=192.0.2.10 dst=203.0.113.53 sport=1 dport=53 [UNREPLIED] src=203.0.113.53 "\
       "dst=192.0.2.10 sport=53 dport=1 use=2\n"  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "number"),
    [
        ("report", signal.SIGTERM),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (
                ("report", signal.SIGHUP),
                ("import", signal.SIGTERM),
                ("import --redact", signal.SIGTERM),
            )
        ),
    ],
)
def test_a_signal_leaves_nothing_behind(tmp_path: Path, verb: str, number: signal.Signals) -> None:
    places, out = tmp_path / "places", tmp_path / "old.data"
    places.mkdir()
    out.write_bytes(SIGNATURE)
    into = ["-o", str(out)] if verb != "report" else []
    with subprocess.Popen(
        [sys.executable, "-m", "ctrace", *verb.split(), "-", *into],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(places)},
    ) as reading:  # fmt: skip
        assert reading.stdin is not None
        until = time.monotonic() + 60
        while not begun(reading.pid, places) and time.monotonic() < until:
            reading.stdin.write(LINE.encode() * 1000)
            reading.stdin.flush()
            time.sleep(0.01)
        assert begun(reading.pid, places)
        reading.send_signal(number)
        assert reading.wait(60) == 128 + number
    assert not list(places.iterdir())
    assert [one.name for one in tmp_path.iterdir() if one != places] == ["old.data"]
    assert out.read_bytes() == SIGNATURE


def begun(pid: int, places: Path) -> bool:
    """Whether it has opened the file that holds entries while it reads."""
    try:
        return any(
            os.readlink(f"/proc/{pid}/fd/{one}").startswith(str(places))
            for one in os.listdir(f"/proc/{pid}/fd")
        )
    except OSError:
        return False
