"""Why inserts fail though there is room: full chains, no free source port, races."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ctrace.model import remedies
from ctrace.model.causes.facts import Facts, Failure
from ctrace.model.causes.room import LOW_FILL
from ctrace.model.causes.words import percent, plural
from ctrace.model.snapshot import Cause, Table

FEW: Final = 5
"""Failed inserts below which nothing is said."""
PART: Final = 0.0005
"""Share of the inserts below which failures are not worth a line."""
BESIDE: Final = 0.25
"""Other failures, as a share of those without a free port, from which they are reported as well."""
PORTS: Final = 64_512
"""Ports 1024 to 65535, which source NAT takes without a range of its own
(nf_nat_l4proto_unique_tuple in nf_nat_core.c)."""


def chains(facts: Facts) -> Iterator[Cause]:
    """The hash table has too few buckets, or its entries are not spread over them."""
    for t in facts.tables:
        failed = t.chain_too_long
        if failed < FEW or failed < PART * max(1, t.totals.insert):
            continue
        hashed = max(t.hashed, t.count)
        yield Cause(
            id="chains-too-long",
            text=f"{t.name}: {failed:,} new flows were refused because a hash chain was too long: "
            f"{hashed:,} entries in {t.buckets:,} buckets, {t.load:.1f} in a chain "
            f"(the table itself is {percent(t.fill)} full)",
            evidence=(
                f"{failed:,} chaintoolong of {t.totals.insert_failed:,} insert_failed",
                f"{hashed:,} entries of all namespaces known here; each is in two chains",
                "a chain may hold 50 to 130 (MIN_CHAINLEN, MAX_CHAINLEN; since Linux 5.15)",
            ),
            share=1.0,
            netns=t.netns,
            remedies=(remedies.buckets(t),),
        )


def source_ports(facts: Facts) -> Iterator[Cause]:
    """Source NAT finds no free port towards a destination."""
    for one in facts.portless:
        if one.failed < FEW:
            continue
        table = facts.table(one.netns)
        place = f"[{one.dst}]" if ":" in one.dst else one.dst
        target = f"{place}:{one.port}" if one.port else place
        through = " and ".join(one.translated[:2]) + (" ..." if len(one.translated) > 2 else "")
        where = table.name if table else f"netns:{one.netns}"
        service = f"{one.proto}/{one.port}"
        yield Cause(
            id="source-ports",
            text=f"{where}: {plural(one.failed, 'packet')} of new connections found no free "
            f"source port towards {one.proto} {target}: source NAT to {through} has used up the "
            "ports that it may take there",
            evidence=(
                f"{one.failed:,} inserts failed on a translated tuple that is taken, with no "
                "other packet of the same flow",
                f"{_there(facts, one):,} entries to that address now; one translated address "
                f"has at most {PORTS:,} ports towards each destination and port",
            ),
            netns=one.netns,
            proto=one.proto,
            port=one.port or None,
            remedies=(
                remedies.change(
                    "more addresses or a wider port range for the source NAT", one.netns, service
                ),
                remedies.change("keep connections to it alive", one.netns, service),
            ),
        )


def _there(facts: Facts, one: Failure) -> int:
    group = facts.dst
    return sum(
        int(group.held[at])
        for at in range(group.n)
        if int(group.key[at, 2]) >> 32 == one.netns and group.address(at) == one.dst
    )


def clash(facts: Facts) -> Iterator[Cause]:
    """Two packets of one flow raced."""
    for t in facts.tables:
        failed = t.totals.insert_failed - t.chain_too_long
        portless = sum(one.failed for one in facts.portless if one.netns == t.netns)
        failed -= portless
        if failed < BESIDE * portless:
            continue  # as many as the counter and the events differ by
        if failed < FEW or t.fill >= LOW_FILL or t.totals.drop or not t.max:
            continue
        if failed < PART * max(1, t.totals.insert):
            continue
        yield _race(t, failed, facts)


def _race(t: Table, failed: int, facts: Facts) -> Cause:
    dns = facts.failed_dns >= 0.5 * max(1, facts.failed) and facts.failed > 0
    what = "DNS look-ups (A and AAAA at once from one port)" if dns else "racing packets"
    words = (
        ("a local caching resolver", "single-request-reopen", "TCP for DNS")
        if dns
        else ("spread the flow's first packets over one CPU or queue",)
    )
    return Cause(
        id="clash",
        text=f"{t.name}: {failed:,} inserts lost a race at {percent(t.fill)} fill: {what}",
        evidence=(
            f"{failed:,} insert_failed of {t.totals.insert:,} inserts",
            f"{t.count:,} of {t.max:,} entries, no table-full drops",
            f"{facts.failed_dns:,} of {facts.failed:,} failures seen are to port 53",
        ),
        netns=t.netns,
        proto="udp" if dns else "",
        port=53 if dns else None,
        remedies=tuple(remedies.change(one, t.netns) for one in words),
    )
