"""How much memory a start takes where tables are full: the worst moment to need much."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from soak import Flood, Verb, verbs  # noqa: E402

from ctrace.host import ctnetlink  # noqa: E402
from ctrace.lab import Lab  # noqa: E402

SPACES = 5
ENTRIES = 262_144
"""In each of them: nf_conntrack_max as most hosts have it, so they are full."""
SECONDS = 15.0
"""For which one is watched: it has read all tables by then."""


def peak(verb: Verb) -> int:
    """MiB that it had at most since it was started. Raises RuntimeError when it ended."""
    verb.start()
    try:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            time.sleep(0.2)
            verb.memory()
            if verb.process is None or verb.process.poll() is not None:
                raise RuntimeError(f"ctrace {verb.name} ended by itself")
        return verb.peak
    finally:
        verb.end(signal.SIGTERM)


def run() -> list[dict[str, Any]]:
    """One row for each verb, for scripts/bench."""
    rows: list[dict[str, Any]] = []
    with Lab() as lab, tempfile.TemporaryDirectory(prefix="bench.") as folder:
        nodes = [lab.namespace(f"full{number}", track=True) for number in range(SPACES)]
        for node in nodes:
            ctnetlink.fill(node.path, ENTRIES)
        flood = Flood(lab, Path(folder))
        flood.go()
        held = sum(node.count() for node in nodes)
        try:
            for verb in verbs(Path(folder)):
                rows.append({
                    "name": f"ctrace {verb.name} starts beside {held:,} entries in {SPACES} tables "
                            "and a flood",
                    "value": peak(verb), "unit": "MiB at most", "limit": verb.limit,
                })  # fmt: skip
        finally:
            flood.end()
    return rows


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
