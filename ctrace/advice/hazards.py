"""The verdict on taking one service out of tracking under one ruleset.

Everything that can go wrong is looked for; what is found decides: ``unsafe``,
``warn``, ``safe-with-rules`` (accepts are needed in other tables) or ``safe``.
What cannot be read or understood never ends as safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    summarize_address_range,
)
from typing import Final, Optional

from ctrace.advice.evidence import (
    MAX_CLIENT_PEERS,
    NAT,
    STATEFUL,
    Finding,
    evidence,
    named,
    source_nat,
    static,
)
from ctrace.advice.probes import Flow, Probe, Subject, flows
from ctrace.change.plan import (
    MAX_ADDRESSES,
    MAX_DEVICES,
    Accept,
    Notrack,
    device_ok,
    name_ok,
)
from ctrace.ruleset.evaluate import Met, Outcome, TooComplex, evaluate, explore
from ctrace.ruleset.model import Chain, Ruleset
from ctrace.ruleset.notrack_model import applied

VERDICTS: Final = ("safe", "safe-with-rules", "warn", "unsafe")
LEVELS: Final = {"info": "safe", "rules": "safe-with-rules", "warn": "warn", "unsafe": "unsafe"}
ROUNDS: Final = 12


@dataclass(frozen=True)
class Judgement:
    """What may be done with a service, and why."""

    verdict: str
    findings: tuple[Finding, ...]
    lever: Notrack

    @property
    def reasons(self) -> tuple[str, ...]:
        """Texts, the gravest first."""
        order = list(LEVELS)[::-1]
        ranked = sorted(self.findings, key=lambda f: order.index(f.level))
        return tuple(dict.fromkeys(finding.text for finding in ranked))


@dataclass(frozen=True)
class _Change:
    """A probe whose fate the lever changes."""

    probe: Probe
    before: Outcome
    after: Outcome

    @property
    def breaks(self) -> bool:
        return self.before.verdict == "accept" and self.after.verdict != "accept"

    @property
    def opens(self) -> bool:
        return self.before.verdict != "accept" and self.after.verdict == "accept"


def judge(subject: Subject, ruleset: Optional[Ruleset]) -> Judgement:
    """The verdict on NOTRACK for ``subject``; None for a ruleset that is not at hand."""
    lever = _lever(subject)
    findings = [*evidence(subject)]
    if ruleset is None:
        findings.append(
            Finding("warn", "no-ruleset", "its ruleset is not at hand (not in the recording, or "
                    "its namespace is gone): run advise on the host before applying anything")
        )  # fmt: skip
        return _sum(findings, lever)
    findings += [Finding("warn", "unread", f"{gap}: its rules could not be judged")
                 for gap in ruleset.gaps]  # fmt: skip
    if "server" in subject.roles and source_nat(subject, ruleset):
        # ICMP errors don't tell whose flow they quote: no rule of ours may catch them.
        lever = replace(lever, shared=True, icmp=False)
    try:
        findings += static(subject, lever, ruleset)
        judged, lever = _differential(subject, lever, ruleset)
        findings += judged
    except TooComplex:
        findings.append(
            Finding("warn", "too-complex", "the ruleset has too many conditions that depend on "
                    "more than the packet: it could not be judged")
        )  # fmt: skip
    return _sum(findings, lever)


def _sum(findings: list[Finding], lever: Notrack) -> Judgement:
    unique = tuple(dict.fromkeys(findings))
    levels = [VERDICTS.index(LEVELS[finding.level]) for finding in unique]
    return Judgement(VERDICTS[max(levels, default=0)], unique, lever)


def _lever(subject: Subject) -> Notrack:
    peers: tuple[str, ...] = ()
    if subject.proto == "udp" and "client" in subject.roles:
        # Without a handshake only the address tells an answer from a stranger's packet.
        peers = subject.peers[:MAX_CLIENT_PEERS]
    return Notrack(
        proto=subject.proto,
        port=subject.port,
        roles=subject.roles,
        ephemeral=subject.ephemeral,
        peers=peers,
        addresses=subject.local[:MAX_ADDRESSES],
    )


# ---- differential evaluation -------------------------------------------------------


def _differential(
    subject: Subject, lever: Notrack, ruleset: Ruleset
) -> tuple[list[Finding], Notrack]:
    findings: list[Finding] = []
    if lever.icmp and _closes_path_mtu(subject, lever, ruleset):
        findings.append(
            Finding("info", "path-mtu", "the firewall drops ICMP errors about untracked flows "
                    "(they are INVALID): the rules untrack exactly those of this port, so that "
                    "path MTU discovery keeps working")
        )  # fmt: skip
    for _ in range(ROUNDS):
        changes, found = _compare(subject, lever, ruleset)
        holes = [change for change in changes if change.opens]
        breaks = [change for change in changes if change.breaks and change.probe.service]
        if holes:
            findings += found
            findings += [_hole(change, lever) for change in holes[:3]]
            return findings, replace(lever, accepts=())
        if not breaks:
            others = [change for change in changes if not change.probe.service]
            findings += [_another(change, lever) for change in others[:1]]
            return findings + found, lever
        accept, why = _accept_for(breaks[0], lever)
        if accept is None:
            findings += [*found, why]
            return findings, replace(lever, accepts=())
        lever = replace(lever, accepts=(*lever.accepts, accept))
        findings.append(why)
    findings.append(
        Finding("unsafe", "breaks", "the firewall refuses it in too many places to mend with a "
                "few accepts")
    )  # fmt: skip
    return findings, replace(lever, accepts=())


def _closes_path_mtu(subject: Subject, lever: Notrack, ruleset: Ruleset) -> bool:
    plain = replace(lever, icmp=False)
    changes, _ = _compare(subject, plain, ruleset)
    return any(change.breaks and change.probe.flow == "icmp" for change in changes)


def _compare(
    subject: Subject, lever: Notrack, ruleset: Ruleset
) -> tuple[list[_Change], list[Finding]]:
    """Every probe without and with the lever: what changes, and what stands in the way."""
    changes: list[_Change] = []
    findings: dict[Finding, None] = {}
    works: set[str] = set()
    tried: set[str] = set()
    for then in applied(ruleset, lever):
        for flow in flows(subject, lever, ruleset):
            for result in explore(lambda chosen, f=flow, t=then: _run(f, ruleset, t, chosen)):  # type: ignore[misc]
                for found in _flow_findings(subject, result):
                    findings[found] = None
                changes += [c for c in result if c.breaks or c.opens]
                tried.add(result[0].probe.role)
                if result[0].before.verdict == "accept" and _from_afar(result[0].probe):
                    works.add(result[0].probe.role)
    for role in sorted(set(subject.roles) - tried):
        text = f"no packet of it could be tried ({role}): who uses it is not known well enough"
        findings[Finding("warn", "untried", text)] = None
    for role in sorted((set(subject.roles) & tried) - works):
        text = (f"the rules, as far as they are understood, refuse all of it ({role}), and yet it "
                "has entries: something lets it in that was not seen")  # fmt: skip
        findings[Finding("warn", "refused", text)] = None
    return changes, list(findings)


def _from_afar(probe: Probe) -> bool:
    """Part of the service as its role has it: a server's own checks over lo say little."""
    return probe.service and (probe.packet.iif != "lo" or probe.role == "loopback")


