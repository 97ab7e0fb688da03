"""The note that apply leaves under /run/ctrace: what was there before, and until when it holds.

The truth about what is applied is the ruleset itself (:mod:`ctrace.ruleset.installed`);
the note only adds what the ruleset can't tell: which empty tables were made for
us, which plan it was, and whether old entries are to be flushed on confirm. It
is written before the ruleset changes, so it is there after a crash; /run does
not survive a reboot, and neither do the rules.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Optional

from ctrace.errors import CtraceError

DIRECTORY = "/run/ctrace"
VARIABLE = "CTRACE_STATE"
"""Environment variable that names another directory."""


@dataclass(frozen=True)
class Note:
    """What apply did in one namespace."""

    netns: int
    boot: str
    """/proc/sys/kernel/random/boot_id: a note of an earlier boot means nothing."""
    plan: str
    """The plan's JSON."""
    applied: int
    """UTC seconds."""
    deadline: float
    """Seconds of :func:`now` at which the trial ends; 0 once confirmed."""
    flush: bool
    made: tuple[str, ...] = ()
    """Tables that did not exist before: ``iptables-nft ip raw``."""
    listing: str = ""
    """Our rules as the kernel listed them when they were confirmed, without counters."""
    placed: bool = False
    """Whether its rules are in place: from then on they are watched."""
    before: tuple[tuple[str, float], ...] = ()
    """Rise of the namespace's counters per second before the change."""
    waiting: int = 0
    """Connections that were waiting for a first answer then."""
    probes: tuple[tuple[str, int], ...] = ()
    """(address, port) pairs that could be connected to from here then."""
    said: str = ""
    """What has happened to the change since, in one sentence; empty: nothing."""
    off: bool = False
    """Confirmed, but its services are tracked for now; ``said`` gives the reason."""
    over: bool = False
    """Its rules were removed; the note stays to say why."""

    def confirmed(self, listing: str) -> Note:
        """The note of a change that stays."""
        return replace(self, deadline=0, listing=listing, said="", off=False)

    def ended(self, said: str) -> Note:
        """The note of a change that something took away."""
        return replace(self, deadline=0, listing="", said=said, over=True)


