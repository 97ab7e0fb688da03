"""How full each namespace's table is, and the kernel's own counters of it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.batch import TableReading
from ctrace.errors import CtraceError
from ctrace.host.netns import Namespace, at
from ctrace.record import boot_ns

SETTINGS: Final = "/proc/sys/net/netfilter/nf_conntrack_"
COLUMNS: Final = {
    "found": "found",
    "invalid": "invalid",
    "insert": "insert",
    "insert_failed": "insert_failed",
    "drop": "drop",
    "early_drop": "early_drop",
    "icmp_error": "icmp_error",
    "search_restart": "search_restart",
    "clashres": "clash_resolve",
    "chainlength": "chaintoolong",
}
"""Names in /proc/net/stat/nf_conntrack to ``conntrack -S`` names. The columns that the
kernel no longer fills (searched, new, ignore, delete, ...) are left out."""

ICMP_APART: Final = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (5, 10)
"""Whether ``icmp_error`` is no part of ``invalid`` here (:data:`ctrace.batch.INVALID`)."""
HALF: Final = np.uint64(1 << 31)

_Counters = npt.NDArray[np.uint64]


@dataclass
class _Table:
    """What is remembered of one namespace between two readings."""

    count: int
    """File descriptor of its nf_conntrack_count, opened inside. It reads that
    namespace's number from anywhere and does not keep the namespace alive."""
    raw: Optional[_Counters] = None
    wrapped: _Counters = field(default_factory=lambda: np.zeros(0, np.uint64))


class TableReader:
    """Reads tables once a second without setns, sockets or subprocesses.

    The count costs about 0.5 us for each namespace and the counters about 20 us:
    they are opened anew each time, because an open /proc/net file pins its namespace.
    """

    def __init__(self) -> None:
        self._tables: dict[int, _Table] = {}
        self._limits: dict[str, int] = {}
        self.died: set[int] = set()
        """Namespaces that went away since they were opened; the reader of this set empties it."""

    def __enter__(self) -> TableReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every open file."""
        for table in self._tables.values():
            os.close(table.count)
        for fd in self._limits.values():
            os.close(fd)
        self._tables.clear()
        self._limits.clear()

    def read(
        self, namespaces: Sequence[Namespace], *, stats: bool = True
    ) -> tuple[TableReading, ...]:
        """One reading for each namespace that still exists.

        Empty where nf_conntrack is not loaded. ``stats=False`` reads the fill only.
        """
        here = {space.inum for space in namespaces}
        for inum in [inum for inum in self._tables if inum not in here]:
            self._forget(inum)
        limit, buckets = self._limit("max"), self._limit("buckets")
        if limit is None:
            return ()
        readings = []
        for space in namespaces:
            table = self._tables.get(space.inum) or self._open(space)
            if table is None:
                continue
            try:
                count = int(os.pread(table.count, 32, 0))
                at = boot_ns()
            except OSError:  # ENOENT: the namespace has gone; another may have its number
                self._forget(space.inum)
                self.died.add(space.inum)
                continue
            counted = self._stats(table, space) if stats else {}
            readings.append(TableReading(space.inum, count, limit, buckets or 0, counted, at))
        return tuple(readings)

    def _limit(self, name: str) -> Optional[int]:
        """nf_conntrack_max and _buckets are the same for all namespaces."""
        try:
            if name not in self._limits:
                self._limits[name] = os.open(SETTINGS + name, os.O_RDONLY | os.O_CLOEXEC)
            return int(os.pread(self._limits[name], 32, 0))
        except OSError:
            if name in self._limits:
                os.close(self._limits.pop(name))
            return None

    def _open(self, space: Namespace) -> Optional[_Table]:
        try:
            with at(space):
                fd = os.open(SETTINGS + "count", os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, CtraceError):
            return None
        table = self._tables[space.inum] = _Table(fd)
        return table

    def _forget(self, inum: int) -> None:
        os.close(self._tables.pop(inum).count)

    def _stats(self, table: _Table, space: Namespace) -> Mapping[str, int]:
        try:
            text = _stat_file(space)
        except (OSError, CtraceError):
            return {}
        names, rows = parse_stats(text)
        if table.raw is None or table.raw.shape != rows.shape:
            table.wrapped = np.zeros_like(rows)
        else:
            # Each CPU's counter is an unsigned int that wraps on its own. One that falls by
            # less was set back: the module was loaded anew.
            fell = (rows < table.raw) & (table.raw - rows > HALF)
            table.wrapped += fell.astype(np.uint64) << np.uint64(32)
        table.raw = rows
        total = (rows + table.wrapped).sum(axis=0)
        read = {COLUMNS[name]: int(n) for name, n in zip(names, total) if name in COLUMNS}
        if not ICMP_APART:
            read.pop("icmp_error", None)
        return read


def parse_stats(text: str) -> tuple[list[str], _Counters]:
    """/proc/net/stat/nf_conntrack as (column names, one row of counters per CPU).

    The header names the columns; their set and order differ between kernels.
    """
    header, *lines = text.splitlines()
    names = header.split()
    rows = [[int(word, 16) for word in line.split()] for line in lines]
    return names, np.array(rows, np.uint64).reshape(len(rows), -1)[:, : len(names)]


def held_now(namespaces: Sequence[Namespace]) -> dict[int, int]:
    """Entries in each table that can be read, by the number of its namespace."""
    with TableReader() as reader:
        return {one.netns: one.count for one in reader.read(namespaces, stats=False)}


def _stat_file(space: Namespace) -> str:
    """The text of a namespace's /proc/net/stat/nf_conntrack. Raises OSError, CtraceError."""
    path = space.path
    if path.startswith("/proc/") and path.endswith("/ns/net"):
        try:
            with open(path[: -len("ns/net")] + "net/stat/nf_conntrack") as file:
                text = file.read()
            if (
                os.readlink(path) == f"net:[{space.inum}]"
            ):  # else the process has moved, or is another
                return text
        except OSError:
            pass
    with at(space), open("/proc/thread-self/net/stat/nf_conntrack") as file:
        return file.read()
