"""Which way round a service is used here: the role decides which two rules it takes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from ipaddress import ip_address
from operator import or_
from typing import Final, Optional

from ctrace.advice.subject import Flow, Subject
from ctrace.model.remedies import within as inside
from ctrace.model.snapshot import Culprit, Tuple5
from ctrace.plan.plan import ROLES
from ctrace.record import PROTO_NUMBERS, Events, Status, address_text

MOST_FLOWS: Final = 20_000
WEIGHTY: Final = 0.02
"""Share of a service's entries from which on a source says what role the service has. What is
below it (a few health checks of this host's own) frees nothing, and stays tracked."""
_OF_DIRECTION: Final = {
    "in": "server",
    "out": "client",
    "forward": "forward",
    "loopback": "loopback",
}


@dataclass(frozen=True)
class Seen:
    """What the entries of a service show, put together from several groups."""

    culprit: Culprit
    parts: tuple[Culprit, ...] = ()
    """The same service by source."""

    @property
    def samples(self) -> tuple[Tuple5, ...]:
        """All sample tuples."""
        return self.culprit.samples + tuple(s for part in self.parts for s in part.samples)

    @property
    def nat(self) -> str:
        """NAT seen on any of its entries; ``no`` if entries were seen without; else empty."""
        found = {word for c in (self.culprit, *self.parts) for word in c.nat.split(",")} - {
            "",
            "no",
        }
        for sample in self.samples:
            found |= translations(sample)
        if found:
            return ",".join(sorted({word for item in found for word in item.split(",")}))
        return "no" if self.culprit.nat == "no" or self.samples else ""


def translations(sample: Tuple5) -> set[str]:
    """The ends that NAT changed, ``src`` and ``dst``: from its status bits, or the reply's
    tuple."""
    found = {
        name
        for name, bit in (("src", Status.SRC_NAT), ("dst", Status.DST_NAT))
        if sample.status & bit
    }
    if sample.reply_src:
        if (sample.reply_src, sample.reply_sport) != (sample.dst, sample.dport):
            found.add("dst")
        if (sample.reply_dst, sample.reply_dport) != (sample.src, sample.sport):
            found.add("src")
    return found


def roles(seen: Seen, local: Iterable[str]) -> tuple[str, ...]:
    """The roles of a service in one namespace, in a fixed order; empty when not known.

    Sample tuples are held against the namespace's addresses; where those are not
    known, the direction of the packets that made the entries decides.
    """
    mine = set(local)
    found: set[str] = set()
    parts, samples = _weighty(seen)
    for culprit in (seen.culprit, *parts):
        role = _OF_DIRECTION.get(culprit.direction)
        if role:
            found.add(role)
    if mine:
        found |= {role for sample in samples if (role := _role(sample, mine))}
        # "in" and "out" are how packets over loopback look to some hook families.
        if found - {"loopback"} <= {"server", "client"} and all(
            _role(sample, mine) == "loopback" for sample in samples
        ):
            found = {"loopback"} if samples else found
    return tuple(role for role in ROLES if role in found)


def _weighty(seen: Seen) -> tuple[tuple[Culprit, ...], tuple[Tuple5, ...]]:
    """The sources that hold a share worth freeing, and the sample tuples but of the others."""
    parts = tuple(c for c in seen.parts if c.held >= WEIGHTY * seen.culprit.held)
    light = {c.src for c in seen.parts} - {c.src for c in parts}
    samples = tuple(sample for sample in seen.samples if sample.src not in light)
    return (parts, samples) if samples else (seen.parts, seen.samples)


def _role(sample: Tuple5, mine: set[str]) -> Optional[str]:
    here, there = _is_mine(sample.src, mine), _is_mine(sample.dst, mine)
    if here and there:
        return "loopback"
    if there:
        return "server"
    return "client" if here else "forward"


def _is_mine(address: str, mine: set[str]) -> bool:
    return address in mine or address.startswith("127.") or address == "::1"


def within(seen: Seen, local: Iterable[str], ephemeral: tuple[int, int]) -> Optional[float]:
    """The share of the service's own calls that come from the ephemeral range; None: none seen.

    The client role's rules match that range only: programs that bind a port of their
    own (NFS mounts below 1024, NTP from 123) stay tracked.
    """
    mine = set(local)
    ports = [
        sample.sport
        for sample in seen.samples
        if sample.dport == seen.culprit.port
        and _is_mine(sample.src, mine)
        and not _is_mine(sample.dst, mine)
    ]
    return inside(ports, ephemeral)


def unmatched(inside: float, ephemeral: tuple[int, int]) -> str:
    """A reason: how many of the service's calls the client role's rules do not match."""
    low, high = ephemeral
    part, freed = (f"{1 - inside:.0%}", "only the rest is") if inside else ("all", "nothing is")
    return (
        f"{part} of its calls that were seen come from ports outside {low}-{high}, which the "
        f"client's rules do not match: {freed} freed"
    )


def half_tracked(seen: Seen, local: Iterable[str]) -> bool:
    """Whether entries look as if one direction were untracked: the tuple is the wrong way round.

    With half a pair of NOTRACK rules the replies make the entries: UNREPLIED, from
    a local service port to the client's.
    """
    mine, port = set(local), seen.culprit.port
    return any(
        sample.sport == port and sample.src in mine and sample.dport != port
        for sample in seen.samples
    )


def subject(
    seen: Seen,
    local: tuple[str, ...],
    ephemeral: tuple[int, int],
    forwarding: bool,
    others: Collection[Tuple5],
    *,
    picked: bool = True,
    entries: Optional[Events] = None,
) -> Subject:
    """What :class:`ctrace.advice.hazards.Judge` needs to know of a service.

    ``others`` are samples of any service with its protocol.
    """
    found = roles(seen, local)
    mine = set(local)
    sources = dict.fromkeys(s.src for s in seen.samples if s.src and s.src not in mine)
    targets = dict.fromkeys(s.dst for s in seen.samples if s.dst and s.dst not in mine)
    peers = (
        sources
        if found == ("server",)
        else targets
        if "server" not in found
        else {**sources, **targets}
    )
    return Subject(
        proto=seen.culprit.proto,
        port=seen.culprit.port or 0,
        roles=found,
        local=local,
        peers=tuple(peers),
        nat=seen.nat,
        ephemeral=ephemeral,
        picked=picked,
        status=reduce(or_, (sample.status for sample in seen.samples), 0),
        shared_now=any(
            s.reply_dport == seen.culprit.port for s in others if "src" in translations(s)
        ),
        forwarding=forwarding,
        flows=_flows(seen, mine, entries),
    )


def _flows(seen: Seen, mine: set[str], entries: Optional[Events]) -> tuple[Flow, ...]:
    """Flows to the service's port: from the table where it was read, else the sampled ones."""
    port, proto = seen.culprit.port, seen.culprit.proto
    if entries is None:
        ends = {
            (s.src, s.sport, s.dst, s.dport)
            for s in seen.samples
            if s.proto == proto and port in (s.dport, s.reply_sport)
        }
    else:
        return flows_of(entries, proto, port or 0, mine)
    return _with_roles(ends, mine)


def of_service(entries: Events, proto: str, port: int) -> Events:
    """The entries of a table that are to a service's port, or were translated to it."""
    found: Events = entries[
        (entries["proto"] == PROTO_NUMBERS[proto])
        & ((entries["dport"] == port) | (entries["reply_sport"] == port))
    ]
    return found


def is_shared_now(entries: Events, proto: str, port: int) -> bool:
    """Whether the source of an entry is translated to the port of a service."""
    same = (entries["proto"] == PROTO_NUMBERS[proto]) & (entries["reply_dport"] == port)
    return bool((same & ((entries["status"] & int(Status.SRC_NAT)) != 0)).any())


def flows_of(entries: Events, proto: str, port: int, mine: set[str]) -> tuple[Flow, ...]:
    """Some of a table's flows that are a service's, spread over all of them; and calls of this
    host, or through it, from the service's port, which its rules meet, too."""
    from_port = (entries["proto"] == PROTO_NUMBERS[proto]) & (entries["sport"] == port)
    calls = [
        end
        for end in _ends(entries[from_port])
        if _is_mine(end[0], mine) or not _is_mine(end[2], mine)
    ]
    return _with_roles({*_ends(of_service(entries, proto, port)), *calls}, mine)


def _ends(here: Events) -> Iterator[tuple[str, int, str, int]]:
    for e in here[:: max(1, len(here) // MOST_FLOWS)]:
        yield address_text(e["src"]), int(e["sport"]), address_text(e["dst"]), int(e["dport"])


def _with_roles(ends: set[tuple[str, int, str, int]], mine: set[str]) -> tuple[Flow, ...]:
    found = []
    for src, sport, dst, dport in sorted(ends):
        a, b = _is_mine(src, mine), _is_mine(dst, mine)
        role = "loopback" if a and b else "server" if b else "client" if a else "forward"
        found.append((role, ip_address(src).packed, sport, ip_address(dst).packed, dport))
    return tuple(found)
