"""Causes that rules and the table show together: entries translated to where no rule leads any
more, source ports that run out, limits of rules, and what rules drop as INVALID."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final, Optional

from ctrace.beside import Left, PortsTaken, Refusing
from ctrace.model.causes import short, strays
from ctrace.model.causes.facts import Facts
from ctrace.model.causes.words import duration, percent, plural
from ctrace.model.remedies import UNTRACK_ECHO, change
from ctrace.model.snapshot import Cause, Remedy, Table

FEW: Final = 20
"""Entries. With fewer, nothing is said about where they are translated to."""
FEW_REFUSED: Final = 5
SHOWN: Final = 3
NEARLY: Final = 0.8
"""Share of the source ports in use from which it is reported."""
GREW: Final = 20
"""Ports that must have been taken between two readings before a time is predicted."""


def beside(facts: Facts, found: list[Cause]) -> list[Cause]:
    """Causes read beside the events, then those ``found`` in the events; merged where both are
    about the same."""
    first: list[Cause] = []
    said = list(found)
    for table in facts.tables:
        reading = facts.beside.get(table.netns)
        if reading is None or table.netns in facts.gone:
            continue
        first += stale(table, reading.left, facts.where(table.netns), reading.part)
        first += _limits(table, reading.refusing)
        first += short.limits(table, reading.short)
        for one in _filling(table, reading.ports, reading.part):
            same = [n for n, other in enumerate(said) if _same(one, other)]
            for n in same:  # they fail already, and this is how many there are
                how_many = one.text.partition(": ")[2]
                said[n] = replace(said[n], text=f"{said[n].text}; {how_many}")
            if not same:
                first.append(one)
        said = [strays.told(one, table, reading) for one in said]
    return [*first, *(_checked(one, facts) for one in said)]


def _checked(cause: Cause, facts: Facts) -> Cause:
    """Without what helps only if the rules allow it, where they were not read or don't."""
    reading = facts.beside.get(cause.netns)
    if cause.id != "pings" or (reading is not None and reading.echo):
        return cause

    def allowed(found: tuple[Remedy, ...]) -> tuple[Remedy, ...]:
        return tuple(one for one in found if one.id != UNTRACK_ECHO)

    return replace(cause, remedies=allowed(cause.remedies), at_need=allowed(cause.at_need))


def with_stale(why: tuple[Cause, ...], table: Table, left: Iterable[Left]) -> tuple[Cause, ...]:
    """The causes, plus entries left behind by the rules, unless those are reported already."""
    if any(one.id == "stale-nat" and one.netns == table.netns for one in why):
        return why
    return (*why, *stale(table, left))


def stale(
    table: Table, left: Iterable[Left], where: str = "", part: float = 1.0
) -> Iterator[Cause]:
    """Entries that are still translated to a backend that the rules no longer use, by what this
    ``part`` of the table has."""
    most = sorted(left, key=lambda one: -one.entries)
    for one in most[:SHOWN]:
        if one.entries * part < FEW or one.proto not in ("tcp", "udp"):
            continue
        # They were counted some time before the table was; by now it may hold fewer.
        n, service = min(one.entries, table.count or one.entries), f"{one.proto}/{one.port}"
        family = "ipv6" if ":" in one.dst else "ipv4"
        command = (
            f"conntrack -D -f {family} -p {one.proto} --orig-dst {one.dst} "
            f"--orig-port-dst {one.port} --reply-src {one.backend}"
        )
        share = percent(n / table.count) if table.count else "some"
        about = "" if part == 1.0 else "about "
        error = round(2 * math.sqrt(n * part) / part) if about else 0
        yield Cause(
            id="stale-nat",
            text=f"{service}{where}: {about}{n:,} entries to {one.dst} are translated to "
            f"{one.backend}, which no rule names any more ({share} of the table): their packets go "
            "there as long as any come",
            evidence=(
                f"{about}{n:,} living entries with destination {one.dst}:{one.port} and replies "
                f"from {one.backend}{_sample(table, part)}",
                "no rule of this namespace translates to that address now",
                "NAT is decided at the first packet: rules that change later do not move a flow",
            ),
            share=n / table.count if table.count else 0.0,
            proto=one.proto,
            port=one.port,
            netns=table.netns,
            remedies=(
                Remedy(
                    "delete",
                    f"delete just these {about}{n:,} (conntrack -D)",
                    table.netns,
                    service,
                    f"deletes about {n:,} entries at once; the next packet of each flow is "
                    "translated as the rules say now, and open TCP connections to it break",
                    now=n,
                    frees=(max(0, n - error), n + error),
                    commands=(command,),
                ),
            ),
        )


