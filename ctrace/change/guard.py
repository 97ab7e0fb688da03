"""The guard: waits for a trial's deadline, and removes its rules if nobody confirmed.

The kernel has disarmed them by then; this only tidies the ruleset's text, also
when the ctrace that applied them was killed. Started by apply
as a process of its own; it ends as soon as the trial is over.
"""

from __future__ import annotations

import sys
import time

from ctrace.change import notes
from ctrace.change.undo import applied, undo
from ctrace.errors import CtraceError
from ctrace.host import netns
from ctrace.host.netns import Namespace
from ctrace.ruleset.installed import PERMANENT, TRIAL, listing

POLL_S = 0.5
GRACE_S = 1.0
"""After the deadline: the kernel's timers first."""
TRIES = 60


def watch(inum: int) -> None:
    """Return once the trial in the namespace is confirmed, undone, or removed by us."""
    while True:
        note = notes.read(inum)
        if note is None or not note.deadline:
            return
        if time.time() >= note.deadline + GRACE_S:
            break
        time.sleep(POLL_S)
    for _ in range(TRIES):
        try:
            if _tidied(inum, note):
                return
        except CtraceError:
            pass  # another ctrace is changing rules: look again
        time.sleep(POLL_S)


def _tidied(inum: int, note: notes.Note) -> bool:
    """Remove a trial that is over; False while the kernel still counts down.

    The kernel's clock starts with the transaction, on a busy host seconds after ours.
    """
    if TRIAL in _states(inum):  # without the lock, which a person's confirm needs
        return False
    undo(inum, expired_only=True)
    with notes.locked():
        if notes.read(inum) != note:
            return True  # removed, confirmed, or another plan's by now
        left = _states(inum)
        if TRIAL in left:
            return False
        if PERMANENT in left:  # killed between confirming and writing it down
            with netns.enter(left[PERMANENT].path):
                notes.write(note.confirmed(listing()))
        else:
            notes.forget(inum)
    return True


def _states(inum: int) -> dict[str, Namespace]:
    """What of ours is in the namespace, by how it is: one at most."""
    return {change.installed.state: change.namespace for change in applied(inum)}


if __name__ == "__main__":
    watch(int(sys.argv[1]))
