"""A NOTRACK lever as rules of the ruleset model: the same rules that rules.py writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from ctrace.change.plan import Accept, Notrack
from ctrace.record import PROTO_NUMBERS
from ctrace.ruleset.model import (
    QUOTED,
    Chain,
    Match,
    Rule,
    Ruleset,
    Use,
    Verdict,
    address_span,
)
from ctrace.ruleset.notrack import PRIORITY, TABLE, TAG, icmp_state

SYN_ACK: Final = 0x12
SYN: Final = 0x02
_STATES: Final = {
    state: Match("ct.state", (state,), text=f"ct state {state}")
    for state in ("untracked", "invalid")
}
_NOTRACK: Final = (Use("notrack", "notrack"),)


def applied(ruleset: Ruleset, lever: Notrack) -> Iterator[Ruleset]:
    """The ruleset as it would be with the lever's own table and its accepts in place.

    Two of them where another chain has our priority: which one runs first depends on
    which was registered last (nf_hook_entries_grow), so after a reboot on luck.
    """
    chains = [_with_accepts(chain, lever) for chain in ruleset.chains]
    ours = own_chains(lever)
    yield replace(ruleset, chains=(*chains, *ours))
    places = {(chain.hook, chain.priority) for chain in ours}
    if any((chain.hook, chain.priority) in places for chain in ruleset.chains):
        yield replace(ruleset, chains=(*ours, *chains))


def own_chains(lever: Notrack) -> tuple[Chain, ...]:
    """The chains of ``table inet ctrace`` for one lever."""
    pre: list[Rule] = []
    out: list[Rule] = []
    to, back = _port(lever, "dport"), _port(lever, "sport")
    near, away = _local(False), _local(True)
    lo = Match("oif", ("lo",), text='oifname "lo"')
    for role in lever.roles:
        sent, got = _peers(lever, role, "daddr"), _peers(lever, role, "saddr")
        if role == "server":
            pre.append(_rule(*to, near))
            out += [_rule(*back), _rule(lo, *to)]
        elif role == "client":
            pre.append(_rule(*got, *back, _ephemeral(lever, "dport"), near))
            out.append(_rule(*sent, *to, _ephemeral(lever, "sport")))
        elif role == "forward":
            pre += [_rule(*sent, *to, away), _rule(*got, *back, away)]
        else:
            out += [_rule(lo, *to), _rule(lo, *back)]
        if lever.icmp:
            here = [] if role == "forward" else [near]
            pre += [_rule(*match, *here) for match in _icmp(lever, role)]
            if role == "forward":
                out += [_rule(*match) for match in _icmp(lever, role)]
    return tuple(
        Chain("nft", "inet", TABLE, name, tuple(rules), hook, PRIORITY)
        for name, hook, rules in (("pre", "prerouting", pre), ("out", "output", out))
    )


def accept_rules(lever: Notrack, accept: Accept) -> list[Rule]:
    """An accept as rules of the model."""
    text = f"{TAG}{accept.role}:{lever.proto}:{lever.port}:{accept.flow}"
    if accept.flow == "icmp":
        return [
            Rule((_STATES[icmp_state(lever)], *match), Verdict("accept"), (), text, accept.position)
            for match in _icmp(lever, accept.role)
        ]
    toward = accept.flow == "to"
    matches = [_STATES["untracked"], *_port(lever, "dport" if toward else "sport")]
    if accept.role == "client":
        matches.append(_ephemeral(lever, "sport" if toward else "dport"))
    if accept.role in ("client", "forward") and not toward and lever.proto == "tcp":
        matches.append(Match("flags", ((SYN_ACK, SYN),), True, "tcp flags & (syn|ack) != syn"))
    if accept.role == "loopback" and accept.hook in ("input", "output"):
        device = "iif" if accept.hook == "input" else "oif"
        matches.append(Match(device, ("lo",), text=f'{device}name "lo"'))
    matches += _peers(lever, accept.role, "daddr" if toward else "saddr")
    if accept.sources:
        spans = tuple(address_span(source) for source in accept.sources)
        matches.append(Match("saddr", spans, text="ip saddr of a source"))
    if accept.devices:
        matches.append(Match("iif", accept.devices, text="iifname"))
    return [Rule(tuple(matches), Verdict("accept"), (), text, accept.position)]


def _with_accepts(chain: Chain, lever: Notrack) -> Chain:
    mine = [
        accept
        for accept in lever.accepts
        if (accept.tool, accept.family, accept.table, accept.chain) == chain.key
    ]
    if not mine:
        return chain
    rules: list[Rule] = []
    for rule in chain.rules:
        for accept in [a for a in mine if a.position == rule.position]:
            rules += accept_rules(lever, accept)
            mine.remove(accept)
        rules.append(rule)
    for accept in mine:
        rules += accept_rules(lever, accept)
    return replace(chain, rules=tuple(rules))


def _rule(*matches: Match) -> Rule:
    return Rule(matches, None, _NOTRACK, "notrack")


def _port(lever: Notrack, side: str) -> list[Match]:
    number = PROTO_NUMBERS[lever.proto]
    return [
        Match("proto", ((number, number),), text=f"meta l4proto {lever.proto}"),
        Match(side, ((lever.port, lever.port),), text=f"{lever.proto} {side} {lever.port}"),
    ]


def _ephemeral(lever: Notrack, side: str) -> Match:
    return Match(side, (lever.ephemeral,), text=f"{side} in the ephemeral range")


def _local(negate: bool) -> Match:
    return Match("daddr.type", ("local",), negate, "fib daddr type local")


def _peers(lever: Notrack, role: str, side: str) -> list[Match]:
    if role not in ("client", "forward") or not lever.peers:
        return []
    return [Match(side, tuple(address_span(p) for p in lever.peers), text=f"ip {side} of a peer")]


def _icmp(lever: Notrack, role: str) -> list[list[Match]]:
    number = PROTO_NUMBERS[lever.proto]
    sides = {"server": ("sport",), "client": ("dport",), "forward": ("sport", "dport")}
    return [
        [Match(QUOTED, ((number, side, lever.port),), text=f"ICMP error about {side}")]
        for side in sides.get(role, ())
    ]
