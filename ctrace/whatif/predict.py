"""How many entries a load holds, and what a lever frees, from what is held now.

An entry that has waited for longer than a shorter timeout would not be there under it. So what a
timeout frees is counted in the table: entries that a used port opens again after two seconds, or
that an RST ends, have not waited for 30, and no timeout of 30 s frees them. That is how a what-if
treats each flow (:mod:`ctrace.whatif.change`); here it is applied to a load that goes on as it was
seen. Expired entries stay until gc_worker (nf_conntrack_core.c) or a lookup finds them, and count:
the table model's arithmetic (:mod:`ctrace.whatif.table`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Optional

import numpy as np

from ctrace.model.composition import by_settings, error
from ctrace.model.remedies import TIMEOUTS
from ctrace.model.snapshot import Culprit, Rising, Table
from ctrace.whatif import growth
from ctrace.whatif.growth import LASTING, Range
from ctrace.whatif.table import (
    GC_SCAN_INTERVAL_CLAMP,
    GC_SCAN_INTERVAL_MAX,
    collected,
    next_interval,
)

GC_MEAN: Final = 35.0
"""Seconds that expired entries wait on average at most: half the interval, and a little
for passes that give up early (measured: 32 with 120 s timeouts)."""
POINTS: Final = (np.arange(16) + 0.5) / 16
"""Remaining timeouts of a steady load are spread evenly over its timeout."""
MOSTLY: Final = 0.9
"""Share of entries in one state from which that state stands for all."""
FEW_CLOSED: Final = 0.05
"""Share of closed entries below which they do not hide how many open ones come."""
OPEN: Final = {
    "ESTABLISHED": "tcp_timeout_established",
    "SYN_SENT": "tcp_timeout_syn_sent",
    "SYN_SENT2": "tcp_timeout_syn_sent",
    "SYN_RECV": "tcp_timeout_syn_recv",
    "FIN_WAIT": "tcp_timeout_fin_wait",
    "CLOSE_WAIT": "tcp_timeout_close_wait",
    "LAST_ACK": "tcp_timeout_last_ack",
}
NONE: Final = Range(0.0, 0.0)

Service = tuple[str, int]
"""Protocol and port."""
Part = tuple[str, int, bool]
"""A service's closed (TCP) or unanswered (UDP) entries if True, else its others."""


def load(rate: float, timeout: float) -> Range:
    """Entries held by ``rate`` new ones a second that live ``timeout`` seconds each.

    The lag of collection depends on every namespace's entries, so the range is as
    wide as its longest interval makes it.
    """
    return Range(*collected(rate * timeout, rate, GC_SCAN_INTERVAL_MAX))


def shortened(culprit: Culprit, first: bool, old: float, new: float, seconds: float) -> Range:
    """Entries of a key freed in time when those that wait ``old`` seconds wait ``new``.

    ``first``: its closed (TCP) or unanswered (UDP) entries, else its others; ``seconds`` were
    observed. Of those that have another timeout than ``old`` none is freed for sure.
    """
    other = culprit.composition.other_timeout or 0.0
    freed = _shortened(culprit, first, old, new, seconds)
    return Range(freed.low * (1 - other), freed.high)


def _shortened(culprit: Culprit, first: bool, old: float, new: float, seconds: float) -> Range:
    if new >= old or not culprit.held:
        return NONE
    share = {"tcp": culprit.closed, "udp": culprit.unreplied}.get(culprit.proto) or 0.0
    affected = culprit.held * (share * _waits(culprit) if first else 1 - share)
    lag = old / (old + GC_MEAN)  # entries then wait for their collection, too
    made_of = culprit.composition
    waited = made_of.waited if first else made_of.idle
    evenly = affected * (1 - new / old)
    if not waited:
        return _by_stay(culprit, new, Range(evenly * lag, evenly))
    gone = _longer(waited, new)
    doubt = error(gone, max(round(made_of.n * affected / culprit.held), 1)) if gone else 0.0
    gained = max(gone - _longer(waited, old) - doubt, 0.0)  # what has expired goes on waiting
    low, high = affected * gained * lag, affected * min(gone + doubt, 1.0)
    if not _settled(culprit, waited, old, seconds):  # in the end they wait for all of it
        high = max(high, evenly)
    return Range(low, high)


def _waits(culprit: Culprit) -> float:
    """The share of a key's closed entries that waits out TIME_WAIT; all where none was reset."""
    if culprit.proto != "tcp" or not culprit.composition.state("TIME_WAIT", "CLOSE"):
        return 1.0
    state = culprit.composition.state
    return (state("TIME_WAIT") or 0.0) / (state("TIME_WAIT", "CLOSE") or 1.0)


