"""The connection tracking table through ctnetlink: read it, fill it, empty it.

Raw netlink, without a library. Every function takes the path of a namespace and
leaves no socket behind; a socket would keep the namespace alive.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EEXIST, ENOMEM
from ipaddress import IPv4Address
from typing import Final

import numpy as np
import numpy.typing as npt

from ctrace.errors import CtraceError
from ctrace.host.ctmessage import U8, U32, Decoded, Decoder
from ctrace.host.netns import enter
from ctrace.record import Events, Kind, Status, join

NETLINK_NETFILTER: Final = 12
CTNETLINK: Final = 1 << 8
NEW, GET, DELETE, GET_STATS_CPU = CTNETLINK, CTNETLINK | 1, CTNETLINK | 2, CTNETLINK | 4
REQUEST, ACK, DUMP, CREATE_EXCL = 1, 4, 0x300, 0x600
NLMSG_ERROR, NLMSG_DONE = 2, 3
SOL_NETLINK, NETLINK_CAP_ACK = 270, 10
CHUNK: Final = 1 << 20
"""Bytes of a dump that are decoded together; all that a dump holds besides its result."""
SLICE: Final = 1 << 14
"""Entries of a table that are handed on together (2 MB)."""
DATAGRAM: Final = 1 << 16
"""The kernel builds dumps in pieces of at most 32 KiB."""
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
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
    """Inode of the namespace that it was: a process's path may lead to another by then."""


def dump(path: str) -> Events:
    """The entries in the table of the namespace at ``path``, as EXISTING records.

    The owner fields are zero. Entries that come and go while the kernel walks the
    table may or may not be there. Raises CtraceError.
    """
    return read_table(path).events


def read_table(path: str) -> Table:
    """The same with what a record has no room for."""
    parts = list(slices(path))
    return Table(
        join([part.events for part in parts]),
        np.concatenate([part.left for part in parts]),
        np.concatenate([part.mark for part in parts]),
        np.concatenate([part.start for part in parts]),
        parts[0].netns,
    )


def slices(path: str) -> Iterator[Table]:
    """The same a part at a time, :data:`SLICE` entries and a few more, at least one part.

    The kernel walks on when the next part is asked for. Raises CtraceError.
    """
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    decoder = Decoder()
    parts: list[Decoded] = []
    with _socket(path) as (sock, inum):
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
    with _socket(path) as (sock, here):
        if here != inum:
            raise CtraceError(f"namespace {inum} is no longer at {path}")
        for data, starts, lengths in _dump(sock, GET) if _any_entry(path, inum) else ():
            events = decoder.decode(data, starts, lengths).events
            events["kind"] = Kind.EXISTING
            events["netns"] = inum
            yield events


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
    with _socket(path) as (sock, _):
        for data, starts, lengths in _dump(sock, GET_STATS_CPU):
            for start, length in zip(starts.tolist(), lengths.tolist()):
                at = start + 20
                while at + 8 <= start + length:
                    size, kind = struct.unpack_from("=HH", data.data, at)
                    (value,) = struct.unpack_from(">I", data.data, at + 4)
                    name = STATISTICS.get(kind & 0x3FFF)
                    if name:
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


def flush(path: str) -> None:
    """Delete every entry of the namespace's table. Raises CtraceError."""
    with _socket(path) as (sock, _):
        sock.send(_header(20, DELETE, REQUEST | ACK, 1))
        _check(struct.unpack_from("=i", sock.recv(DATAGRAM), 16)[0], "flush the table")


def delete(path: str, entry: np.void) -> None:
    """Delete one entry, given as a record. Raises CtraceError when it is not there."""
    v6 = entry["family"] == socket.AF_INET6
    first = 0 if v6 else 12
    addresses = b"".join(
        _attr((3 if v6 else 1) + i, bytes(entry[name])[first:])
        for i, name in enumerate(("src", "dst"))
    )
    proto, sport, dport = (int(entry[name]) for name in ("proto", "sport", "dport"))
    ports = _attr(1, bytes([proto]))
    if proto in (socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6):
        base = 4 if proto == socket.IPPROTO_ICMP else 7
        ports += _attr(base, struct.pack(">H", sport))
        ports += _attr(base + 1, bytes([dport >> 8])) + _attr(base + 2, bytes([dport & 0xFF]))
    else:
        ports += _attr(2, struct.pack(">H", sport)) + _attr(3, struct.pack(">H", dport))
    body = _nest(1, _nest(1, addresses) + _nest(2, ports))
    if entry["zone"]:
        body += _attr(18, struct.pack(">H", int(entry["zone"])))
    family = int(entry["family"])
    with _socket(path) as (sock, _):
        sock.send(_header(20 + len(body), DELETE, REQUEST | ACK, 1, family) + body)
        _check(struct.unpack_from("=i", sock.recv(DATAGRAM), 16)[0], "delete the entry")