def _run(flow: Flow, now: Ruleset, then: Ruleset, chosen: Mapping[str, bool]) -> list[_Change]:
    """One connection: packets that could never follow a refused first one are left out."""
    first = _Change(
        flow[0],
        evaluate(now, flow[0].packet, chosen),
        evaluate(then, flow[0].packet, chosen, flow_tracked=False),
    )
    if first.before.verdict != "accept":
        return [first]
    return [
        first,
        *(
            _Change(
                probe,
                evaluate(now, probe.packet, chosen),
                evaluate(then, probe.packet, chosen, flow_tracked=False),
            )
            for probe in flow[1:]
        ),
    ]


def _flow_findings(subject: Subject, result: list[_Change]) -> Iterator[Finding]:
    service = [change for change in result if change.probe.service]
    tracked = [c for c in service if c.probe.flow != "icmp"]
    for change in service:
        for met in change.before.met:
            yield from _met(subject, change, met)
        for outcome in (change.before, change.after):
            if outcome.verdict == "unknown" and outcome.chain is not None:
                yield Finding("warn", "unknown", f"{named(outcome.chain, outcome.rule)} decides in "
                              "a way that is not understood")  # fmt: skip
    if any(not change.after.untracked for change in tracked):
        late = next(change for change in tracked if not change.after.untracked)
        blocker = next(
            (
                met
                for met in late.after.met
                if met.use.kind not in ("notrack", "mark", "tproxy", *NAT)
            ),
            None,
        )
        by = f" by {named(blocker.chain, blocker.rule)}" if blocker else ""
        yield Finding("unsafe", "ineffective", f"NOTRACK would have no effect on its "
                      f"{late.probe.packet.name}: tracking is forced{by}")  # fmt: skip
    already = [change.before.untracked for change in tracked]
    if all(already) and already:
        yield Finding("info", "already", "it is already untracked in all directions")
    elif any(already):
        rule = next(
            met for change in tracked for met in change.before.met if met.use.kind == "notrack"
        )
        yield Finding("info", "half", f"{named(rule.chain, rule.rule)} untracks only one "
                      "direction, which frees nothing: entries of the other direction stay as "
                      "long")  # fmt: skip


