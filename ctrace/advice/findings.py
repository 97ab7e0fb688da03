"""The results of a rehearsal in words: one finding for each reason for or against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Final

from ctrace.advice.subject import Subject
from ctrace.record import UDP
from ctrace.rehearsal.compare import BREAKS, MARKS, OPENS, OWN, Difference
from ctrace.rehearsal.mend import Settled
from ctrace.rehearsal.play import Stray, Talk
from ctrace.rehearsal.rehearse import Service

LEVELS: Final = {
    "info": "safe",
    "rules": "safe-with-rules",
    "remark": "safe",
    "warn": "warn",
    "unknown": "cannot-say",
    "unsafe": "unsafe",
}
"""By how much a finding weighs, the gravest last. A ``remark`` says why safe rules are not worth
having; ``warn``: packets only carry another mark, TOS or priority."""
VERDICTS: Final = tuple(dict.fromkeys(LEVELS.values()))
WHEN_THEY_GO: Final = "when the rules go again"
"""The prefix of a reason that concerns the end of a trial."""


@dataclass(frozen=True)
class Finding:
    """One reason for or against."""

    level: str
    """A key of :data:`LEVELS`."""
    id: str
    text: str


def rehearsed(subject: Subject, service: Service, settled: Settled) -> Iterator[Finding]:
    """The findings about a rehearsed lever."""
    found, lever = settled.found, settled.lever
    every = [service.tracked(setting).runs for setting in service.room.settings()]
    runs = every[0]
    refused = [
        ways[0].talk
        for ways in zip_longest(*every)
        if ways[0].talk.known and not any(run.first for run in ways)
    ]
    if refused:
        yield Finding(
            "unknown",
            "refused",
            f"its table has {refused[0]}, which the rehearsal "
            "refuses without any rules of ours: something lets it in that the "
            "rehearsal lacks",
        )
    yield from _differences(settled)
    yield from _beyond(settled)
    tracked, untracked = found.entries
    if tracked and untracked >= 0.9 * tracked:
        yield Finding(
            "remark",
            "ineffective",
            "pointless: NOTRACK would have no effect, its "
            f"conversations made {tracked} entries in a rehearsal, and {untracked} with "
            "the rules",
        )
    if not tracked and runs:
        yield Finding(
            "info",
            "already",
            "its conversations made no entry in a rehearsal: they are untracked already",
        )
    yield from _own_calls(subject, service, settled)
    translated = subject.nat not in ("", "no")
    if translated and not found.of(BREAKS) and not lever.shared and not service.translates():
        yield Finding(
            "unknown",
            "nat",
            f"its entries are translated ({subject.nat} NAT), and in "
            "the rehearsal nothing translates it",
        )
    if service.helped:
        yield Finding(
            "unsafe",
            "helper",
            "a conntrack helper is set on its connections: without "
            "tracking their data connections would be refused",
        )
    if not found.of(BREAKS) and not found.of(OPENS):
        yield from _unharmed(subject, service, settled)


def _beyond(settled: Settled) -> Iterator[Finding]:
    """What differs in more than one packet, and what might spare the rest."""
    if settled.counts:
        yield Finding(
            "unsafe",
            "counts",
            "without entries a limit, a quota, an hour or a set whose elements expire in the rules "
            "is asked about every packet, not only about the first of a connection",
        )
    for name in settled.found.unlearned[:1]:
        yield Finding(
            "unsafe",
            "learns",
            f"rules ask what is in {name}, and once untracked its packets fill that otherwise",
        )
    if settled.lacks_nft:
        yield Finding(
            "info",
            "no-nft",
            "rules of iptables cannot spare connections that NAT moves to its port; those of "
            "nftables may: install nft, then advise again",
        )


def _own_calls(subject: Subject, service: Service, settled: Settled) -> Iterator[Finding]:
    """Findings about calls that this host would make from the service's port."""
    found = settled.found
    if any(
        isinstance(d.what, Talk)
        and (d.what.role, d.what.sport) == ("client", service.port)
        and not d.what.known
        for d in found.of(BREAKS)
    ):
        low, high = subject.ephemeral
        yield Finding(
            "unsafe",
            "ephemeral",
            f"port {subject.port} lies in the ephemeral range "
            f"{low}-{high}, so the kernel may choose it for connections of this host: "
            "reserve it with net.ipv4.ip_local_reserved_ports",
        )
    for one in found.of(OWN)[:1]:
        yield Finding(
            "info",
            "own-calls",
            "whoever would make a call of his own from port "
            f"{subject.port} fares otherwise: the {one.name} of {one.what} would be "
            f"{'lost' if one.how == 'lost' else one.how}; none does so now",
        )


def _unharmed(subject: Subject, service: Service, settled: Settled) -> Iterator[Finding]:
    """Remarks on a lever that breaks and opens nothing."""
    yield from _of_rules(subject, service, settled)
    yield from _of_others(subject, service, settled)
    yield from _of_now(service, settled)


def _of_rules(subject: Subject, service: Service, settled: Settled) -> Iterator[Finding]:
    """Which packets its rules match, and what the firewall does with those."""
    lever = settled.lever
    if "half" in {service.entries_by_role().get(role) for role in subject.roles}:
        yield Finding(
            "info",
            "half",
            "rules there untrack one direction of it only, which frees "
            "nothing: entries of the other direction stay as long",
        )
    if "server" in subject.roles and not lever.shared and service.own_ports():
        yield Finding(
            "unsafe",
            "own-port",
            "a translation gives connections of this host other "
            f"ports by lot: one with port {subject.port} would lose its replies"
            + ("" if settled.lacks_nft else ", and rules that spare it would break something else"),
        )
    if settled.path_mtu:
        yield Finding(
            "info",
            "path-mtu",
            "the firewall drops ICMP errors about untracked flows "
            "(they are INVALID): the rules untrack exactly those of this port, so that "
            "path MTU discovery keeps working",
        )
    for place, packet in settled.reasons.items():
        yield Finding(
            "rules", "accept", f"{place} would drop its {packet} once untracked: an accept is added"
        )
    if subject.proto == "udp" and any(
        (a.role, a.flow, a.hook) == ("server", "from", "output") for a in lever.accepts
    ):
        yield Finding(
            "info",
            "udp-sends",
            f"what this host sends from port {subject.port} then "
            "passes whomever it is for: a datagram does not tell an answer from a "
            "request",
        )


