"""Names for addresses, looked up in the background: the screen never waits for one."""

from __future__ import annotations

import socket
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final

from ctrace.model.snapshot import Culprit, Snapshot, Victim

KNOWN: Final = 4096
"""Names kept; the ones not used for longest go first."""
WAITING: Final = 64
"""Look-ups under way at most: an incident with a million sources asks for few of them."""
SHOWN: Final = 50
"""Rows whose addresses are asked for."""


def lookup(address: str) -> str:
    """The reverse name of an address; empty when it has none. Blocks."""
    try:
        name, _ = socket.getnameinfo((address, 0), socket.NI_NAMEREQD)
    except (OSError, UnicodeError):
        return ""
    return name


class Resolver:
    """A bounded cache of names, filled by a few threads."""

    def __init__(self, ask: Callable[[str], str] = lookup) -> None:
        self._ask = ask
        self._names: OrderedDict[str, str] = OrderedDict()
        self._waiting: set[str] = set()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="ctrace-names")

    def name(self, address: str) -> str:
        """The name if it is known by now, else the address; asks for it meanwhile."""
        with self._lock:
            if address in self._names:
                self._names.move_to_end(address)
                return self._names[address] or address
            if address and address not in self._waiting and len(self._waiting) < WAITING:
                self._waiting.add(address)
                self._pool.submit(self._fetch, address)
        return address

    def _fetch(self, address: str) -> None:
        name = self._ask(address)
        with self._lock:
            self._waiting.discard(address)
            self._names[address] = name
            while len(self._names) > KNOWN:
                self._names.popitem(last=False)

    def named(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with names in its keys, as far as they are known by now."""
        return replace(
            snapshot,
            culprits=tuple(map(self._culprit, snapshot.culprits[:SHOWN]))
            + snapshot.culprits[SHOWN:],
            victims=tuple(map(self._victim, snapshot.victims[:SHOWN])) + snapshot.victims[SHOWN:],
        )

    def _culprit(self, culprit: Culprit) -> Culprit:
        return replace(culprit, key=self._in(culprit.key, culprit.src, culprit.dst))

    def _victim(self, victim: Victim) -> Victim:
        return replace(victim, key=self._in(victim.key, victim.src, victim.dst))

    def _in(self, key: str, *addresses: str) -> str:
        for address in addresses:
            if address and address in key:
                key = key.replace(address, self.name(address))
        return key

    def close(self) -> None:
        """Ask for nothing more; names under way are forgotten."""
        self._pool.shutdown(wait=False, cancel_futures=True)
