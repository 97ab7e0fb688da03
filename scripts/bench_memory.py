"""How much memory a start takes where tables are full: the worst moment to need much.

Each verb runs under the limit of its unit, in a memory control group of its own where there is
one: what the kernel keeps for it (rings, BPF maps, netlink) counts there, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from soak import Flood, Verb, verbs  # noqa: E402

from ctrace.host import ctnetlink  # noqa: E402
from ctrace.lab import Lab  # noqa: E402

SPACES = 5
ENTRIES = 262_144
"""In each of them: nf_conntrack_max as most hosts have it, so they are full."""
SECONDS = 20.0
"""For which one is watched: it has read all tables by then."""
UNITS = {"metrics": "ctrace-metrics.service", "record": "ctrace-recorder.service"}


def limit_of(verb: str) -> Optional[int]:
    """MiB: MemoryMax of its unit; None where it has none."""
    if verb not in UNITS:
        return None
    text = (ROOT / "ctrace/share/systemd" / UNITS[verb]).read_text()
    return int(re.findall(r"(?m)^MemoryMax=(\d+)M$", text)[0])


@contextlib.contextmanager
def box(limit: Optional[int]) -> Iterator[Optional[Path]]:
    """A memory control group (version 2, or 1) with a limit in MiB; None where none can be made."""
    two = Path("/sys/fs/cgroup")
    root = two if (two / "cgroup.controllers").exists() else two / "memory"
    folder = root / f"ctrace-bench-{os.getpid()}"
    try:
        if root == two:
            (two / "cgroup.subtree_control").write_text("+memory")
        folder.mkdir()
        if limit:
            name = "memory.max" if root == two else "memory.limit_in_bytes"
            (folder / name).write_text(str(limit << 20))
    except OSError:
        yield None
        return
    try:
        yield folder
    finally:
        deadline = time.monotonic() + 10
        while folder.exists() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                folder.rmdir()
            time.sleep(0.1)


def most(folder: Optional[Path]) -> Optional[int]:
    """MiB that a group had at most."""
    for name in ("memory.peak", "memory.max_usage_in_bytes"):
        with contextlib.suppress(OSError, TypeError):
            return int((folder / name).read_text()) >> 20  # type: ignore[operator]
    return None


def peak(verb: Verb) -> dict[str, Any]:
    """MiB that it had at most since it was started, and what became of it."""
    limit = limit_of(verb.name)
    with box(limit) as folder:
        if folder is not None:
            own = 'echo $$ > "$0/cgroup.procs"; exec "$@"'
            verb.before = ("sh", "-c", own, str(folder))
        verb.start()
        found = "alive"
        try:
            until = time.monotonic() + SECONDS
            while time.monotonic() < until:
                time.sleep(0.1)
                verb.memory()
                if verb.process is None or verb.process.poll() is not None:
                    found = "ended by itself"
                    break
        finally:
            verb.end(signal.SIGTERM)
        row: dict[str, Any] = {"value": verb.peak, "unit": "MiB at most", "aim": verb.limit}
        if limit and folder:
            row["of_its_unit"] = f"{limit} MiB"
        whole = most(folder)
        if whole is not None:
            row["with_the_kernels_part"] = whole
        return {**row, "it_was": found}


def rows() -> Iterator[dict[str, Any]]:
    """One for each verb."""
    with Lab() as lab, tempfile.TemporaryDirectory(prefix="bench.") as folder:
        nodes = [lab.namespace(f"full{number}", track=True) for number in range(SPACES)]
        for node in nodes:
            ctnetlink.fill(node.path, ENTRIES)
        flood = Flood(lab, Path(folder))
        flood.go()
        held = sum(node.count() for node in nodes)
        beside = f"beside {held:,} entries in {SPACES} tables and a flood"
        try:
            for verb in verbs(Path(folder)):
                yield {"name": f"ctrace {verb.name} starts {beside}", **peak(verb)}
        finally:
            flood.end()


def run() -> list[dict[str, Any]]:
    """The rows, for scripts/bench."""
    return list(rows())


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row), flush=True)
