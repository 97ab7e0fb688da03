"""The packages, installed and removed where nothing is: scripts/package --test."""

from __future__ import annotations

import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEB = Path(os.environ.get("CTRACE_DEB", ""))
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "/root/.cache")) / "ctrace/roots"
RPM = tuple(DEB.parent.glob("ctrace-*.rpm")) if DEB.is_file() else ()
CHANGING = ("var/lib/dpkg/", "var/log/", "var/cache/debconf/")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DEB.is_file(), reason="scripts/package --test names one"),
]


def run(root: Path, *command: str) -> str:
    inside = 'mount --bind /proc "$1/proc"; exec chroot "$@"'
    path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
    return subprocess.run(
        ["unshare", "--mount", "env", "-i", path, "sh", "-c", inside, "sh", root, *command],
        check=True, capture_output=True, text=True, timeout=300,
    ).stdout  # fmt: skip


def files(root: Path) -> set[str]:
    found = (str(path.relative_to(root)) for path in root.rglob("*"))
    return {name for name in found if not name.startswith(CHANGING)}


@pytest.fixture(params=["bullseye", "bookworm", "trixie"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    subprocess.run(["tar", "-xf", CACHE / f"{request.param}.tar", "-C", tmp_path], check=True)
    (tmp_path / "root/ctrace.deb").write_bytes(DEB.read_bytes())
    return tmp_path


def test_it_comes_whole_and_goes_without_a_trace(root: Path) -> None:
    before = files(root)
    assert not [name for name in before if re.search(r"bin/python3", name)]
    run(root, "dpkg", "-i", "/root/ctrace.deb")
    assert run(root, "ctrace", "--version").startswith("ctrace, version ")
    assert run(root, "ctrace", "man").startswith(".TH CTRACE 1")
    came = {name.split("/")[-1] for name in files(root) - before}
    assert {"ctrace-metrics.service", "ctrace-recorder.service", "_ctrace", "ctrace.fish"} <= came
    listed = run(root, "dpkg", "-L", "ctrace").splitlines()
    assert "/usr/share/bash-completion/completions/ctrace" in listed
    assert not [line for line in listed if line.startswith(("/var", "/run", "/etc"))]
    run(root, "dpkg", "-r", "ctrace")
    assert files(root) == before


def rpm(*arguments: object) -> str:
    # Debian's rpm warns that its own packages are other ones
    command = ["rpm", "--force-debian", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


@pytest.mark.skipif(not RPM, reason="no rpmbuild here when the packages were made")
def test_the_rpm_comes_whole_and_goes_without_a_trace(tmp_path: Path) -> None:
    """Into an empty root with a database of its own: nothing of a distribution is needed."""
    place = ("--root", tmp_path, "--dbpath", "/database")
    (tmp_path / "proc").mkdir()
    rpm(*place, "-i", "--ignorearch", "--ignoreos", *RPM)
    python = "/usr/lib/ctrace/bin/python3.9"
    assert run(tmp_path, python, "-ISm", "ctrace", "--version").startswith("ctrace, version ")
    came = {path.name for path in tmp_path.rglob("*")}
    assert {"ctrace-metrics.service", "ctrace-recorder.service", "ctrace.1.gz", "ctrace"} <= came
    needs = rpm(*place, "-q", "--requires", "ctrace").splitlines()
    assert all(line.startswith("rpmlib(") for line in needs)
    assert rpm(*place, "-q", "--scripts", "ctrace") == ""
    rpm(*place, "-e", "ctrace")
    left = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if not path.is_dir()]
    assert {path.parts[0] for path in left} == {"database"}


def test_it_runs_nothing_when_installed() -> None:
    told = subprocess.run(["dpkg-deb", "-I", DEB], check=True, capture_output=True, text=True)
    assert not re.search(r"postinst|preinst|prerm|postrm|triggers", told.stdout)
    assert "Depends:" not in told.stdout


def test_nobody_but_root_may_change_it() -> None:
    told = subprocess.run(["dpkg-deb", "-c", DEB], check=True, capture_output=True, text=True)
    for line in told.stdout.splitlines():
        assert line[5] == line[8] == "-", line
        assert " root/root " in line


def test_the_wheel_holds_the_programs_and_what_is_shared() -> None:
    (wheel,) = DEB.parent.glob("ctrace-*-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in (("bpf/made", "ctrace/bpf/made"), ("ctrace/share", "ctrace/share")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file():
                assert f"{inside}/{path.relative_to(ROOT / folder)}" in names
