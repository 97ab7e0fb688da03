"""``ctrace whatif`` over a flight recorder's directory, and its answer in the report's page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from kit import synthetic
from kit.command import ctrace
from kit.whatifs import SECOND, Kernel

from ctrace.recording.recorder.segments import FlightRecorder, Retention


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a flight recorder leaves of a minute of connections: several files."""
    where = tmp_path_factory.mktemp("whatif") / "ring"
    recorder = FlightRecorder(str(where), synthetic.header(SECOND), Retention(seconds=60.0))
    for batch in Kernel(rate=50, time_wait=3, seconds=60).run():
        recorder.write(batch)
    recorder.close()
    return where


@pytest.mark.slow
def test_a_flight_recorders_directory_is_read(ring: Path) -> None:
    assert len(list(ring.iterdir())) > 1
    done = ctrace("whatif", ring, "--notrack", "tcp/8063", "-o", "json")
    assert done.returncode == 0, done.stderr
    (place,) = json.loads(done.stdout)["namespaces"]
    assert place["recorded"]["peak"] > 50
    assert place["changed"]["peak"] == 0
    assert place["replay_error"] < 0.05
    assert 0 <= place["error"] < 1


@pytest.mark.slow
def test_the_answer_is_in_the_reports_page(ring: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    done = ctrace("whatif", ring, "--notrack", "tcp/8063", "--html", out)
    assert done.returncode == 0, done.stderr
    page = out.read_text()
    start = page.index("What if: --notrack tcp/8063")
    section = page[start : page.index("</section>", start)]
    lines = re.findall(r'<polyline [^>]*points="([^"]+)"', section)
    assert len(lines) == 3
    counted, _, changed = ([float(p.split(",")[1]) for p in line.split()] for line in lines)
    assert min(changed) > min(counted), "the lower line is drawn further down"
    assert "the second half of the recording from the first was off by" in section
    assert "the peak between" in section
    assert "Who held the table" in page


def test_a_timeout_that_nothing_reached_is_told(ring: Path) -> None:
    """There was no ICMP: that the answer is the same as before proves nothing."""
    done = ctrace("whatif", ring, "--timeout", "icmp=5")
    assert done.returncode == 0
    assert "icmp=5: no entry was seen to end in that state" in done.stdout
    assert "Warning" not in done.stderr


def test_a_directory_without_recordings_is_one_line(tmp_path: Path) -> None:
    done = ctrace("whatif", tmp_path, "--max", "1000")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("lever", [["--notrack", "udp/9"], ["--timeout", "tcp/9:time_wait=5s"]])
def test_a_service_that_is_not_there_is_told(ring: Path, lever: list[str]) -> None:
    done = ctrace("whatif", ring, *lever)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not in the recording; most flows go to tcp/8063" in done.stderr
