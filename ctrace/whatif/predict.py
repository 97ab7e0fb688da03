"""How many entries a load holds, and what a lever frees, from what is held now.

An entry that has waited for longer than a shorter timeout would not be there under it. So what a
timeout frees is counted in the table: entries that a used port opens again after two seconds, or
that an RST ends, have not waited for 30, and no timeout of 30 s frees them. That is how a what-if
treats each flow (:mod:`ctrace.whatif.change`); here it is applied to a load that goes on as it was
seen. Both take the same :class:`ctrace.whatif.settings.Levers`. Expired entries stay until
gc_worker (nf_conntrack_core.c) or a lookup finds them, and count: the table model's arithmetic
(:mod:`ctrace.whatif.table`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Optional

import numpy as np

from ctrace.model.composition import by_settings, error
from ctrace.model.keys.rich import TREND
from ctrace.model.remedies import TIMEOUTS
from ctrace.model.snapshot import Culprit, Residence, Rising, Table
from ctrace.model.stays import pace
from ctrace.record import PROTO_NUMBERS
from ctrace.whatif import growth
from ctrace.whatif.growth import LASTING, Range
from ctrace.whatif.settings import Levers, Timeout
from ctrace.whatif.table import GC_SCAN_INTERVAL_CLAMP, collected, next_interval

POINTS: Final = (np.arange(16) + 0.5) / 16
"""Remaining timeouts of a steady load are spread evenly over its timeout."""
MOSTLY: Final = 0.9
"""Share of entries in one state from which that state stands for all."""
LATELY: Final = 6
"""Intervals in which a key holds as many as ever, though many come: as many go."""
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
AS_IT_IS: Final = Levers()


def _waits(culprit: Culprit) -> float:
    """The share of a key's closed entries that waits out TIME_WAIT; all where none was reset."""
    if culprit.proto != "tcp" or not culprit.composition.state("TIME_WAIT", "CLOSE"):
        return 1.0
    state = culprit.composition.state
    return (state("TIME_WAIT") or 0.0) / (state("TIME_WAIT", "CLOSE") or 1.0)


def _longer(waited: tuple[float, ...], seconds: float) -> float:
    """The share that has waited this long, from quantiles at even steps."""
    at = np.arange(len(waited)) / (len(waited) - 1)
    return 1 - float(np.interp(seconds, waited, at, left=0.0, right=1.0))


def _settled(culprit: Culprit, waited: tuple[float, ...], timeout: float, seconds: float) -> bool:
    """Whether it will hold in the end what it holds now: entries reach their timeout, or as many go
    as come."""
    if waited[round(0.95 * (len(waited) - 1))] >= 0.9 * timeout:
        return True
    rate, even = _pace(culprit, seconds)
    if not rate or not even:
        return not rate
    lately = culprit.trend[-LATELY:]
    if len(lately) == LATELY:
        chance, come = 2 * math.sqrt(max(lately)), (LATELY - 1) * culprit.new_per_s
        # without ends it would have risen by more
        if max(lately) - min(lately) <= chance < come - 2 * math.sqrt(come):
            return True
    grown = growth.net(float(culprit.inserts), float(culprit.destroys), max(seconds, 1.0))
    return grown.low <= 0 and seconds > 2 * waited[-1]


def _pace(culprit: Culprit, seconds: float) -> tuple[float, bool]:
    """Entries that come a second, and whether they come evenly. Where more are refused it is the
    table that lets few in, not the load that ends."""
    rate, points = culprit.new_per_s, len(culprit.trend)
    if culprit.drop_per_s:
        return rate, True
    if points < TREND:
        seconds = points or seconds
    return pace(rate, culprit.inserts, seconds) if seconds else (rate, True)