def _met(subject: Subject, change: _Change, met: Met) -> Iterator[Finding]:
    kind, where = met.use.kind, named(met.chain, met.rule)
    if kind in NAT:
        outgoing = kind == "masquerade" and change.probe.packet.local_src
        if outgoing and subject.nat == "no":
            yield Finding("info", "nat-noop", f"{where} changes nothing about it: its entries "
                          "show no translation")  # fmt: skip
        elif met.sure or subject.nat != "no":
            yield Finding("unsafe", "nat", f"{where} translates its addresses or ports")
        else:
            yield Finding("warn", "nat", f"{where} may translate its addresses or ports")
    elif kind == "tproxy" and change.probe.role == "forward":
        yield Finding("unsafe", kind, "a transparent proxy of this host answers for the server "
                      f"({where}): its answers are not forwarded, so one direction would stay "
                      "tracked")  # fmt: skip
    elif kind in STATEFUL and not (kind in ("helper", "timeout") and change.before.untracked):
        level, text = STATEFUL[kind]
        yield Finding(level, kind, f"{text} ({where})")


def _another(change: _Change, lever: Notrack) -> Finding:
    outcome = change.after
    by = f" by {named(outcome.chain, outcome.rule)}" if outcome.chain else ""
    return Finding("warn", "neighbour", "another host's connection from source port "
                   f"{lever.port} would be refused{by}")  # fmt: skip


def _hole(change: _Change, lever: Notrack) -> Finding:
    packet = change.probe.packet
    if change.probe.service and change.probe.role == "server":
        text = (f"{packet.saddr or 'some source'} may not connect to port {lever.port} now, and "
                "could if it were untracked")  # fmt: skip
    else:
        text = (f"{packet.name} from source port {packet.sport} would reach port {packet.dport}, "
                "which the firewall keeps closed")  # fmt: skip
    return Finding("unsafe", "hole", text)


def _accept_for(change: _Change, lever: Notrack) -> tuple[Optional[Accept], Finding]:
    """The narrow accept that mends a break, just before what would drop."""
    outcome, probe = change.after, change.probe
    chain, rule = outcome.chain, outcome.rule
    if outcome.verdict != "drop" or chain is None:
        return None, Finding("unsafe", "breaks", f"its {probe.packet.name} would be lost")
    for caller, jump in reversed(outcome.calls):
        if rule is None or rule.matches:
            break
        chain, rule = caller, jump  # a chain that only drops: decide before going there
    accept = Accept(
        tool=chain.tool,
        family=chain.family,
        table=chain.table,
        chain=chain.name,
        position=-1 if rule is None else rule.position,
        hook=_hook(outcome, chain, probe),
        role=probe.role,
        flow=probe.flow,
    )
    if probe.packet.state == "new" and probe.flow == "to" and probe.role in ("server", "forward"):
        accept = _narrowed(accept, change.before)
    dropped = f"{named(chain, rule)} would drop its {probe.packet.name}"
    if accept in lever.accepts or not name_ok(chain.table) or not name_ok(chain.name):
        return None, Finding("unsafe", "breaks", f"{dropped}, and no accept can mend that")
    return accept, Finding("rules", "accept", f"{dropped} once untracked: an accept is added "
                           "before it")  # fmt: skip


def _narrowed(accept: Accept, before: Outcome) -> Accept:
    """The accept with the sources and interfaces of the rule that accepts it while tracked."""
    rules = [jump for _, jump in before.calls] + ([before.rule] if before.rule else [])
    if before.chain is None or not _same_hook(before, accept):
        return accept
    sources: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    for rule in rules:
        for match in rule.matches:
            if match.negate:
                continue
            if match.key == "saddr":
                sources = tuple(str(net) for span in match.values for net in _networks(span))
            elif match.key == "iif" and all(device_ok(name) for name in match.values):
                devices = match.values
    if len(sources) > MAX_ADDRESSES or len(devices) > MAX_DEVICES:
        return accept
    return replace(accept, sources=sources, devices=devices)


def _same_hook(before: Outcome, accept: Accept) -> bool:
    base = before.calls[0][0] if before.calls else before.chain
    return base is not None and base.hook == accept.hook


def _networks(span: tuple[int, int, int]) -> Iterator[IPv4Network | IPv6Network]:
    version, low, high = span
    make = IPv4Address if version == 4 else IPv6Address
    yield from summarize_address_range(make(low), make(high))


def _hook(outcome: Outcome, chain: Chain, probe: Probe) -> str:
    base = outcome.calls[0][0] if outcome.calls else chain
    return base.hook or probe.packet.hooks[-1]
