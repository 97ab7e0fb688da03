"""The BPF programs, made before, for the kernel that runs.

``bpf/made`` holds each source compiled once for all kernels. What differs from kernel to
kernel, and from call to call, stands in the instructions as numbers that mean nothing
else (bpf/constants.h); :func:`instructions` writes the real ones over them, and
:func:`link` the descriptors of maps. The verifier takes them as the constants that they
are, so nothing is slower than if they had been compiled in.

Where a source has changed since it was compiled (in development), BCC compiles it now
and what came of it is kept on disk.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.digests import sha256
from ctrace.errors import CtraceError
from ctrace.kernel import compiler, disk_cache

MAP_BASE: Final = 1_000_001
"""The first fake map descriptor in C (bpf/maps.h)."""

# In bpf/constants.h: what a constant's position is added to, by the way it is used.
NUMBER_BASE: Final = 1_520_500_000
WORD_BASE: Final = 1_520_510_000
OFFSET_BASE: Final = 0x4000
WORD_OFFSET_BASE: Final = 0x5000
KFUNC_BASE: Final = 1_520_520_000
FETCH_OFFSET: Final = 0x7000
"""Flag in bpf/helpers.h, added to the offset of an atomic add that returns the old value (5.12)."""

TIMERS: Final = ("netfilter_first", "netfilter_before", "netfilter_after")
"""Programs of perf.c at netfilter's hooks, which `doctor` must know for ours."""
SOURCES: Final = ("function_hooks.c", "netfilter_hooks.c", "percpu.c", "chains.c", "perf.c")
ABSENT: Final = -1
SLOT_BITS: Final = 12
"""Bits of a place in the map SLOTS (bpf/netfilter_hooks.c)."""

_LD_IMM64: Final = 0x18
_MOV: Final = 0xB7
_CALL: Final = 0x85
_ATOMIC: Final = 0xDB
_ADD_FETCH: Final = 1
_PSEUDO_KFUNC_CALL: Final = 2
_PSEUDO_MAP_FD: Final = 1
_PSEUDO_MAP_VALUE: Final = 2
_LOADS_AND_STORES: Final = (0x61, 0x69, 0x71, 0x79, 0x62, 0x63, 0x6A, 0x6B, 0x72, 0x73, 0x7A, 0x7B)

Instructions = Mapping[str, bytes]
"""Program name to its instructions, ready to load once maps are linked."""


@dataclass(frozen=True)
class Made:
    """A compiled source."""

    digest: str
    """Digest of the C text that it was compiled from."""
    compiler: str
    """BCC's version."""
    constants: tuple[str, ...]
    """The names of bpf/constants.h by position."""
    programs: Instructions

    def to_bytes(self) -> bytes:
        """As stored on disk: equal content gives equal bytes."""
        text = json.dumps(
            {
                "digest": self.digest,
                "compiler": self.compiler,
                "constants": self.constants,
                "programs": {
                    name: base64.b64encode(code).decode() for name, code in self.programs.items()
                },
            }
        )
        return zlib.compress(text.encode(), 9)

    @classmethod
    def from_bytes(cls, data: bytes) -> Made:
        """The reverse. Raises ValueError when it is damaged."""
        try:
            told = json.loads(zlib.decompress(data))
            code = {name: base64.b64decode(text) for name, text in told["programs"].items()}
            return cls(told["digest"], told["compiler"], tuple(told["constants"]), code)
        except (zlib.error, KeyError, TypeError) as error:
            raise ValueError(str(error)) from None


def instructions(source: str, names: Sequence[str], constants: Mapping[str, int]) -> Instructions:
    """The programs of ``bpf/<source>`` with these constants; missing constants are marked as
    absent.

    Raises CtraceError when the source was changed and cannot be compiled.
    """
    casts = "RDONLY_CAST" in constants
    made = _made(source, casts)
    return {name: settle(made.programs[name], made.constants, constants) for name in names}


def constant_names() -> tuple[str, ...]:
    """``enum constant`` of bpf/constants.h, in its order."""
    text = (compiler.source_dir() / "constants.h").read_text()
    return tuple(re.findall(r"\bK_(\w+)", text.partition("};")[0]))


