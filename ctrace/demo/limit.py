"""Lowering nf_conntrack_max for a while, and putting it back whatever happens."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

from ctrace.errors import CtraceError, UsageError
from ctrace.host.netns import find
from ctrace.host.tables import TableReader

FILE: Final = "/proc/sys/net/netfilter/nf_conntrack_max"
LOWEST: Final = 512

_WATCHDOG: Final = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
path, old, ours = sys.argv[1:4]
os.read(0, 1)  # returns when the other end is closed, by whatever ended its process
with open(path) as file:
    now = file.read().strip()
if now == ours:
    with open(path, "w") as file:
        file.write(old)
"""
"""Restores the setting if it is still ours; a change by somebody else meanwhile stays."""


def read_limit() -> int:
    """The host's nf_conntrack_max. Raises CtraceError."""
    try:
        with open(FILE, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError) as error:
        raise CtraceError("nf_conntrack_max cannot be read: modprobe nf_conntrack first") from error


def check_limit(limit: int) -> int:
    """The present limit, if it may be lowered to this one. Raises CtraceError."""
    if limit < LOWEST:
        raise UsageError(f"--lower-max is at least {LOWEST}")
    old = read_limit()
    if old and limit >= old:
        raise UsageError(f"--lower-max {limit} is not below the present {old:,}")
    return old


class LoweredLimit:
    """The limit is lowered while this object is open.

    Raises UsageError when some namespace holds more entries than the new limit: it
    would begin to refuse new flows at once.
    """

    def __init__(self, limit: int) -> None:
        self.old = check_limit(limit)
        spaces = find()
        reader = TableReader()
        try:
            full = [one for one in reader.read(spaces) if one.count >= limit // 2]
        finally:
            reader.close()
        if full:
            names = {space.inum: space.name for space in spaces}
            where = names.get(full[0].netns, str(full[0].netns))
            raise UsageError(
                f"{where} holds {full[0].count:,} entries: lowering the limit to {limit:,} could "
                "refuse its flows; leave out --lower-max, which changes nothing on the host"
            )
        self._watchdog = subprocess.Popen(
            [sys.executable, "-I", "-c", _WATCHDOG, FILE, str(self.old), str(limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            with open(FILE, "w", encoding="ascii") as file:
                file.write(str(limit))
        except OSError as error:
            self.close()
            raise CtraceError(
                f"nf_conntrack_max cannot be written here: {os.strerror(error.errno or 0)}"
            ) from error

    def close(self) -> None:
        """Put it back; safe to call twice."""
        if self._watchdog.stdin is not None and not self._watchdog.stdin.closed:
            self._watchdog.stdin.close()
        self._watchdog.wait(10)
