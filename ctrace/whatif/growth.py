"""Tables that keep growing: entries come, and stay longer than anybody watches.

An entry whose timeout is an hour or more doesn't expire while one watches. If fewer leave than
come, the table rises until it is full, and its present fill is no prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Optional

import numpy as np

from ctrace.model.snapshot import Rising
from ctrace.record import TCP
from ctrace.whatif.flows import Basis, Bool, Flows

LASTING: Final = 3600.0
"""Seconds: entries with longer timeouts do not expire while anybody watches."""
HORIZON: Final = 7 * 86400.0
"""Seconds: a table that would be full later than this is not filling."""


@dataclass(frozen=True)
class Range:
    """A number of entries known only to lie within this range."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """Its middle."""
        return (self.low + self.high) / 2

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)


def net(came: float, went: float, seconds: float) -> Range:
    """Net growth per second from what ``came`` and ``went`` in some seconds: two standard errors
    either way."""
    error = 2 * math.sqrt(came + went + 1) / max(seconds, 1e-9)
    each = (came - went) / max(seconds, 1e-9)
    return Range(each - error, each + error)


def rising(growth: Range, now: Range, limit: float) -> Optional[Rising]:
    """None where it may just as well not grow; ``now``: entries above which it does."""
    if growth.low <= 0:
        return None
    per_s = (growth.low, growth.high)
    if not limit or not math.isfinite(limit):
        return Rising(per_s, None)
    soon = max(0.0, limit - now.high) / growth.high
    late = max(0.0, limit - now.low) / growth.low
    return Rising(per_s, (soon, late) if soon <= HORIZON else None)


def of_flows(flows: Flows, since: float, until: float) -> Range:
    """Entries per second by which long-lived ones have grown between two times.

    Those with an unknown stay may be long-lived: they count only in the upper bound.
    """
    some = []
    for unknown in (False, True):
        begun, over = _lasting(flows, since, unknown), _lasting(flows, until, unknown)
        came, went = np.count_nonzero(over & ~begun), np.count_nonzero(begun & ~over)
        some.append(net(float(came), float(went), until - since))
    return Range(some[0].low, max(one.high for one in some))


def _lasting(flows: Flows, at: float, unknown: bool) -> Bool:
    """Entries in the table at a time that neither wait for their end nor expire soon."""
    left = np.where(np.isnan(flows.leave), flows.expire, flows.leave)
    inside = (flows.arrive <= at) & (np.minimum(left, flows.end) > at)
    long = flows.timeout >= LASTING
    # One that has ended was open before it began to wait for its end, if it is a connection.
    done = np.where(long, np.inf, flows.expire - np.nan_to_num(flows.timeout))
    open_then = (flows.proto == TCP) & (np.minimum(done, flows.end) > at)
    open_still = np.where(flows.basis == Basis.NOTHING, unknown, long)
    found: Bool = inside & np.where(flows.known, open_then, open_still)
    return found
