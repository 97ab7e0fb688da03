"""Every cause that fits, the one that explains most first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Final, Optional

from ctrace.model.causes import datagrams, floods, inserts, tcp, whole
from ctrace.model.causes.beside import beside
from ctrace.model.causes.facts import SHARE, Facts, services, several
from ctrace.model.causes.room import short
from ctrace.model.causes.service import Service
from ctrace.model.snapshot import Cause

SHOWN: Final = 5
Recogniser = Callable[[Service], Optional[Cause]]

PER_SERVICE: Final[tuple[Recogniser, ...]] = (
    datagrams.tunnel,
    tcp.loopback_probes,
    floods.udp_flood,
    datagrams.dns_storm,
    datagrams.one_way_udp,
    datagrams.pings,
    floods.ack_flood,
    tcp.one_way_tcp,
    floods.syn_flood,
    tcp.no_keepalive,
    tcp.waiting,
    tcp.lasting_state,
    tcp.leak,
    tcp.idle_established,
    datagrams.answered_udp,
)
"""The first that fits a service names it: ordered from the most specific to the least."""
TOGETHER: Final[tuple[Recogniser, ...]] = (
    tcp.loopback_probes,
    floods.udp_flood,
    datagrams.one_way_udp,
    tcp.no_keepalive,
    tcp.one_way_tcp,
    tcp.lasting_state,
    tcp.leak,
    tcp.idle_established,
    datagrams.answered_udp,
)
"""The same for several services at once: only those that need no port."""
TOLD: Final = 0.3
"""Share from which a key of ``who`` is reported as one cause;"""
MOST: Final = 0.8
"""share from which its single services are not reported as well."""


def explain(facts: Facts) -> tuple[Cause, ...]:
    """Every cause that fits, the one that explains most first; never empty."""
    found = list(floods.scans(facts))
    found += _of_services(facts, found)
    found += floods.scattered(facts, found)
    fill = {table.netns: table.fill for table in facts.tables}
    # A share of a nearly empty table explains little: by entries, where limits are alike.
    found.sort(key=lambda cause: -cause.share * fill.get(cause.netns, 1.0))
    found += whole.too_small(facts, found)
    found = _each_first(found, facts)
    left = list(islice(whole.unexplained(facts, found), SHOWN))
    most = max(SHOWN, 1 + sum(map(whole.at_limit, facts.tables)))
    failing = [*inserts.chains(facts), *inserts.source_ports(facts), *inserts.clash(facts)]
    found = [*whole.other_netns(facts), *failing, *found, *whole.invalid(facts)]
    found = [*found[: max(1, most - len(left))], *left]
    told = beside(facts, [_calm(one, facts) for one in found]) or [whole.unknown(facts)]
    return (*whole.logged(facts), *told)


def _of_services(facts: Facts, scans: list[Cause]) -> list[Cause]:
    """Causes of keys that hold several services, then of single services not part of those."""
    scanners = {(one.netns, one.src) for one in scans}
    found: list[Cause] = []
    for s in several(facts):
        cause = _first(s, TOGETHER) if s.share >= TOLD else None
        if cause and not any(one.netns == cause.netns for one in scans):
            found.append(cause)
    told = {(one.netns, one.id) for one in found}
    whole = {(one.netns, one.proto) for one in found if one.share >= MOST}
    for s in services(facts, SHARE):
        if (s.c.netns, s.alone) in scanners or (s.c.netns, s.c.proto) in whole:
            continue
        cause = _first(s, PER_SERVICE)
        if cause and (cause.netns, cause.id) not in told:
            found.append(cause)
    return found


def _first(s: Service, recognisers: tuple[Recogniser, ...]) -> Optional[Cause]:
    return next((one for make in recognisers if (one := make(s))), None)


def _each_first(found: list[Cause], facts: Facts) -> list[Cause]:
    """The causes, but the first one of each full namespace comes before any second one."""
    full = {t.netns for t in facts.tables if whole.at_limit(t)}
    first = {cause.netns: cause for cause in reversed(found) if cause.netns in full}
    ahead = [cause for cause in found if first.get(cause.netns) is cause]
    return ahead + [cause for cause in found if first.get(cause.netns) is not cause]


def _calm(cause: Cause, facts: Facts) -> Cause:
    """The cause; where it is ordinary traffic and its table has room, nothing needs help."""
    table = facts.table(cause.netns)
    if not cause.load or facts.logged or table is None or short(table):
        return cause
    return replace(cause, remedies=(), at_need=cause.remedies)
