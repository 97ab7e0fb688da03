"""Our own Python code in a process of its own, with nothing of a stranger's folder in it."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Final

_START: Final = """
import runpy, sys
root, paths = sys.argv.pop(1), sys.path
paths.insert(0, root)
import ctrace
del paths[0]
if root.endswith("-packages") and root not in paths:
    paths.insert(next((n for n, one in enumerate(paths) if one.endswith("-packages")), 9), root)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
"""Finds this very ctrace first, whichever else is installed. Its folder does not stay in front of
the standard library, parts of which it could replace; what pip put beside it comes before what
the distribution has."""


def called() -> str:
    """What to type for ctrace as root: ``sudo ctrace`` where that is found, in a checkout ``sudo
    scripts/ctrace``, else the one file that runs."""
    root = Path(__file__).resolve().parent.parent
    script, file = root / "scripts" / "ctrace", Path(sys.argv[0])
    if shutil.which("ctrace"):
        name = "ctrace"
    elif script.is_file():
        name = "scripts/ctrace" if Path.cwd() == root else shlex.quote(str(script))
    elif file.name.startswith("ctrace") and file.is_file():
        name = shlex.quote(str(file.absolute()))
    else:
        name = "ctrace"
    return f"sudo {name}"


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module of this ctrace as ``python -m`` would, but isolated.

    ``-I`` ignores PYTHON* variables, the user's own packages and the current folder, from
    which ``-m`` alone imports first. For ``subprocess``; root may run it anywhere.
    """
    root = str(Path(__file__).resolve().parent.parent)
    return [sys.executable, "-I", "-c", _START, root, name, *arguments]


PR_SET_PDEATHSIG: Final = 1
"""linux/prctl.h"""


def end_with_parent(number: signal.Signals, parent: int = 0) -> None:
    """This process gets the signal when the thread that started it ends, however it ends.

    ``parent``: its process; where that has gone already this one ends at once.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if parent and os.getppid() != parent:
        sys.exit(1)
