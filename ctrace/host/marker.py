"""The mark on a namespace that ctrace made for a rehearsal: it is none of the host's.

The mark is the alias of ``lo``: no rule, route or sysctl depends on an interface's alias.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from typing import Final

ALIAS: Final = b"ctrace rehearsal\0"
RTM_GETLINK: Final = 18
RTM_SETLINK: Final = 19
IFLA_IFALIAS: Final = 20
NLM_F_REQUEST: Final = 1
NLM_F_ACK: Final = 4
NS_GET_USERNS: Final = 0xB701
_HEAD: Final = struct.Struct("=IHHII")
_LO: Final = struct.pack("=BxHiII", 0, 0, 1, 0, 0)
"""``struct ifinfomsg`` of the first interface: ``lo`` has index 1 in every namespace."""


def mark() -> None:
    """Mark the namespace of this thread. Raises OSError."""
    alias = struct.pack("=HH", 4 + len(ALIAS), IFLA_IFALIAS) + ALIAS + bytes(-len(ALIAS) % 4)
    _ask(RTM_SETLINK, NLM_F_ACK, _LO + alias)


def marked() -> bool:
    """Whether the namespace of this thread is marked, and made by a process with our own user
    namespace: nobody else can hide behind the mark. Raises OSError."""
    if not _made_here():
        return False
    return attributes(_ask(RTM_GETLINK, 0, _LO), len(_LO)).get(IFLA_IFALIAS) == ALIAS


def attributes(message: bytes, at: int) -> dict[int, bytes]:
    """Those of a netlink message from a place on, by their type."""
    found = {}
    while at + 4 <= len(message):
        size, kind = struct.unpack_from("=HH", message, at)
        if size < 4:
            break
        found[kind] = message[at + 4 : at + size]
        at += (size + 3) & ~3
    return found


def _made_here() -> bool:
    there = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        owner = fcntl.ioctl(there, NS_GET_USERNS)
    finally:
        os.close(there)
    try:
        return os.fstat(owner).st_ino == os.stat("/proc/self/ns/user").st_ino
    finally:
        os.close(owner)


def _ask(kind: int, flags: int, body: bytes) -> bytes:
    """The body of the answer. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as sock:
        sock.send(_HEAD.pack(16 + len(body), kind, flags | NLM_F_REQUEST, 1, 0) + body)
        answer = sock.recv(1 << 16)
    size, kind, *_ = _HEAD.unpack_from(answer)
    if kind == 2:  # NLMSG_ERROR; an error of 0 acknowledges
        code = -struct.unpack_from("=i", answer, 16)[0]
        if code:
            raise OSError(code, os.strerror(code))
    return answer[16:size]
