"""What a model takes before it has seen anything."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ctrace.model.keys.levels import Levels, needed


@pytest.mark.parametrize("scale", [0.001, 0.1, 0.9, 1.7, 40.0])
def test_the_size_is_known_before_it_is_taken(scale: float) -> None:
    assert needed(scale) == Levels(scale).nbytes()


def test_little_is_touched_before_it_is_used() -> None:
    """Of the 32 MiB that a model may hold; a table that was tried and dropped stays touched."""
    program = """
import re
from ctrace.model.model import Model
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = anonymous()
kept = Model(None, None, 0)
print(anonymous() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 20_000
