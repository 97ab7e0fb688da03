"""Unnamed namespaces, and raw netlink to read and fill them."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import EINVAL, EOPNOTSUPP, EPROTONOSUPPORT
from typing import Final

from ctrace.errors import CtraceError
from ctrace.host import commands, marker, netns

REQUEST, ACK, DUMP, CREATE, APPEND, EXCL = 1, 4, 0x300, 0x400, 0x800, 0x200
ROUTE, NETFILTER = 0, 12
NESTED: Final = 0x8000
DUMP_INTR: Final = 0x10
ERROR, DONE = 2, 3
SOL_NETLINK: Final = 270
BUFFER: Final = 512 << 20

Attributes = list[tuple[int, bytes]]
_libc = ctypes.CDLL(None, use_errno=True)
_HEAD: Final = struct.Struct("=HH").unpack_from


def aside(action: Callable[[], object], path: str = "") -> None:
    """Run in the namespace at ``path``, or where that can't be entered in a new one, which lives as
    long as this call and what it starts.

    A separate thread enters it, because namespaces belong to threads. Raises OSError, and what the
    action raises.
    """
    failure: list[BaseException] = []

    def run() -> None:
        try:
            try:
                netns.move(path)
            except (OSError, CtraceError):
                _unshare()
            action()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


def _unshare() -> None:
    if _libc.unshare(netns.CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class Interrupted(Exception):
    """What was read changed while it was being read."""


class Space:
    """A namespace of our own: it goes away with the last file that is open on it."""

    def __init__(self) -> None:
        """Raises CtraceError without CAP_SYS_ADMIN."""
        try:
            aside(self._make)
        except OSError as error:
            told = f"cannot make a network namespace: {error.strerror} (CAP_SYS_ADMIN?)"
            raise CtraceError(told) from error
        self.path = f"/proc/{os.getpid()}/fd/{self.fd}"

    def _make(self) -> None:
        """In a thread of its own: nobody sees the namespace before it is marked."""
        with suppress(OSError):  # without CAP_NET_ADMIN, which the rehearsal asks for later
            marker.mark()
        self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Run the block with this thread, and only it, in the namespace."""
        with netns.enter(self.path):
            yield

    def run(self, argv: Sequence[str], stdin: str = "") -> str:
        """Output of a command run in the namespace. Raises CtraceError.

        iptables gets a lock of its own: the host's tools wait for the one of the machine.
        """
        with self.inside():
            return commands.run(argv, stdin, {"XTABLES_LOCKFILE": self.path})

    def close(self) -> None:
        """Release the namespace."""
        os.close(self.fd)


def attr(kind: int, data: bytes) -> bytes:
    """One attribute, padded."""
    return struct.pack("=HH", len(data) + 4, kind) + data + b"\0" * (-len(data) % 4)


def text(kind: int, word: str) -> bytes:
    """A string attribute."""
    return attr(kind, word.encode() + b"\0")


def nested(kind: int, *parts: bytes) -> bytes:
    """An attribute made of attributes."""
    return attr(kind | NESTED, b"".join(parts))


def be32(value: int) -> bytes:
    """A number in nfnetlink's byte order."""
    return struct.pack(">I", value)


def word(data: bytes) -> str:
    """A string attribute's value."""
    return data.rstrip(b"\0").decode(errors="replace")


def number(data: bytes) -> int:
    """A number from nfnetlink's byte order."""
    return int.from_bytes(data, "big")


def split(data: bytes, at: int = 0) -> Attributes:
    """The attributes of a message or nest, in order: (type without flags, value)."""
    found = []
    last = len(data) - 4
    while at <= last:
        size, kind = _HEAD(data, at)
        if size < 4:
            break
        found.append((kind & 0x3FFF, data[at + 4 : at + size]))
        at += (size + 3) & ~3
    return found


