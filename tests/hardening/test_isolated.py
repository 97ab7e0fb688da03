"""Root may start ctrace anywhere: nothing of a stranger's folder or variable runs as root."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ctrace import interpreter
from ctrace.cli import VERBS

ROOT = Path(__file__).parents[2]
TRAPPED = (
    "bcc", "click", "ctrace", "importlib.util", "json", "numpy", "pip", "re", "rich", "runpy",
    "sitecustomize", "socket", "subprocess", "textual", "typing", "usercustomize", "venv", "zlib",
)  # fmt: skip
"""Modules that ctrace, its scripts or its interpreter import."""
TOOLS = (
    "nft", "conntrack", "iptables-save", "ip", "dirname", "readlink", "find", "stat", "id",
    "cat", "sha256sum", "cut", "grep", "sed", "apt-get", "dpkg-query", "uname",
)  # fmt: skip
"""Commands that these run."""


@pytest.fixture
def traps(tmp_path: Path) -> Path:
    """A folder in which each import leaves a mark."""
    folder = tmp_path / "stranger"
    code = f"open({str(tmp_path / 'ran')!r}, 'a').write(__file__ + '\\n')\nraise SystemExit(42)\n"
    for name in TRAPPED:
        place = folder / name.replace(".", "/")
        place.mkdir(parents=True)
        for file in {place, *(p for p in place.parents if folder in p.parents)}:
            (file / "__init__.py").write_text(code)
            (file / "__main__.py").write_text(code)
    for tool in TOOLS:
        (folder / tool).write_text(f"#!/bin/sh\necho {tool} >>{tmp_path / 'ran'}\n")
        (folder / tool).chmod(0o755)
    return folder


def ran(traps: Path) -> str:
    mark = traps.parent / "ran"
    return mark.read_text() if mark.exists() else ""


def start(traps: Path, *argv: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """In the folder of traps, with every variable that points Python or a shell there."""
    hostile = {
        "PYTHONPATH": str(traps),
        "PYTHONSTARTUP": str(traps / "click/__init__.py"),
        "PYTHONUSERBASE": str(traps),
        "CTRACE_VENV": str(traps),
        "PATH": f":.:{os.environ['PATH']}",
        **variables,
    }
    return subprocess.run(
        list(map(str, argv)), cwd=traps, env={**os.environ, **hostile}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip


def test_the_traps_are_real(traps: Path) -> None:
    start(traps, sys.executable, "-c", "import rich")
    assert "stranger" in ran(traps)


@pytest.mark.parametrize("verb", ["top", pytest.param("import", marks=pytest.mark.slow)])
def test_help_of_a_verb(traps: Path, verb: str) -> None:
    done = start(traps, ROOT / "scripts/ctrace", verb, "--help")
    assert (done.returncode, ran(traps)) == (0, ""), done.stderr
    assert "Usage: " in done.stdout


@pytest.mark.slow
def test_every_verb(traps: Path) -> None:
    """The manual page is made of what each says of itself: all that a verb imports is loaded."""
    done = start(traps, ROOT / "scripts/ctrace", "man")
    assert (done.returncode, ran(traps)) == (0, ""), done.stderr
    assert all(f".SS {verb} " in done.stdout for verb in VERBS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv", [["doctor", "--why"], ["applied"], ["advise", "--duration", "1", "--netns", "init"]]
)
def test_verbs_that_run_tools(traps: Path, argv: list[str]) -> None:
    done = start(traps, ROOT / "scripts/ctrace", *argv)
    assert (done.returncode, ran(traps)) == (0, ""), done.stderr


@pytest.mark.slow
def test_the_module_asked_for_by_name(traps: Path) -> None:
    """``python -m ctrace`` puts the current folder first; the package itself is the user's word."""
    shutil.rmtree(traps / "ctrace")
    for name in ("importlib", "typing", "re", "json", "runpy", "zlib"):
        shutil.rmtree(traps / name)  # before any of our code, the interpreter's own
    argv = [sys.executable, "-m", "ctrace", "doctor"]
    done = subprocess.run(argv, cwd=traps, capture_output=True, text=True, check=False)
    assert (done.returncode, ran(traps)) == (0, ""), done.stderr


def test_what_pip_installs_as_a_command(traps: Path, tmp_path: Path) -> None:
    place = tmp_path / "env" / "bin"
    subprocess.run([sys.executable, "-I", "-m", "venv", "--without-pip", place.parent], check=True)
    (packages,) = place.parent.glob("lib/python3*/site-packages")
    found = [str(ROOT), *(one for one in sys.path if one.endswith("-packages"))]
    (packages / "ours.pth").write_text("\n".join(found))
    shutil.copy(ROOT / "packaging/start", place / "ctrace")
    link = tmp_path / "link"
    link.symlink_to(place / "ctrace")
    for argv in ([place / "ctrace", "doctor", "--why"], [link, "--version"]):
        done = start(traps, *argv)
        assert (done.returncode, ran(traps)) == (0, ""), done.stderr
    # for one user or by a prefix: no interpreter beside it, the distribution's finds the packages
    for python in place.glob("python*"):
        python.unlink()
    asked = "import sys; print('python%d.%d' % sys.version_info[:2])"
    version = subprocess.check_output(["/usr/bin/python3", "-Ic", asked], text=True).strip()
    other = place.parent / "lib" / version / "site-packages"
    other.mkdir(parents=True, exist_ok=True)
    (other / "ours.pth").write_text("\n".join(found))
    done = start(traps, link, "--version", HOME=str(traps))
    assert (done.returncode, ran(traps)) == (0, ""), done.stderr


