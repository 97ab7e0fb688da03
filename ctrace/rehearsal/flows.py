"""Flows of the host's own table, as conversations to play: one of a kind each."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from ipaddress import ip_address
from typing import Final

from ctrace.rehearsal.constants import Named, evenly
from ctrace.rehearsal.play import Talk
from ctrace.rehearsal.talks import Cast

MOST_KINDS: Final = 2000
"""Of the table, each played; beyond that, some of those that no rule tells apart."""
OF_A_CLASS: Final = 256
"""Flows that no rule tells apart: so many are played, and stand for all."""
MOST_OPEN: Final = 2000
"""Flows of the table that are open when rules come or go."""


def some(talks: Sequence[Talk]) -> list[Talk]:
    """Every conversation that rules or routes gave rise to, and flows of the table evenly."""
    known = [talk for talk in talks if talk.known]
    made = [talk for talk in talks if not talk.known]
    return [*evenly(known, MOST_OPEN), *made]


def of_table(
    flows: Iterable[tuple[str, bytes, int, bytes, int]],
    proto: int,
    port: int,
    who: Cast,
    names: Named,
) -> list[Talk]:
    """Flows of the host's table, as (role, source, port, destination, port), one of a kind each.

    Those from the service's ``port`` keep it. A flood's are thousands: see :func:`represented`.
    """
    kinds: dict[tuple[str, bytes, bytes, int, int], int] = {}
    for role, src, sport, dst, dport in flows:
        key = role, src, dst, dport, sport if sport == port else int(sport < 1024)
        kinds[key] = kinds.get(key, 0) + 1
    found = []
    mine = {address for address, _ in who.local}
    for (role, src, dst, dport, sport), many in kinds.items():
        a, b = who.ways.get(src), who.ways.get(dst)
        here = (
            src in mine or ip_address(src).is_loopback,
            dst in mine or ip_address(dst).is_loopback,
        )
        if (not here[0] and a is None) or (not here[1] and b is None):
            continue
        found.append(Talk(
            role, proto, src, sport, dst, dport, 0 if here[0] or a is None else a.device,
            0 if here[1] or b is None else b.device, known=True, kin=many - 1,
        ))  # fmt: skip
    if len(found) <= MOST_KINDS or names.scattered:
        return found
    return represented(found, who, names)


def represented(talks: Sequence[Talk], who: Cast, names: Named) -> list[Talk]:
    """Some of the flows for all: they come from callers, and go to servers, that are no neighbours,
    have the same way to this host, and that no address or network in a rule or a set tells apart.

    Of each class :data:`OF_A_CLASS` are kept, and of as many servers as possible one at least, so
    that rules that list servers list all of a few. ``kin`` counts those that are left out.
    """
    bounds = {length: sorted(of) for length, of in names.bounds.items()}
    near = {far.address for far in who.near}

    def among(address: bytes) -> Hashable:
        way = who.ways.get(address)
        if way is None or address in near:
            return address
        at = bisect_right(bounds.get(len(address), []), int.from_bytes(address, "big"))
        return len(address), at, way.device, way.source

    classes: dict[Hashable, dict[bytes, list[Talk]]] = {}
    for talk in talks:
        key = talk.role, among(talk.client), among(talk.server), talk.sport, talk.dport
        classes.setdefault(key, {}).setdefault(talk.server, []).append(talk)
    out = []
    for by_server in classes.values():
        servers = evenly(list(by_server), OF_A_CLASS)
        each = OF_A_CLASS // len(servers)
        kept = [talk for server in servers for talk in evenly(by_server[server], each)]
        left = sum(1 + talk.kin for of in by_server.values() for talk in of)
        left -= sum(1 + talk.kin for talk in kept)
        out += [replace(kept[0], kin=kept[0].kin + left), *kept[1:]]
    return out
