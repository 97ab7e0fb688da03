"""The guard: waits for a trial's deadline, and removes its rules if nobody confirmed.

The kernel has disarmed them by then; this only tidies the ruleset's text, also
when the ctrace that applied them was killed. Started by apply as
``python -m ctrace.advice.guard NETNS``; it ends as soon as the trial is over.
"""

from __future__ import annotations

import sys
import time

from ctrace.advice import state
from ctrace.advice.undo import undo
from ctrace.errors import CtraceError

POLL_S = 0.5
GRACE_S = 1.0
"""After the deadline: the kernel's timers first."""
TRIES = 60


def watch(inum: int) -> None:
    """Return once the trial in the namespace is confirmed, undone, or removed by us."""
    while True:
        note = state.read(inum)
        if note is None or not note.deadline:
            return
        if time.time() >= note.deadline + GRACE_S:
            break
        time.sleep(POLL_S)
    for _ in range(TRIES):
        try:
            undo(inum, expired_only=True)
            state.forget(inum)
            return
        except CtraceError:
            time.sleep(POLL_S)


if __name__ == "__main__":
    watch(int(sys.argv[1]))
