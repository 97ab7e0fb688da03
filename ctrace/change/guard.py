"""The guard: a process of its own beside a change, for as long as that needs one.

On trial it looks every second whether anything got worse, and takes the change back when it
did, when an accept of it is gone, or when the time is over and nobody confirmed: also when the
ctrace that applied it was killed. Once confirmed it stays where the plan untracks anything: when
the rules around it changed it has the change judged again, and taken off when it is not safe any
more. Where the plan has accepts in chains of others it sees that these stand, too
(:mod:`ctrace.change.keep` says why): when they are gone the services are tracked again within
:data:`POLL_S`, then judged by the rules as they are then, and the rules put back when that is
safe; else it is tried again ever more rarely. It lives elsewhere and holds no file of the
namespace, so it does not keep it alive.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Final, Optional

from ctrace import interpreter
from ctrace.change import keep, notes
from ctrace.change.standing import Generation, Standing
from ctrace.change.undo import remove
from ctrace.errors import CtraceError
from ctrace.host import netns
from ctrace.plan import plan as plans
from ctrace.ruleset.installed import PERMANENT, listing, read_installed

POLL_S: Final = 0.25
TRIES: Final = 60
PATIENCE_S: Final = 60
"""Seconds to wait for an earlier guard of the namespace to end."""
QUIET_S: Final = 1.0
"""Seconds without a change before rules are judged: a reload comes in several pieces."""
BY_HAND_S: Final = 5.0
"""Seconds for whoever removes the rules by hand, line by line, to be done with them."""
LONGEST_WAIT_S: Final = 600
SHARE: Final = 20
"""Judging again takes at most one part in this many of the time,"""
AT_ONCE: Final = 3
"""except for the first few times: a host that just reloads its firewall is busy."""
GIVE_UP_S: Final = 1200
"""Seconds after which one judgement is given up: more than it gives itself."""
HEAR_EVERY: Final = 5
"""Looks from one check of new entries to the next."""
GONE_LOOKS: Final = 4
"""Looks in a row that do not find the namespace: one may miss it while its only process is replaced
by another."""
_SCORE: Final = "-500"
"""Adjustment for the out-of-memory killer: killing a process this small frees nothing."""


def watch(inum: int, lock: Optional[int] = None) -> None:
    """Return once the change in the namespace needs no guard. ``lock``: a descriptor that makes
    this process the namespace's guard already."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(_SCORE)
    with notes.guarding(inum, PATIENCE_S, lock) as mine:
        if mine:
            Guard(inum).run()


class _Gone(Exception):
    """The namespace is not found any more."""


