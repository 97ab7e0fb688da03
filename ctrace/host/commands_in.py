"""Commands for a person's shell, written so that they run in the right network namespace.

``prefix`` is made where the namespace is read (:class:`ctrace.advice.facts.Facts` keeps
it as ``enter``), ``inside`` where a command is put together for display.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence

from ctrace.host.netns import Namespace

_NAMED = "/run/netns/"
_PROC = re.compile(r"/proc/(\d+)/ns/net\Z")


def prefix(namespace: Namespace) -> tuple[str, ...]:
    """The words before a command that make it run in ``namespace``.

    Empty for the namespace that this process is in, so also its shell's; ``ip netns
    exec`` where ip-netns(8) knows a name; else ``nsenter`` by process or by mount.
    """
    try:
        if os.stat("/proc/self/ns/net").st_ino == namespace.inum:
            return ()
    except OSError:
        pass
    path = namespace.path.replace("/var/run/", "/run/", 1)
    if path.startswith(_NAMED) and "/" not in path[len(_NAMED) :]:
        return ("ip", "netns", "exec", path[len(_NAMED) :])
    process = _PROC.match(path)
    if process:
        return ("nsenter", "-t", process[1], "-n")
    return ("nsenter", f"--net={namespace.path}")


def inside(enter: Sequence[str], command: str) -> str:
    """A shell command, of any shape, as it is typed to run in a namespace.

    ``enter`` is a :func:`prefix`. A plain command follows it directly; one with pipes,
    quotes or several lines becomes the argument of ``sh -c``: only the first command of a
    pipe would be in the namespace otherwise.
    """
    if not enter:
        return command
    words = shlex.join(enter)
    if re.search(r"[|;&<>$`'\"\\\n(){}*?#]", command):
        return f"{words} sh -c {shlex.quote(command)}"
    return f"{words} {command}"
