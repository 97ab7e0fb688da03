"""A recording as flows: when each tried to enter the table, and how long it would stay.

All times are seconds since the recording's first event or reading.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.record import GRE, TCP, UDP

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]

# Seconds by default (net/netfilter/nf_conntrack_proto_tcp.c tcp_timeouts, in state order).
TCP_TIMEOUTS: Final = (120.0, 120.0, 60.0, 432000.0, 120.0, 60.0, 30.0, 120.0, 10.0, 120.0)
OTHER_TIMEOUTS: Final = {1: 30.0, 58: 30.0, UDP: 30.0, GRE: 30.0}
STREAM_TIMEOUTS: Final = {UDP: 120.0, GRE: 180.0}
GENERIC: Final = 600.0


@dataclass(frozen=True)
class Readings:
    """The kernel's own counts over time: parallel arrays."""

    ts: F64
    netns: I64
    count: I64
    limit: I64
    buckets: I64
    timed: bool = True
    """Whether ``ts`` is when each was taken, rather than when its batch of events ended."""

    def limits(self, since: float = 0.0) -> dict[int, tuple[F64, I64]]:
        """By namespace, when it was read, in seconds after ``since``, and its limit then."""
        found = {}
        for inum in np.unique(self.netns).tolist():
            mine = self.netns == inum
            found[inum] = self.ts[mine] - since, self.limit[mine]
        return found


class Basis(IntEnum):
    """How it is known how a flow ended, or would have."""

    SEEN = 0
    """Its end."""
    LOOKED = 1
    """A look at it while it lived."""
    LIKE = 2
    """Flows like it, at the same age or older."""
    NOTHING = 3


@dataclass(frozen=True)
class Flows:
    """One element per flow, sorted by ``arrive``; then the attempts to enter, sorted by time."""

    netns: I64
    arrive: F64
    """When the entry was made; for a flow that never got in, its first refused packet."""
    expire: F64
    """When its timeout passes: last refresh + timeout. inf: it outlives the recording."""
    end: F64
    """When it was deleted before that (RST, reopened, conntrack -D); inf when it was not."""
    leave: F64
    """When it really left the table; inf when it was still there; NaN when it was evicted
    or never in."""
    timeout: F64
    """Seconds, for the state that it died in."""
    proto: U8
    state: U8
    assured: Bool
    sport: I64
    dport: I64
    reply_sport: I64
    existed: Bool
    """Whether it was there before the recording began: its age is unknown."""
    basis: U8
    """:class:`Basis` of ``expire``, ``timeout``, ``state`` and ``assured``."""
    among: I64
    """For :data:`Basis.LIKE`: how many it was drawn from."""
    sure: Bool
    """Whether ``timeout`` is the one that it had: a ``ct timeout`` policy gives another, and so
    does a setting that was changed since."""
    key: U64
    """A hash of its tuple, zone and namespace: a table holds one entry of each."""
    attempt_at: F64
    attempt_of: I64
    """Index of the flow."""

    def __len__(self) -> int:
        return len(self.arrive)

    @property
    def known(self) -> Bool:
        """Whether its end was seen."""
        found: Bool = self.basis == Basis.SEEN
        return found

    def again(self) -> F64:
        """When the next entry with the same tuple was made, which ends this one at the latest."""
        entered = np.flatnonzero(self.known | ~np.isnan(self.leave))
        order = entered[np.lexsort((self.arrive[entered], self.key[entered]))]
        found = np.full(len(self), np.inf)
        same = self.key[order][1:] == self.key[order][:-1]
        found[order[:-1][same]] = self.arrive[order[1:][same]]
        return found

    def only(self, keep: Bool) -> Flows:
        """Some of the flows, with their attempts."""
        number, tries = np.cumsum(keep) - 1, keep[self.attempt_of]
        columns = {
            one.name: getattr(self, one.name)[keep]
            for one in fields(self)
            if not one.name.startswith("attempt")
        }
        of = number[self.attempt_of[tries]]
        return Flows(**columns, attempt_at=self.attempt_at[tries], attempt_of=of)

    def of_service(self, proto: int, port: int) -> Bool:
        """Flows that NOTRACK rules for a service keep out: to its port, before or after NAT."""
        found: Bool = (self.proto == proto) & ((self.dport == port) | (self.reply_sport == port))
        return found


@dataclass(frozen=True)
class Recorded:
    """What was gathered from a recording."""

    flows: Flows
    readings: Readings
    seconds: float
    started: int
    """Boot clock, ns, of second 0."""
    drops: dict[int, int]
    evictions: dict[int, int]
    drop_at: dict[int, F64]
    """Per namespace, when packets were refused."""
    lag_s: float
    """Mean time between an entry's timeout and its collection, as recorded; NaN: none seen."""
    collections: F64
    """When gc_worker passed, as far as bursts of expired entries going show it."""
    lost: int
    cut: int
    """Events at the beginning that were left out."""
    names: dict[int, str]
    """Namespaces, as the recording names them."""
    texts: bool = False
    """Whether it was made of texts, which count no refusals and no evictions."""
    half_s: float = 0.0
    first: Optional[Flows] = None
    """The flows as they were known ``half_s`` seconds after the start: what a prediction of
    the rest is made from. None where there was nothing by then."""


def default_timeout(proto: U8, state: U8, assured: Bool) -> F64:
    """The kernel's default timeout of each flow's last state, seconds."""
    result = np.full(len(proto), GENERIC)
    tcp = proto == TCP
    result[tcp] = np.array(TCP_TIMEOUTS)[np.minimum(state[tcp], len(TCP_TIMEOUTS) - 1)]
    for number, seconds in OTHER_TIMEOUTS.items():
        result[proto == number] = seconds
    for number, seconds in STREAM_TIMEOUTS.items():
        result[(proto == number) & assured] = seconds
    return result
