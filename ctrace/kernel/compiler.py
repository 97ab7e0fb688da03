"""C to BPF instructions, using BCC only as a compiler.

Used when ctrace is built (scripts/programs) and in development; an installed ctrace has its
programs already (:mod:`ctrace.kernel.programs`). BCC (LLVM) runs in a short-lived child process.
Maps and programs are created by us: the C code refers to map *i* by a fake descriptor.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from ctrace.errors import CtraceError
from ctrace.host import kernel


@cache
def source_dir() -> Path:
    """Where the C sources are: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for place in (package / "bpf", package.parent / "bpf"):
        if (place / "record.h").exists():
            return place
    raise CtraceError("the BPF sources are missing from this installation: install ctrace again")


def version() -> str:
    """The compiler's version; empty when there is none."""
    return kernel.bcc().version


def find() -> kernel.Bcc:
    """The compiler. Raises CtraceError when there is none."""
    found = kernel.bcc()
    if found.problem:
        raise CtraceError(
            "the sources of the hooks were changed since they were compiled (scripts/programs), "
            f"and there is no compiler: {found.problem}"
        )
    return found


def compile_programs(
    source: str, programs: Sequence[str], options: Sequence[str]
) -> Mapping[str, bytes]:
    """Compile ``bpf/<source>`` and return the named programs' instructions.

    Raises CtraceError with the compiler's first error, or when BCC is missing.
    """
    compiler = find()
    # the fields of an entry are read by offset, as one type and another
    flags = [f"-I{source_dir()}", "-fno-strict-aliasing", *options]
    text = (source_dir() / source).read_text()
    request = {"text": text, "programs": list(programs), "cflags": flags}
    done = subprocess.run(
        # -I: no variable and no current folder says what it imports
        [compiler.python, "-I", str(Path(__file__).with_name("bcc_child.py"))],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=dict(os.environ, BCC_KERNEL_SOURCE=str(source_dir()), BCC_PROBE_TYPE="none"),
        cwd="/",
        check=False,
    )
    if done.returncode:
        raise CtraceError(_reason(done.stderr, done.returncode))
    return {name: base64.b64decode(code) for name, code in json.loads(done.stdout).items()}


def _reason(stderr: str, status: int) -> str:
    if status < 0:
        return f"BCC was killed by signal {-status} while it compiled the hooks"
    lines = [line for line in stderr.splitlines() if line.strip()]
    first = next((line for line in lines if "error:" in line), lines[-1] if lines else "no message")
    return f"BCC cannot compile the hooks: {first.strip()}"
