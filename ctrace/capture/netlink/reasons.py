"""What can be concluded from ctnetlink's messages and the kernel's counters."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from ctrace.batch import Counts
from ctrace.record import RECORD, TCP_STATES, Events, Kind, Reason, Status, words

CLOSING: Final = (6, 33, 132)
"""TCP, DCCP and SCTP: gc_worker may remove their ASSURED entries once they are closing."""
FIN_WAIT: Final = TCP_STATES.index("FIN_WAIT")


def why_ended(
    events: Events,
    gone: npt.NDArray[np.bool_],
    left: npt.NDArray[np.int32],
    portid: npt.NDArray[np.uint32],
    mark: npt.NDArray[np.uint32],
    *,
    tells_left: bool,
) -> None:
    """Say why the entries ``gone`` went, as far as a DESTROY message shows it.

    A deletion by a user carries that user's port. Time left means that the entry did not expire. An
    ASSURED one was then deleted, because nothing else removes those unless they are closing
    (gc_worker near the limit); any other may have been evicted instead. No time left means less
    than a second.
    """
    time_left = left > 0
    closing = np.isin(events["proto"], CLOSING) & (events["state"] >= FIN_WAIT)
    kept = ((events["status"] & Status.ASSURED) != 0) & ~closing
    deleted = gone & ((portid != 0) | (time_left & kept))
    expired = gone & ~time_left & (portid == 0)
    reason = events["reason"]
    reason[gone] = Reason.GONE
    if tells_left:
        reason[expired] = Reason.EXPIRED
    reason[deleted] = Reason.DELETED
    events["idle_ms"][gone] = -1
    events["overdue_ms"][gone & time_left] = -1000 * np.minimum(left[gone & time_left], 2_000_000)
    events["mark"][gone] = mark[gone]


def merge(counts: Counts, received: Counts, since: dict[str, int]) -> None:
    """Bring cumulative ``counts`` up to date: events received, and the kernel's counters
    ``since`` attaching for what has no event of its own.

    nf_conntrack counts a lost clash as ``drop`` and ``insert_failed``, a chain too long
    as ``insert_failed`` alone; so a table-full refusal is a drop that is no clash. An
    evicted entry's DESTROY came too, without a reason.
    """
    too_long = since.get("chaintoolong", 0)
    clash = max(since.get("insert_failed", 0) - too_long, 0)
    evicted = since.get("early_drop", 0)
    fresh = received.astype(np.int64)
    fresh[Reason.CHAIN_TOO_LONG] = too_long
    fresh[Reason.CLASH] = clash
    fresh[Reason.TABLE_FULL] = since.get("drop", 0) - clash
    fresh[Reason.CLASH_RESOLVED] = since.get("clash_resolve", 0)
    fresh[Reason.EVICTED] = evicted
    fresh[Reason.GONE] -= evicted
    np.maximum(counts, np.maximum(fresh, 0).astype(np.uint64), out=counts)


def with_untold_births(events: Events) -> Events:
    """An entry that clashed and went in beside the winner (NAT) has no NEW message.

    It lives for a second; its insert is reported just before its end.
    """
    end = (events["kind"] == Kind.DESTROY) & ((events["status"] & Status.NAT_CLASH) != 0)
    if not end.any():
        return events
    repeats = np.where(end, 2, 1)
    told: Events = np.repeat(words(events), repeats, axis=0).view(RECORD).reshape(-1)
    births = (np.cumsum(repeats) - 2)[end]
    told["kind"][births], told["reason"][births] = Kind.INSERT, Reason.NAT_CLASH
    told["owner"][births] = told["cgroup"][births] = 0
    return told
