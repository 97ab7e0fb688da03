"""Running nft, iptables and conntrack in the namespace that this thread is in."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, Optional

from ctrace.errors import CtraceError

TIMEOUT_S = 30
SBIN = ":/usr/local/sbin:/usr/sbin:/sbin"
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
    timeout: float = TIMEOUT_S,
    more: Mapping[str, str] = _NOTHING,
    keep: tuple[int, ...] = (),
) -> tuple[int, str, str]:
    """Exit status, standard output and the first line of standard error.

    ``more``: of the environment; ``keep``: descriptors that the command has, too. Raises
    CtraceError when the command is not there, can't be started or does not come back.
    """
    done = _ended(argv, stdin, timeout, more, keep)
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return done.returncode, done.stdout, said[0].strip() if said else ""


def complaints(argv: Sequence[str], stdin: str = "") -> tuple[int, list[str]]:
    """Exit status and all lines of standard error. Raises CtraceError as :func:`output` does."""
    done = _ended(argv, stdin, TIMEOUT_S)
    return done.returncode, done.stderr.splitlines()


def _ended(
    argv: Sequence[str],
    stdin: str,
    timeout: float,
    more: Mapping[str, str] = _NOTHING,
    keep: tuple[int, ...] = (),
) -> subprocess.CompletedProcess[str]:
    program = find(argv[0])
    if program is None:
        raise CtraceError(f"{argv[0]} is not installed, and this needs it")
    try:
        return subprocess.run(
            [program, *argv[1:]],
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            env={**os.environ, "LC_ALL": "C", **more},
            pass_fds=keep,
        )
    except subprocess.TimeoutExpired:
        raise CtraceError(f"{argv[0]} did not finish within {timeout:.0f} s") from None
    except OSError as error:  # no process, memory or descriptor left
        raise CtraceError(f"{argv[0]} cannot be started: {error.strerror}") from None


def run(
    argv: Sequence[str],
    stdin: str = "",
    more: Mapping[str, str] = _NOTHING,
    keep: tuple[int, ...] = (),
) -> str:
    """Standard output. Raises CtraceError with the command's own first complaint."""
    status, text, complaint = output(argv, stdin, TIMEOUT_S, more, keep)
    if status != 0:
        raise CtraceError(f"{argv[0]} refused: {complaint or f'exit status {status}'}")
    return text


def _path() -> str:
    return (os.environ.get("PATH") or "/usr/bin:/bin") + SBIN
