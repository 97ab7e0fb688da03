"""Flows of the host's own table, as conversations to play, one of a kind each; and the entries that
those of a service leave on a stage."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from ipaddress import ip_address
from typing import Final

from ctrace.host import ctnetlink
from ctrace.plan.plan import Notrack
from ctrace.record import MAPPED_PREFIX, Events, Status
from ctrace.rehearsal.constants import Named, evenly
from ctrace.rehearsal.play import Run, Talk
from ctrace.rehearsal.talks import Cast
from ctrace.ruleset.notrack import far_ports

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


# ---- what they leave ------------------------------------------------------------------


def entries(path: str, number: int, port: int) -> Events:
    """Those of a protocol's port in the table at ``path``."""
    events = ctnetlink.dump(path)
    mine = (events["dport"] == port) | (events["sport"] == port)
    found: Events = events[(events["proto"] == number) & mine]
    return found


def counted(entries: Events, talks: Iterable[Talk], lever: Notrack) -> int:
    """How many belong to the conversations that the lever's rules are for."""
    peers = {ip_address(peer).packed for peer in lever.peers}
    mine = set()
    for talk in talks:
        low, high = far_ports(lever, talk.role) or (0, 65535)
        named = talk.role not in ("client", "forward") or not peers or talk.server in peers
        if talk.role in lever.roles and talk.dport == lever.port and low <= talk.sport <= high:
            mine |= {(_wide(talk.client), talk.sport)} if named else set()
    return sum(
        (bytes(e["src"]), int(e["sport"])) in mine or (bytes(e["dst"]), int(e["dport"])) in mine
        for e in entries
    )


def by_role(runs: Iterable[Run], entries: Events, port: int) -> dict[str, str]:
    """What each role's conversations left: ``none``, ``half`` (only entries that saw one
    direction), ``some``; of the two families the one that left less."""
    ends: dict[tuple[bytes, int], bool] = {}
    for e in entries:
        both = bool(e["status"] & Status.SEEN_REPLY)
        for side, at in (("src", "sport"), ("dst", "dport")):
            end = bytes(e[side]), int(e[at])
            ends[end] = ends.get(end, False) or both
    marks: dict[tuple[str, int], set[str]] = {}
    for run in runs:
        talk = run.talk
        if talk.dport == port and run.first is not None:
            end = _wide(talk.client), talk.sport
            made = "none" if end not in ends else "some" if ends[end] else "half"
            marks.setdefault((talk.role, len(talk.client)), set()).add(made)
    found: dict[str, str] = {}
    for (role, _), of in marks.items():
        # Rules may be for one family only.
        word = "some" if "some" in of else min(of)
        found[role] = min(found.get(role, word), word, key=("none", "half", "some").index)
    return found


def _wide(address: bytes) -> bytes:
    return MAPPED_PREFIX + address if len(address) == 4 else address