def settle(code: bytes, names: Sequence[str], constants: Mapping[str, int]) -> bytes:
    """The instructions with each placeholder replaced by the constant at its position."""
    rows, immediates, offsets = _columns(code)
    numbers = np.array([_signed(constants.get(name, ABSENT)) for name in names], np.int32)
    count = len(numbers)
    for base, mask in ((NUMBER_BASE, -1), (WORD_BASE, -8)):
        moves = (rows[:, 0] == _MOV) & (immediates >= base) & (immediates < base + count)
        immediates[moves] = numbers[immediates[moves] - base] & mask
    for base, mask in ((OFFSET_BASE, -1), (WORD_OFFSET_BASE, -8)):
        moves = np.isin(rows[:, 0], _LOADS_AND_STORES)
        moves &= (offsets >= base) & (offsets < base + count)
        offsets[moves] = (numbers[offsets[moves].astype(np.int32) - base] & mask).astype(np.int16)
    calls = (rows[:, 0] == _CALL) & (immediates >= KFUNC_BASE) & (immediates < KFUNC_BASE + count)
    rows[calls, 1] |= _PSEUDO_KFUNC_CALL << 4
    immediates[calls] = numbers[immediates[calls] - KFUNC_BASE]
    return rows.tobytes()


def link(code: bytes, maps: Sequence[int], *, fetch_add: bool) -> bytes:
    """The instructions with the fake descriptors replaced by ``maps``, by position.

    ``fetch_add``: the kernel accepts atomic adds that return the old value; without it, code that
    uses them is never reached.
    """
    rows, immediates, offsets = _columns(code)
    loads = (rows[:, 0] == _LD_IMM64) & np.isin(
        rows[:, 1] >> 4, (_PSEUDO_MAP_FD, _PSEUDO_MAP_VALUE)
    )
    for row in np.flatnonzero(loads):
        immediates[row] = maps[int(immediates[row]) - MAP_BASE]
    fetching = (rows[:, 0] == _ATOMIC) & (offsets >= FETCH_OFFSET)
    immediates[fetching] = _ADD_FETCH if fetch_add else 0
    offsets[fetching] -= FETCH_OFFSET
    return rows.tobytes()


def _columns(
    code: bytes,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32], npt.NDArray[np.int16]]:
    """A copy of the instructions as bytes (n, 8), with its immediates and its offsets."""
    rows = np.frombuffer(bytearray(code), np.uint8).reshape(-1, 8)
    return rows, rows.view(np.int32)[:, 1], rows.view(np.int16)[:, 1]


def _signed(value: int) -> int:
    """As an instruction holds 32 bits."""
    if not -(1 << 31) <= value < 1 << 32:
        raise CtraceError(f"a constant of the hooks has more than 32 bits: {value}")
    return value - (1 << 32) if value >= 1 << 31 else value


# -- where they come from ------------------------------------------------------------------


def made_file(source: str, casts: bool) -> Path:
    """Where a compiled source is stored."""
    kind = "cast" if casts else "plain"
    return compiler.source_dir() / "made" / f"{Path(source).stem}-{kind}.bpf"


def digest(source: str) -> str:
    """Digest of all C text that the compiled source depends on."""
    total = sha256()
    for file in (compiler.source_dir() / source, *sorted(compiler.source_dir().rglob("*.h"))):
        total.update(file.read_bytes())
    return total.hexdigest()[:32]


def check() -> None:
    """Whether the programs or a compiler are available. Raises CtraceError when not."""
    if not all(map(is_made, SOURCES)):
        compiler.find()


def is_made(source: str) -> bool:
    """Whether the source, in its present state, has been compiled."""
    return all(_before(source, casts) is not None for casts in (False, True))


def _before(source: str, casts: bool) -> Optional[Made]:
    try:
        before = Made.from_bytes(made_file(source, casts).read_bytes())
    except (OSError, ValueError):
        return None
    return before if before.digest == digest(source) else None


@cache
def _made(source: str, casts: bool) -> Made:
    before = _before(source, casts)
    if before is not None:
        return before
    depends_on = (digest(source).encode(), bytes([casts]), compiler.version().encode())
    name = disk_cache.name(Path(source).stem, *depends_on)
    kept = _kept(disk_cache.load(name))
    if kept is None:
        kept = make(source, casts)
        disk_cache.store(name, kept.to_bytes())
    return kept


def _kept(data: Optional[bytes]) -> Optional[Made]:
    try:
        return None if data is None else Made.from_bytes(data)
    except ValueError:
        return None


def make(source: str, casts: bool) -> Made:
    """Compile a source now. Raises CtraceError when BCC is missing or refuses it."""
    text = (compiler.source_dir() / source).read_text()
    names = re.findall(r"^int (\w+)\(", text, re.M)
    code = compiler.compile_programs(source, names, ["-DCAST"] if casts else [])
    return Made(digest(source), compiler.version(), constant_names(), code)
