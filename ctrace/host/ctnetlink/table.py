"""The connection tracking table through ctnetlink: what is in it, and what comes.

Every function takes the path of a namespace and leaves no socket behind; a socket would keep
the namespace alive. What changes the table is in ``edit``.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.errors import CtraceError
from ctrace.host.ctnetlink.message import U8, U32, Decoded, Decoder
from ctrace.host.ctnetlink.socket import (
    DATAGRAM,
    DUMP,
    GET,
    GET_STATS_CPU,
    NLMSG_DONE,
    NLMSG_ERROR,
    REQUEST,
    check,
    flow_tuple,
    header,
    nest,
    open_socket,
    opened,
)
from ctrace.host.netns import enter, here
from ctrace.host.tables import ICMP_APART
from ctrace.record import Events, Kind, boot_ns, join

CHUNK: Final = 1 << 20
"""Bytes of a dump that are decoded together. They are all the memory a dump needs besides its
result."""
SLICE: Final = 1 << 14
"""Entries of a table that are handed on together (2 MB)."""
NEW_GROUP: Final = 1
"""NFNLGRP_CONNTRACK_NEW as a mask."""
HEARD: Final = 1 << 17
"""Bytes of events that are decoded at most: some 700 new entries."""


@dataclass(frozen=True)
class Table:
    """A namespace's table at one moment, or a part of it."""

    events: Events
    """One EXISTING record an entry: ``ts`` is when the dump began, ``ct`` is CTA_ID."""
    left: npt.NDArray[np.int32]
    """Seconds until each entry expires; -1 when the kernel does not say."""
    mark: U32
    start: npt.NDArray[np.uint64]
    """When each entry was made, ns since the epoch; 0 without nf_conntrack_timestamp."""
    netns: int
    """Inode of the namespace that was read: the process's path may lead to another by now."""


def dump(path: str) -> Events:
    """The entries in the table of the namespace at ``path``, as EXISTING records.

    The owner fields are zero. Entries that come and go while the kernel walks the
    table may or may not be there. Raises CtraceError.
    """
    return read_table(path).events


def read_table(path: str) -> Table:
    """Like :func:`dump`, with the fields that a record has no room for."""
    parts = list(slices(path))
    return Table(
        join([part.events for part in parts]),
        np.concatenate([part.left for part in parts]),
        np.concatenate([part.mark for part in parts]),
        np.concatenate([part.start for part in parts]),
        parts[0].netns,
    )


def slices(path: str) -> Iterator[Table]:
    """Like :func:`read_table`, in parts of at least :data:`SLICE` entries; yields at least one
    part.

    The kernel walks on when the next part is asked for. Raises CtraceError.
    """
    now = boot_ns()
    decoder = Decoder()
    parts: list[Decoded] = []
    with opened(path) as (sock, inum):
        # The kernel walks one hash table for all namespaces, and would so for an empty one.
        pieces = _dump(sock, GET) if _any_entry(path, inum) else ()
        for data, starts, lengths in pieces:
            parts.append(decoder.decode(data, starts, lengths))
            if sum(len(part.events) for part in parts) >= SLICE:
                yield _table(parts, now, inum)
                parts = []
        yield _table(parts, now, inum)


def _table(parts: list[Decoded], now: int, inum: int) -> Table:
    events = join([part.events for part in parts])
    events["ts"] = now
    events["kind"] = Kind.EXISTING
    events["netns"] = inum
    return Table(
        events,
        np.concatenate([np.zeros(0, np.int32), *(part.left for part in parts)]),
        np.concatenate([np.zeros(0, np.uint32), *(part.mark for part in parts)]),
        np.concatenate([np.zeros(0, np.uint64), *(part.start for part in parts)]),
        inum,
    )


def pieces(path: str, inum: int) -> Iterator[Events]:
    """The table of namespace ``inum`` at ``path``, some thousand EXISTING records at a time.

    The kernel goes on reading only as fast as these are taken. Its socket keeps the namespace
    alive: close the generator when that should go. Raises CtraceError, also where ``path`` leads
    to another namespace.
    """
    decoder = Decoder()
    with opened(path) as (sock, here):
        if here != inum:
            raise CtraceError(f"namespace {inum} is no longer at {path}")
        for data, starts, lengths in _dump(sock, GET) if _any_entry(path, inum) else ():
            events = decoder.decode(data, starts, lengths).events
            events["kind"] = Kind.EXISTING
            events["netns"] = inum
            yield events


@dataclass(frozen=True)
class Packet:
    """What a packet has in common with its entry."""

    proto: int
    src: bytes
    """4 or 16 bytes."""
    dst: bytes
    sport: int
    dport: int


def lookup(path: str, packets: Iterable[Packet]) -> Iterator[Optional[Events]]:
    """For each packet, of either direction, the entry that it belongs to; None where there is none
    (in zone 0). Raises CtraceError."""
    decoder = Decoder()
    with opened(path) as (sock, _):
        for one in packets:
            body = nest(1, flow_tuple(one.proto, one.src, one.dst, one.sport, one.dport))
            family = socket.AF_INET if len(one.src) == 4 else socket.AF_INET6
            sock.send(header(20 + len(body), GET, REQUEST, 1, family) + body)
            answer = sock.recv(DATAGRAM)
            length, kind, _, _, _ = struct.unpack_from("=IHHII", answer)
            if kind == NLMSG_ERROR:
                error = struct.unpack_from("=i", answer, 16)[0]
                check(0 if error == -errno.ENOENT else error, "look up an entry")
                yield None
                continue
            data = np.frombuffer(answer + bytes(-len(answer) % 4), np.uint8)
            yield decoder.decode(data, np.array([0]), np.array([length])).events


