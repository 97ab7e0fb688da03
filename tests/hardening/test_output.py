"""Output that can't be written: one line or none, and an exit status that says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from kit import synthetic
from kit.command import CLOSED, ctrace

from ctrace import cli
from ctrace.cli import VERBS
from ctrace.errors import for_later

CTRACE = [sys.executable, "-m", "ctrace"]
SHORT = [["applied"], ["doctor", "-o", "json"], ["man"]]
SAME = [["--help"], ["--version"], ["doctor"], ["completion", "bash"]]
LONGER = [
    ["advise", "--duration", "1", "--netns", "init"],
    ["top", "0.2", "1", "--plain", "--netns", "init"],
    ["top", "0.2", "1", "-o", "json", "--netns", "init"],
    ["trace", "--duration", "1"],
    ["perf", "--duration", "0.5"],
]
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def run(words: list[str], out: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit status and standard error of a run whose output goes where a shell says."""
    line = " ".join([*CTRACE, *words]) + f" {out}"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip
    return done.returncode, done.stderr


def remarks(said: str) -> list[str]:
    """Lines that are no remark on the work itself."""
    usual = ("observing", "measuring", "listening", "no better hooks", "not seen", " events, ")
    return [line for line in said.splitlines() if not any(word in line for word in usual)]


@pytest.mark.slow
@pytest.mark.parametrize("words", SHORT, ids=" ".join)
@pytest.mark.parametrize("out", ["> /dev/full", ">&-"])
def test_a_full_or_closed_output(words: list[str], out: str) -> None:
    status, said = run(words, out)
    assert status == 1
    lines = remarks(said)
    assert len(lines) == 1
    assert lines[0].startswith("ctrace: cannot write to standard output: ")


@pytest.mark.parametrize("words", [*SAME, *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_every_output(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        for out in (full.fileno(), CLOSED):
            done = ctrace(*words, out=out)
            assert done.returncode == 1
            (line,) = done.stderr.splitlines()
            assert line.startswith("ctrace: cannot write to standard output: ")


@root
@pytest.mark.slow
@pytest.mark.parametrize("words", LONGER, ids=" ".join)
def test_a_full_output_of_longer_work(words: list[str]) -> None:
    status, said = run(words, "> /dev/full")
    assert status == 1
    assert [line[:39] for line in remarks(said)] == ["ctrace: cannot write to standard output"]


@root
@pytest.mark.kernel
def test_a_change_is_made_whoever_reads_and_its_status_tells() -> None:
    """Where nothing is applied: what is said of it has no place all the same."""
    status, said = run(["undo", "--netns", "init"], "> /dev/full")
    assert status == 1
    assert said.startswith("ctrace: cannot write to standard output: ")
    assert said.endswith("; the work itself is done\n")
    assert run(["undo", "--netns", "init"], "> >(:)") == (0, "")


@pytest.mark.parametrize(
    "words",
    [["--help"], ["man"], pytest.param(["doctor", "-o", "json"], marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_a_reader_that_has_gone_is_no_news(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*CTRACE, *words], stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("err", ["2>/dev/full", pytest.param("2>&-", marks=pytest.mark.slow)])
def test_remarks_without_a_place_end_no_work(tmp_path: Path, err: str) -> None:
    status, _ = run(["report", str(tmp_path / "nothing")], f">/dev/null {err}")
    assert status == 1
    status, _ = run(["man"], f">/dev/null {err}")
    assert status == 0


@root
@pytest.mark.kernel
def test_letters_that_the_output_lacks_are_written_otherwise() -> None:
    """The frame's lines are no ASCII."""
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C.UTF-8"}
    status, said = run(["top", "0.2", "1", "--plain"], "| iconv -f ascii", ascii_only)
    assert (status, said) == (0, "")


def test_a_closed_output_is_not_taken_by_a_file(tmp_path: Path) -> None:
    """The first file that is opened would be descriptor 1, and be printed into."""
    page = tmp_path / "help"
    page.write_text(json.dumps({}))
    status, said = run(["report", str(page)], ">&-")
    assert status == 1
    assert "is not a ctrace recording" in said
    assert page.read_text() == "{}"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(28, "No space left on device", "/run/x\x1b"),
            "/run/x\\x1b: No space left on device",
        ),
        (OSError(24, "Too many open files"), "Too many open files"),
        (OSError("a library's own"), "a library's own"),
        (MemoryError(), "there is no memory left"),
        (
            ImportError("x.so: failed to map segment from shared object"),
            "there is no memory left: see ulimit -v",
        ),
    ],
)
def test_what_the_system_refuses_is_one_line(
    error: BaseException,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(_context: object) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["ctrace", "man"])
    monkeypatch.setattr(cli.cli, "invoke", refuse)
    assert cli._status() == 1
    assert capsys.readouterr().err == f"ctrace: {said}\n"


@pytest.mark.parametrize("size", ["99999999", "-5", "many"])
def test_a_size_that_no_screen_has_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    recording = synthetic.write(tmp_path / "a.data", synthetic.batches(synthetic.traffic(30)))
    shown = []
    for columns, lines in (("100", "40"), (size, size)):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setenv("LINES", lines)
        shown.append(ctrace("replay", "--once", recording))
    assert [one.returncode for one in shown] == [0, 0]
    assert len(shown[0].stdout) == len(shown[1].stdout)


def test_a_closed_input_is_an_empty_one() -> None:
    status, said = run(["apply", "-"], "<&-")
    assert status == 1
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "there is no memory left"),
        (ValueError("odd"), "ValueError in test_output.py line"),
    ],
)
def test_a_thread_that_fails_is_one_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(threading, "excepthook", cli._thread_ended)
    thread = threading.Thread(target=fail, name="ctrace-one")
    thread.start()
    thread.join()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ctrace: ctrace-one has ended, the rest goes on: {said}")


def test_what_can_wait_passes_over_what_the_host_refuses() -> None:
    def go(error: Exception) -> None:
        with for_later():
            raise error

    for refused in (OSError(12, "x"), MemoryError(), RuntimeError("can't start new thread")):
        go(refused)
    for defect in (RuntimeError("dictionary changed size"), ValueError()):
        with pytest.raises(type(defect)):
            go(defect)
