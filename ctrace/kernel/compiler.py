"""C to BPF instructions, with BCC as a compiler and nothing else.

BCC (LLVM) lives in a short child process; what it made is kept on disk, keyed by
everything it depends on, so a second start needs no compiler at all and this
process stays small. Maps and programs are created by us (:mod:`ctrace.kernel.bpf`):
the C code names map *i* by the fake descriptor ``MAP_BASE + i``, which
:func:`link` replaces by the real one.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Final, Optional

import numpy as np

from ctrace.errors import CtraceError
from ctrace.kernel import disk_cache

MAP_BASE: Final = 1_000_001
"""The first fake map descriptor in C (bpf/maps.h)."""

KFUNC_BASE: Final = 1_000_001
"""What is added in C (bpf/helpers.h) to the BTF id of a kernel function, which tells its
call from a helper's."""

FETCH_OFFSET: Final = 0x7000
"""What is added in C (bpf/helpers.h) to the offset of an addition that gives the old value."""

_LD_IMM64: Final = 0x18
_CALL: Final = 0x85
_ATOMIC: Final = 0xDB
_ADD_FETCH: Final = 1
_PSEUDO_KFUNC_CALL: Final = 2
_PSEUDO_MAP_FD: Final = 1
_PSEUDO_MAP_VALUE: Final = 2

Instructions = Mapping[str, bytes]
"""Program name to its unlinked instructions."""


@cache
def source_dir() -> Path:
    """Where the C sources are: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for place in (package / "bpf", package.parent / "bpf"):
        if (place / "record.h").exists():
            return place
    raise CtraceError("the BPF sources are missing from this installation: install ctrace again")


def compile_programs(
    source: str, programs: Sequence[str], defines: Mapping[str, int | str]
) -> Instructions:
    """Compile ``bpf/<source>`` with ``-D`` defines and return the named programs' instructions.

    Raises CtraceError with the compiler's first error, or when BCC is missing.
    """
    cflags = [f"-I{source_dir()}"] + [f"-D{name}={value}" for name, value in defines.items()]
    files = (source_dir() / source, *sorted(source_dir().rglob("*.h")))
    name = disk_cache.name(
        Path(source).stem,
        *(part.encode() for part in (*cflags, *programs, _compiler_identity())),
        *(file.read_bytes() for file in files),
    )
    cached = _decoded(disk_cache.load(name))
    if cached is not None:
        return cached
    made = _compile(source, programs, cflags)
    text = json.dumps({name: base64.b64encode(code).decode() for name, code in made.items()})
    disk_cache.store(name, text.encode())
    return made


def _decoded(text: Optional[bytes]) -> Optional[Instructions]:
    try:
        return {name: base64.b64decode(code) for name, code in json.loads(text or b"").items()}
    except ValueError:
        return None


def link(instructions: bytes, maps: Sequence[int]) -> bytes:
    """The instructions with fake map descriptors replaced by ``maps``, by position, and
    with what the compiler has no words for: calls of kernel functions, fetching additions."""
    code = np.frombuffer(bytearray(instructions), np.uint8).reshape(-1, 8)
    immediates = code.view(np.int32)[:, 1]
    loads = (code[:, 0] == _LD_IMM64) & np.isin(
        code[:, 1] >> 4, (_PSEUDO_MAP_FD, _PSEUDO_MAP_VALUE)
    )
    for row in np.flatnonzero(loads):
        immediates[row] = maps[int(immediates[row]) - MAP_BASE]
    calls = (code[:, 0] == _CALL) & (code[:, 1] >> 4 == 0) & (immediates >= KFUNC_BASE)
    code[calls, 1] |= _PSEUDO_KFUNC_CALL << 4
    immediates[calls] -= KFUNC_BASE
    offsets = code.view(np.int16)[:, 1]
    fetching = (code[:, 0] == _ATOMIC) & (offsets >= FETCH_OFFSET)
    immediates[fetching] = _ADD_FETCH
    offsets[fetching] -= FETCH_OFFSET
    return code.tobytes()


# -- the child ---------------------------------------------------------------------------


def _compile(source: str, programs: Sequence[str], cflags: Sequence[str]) -> Instructions:
    request = json.dumps({"source": source, "programs": list(programs), "cflags": list(cflags)})
    environment = dict(os.environ, BCC_KERNEL_SOURCE=str(source_dir()), BCC_PROBE_TYPE="none")
    package_root = str(Path(__file__).resolve().parent.parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(
        part for part in (package_root, os.environ.get("PYTHONPATH", "")) if part
    )
    done = subprocess.run(
        [sys.executable, "-m", "ctrace.kernel.compiler"],
        input=request,
        capture_output=True,
        text=True,
        env=environment,
        cwd=package_root,  # -m imports from the current folder first, whoever owns that
        check=False,
    )
    if done.returncode:
        raise CtraceError(_reason(done.stderr, done.returncode))
    return {name: base64.b64decode(code) for name, code in json.loads(done.stdout).items()}


def _reason(stderr: str, status: int) -> str:
    if "No module named 'bcc'" in stderr:
        return (
            "BCC is not installed: install python3-bpfcc (Debian, Ubuntu) or python3-bcc "
            "(Fedora, RHEL), or use --hooks netlink"
        )
    if status < 0:
        return f"BCC was killed by signal {-status} while it compiled the hooks"
    lines = [line for line in stderr.splitlines() if line.strip()]
    first = next((line for line in lines if "error:" in line), lines[-1] if lines else "no message")
    return f"BCC cannot compile the hooks: {first.strip()}"


def _child() -> None:
    """Read a request on standard input, answer with the instructions as JSON."""
    from bcc import BPF  # heavy: only ever imported in this process

    request = json.load(sys.stdin)
    text = (source_dir() / request["source"]).read_text()
    built = BPF(text=text, cflags=request["cflags"])
    code = {
        name: base64.b64encode(built.dump_func(name.encode())).decode()
        for name in request["programs"]
    }
    json.dump(code, sys.stdout)


def _compiler_identity() -> str:
    """BCC's version as its installation says it, without importing it."""
    for root in sys.path:
        version = Path(root) / "bcc" / "version.py"
        if version.exists():
            found = re.search(r"__version__ = '([^']*)'", version.read_text())
            return found.group(1) if found else str(version.stat().st_mtime_ns)
    return "none"


if __name__ == "__main__":
    _child()
