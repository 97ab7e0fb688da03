"""The entries that one service's conversations leave on a stage."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address

from ctrace.host import ctnetlink
from ctrace.plan.plan import Notrack
from ctrace.record import MAPPED_PREFIX, Events, Status
from ctrace.rehearsal.play import Run, Talk
from ctrace.ruleset.notrack import far_ports


def of_service(path: str, number: int, port: int) -> Events:
    """Those of a protocol's port in the namespace at ``path``."""
    events = ctnetlink.dump(path)
    mine = (events["dport"] == port) | (events["sport"] == port)
    found: Events = events[(events["proto"] == number) & mine]
    return found


def count(entries: Events, talks: Iterable[Talk], lever: Notrack) -> int:
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