def _limits(table: Table, rules: Iterable[Refusing]) -> Iterator[Cause]:
    for rule in rules:
        if rule.kind == "limit" and rule.since is not None and rule.since >= FEW_REFUSED:
            yield _limited(table, rule, rule.since)


def _limited(table: Table, rule: Refusing, since: int) -> Cause:
    most = f" {rule.limit:,}" if rule.limit else ""
    raised = "raise that rule's limit, or have its clients keep fewer connections"
    return Cause(
        id="rule-limit",
        text=f"{table.name}: a rule's own limit of{most} connections refused "
        f"{plural(since, 'packet')} since it was first read ({strays.place(rule)}): "
        f"the table itself is {percent(table.fill)} full",
        evidence=(
            f"the rule's counter rose by {since:,} to {rule.packets or 0:,}",
            f"{table.count:,} of {table.max:,} entries, {table.totals.drop:,} refused by the table",
        ),
        netns=table.netns,
        remedies=(change(raised, table.netns),),
    )


def _sample(table: Table, part: float) -> str:
    """``, by a sample of 20 % of the table``; nothing where all of it was read."""
    return "" if part == 1.0 else f", by a sample of {percent(part)} of the {table.count:,} entries"


def _filling(table: Table, ports: Iterable[PortsTaken], part: float = 1.0) -> Iterator[Cause]:
    """Where most of the source ports are in use, by what this ``part`` of the table has."""
    most = sorted(ports, key=lambda one: -one.used / one.of)
    for one in most[:SHOWN]:
        if one.used < NEARLY * one.of or (part < 1.0 and one.used * part < FEW):
            continue
        about = "" if part == 1.0 else "about "
        place = f"[{one.dst}]:{one.port}" if ":" in one.dst else f"{one.dst}:{one.port}"
        service = f"{one.proto}/{one.port}"
        wider = "more addresses or a wider port range for the source NAT"
        yield Cause(
            id="source-ports",
            text=f"{table.name}: source NAT to {one.source} uses {about}{one.used:,} of the "
            f"{one.of:,} "
            f"ports that it may take towards {one.proto} {place} "
            f"({percent(one.used / one.of)}{_until(one)})",
            evidence=(
                f"{about}{one.used:,} different source ports in the table, all inside one range "
                f"of {one.of:,}{_sample(table, part)}",
                "one address has each port once towards a destination and port",
            ),
            netns=table.netns,
            proto=one.proto,
            port=one.port,
            remedies=(
                change(wider, table.netns, service),
                change("keep connections to it alive", table.netns, service),
            ),
        )


def _until(one: PortsTaken) -> str:
    """When they will be used up if they are taken as fast as between the last two readings, with
    the error."""
    grew = 0 if one.was is None else one.used - one.was
    if one.used >= one.of or grew < GREW or one.seconds <= 0:
        return ""
    error = 2 * math.sqrt(grew)
    soon, late = (
        (one.of - one.used) * one.seconds / rate for rate in (grew + error, max(grew - error, 1.0))
    )
    return f"; at this rate used up in {duration(soon)} to {duration(late)}"


def _same(one: Cause, other: Cause) -> bool:
    """Whether both are about the same destination's source ports."""
    key: tuple[Optional[int], ...] = (one.netns, one.port)
    return (
        one.id == other.id == "source-ports"
        and one.proto == other.proto
        and key == (other.netns, other.port)
    )
