"""The hash table's chains as they are, walked by bpf/chains.c on request.

The table is found by its symbol where the kernel lists data (KALLSYMS_ALL), else from
any entry in it. Either way the walk proves it: each chain ends with its own bucket's
number.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np

from ctrace.capture import compiler, layout, sys
from ctrace.errors import CtraceError
from ctrace.model.perf import Chains, chains

SAMPLE: Final = 1 << 16
"""Buckets walked at most, evenly spaced: about 10 ms in short steps."""
RUNS: Final = 1 << 14
LENGTHS: Final = 256
CURSOR: Final = 48
"""Bytes of ``struct cursor``."""
CANDIDATES: Final = 4
DISTURBED: Final = 0.05
"""A table of which more buckets than this end elsewhere is not the table."""

_PROGRAMS: Final = ("find_by_symbol", "find_by_entry", "walk")


def measure(buckets: int, symbol: int, entries: Sequence[int], *, sample: int = SAMPLE) -> Chains:
    """Chain lengths now. ``symbol``: where nf_conntrack_hash is, or 0; ``entries``: ``ct``s.

    Raises CtraceError when the table cannot be found, or the kernel runs no program on
    request (before 5.10).
    """
    if not buckets:
        raise CtraceError("the table's size is unknown")
    code = compiler.compile_programs("chains.c", _PROGRAMS, layout.running().defines)
    fds: list[int] = []
    try:
        for name, size, count in (("cursor", CURSOR, 1), ("lengths", 8, LENGTHS)):
            fds.append(sys.map_create(sys.MapType.ARRAY, 4, size, count, name=name))
        maps = list(fds)
        programs = {}
        for name in _PROGRAMS:
            linked = compiler.link(code[name], maps)
            programs[name] = sys.prog_load(linked, sys.ProgType.RAW_TRACEPOINT, name)
            fds.append(programs[name])
        for base in _bases(maps[0], programs, symbol, entries):
            found = _walk(maps, programs["walk"], base, buckets, sample)
            if found is not None:
                return found
    finally:
        for fd in fds:
            os.close(fd)
    raise CtraceError(
        "the table was not found: the kernel lists no nf_conntrack_hash, and "
        + (
            "entries lately seen are gone"
            if entries
            else "no packet of a tracked connection passed"
        )
    )


def _bases(cursor: int, programs: dict[str, int], symbol: int, entries: Sequence[int]) -> list[int]:
    """Where the table may be: what most entries say first, they may have gone since."""
    votes: Counter[int] = Counter()
    wanted = [("find_by_symbol", symbol)] if symbol else []
    for program, address in wanted or [("find_by_entry", entry) for entry in entries]:
        sys.map_update(cursor, bytes(4), bytes(CURSOR))
        sys.prog_run(programs[program], (address,))
        raw = sys.map_lookup(cursor, bytes(4), CURSOR) or bytes(CURSOR)
        (base,) = struct.unpack_from("<Q", raw)
        if base:
            votes[base] += 1
    return [base for base, _ in votes.most_common(CANDIDATES)]


def _walk(maps: Sequence[int], program: int, base: int, buckets: int, sample: int) -> Chains | None:
    """None when what lies there is not the table."""
    step = -(-buckets // sample)
    for length in range(LENGTHS):
        sys.map_update(maps[1], length.to_bytes(4, "little"), bytes(8))
    sys.map_update(maps[0], bytes(4), struct.pack("<6Q", base, 0, step, buckets, 0, 0))
    for _ in range(RUNS):
        if sys.prog_run(program, (0,)):
            break
    raw = sys.map_lookup(maps[0], bytes(4), CURSOR) or bytes(CURSOR)
    disturbed = int(struct.unpack("<6Q", raw)[4])
    counts = np.array(
        [
            int.from_bytes(sys.map_lookup(maps[1], n.to_bytes(4, "little"), 8) or b"", "little")
            for n in range(LENGTHS)
        ],
        np.int64,
    )
    walked = int(counts.sum()) + disturbed
    if not walked or disturbed > max(2, DISTURBED * walked):
        return None
    return chains(buckets, counts, disturbed)
