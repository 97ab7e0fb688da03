"""Which sockets receive on which port, and which process holds them.

sock_diag lists the sockets quickly. Finding the process takes a walk over the open files of every
process, so that is done in portions, and for new sockets only.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

from ctrace.errors import CtraceError
from ctrace.host.netns import enter

NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY = 4, 20
TCP_LISTEN, UNCONNECTED = 10, 7
INET_DIAG_CGROUP_ID: Final = 21
WAITING: Final = {
    socket.IPPROTO_TCP: 1 << TCP_LISTEN,
    socket.IPPROTO_UDP: 1 << UNCONNECTED,
    socket.IPPROTO_SCTP: 1 << TCP_LISTEN,
}
"""Protocol to the states (as a mask) of a socket that accepts packets from anybody."""


@dataclass(frozen=True)
class Bound:
    """A socket that waits on a port."""

    proto: int
    port: int
    inode: int
    cgroup: int = 0
    """cgroup v2 id of the socket's creator, from 5.8 on; else 0."""


def bound(path: str) -> list[Bound]:
    """Every waiting TCP, UDP and SCTP socket of the namespace at ``path``.

    Raises CtraceError when the namespace has gone.
    """
    found = []
    with enter(path), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as sock:
        for proto, states in WAITING.items():
            for family in (socket.AF_INET, socket.AF_INET6):
                # struct inet_diag_req_v2: family, protocol, ext, pad, states, an empty id
                wanted = struct.pack("=BBBBI48x", family, proto, 0, 0, states)
                head = struct.pack("=IHHII", 16 + len(wanted), SOCK_DIAG_BY_FAMILY, 0x301, 1, 0)
                try:
                    sock.send(head + wanted)
                    found += list(_answers(sock, proto))
                except OSError:
                    continue
    return found


def _answers(sock: socket.socket, proto: int) -> Iterator[Bound]:
    while True:
        data = sock.recv(1 << 16)
        at = 0
        while at + 16 <= len(data):
            size, kind = struct.unpack_from("=IH", data, at)
            if kind != SOCK_DIAG_BY_FAMILY or size < 88:
                return  # the end, or a protocol that this kernel has no sock_diag for
            # struct inet_diag_msg
            (port,) = struct.unpack_from(">H", data, at + 20)
            (inode,) = struct.unpack_from("=I", data, at + 84)
            yield Bound(proto, port, inode, _cgroup(data, at + 88, at + size))
            at += (size + 3) & ~3


def _cgroup(data: bytes, at: int, end: int) -> int:
    while at + 4 <= end:
        size, kind = struct.unpack_from("=HH", data, at)
        if kind == INET_DIAG_CGROUP_ID and size == 12:
            return int(struct.unpack_from("=Q", data, at + 4)[0])
        at += max((size + 3) & ~3, 4)
    return 0


class Holders:
    """Which process holds a socket; a walk over /proc/*/fd, resumed where it stopped."""

    def __init__(self, budget: float = 0.02) -> None:
        self.budget = budget
        """Seconds that one call may take."""
        self._of: dict[int, int] = {}  # socket inode -> pid; 0: nobody visible
        self._left: list[str] = []  # processes still to look at
        self._looking_for: set[int] = set()

    def find(self, inodes: Collection[int]) -> dict[int, int]:
        """Socket inode to process id, as far as known by now.

        A socket that a full walk has not found (a kernel socket, or one held by a
        process that may not be read) is not searched for again.
        """
        wanted = set(inodes)
        self._of = {inode: pid for inode, pid in self._of.items() if inode in wanted}
        for inode, pid in list(self._of.items()):
            if pid and not os.path.exists(f"/proc/{pid}"):
                del self._of[inode]
        self._looking_for &= wanted - self._of.keys()
        if not self._left:
            self._looking_for = wanted - self._of.keys()
            if self._looking_for:
                self._left = [name for name in os.listdir("/proc") if name.isdecimal()]
        until = time.monotonic() + self.budget
        while self._left and self._looking_for and time.monotonic() < until:
            self._look(self._left.pop())
        if not self._left:
            self._of.update(dict.fromkeys(self._looking_for, 0))
        return {inode: pid for inode, pid in self._of.items() if pid}

    def _look(self, pid: str) -> None:
        folder = f"/proc/{pid}/fd"
        try:
            names = os.listdir(folder)
        except OSError:
            return
        for name in names:
            try:
                link = os.readlink(f"{folder}/{name}")
            except OSError:
                continue
            if link.startswith("socket:["):
                inode = int(link[8:-1])
                if inode in self._looking_for:
                    self._of[inode] = int(pid)
                    self._looking_for.discard(inode)


def try_bound(path: str) -> list[Bound]:
    """:func:`bound`, empty for a namespace that has gone."""
    try:
        return bound(path)
    except CtraceError:
        return []
