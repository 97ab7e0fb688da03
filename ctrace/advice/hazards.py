"""The verdict on taking one service out of tracking: from its entries, and from a rehearsal.

The kernel judges: the service's conversations are played through a copy of the namespace's
firewall, tracked and untracked, and compared packet by packet. What can't be copied or tried
never ends as safe.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Final, Optional

from ctrace.advice.subject import Subject
from ctrace.change.plan import MAX_ADDRESSES, Notrack
from ctrace.errors import CtraceError
from ctrace.record import Status
from ctrace.rehearsal.compare import BREAKS, HARMLESS, MARKS, OPENS, Difference
from ctrace.rehearsal.given.rebuild import Rebuilt
from ctrace.rehearsal.mend import MAX_PEERS, Mender, Settled
from ctrace.rehearsal.play import Stray, Talk
from ctrace.rehearsal.rehearse import Room, Service
from ctrace.rehearsal.snapshot import Snapshot
from ctrace.ruleset.model import Ruleset
from ctrace.ruleset.planes import EVERYWHERE

LEVELS: Final = {"info": "safe", "rules": "safe-with-rules", "warn": "warn",
                 "unknown": "cannot-say", "unsafe": "unsafe"}  # fmt: skip
VERDICTS: Final = tuple(LEVELS.values())
BUDGET_S: Final = 120
"""Seconds for all rehearsals of one namespace."""
FAILURES: Final = (CtraceError, OSError, ValueError, LookupError, struct.error)
"""What a rehearsal may end with on a host that nobody thought of: *cannot say*, not a traceback."""
WHEN_THEY_GO: Final = "when the rules go again"
"""How a reason begins that is about the end of a trial."""


@dataclass(frozen=True)
class Finding:
    """One reason for or against."""

    level: str
    """A key of :data:`LEVELS`."""
    id: str
    text: str


SLOWER: Final = Finding(
    "info", "flow", "a flowtable speeds it up, which needs tracking: it would work, but slower"
)


@dataclass(frozen=True)
class Judgement:
    """What may be done with a service, and why."""

    verdict: str
    findings: tuple[Finding, ...]
    lever: Notrack
    evidence: dict[str, Any] = field(default_factory=dict)
    """What was tried, what differed, what could not be copied; JSON-ready."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Texts, the gravest first."""
        order = list(LEVELS)[::-1]
        ranked = sorted(self.findings, key=lambda f: order.index(f.level))
        return tuple(dict.fromkeys(finding.text for finding in ranked))


class Judge:
    """Of one namespace: its snapshot is prepared once for all services."""

    def __init__(
        self, ruleset: Optional[Ruleset], snapshot: Optional[Snapshot], backend: str = "nft",
        texts: Optional[Rebuilt] = None,
    ) -> None:  # fmt: skip
        """``backend``: where ctrace's own rules would go. None: not at hand. ``texts``: what came
        of a copy made of texts, where there is nothing else."""
        self._ruleset, self._backend = ruleset, backend
        self.room: Optional[Room] = None
        self._why_not = ""
        self._until = time.monotonic() + BUDGET_S
        self._remarks = texts.remarks if texts else ()
        if texts is not None and snapshot is None:
            self._why_not = texts.lacking
        elif ruleset is not None and snapshot is None:
            self._why_not = (
                "its rules are at hand as text or without a copy of the host, which nothing can be "
                "tried on: run advise on the host before applying anything"
            )
        elif ruleset is None:
            self._why_not = (
                "its ruleset is not at hand (not in the recording, or its namespace is gone): run "
                "advise on the host before applying anything"
            )
        if ruleset is None or snapshot is None:
            return
        try:
            self.room = Room(snapshot, ruleset)
        except FAILURES as error:
            self._why_not = f"it could not be rehearsed: {error}"

    def judge(self, subject: Subject) -> Judgement:
        """The verdict on NOTRACK for a service."""
        lever = _lever(subject)
        findings = [*seen(subject), *(Finding("info", "texts", one) for one in self._remarks)]
        evidence: dict[str, Any] = {}
        if self._ruleset is not None:
            findings += around(subject, self._ruleset)
        if self.room is None:
            findings.append(Finding("unknown", "no-rehearsal", self._why_not))
        elif time.monotonic() > self._until:
            findings.append(Finding("unknown", "no-time", "the rehearsals of this namespace took "
                                    f"{BUDGET_S} s already: advise on it alone"))  # fmt: skip
        elif subject.roles:
            findings += [Finding("unknown", "gap", f"{gap}: that could not be copied for a "
                                 "rehearsal") for gap in self.room.gaps]  # fmt: skip
            try:
                service = Service(self.room, subject.proto, subject.port, subject.ephemeral,
                                  subject.flows)  # fmt: skip
                settled = Mender(service, self._ruleset, self._backend).settle(lever)
                lever = settled.lever
                evidence = _evidence(service, settled, self.room)
                findings += _rehearsed(subject, service, settled)
            except FAILURES as error:
                findings.append(Finding("unknown", "no-rehearsal", f"it could not be rehearsed: "
                                        f"{error}"))  # fmt: skip
        return _sum(findings, lever, evidence)


