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
from ipaddress import ip_address
from typing import Any, Final, Optional

from ctrace.advice.findings import LEVELS, VERDICTS, Finding, rehearsed
from ctrace.advice.subject import Subject
from ctrace.errors import CtraceError, passes
from ctrace.host.memory import unswept
from ctrace.host.rawlink import split
from ctrace.plan.plan import MAX_ADDRESSES, Notrack
from ctrace.record import Status
from ctrace.rehearsal.compare import HARMLESS
from ctrace.rehearsal.given.rebuild import Rebuilt
from ctrace.rehearsal.mend import MAX_PEERS, Mender, Settled
from ctrace.rehearsal.play import Talk
from ctrace.rehearsal.rehearse import Service
from ctrace.rehearsal.room import Room, Setting
from ctrace.rehearsal.snapshot import Snapshot
from ctrace.ruleset.model import Ruleset
from ctrace.ruleset.planes import EVERYWHERE

BUDGET_S: Final = 120
"""Seconds for all rehearsals of one namespace, of which this process had a processor."""
LONGEST_S: Final = 900
"""Seconds for them by the clock: on a loaded host little of it is spent on them."""
FAILURES: Final = (CtraceError, OSError, ValueError, LookupError, struct.error, MemoryError)
"""How a rehearsal may end on a host with surprises: the answer is *cannot say*, not a traceback."""
NOT_NOW: Final = ("no-time", "not-now")
"""Ids of findings that say nothing about the rules: a later attempt may give an answer."""


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

    @property
    def remarks(self) -> tuple[str, ...]:
        """What speaks against rules that are safe: that they gain nothing."""
        return tuple(finding.text for finding in self.findings if finding.level == "remark")

    @property
    def not_now(self) -> bool:
        """Whether the only obstacle was a lack of time or memory: nothing is known against it."""
        against = [f for f in self.findings if f.level in ("unknown", "unsafe")]
        return bool(against) and all(f.id in NOT_NOW for f in against)


class Judge:
    """Of one namespace: its snapshot is prepared once for all services."""

    def __init__(
        self,
        ruleset: Optional[Ruleset],
        snapshot: Optional[Snapshot],
        backend: str = "nft",
        texts: Optional[Rebuilt] = None,
    ) -> None:
        """``backend``: where ctrace's own rules would go. None: not at hand. ``texts``: what came
        of a copy made of texts, where there is nothing else."""
        self._ruleset, self._backend = ruleset, backend
        self.room: Optional[Room] = None
        self._why_not, self._later = "", False
        self._began = time.monotonic(), time.process_time()
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
                "its ruleset is not available (not recorded, or its namespace is gone): run "
                "advise on the host before applying anything"
            )
        if ruleset is None or snapshot is None:
            return
        try:
            with unswept():
                self.room = Room(snapshot, ruleset)
        except FAILURES as error:
            failed = _failed(error)
            self._why_not, self._later = failed.text, failed.id in NOT_NOW

    def _over(self) -> bool:
        """Whether the time for this namespace is."""
        clock, spent = self._began
        took = time.monotonic() - clock
        return took > LONGEST_S or min(took, time.process_time() - spent) > BUDGET_S

    def judge(self, subject: Subject) -> Judgement:
        """The verdict on NOTRACK for a service."""
        with unswept():
            return self._judge(subject)

    def _judge(self, subject: Subject) -> Judgement:
        lever = _lever(subject)
        findings = [*seen(subject), *(Finding("info", "texts", one) for one in self._remarks)]
        evidence: dict[str, Any] = {}
        if self._ruleset is not None:
            findings += around(subject, self._ruleset)
        if self.room is None:
            known = "not-now" if self._later else "no-rehearsal"
            findings.append(Finding("unknown", known, self._why_not))
        elif self._over():
            findings.append(
                Finding(
                    "unknown",
                    "no-time",
                    "the rehearsals of this namespace took "
                    f"{time.monotonic() - self._began[0]:.0f} s already: advise on it alone",
                )
            )
        elif subject.roles:
            findings += [
                Finding("unknown", "gap", f"{gap}: that could not be copied for a rehearsal")
                for gap in self.room.gaps
            ]
            try:
                service = Service(
                    self.room,
                    subject.proto,
                    subject.port,
                    subject.ephemeral,
                    subject.flows,
                    picked=_picked(subject),
                )
                settled = Mender(service, self._ruleset, self._backend).settle(lever)
                lever = settled.lever
                evidence = _evidence(service, settled, self.room)
                findings += to_many(subject, self.room.snapshot)
                findings += self._tracking(subject, [*rehearsed(subject, service, settled)])
            except FAILURES as error:
                findings.append(_failed(error))
        return _sum(findings, lever, evidence)

    def _tracking(self, subject: Subject, found: list[Finding]) -> list[Finding]:
        """With texts only: reports entries that no rule there creates, instead of calling them
        untracked."""
        if not self._remarks or not subject.flows or all(one.id != "already" for one in found):
            return found
        found = [one for one in found if one.id != "already"]
        return [
            *found,
            Finding(
                "unknown",
                "texts",
                "its table has entries, and in the rehearsal "
                "nothing is tracked: what tracks there is not in the "
                "texts",
            ),
        ]


