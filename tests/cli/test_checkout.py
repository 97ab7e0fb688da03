"""scripts/ctrace: what it installs, where, and when it leaves that alone."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ctrace import interpreter

ROOT = Path(__file__).parents[2]
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a mount of its own")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts with an environment that is up to date; its pip only says that it was run.

    Its Python is ours, but for not finding the optional packages.
    """
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts", copy / "scripts")
    shutil.copy(ROOT / "pyproject.toml", copy)
    tools = copy / ".venv" / "bin"
    tools.mkdir(parents=True)
    (tools / "pip").write_text(f"#!/bin/sh\ntouch {copy}/installed\n")
    (tools / "python").write_text(
        f'#!/bin/sh\ncase "$*" in *find_spec*) exit 1;; esac\nexec {sys.executable} "$@"\n'
    )
    for tool in ("pip", "python"):
        (tools / tool).chmod(0o755)
    digest = hashlib.sha256((copy / "pyproject.toml").read_bytes()).hexdigest()[:16]
    (copy / ".venv" / ".ctrace-stamp").write_text(f"{digest} {copy} \n")
    return copy


def run(checkout: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [checkout / "scripts" / "ctrace", *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": path or os.environ["PATH"]}, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["metrics", "--once", "--listen"], 2),
        (["report", "a.data", "--html", "a.html", "-h"], 0),
        *(
            pytest.param(words, status, marks=pytest.mark.slow)
            for words, status in (
                (["metrics", "--help"], 0),
                (["metrics", "--no-such-option"], 2),
                (["report", "a.data", "--html"], 2),
                (["export", "a.data", "-o", "a.parquet", "--help"], 0),
                (["export", "a.data", "-o", "a.parquet", "--nonsense"], 2),
            )
        ),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else None,
)
def test_help_and_wrong_arguments_install_nothing(
    checkout: Path, arguments: list[str], status: int
) -> None:
    done = run(checkout, *arguments)
    assert (done.returncode != 0) == (status != 0), done.stderr
    assert ("Usage" in done.stdout) == (status == 0)
    assert not (checkout / "installed").exists(), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    ["bench", "bundle", "image", "lock", "package", "programs", "soak", "test", "test-floor"],
)
def test_help_of_a_script_is_its_first_lines(checkout: Path, script: str) -> None:
    for tool in ("apt-get", "dnf", "dpkg-query", "python3", "uv"):
        (checkout / tool).write_text(f"#!/bin/sh\ntouch {checkout}/installed\n")
        (checkout / tool).chmod(0o755)
    path = f"{checkout}:{os.environ['PATH']}"
    done = subprocess.run(
        [checkout / "scripts" / script, "--help"], capture_output=True, text=True, check=True,
        env={**os.environ, "PATH": path}, timeout=60,
    )  # fmt: skip
    first = (ROOT / "scripts" / script).read_text().splitlines()[1]
    assert first == f"# {done.stdout.splitlines()[0]}"
    assert f"scripts/{script}" in done.stdout or script == "programs"
    assert not (checkout / "installed").exists()


def test_work_installs_what_only_it_needs(checkout: Path) -> None:
    recording = checkout / "a.data"
    recording.write_bytes(b"not one")
    done = run(checkout, "export", str(recording), "-o", "a.parquet")
    assert (checkout / "installed").exists(), done.stderr


def test_no_package_manager_is_missed_where_nothing_is(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "sh", "id", "cut", "cat", "sha256sum", "dirname", "readlink", "env"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    done = run(checkout, "--version", path=str(tools))
    assert done.returncode == 0, done.stderr
    assert "version" in done.stdout


@root
def test_a_checkout_that_cannot_be_written_is_served_from_elsewhere(checkout: Path) -> None:
    (checkout / ".venv" / ".ctrace-stamp").write_text("of long ago")
    ask = f". {checkout}/scripts/setup.sh; echo $VENV"
    mount = f"mount --bind {checkout} {checkout} && mount -o remount,ro,bind {checkout}"

    def venv(before: str, **more: str) -> str:
        return subprocess.run(
            ["unshare", "-m", "--propagation", "private", "bash", "-c", f"{before}; {ask}"],
            capture_output=True, text=True, check=True, env={**os.environ, **more},
        ).stdout.strip()  # fmt: skip

    assert venv(":") == f"{checkout}/.venv"
    elsewhere = venv(mount)
    assert elsewhere.startswith("/var/cache/ctrace/venv-")
    assert venv(mount) == elsewhere
    assert venv(mount, CTRACE_VENV="/some/where") == elsewhere, "root heeds no variable"


@pytest.mark.slow
def test_a_failed_download_is_one_line(checkout: Path) -> None:
    (checkout / ".venv" / ".ctrace-stamp").unlink()
    shutil.rmtree(checkout / ".venv")
    (checkout / "ctrace").mkdir()
    done = subprocess.run(
        [checkout / "scripts" / "ctrace", "--version"], capture_output=True, text=True,
        check=False, timeout=120, env={**os.environ, "PIP_NO_INDEX": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()
    assert len(said) == 2, said  # what it does, and that it could not
    assert "is there a network?" in said[1]


def test_commands_to_type_are_those_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(ROOT)
    assert interpreter.called() == "sudo scripts/ctrace"
    monkeypatch.chdir(tmp_path)
    assert interpreter.called() == f"sudo {shlex.quote(str(ROOT / 'scripts' / 'ctrace'))}"
    (tmp_path / "ctrace").write_text("#!/bin/sh\n")
    (tmp_path / "ctrace").chmod(0o755)
    assert interpreter.called() == "sudo ctrace"
    monkeypatch.setattr(interpreter, "__file__", str(tmp_path / "x" / "interpreter.py"))
    (tmp_path / "ctrace").unlink()
    (tmp_path / "ctrace.pyz").touch()
    monkeypatch.setattr(sys, "argv", ["ctrace.pyz"])
    assert interpreter.called() == f"sudo {shlex.quote(str(tmp_path / 'ctrace.pyz'))}"
