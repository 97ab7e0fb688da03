"""For every suite: what a run in the background, or beside others, must not change.

Programs under test can be interrupted, no example is timed, and what the whole machine sees
is changed by one test at a time, with no kernel test beside it.
"""

from __future__ import annotations

import builtins
import fcntl
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

if sys.version_info < (3, 10):
    # The tests compare lengths by it; the product must do without (tests/house/test_floor.py).
    def _zip(*rows: Iterable[Any], strict: bool = False) -> Iterator[tuple[Any, ...]]:
        if strict:
            rows = tuple(list(row) for row in rows)
            if len({len(row) for row in rows}) > 1:  # type: ignore[arg-type]
                raise ValueError("zip() arguments have different lengths")
        return _plain_zip(*rows)

    _plain_zip = builtins.zip
    builtins.zip = _zip  # type: ignore[assignment,misc]

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_LOCKS = [Path(tempfile.gettempdir()) / f"ctrace-tests-{name}" for name in ("door", "room")]


@pytest.fixture(autouse=True)
def _beside(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kernel tests run beside each other, one marked ``machine`` by itself.

    It waits at the door, so that those that come later wait behind it.
    """
    alone = request.node.get_closest_marker("machine") is not None
    if not alone and request.node.get_closest_marker("kernel") is None:
        yield
        return
    with _LOCKS[0].open("w") as door, _LOCKS[1].open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield
