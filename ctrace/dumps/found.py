"""Everything understood from the given texts, before it is put in order."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.batch import Owner
from ctrace.dumps.entries.columns import TAGS, Entries
from ctrace.dumps.host.log import Log
from ctrace.errors import CtraceError
from ctrace.record import RECORD, ROW, Events, Kind

MOST: Final = 20_000_000
"""Entries of all dumps together: 2.4 GB of temporary file."""
SHOWN: Final = 20
"""Lines not understood that are shown with their number, at most."""
KIND_OF: Final = np.array([Kind.EXISTING, Kind.INSERT, Kind.SAMPLED, Kind.DESTROY], np.uint8)
HOSTS: Final = 1000
NOT_TOLD: Final = 1
"""``overdue_ms`` of an entry whose line has no timeout."""
TABLES: Final = ("raw", "mangle", "nat", "filter")
"""Those that every kernel with iptables may have rules in; security is seldom there."""
TEXT_LIMIT: Final = 4 << 20
"""Characters of rules that are kept."""


_PRINTABLE: Final = bytes(
    one if 32 <= one < 127 else 32 if one == 9 else ord("?") for one in range(256)
)


def plain(raw: bytes, limit: int = 200) -> str:
    """Text from outside, made safe to show anywhere: printable ASCII."""
    return raw[:limit].translate(_PRINTABLE).decode("ascii")


class Spool:
    """Entries as records in a temporary file: memory stays bounded whatever their number.

    In an entry's last bytes stand ``idle_ms``: its age in seconds, -1 unknown;
    ``overdue_ms``: minus the ms until it expires, :data:`NOT_TOLD` unknown; and its mark.
    ``ts`` is an event's UTC ns, ``reason`` 1 where a program caused it.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="ctrace-")  # noqa: SIM115
        self.n = 0

    def add(self, made: Entries) -> None:
        """Append. Raises CtraceError when there are too many, or the disk is full."""
        events = made.events
        events["ts"] = np.maximum(made.time, 0)
        events["kind"] = KIND_OF[made.tag]
        events["reason"] = made.user
        events["idle_ms"] = np.minimum(made.age, (1 << 31) - 1)
        left = np.minimum(made.left, 2_000_000) * -1000
        events["overdue_ms"] = np.where(made.left < 0, NOT_TOLD, left)
        events["mark"] = np.maximum(made.mark, 0)
        self.n += len(events)
        if self.n > MOST:
            raise CtraceError(f"more than {MOST:,} entries: give fewer or shorter files")
        try:
            self._file.write(events.view(np.uint8).data)
        except OSError as error:
            raise CtraceError(
                f"cannot write a temporary file: {error.strerror}; set TMPDIR to a place with room"
            ) from None

    def read(self, start: int, stop: int) -> Events:
        """Some entries, in memory."""
        if stop <= start:
            return np.zeros(0, RECORD)
        self._file.flush()
        self._file.seek(start * RECORD.itemsize)
        events: Events = np.empty(stop - start, RECORD)
        self._file.readinto(events.view(np.uint8).data)
        return events

    def parts(self, start: int, stop: int, size: int = 1 << 17) -> Iterator[tuple[int, Events]]:
        """(first, entries) of a range, piece by piece."""
        for at in range(start, stop, size):
            yield at, self.read(at, min(stop, at + size))

    def some(self, start: int, rows: npt.NDArray[np.intp]) -> Events:
        """Single entries of the range from ``start``, mapped rather than read."""
        if not len(rows):
            return np.zeros(0, RECORD)
        self._file.flush()
        mapped = np.memmap(self._file, ROW, "r", start * RECORD.itemsize, (int(rows.max()) + 1,))
        events: Events = np.array(mapped[rows]).view(RECORD)
        return events

    def close(self) -> None:
        """Close and delete the file."""
        self._file.close()


@dataclass
class Dump:
    """A stretch of entries that stood together: a table at one moment, or events."""

    start: int
    """Number of its first entry in the spool."""
    source: str
    """The file, and the command where one is shown."""
    series: str
    """The same for dumps that were made the same way, and so can be compared."""
    netns: str
    events: bool
    """Whether it is what ``conntrack -E`` printed."""
    list: str = ""
    """``dying``, ``unconfirmed`` or ``deleted`` where it is one of these lists; else the table."""
    at: Optional[float] = None
    """UTC seconds, as far as the text tells."""
    file_time: Optional[float] = None
    """UTC seconds of the file, which may be much later."""
    stop: int = 0
    said: Optional[int] = None
    """How many entries conntrack said it had shown."""
    lost: int = 0
    """Times that conntrack said it had lost events."""
    filtered: bool = False
    """Whether a command was asked for a part of the table."""
    clock: Optional[tuple[str, float]] = None
    """(zone, seconds) by the clock of a zone that only the host knows; of UTC the zone is empty."""
    cut: bool = False
    """Whether it shows a part: since it is filtered, or since lines were cut out."""

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass
class Unread:
    """Lines that were not understood."""

    count: int = 0
    first: list[tuple[str, int, str]] = field(default_factory=list)
    """(file, line, reason), the first few; line 0 is a file that cannot be read."""

    def add(self, file: str, line: int, reason: str) -> None:
        """One more."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append((plain(file.encode("utf-8", "replace")), line, reason))


@dataclass
class Space:
    """What is known of one network namespace."""

    sysctls: dict[str, str] = field(default_factory=dict)
    addresses: list[str] = field(default_factory=list)
    listeners: dict[tuple[int, int], Owner] = field(default_factory=dict)
    """(protocol, port) to the process that listens there."""
    nft: str = ""
    """``nft -j list ruleset``."""
    nft_text: str = ""
    """``nft list ruleset``, as people print it."""
    saves: list[tuple[str, str, str]] = field(default_factory=list)
    """(tool, family, text) of iptables-save."""
    shown: dict[str, dict[str, str]] = field(default_factory=dict)
    """By family and table what ``iptables -S`` printed, in the form of iptables-save."""
    counters: list[tuple[Optional[float], dict[str, int]]] = field(default_factory=list)
    """``conntrack -S`` summed over CPUs, one reading after the other, each with its time (UTC
    seconds, where known)."""
    counts: list[int] = field(default_factory=list)
    """``nf_conntrack_count``, one reading after the other."""
    settings: dict[str, str] = field(default_factory=dict)
    """By path below /proc/sys: those of net/ipv4, net/ipv6 and net/netfilter."""
    network: dict[tuple[str, str], str] = field(default_factory=dict)
    """(``links``, ``routes``, ``rules``, ``rules6``, ``ipsets``, ``qdiscs`` or ``filters``;
    command) to what was printed."""
    legacy_tables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Tables of iptables-legacy by family, where /proc/net/ip_tables_names was given."""
    ipvs: str = ""
    """The contents of /proc/net/ip_vs, if given; ``none``: the file does not exist."""
    listed: set[str] = field(default_factory=set)
    """Commands of which the texts have the output, though it has not all of the rules."""
    expectations: int = 0
    """Expectations of helpers that the texts list."""

    @property
    def readings(self) -> list[tuple[Optional[float], dict[str, int]]]:
        """``counters``, oldest first: a bundle's files need not be in order."""
        if any(at is None for at, _ in self.counters):
            return self.counters
        return sorted(self.counters, key=lambda one: one[0] or 0.0)

    def settle(self) -> None:
        """Tables shown one by one are a family's rules once all of them are there."""
        others = self.nft or self.nft_text  # they may be the same rules
        for family, tables in self.shown.items():
            whole = all(table in tables for table in TABLES)
            if whole and not others and all(one != family for _, one, _ in self.saves):
                self.saves.append(("iptables-legacy", family, "".join(tables.values())))
            elif not whole:
                self.listed.add("iptables -S")

    @property
    def has_rules(self) -> bool:
        """Whether any rules were given."""
        return bool(self.nft or self.nft_text or self.saves)


@dataclass
class Found:
    """Everything that was found."""

    spool: Spool = field(default_factory=Spool)
    dumps: list[Dump] = field(default_factory=list)
    spaces: dict[str, Space] = field(default_factory=dict)
    log: Log = field(default_factory=Log)
    modules: dict[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    """Name to (uses, modules that use it)."""
    modules_whole: bool = False
    """Whether these are all that were loaded."""
    slab: Optional[int] = None
    """Bytes of one entry, from /proc/slabinfo."""
    host: str = ""
    kernel: str = ""
    uptime: Optional[tuple[float, Optional[float]]] = None
    """(seconds since boot, UTC seconds at which that was so)."""
    date: Optional[float] = None
    """UTC seconds, by the last ``date``."""
    lines: int = 0
    files: list[str] = field(default_factory=list)
    """Those that something was found in."""
    hosts: dict[str, set[str]] = field(default_factory=dict)
    """Of which something was found, by what names them (:mod:`ctrace.dumps.whose`)."""
    passed: int = 0
    """Files of a bundle that held nothing of interest."""
    unread: Unread = field(default_factory=Unread)
    empty: bool = False
    """Whether conntrack said that it had nothing to show."""
    whole: bool = False
    """Whether ``ctrace collect`` made it: its first namespace is the host's."""
    _last: tuple[str, str, int] = ("", "", 0)
    """Whose prompt was seen last, by what, and how much was found before it."""

    @property
    def weight(self) -> int:
        """Grows with whatever is found, but for lines that tell nothing of the table."""
        return (
            self.spool.n
            + len(self.log.messages)
            + len(self.modules)
            + sum(
                len(one.sysctls)
                + len(one.counts)
                + len(one.saves)
                + len(one.nft_text)
                + len(one.nft)
                + len(one.network)
                + len(one.counters)
                for one in self.spaces.values()
            )
        )

    def space(self, name: str = "") -> Space:
        """The namespace of this name; empty for the one where the commands were typed."""
        return self.spaces.setdefault(name, Space())

    def belongs(self, named: str, host: str) -> None:
        """Something was found of this host, if one is named."""
        if host and len(self.hosts.get(named, ())) < HOSTS:
            self.hosts.setdefault(named, set()).add(host)

    def prompt(self, named: str = "", host: str = "") -> None:
        """Note a prompt of ``host``. What came before belongs to the host of the last prompt."""
        by, last, weight = self._last
        if self.weight > weight:
            self.belongs(by, last)
        self._last = named, host, self.weight

    def add(self, dump: Dump, made: Entries) -> None:
        """Entries of the dump that is being read."""
        self.spool.add(made)
        dump.stop = self.spool.n

    def close(self) -> None:
        """Let go of the temporary file."""
        self.spool.close()


__all__ = ["TAGS", "Dump", "Found", "Space", "Spool", "Unread", "plain"]
