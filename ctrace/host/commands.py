"""Running nft, iptables and conntrack in the namespace that this thread is in."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from ctrace.errors import CtraceError

TIMEOUT_S = 30
SBIN = ":/usr/local/sbin:/usr/sbin:/sbin"


def have(tool: str) -> bool:
    """Whether a command is installed, also where sbin is not in the path."""
    return shutil.which(tool, path=_path()) is not None


def output(
    argv: Sequence[str], stdin: str = "", timeout: float = TIMEOUT_S
) -> tuple[int, str, str]:
    """Exit status, standard output and the first line of standard error.

    Raises CtraceError when the command is not there or does not come back.
    """
    program = shutil.which(argv[0], path=_path())
    if program is None:
        raise CtraceError(f"{argv[0]} is not installed, and this needs it")
    try:
        done = subprocess.run(
            [program, *argv[1:]],
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise CtraceError(f"{argv[0]} did not come back within {timeout:.0f} s") from None
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return done.returncode, done.stdout, said[0].strip() if said else ""


def run(argv: Sequence[str], stdin: str = "") -> str:
    """Standard output. Raises CtraceError with the command's own first complaint."""
    status, text, complaint = output(argv, stdin)
    if status != 0:
        raise CtraceError(f"{argv[0]} refused: {complaint or f'exit status {status}'}")
    return text


def _path() -> str:
    return os.environ.get("PATH", "/usr/bin:/bin") + SBIN
