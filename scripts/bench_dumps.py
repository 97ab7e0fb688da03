"""A dump of a million lines imported, against plain Python that only splits the same lines.

Both read the same file in turn within one run; numbers are medians over its rounds, of CPU time.
The lines are what /proc/net/nf_conntrack prints of a web server under load: TCP in several
states, UDP that saw no reply, both families. Plain Python counts entries by protocol, state and
port, and checks nothing.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

LINES = 1_000_000
ROUNDS = 3
STATES = ("TIME_WAIT", "TIME_WAIT", "TIME_WAIT", "ESTABLISHED", "SYN_RECV", "CLOSE_WAIT")


def write(path: Path, lines: int = LINES, seed: int = 5) -> None:
    """The dump, no two entries alike."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for i in range(lines):
            left, port = rng.randrange(1, 120), 1024 + i % 60_000
            if i % 8 == 7:
                src, dst = f"2001:db8::{i >> 16:x}:{i & 0xFFFF:x}", "2001:db8:1::10"
                head = "ipv6     10"
            else:
                src, dst = f"10.{i >> 16 & 255}.{i >> 8 & 255}.{i & 255}", "192.0.2.10"
                head = "ipv4     2"
            if i % 5 == 4:
                there = f"src={src} dst={dst} sport={port} dport=53"
                back = f"src={dst} dst={src} sport=53 dport={port}"
                file.write(f"{head} udp      17 {left} {there} [UNREPLIED] {back} mark=0 use=2\n")
            else:
                there = f"src={src} dst={dst} sport={port} dport=8063"
                back = f"src={dst} dst={src} sport=8063 dport={port}"
                state = rng.choice(STATES)
                file.write(f"{head} tcp      6 {left} {state} {there} {back} [ASSURED] "
                           "mark=0 zone=0 use=2\n")  # fmt: skip


def split(path: Path) -> int:
    """What one writes first: words of each line, and a count by protocol, state and port."""
    found: Counter[tuple[str, str, str]] = Counter()
    with path.open() as file:
        for line in file:
            words = line.split()
            values: dict[str, str] = {}
            for word in words[5:]:
                name, _, value = word.partition("=")
                values.setdefault(name, value)
            found[words[2], words[5], values["dport"]] += 1
    return sum(found.values())


def imported(path: Path) -> int:
    """The same lines as a recording."""
    from ctrace.dumps.make import make

    out = path.with_suffix(".data")
    try:
        _, told = make([str(path)], str(out))
        return int(told.said["entries"])
    finally:
        out.unlink()


def cpu(call: Callable[[], int]) -> float:
    """Seconds of CPU."""
    before = time.process_time()
    assert call() == LINES
    return time.process_time() - before


def run() -> list[dict[str, Any]]:
    """One row."""
    with tempfile.TemporaryDirectory(prefix="ctrace-bench-") as folder:
        path = Path(folder) / "nf_conntrack"
        write(path)
        ours, plain = [], []
        for _ in range(ROUNDS):
            plain.append(cpu(lambda: split(path)))
            ours.append(cpu(lambda: imported(path)))
    mine, its = statistics.median(ours), statistics.median(plain)
    return [{
        "name": "import of 1 M lines",
        "seconds": round(mine, 2),
        "us_a_line": round(mine / LINES * 1e6, 2),
        "plain_splitting_seconds": round(its, 2),
        "times_plain_splitting": round(mine / its, 2),
    }]  # fmt: skip
