"""Running nft, iptables and conntrack in the namespace that this thread is in; and what a person
types to run them there.

``prefix`` is made where the namespace is read (:class:`ctrace.advice.facts.Facts` keeps
it as ``enter``), ``inside`` where a command is put together for display.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, Optional

from ctrace.errors import CtraceError, TryAgain
from ctrace.host.netns import Namespace

PATIENCE_S: Final = 30.0
"""Seconds: how much of a processor's time a tool may take, and how long it may sleep at a stretch.
Waiting for a processor is neither: on a loaded host that alone can take minutes."""
LONGEST_S: Final = 900.0
SBIN = ":/usr/local/sbin:/usr/sbin:/sbin"
_NAMED = "/run/netns/"
_PROC = re.compile(r"/proc/(\d+)/ns/net\Z")
_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})


def have(tool: str) -> bool:
    """Whether a command is installed, also where sbin is not in the path."""
    return find(tool) is not None


def find(tool: str) -> Optional[str]:
    """The path of a command, also where sbin is not in the path; None: it is not installed."""
    return shutil.which(tool, path=_path())


def output(
    argv: Sequence[str],
    stdin: str = "",
    patience: float = PATIENCE_S,
    more: Mapping[str, str] = _NOTHING,
    keep: tuple[int, ...] = (),
) -> tuple[int, str, str]:
    """Exit status, standard output and the first line of standard error.

    ``patience``: as :data:`PATIENCE_S`. ``more``: of the environment; ``keep``: descriptors that
    the command has, too. Raises CtraceError when the command is not there or can't be started,
    TryAgain when it does not come back.
    """
    status, text, complaint = _ended(argv, stdin, patience, more, keep)
    said = [line for line in complaint.splitlines() if line.strip()]
    return status, text, said[0].strip() if said else ""


def complaints(argv: Sequence[str], stdin: str = "") -> tuple[int, list[str]]:
    """Exit status and all lines of standard error. Raises CtraceError as :func:`output` does."""
    status, _, complaint = _ended(argv, stdin, PATIENCE_S)
    return status, complaint.splitlines()


def _ended(
    argv: Sequence[str],
    stdin: str,
    patience: float,
    more: Mapping[str, str] = _NOTHING,
    keep: tuple[int, ...] = (),
) -> tuple[int, str, str]:
    program = find(argv[0])
    if program is None:
        raise CtraceError(f"{argv[0]} is not installed, and this needs it")
    try:
        with os.fdopen(os.memfd_create("stdin"), "wb+") as given:
            given.write(stdin.encode(errors="replace"))
            given.seek(0)
            with subprocess.Popen(
                [program, *argv[1:]],
                stdin=given,  # no pipe: with a timeout communicate() may lose what it writes
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={**os.environ, "LC_ALL": "C", **more},
                pass_fds=keep,
            ) as process:
                try:
                    text, complaint = _heard(process, argv[0], patience)
                except BaseException:
                    process.kill()
                    raise
    except OSError as error:  # no process, memory or descriptor left
        raise CtraceError(f"{argv[0]} cannot be started: {error.strerror}") from None
    return process.returncode, text, complaint


def _heard(process: subprocess.Popen[str], name: str, patience: float) -> tuple[str, str]:
    """Standard output and error, once it has ended. Raises TryAgain."""
    until = time.monotonic() + max(LONGEST_S, patience)
    before = -1.0
    while True:
        try:
            return process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            asleep, spent = _progress(process.pid)
        if spent >= patience:
            raise TryAgain(f"{name} took more than {patience:.0f} s of a processor's time")
        if (asleep and spent == before) or time.monotonic() > until:
            raise TryAgain(f"{name} does not come to an end")
        before = spent


def _progress(pid: int) -> tuple[bool, float]:
    """Whether a process sleeps until something else happens, and the seconds of a processor's time
    that it has had (proc_pid_stat(5))."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return False, 0.0
    return fields[0] in "STt", sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def run(
    argv: Sequence[str],
    stdin: str = "",
    more: Mapping[str, str] = _NOTHING,
    keep: tuple[int, ...] = (),
) -> str:
    """Standard output. Raises CtraceError with the command's own first complaint."""
    status, text, complaint = output(argv, stdin, PATIENCE_S, more, keep)
    if status != 0:
        raise CtraceError(f"{argv[0]} refused: {complaint or f'exit status {status}'}")
    return text


def _path() -> str:
    return (os.environ.get("PATH") or "/usr/bin:/bin") + SBIN


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
