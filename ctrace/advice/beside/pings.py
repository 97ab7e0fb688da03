"""Whether pings fare the same without entries: rehearsed, where there are any."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Final

import numpy as np

from ctrace.batch import Batch
from ctrace.model import remedies
from ctrace.record import MAPPED_PREFIX, PROTO_NUMBERS
from ctrace.ruleset.notrack import TABLE
from ctrace.ruleset.tags import Reader as Tags

PROTOS: Final = ("icmp", "icmpv6")
MOST: Final = 400
"""Addresses that are remembered of each namespace."""
OLD_S: Final = 60.0
"""Seconds after which it is rehearsed again, though no rule has changed."""


class Seen:
    """Who pings, by namespace."""

    def __init__(self) -> None:
        self._of: dict[int, set[bytes]] = defaultdict(set)

    def learn(self, batch: Batch) -> None:
        """From a batch's events."""
        events = batch.events
        some = events[np.isin(events["proto"], [PROTO_NUMBERS[name] for name in PROTOS])]
        for one in some[: 2 * MOST]:
            mine = self._of[int(one["netns"])]
            if len(mine) < MOST:
                mine |= {bytes(one["src"]), bytes(one["dst"])}

    def of(self, netns: int) -> set[bytes]:
        """Addresses; empty: nobody was seen to."""
        return {
            raw[12:] if raw[:12] == MAPPED_PREFIX else raw for raw in self._of.get(netns, set())
        }


class Pings:
    """The answer for one namespace, as long as its rules are the same."""

    def __init__(self) -> None:
        self._key: tuple[int, Mapping[str, int]] = 0, {}
        self._until = 0.0
        self._same = False

    def fare_the_same(self, netns_path: str, seen: set[bytes]) -> bool:
        """Whether they do with the rules that are offered. Raises CtraceError, OSError."""
        if not seen:
            return False
        with Tags(netns_path) as tags:
            key = tags.generation(), tags.legacy_digest()
        if key != self._key or time.monotonic() >= self._until:
            from ctrace.rehearsal.pings import fare_the_same
            from ctrace.rehearsal.snapshot import take

            self._same = False  # also where what follows fails
            self._key, self._until = key, time.monotonic() + OLD_S
            self._same = fare_the_same(take(netns_path), script(), seen)
        return self._same


def script() -> str:
    """The rules that :func:`ctrace.model.remedies.untrack_echo` offers, of both families, in the
    table that a rehearsal takes away again."""
    found = []
    for proto in PROTOS:
        (command,) = remedies.untrack_echo(proto, 0, 0).commands
        found.append(command.split("'")[1].replace(f"ctrace_echo_{proto}", TABLE))
    return "\n".join(found).replace("; add", "\nadd") + "\n"