class Layouts:
    """Takes messages apart of which most are alike: one call for all attributes of one."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[struct.Struct, tuple[int, ...], tuple[int, ...]]] = {}
        """By size: its form, and the sizes and types of the attributes."""

    def split(self, data: bytes) -> dict[int, bytes]:
        """As ``dict(split(data))``."""
        known = self._known.get(len(data))
        if known:
            form, sizes, kinds = known
            found = form.unpack(data)
            if found[0::3] == sizes and found[1::3] == kinds:
                return {kind & 0x3FFF: value for kind, value in zip(kinds, found[2::3])}
        heads, at, form_of = [], 0, "="
        while at + 4 <= len(data):
            size, kind = _HEAD(data, at)
            if size < 4 or at + size > len(data):
                return dict(split(data))
            heads.append((size, kind))
            padding = min((size + 3) & ~3, len(data) - at) - size
            form_of += f"HH{size - 4}s{padding}x"
            at += size + padding
        if at == len(data):
            sizes, kinds = tuple(s for s, _ in heads), tuple(k for _, k in heads)
            self._known[len(data)] = struct.Struct(form_of), sizes, kinds
        return dict(split(data))


def first(data: bytes, key: int, at: int = 0) -> bytes:
    """The value of the first attribute of a kind; empty where there is none."""
    while at + 4 <= len(data):
        size, kind = _HEAD(data, at)
        if size < 4:
            break
        if kind & 0x3FFF == key:
            return data[at + 4 : at + size]
        at += (size + 3) & ~3
    return b""


class Link:
    """A netlink socket that stays bound to the namespace in which it was opened."""

    def __init__(self, path: str, proto: int) -> None:
        """In the namespace at ``path``. Raises CtraceError."""
        with netns.enter(path):
            kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
            self.sock = socket.socket(socket.AF_NETLINK, kind, proto)
        self.sock.bind((0, 0))
        for option in (32, 33):  # SO_SNDBUFFORCE, SO_RCVBUFFORCE
            with suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)
        self.sock.setsockopt(SOL_NETLINK, 10, 1)  # NETLINK_CAP_ACK: errors don't repeat requests
        with suppress(OSError):
            self.sock.setsockopt(SOL_NETLINK, 12, 1)  # NETLINK_GET_STRICT_CHK

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """Bodies of all answers; none where the kernel does not support the request.

        Raises Interrupted, OSError.
        """
        self.sock.send(message(kind, DUMP, body))
        found: list[bytes] = []
        interrupted = False
        while True:
            data, at = self.sock.recv(1 << 18), 0
            while at < len(data):
                size, got, flags = struct.unpack_from("=IHH", data, at)
                interrupted |= bool(flags & DUMP_INTR)
                if got == DONE:
                    if interrupted:
                        raise Interrupted
                    return found
                if got == ERROR:
                    code = -struct.unpack_from("=i", data, at + 16)[0]
                    if code in (EOPNOTSUPP, EINVAL, EPROTONOSUPPORT):
                        return []
                    raise OSError(code, os.strerror(code))
                found.append(data[at + 16 : at + size])
                at += (size + 3) & ~3

    def ask(self, kind: int, body: bytes) -> bytes:
        """The body of the one answer. Raises OSError."""
        self.sock.send(message(kind, 0, body))
        data = self.sock.recv(1 << 18)
        if struct.unpack_from("=H", data, 4)[0] == ERROR:
            code = -struct.unpack_from("=i", data, 16)[0]
            raise OSError(code, os.strerror(code))
        return data[16 : struct.unpack_from("=I", data)[0]]

    def send(self, messages: list[bytes], *, acks: int = -1, ok: Sequence[int] = ()) -> Failed:
        """Send in one piece; returns (sequence number, errno) of each refused message.

        ``acks``: how many messages ask for an answer (by default: all do).
        """
        if not messages:
            return []
        self.sock.send(b"".join(messages))
        waiting, failed = len(messages) if acks < 0 else acks, []
        while waiting > 0:
            data, at = self.sock.recv(1 << 18), 0
            while at < len(data):
                size, kind, _, seq = struct.unpack_from("=IHHI", data, at)
                if kind == ERROR:
                    code = -struct.unpack_from("=i", data, at + 16)[0]
                    waiting -= 1
                    if code and code not in ok:
                        failed.append((seq, code))
                at += (size + 3) & ~3
        return failed


Failed = list[tuple[int, int]]


def message(kind: int, flags: int, body: bytes, seq: int = 1) -> bytes:
    """A request."""
    return struct.pack("=IHHII", len(body) + 16, kind, flags | REQUEST, seq, 0) + body