def _of_others(subject: Subject, service: Service, settled: Settled) -> Iterator[Finding]:
    """Whom it leaves out."""
    lever = settled.lever
    if lever.peers and ("forward" in lever.roles or lever.proto == "tcp"):
        more = {
            "tcp": "for all would meet connections that they must not touch",
            "udp": "for all would open more; these could then send to any port from 1024 on",
        }[lever.proto]
        yield Finding(
            "info", "peers", f"covers only the servers seen ({len(lever.peers)}): rules {more}"
        )
    if lever.shared:
        how = "translated to" if service.room.names.nat else "made from"
        yield Finding(
            "info",
            "shared-port",
            f"other connections may be {how} port {subject.port}: "
            "the rules recognise those by how they begin, and keep them "
            "tracked",
        )
        if subject.shared_now:
            yield Finding(
                "unsafe",
                "shared-now",
                "another host's translated connection has port "
                f"{subject.port} right now: it may end when the rules come; advise again "
                "when it is over",
            )


def _of_now(service: Service, settled: Settled) -> Iterator[Finding]:
    """What the moment of the change does to open connections, and what was tried."""
    found = settled.found
    if found.cut:
        yield Finding(
            "unsafe",
            "cut",
            f"open connections such as {found.cut[0]} would not survive "
            "the moment when the rules come",
        )
    if found.resets:
        yield Finding("info", "resets", resets(settled))
    told, (addresses, ports) = _told(service), service.left_out
    rest = ""
    _, stood_for = service.table_flows
    if stood_for:
        rest += (
            f"; {stood_for:,} of these flows differ from one that was played only in ports, or in "
            "addresses that no rule tells apart"
        )
    if addresses or ports:
        rest += (
            f"; for {addresses:,} addresses and {ports:,} ports that rules name others stood, of "
        )
        rest += "the same kinds of rules"
    if service.cast.in_flows_only:
        rest += (
            f"; {service.cast.in_flows_only:,} addresses of the table took part with their own "
            "flows alone"
        )
    text = f"{told} fared the same in a rehearsal of its firewall{rest}"
    yield Finding("info", "rehearsed", text)


def resets(settled: Settled) -> str:
    """What the end of the rules does to connections that were opened under them."""
    many = len(dict.fromkeys(settled.found.resets))
    return (
        f"{WHEN_THEY_GO} (a trial that ends, undo), connections opened meanwhile may be cut or "
        f"stall, although those of this host get entries: {many} of the kinds rehearsed lost "
        "their next packet"
    )


def _told(service: Service) -> str:
    flows, stood_for = service.table_flows
    others = len(service.talks) - (flows - stood_for)
    parts = [
        f"{flows:,} flows of the table" if flows else "",
        f"{others:,} conversations",
        f"{len(service.strays):,} single packets",
    ]
    parts = [part for part in parts if part]
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]


def _differences(settled: Settled) -> Iterator[Finding]:
    found = settled.found
    for one, rule in settled.deciders:
        many = sum(
            d.kind == one.kind and d.how == one.how and d.name == one.name
            for d in found.differences
        )
        yield Finding("unsafe", one.kind, _sentence(one, rule, many))
    marks = found.of(MARKS)
    if marks:
        one = marks[0]
        assert one.before is not None
        assert one.after is not None
        yield Finding(
            "warn",
            "mark",
            f"the {one.name} of {_what(one)} ends with "
            f"{_marks(one.after)} instead of {_marks(one.before)}: whatever routes, "
            "filters or shapes by that sees it otherwise",
        )


def _marks(outcome: Any) -> str:
    more = f" and priority {outcome.priority:#x}" if outcome.priority else ""
    return f"mark {outcome.mark:#x} and TOS {outcome.tos:#x}{more}"


def _sentence(one: Difference, rule: str, many: int) -> str:
    by = f": {rule}" if rule else ""
    more = f" ({many} such)" if many > 1 else ""
    what = f"the {one.name} of {_what(one)}"
    if one.how == "lost":
        return f"{what} is lost once untracked{f'; {rule} drops it' if rule else ''}{more}"
    if one.how == "let in":
        stopped = f"; today {rule} stops it" if rule else ""
        return f"{what} gets through once untracked{stopped}{more}"
    if one.how == "translated":
        return (
            f"{what} is translated today{f' by {rule}' if rule else ''}, and would not be once "
            f"untracked{more}"
        )
    if one.how == "rewritten" and one.before and one.after:
        then, now = one.before.ttl, one.after.ttl
        told = f"TTL {now} instead of {then}"
        if then == now:
            told = "other data" if one.before.proto == UDP else "other TCP options, flags or data"
        return f"{what} would have {told} once untracked{more}"
    return f"{what} would take another way once untracked{by}{more}"


def _what(one: Difference) -> str:
    what = one.what
    if isinstance(what, Stray):
        return f"a stranger's packet {what}"
    user = f" (user {what.uid})" if what.uid else ""
    user = f" (served by user {what.answering})" if what.answering else user
    return f"{what}{user}"
