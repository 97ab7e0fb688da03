"""Every cause that fits, the one that explains most first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final, Optional

from ctrace.model.causes import datagrams, floods, inserts, tcp, whole
from ctrace.model.causes.facts import CALM, NEARLY_FULL, SHARE, Facts, Service, services
from ctrace.model.snapshot import Cause

SHOWN: Final = 5
Recogniser = Callable[[Service], Optional[Cause]]

PER_SERVICE: Final[tuple[Recogniser, ...]] = (
    datagrams.tunnel,
    tcp.loopback_probes,
    datagrams.dns_storm,
    datagrams.one_way_udp,
    datagrams.pings,
    floods.syn_flood,
    tcp.no_keepalive,
    tcp.waiting,
    tcp.lasting_state,
    tcp.leak,
    tcp.idle_established,
    datagrams.answered_udp,
)
"""The first that fits a service names it: from the most specific to the least."""


def explain(facts: Facts) -> tuple[Cause, ...]:
    """Every cause that fits, the one that explains most first; never empty."""
    found = list(floods.scans(facts))
    for s in services(facts):
        if s.share < SHARE:
            continue
        cause = next((one for make in PER_SERVICE if (one := make(s))), None)
        if cause:
            found.append(cause)
    found += floods.scattered(facts, found)
    fill = {table.netns: table.fill for table in facts.tables}
    # A share of a nearly empty table explains little: by entries, where limits are alike.
    found.sort(key=lambda cause: -cause.share * fill.get(cause.netns, 1.0))
    found += whole.too_small(facts, found)
    failing = [*inserts.chains(facts), *inserts.source_ports(facts), *inserts.clash(facts)]
    found = [*failing, *_each_first(found, facts), *whole.invalid(facts)]
    found = [*whole.other_netns(facts), *found]
    shown = found[:SHOWN] or [whole.unknown(facts)]
    told = [one if one in failing else _calm(one, facts) for one in shown]
    return (*whole.logged(facts), *told)


def _each_first(found: list[Cause], facts: Facts) -> list[Cause]:
    """The causes, but of each full namespace its first one before any one's second."""
    full = {t.netns for t in facts.tables if t.full_since is not None or t.fill >= NEARLY_FULL}
    first = {cause.netns: cause for cause in reversed(found) if cause.netns in full}
    ahead = [cause for cause in found if first.get(cause.netns) is cause]
    return ahead + [cause for cause in found if first.get(cause.netns) is not cause]


def _calm(cause: Cause, facts: Facts) -> Cause:
    """The cause without remedies where its table has room and refuses nothing."""
    table = facts.table(cause.netns)
    if table is None or not table.max or table.fill >= CALM or table.totals.drop:
        return cause
    return replace(cause, remedies=())
