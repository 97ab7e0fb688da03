"""The guard: waits for a trial's deadline, and removes its rules if nobody confirmed.

It does so also when the ctrace that applied them was killed; the kernel disarms them
by itself if it is killed, too. Started by apply
as a process of its own; it ends as soon as the trial is over.
"""

from __future__ import annotations

import sys
import time

from ctrace.change import notes
from ctrace.change.undo import applied, remove
from ctrace.errors import CtraceError
from ctrace.host import netns
from ctrace.ruleset.installed import PERMANENT, listing

POLL_S = 0.5
TRIES = 60


def watch(inum: int) -> None:
    """Return once the trial in the namespace is confirmed, undone, or removed by us."""
    while True:
        note = notes.read(inum)
        if note is None or not note.deadline:
            return
        if time.time() >= note.deadline:
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
    """Take back a trial whose time is over; it is there until its rules are gone.

    The kernel disarms them by itself a little later (steps.BACKSTOP_S), but it makes no
    entries for the connections that are open.
    """
    with notes.locked():
        if notes.read(inum) != note:
            return True  # removed, confirmed, or another plan's by now
        for change in applied(inum):
            with netns.enter(change.namespace.path):
                if change.installed.state == PERMANENT:
                    # Killed between confirming and writing it down.
                    notes.write(note.confirmed(listing()))
                    return True
                remove(change.installed, note)
        notes.forget(inum)
    return True


if __name__ == "__main__":
    watch(int(sys.argv[1]))
