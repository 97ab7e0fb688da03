"""What a service's entries and a ruleset say about NOTRACK by themselves, packets aside."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Optional

from ctrace.advice.probes import Subject, families, gateway, own
from ctrace.change.plan import Notrack
from ctrace.record import Status
from ctrace.ruleset.evaluate import Met, evaluate, explore
from ctrace.ruleset.model import Chain, Rule, Ruleset, Use
from ctrace.ruleset.planes import EVERYWHERE

NAT: Final = ("dnat", "snat", "masquerade", "redirect")
SOURCE_NAT: Final = ("snat", "masquerade")
MAX_CLIENT_PEERS: Final = 64

STATEFUL: Final = {
    "synproxy": ("unsafe", "SYNPROXY answers its handshakes, which needs tracking"),
    "connlimit": ("unsafe", "a connection limit counts tracked connections: untracked ones "
                            "would pass unlimited"),
    "helper": ("unsafe", "a conntrack helper follows it: its data connections would be refused"),
    "ct-mark": ("warn", "its packets are marked from their entries: without entries they would "
                        "take another route"),
    "ct-set": ("warn", "a mark or label is kept in its entries"),
    "flow": ("warn", "a flowtable speeds it up, which needs tracking: it would work, but slower"),
    "timeout": ("warn", "somebody has set a timeout policy for it, which would have no effect"),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One reason for or against."""

    level: str
    """``info``, ``rules``, ``warn`` or ``unsafe``."""
    id: str
    text: str


def evidence(subject: Subject) -> Iterator[Finding]:
    """From the service's entries."""
    if subject.nat not in ("", "no"):
        ends = {"src": "source", "dst": "destination"}
        kind = " and ".join(ends.get(word, word) for word in subject.nat.split(","))
        yield Finding("unsafe", "nat", f"its entries are translated ({kind} NAT): without "
                      "tracking nothing would translate them")  # fmt: skip
    elif not subject.nat:
        yield Finding("warn", "nat-unknown", "no entry of it was seen closely enough to rule out "
                      "NAT")  # fmt: skip
    if subject.port in subject.reply_ports and {"server", "forward"} & set(subject.roles):
        yield Finding("unsafe", "nat-backend", f"translated connections end at port {subject.port}:"
                      " their replies would leave untranslated")  # fmt: skip
    low, high = subject.ephemeral
    if "server" in subject.roles and subject.picked and low <= subject.port <= high:
        yield Finding("warn", "ephemeral", f"port {subject.port} lies in the ephemeral range "
                      f"{low}-{high}: connections that this host opens from it would be caught "
                      "too; reserve it with net.ipv4.ip_local_reserved_ports")  # fmt: skip
    if subject.proto == "udp" and "client" in subject.roles:
        if not subject.peers or len(subject.peers) > MAX_CLIENT_PEERS:
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
        yield Finding("warn", "flow", STATEFUL["flow"][1])
    if not subject.roles:
        yield Finding("unsafe", "role", "it is not known whether this host serves, calls or "
                      "forwards it")  # fmt: skip


def static(subject: Subject, lever: Notrack, ruleset: Ruleset) -> Iterator[Finding]:
    """From the ruleset as a whole. Raises TooComplex."""
    for proto, port in ruleset.ipvs:
        if (proto, port) == (subject.proto, subject.port):
            yield Finding("unsafe", "ipvs", "it is an IPVS virtual service")
        elif not port and "server" not in subject.roles:
            yield Finding("warn", "ipvs", "IPVS balances connections by firewall mark here")
    for device, what in ruleset.planes:
        # Packets over lo never leave it: what works at another device is none of their business.
        near = subject.roles == ("loopback",) and device not in ("lo", EVERYWHERE)
        there = " there" if near else ""
        text = (f"{what} at {device} sees packets before these rules; what it does is not known, "
                f"so neither is whether NOTRACK takes effect{there}")  # fmt: skip
        yield Finding("info" if near else "warn", "plane", text)
    local = set(subject.local)
    for chain in ruleset.chains:
        for rule in chain.rules:
            for use in rule.uses:
                if use.kind in ("dnat", "redirect") and _lands_on(use, rule, subject, local):
                    yield Finding("unsafe", "nat-backend", "connections are translated to port "
                                  f"{subject.port} by {named(chain, rule)}: their replies would "
                                  "leave untranslated")  # fmt: skip
    if {"client", "forward"} & set(subject.roles) and subject.forwarding:
        yield from _gateway(subject, lever, ruleset)
    yield from _shared_port(subject, lever, ruleset)


