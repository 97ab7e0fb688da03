"""The note that apply leaves under /run/ctrace: what was there before, and until when.

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
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
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
    deadline: int
    """UTC seconds at which the kernel disarms the rules; 0 once confirmed."""
    flush: bool
    made: tuple[str, ...] = ()
    """Tables that did not exist before: ``iptables-nft ip raw``."""
    listing: str = ""
    """Our rules as the kernel listed them when they were confirmed, without counters."""
    said: str = ""
    """What happened to the change since, in one sentence; empty: nothing."""

    def confirmed(self, listing: str) -> Note:
        """The note of a change that stays."""
        return replace(self, deadline=0, listing=listing, said="")


def directory() -> Path:
    """The state directory, made with mode 0700. Raises CtraceError when it is not ours."""
    path = Path(os.environ.get(VARIABLE) or DIRECTORY)
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise CtraceError(f"cannot use {path}: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise CtraceError(f"{path} is not a private directory of this user: remove it first")
    return path


@contextmanager
def locked() -> Iterator[None]:
    """One change at a time on this host. Raises CtraceError when another is under way."""
    fd = os.open(directory() / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CtraceError("another ctrace is changing rules right now: try again") from None
        yield
    finally:
        os.close(fd)


def boot_id() -> str:
    """This boot's identity."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def read(netns: int) -> Optional[Note]:
    """The note for a namespace; None when there is none, or it is damaged or of another boot."""
    try:
        document: dict[str, Any] = json.loads(_path(netns).read_text())
        note = Note(**{**document, "made": tuple(document["made"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return note if note.boot == boot_id() and note.netns == netns else None


def every() -> list[Note]:
    """All notes of this boot, by namespace. Raises CtraceError."""
    found = (read(inum) for inum in sorted(_noted()))
    return [note for note in found if note is not None]


def sweep(alive: Collection[int]) -> None:
    """Remove the notes of namespaces that are gone, and of earlier boots."""
    for inum in _noted():
        if inum not in alive or read(inum) is None:
            forget(inum)


def _noted() -> list[int]:
    names = (re.fullmatch(r"netns-(\d+)\.json", name) for name in os.listdir(directory()))
    return [int(name[1]) for name in names if name]


def write(note: Note) -> None:
    """Write the note, whole or not at all."""
    path = _path(note.netns)
    draft = path.with_suffix(".new")
    with suppress(FileNotFoundError):
        draft.unlink()
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        json.dump(asdict(note), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def forget(netns: int) -> None:
    """Remove the note."""
    with suppress(FileNotFoundError):
        _path(netns).unlink()


def _path(netns: int) -> Path:
    return directory() / f"netns-{int(netns)}.json"