class Guard:
    """The guard of one namespace."""

    def __init__(self, inum: int) -> None:
        self._inum = inum
        self._way = netns.Way(inum)
        self._plan: Optional[tuple[str, plans.Plan, Standing]] = None
        self._watch: Optional[object] = None
        self._looks = 0
        self._due = 0.0
        self._wait = QUIET_S
        self._again = self._next = self._last = 0.0
        self._tries = self._times = 0
        self._judging: Optional[tuple[subprocess.Popen[bytes], float]] = None
        self._generation: Optional[Generation] = None
        self._since = 0.0
        self._stale = False
        self._ahead = 0.0

    def run(self) -> None:
        """Run until there is nothing to guard."""
        lost = 0
        while lost < GONE_LOOKS:
            # Something is changing rules, or a tool prints what it never did: look again. A guard
            # that ended would leave the trial to the kernel's timeout alone.
            with suppress(Exception):
                try:
                    if not self._turn():
                        return
                    lost = 0
                except _Gone:
                    lost += 1
            time.sleep(POLL_S)
        with suppress(CtraceError, OSError):
            notes.sweep(lambda: {space.inum for space in netns.find()}, self._inum)

    def _turn(self) -> bool:
        """One look; False when there is nothing to guard any more."""
        note = notes.read(self._inum)
        if note is None or note.over:
            return False
        if not note.deadline:
            return self._standing(note).depends and self._kept(note)
        if notes.now() >= note.deadline:
            self._tidy(note)
        elif note.placed:
            self._on_trial(note)
        return True

    # ---- on trial ----------------------------------------------------------------

    def _on_trial(self, note: notes.Note) -> None:
        self._see_clock(note)
        with self._there() as path:
            there, missing = self._standing(note).look(path)
        if not there:
            time.sleep(BY_HAND_S)  # whoever does it by hand goes on to the accepts
            self._take_back(note, "the rules are gone: something else removed them")
        elif missing:
            self._take_back(note, f"something removed its accepts ({', '.join(missing)})")
        elif time.monotonic() >= self._due:
            self._due = time.monotonic() + 1.0
            worse = self._look(note)
            if worse:
                self._take_back(note, "it made things worse: " + "; ".join(worse))

    def _look(self, note: notes.Note) -> tuple[str, ...]:
        """Called once a second; the first look only starts the measurement."""
        from ctrace.change import health
        from ctrace.change.watch import LISTEN_S, Watch

        if not isinstance(self._watch, Watch) or self._watch.plan is not self._known(note)[1]:
            self._watch = Watch(
                self._known(note)[1],
                self._way,
                health.Before(dict(note.before), note.waiting),
                note.probes,
            )
            return ()
        self._looks += 1
        return self._watch.look(0.0 if self._looks % HEAR_EVERY else LISTEN_S).worse

    def _see_clock(self, note: notes.Note) -> None:
        """iptables knows an end by the wall clock only, so it is rewritten when the clock was
        set."""
        plan, ahead = self._known(note)[1], time.time() - notes.now()
        if plan.backend == "nft" or abs(ahead - self._ahead) < keep.CLOCK_SET_S / 2:
            return
        with notes.locked(self._inum):
            if notes.read(self._inum) != note:
                return
            with self._inside():
                keep.redate(plan, note.deadline - notes.now())
        self._ahead, self._watch = ahead, None

    def _take_back(self, note: notes.Note, why: str) -> None:
        with notes.locked(self._inum) as lock:
            if notes.read(self._inum) != note:
                return
            with self._inside():
                remove(read_installed(time.time()), note, lock)
            notes.write(note.ended(f"taken back at {_clock()}: {why}"))

    def _tidy(self, note: notes.Note) -> None:
        for _ in range(TRIES):
            with suppress(CtraceError):
                if _tidied(self._way, note):
                    return
            time.sleep(POLL_S)

    # ---- confirmed ---------------------------------------------------------------

    def _kept(self, note: notes.Note) -> bool:
        """Whether there is anything left to guard."""
        plan = self._known(note)[1]
        with self._there() as path:
            there, missing = self._standing(note).look(path)
        if note.off:
            self._put_back()
        elif not there:
            return self._gone(note)
        elif missing:
            with self._inside():
                keep.off(plan)
            self._off(
                note,
                f"off since {_clock()}, when something removed its accepts "
                f"({', '.join(missing)}): its services are tracked",
            )
        elif self._standing(note).needs and self._is_due():
            self._renew(note)
        else:
            self._rejudge(self._standing(note).generation)
        return True

    def _renew(self, note: notes.Note) -> None:
        """Renew the lease, unless an undo is at work or was killed half way: that would bring
        rules back."""
        with self._there() as path:
            before = self._standing(note).now(path)
            try:
                with notes.locked(self._inum):
                    if notes.read(self._inum) != note:
                        return
                    if self._standing(note).look(path) != (True, ()):
                        self._due = 0.0
                        return
                    with netns.enter(path):
                        held = keep.renew(self._known(note)[1])
            except CtraceError:  # another ctrace is changing rules
                self._due = notes.now() + POLL_S
                return
            self._seen(before, self._standing(note).now(path), self._known(note)[1].backend)
        if not held:
            self._off(
                note,
                f"off since before {_clock()}, as nothing had looked after its "
                "accepts for too long: its services are tracked",
            )

    def _is_due(self) -> bool:
        """Whether the lease is to be renewed. After a suspend, or when the wall clock was set, at
        once: iptables' rules end by that clock."""
        now = notes.now()
        ahead = time.time() - now
        if now < self._due and abs(ahead - self._ahead) < keep.CLOCK_SET_S / 2:
            return False
        self._due, self._ahead = now + keep.RENEW_S, ahead
        return True

    def _seen(self, before: Generation, after: Generation, backend: str) -> None:
        """Renewing changes rules, too: of ours alone, in nftables by one transaction. More were
        somebody else's."""
        alone = backend != "nft" or after == (before[0] + 1, before[1])
        if alone and before == self._generation:
            self._generation = after

    def _rejudge(self, generation: Optional[Generation]) -> None:
        """Judge it again in the background once the rules around it changed and are quiet."""
        now = time.monotonic()
        if generation != self._generation:
            self._generation, self._since, self._stale = generation, now, True
        if self._judging is not None:
            process, began = self._judging
            if process.poll() is None and now - began < GIVE_UP_S:
                return
            process.kill()
            process.wait()
            self._judging = None
            # Too long, no memory, or another ctrace was changing rules just then.
            if process.returncode:
                self._stale, self._since = True, now
            self._times, self._last = self._times + 1, now
            if self._times > AT_ONCE:
                self._next = now + SHARE * (now - began)
        elif self._stale and now - self._since >= QUIET_S and now >= self._next:
            if now - max(self._last, self._next) > LONGEST_WAIT_S:
                self._times = 0
            self._judging, self._stale = (self._judge(), now), False

    def _judge(self) -> subprocess.Popen[bytes]:
        """Judge it again in a separate process, so that the memory is freed when that ends."""
        return subprocess.Popen(
            interpreter.module("ctrace.advice.again", str(self._inum)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )

    def _gone(self, note: notes.Note) -> bool:
        """All of it was removed, by hand or with every other rule: so it is over."""
        time.sleep(BY_HAND_S)  # whoever does it by hand goes on to the accepts
        with notes.locked(self._inum) as lock:
            if notes.read(self._inum) != note:
                return True
            with self._inside():
                remove(read_installed(time.time()), note, lock)
            notes.write(note.ended(f"something else removed its rules before {_clock()}"))
        return False

    def _off(self, note: notes.Note, said: str) -> None:
        """Record that it is off, and why, unless the note is another change's by now."""
        now = time.monotonic()
        if now - self._again > LONGEST_WAIT_S:
            self._wait, self._tries = QUIET_S, 0
        self._again, self._due = now + self._wait, 0.0
        for _ in range(TRIES):
            with suppress(CtraceError), notes.locked(self._inum):
                if notes.read(self._inum) == note:
                    notes.write(replace(note, said=said, off=True))
                return
            time.sleep(POLL_S)

    def _put_back(self) -> None:
        """Judge it again, and wait for that: while it is off there is nothing else to guard."""
        if time.monotonic() < self._again:
            return
        began = time.monotonic()
        with self._judge() as process:
            try:
                process.wait(GIVE_UP_S)
            except subprocess.TimeoutExpired:
                process.kill()
        took = time.monotonic() - began
        self._tries += 1
        least = SHARE * took if self._tries > AT_ONCE else 0.0
        self._wait = min(LONGEST_WAIT_S, max(2 * self._wait, least))
        self._again, self._due = time.monotonic() + self._wait, 0.0

    # ---- what it knows ------------------------------------------------------------

    def _known(self, note: notes.Note) -> tuple[str, plans.Plan, Standing]:
        if self._plan is None or self._plan[0] != note.plan:
            plan = plans.from_json(note.plan)
            self._plan = note.plan, plan, Standing(plan)
        return self._plan

    def _standing(self, note: notes.Note) -> Standing:
        return self._known(note)[2]

    @contextmanager
    def _there(self) -> Iterator[str]:
        """A path of the namespace. Raises CtraceError, and _Gone when it is not found."""
        with self._way.held() as space:
            if space is None:
                raise _Gone
            yield space.path

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """This thread inside the namespace. Raises as :meth:`_there`."""
        with self._there() as path, netns.enter(path):
            yield


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def _tidied(way: netns.Way, note: notes.Note) -> bool:
    """Revert a trial whose time is over; the note stays until its rules are gone.

    The kernel disarms them by itself a little later (steps.BACKSTOP_S), but it makes no
    entries for the connections that are open.
    """
    with notes.locked(note.netns) as lock:
        if notes.read(note.netns) != note:
            return True  # removed, confirmed, or another plan's by now
        with way.held() as space:
            if space is not None:
                with netns.enter(space.path):
                    installed = read_installed(time.time())
                    if installed.state == PERMANENT:
                        # Killed between confirming and writing it down.
                        notes.write(note.confirmed(listing()))
                        return True
                    remove(installed, note, lock)
        notes.forget(note.netns)
    return True


if __name__ == "__main__":
    watch(*(int(word) for word in sys.argv[1:3]))