def directory() -> Path:
    """The state directory, made with mode 0700. Raises CtraceError when it is not ours."""
    path = Path(os.environ.get(VARIABLE) or DIRECTORY)
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise CtraceError(f"cannot use {path}: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        mend = ": remove it first" if os.geteuid() == 0 else ""
        raise CtraceError(f"{path} is not a private directory of this user{mend}")
    return path


TURN_S = 30.0
"""Seconds to wait for another ctrace's change: a guard renews a lease in a fraction of one, and in
some on a loaded host."""


@contextmanager
def locked(netns: int) -> Iterator[int]:
    """One change at a time in a namespace. Raises CtraceError when another does not end.

    Yields the lock's descriptor. A command that is given it keeps the lock until it ends, also
    when this process is killed.
    """
    with _turn(_file(netns, "lock"), TURN_S) as fd:
        if fd is None:
            raise CtraceError("another ctrace is changing rules right now: try again")
        yield fd


@contextmanager
def _turn(where: Path, patience_s: float) -> Iterator[Optional[int]]:
    """The file, locked by this process alone; None when that takes too long."""
    until = time.monotonic() + patience_s
    while True:
        fd = os.open(where, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if _lock(fd, fcntl.LOCK_EX) and _is(fd, where):  # else it was removed just now
                yield fd
                return
        finally:
            os.close(fd)
        if time.monotonic() > until:
            yield None
            return
        time.sleep(0.05)


@contextmanager
def guarding(netns: int, patience_s: float, lock: Optional[int] = None) -> Iterator[bool]:
    """Be the one process that guards a namespace's change; False when another is.

    ``lock``: from :func:`claim`, by the process that started this one. The file goes with the
    guard.
    """
    where = _file(netns, "guard")
    with ExitStack() as stack:
        held = lock if lock is not None else stack.enter_context(_turn(where, patience_s))
        if lock is not None:
            stack.callback(os.close, lock)
        if held is not None:
            stack.callback(where.unlink, missing_ok=True)
        yield held is not None


def claim(netns: int) -> Optional[int]:
    """A descriptor that makes its holder the namespace's guard; it can be handed to a new process,
    so that there is always a guard. None: another process guards it."""
    where = _file(netns, "guard")
    fd = os.open(where, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if _lock(fd, fcntl.LOCK_EX) and _is(fd, where):
        return fd
    os.close(fd)
    return None


def _is(fd: int, where: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), where.stat())
    except FileNotFoundError:
        return False


def guarded(netns: int) -> bool:
    """Whether a process guards a namespace's change. Reads only: /run may be read-only."""
    try:
        fd = os.open(_file(netns, "guard"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _lock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def _lock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def now() -> float:
    """Seconds since the boot that :func:`boot_id` names, suspended ones too: a wall clock that is
    set neither ends nor prolongs a trial."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """This boot's identity."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def read(netns: int) -> Optional[Note]:
    """The note for a namespace; None when there is none, or it is damaged or of another boot.

    Raises CtraceError when it cannot be read.
    """
    try:
        document: dict[str, Any] = json.loads(path(netns).read_text())
        note = Note(
            **{
                **document,
                "made": tuple(document["made"]),
                "before": tuple((str(k), float(v)) for k, v in document.get("before", ())),
                "probes": tuple((str(a), int(p)) for a, p in document.get("probes", ())),
            }
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    except OSError as error:
        raise CtraceError(f"cannot read {path(netns)}: {error.strerror}") from None
    return note if note.boot == boot_id() and note.netns == netns else None


def any_yet() -> bool:
    """Whether there is a state directory to read: looking makes none."""
    return os.path.isdir(os.environ.get(VARIABLE) or DIRECTORY)


def every() -> list[Note]:
    """All notes of this boot, by namespace. Raises CtraceError."""
    found = (read(inum) for inum in sorted(_noted()))
    return [note for note in found if note is not None]


def sweep(alive: Callable[[], Collection[int]], only: Optional[int] = None) -> None:
    """Remove the notes of namespaces that are gone (or of one), and of earlier boots; what else
    was left.

    ``alive`` is asked for the namespaces that exist while nobody applies anything in one that is
    thought to be gone: its number may have been given to another.
    """
    there = alive()
    for inum in {inum for kind in ("json", "new", "guard", "lock") for inum in _noted(kind)}:
        if only not in (None, inum):
            continue
        whole = not path(inum).exists() or read(inum) is not None
        if inum in there and whole and not _draft(inum).exists():
            continue
        with suppress(CtraceError), locked(inum):  # else it is changed just now
            _draft(inum).unlink(missing_ok=True)
            gone = inum not in alive()
            if gone or read(inum) is None:
                forget(inum)
            if gone:
                _file(inum, "guard").unlink(missing_ok=True)
                _file(inum, "lock").unlink(missing_ok=True)


def _file(netns: int, kind: str) -> Path:
    return directory() / f"netns-{int(netns)}.{kind}"


def _noted(kind: str = "json") -> list[int]:
    names = (re.fullmatch(rf"netns-(\d+)\.{kind}", name) for name in os.listdir(directory()))
    return [int(name[1]) for name in names if name]


def write(note: Note) -> None:
    """Write the note, whole or not at all."""
    where = path(note.netns)
    draft = _draft(note.netns)
    draft.unlink(missing_ok=True)
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        json.dump(asdict(note), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, where)


def forget(netns: int) -> None:
    """Remove the note."""
    path(netns).unlink(missing_ok=True)


def _draft(netns: int) -> Path:
    return _file(netns, "new")


def path(netns: int) -> Path:
    """Where the note of a namespace is."""
    return _file(netns, "json")