@dataclass(frozen=True)
class _Stream:
    """Part of a table: entries that come at a rate and wait out one timeout."""

    service: tuple[int, int]
    """Protocol number and port."""
    setting: str
    """The timeout's name, as in :data:`ctrace.whatif.settings.TIMEOUTS`."""
    by_settings: bool
    """Whether the setting gives it, for most: else only a policy for its port changes it."""
    held: float
    rate: float
    all_rate: float
    """That of the whole key, which ``stays`` are of."""
    timeout: float
    refused: float
    """Packets per second that found the table full: the most that comes in once there is room."""
    waited: tuple[float, ...]
    """As in :class:`ctrace.model.snapshot.Composition`."""
    looks: int
    """How many entries ``waited`` is from, about."""
    other: float
    """Share with another timeout than ``timeout``, or an unknown one: no setting frees these for
    sure."""
    stays: Residence
    """How long the key's entries stay."""
    settled: bool
    """Whether it will hold in the end what it holds now."""
    grows: Range
    """Growth in entries per second, from entries whose timeout nobody sees expire."""
    lately: float
    """The most that it held lately, where entries do not come evenly; else 0."""

    def changed(self, levers: Levers) -> float:
        """Its timeout under these: a longer one is not foretold from what is held."""
        seconds = [one.seconds for one in levers.timeouts if self._has(one)]
        return min([self.timeout, *seconds[-1:]])

    def _has(self, changed: Timeout) -> bool:
        if changed.port is None:
            return self.by_settings and changed.name == self.setting
        return (changed.proto, changed.port) == self.service and changed.name == self.setting

    def expiring(self, timeout: float) -> float:
        """Entries per second whose timeout expires if it is this, at most."""
        return self.rate if timeout < LASTING else 0.0

    def lasting(self, seconds: float) -> float:
        """Entries per second that will stay for longer than this, at most: fewer where many were
        seen to end before, as those of ports that are used again."""
        shares = [self.share_beyond(q) for q, stay in self._measured() if stay <= seconds]
        return min([self.expiring(seconds), *(self.all_rate * share for share in shares)])

    def grown(self, timeout: float) -> float:
        """How many it will hold in the end, at most, if it has not held them for so long yet."""
        means = [stay + self.share_beyond(q) * timeout for q, stay in self._measured()]
        return min([self.expiring(timeout) * timeout, *(self.all_rate * mean for mean in means)])

    def share_beyond(self, q: float) -> float:
        """The share that stays longer than quantile ``q``, at most."""
        return min(1.0, 1 - q + error(1 - q, self.stays.n))

    def _measured(self) -> Iterator[tuple[float, float]]:
        """Quantiles of how long the key's entries stay, from those that were seen to end."""
        if self.stays.by == "ends":
            of = ((0.5, self.stays.p50), (0.9, self.stays.p90), (0.99, self.stays.p99))
            yield from ((q, seconds) for q, seconds in of if seconds is not None)

    def reach(self, timeout: float) -> float:
        """The share of entries that wait for such a timeout; none if the port is used again."""
        if not (self.settled and self.waited and self.rate):
            expiring = self.expiring(timeout)
            return self.lasting(timeout) / expiring if expiring else 1.0
        before = _longer(self.waited, 0.7 * timeout) - _longer(self.waited, timeout)
        return min(1.0, before * self.held / (0.3 * timeout * self.rate))

    def living(self, before: float) -> float:
        """Entries whose timeout has not expired; collections are ``before`` seconds apart."""
        if not self.expiring(self.timeout):
            return self.held
        if self.waited:
            return self.held * (1 - _longer(self.waited, self.timeout))
        # What it holds now depends on when the last collection was; its rate does not.
        return max(min(self.held, self.rate * self.timeout), self.held - self.rate * before)

    def under(self, timeout: float, before: float) -> Range:
        """How many of these would be there with a shorter timeout: those that have not waited for
        it, expired or not."""
        living = self.living(before)
        if timeout >= self.timeout:
            return Range(living, living)
        if self.waited:
            gone = _longer(self.waited, timeout)
            doubt = error(gone, self.looks) if gone else 0.0
            low = min(living, self.held * (1 - min(gone + doubt, 1.0)))
            high = min(living, self.held * (1 - max(gone - doubt, 0.0)))
        else:
            spread = living * timeout / self.timeout
            low = max(0.0, min(spread, living - self.expiring(timeout) * (self.timeout - timeout)))
            high = low
            # Something else than the timeout ends them before: a reused port, an RST.
            if self.stays.by != "timeout" and (self.stays.p50 or timeout + 1) <= timeout:
                sure = 0.9 if (self.stays.p90 or timeout + 1) <= timeout else 0.0
                low, high = max(low, sure * living), living
        return Range(low, high + self.other * (living - high))

    def freed(self, timeout: float, before: float, after: float) -> Range:
        """Entries fewer in time with a shorter timeout; collections are ``before`` seconds apart
        now, and then ``after``.

        Those that have expired already wait for their collection as others will: none is freed.
        """
        if timeout >= self.timeout or self.other >= 1:
            return NONE
        living, kept = self.living(before), self.under(timeout, before)
        waiting = self.expiring(self.timeout) * self.reach(self.timeout) * before
        later = self.expiring(timeout) * self.reach(timeout) * after
        low = living - kept.high - max(0.0, later - waiting / 2)
        low -= 2 * math.sqrt(max(low, 0.0))  # as many come again, but for chance
        high = min(living - kept.low + waiting, self.held)
        if self.lately:  # it may hold none by then, or as many as it did
            low, high = 0.0, max(high, self.lately)
        if self.waited and not self.settled and self.timeout < LASTING:
            # of what it will hold: they wait for all of it
            high = max(high, self.lasting(timeout) * (self.timeout - timeout + before))
        return Range(max(0.0, low), high)


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
        self.streams = [s for one in culprits for s in _streams(one, timeouts, seconds)]
        self.rest = max(0.0, table.count - sum(stream.held for stream in self.streams))
        """Entries of services that are not among ``culprits``: they stay."""

    def fill(self, levers: Levers = AS_IT_IS) -> Optional[tuple[float, float]]:
        """Mean fill under the levers, lowest first.

        Where it goes on rising (:meth:`rising`), up to full.
        """
        if not self.max or not self.known:
            return None
        after = self._after(levers)
        high = self.max if self.rising(levers) else after.high
        return round(after.low / self.max, 4), round(high / self.max, 4)

    def frees(self, levers: Levers) -> Range:
        """Entries that other timeouts free in time: what :meth:`fill` counts, of the parts that
        have them alone. Nothing of those whose timeout is not known."""
        before = self._before()
        new = [one.changed(levers) for one in self.streams]
        after = _interval(
            (timeout, one.under(timeout, before).middle) for timeout, one in zip(new, self.streams)
        )
        found = NONE
        for timeout, one in zip(new, self.streams):
            found += one.freed(timeout, before, after)
        if not self.max:
            return found
        most = max(self.max, self._now.count)  # what the table can hold
        return Range(min(found.low, most), min(found.high, most))

    def rising(self, levers: Levers = AS_IT_IS) -> Optional[Rising]:
        """How it then keeps rising; None where it may just as well not."""
        left = [one.grows for one in self._left(levers) if one.changed(levers) >= LASTING]
        grows = Range(sum(one.low for one in left), sum(one.high for one in left))
        limit = self.max if levers.limit is None else levers.limit
        return growth.rising(grows, self._after(levers), limit)

    def expected(self, levers: Levers = AS_IT_IS) -> float:
        """The middle of that: expired entries wait half an interval on average. What comes in
        bursts counts as now."""
        if not self.known:
            return self._now.fill
        after = self._after(levers, growing=False)
        return after.middle / self.max if self.max else 0.0

    @property
    def most(self) -> float:
        """Entries at which it levels off if nothing is done, at most; ignoring the limit."""
        return self._after(AS_IT_IS, limited=False).high if self.known else float(self._now.count)

    def _before(self) -> float:
        """gc_worker's pause as it is."""
        return _interval(
            (one.timeout, min(one.held, one.rate * one.timeout)) for one in self.streams
        )

    def _left(self, levers: Levers) -> list[_Stream]:
        """What stays tracked."""
        return [one for one in self.streams if one.service not in levers.notrack]

    def _after(self, levers: Levers, *, growing: bool = True, limited: bool = True) -> Range:
        before = self._before()
        expiring, refused, prompt, most = 0.0, 0.0, self.rest, self.rest
        left: list[tuple[float, float]] = []
        for stream in self._left(levers):
            timeout = stream.changed(levers)
            alive = stream.under(timeout, before)
            left.append((timeout, alive.middle))
            prompt += 0.0 if stream.lately and growing else alive.low
            # Where it has not yet held them for a whole timeout, it is still growing.
            grown = stream.lately if stream.settled else max(stream.grown(timeout), stream.lately)
            most += max(alive.high, grown) if growing else alive.high
            most += stream.refused * min(timeout, LASTING) if growing else 0.0
            expiring += stream.expiring(timeout) * stream.reach(timeout)
            refused += stream.refused if growing else 0.0
        after = _interval(left)
        limit = float(self.max) if self.max and limited else float("inf")
        return Range(
            collected(prompt, expiring, after, limit)[0],
            collected(most, expiring + refused, after, limit)[1],
        )