def _sum(findings: list[Finding], lever: Notrack, evidence: dict[str, Any]) -> Judgement:
    unique = tuple(dict.fromkeys(findings))
    levels = [VERDICTS.index(LEVELS[finding.level]) for finding in unique]
    return Judgement(VERDICTS[max(levels, default=0)], unique, lever, evidence)


def _lever(subject: Subject) -> Notrack:
    peers: tuple[str, ...] = ()
    if subject.only_peers or (subject.proto == "udp" and "client" in subject.roles):
        # Without a handshake only the address tells an answer from a stranger's packet.
        peers = subject.peers[:MAX_PEERS]
    return Notrack(
        proto=subject.proto,
        port=subject.port,
        roles=subject.roles,
        ephemeral=subject.ephemeral,
        peers=peers,
        addresses=subject.local[:MAX_ADDRESSES],
    )


# ---- without a rehearsal ---------------------------------------------------------------


def seen(subject: Subject) -> Iterator[Finding]:
    """From the service's entries."""
    low, high = subject.ephemeral
    if "server" in subject.roles and subject.picked and low <= subject.port <= high:
        yield Finding("warn", "ephemeral", f"port {subject.port} lies in the ephemeral range "
                      f"{low}-{high}: connections that this host opens from it would be caught "
                      "too; reserve it with net.ipv4.ip_local_reserved_ports")  # fmt: skip
    if subject.proto == "udp" and "client" in subject.roles:
        if not subject.peers or len(subject.peers) > MAX_PEERS:
            yield Finding("unsafe", "udp-client", "answers to UDP requests can only be told from "
                          "strangers by address, and the servers are too many or not "
                          "known")  # fmt: skip
        else:
            who = "server" if len(subject.peers) == 1 else f"{len(subject.peers)} servers"
            yield Finding("info", "udp-peers", f"covers only the {who} seen, which could then send "
                          "to any port of the ephemeral range")  # fmt: skip
    if subject.status & (Status.HELPER | Status.EXPECTED):
        yield Finding("unsafe", "helper", "a conntrack helper follows or expects its connections: "
                      "without tracking it would not, and what it lets in would be "
                      "refused")  # fmt: skip
    if subject.status & Status.OFFLOAD:
        yield SLOWER
    if not subject.roles:
        yield Finding("unknown", "role", "it is not known whether this host serves, calls or "
                      "forwards it")  # fmt: skip