def _by_stay(culprit: Culprit, new: float, freed: Range) -> Range:
    """Reduced, where something other than the timeout ends entries: a reused port, an RST.

    Entries that go before the new timeout anyway are not freed by it.
    """
    stays = culprit.residence
    if stays.by == "timeout":
        return freed
    if stays.p90 is not None and stays.p90 <= new:
        return Range(0.0, 0.1 * freed.high)
    if stays.p50 is None or stays.p50 > new:
        return freed
    return Range(0.0, freed.high)


def _longer(waited: tuple[float, ...], seconds: float) -> float:
    """The share that has waited this long, from quantiles at even steps."""
    at = np.arange(len(waited)) / (len(waited) - 1)
    return 1 - float(np.interp(seconds, waited, at, left=0.0, right=1.0))


def _settled(culprit: Culprit, waited: tuple[float, ...], timeout: float, seconds: float) -> bool:
    """Whether it will hold in the end what it holds now: entries reach their timeout, or as many go
    as come."""
    if not culprit.new_per_s or waited[round(0.95 * (len(waited) - 1))] >= 0.9 * timeout:
        return True
    grown = growth.net(float(culprit.inserts), float(culprit.destroys), max(seconds, 1.0))
    return grown.low <= 0 and seconds > 2 * waited[-1]


@dataclass(frozen=True)
class _Stream:
    """Part of a table: entries that come at a rate and wait out one timeout."""

    part: Part
    held: float
    rate: float
    timeout: float
    refused: float
    """Packets per second that found the table full: the most that comes in once there is room."""
    waited: tuple[float, ...] = ()
    """As in :class:`ctrace.model.snapshot.Composition`."""
    settled: bool = False
    """Whether it will hold in the end what it holds now."""
    grows: Range = NONE
    """Growth in entries per second, from entries whose timeout nobody sees expire."""

    @property
    def expiring(self) -> float:
        """Entries per second whose timeout expires, at most."""
        return self.rate if self.timeout < LASTING else 0.0

    def reach(self, timeout: float) -> float:
        """The share of those that wait until such a timeout: none for a reused port."""
        if not (self.settled and self.waited and self.rate):
            return 1.0
        before = _longer(self.waited, 0.7 * timeout) - _longer(self.waited, timeout)
        return min(1.0, before * self.held / (0.3 * timeout * self.rate))

    def living(self, before: float) -> float:
        """Entries whose timeout has not expired; collections are ``before`` seconds apart."""
        if not self.expiring:
            return self.held
        if self.waited:
            return self.held * (1 - _longer(self.waited, self.timeout))
        # What it holds now depends on when the last collection was; its rate does not.
        return max(min(self.held, self.rate * self.timeout), self.held - self.rate * before)

    def under(self, timeout: float, before: float) -> float:
        """The same with a shorter timeout."""
        living = self.living(before)
        if timeout >= self.timeout:
            return living
        if self.waited:
            return min(living, self.held * (1 - _longer(self.waited, timeout)))
        return max(0.0, living - self.expiring * (self.timeout - timeout))