def _streams(
    culprit: Culprit, timeouts: Mapping[str, int], seconds: Optional[float]
) -> Iterator[_Stream]:
    made_of, waits, reset = culprit.composition, _waits(culprit), 0.0
    unknown = {"tcp": culprit.closed, "udp": culprit.unreplied}.get(culprit.proto, 0.0) is None
    if culprit.proto == "tcp":
        share = 1.0 if culprit.closed is None else culprit.closed
        first, other = "tcp_timeout_time_wait", _open_timeout(culprit)
        share, reset = share * waits, share * (1 - waits)
    elif culprit.proto == "udp":
        share, first = culprit.unreplied or 0.0, "udp_timeout"
        # Only flows with more than two packets over two seconds reach the longer timeout.
        streams = (culprit.assured or 0.0) > (1 - share) / 2
        other = "udp_timeout_stream" if streams else "udp_timeout"
    else:
        share, first, other = 0.0, "", f"{culprit.proto}_timeout"
    stays = None if by_settings(made_of) else culprit.residence.p50
    if other not in timeouts:  # as of tunnels: read from the entries, else nobody sees them expire
        stays = made_of.timeout or culprit.residence.p50 or LASTING
    rate, even = _pace(culprit, seconds or 0.0)
    for over, part, name, waited in (
        (True, share, first, made_of.waited),
        (True, reset, "tcp_timeout_close", ()),
        (False, 1 - share - reset, other, made_of.idle),
    ):
        timeout = round(stays) if stays and name != "tcp_timeout_close" else timeouts.get(name)
        if not part or not timeout:
            continue
        grows = NONE
        if not over and timeout >= LASTING and seconds:
            grows = _grows(culprit, share + reset, seconds)
        held = culprit.held * part
        yield _Stream(
            (PROTO_NUMBERS.get(culprit.proto, 0), culprit.port or 0),
            name.replace("_timeout", ""),
            by_settings(made_of),
            held,
            # of a single moment: a load as steady as its timeout
            held / timeout if seconds is None else rate * part,
            rate,
            float(timeout),
            culprit.drop_per_s * part,
            waited,
            max(round(made_of.n * part), 1),
            1.0 if unknown else made_of.other_timeout or 0.0,
            culprit.residence,
            bool(waited) and _settled(culprit, waited, timeout, seconds or 0.0),
            grows,
            0.0 if even else part * max((*culprit.trend, culprit.held)),
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
    """Net growth of open connections, never negative; from 0 up where closed ones hide it."""
    found = growth.net(float(culprit.inserts), float(culprit.destroys), seconds)
    told = culprit.composition.n or culprit.proto != "tcp"  # how many are closed
    if not (told and culprit.new_per_s) or closed > FEW_CLOSED:
        return Range(0.0, max(0.0, found.high))
    return Range(max(0.0, found.low), max(0.0, found.high))


def _interval(living: Iterable[tuple[float, float]]) -> float:
    """gc_worker's pause, from (timeout, entries) of what is in the table and not expired."""
    parts = list(living)
    left = [min(timeout, GC_SCAN_INTERVAL_CLAMP) * POINTS for timeout, _ in parts]
    many = np.repeat([n / len(POINTS) for _, n in parts], len(POINTS))
    return next_interval(np.concatenate(left) if left else np.zeros(0), many)
