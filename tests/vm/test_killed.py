"""However and whenever ctrace is killed, nothing of it stays: in the kernel, on the disk's
mounts, among namespaces, rules and processes.

Natively others may trace and link too: the objects that it held are looked for by their ids,
and it runs in a network and mount namespace of its own. An emulated machine is ours alone,
and must look as before.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kit.machines import Objects, objects

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(
        os.environ.get("CTRACE_VM", "6.12") != "6.12", reason="one emulated kernel is enough"
    ),
]
KERNEL = os.environ.get("CTRACE_VM", "")
SLOW = 20 if KERNEL else 1
"""How much slower an emulated machine is, about."""
PATIENCE = max(120, 20 * SLOW)
"""Seconds for a start."""
LIMIT = Path("/proc/sys/net/netfilter/nf_conntrack_max")
VERBS = {
    "top": (("top", "1"), "CULPRITS"),
    "trace": (("trace",), "listening with"),
    "record": (("record",), "recording to"),
    "demo": (("demo", "--auto", "--plain"), "\n"),
}


def held(pids: list[int]) -> Objects:
    """Those that these processes hold."""
    found = set()
    for pid in pids:
        for info in Path(f"/proc/{pid}/fdinfo").glob("*"):
            try:
                text = info.read_text()
            except OSError:
                continue
            found |= {
                (s, int(n)) for s, n in re.findall(r"^(prog|map|link)_id:\t(\d+)", text, re.M)
            }
    return found


@pytest.fixture
def inside() -> Iterator[list[str]]:
    """What a command begins with that is to run where nobody else does."""
    if KERNEL:
        yield []
        return
    keeper = subprocess.Popen(
        ["unshare", "--mount", "--net", "sh", "-c", "ip link set lo up; echo; exec sleep infinity"],
        stdout=subprocess.PIPE,
    )
    try:
        assert keeper.stdout is not None
        assert keeper.stdout.readline()
        yield ["nsenter", f"--target={keeper.pid}", "--mount", "--net", "--"]
    finally:
        keeper.kill()
        keeper.communicate()


def surroundings(inside: list[str]) -> dict[str, object]:
    """What else a tracer could leave behind."""
    spaces = set()
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            spaces.add(os.readlink(link))
        except OSError:
            continue

    def told(*command: str) -> bytes:
        return subprocess.run([*inside, *command], capture_output=True, check=True).stdout

    return {
        "namespaces": spaces if KERNEL else None,
        "mounts": told("cat", "/proc/self/mountinfo"),
        "rules": told("nft", "list", "ruleset"),
        "links": told("ip", "-o", "link").count(b"\n"),
        "limit": LIMIT.read_text() if KERNEL else None,  # all namespaces' until 7.0
        "pinned": sorted(Path("/sys/fs/bpf").rglob("*")) if KERNEL else None,
    }


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            children = (task / "children").read_text().split()
        except OSError:
            continue
        for child in children:
            found += family(int(child))
    return found


def began(pid: int) -> str:
    """When a process was started, which tells it from a later one with its number; empty: it has
    ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else rest[18]


def wait(condition: Callable[[], bool], what: str, seconds: float = 180 if KERNEL else 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.3 if KERNEL else 0.1)  # a look at all processes takes as long in there


def running(verb: str, child: subprocess.Popen[bytes], said: Path) -> None:
    """It does what it is for."""
    wait(lambda: VERBS[verb][1] in said.read_text(), said.read_text(), PATIENCE)
    assert verb == "demo" or held([child.pid])


def starting(verb: str, child: subprocess.Popen[bytes], said: Path) -> None:
    """Somewhere on the way: it has made its first object in the kernel."""
    wait(lambda: bool(held(family(child.pid))), said.read_text(), PATIENCE)


def compiling(verb: str, child: subprocess.Popen[bytes], said: Path) -> None:
    """While the compiler's own process works."""

    def compiler() -> bool:
        for pid in family(child.pid)[1:]:
            try:
                if b"bcc_child.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return True
            except OSError:
                continue
        return False

    wait(compiler, said.read_text(), PATIENCE)


CHANGED = (
    "import random; from ctrace.kernel import programs; changed = str(random.random()); "
    "programs.digest = lambda source: changed; from ctrace.cli import main; main()"
)
"""ctrace as after a change of the programs' sources: they must be compiled first."""

CASES = [
    *((verb, running, how) for verb in VERBS for how in (signal.SIGTERM, signal.SIGKILL)),
    *(("trace", when, how) for when in (starting, compiling)
      for how in (signal.SIGKILL, signal.SIGTERM)),
]  # fmt: skip
if KERNEL:  # each takes a quarter of a minute: what function hooks leave, and a whole machine
    CASES = [
        ("record", running, signal.SIGTERM),
        ("top", running, signal.SIGKILL),
        ("trace", starting, signal.SIGKILL),
        ("demo", running, signal.SIGKILL),
    ]


@pytest.mark.parametrize(
    ("verb", "when", "how"), CASES, ids=[f"{v}-{w.__name__}-{h.name}" for v, w, h in CASES]
)
def test_nothing_stays(
    verb: str,
    when: Callable[[str, subprocess.Popen[bytes], Path], None],
    how: signal.Signals,
    inside: list[str],
    tmp_path: Path,
) -> None:
    before, around = objects(), surroundings(inside)
    argv = [*inside, sys.executable, *(["-c", CHANGED] if when is compiling else ["-m", "ctrace"])]
    argv += VERBS[verb][0]
    if verb == "record":
        argv += ["-o", str(tmp_path / "a.data")]
    said = tmp_path / "said"
    with said.open("wb") as out:
        child = subprocess.Popen(argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                                 env=dict(os.environ, PYTHONUNBUFFERED="1"))  # fmt: skip
    try:
        when(verb, child, said)
        pids = family(child.pid)
        run = {pid: began(pid) for pid in pids}
        mine = held(pids)
    finally:
        child.send_signal(how)
        status = child.wait(timeout=60 * SLOW)
    assert "Traceback" not in said.read_text()
    assert status == -signal.SIGKILL if how == signal.SIGKILL else status in (0, 143, -15)
    wait(lambda: not any(at and began(pid) == at for pid, at in run.items()), "processes stay")
    gone = (lambda: objects() == before) if KERNEL else (lambda: not (objects() & mine))
    wait(gone, "programs, maps or links stay")
    wait(lambda: surroundings(inside) == around, "something else stays")
