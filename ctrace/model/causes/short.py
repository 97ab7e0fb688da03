"""Limits that are not the table: what a cloud allows an instance, and expected connections."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from ctrace.beside import Short
from ctrace.model.causes.words import percent, plural
from ctrace.model.remedies import change
from ctrace.model.snapshot import Cause, Table

NEARLY: Final = 0.9
"""Share of the expectations from which they are reported."""


def limits(table: Table, found: Iterable[Short]) -> Iterator[Cause]:
    """Each one that refuses, or soon will."""
    for one in found:
        if one.kind == "cloud" and one.since > 0:
            yield _cloud(table, one)
        if one.kind == "expectations" and one.of and one.used >= NEARLY * one.of:
            yield _expectations(table, one)


def _cloud(table: Table, one: Short) -> Cause:
    return Cause(
        id="cloud-limit",
        text=f"{one.name}: the provider's own limit of tracked connections of this instance "
        f"dropped {plural(one.since, 'packet')} since it was first read; this table is "
        f"{percent(table.fill)} full, and no setting of this host changes that limit",
        evidence=(
            f"conntrack_allowance_exceeded of {one.name} rose by {one.since:,} to {one.used:,} "
            "(ethtool -S)",
            f"{table.count:,} of {table.max:,} entries, {table.totals.drop:,} refused by the table",
        ),
        netns=table.netns,
        remedies=(
            change(
                "security-group rules that allow all of a port both ways: what they pass is not "
                "tracked there",
                table.netns,
            ),
            change("shorter idle timeouts of the network interface", table.netns),
            change("a larger instance, or fewer connections", table.netns),
        ),
    )


def _expectations(table: Table, one: Short) -> Cause:
    full = "all" if one.used >= one.of else f"{one.used:,}"
    return Cause(
        id="expectations",
        text=f"{table.name}: {full} of {one.of:,} expected connections are in use: helpers (FTP, "
        "SIP, ...) can't announce more, and what they would announce is not RELATED",
        evidence=(
            f"{one.used:,} lines in /proc/net/nf_conntrack_expect, nf_conntrack_expect_max is "
            f"{one.of:,}",
            f"the table itself is {percent(table.fill)} full",
        ),
        netns=table.netns,
        remedies=(change("raise nf_conntrack_expect_max, or use fewer helpers", table.netns),),
    )
