"""TCP sockets of a namespace as sock_diag lists them: which there are, and what each sent again."""

from __future__ import annotations

import socket
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY = 4, 20
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST_DUMP: Final = 0x301
INET_DIAG_INFO: Final = 2
TOTAL_RETRANS: Final = 100
"""Of tcpi_total_retrans in struct tcp_info (linux/tcp.h), the same since 2.6.33."""
ESTABLISHED, SYN_SENT, SYN_RECV, CLOSE_WAIT = 1, 2, 3, 8
OPENING: Final = (SYN_SENT, SYN_RECV)
OPEN: Final = (ESTABLISHED, CLOSE_WAIT)
"""From these a socket goes straight to CLOSE only by a reset: Tcp.EstabResets."""
STATES: Final = OPENING + OPEN + (4, 5, 9, 11)
"""All that can be reset or send again; neither listeners nor TIME_WAIT."""


@dataclass(frozen=True)
class Connection:
    """One socket."""

    state: int
    sport: int
    dport: int
    resent: int
    """Segments sent again in its life."""


def connections() -> dict[bytes, Connection]:
    """TCP sockets by the kernel's cookie, in the namespace that this thread is in.

    Raises OSError when the kernel does not answer.
    """
    found: dict[bytes, Connection] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as diag:
        diag.settimeout(2)
        wanted = sum(1 << state for state in STATES)
        for family in (socket.AF_INET, socket.AF_INET6):
            # struct inet_diag_req_v2: family, protocol, ext, pad, states, an empty id
            body = struct.pack(
                "=BBBxI48x", family, socket.IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), wanted
            )
            head = (16 + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST_DUMP, 1, 0)
            diag.sendto(struct.pack("=IHHII", *head) + body, (0, 0))
            found.update(_answers(diag))
    return found


def connecting(there: dict[bytes, Connection], ports: Collection[int]) -> int:
    """Sockets that wait for the first answer from one of these ports."""
    return sum(one.state == SYN_SENT and one.dport in ports for one in there.values())


def _answers(diag: socket.socket) -> Iterator[tuple[bytes, Connection]]:
    while True:
        data = diag.recv(1 << 17)
        at = 0
        while at + 16 <= len(data):
            size, kind = struct.unpack_from("=IH", data, at)
            if kind in (NLMSG_ERROR, NLMSG_DONE) or size < 88:
                return
            # struct inet_diag_msg: state at 1, ports at 4, the cookie at 44
            sport, dport = struct.unpack_from("!HH", data, at + 20)
            resent = _resent(data, at + 88, at + size)
            yield data[at + 60 : at + 68], Connection(data[at + 17], sport, dport, resent)
            at += (size + 3) & ~3


def _resent(data: bytes, at: int, end: int) -> int:
    while at + 4 <= end:
        size, kind = struct.unpack_from("=HH", data, at)
        if kind == INET_DIAG_INFO and size >= 4 + TOTAL_RETRANS + 4:
            return int(struct.unpack_from("=I", data, at + 4 + TOTAL_RETRANS)[0])
        at += max((size + 3) & ~3, 4)
    return 0
