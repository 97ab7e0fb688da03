"""Holds packets in an NFQUEUE, so that two with one tuple meet at confirm."""

from __future__ import annotations

import socket
import struct

from ctrace.lab import Node

QUEUE, PACKET, VERDICT, CONFIG = 3, 0, 1, 2
ACCEPT = 1
NETLINK_NETFILTER = 12


class Queue:
    """Queue ``number`` of a node: packets wait until :meth:`accept`."""

    def __init__(self, node: Node, number: int) -> None:
        self.number = number
        self.socket = node.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self.socket.settimeout(20)
        self._send(CONFIG, 1, struct.pack("!BBH", 1, 0, 0), ack=True)  # bind
        self._send(CONFIG, 2, struct.pack("!IB", 0, 1), ack=True)  # copy only the header

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def _send(self, message: int, attribute: int, value: bytes, *, ack: bool = False) -> None:
        body = struct.pack("!BBH", socket.AF_UNSPEC, 0, self.number)
        body += struct.pack("=HH", 4 + len(value), attribute) + value
        body += bytes(-len(body) % 4)
        header = struct.pack("=IHHII", 16 + len(body), QUEUE << 8 | message, 5 if ack else 1, 0, 0)
        self.socket.send(header + body)
        if ack:
            (error,) = struct.unpack_from("=i", self.socket.recv(4096), 16)
            if error:
                raise OSError(-error, "nfnetlink_queue")

    def wait(self, n: int) -> list[int]:
        """The numbers of the next ``n`` packets."""
        found: list[int] = []
        while len(found) < n:
            data = self.socket.recv(65536)
            at = 0
            while at + 16 <= len(data):
                size, kind = struct.unpack_from("=IH", data, at)
                if kind == QUEUE << 8 | PACKET:
                    # the packet header is the first attribute
                    found.append(struct.unpack_from("!I", data, at + 24)[0])
                at += (size + 3) & ~3
        return found

    def accept(self, packets: list[int]) -> None:
        """Let them go on, in this order."""
        for number in packets:
            self._send(VERDICT, 2, struct.pack("!II", ACCEPT, number))