def test_a_child_finds_what_pip_put_beside_ctrace(tmp_path: Path) -> None:
    """And nothing there replaces a part of the standard library."""
    place = tmp_path / "lib" / "site-packages"
    (place / "ctrace").mkdir(parents=True)
    (place / "ctrace/__init__.py").write_text("")
    (place / "click.py").write_text("mine = True")
    (place / "json.py").write_text("raise SystemExit(42)")
    (place / "probe.py").write_text("import json, click; print(click.mine)")
    argv = interpreter.module("probe")
    argv[-2] = str(place)
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@pytest.mark.parametrize(
    "script",
    [
        *("bench", "test", "kernels", "vm"),
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in ("predictions", "pictures", "figures", "soak", "bundle")
        ),
    ],
)
def test_every_script(traps: Path, script: str) -> None:
    start(traps, ROOT / "scripts" / script, "--help")
    assert ran(traps) == ""


def test_what_a_shell_would_run_first(traps: Path) -> None:
    scripts = [one for one in (ROOT / "scripts").iterdir() if one.is_file()]
    shells = [one for one in scripts if one.read_bytes().startswith(b"#!/bin/bash")]
    assert len(shells) > 8
    assert {one.read_text().partition("\n")[0] for one in shells} == {"#!/bin/bash -p"}
    hostile = {
        "BASH_ENV": str(traps / "nft"),
        "BASH_FUNC_readlink%%": f"() {{ echo readlink >>{traps.parent / 'ran'}; }}",
    }
    done = start(traps, ROOT / "scripts/ctrace", "--version", **hostile)
    assert (done.returncode, ran(traps)) == (0, ""), done.stderr


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("ctrace.change.guard", ["1"]),
        ("ctrace.demo.actors", ["net"]),
        ("ctrace.advice.again", ["1"]),
        ("ctrace.live.apart", ["1"]),
    ],
)
def test_every_child(traps: Path, module: str, arguments: list[str]) -> None:
    """Each is started as ctrace starts it. What it then makes of its work is its own matter."""
    argv = interpreter.module(module, *arguments)
    environment = {**os.environ, "PYTHONPATH": str(traps)}
    done = subprocess.run(
        argv, cwd=traps, env=environment, input="", capture_output=True, text=True, check=False
    )
    assert ran(traps) == ""
    assert "No module named" not in done.stderr


def test_what_pip_installs_comes_with_its_hashes() -> None:
    """Or is this checkout itself, for which nothing is fetched."""
    files = [*(ROOT / "scripts").iterdir(), *(ROOT / "packaging").glob("*.py"),
             ROOT / "ctrace/share/container/Containerfile"]  # fmt: skip
    seen = 0
    for file in files:
        if file.is_file():
            text = file.read_text()
            if re.search(r"pip[\"',\s]+(install|download)\b", text):
                assert "--require-hashes" in text, file
                seen += 1
            if re.search(r"pip[\"',\s]+wheel\b", text):
                assert "--no-build-isolation --no-index" in text, file
    assert seen >= 6


def test_no_other_way_to_start_a_child() -> None:
    """An interpreter is started isolated, wherever the product does it."""
    for file in (ROOT / "ctrace").rglob("*.py"):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if re.search(r"\[(sys\.executable|compiler\.python)", line):
                assert '"-I"' in line, f"{file}:{number}: {line.strip()}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is protected")
class TestCheckout:
    """A checkout that others may write."""

    @pytest.fixture
    def checkout(self, tmp_path: Path) -> Path:
        """Its scripts, and a stranger's interpreter that would tell that it ran."""
        place = tmp_path / "checkout"
        shutil.copytree(ROOT / "scripts", place / "scripts")
        shutil.copy(ROOT / "pyproject.toml", place)
        fake = place / ".venv/bin/python"
        fake.parent.mkdir(parents=True)
        fake.write_text("#!/bin/sh\necho RAN\n")
        fake.chmod(0o755)
        (place / ".venv/.ctrace-stamp").write_text("")
        return place

    @pytest.mark.parametrize("where", [".venv/bin/python", "scripts", "pyproject.toml", "."])
    def test_everyone_may_write_it(self, checkout: Path, where: str) -> None:
        (checkout / where).chmod(0o777)
        self.refused(checkout, checkout / where)

    def test_everyone_may_write_the_folder_above(self, checkout: Path) -> None:
        checkout.parent.chmod(0o777)
        self.refused(checkout, checkout.parent)

    def refused(self, checkout: Path, named: Path) -> None:
        argv = [str(checkout / "scripts/ctrace"), "--version"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "RAN" not in done.stdout
        assert str(named.resolve()) in done.stderr
        assert len(done.stderr.splitlines()) == 1

    def test_another_users_is_named(self, checkout: Path) -> None:
        os.chown(checkout / "scripts", 65534, 65534)
        script = f". {checkout}/scripts/setup.sh"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert f"may change: {checkout / 'scripts'}" in done.stderr
        caller = {**os.environ, "SUDO_UID": "65534"}
        done = subprocess.run(["bash", "-c", script], env=caller, capture_output=True, text=True,
                              check=False)  # fmt: skip
        assert done.stderr == ""

    def test_others_may_not_write_what_is_installed(self, checkout: Path) -> None:
        script = f"umask 000; . {checkout}/scripts/setup.sh; umask"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "0022", done.stderr
