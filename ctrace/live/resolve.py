"""Names for addresses, looked up in the background: nothing ever waits for one.

Not the screen, and not the end of the program either: a look-up in a dead DNS takes
many seconds, so its threads are left to themselves.
"""

from __future__ import annotations

import queue
import re
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from ctrace.model.snapshot import Culprit, Snapshot, Victim
from ctrace.names import clean

KNOWN: Final = 4096
"""Names kept; the least recently used go first."""
WAITING: Final = 64
"""Look-ups in progress at most: an incident with a million sources asks for only a few."""
THREADS: Final = 4
SHOWN: Final = 50
"""Rows whose addresses are looked up."""


def lookup(address: str) -> str:
    """The reverse name of an address, harmless to show; empty when it has none. Blocks."""
    try:
        name, _ = socket.getnameinfo((address, 0), socket.NI_NAMEREQD)
    except (OSError, UnicodeError):
        return ""
    return clean(name)


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
        """Each address where it stands as a whole, not at the beginning of a longer one."""
        whole = (
            re.escape(one) + (r"(?![0-9a-f:.])" if ":" in one else r"(?!\.?[0-9])")
            for one in addresses
            if one
        )
        pattern = "|".join(whole)
        if not pattern:
            return key
        return re.sub(rf"(?<![0-9a-f:.])(?:{pattern})", lambda found: self.name(found[0]), key)
