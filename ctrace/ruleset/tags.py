"""Which of our comments a chain has, read with as little work as possible.

A few messages of nfnetlink or one getsockopt, nothing started, nothing parsed: what has to be
looked at several times a second on a host with any number of rules.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import zlib
from collections import Counter
from collections.abc import Collection
from typing import Final

from ctrace.errors import CtraceError
from ctrace.host.netns import enter
from ctrace.host.rawlink import NETFILTER, Interrupted, Link, number, split, text
from ctrace.ruleset.notrack import TABLE, TAG

FAMILY: Final = {"inet": 1, "ip": 2, "arp": 3, "netdev": 5, "bridge": 7, "ip6": 10}
"""NFPROTO_* by nft's names."""
_GETTABLE, _GETRULE, _GETGEN = (10 << 8 | kind for kind in (1, 7, 16))
_GET_INFO, _GET_ENTRIES = 64, 65
"""IPT_SO_GET_INFO and IPT_SO_GET_ENTRIES (include/uapi/linux/netfilter_ipv4/ip_tables.h)."""
_INFO: Final = 84
_ENTRIES: Final = 40
"""Bytes of struct ipt_getinfo, and of struct ipt_get_entries before its entries."""
_ENTRY: Final = {"ip": (84, 96), "ip6": (136, 152)}
"""In struct ipt_entry and ip6t_entry: the bytes of the address part, after which come nfcache and
the offsets of target and next entry; and where the counters are."""
_libc = ctypes.CDLL(None, use_errno=True)


class Reader:
    """Reads the namespace at a path, briefly: an open socket would keep the namespace alive."""

    def __init__(self, path: str) -> None:
        """Raises CtraceError when it is gone."""
        self._path = path
        self._link = Link(path, NETFILTER)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._link.sock.close()

    def generation(self) -> int:
        """A number that changes with every change of nftables' rules; 0 without nftables."""
        try:
            found = dict(split(self._link.ask(_GETGEN, _head(0)), 4))
        except OSError:
            return 0
        return number(found.get(1, b""))

    def has_table(self, family: str, table: str) -> bool:
        """Whether nftables has it."""
        try:
            self._link.ask(_GETTABLE, _head(FAMILY[family]) + text(1, table))
        except OSError:
            return False
        return True

    def in_chain(self, family: str, table: str, chain: str, tags: Collection[str]) -> Counter[str]:
        """How many rules of a chain carry each of these comments (iptables-nft's as well)."""
        ask = _head(FAMILY[family]) + text(1, table) + text(2, chain)
        wanted = {tag: tag.encode() + b"\0" for tag in tags}
        try:
            rules = self._link.dump(_GETRULE, ask)
        except (Interrupted, OSError):
            raise CtraceError("the rules changed while they were read") from None
        return Counter(tag for rule in rules for tag, raw in wanted.items() if raw in rule)

    def in_legacy(self, family: str, table: str, tags: Collection[str]) -> Counter[str]:
        """The same for a whole table of iptables-legacy, which has no generation number."""
        with enter(self._path):
            entries = _legacy(family, table)
        return Counter({tag: entries.count(tag.encode() + b"\0") for tag in tags})

    def has_ours(self) -> bool:
        """Whether untracking rules of ours are there."""
        if self.has_table("inet", TABLE):
            return True
        jump = (f"{TAG}jump",)
        for family in _ENTRY:
            if any(self.in_chain(family, "raw", "PREROUTING", jump).values()):
                return True
        with enter(self._path):
            legacy = [family for family in _ENTRY if "raw" in _legacy_tables(family)]
        return any(any(self.in_legacy(one, "raw", jump).values()) for one in legacy)

    def legacy_digest(self) -> dict[str, int]:
        """A number for each existing table of iptables-legacy, which changes with its rules."""
        found = {}
        with enter(self._path):
            for family, (head, counters) in _ENTRY.items():
                for table in _legacy_tables(family):
                    found[f"{family} {table}"] = _digest(_legacy(family, table), head, counters)
        return found


def _legacy_tables(family: str) -> list[str]:
    """None where the tool has never been used: asking for a table would create it."""
    try:
        with open(f"/proc/thread-self/net/{family}_tables_names") as file:
            return sorted(file.read().split())
    except OSError:
        return []


def _digest(entries: bytes, head: int, counters: int) -> int:
    """A digest of a table's entries, without their counters."""
    found, at = 0, _ENTRIES
    while at + counters + 16 <= len(entries):
        (size,) = struct.unpack_from("=H", entries, at + head + 6)
        found = zlib.crc32(entries[at : at + counters], found)
        found = zlib.crc32(entries[at + counters + 16 : at + size], found)
        if size <= counters:
            break
        at += size
    return found


def _head(family: int) -> bytes:
    return struct.pack("=BBH", family, 0, 0)


def _legacy(family: str, table: str) -> bytes:
    six = family == "ip6"
    level = socket.IPPROTO_IPV6 if six else socket.IPPROTO_IP
    with socket.socket(
        socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW
    ) as sock:
        info = _getsockopt(sock, level, _GET_INFO, table.encode(), _INFO)
        (size,) = struct.unpack_from("=I", info, _INFO - 4)
        head = table.encode().ljust(32, b"\0") + struct.pack("=I", size)
        return _getsockopt(sock, level, _GET_ENTRIES, head, _ENTRIES + size)


def _getsockopt(sock: socket.socket, level: int, name: int, head: bytes, size: int) -> bytes:
    """getsockopt(2) with an input in the buffer, which Python's lacks."""
    buffer = ctypes.create_string_buffer(head, size)
    length = ctypes.c_uint32(size)
    if _libc.getsockopt(sock.fileno(), level, name, buffer, ctypes.byref(length)) != 0:
        code = ctypes.get_errno()
        raise CtraceError(f"iptables-legacy's rules cannot be read: {os.strerror(code)}")
    return buffer.raw
