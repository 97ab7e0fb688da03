"""A plan's file: a regular file, owned by somebody who may decide what root does."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from ctrace import files
from ctrace.errors import CtraceError, UsageError
from ctrace.plan.plan import MAX_BYTES, Plan, from_json


def read(path: str, *, unasked: bool = False) -> Plan:
    """The plan in a file, or on standard input for ``-``. Raises CtraceError in one line.

    ``unasked``: nobody will look at it before it is applied, so it must not be one
    that another user could have put there (:func:`_refuse_theirs`, a UsageError).
    """
    text = _text(path, unasked)
    try:
        return from_json(text)
    except UsageError as error:  # of the file, not of the words that named it
        raise CtraceError(str(error)) from None


def _text(path: str, unasked: bool) -> str:
    if path == "-":
        try:
            return sys.stdin.read(MAX_BYTES + 1)
        except UnicodeDecodeError:
            raise CtraceError("standard input is not a plan: it is not text") from None
    try:
        # A pipe that nobody writes to would hold up open itself.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise CtraceError(
                    f"{path} is not a regular file: give the file that advise --plan wrote, or - "
                    "to read a plan from standard input"
                )
            if unasked:
                _refuse_theirs(path, found)
            return files.taken(fd, MAX_BYTES + 1).decode()
        finally:
            os.close(fd)
    except OSError as error:
        raise CtraceError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CtraceError(f"{path} is not a plan: it is not text") from None


def _refuse_theirs(path: str, found: os.stat_result) -> None:
    """Raise UsageError when anyone but root, or the user who called sudo, can change the file."""
    trusted = {0, os.geteuid()}
    if os.environ.get("SUDO_UID", "").isdecimal():
        trusted.add(int(os.environ["SUDO_UID"]))
    why = ""
    if found.st_uid not in trusted:
        why = f"belongs to user {found.st_uid}"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        why = "may be written to by others"
    else:
        why = _foreign_way(Path(os.path.abspath(path)), trusted, set())
    if why:
        raise UsageError(
            f"{path} {why}: look at it and apply it without -y, or copy it to a place of your own"
        )


def _foreign_way(path: Path, trusted: set[int], seen: set[Path]) -> str:
    """Why others can replace the file that ``path`` leads to; empty when they can't."""
    for place in (path, *path.parents):
        found = place.lstat()
        if stat.S_ISLNK(found.st_mode):
            if found.st_uid not in trusted:
                return f"lies behind {place}, a link of user {found.st_uid}"
            if place not in seen:
                target = place.parent / os.readlink(place)
                why = _foreign_way(Path(os.path.normpath(target)), trusted, seen | {place})
                if why:
                    return why
        elif stat.S_ISDIR(found.st_mode):
            if found.st_uid not in trusted:
                return f"lies in {place}, a folder of user {found.st_uid}"
            open_to_all = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if open_to_all and not found.st_mode & stat.S_ISVTX:
                return f"lies in {place}, where others may exchange it"
    return ""
