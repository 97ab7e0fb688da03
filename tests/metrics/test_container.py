"""The container image file: its steps are carried out, and what comes out of them runs.

Where there is no container engine the steps run in a plain root directory that
mmdebstrap makes of the same Debian release. What that leaves untested is said in
``UNTESTED``.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "ctrace" / "share" / "container" / "Containerfile"
UNIT = ROOT / "ctrace" / "share" / "systemd" / "ctrace-recorder.service"
UNTESTED = "the engine's own reading of the file, its layers, and its seccomp profile"

# How this host reaches its package registries; a build has these from its engine.
SETTINGS = ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest of its logical line), comments left out."""
    lines = [line for line in FILE.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in
            (line.partition(" ") for line in text.splitlines() if line.strip())]  # fmt: skip


def test_the_file_uses_what_is_there() -> None:
    found = instructions()
    assert found[0] == ("FROM", "debian:bookworm-slim")
    assert {word for word, _ in found} <= {
        "FROM", "RUN", "COPY", "ENV", "WORKDIR", "ENTRYPOINT", "CMD",
    }  # fmt: skip
    for word, rest in found:
        if word == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1])
        if word in ("ENTRYPOINT", "CMD"):
            assert all(isinstance(part, str) for part in json.loads(rest))


def test_it_asks_for_the_capabilities_that_the_unit_has() -> None:
    asked = re.findall(r"--cap-add (\w+)", FILE.read_text())
    unit = re.search(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.M)
    assert unit
    assert {f"CAP_{name}" for name in asked} == set(unit[1].split())


class Image:
    """A root directory with the file's steps done."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.folder = "/"

    def build(self) -> None:
        for word, rest in instructions():
            getattr(self, f"_{word.lower()}")(rest)

    def run(
        self, *argv: str, capabilities: str = "", check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """A command in it, in a mount namespace of its own with /proc, /sys and /dev."""
        given = [f"{name}={value}" for name, value in self.environment.items()]
        limit = ["setpriv", "--bounding-set", f"-all,{capabilities}", "--no-new-privs"]
        inside = ["chroot", self.root, "/usr/bin/env", "-i", *given,
                  *(limit if capabilities else ()), *argv]  # fmt: skip
        mounts = "".join(
            f"mount --rbind /{name} {shlex.quote(str(self.root / name))}; "
            for name in ("proc", "sys", "dev")
        )
        command = f"{mounts} exec {shlex.join(map(str, inside))}"
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-ec", command],
            check=check, capture_output=True, text=True, errors="replace", timeout=800,
        )  # fmt: skip

    def _from(self, rest: str) -> None:
        suite = rest.removeprefix("debian:").removesuffix("-slim")
        options = [f"--aptopt={path}" for path in Path("/etc/apt/apt.conf.d").glob("99*")]
        subprocess.run(
            ["mmdebstrap", "--quiet", "--variant=minbase", *options, suite, self.root],
            check=True, capture_output=True, timeout=800,
        )  # fmt: skip
        names = [name for name in os.environ if name.startswith("PIP_")]
        self.environment |= {name: os.environ[name] for name in names}

    def _run(self, rest: str) -> None:
        for path in SETTINGS:  # a package may have brought its own
            if os.path.exists(path):
                target = self.root / path[1:]
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        done = self.run("/bin/sh", "-ec", rest, check=False)
        assert done.returncode == 0, f"RUN {rest}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"

    def _copy(self, rest: str) -> None:
        *sources, target = rest.split()
        to = self.root / target.strip("/")
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, to, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                to.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, to)

    def _env(self, rest: str) -> None:
        name, _, value = rest.partition("=")
        self.environment[name] = value

    def _workdir(self, rest: str) -> None:
        (self.root / rest.strip("/")).mkdir(parents=True, exist_ok=True)
        self.folder = rest

    def _entrypoint(self, rest: str) -> None:
        self.entrypoint: list[str] = json.loads(rest)

    def _cmd(self, rest: str) -> None:
        self.command: list[str] = json.loads(rest)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    if "CTRACE_IMAGE" not in os.environ:
        pytest.skip("fetches a system and Python packages: scripts/image --test")
    if os.geteuid() != 0 or not shutil.which("mmdebstrap"):
        pytest.skip("needs root and Debian's mmdebstrap to carry the image's steps out")
    root = tmp_path_factory.mktemp("image")
    made = Image(root)
    try:
        made.build()
        yield made
    finally:
        shutil.rmtree(root)


@pytest.mark.kernel
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_its_steps_make_a_ctrace_that_runs(image: Image) -> None:
    start = [*image.entrypoint, *image.command]
    assert "Usage: ctrace" in image.run(*start).stdout
    assert not (image.root / "src").exists()
    words = FILE.read_text()
    names = ",".join("+" + name.lower() for name in re.findall(r"--cap-add (\w+)", words))
    # the compiler, the programs, every hook that this kernel allows, the optional packages
    told = image.run("ctrace", "metrics", "--once", capabilities=names).stdout
    assert 'ctrace_table_entries{netns="init"}' in told
    assert 'ctrace_hooks_info{family="netlink"}' not in told
    path = f"{image.folder}/x"
    image.run("ctrace", "record", "-q", "--duration", "1", "-o", path, capabilities=names)
    image.run("ctrace", "report", path, "--html", f"{path}.html")
    image.run("ctrace", "export", path, "-o", f"{path}.parquet")
    assert (image.root / f"{path}.parquet".strip("/")).stat().st_size > 100
