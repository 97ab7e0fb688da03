"""Walks conntrack's hash table on request, with bpf/chains.c.

The table is found by its symbol where the kernel lists data (KALLSYMS_ALL), otherwise from any
entry in it. Either way the walk verifies it: each chain must end with the number of its own bucket.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ctrace.kernel import bpf, layout, programs

RUNS: Final = 1 << 16
LENGTHS: Final = 256
CANDIDATES: Final = 4
DISTURBED: Final = 0.05
"""Share of walked buckets. If more than this end with another bucket's number, what was walked is
not the table."""
NAMESPACES: Final = 4096
"""How many namespaces are counted separately; entries of any others are dropped from the counts."""

_PROGRAMS: Final = ("find_by_symbol", "find_by_entry", "walk")
FOUND: Final = 1024
"""Entries of a walk that can be reported: the latest ones."""
_CURSOR: Final = struct.Struct("<9Q")
"""``struct cursor``: base, next, step, end, disturbed, length, node, met, only."""
_MAPS: Final = (
    (bpf.MapType.ARRAY, "cursor", _CURSOR.size, 1),
    (bpf.MapType.ARRAY, "lengths", 8, LENGTHS),
    (bpf.MapType.LRU_HASH, "met", 16, NAMESPACES),
    (bpf.MapType.ARRAY, "found", 8, FOUND),
)


@dataclass(frozen=True)
class Walked:
    """Where a walk ended, and whether it was over the table."""

    next: int
    """The bucket to continue with."""
    disturbed: int
    """Buckets whose chain ended with another bucket's number."""

    def is_table(self, walked: int) -> bool:
        """Whether the walk was over the table: few enough of so many buckets ended elsewhere."""
        return walked > 0 and self.disturbed <= max(2, DISTURBED * walked)


class Walker:
    """The programs, loaded, with their maps."""

    def __init__(self) -> None:
        """Raises CtraceError when they cannot be loaded."""
        where = layout.running()
        code = programs.instructions("chains.c", _PROGRAMS, where.constants)
        self._fds: list[int] = []
        self._programs: dict[str, int] = {}
        try:
            for kind, name, size, count in _MAPS:
                self._fds.append(bpf.map_create(kind, 4, size, count, name=name))
            self._cursor, self._lengths, self._met, self._found = maps = tuple(self._fds)
            for name in _PROGRAMS:
                linked = programs.link(code[name], maps, fetch_add="FETCH_ADD" in where)
                fd = bpf.prog_load(linked, bpf.ProgType.RAW_TRACEPOINT, name)
                self._programs[name] = fd
                self._fds.append(fd)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Walker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free everything; safe to call twice."""
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)

    def bases(self, symbol: int, entries: Sequence[int]) -> list[int]:
        """Candidate addresses of the table, the one that most entries point to first (they may be
        gone).

        ``symbol``: where nf_conntrack_hash is, or 0; ``entries``: ``ct``s. Raises CtraceError when
        the kernel cannot run programs on request (before 5.10).
        """
        votes: Counter[int] = Counter()
        wanted = [("find_by_symbol", symbol)] if symbol else []
        for program, address in wanted or [("find_by_entry", entry) for entry in entries]:
            self._set(0, 0, 1, 0)
            bpf.prog_run(self._programs[program], (address,))
            base = self._read()[0]
            if base:
                votes[base] += 1
        return [base for base, _ in votes.most_common(CANDIDATES)]

    def walk(
        self,
        base: int,
        first: int,
        step: int,
        end: int,
        *,
        runs: int = RUNS,
        enough: int = 0,
        only: int = 0,
    ) -> Walked:
        """Walk every ``step``th bucket from ``first`` up to ``end`` (exclusive).

        Stops early after ``runs`` program runs, or after ``enough`` entries (0: no limit).
        ``only``: the namespace whose entries count (0: all).
        """
        self._set(base, first, step, end, only)
        met = 0
        for _ in range(runs):
            told = bpf.prog_run(self._programs["walk"], (0,))
            met += told >> 1
            if told & 1 or 0 < enough <= met:
                break
        _, following, _, _, disturbed, *_ = self._read()
        return Walked(following, disturbed)

    def lengths(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """How many chains of each length were seen since :meth:`forget_lengths`."""
        raw = (bpf.map_lookup(self._lengths, _key(n), 8) or bytes(8) for n in range(LENGTHS))
        return np.array([int.from_bytes(one, "little") for one in raw], np.int64)

    def forget_lengths(self) -> None:
        """Begin anew."""
        for length in range(LENGTHS):
            bpf.map_update(self._lengths, _key(length), bytes(8))

    def met(self) -> dict[int, tuple[int, int]]:
        """Per namespace: entries seen since loading, and how many of them were ASSURED.

        A count that went down means that the namespace was dropped from the counts in between.
        """
        keys, values = bpf.map_items(self._met, 4, 16, NAMESPACES)
        pairs = values.view(np.uint64).reshape(-1, 2).tolist()
        found = zip(keys.view(np.uint32)[:, 0].tolist(), pairs)
        return {netns: (entries, assured) for netns, (entries, assured) in found}

    def found(self) -> list[int]:
        """The entries (``ct``) seen by the last walk, at most :data:`FOUND` of them."""
        met = min(self._read()[7], FOUND)
        _, values = bpf.map_items(self._found, 4, 8, FOUND)
        entries: list[int] = values.view(np.uint64)[:met, 0].tolist()
        return entries

    def _set(self, base: int, first: int, step: int, end: int, only: int = 0) -> None:
        cursor = _CURSOR.pack(base, first, step, end, 0, 0, 0, 0, only)
        bpf.map_update(self._cursor, bytes(4), cursor)

    def _read(self) -> tuple[int, ...]:
        raw = bpf.map_lookup(self._cursor, bytes(4), _CURSOR.size)
        return _CURSOR.unpack(raw or bytes(_CURSOR.size))


def _key(n: int) -> bytes:
    return n.to_bytes(4, "little")
