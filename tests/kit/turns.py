"""Whose turn it is, among the tests of several workers that use one kernel."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def stay() -> Callable[[], None]:
    """Go on beside others after this test's turn, as work in the background does, until what is
    returned is called."""
    room = _ROOM.open("w")
    fcntl.flock(room, fcntl.LOCK_SH)  # no need of the door: this test is in there
    return room.close