def around(subject: Subject, ruleset: Ruleset) -> Iterator[Finding]:
    """What lies around the rules and is not in a copy, where it can matter to this service."""
    for gap in ruleset.gaps:
        yield Finding("unknown", "unread", f"{gap}: that could not be rehearsed")
    for proto, port in ruleset.ipvs:
        if (proto, port) == (subject.proto, subject.port):
            yield Finding("unsafe", "ipvs", "it is an IPVS virtual service")
        elif not port and "server" not in subject.roles:
            yield Finding("unknown", "ipvs", "IPVS balances connections by firewall mark here")
    for device, what in ruleset.planes:
        # Packets over lo never leave it: what works at another device is none of their business.
        near = subject.roles == ("loopback",) and device not in ("lo", EVERYWHERE)
        there = " there" if near else ""
        text = (f"{what} at {device} sees packets before these rules; what it does is not known, "
                f"so neither is whether NOTRACK takes effect{there}")  # fmt: skip
        yield Finding("info" if near else "unknown", "plane", text)
    if "forward" in subject.roles and _meets(subject, ruleset, "flow"):
        yield SLOWER
    if "synproxy" in ruleset.uses() and _meets(subject, ruleset, "synproxy"):
        yield Finding("unsafe", "synproxy", "SYNPROXY answers its handshakes, which needs "
                      "tracking")  # fmt: skip
    if "forward" in subject.roles and "tproxy" in ruleset.uses():
        yield Finding("unknown", "tproxy", "rules hand connections to a transparent proxy of this "
                      "host: a rehearsal has no proxy, so it cannot be told whose answers go "
                      "where")  # fmt: skip


def _meets(subject: Subject, ruleset: Ruleset, kind: str) -> bool:
    """Whether a rule with such a statement names the service's port, or none."""
    return any(
        use.kind == kind
        and all(
            match.negate or any(low <= subject.port <= high for low, high in match.values)
            for match in rule.matches
            if match.key == "dport"
        )
        for chain in ruleset.chains
        for rule in chain.rules
        for use in rule.uses
    )


# ---- the rehearsal in words ---------------------------------------------------------------


def _rehearsed(subject: Subject, service: Service, settled: Settled) -> Iterator[Finding]:
    found, lever = settled.found, settled.lever
    every = [service.tracked(setting).runs for setting in service.room.settings()]
    runs = every[0]
    refused = [ways[0].talk for ways in zip_longest(*every)
               if ways[0].talk.known and not any(run.first for run in ways)]  # fmt: skip
    if refused:
        yield Finding("unknown", "refused", f"its table has {refused[0]}, which the rehearsal "
                      "refuses without any rules of ours: something lets it in that the "
                      "rehearsal lacks")  # fmt: skip
    yield from _differences(settled)
    tracked, untracked = found.entries
    if tracked and untracked >= 0.9 * tracked:
        yield Finding("warn", "ineffective", "pointless: NOTRACK would have no effect, its "
                      f"conversations made {tracked} entries in a rehearsal, and {untracked} with "
                      "the rules")  # fmt: skip
    if not tracked and runs:
        yield Finding("info", "already", "its conversations made no entry in a rehearsal: they "
                      "are untracked already")  # fmt: skip
    translated = subject.nat not in ("", "no")
    if translated and not found.of(BREAKS) and not lever.shared and not service.translates():
        yield Finding("unknown", "nat", f"its entries are translated ({subject.nat} NAT), and in "
                      "the rehearsal nothing translates it")  # fmt: skip
    if service.helped:
        yield Finding("unsafe", "helper", "a conntrack helper is set on its connections: without "
                      "tracking their data connections would be refused")  # fmt: skip
    if not found.of(BREAKS) and not found.of(OPENS):
        yield from _unharmed(subject, service, settled)


