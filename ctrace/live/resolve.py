"""Names for addresses, looked up in the background: nothing ever waits for one.

Not the screen, and not the end of the program either: a look-up in a dead DNS takes
many seconds, so its threads are left to themselves.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from ctrace.model.snapshot import Culprit, Snapshot, Victim

KNOWN: Final = 4096
"""Names kept; the least recently used go first."""
WAITING: Final = 64
"""Look-ups in progress at most: an incident with a million sources asks for only a few."""
THREADS: Final = 4
SHOWN: Final = 50
"""Rows whose addresses are looked up."""


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
        self._wanted: queue.SimpleQueue[str] = queue.SimpleQueue()
        for _ in range(THREADS):
            threading.Thread(target=self._work, name="ctrace-names", daemon=True).start()

    def name(self, address: str) -> str:
        """The name if it is known by now, else the address; asks for it meanwhile."""
        with self._lock:
            if address in self._names:
                self._names.move_to_end(address)
                return self._names[address] or address
            if address and address not in self._waiting and len(self._waiting) < WAITING:
                self._waiting.add(address)
                self._wanted.put(address)
        return address

    def _work(self) -> None:
        while True:
            address = self._wanted.get()
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
