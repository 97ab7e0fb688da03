"""A recording under other settings: which entries there are, and when each leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ctrace.whatif import table as tablemodel
from ctrace.whatif.flows import Bool, Flows, Recorded
from ctrace.whatif.settings import Levers, Timeout
from ctrace.whatif.table import Known, Setting


def change(flows: Flows, levers: Levers, pace: float = 1.0) -> Flows:
    """The flows under the levers: without untracked services, and with other timeouts.

    An expired entry then waits ``pace`` times as long for its collection as it did. Where an
    entry's own timeout is not known, it keeps it: the answer's range allows for it.
    """
    keep = np.ones(len(flows), bool)
    for proto, port in levers.notrack:
        keep &= ~flows.of_service(proto, port)
    expire, timeout = flows.expire.copy(), flows.timeout.copy()
    with np.errstate(invalid="ignore"):  # neither seen: it stays, whatever is changed
        waited = np.maximum(flows.leave - flows.expire, 0.0)
    for lever in levers.timeouts:
        hit = lever.matches(flows) & flows.sure
        expire[hit] += lever.seconds - timeout[hit]
        timeout[hit] = lever.seconds
        waited[hit & np.isinf(flows.leave)] = np.nan
    over = np.isinf(flows.end) & ~np.isinf(waited)
    leave = np.where(over, expire + waited * pace, flows.leave)
    # Gone before the recording began, had the setting been there all along.
    keep &= (expire > 0) | (flows.arrive > 0)
    # Whatever its timeout, an entry is over when its tuple is used again.
    end = np.minimum(flows.end, flows.again()) if levers.timeouts else flows.end
    return replace(flows, expire=expire, end=end, leave=leave, timeout=timeout).only(keep)


def altered(
    flows: Flows, levers: Levers, matches: Callable[[Timeout, Flows], Bool] = Timeout.matches
) -> Bool:
    """Flows that stay for a different time under the levers.

    With :meth:`Timeout.could_match`: flows that may, because their protocol is a lever's.
    """
    hit = np.zeros(len(flows), bool)
    for lever in levers.timeouts:
        hit |= matches(lever, flows)
    for proto, port in levers.notrack:
        hit &= ~flows.of_service(proto, port)
    return hit


def shortens(flows: Flows, levers: Levers) -> bool:
    """Whether no flow stays longer under the levers: then the table never holds more, either."""
    return not any(
        (lever.seconds > flows.timeout[lever.could_match(flows)]).any() for lever in levers.timeouts
    )


def pace_of(recorded: Recorded, levers: Levers, setting: Setting) -> tuple[float, float]:
    """How much longer or shorter gc_worker would pause, in the model, under the levers; and how
    much longer than on average its longest pause would be."""
    known = Known(measured=False, passes=recorded.collections)
    roomy = Setting(0, setting.buckets)
    was, would_be = (
        tablemodel.run(flows, recorded.seconds, roomy, known)
        for flows in (recorded.flows, change(recorded.flows, levers))
    )
    pace = min(max(would_be.interval / was.interval, 0.01), 10.0)
    return pace, would_be.longest / would_be.interval