def _unharmed(subject: Subject, service: Service, settled: Settled) -> Iterator[Finding]:
    """What to know of a lever that breaks and opens nothing."""
    found, lever = settled.found, settled.lever
    if "half" in {service.entries_by_role().get(role) for role in subject.roles}:
        yield Finding("info", "half", "rules there untrack one direction of it only, which frees "
                      "nothing: entries of the other direction stay as long")  # fmt: skip
    if "server" in subject.roles and not lever.shared and service.own_ports():
        yield Finding("warn", "own-port", "a translation gives connections of this host other "
                      f"ports by lot: one with port {subject.port} would lose its "
                      "replies")  # fmt: skip
    if settled.path_mtu:
        yield Finding("info", "path-mtu", "the firewall drops ICMP errors about untracked flows "
                      "(they are INVALID): the rules untrack exactly those of this port, so that "
                      "path MTU discovery keeps working")  # fmt: skip
    for place, packet in settled.reasons.items():
        yield Finding("rules", "accept", f"{place} would drop its {packet} once untracked: an "
                      "accept is added")  # fmt: skip
    if subject.proto == "udp" and any(
        (a.role, a.flow, a.hook) == ("server", "from", "output") for a in lever.accepts
    ):
        yield Finding("info", "udp-sends", f"what this host sends from port {subject.port} then "
                      "passes whomever it is for: a datagram does not tell an answer from a "
                      "request")  # fmt: skip
    if lever.peers and "forward" in lever.roles:
        yield Finding("info", "peers", f"covers only the servers seen ({len(lever.peers)}): rules "
                      "for all would meet connections that they must not touch")  # fmt: skip
    if lever.shared:
        yield Finding("info", "shared-port", "other connections may be translated to port "
                      f"{subject.port}: the rules recognise those as they leave, and keep them "
                      "tracked")  # fmt: skip
        if subject.shared_now:
            yield Finding("warn", "shared-now", "another host's translated connection has port "
                          f"{subject.port} right now: it may end when the rules come; advise again "
                          "when it is over")  # fmt: skip
    if found.cut:
        yield Finding("unsafe", "cut", f"open connections such as {found.cut[0]} would not survive "
                      "the moment when the rules come")  # fmt: skip
    if found.resets:
        yield Finding("info", "resets", resets(settled))
    told, (addresses, ports) = _told(service), service.left_out
    rest = ""
    if addresses or ports:
        rest = (
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
    known = [t for t in service.talks if t.known]
    flows = sum(1 + t.kin for t in known)
    others = len(service.talks) - len(known)
    parts = [f"{flows:,} flows of the table" if flows else "",
             f"{others:,} conversations", f"{len(service.strays):,} single packets"]  # fmt: skip
    parts = [part for part in parts if part]
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]


def _differences(settled: Settled) -> Iterator[Finding]:
    found = settled.found
    for one, rule in settled.deciders:
        many = sum(d.kind == one.kind and d.how == one.how and d.name == one.name
                   for d in found.differences)  # fmt: skip
        yield Finding("unsafe", one.kind, _sentence(one, rule, many))
    marks = found.of(MARKS)
    if marks:
        one = marks[0]
        assert one.before is not None
        assert one.after is not None
        yield Finding("warn", "mark", f"the {one.name} of {_what(one)} ends with "
                      f"{_marks(one.after)} instead of {_marks(one.before)}: whatever routes, "
                      "filters or shapes by that sees it otherwise")  # fmt: skip


def _marks(outcome: Any) -> str:
    return f"mark {outcome.mark:#x} and TOS {outcome.tos:#x}"


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
        return (f"{what} is translated today{f' by {rule}' if rule else ''}, and would not be once "
                f"untracked{more}")  # fmt: skip
    return f"{what} would take another way once untracked{by}{more}"


def _what(one: Difference) -> str:
    what = one.what
    if isinstance(what, Stray):
        return f"a stranger's packet {what}"
    user = f" (user {what.uid})" if what.uid else ""
    return f"{what}{user}"


def _evidence(service: Service, settled: Settled, room: Room) -> dict[str, Any]:
    talks = service.talks
    found = settled.found
    return {
        "conversations": len(talks),
        "flows_of_table": sum(1 + t.kin for t in talks if t.known),
        "single_packets": len(service.strays),
        "roles": sorted({t.role for t in talks}),
        "families": sorted({(len(t.client) == 16 and "ip6") or "ip" for t in talks}),
        "settings": len(room.settings()),
        "stood_for_by_others": {"addresses": service.left_out[0], "ports": service.left_out[1]},
        "addresses_in_their_own_flows_only": service.cast.in_flows_only,
        "entries": {"tracked": found.entries[0], "untracked": found.entries[1]},
        "differed": [
            {"kind": d.kind, "how": d.how, "packet": d.name, "of": str(d.what),
             "role": d.what.role if isinstance(d.what, Talk) else "stranger"}
            for d in found.differences if d.kind != HARMLESS
        ][:100],
        "lost_when_the_rules_go": [str(t) for t in dict.fromkeys(found.resets)][:20],
        "not_copied": list(room.gaps),
    }  # fmt: skip