def fill(
    path: str,
    n: int,
    *,
    proto: int = socket.IPPROTO_TCP,
    source: str = "198.18.0.0",
    target: str = "192.0.2.1",
    dport: int = 443,
    timeout: int = 600,
    status: Status = Status.SEEN_REPLY | Status.ASSURED,
    state: int = 3,
    first: int = 0,
    batch: int = 2048,
) -> int:
    """Insert ``n`` IPv4 entries into the namespace's table; returns how many it took.

    It stops early when the table is full; entries that are there already are no
    error. Entry ``i`` (counted from ``first``) has source address ``source + i //
    60000`` and source port ``1024 + i % 60000``. They are ASSURED, so early_drop
    never evicts them, and TCP in ``state`` (3 is ESTABLISHED).
    About 2 us each. Raises CtraceError.
    """
    message = _entry(proto, target, dport, timeout, status, state)
    size = len(message)
    addresses = [message.index(word) for word in (b"SRC1", b"SRC2")]
    ports = [message.index(word) for word in (b"P1", b"P2")]
    base = int(IPv4Address(source))
    taken = 0
    with _socket(path) as (sock, _):
        sock.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        for option in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
            sock.setsockopt(socket.SOL_SOCKET, option, batch * (size + 1024))
        for begin in range(first, first + n, batch):
            index = np.arange(begin, min(begin + batch, first + n), dtype=np.int64)
            block: U8 = np.tile(np.frombuffer(message, np.uint8), (len(index), 1))
            source_of = (base + index // 60000).astype(">u4").view(np.uint8).reshape(-1, 4)
            port_of = (1024 + index % 60000).astype(">u2").view(np.uint8).reshape(-1, 2)
            for at in addresses:
                block[:, at : at + 4] = source_of
            for at in ports:
                block[:, at : at + 2] = port_of
            sock.send(block.data)
            refused = _errors(sock)
            taken += len(index) - sum(refused.values())
            if ENOMEM in refused:  # the table is full
                break
            for error in refused.keys() - {EEXIST}:
                raise CtraceError(f"cannot insert entries through ctnetlink: {os.strerror(error)}")
    return taken


@dataclass(frozen=True)
class Flow:
    """A TCP connection as its first packet had it."""

    src: bytes
    """4 or 16 bytes."""
    dst: bytes
    sport: int
    dport: int


def insert(path: str, flows: Iterable[Flow], timeout: int) -> int:
    """Make ESTABLISHED entries for TCP connections that go on untracked; how many it took.

    Windows are not checked (BE_LIBERAL), as for a connection that nf_conntrack_tcp_loose
    picks up (tcp_new in nf_conntrack_proto_tcp.c). One that has an entry already keeps
    it; what the table has no room for is left out. Raises CtraceError.
    """
    taken = 0
    status = Status.SEEN_REPLY | Status.ASSURED
    with _socket(path) as (sock, _):
        for flow in flows:
            ports = struct.pack(">H", flow.sport), struct.pack(">H", flow.dport)
            message = _message(
                _tuple(socket.IPPROTO_TCP, flow.src, flow.dst, *ports),
                _tuple(socket.IPPROTO_TCP, flow.dst, flow.src, *ports[::-1]),
                timeout,
                status,
                _attr(1, b"\x03") + _attr(4, b"\x0a\x0a") + _attr(5, b"\x0a\x0a"),
                socket.AF_INET if len(flow.src) == 4 else socket.AF_INET6,
            )
            sock.send(message)
            # Only errors are answered, before send returns: the kernel handles it in the call.
            refused = _errors(sock)
            taken += not refused
            if ENOMEM in refused:
                break
    return taken


def _entry(proto: int, target: str, dport: int, timeout: int, status: Status, state: int) -> bytes:
    """IPCTNL_MSG_CT_NEW with words in place of the source address and port."""
    to, port = IPv4Address(target).packed, struct.pack(">H", dport)
    return _message(
        _tuple(proto, b"SRC1", to, b"P1", port),
        _tuple(proto, to, b"SRC2", port, b"P2"),
        timeout,
        status,
        _attr(1, bytes([state])) if proto == socket.IPPROTO_TCP else b"",
        socket.AF_INET,
    )


def _tuple(proto: int, src: bytes, dst: bytes, sport: bytes, dport: bytes) -> bytes:
    kind = 1 if len(src) == 4 else 3
    ports = _attr(1, bytes([proto])) + _attr(2, sport) + _attr(3, dport)
    return _nest(1, _attr(kind, src) + _attr(kind + 1, dst)) + _nest(2, ports)


def _message(
    original: bytes, reply: bytes, timeout: int, status: Status, tcp: bytes, family: int
) -> bytes:
    """IPCTNL_MSG_CT_NEW; ``tcp`` holds the attributes of CTA_PROTOINFO_TCP, if it is TCP."""
    body = _nest(1, original) + _nest(2, reply)
    body += _attr(3, struct.pack(">I", status | Status.CONFIRMED))
    body += _attr(7, struct.pack(">I", timeout))
    if tcp:
        body += _nest(4, _nest(1, tcp))
    return _header(20 + len(body), NEW, REQUEST | CREATE_EXCL, 1, family) + body


def _header(size: int, kind: int, flags: int, seq: int, family: int = 0) -> bytes:
    """struct nlmsghdr and struct nfgenmsg."""
    return struct.pack("=IHHIIBBH", size, kind, flags, seq, 0, family, 0, 0)


def _attr(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _nest(kind: int, value: bytes) -> bytes:
    return _attr(kind | 0x8000, value)


@contextmanager
def _socket(path: str) -> Iterator[tuple[socket.socket, int]]:
    """As open_socket, closed at the end; what goes wrong inside becomes a CtraceError."""
    sock, inum = open_socket(path)
    with sock:
        try:
            yield sock, inum
        except BlockingIOError:
            raise CtraceError("the kernel did not answer a ctnetlink request in 10 s") from None
        except OSError as error:
            raise CtraceError(f"ctnetlink failed: {error.strerror}") from error


def open_socket(path: str, groups: int = 0) -> tuple[socket.socket, int]:
    """A ctnetlink socket inside the namespace at ``path``, and the namespace's inode.

    It works from anywhere, and keeps the namespace alive until closed. ``groups`` are
    multicast groups as a mask. Raises CtraceError when the namespace has gone, or the
    kernel has no nfnetlink.
    """
    with enter(path):
        inum = _here()
        try:
            sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        except OSError as error:
            raise CtraceError(
                f"cannot open a netfilter netlink socket: {error.strerror}"
            ) from error
    try:
        # A plain timeout would make MSG_DONTWAIT wait as well.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 10, 0))
        sock.bind((0, groups))
    except OSError as error:
        sock.close()
        raise CtraceError(
            f"cannot listen to ctnetlink: {error.strerror} (CAP_NET_ADMIN?)"
        ) from error
    return sock, inum


def _here() -> int:
    """Inode of the namespace that this thread is in."""
    return int(os.readlink("/proc/thread-self/ns/net")[5:-1])


def _any_entry(path: str, inum: int) -> bool:
    """Whether the table holds anything; True where that cannot be read, or not at ``path``."""
    try:
        with enter(path), open("/proc/sys/net/netfilter/nf_conntrack_count") as file:
            return _here() != inum or int(file.read()) > 0
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
    sock.send(_header(20, kind, REQUEST | DUMP, seq))
    buffer = bytearray(CHUNK + DATAGRAM)
    view, whole = memoryview(buffer), np.frombuffer(buffer, np.uint8)
    held, done = 0, False
    while not done:
        got = sock.recv_into(view[held:])
        length, answer, _, _, _ = struct.unpack_from("=IHHII", buffer, held)
        if answer == NLMSG_ERROR:
            _check(struct.unpack_from("=i", buffer, held + 16)[0], "read the table")
        # NLMSG_DONE (its header and an int) is always the last message of a dump.
        length, answer, _, _, _ = struct.unpack_from("=IHHII", buffer, held + got - 20)
        done = length == 20 and answer == NLMSG_DONE
        if done:
            _check(struct.unpack_from("=i", buffer, held + got - 4)[0], "read the table")
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
    """The same by following the lengths one by one."""
    starts, lengths, at = [], [], 0
    while at + 20 <= len(data):
        (length,) = struct.unpack_from("=I", data.data, at)
        if length < 16 or at + length > len(data):
            break
        starts.append(at)
        lengths.append(length)
        at += (length + 3) & ~3
    return np.array(starts, np.int64), np.array(lengths, np.int64)


def _errors(sock: socket.socket) -> Counter[int]:
    """Error answers waiting on a socket, by errno."""
    found: Counter[int] = Counter()
    while True:
        try:
            answer = sock.recv(DATAGRAM, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return found
        kind, error = struct.unpack_from("=4xH10xi", answer)
        if kind == NLMSG_ERROR and error:
            found[-error] += 1


def _check(error: int, what: str) -> None:
    """Raise CtraceError for a negative errno."""
    if error < 0:
        raise CtraceError(f"cannot {what} through ctnetlink: {os.strerror(-error)}")