class Outlook:
    """One namespace's table if everything continues as seen, with and without levers.

    Where rates were not seen, or a timeout it depends on is unknown, it says nothing.
    """

    def __init__(
        self,
        table: Table,
        culprits: Iterable[Culprit],
        timeouts: Mapping[str, int],
        seconds: Optional[float] = 0.0,
    ) -> None:
        """``seconds`` were observed; None: a single moment, without rates."""
        self.max, self.seconds, self._now = table.max, seconds or 0.0, table
        self.known = seconds is not None and all(name in timeouts for name in TIMEOUTS)
        parts = culprits if self.known else ()
        self.streams = [s for one in parts for s in _streams(one, timeouts, self.seconds)]
        self.rest = max(0.0, table.count - sum(stream.held for stream in self.streams))
        """Entries of services that are not among ``culprits``: they stay."""

    def fill(
        self, untrack: Iterable[Service] = (), shorter: Optional[Mapping[Part, float]] = None
    ) -> Optional[tuple[float, float]]:
        """Mean fill without some services and with other timeouts, lowest first.

        Where it goes on rising (:meth:`rising`), up to full.
        """
        if not self.max or not self.known:
            return None
        after = self._after(set(untrack), shorter or {})
        high = self.max if self.rising(untrack, shorter) else after.high
        return round(after.low / self.max, 4), round(high / self.max, 4)

    def rising(
        self,
        untrack: Iterable[Service] = (),
        shorter: Optional[Mapping[Part, float]] = None,
        limit: int = 0,
    ) -> Optional[Rising]:
        """How it then keeps rising; None where it may just as well not. ``limit``: a different
        one."""
        gone = set(untrack)
        left = [stream.grows for stream in self.streams if stream.part[:2] not in gone]
        grows = Range(sum(one.low for one in left), sum(one.high for one in left))
        return growth.rising(grows, self._after(gone, shorter or {}), limit or self.max)

    def expected(
        self, untrack: Iterable[Service] = (), shorter: Optional[Mapping[Part, float]] = None
    ) -> float:
        """The middle of that: expired entries wait half an interval on average."""
        if not self.known:
            return self._now.fill
        after = self._after(set(untrack), shorter or {}, growing=False)
        return (after.low + after.high) / 2 / self.max if self.max else 0.0

    @property
    def most(self) -> float:
        """Entries at which it levels off if nothing is done, at most; ignoring the limit."""
        return self._after(set(), {}, limited=False).high if self.known else float(self._now.count)

    def _after(
        self,
        untrack: set[Service],
        shorter: Mapping[Part, float],
        *,
        growing: bool = True,
        limited: bool = True,
    ) -> Range:
        living = [(one.timeout, min(one.held, one.rate * one.timeout)) for one in self.streams]
        before = _interval(living)
        expiring, refused, prompt, most = 0.0, 0.0, self.rest, self.rest
        left: list[tuple[float, float]] = []
        for stream in self.streams:
            if stream.part[:2] in untrack:
                continue
            timeout = min(stream.timeout, shorter.get(stream.part, stream.timeout))
            alive = stream.under(timeout, before)
            left.append((timeout, alive))
            prompt += alive
            # Where it has not yet held them for a whole timeout, it is still growing.
            grown = 0.0 if stream.settled else stream.expiring * timeout
            most += max(alive, grown) if growing else alive
            most += stream.refused * min(timeout, LASTING) if growing else 0.0
            expiring += stream.expiring * stream.reach(timeout)
            refused += stream.refused if growing else 0.0
        after = _interval(left)
        limit = float(self.max) if self.max and limited else float("inf")
        return Range(
            collected(prompt, expiring, after, limit)[0],
            collected(most, expiring + refused, after, limit)[1],
        )


def _streams(culprit: Culprit, timeouts: Mapping[str, int], seconds: float) -> Iterator[_Stream]:
    reset, waits = 0.0, _waits(culprit)
    if culprit.proto == "tcp":
        share, first, other = (
            1.0 if culprit.closed is None else culprit.closed,
            timeouts["tcp_timeout_time_wait"],
            timeouts[_open_timeout(culprit)],
        )
        share, reset = share * waits, share * (1 - waits)
    elif culprit.proto == "udp":
        # Only flows with more than two packets over two seconds reach the longer timeout.
        share, first = culprit.unreplied or 0.0, timeouts["udp_timeout"]
        other = first
    else:
        share, first, other = 0.0, timeouts["icmp_timeout"], timeouts["icmp_timeout"]
    made_of = culprit.composition
    if not by_settings(made_of) and culprit.residence.p50 is not None:
        first = other = round(culprit.residence.p50)
    for closed, part, timeout, waited in (
        (True, share, first, made_of.waited),
        (False, reset, timeouts["tcp_timeout_close"], ()),
        (False, 1 - share - reset, other, made_of.idle),
    ):
        if not part:
            continue
        grows = NONE
        if not closed and timeout >= LASTING and seconds:
            grows = _grows(culprit, share + reset, seconds)
        yield _Stream(
            (culprit.proto, culprit.port or 0, closed),
            culprit.held * part,
            culprit.new_per_s * part,
            float(timeout),
            culprit.drop_per_s * part,
            waited,
            bool(waited) and _settled(culprit, waited, timeout, seconds),
            grows,
        )


def _open_timeout(culprit: Culprit) -> str:
    """The timeout that nearly all entries that are not closed wait for."""
    states = [(state, n) for state, n in culprit.states if state in OPEN]
    total = sum(n for _, n in states)
    for state, n in states:
        if n >= MOSTLY * total:
            return OPEN[state]
    return OPEN["ESTABLISHED"]


def _grows(culprit: Culprit, closed: float, seconds: float) -> Range:
    """Open connections that come, less those that go; nothing sure where closed ones hide it."""
    found = growth.net(float(culprit.inserts), float(culprit.destroys), seconds)
    if not (culprit.composition.n and culprit.new_per_s) or closed > FEW_CLOSED:
        return Range(0.0, max(0.0, found.high))
    return Range(max(0.0, found.low), max(0.0, found.high))


def _interval(living: Iterable[tuple[float, float]]) -> float:
    """gc_worker's pause, from (timeout, entries) of what is in the table and not expired."""
    parts = list(living)
    left = [min(timeout, GC_SCAN_INTERVAL_CLAMP) * POINTS for timeout, _ in parts]
    many = np.repeat([n / len(POINTS) for _, n in parts], len(POINTS))
    return next_interval(np.concatenate(left) if left else np.zeros(0), many)