def _failed(error: BaseException) -> Finding:
    why = str(error) or "memory ran out"
    known = "not-now" if passes(error) else "no-rehearsal"
    return Finding("unknown", known, f"it could not be rehearsed: {why}")


def _picked(subject: Subject) -> bool:
    """Whether the kernel may choose the service's port for a connection of this host."""
    low, high = subject.ephemeral
    return subject.picked and low <= subject.port <= high


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
    if subject.proto == "udp" and "client" in subject.roles:
        if not subject.peers or len(subject.peers) > MAX_PEERS:
            yield Finding(
                "unsafe",
                "udp-client",
                "answers to UDP requests can only be told from "
                "strangers by address, and the servers are too many or not "
                "known",
            )
        else:
            who = "server" if len(subject.peers) == 1 else f"{len(subject.peers)} servers"
            yield Finding(
                "info",
                "udp-peers",
                f"covers only the {who} seen, which could then send "
                "to any port of the ephemeral range",
            )
    if subject.status & (Status.HELPER | Status.EXPECTED):
        yield Finding(
            "unsafe",
            "helper",
            "a conntrack helper follows or expects its connections: "
            "without tracking it would not, and what it lets in would be "
            "refused",
        )
    if subject.status & Status.OFFLOAD:
        yield SLOWER
    if not subject.roles:
        yield Finding(
            "unknown", "role", "it is not known whether this host serves, calls or forwards it"
        )


def to_many(subject: Subject, snapshot: Snapshot) -> Iterator[Finding]:
    """Datagrams to a group or to everybody on a link: a rehearsal has no such receivers."""
    every = {b"\xff\xff\xff\xff", *(dict(split(a, 8)).get(4) for a in snapshot.addresses)}
    for _, _, _, target, _ in subject.flows:
        address = ip_address(target)
        if address.is_multicast or target in every:
            yield Finding(
                "unknown",
                "to-many",
                f"some of its datagrams go to many at once ({address}), which no rehearsal plays",
            )
            return


def around(subject: Subject, ruleset: Ruleset) -> Iterator[Finding]:
    """What surrounds the rules and is not in a copy, where it can matter to this service."""
    for gap in ruleset.gaps:
        yield Finding("unknown", "unread", f"{gap}: that could not be rehearsed")
    for proto, port in ruleset.ipvs:
        if (proto, port) == (subject.proto, subject.port):
            yield Finding("unsafe", "ipvs", "it is an IPVS virtual service")
        elif not port and "server" not in subject.roles:
            yield Finding("unknown", "ipvs", "IPVS balances connections by firewall mark here")
    for device, what in ruleset.planes:
        # Packets over lo never leave it, so programs at other devices do not see them.
        near = subject.roles == ("loopback",) and device not in ("lo", EVERYWHERE)
        there = " there" if near else ""
        text = (
            f"{what} at {device} sees packets before these rules; what it does is not known, "
            f"so neither is whether NOTRACK takes effect{there}"
        )
        yield Finding("info" if near else "unknown", "plane", text)
    if "forward" in subject.roles and _meets(subject, ruleset, "flow"):
        yield SLOWER
    if "synproxy" in ruleset.uses() and _meets(subject, ruleset, "synproxy"):
        yield Finding("unsafe", "synproxy", "SYNPROXY answers its handshakes, which needs tracking")
    if "forward" in subject.roles and _meets(subject, ruleset, "tproxy"):
        yield Finding(
            "unknown",
            "tproxy",
            "rules hand connections to a transparent proxy of this "
            "host: a rehearsal has no proxy, so it cannot be told whose answers go "
            "where",
        )


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


def _limits(setting: Setting) -> str:
    """What limits, quotas, hours and the like said where a difference appeared."""
    words = {True: "open", False: "shut"}
    later = "" if setting.later is None else f", then {words[setting.later]}"
    later = ", then expired" if setting.expired else later
    packet = "" if setting.packet is None else f", what reads a packet {words[setting.packet]}"
    return words[setting.answer] + packet + later


def _evidence(service: Service, settled: Settled, room: Room) -> dict[str, Any]:
    talks = service.talks
    found = settled.found
    return {
        "conversations": len(talks),
        "flows_of_table": service.table_flows[0],
        "flows_stood_for": service.table_flows[1],
        "single_packets": len(service.strays),
        "roles": sorted({t.role for t in talks}),
        "families": sorted({(len(t.client) == 16 and "ip6") or "ip" for t in talks}),
        "settings": len(room.settings()),
        "stood_for_by_others": {"addresses": service.left_out[0], "ports": service.left_out[1]},
        "addresses_in_their_own_flows_only": service.cast.in_flows_only,
        "entries": {"tracked": found.entries[0], "untracked": found.entries[1]},
        "differed": [
            {
                "kind": d.kind,
                "how": d.how,
                "packet": d.name,
                "of": str(d.what),
                "role": d.what.role if isinstance(d.what, Talk) else "stranger",
                "limits": _limits(found.settings[id(d)]),
            }
            for d in found.differences
            if d.kind != HARMLESS
        ][:100],
        "lost_when_the_rules_go": [str(t) for t in dict.fromkeys(found.resets)][:20],
        "not_copied": list(room.gaps),
    }