def _lands_on(use: Use, rule: Rule, subject: Subject, local: set[str]) -> bool:
    """Whether translated packets have the service's port as their new destination port."""
    ports = [match for match in rule.matches if match.key == "dport"]
    same = use.port == subject.port or (
        use.port is None
        and all(
            any(low <= subject.port <= high for low, high in match.values) != match.negate
            for match in ports
        )
    )
    protos = [match for match in rule.matches if match.key == "proto" and not match.negate]
    number = {"tcp": 6, "udp": 17}[subject.proto]
    if protos and not any(low <= number <= high for m in protos for low, high in m.values):
        return False
    if not same:
        return False
    if use.kind == "redirect":
        return "server" in subject.roles and use.port is not None
    if "forward" in subject.roles:
        return True
    here = {*local, "127.0.0.1", "::1"} & set(
        re.findall(r"[0-9a-fA-F.:]*[.:][0-9a-fA-F]+", _bare(use))
    )
    return "server" in subject.roles and bool(here)


def _bare(use: Use) -> str:
    return re.sub(r"\]?:\d+\b(?!:)", " ", use.text.replace("[", " ")) + " " + use.text


def _gateway(subject: Subject, lever: Notrack, ruleset: Ruleset) -> Iterator[Finding]:
    for packet in gateway(subject, lever):
        for outcome in explore(lambda chosen, p=packet: evaluate(ruleset, p, chosen)):  # type: ignore[misc]
            for met in outcome.met if outcome.verdict == "accept" else ():
                if met.use.kind in SOURCE_NAT:
                    yield Finding("unsafe", "gateway", "other hosts' connections to port "
                                  f"{subject.port} may be translated here by "
                                  f"{named(met.chain, met.rule)}: their replies would be caught "
                                  "too")  # fmt: skip
                    return


def source_nat(subject: Subject, ruleset: Ruleset) -> Optional[tuple[Chain, Rule]]:
    """A rule that gives forwarded connections of the service's protocol another source.

    Such a connection may get this host's address and, as it keeps its own port or is given
    one at random, the service's port.
    """
    if not subject.forwarding:
        return None
    number = {"tcp": 6, "udp": 17}[subject.proto]
    for chain in ruleset.chains:
        if chain.family != "inet" and chain.family not in families(subject):
            continue
        for rule in chain.rules:
            if any(use.kind in SOURCE_NAT or "NETMAP" in use.text for use in rule.uses) and all(
                match.key != "proto"
                or any(low <= number <= high for low, high in match.values) != match.negate
                for match in rule.matches
            ):
                return chain, rule
    return None


def _shared_port(subject: Subject, lever: Notrack, ruleset: Ruleset) -> Iterator[Finding]:
    """Connections that are translated, and have the service's port by chance or by choice."""
    found = source_nat(subject, ruleset)
    if found and "forward" in subject.roles:
        yield Finding("warn", "shared-port", "another host's connection from source port "
                      f"{subject.port} would leave untranslated, if {named(*found)} is for "
                      "it")  # fmt: skip
    if "server" not in subject.roles:
        return
    if found:
        yield Finding("info", "shared-port", f"{named(*found)} may translate other hosts' "
                      f"connections to port {subject.port}: the rules recognise those as they "
                      "leave, and keep them tracked")  # fmt: skip
    if found and subject.shared_now:
        yield Finding("warn", "shared-now", "another host's translated connection has port "
                      f"{subject.port} right now: it may end when the rules come; advise again "
                      "when it is over")  # fmt: skip
    met = _random_port(subject, lever, ruleset)
    if met:
        yield Finding("warn", "own-port", f"{named(met.chain, met.rule)} gives connections of this "
                      f"host other ports: one with port {subject.port} would lose its "
                      "replies")  # fmt: skip


def _random_port(subject: Subject, lever: Notrack, ruleset: Ruleset) -> Optional[Met]:
    """A statement that may give this host's own connections the service's port."""
    for packet in own(subject, lever):
        for outcome in explore(lambda chosen, p=packet: evaluate(ruleset, p, chosen)):  # type: ignore[misc]
            for met in outcome.met if outcome.verdict == "accept" else ():
                if met.use.kind in SOURCE_NAT and (
                    "random" in met.use.text
                    or met.use.port == subject.port
                    or any(int(low) <= subject.port <= int(high)
                           for low, high in re.findall(r"\b(\d{1,5})-(\d{1,5})\b", met.use.text))
                ):  # fmt: skip
                    return met
    return None


def named(chain: Chain, rule: Optional[Rule]) -> str:
    """A rule, or a chain's policy, in words."""
    if rule is None:
        return f"the policy of {chain.where}"
    return f'"{rule.text}" in {chain.where}'
