"""Whose turn it is, among the tests of several workers that use one kernel; and a small table for
those by themselves that fill it."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_DOOR, _ROOM = (Path(tempfile.gettempdir()) / f"ctrace-tests-{name}" for name in ("door", "room"))


@contextmanager
def turn(*, alone: bool) -> Iterator[None]:
    """Beside others, or by itself.

    Who waits does so at the door, so that those that come later wait behind.
    """
    with _DOOR.open("w") as door, _ROOM.open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield


@contextmanager
def preferred() -> Iterator[None]:
    """Served before others by the scheduler, as is whatever it starts; where that is allowed."""
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, usual - 10)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, usual)


def stay() -> Callable[[], None]:
    """Go on beside others after this test's turn, as work in the background does, until what is
    returned is called."""
    room = _ROOM.open("w")
    fcntl.flock(room, fcntl.LOCK_SH)  # no need of the door: this test is in there
    return room.close


FEW = 16384
"""Entries that a table holds meanwhile: filled with a fifteenth of the work, and so for readers."""


@contextmanager
def lowered(limit: int = FEW) -> Iterator[None]:
    """Fewer places in every table of the host, for a test marked ``machine``.

    Where somebody's flows could be refused by it the host's own limit stays: a test asks what it
    is, and takes longer to fill it.
    """
    from ctrace.demo.limit import LoweredLimit
    from ctrace.errors import CtraceError

    try:
        held = LoweredLimit(limit)
    except CtraceError:
        yield
        return
    try:
        yield
    finally:
        held.close()
