"""Where the person who runs ctrace is connected from."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from ipaddress import ip_address
from typing import Final, NamedTuple, Optional

DEEPEST: Final = 64
"""Parent processes to search at most."""


class Connected(NamedTuple):
    """An ssh connection, as sshd passes it to its children (SSH_CONNECTION)."""

    client: str
    port: int
    """The port of this host that sshd has the connection on."""
    sport: int = 0
    """The client's; 0: not known."""


def connected(proc: str = "/proc", pid: Optional[int] = None) -> Optional[Connected]:
    """The ssh connection of this process or of one of its parents, or None.

    sudo removes the variable, so parents are searched too.
    """
    now = os.getpid() if pid is None else pid
    for _ in range(DEEPEST):
        found = _told(proc, now)
        if found is not None:
            return found
        now = _parent(proc, now)
        if now <= 1:
            return None
    return None


def _told(proc: str, pid: int) -> Optional[Connected]:
    with suppress(OSError), open(f"{proc}/{pid}/environ", "rb") as file:
        for one in file.read().split(b"\0"):
            name, _, value = one.partition(b"=")
            words = value.decode("ascii", "replace").split()
            if name == b"SSH_CONNECTION" and len(words) == 4 and words[3].isdecimal():
                client = words[0].partition("%")[0]
                with suppress(ValueError):  # UNKNOWN where sshd was not called by a socket
                    return Connected(str(ip_address(client)), int(words[3]), int(words[1]))
    return None


def _parent(proc: str, pid: int) -> int:
    with suppress(OSError), open(f"{proc}/{pid}/status") as file:
        found = re.search(r"^PPid:\s*(\d+)", file.read(), re.M)
        return int(found[1]) if found else 0
    return 0
