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
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Final, Optional

import numpy as np

from ctrace.errors import CtraceError
from ctrace.host import kernel
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
        *(part.encode() for part in (*cflags, *programs, kernel.bcc().version)),
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
    compiler = kernel.bcc()
    if compiler.problem:
        raise CtraceError(f"the hooks cannot be compiled: {compiler.problem}")
    text = (source_dir() / source).read_text()
    request = {"text": text, "programs": list(programs), "cflags": list(cflags)}
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