def new_entries(path: str, seconds: float) -> Events:
    """Entries made in the next ``seconds``, as EXISTING records, from the kernel's events.

    At most what :data:`HEARD` bytes of events hold. None where nf_conntrack_events is 0.
    Raises CtraceError.
    """
    until = time.monotonic() + seconds
    decoder, parts, heard = Decoder(), [], 0
    sock, _ = open_socket(path, NEW_GROUP)
    with sock:
        sock.settimeout(seconds)
        while heard < HEARD and (left := until - time.monotonic()) > 0:
            sock.settimeout(left)
            try:
                data = np.frombuffer(bytearray(sock.recv(DATAGRAM)), np.uint8)
            except TimeoutError:
                break
            except OSError:  # ENOBUFS: there were more than the socket holds
                continue
            heard += len(data)
            parts.append(decoder.decode(data, *_chain(data)).events)
    events = join(parts)
    events["kind"] = Kind.EXISTING
    return events


def statistics(path: str) -> dict[str, int]:
    """``conntrack -S`` summed over CPUs, where /proc/net/stat/nf_conntrack is not built in.

    Numbers are the kernel's 32-bit counters. Raises CtraceError.
    """
    total: dict[str, int] = {}
    with opened(path) as (sock, _):
        for data, starts, lengths in _dump(sock, GET_STATS_CPU):
            for start, length in zip(starts.tolist(), lengths.tolist()):
                at = start + 20
                while at + 8 <= start + length:
                    size, kind = struct.unpack_from("=HH", data.data, at)
                    (value,) = struct.unpack_from(">I", data.data, at + 4)
                    name = STATISTICS.get(kind & 0x3FFF)
                    if name and (ICMP_APART or name != "icmp_error"):
                        total[name] = total.get(name, 0) + value
                    at += max((size + 3) & ~3, 4)
    return total


STATISTICS: Final = {
    2: "found",
    4: "invalid",
    8: "insert",
    9: "insert_failed",
    10: "drop",
    11: "early_drop",
    12: "icmp_error",
    13: "search_restart",
    14: "clash_resolve",
    15: "chaintoolong",
}
"""``enum ctattr_stats_cpu``."""


def _any_entry(path: str, inum: int) -> bool:
    """Whether the table holds anything; True where that cannot be read, or not at ``path``."""
    try:
        with enter(path), open("/proc/sys/net/netfilter/nf_conntrack_count") as file:
            return here() != inum or int(file.read()) > 0
    except OSError:
        return True


def _dump(
    sock: socket.socket, kind: int
) -> Iterator[tuple[U8, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Ask for a dump; yields (bytes, start of each message, length of each message).

    The bytes are valid until the next step. Bounds are found without following the
    chain of lengths: every message carries our own random sequence number and port,
    and what is found so must then be exactly that chain.
    """
    seq = int.from_bytes(os.urandom(4), "little") | 1
    sock.send(header(20, kind, REQUEST | DUMP, seq))
    buffer = bytearray(CHUNK + DATAGRAM)
    view, whole = memoryview(buffer), np.frombuffer(buffer, np.uint8)
    held, done = 0, False
    while not done:
        got = sock.recv_into(view[held:])
        length, answer, _, _, _ = struct.unpack_from("=IHHII", buffer, held)
        if answer == NLMSG_ERROR:
            check(struct.unpack_from("=i", buffer, held + 16)[0], "read the table")
        # NLMSG_DONE (its header and an int) is always the last message of a dump.
        length, answer, _, _, _ = struct.unpack_from("=IHHII", buffer, held + got - 20)
        done = length == 20 and answer == NLMSG_DONE
        if done:
            check(struct.unpack_from("=i", buffer, held + got - 4)[0], "read the table")
            got -= 20
        held += got
        if held and (done or held > CHUNK):
            yield (whole, *_bounds(whole[:held], seq))
            held = 0


def _bounds(data: U8, seq: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Start and length, in bytes, of each message in ``data``."""
    words = data.view(np.uint32)
    starts = np.flatnonzero(words == seq) - 2
    # The sequence number may turn up inside a message: a header has our port beside it.
    starts = starts[(starts >= 0) & (starts + 5 <= len(words))]
    starts = starts[(words[starts + 3] == words[3]) & (words[starts] >= 20)]
    lengths = words[starts].astype(np.int64)
    following = starts + (lengths + 3) // 4
    chained = len(starts) > 0 and starts[0] == 0 and following[-1] == len(words)
    if not (chained and np.array_equal(following[:-1], starts[1:])):
        return _chain(data)
    return starts * 4, lengths


def _chain(data: U8) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The same by following the message lengths one by one."""
    starts, lengths, at = [], [], 0
    while at + 20 <= len(data):
        (length,) = struct.unpack_from("=I", data.data, at)
        if length < 16 or at + length > len(data):
            break
        starts.append(at)
        lengths.append(length)
        at += (length + 3) & ~3
    return np.array(starts, np.int64), np.array(lengths, np.int64)
