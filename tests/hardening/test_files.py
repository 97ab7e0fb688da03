"""Files of the user: written whole or not at all, never over others; anything else is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from kit import command, synthetic

import ctrace
from ctrace import files
from ctrace.cli import cli
from ctrace.errors import CtraceError
from ctrace.recording.recorder.run import make_way
from ctrace.recording.recorder.segments import FlightRecorder, Retention

pytestmark = pytest.mark.slow

Way = Callable[[Path, Path, bool], "list[str | Path]"]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "a.data"
    return synthetic.write(path, synthetic.batches(synthetic.traffic(3000)))


def run(*words: str | Path) -> tuple[int, str]:
    done = command.ctrace(*words)
    return done.returncode, done.stderr


def verbs(recording: Path, out: Path) -> list[list[str | Path]]:
    """Every way of writing a file that needs no kernel."""
    return [
        *(["export", recording, "--to", to, "-o", out]
          for to in ("csv", "jsonl", "openmetrics", "parquet")),
        ["report", recording, "--html", out],
        ["whatif", recording, "--notrack", "tcp/8063", "--html", out],
        ["merge", recording, "--redact", "-o", out],
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(7))
def test_every_verb_that_writes_a_file(recording: Path, tmp_path: Path, number: int) -> None:
    out, target = tmp_path / ("o" * 255), tmp_path / "another's"
    words = verbs(recording, out)[number]
    assert run(*words)[0] == 0
    assert out.stat().st_mode & 0o777 == 0o600
    made = out.read_bytes()
    status, said = run(*words)
    assert (status, said.count("\n")) == (1, 1)
    assert f"{out} exists" in said
    out.unlink()
    target.write_text("kept")
    out.symlink_to(target)
    for force in ([], ["--force"]):
        status, said = run(*words, *force)
        assert (status, said.count("\n")) == (1, 1), said
    assert target.read_text() == "kept"
    out.unlink()
    out.write_text("older")
    assert run(*words, "--force")[0] == 0
    assert len(out.read_bytes()) == pytest.approx(len(made), rel=0.05)
    assert set(os.listdir(tmp_path)) == {out.name, "another's"}


@pytest.mark.parametrize("number", range(7))
def test_a_disk_that_fills_leaves_no_half_file(
    recording: Path, tmp_path: Path, number: int
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root for a disk of its own")
    words = verbs(recording, tmp_path / "out")[number]
    line = " ".join(map(str, [sys.executable, "-m", "ctrace", *words]))
    script = f"mount -t tmpfs -o size=4k none {tmp_path}; {line}; echo $?; ls -A {tmp_path}"
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, check=False
    )
    if "openmetrics" not in words:  # whose few lines fit
        assert done.stdout == "1\n"
        told = f"ctrace: cannot write {tmp_path / 'out'}: No space left on device\n"
        assert done.stderr == told
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("named", [False, True], ids=["without a name", "with one"])
def test_what_fails_within_leaves_nothing(
    tmp_path: Path, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if named:  # a file system that has no files without names
        real = os.open
        monkeypatch.setattr("ctrace.files.os.open", lambda path, flags, *more, **kinds: (
            _refuse() if flags & os.O_TMPFILE == os.O_TMPFILE else real(path, flags, *more, **kinds)
        ))  # fmt: skip
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), files.new(str(out)) as file:
        file.write(b"half" * (1 // 0))
    assert list(tmp_path.iterdir()) == []
    for text in (b"first", b"second"):
        with files.new(str(out), force=True) as file:
            file.write(text)
    assert out.read_bytes() == b"second"
    with pytest.raises(CtraceError, match="exists"), files.new(str(tmp_path / "late")) as file:
        (tmp_path / "late").write_text("came meanwhile")
    assert (tmp_path / "late").read_text() == "came meanwhile"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "late"}


def _refuse() -> int:
    raise OSError(95, "Operation not supported")


def test_a_kill_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; from ctrace import files\n"
        "with files.new(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush(); print('written', flush=True); time.sleep(60)\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_no_recording(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(CtraceError, match="is a pipe, not a file"):
        ctrace.open(str(pipe))
    assert run("perf", "--against", pipe) == (1, f"ctrace: {pipe} is a pipe, not a file\n")


@pytest.mark.parametrize(
    "words",
    [
        ["record", "--duration", "1", "-o"], ["record", "--ring", "64M", "-o"],
        ["import", "RECORDING", "-o"], ["merge", "RECORDING", "--redact", "-o"],
        ["export", "RECORDING", "--format", "parquet", "-o"], ["perf", "--folded"],
        ["advise", "RECORDING", "--plan"],
    ],
)  # fmt: skip
def test_what_needs_a_file_makes_none_called_dash(
    words: list[str], recording: Path, tmp_path: Path
) -> None:
    argv = [str(recording) if one == "RECORDING" else one for one in words]
    done = command.ctrace(*argv, "-", cwd=tmp_path)
    assert (done.returncode in (1, 2), done.stderr.count("\n")) == (True, 1), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for the kernel's files")
@pytest.mark.parametrize("place", ["/proc/kmsg", "/sys/kernel/tracing/trace_pipe"])
def test_a_file_of_the_kernel_that_waits_is_read_as_far_as_it_goes(
    place: str, tmp_path: Path
) -> None:
    if not os.access(place, os.R_OK):
        pytest.skip("it is not there")
    for words in (
        ["report", place], ["diff", place, place], ["import", place, "-o", tmp_path / "out"],
        ["apply", "--dry-run", place], ["perf", "--duration", "1", "--against", place],
    ):  # fmt: skip
        status, said = run(*words)
        # kmsg may tell of a table that is full, on any host: that is a report
        assert status in (0, 1, 2), said
        assert said.count("\n") <= 1, said
        assert "defect" not in said


def test_what_is_in_the_way_of_a_recording(tmp_path: Path, recording: Path) -> None:
    place = tmp_path / "ctrace.data"
    kept = []
    for turn in range(4):
        place.write_bytes(recording.read_bytes() + bytes(turn))
        kept.append(place.read_bytes())
        assert make_way(str(place)) == f"{place}.{turn + 1}"
    assert [Path(f"{place}.{n}").read_bytes() for n in range(1, 5)] == kept
    os.mkfifo(place)
    with pytest.raises(CtraceError, match="is a pipe, not a file"):
        make_way(str(place))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as sudo gives it")
def test_a_ring_is_of_who_called_sudo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_UID", "4711")
    monkeypatch.setenv("SUDO_GID", "4711")
    FlightRecorder(str(tmp_path / "ring"), synthetic.header(), Retention(size=64 << 20)).close()
    found = [tmp_path / "ring", *(tmp_path / "ring").iterdir()]
    assert [path.stat().st_uid for path in found] == [4711, 4711]
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    FlightRecorder(str(theirs), synthetic.header(), Retention(size=64 << 20)).close()
    assert theirs.stat().st_uid == 0


RING = """
import random
import sys
from pathlib import Path
from kit import command, synthetic
from ctrace.recording.recorder.segments import FlightRecorder, Retention
where, count = sys.argv[1], int(sys.argv[2])
batches = synthetic.batches(synthetic.traffic(count, rate=count / 20))
ring = FlightRecorder(where + "/ring", synthetic.header(), Retention(size=64 << 20))
for number, batch in enumerate(batches):
    ring.write(batch)
    if number in (4, 8, 12):  # rules, some of which are larger than a small disk
        size = 10_000 * number * number
        ring.ruleset(number, random.randbytes(size // 2).hex())
ring.close("over")
print(ring.full)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a disk of its own")
@pytest.mark.parametrize(("disk", "count"), [("100k", 60_000), ("300k", 100_000), ("1m", 250_000)])
def test_a_ring_on_a_full_disk_goes_on(tmp_path: Path, disk: str, count: int) -> None:
    """Its newest time is there, and what it says of that time is what happened then."""
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    script = f"mount -t tmpfs -o size={disk} none {small}; {sys.executable} -c '{RING}' {small} "
    script += f"{count} && cp -r {small}/ring {kept}"
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
    batches = synthetic.batches(synthetic.traffic(count, rate=count / 20))
    truth = {batch.until: batch for batch in batches}
    with ctrace.open(str(kept)) as recording:
        assert recording.ended == "over"
        assert recording.until == batches[-1].until
        seen, before = 0, recording.header.base
        for batch in recording.batches():
            if batch.until <= recording.started:
                continue
            whole = truth[batch.until]
            assert len(batch.events) + batch.lost == len(whole.events)
            told = {k: (v + before[k]).tolist() for k, v in batch.counts.items()}
            assert told == {k: v.tolist() for k, v in whole.counts.items()}
            seen += len(batch.events)
    assert seen > 0


def test_an_import_that_fails_leaves_the_earlier_recording_where_it_was(
    recording: Path, tmp_path: Path
) -> None:
    out, text = tmp_path / "imported.data", tmp_path / "text"
    out.write_bytes(recording.read_bytes())
    text.write_text("nothing that tells of a table\n")
    for more in ([], ["--redact"]):
        assert run("import", text, "-o", out, *more)[0] == 1
        assert out.read_bytes() == recording.read_bytes()
        assert set(os.listdir(tmp_path)) == {"imported.data", "text"}


def test_an_archive_of_evidence_is_written_as_any_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, out, target = tmp_path / "collect.sh", tmp_path / "out", tmp_path / "another's"
    monkeypatch.setattr("ctrace.cli.recordings.collect.SCRIPT", script)

    def collect(*words: str) -> int:
        return CliRunner().invoke(cli, ["collect", "-o", str(out), *words]).exit_code

    script.write_text("echo half; exit 3")
    assert collect() == 1
    assert not out.exists()
    script.write_text("echo whole")
    target.write_text("kept")
    out.symlink_to(target)
    assert (collect(), collect("--force"), target.read_text()) == (1, 1, "kept")
    out.unlink()
    assert (collect(), collect(), collect("--force")) == (0, 1, 0)
    assert out.read_text() == "whole\n"
    assert out.stat().st_mode & 0o777 == 0o600
