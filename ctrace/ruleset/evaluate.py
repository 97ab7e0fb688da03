"""A packet's way through a ruleset: which rule decides, and what of tracking it meets.

The kernel's order: hooks by path, base chains by priority. An accept ends one base
chain, a drop ends the packet. Conditions that are not understood may be true or
false: :func:`explore` tries both, and takes the same choice wherever the same
condition stands, so that two evaluations can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Final, Optional, TypeVar

from ctrace.ruleset.model import (
    ADDRESSES,
    BITS,
    CT_EXTRA,
    CT_OTHER,
    SPANS,
    Chain,
    Match,
    Rule,
    Ruleset,
    Use,
)

CONNTRACK: Final = -200
"""NF_IP_PRI_CONNTRACK: where an entry is looked up, in prerouting and output."""
MAX_RUNS: Final = 2000
MAX_DEPTH: Final = 16
UNKNOWN_DEVICE: Final = "?"
"""Some interface other than lo."""
ICMP, ICMP6 = 1, 58


class TooComplex(Exception):
    """More combinations of unknown conditions than can be tried."""


class _Fork(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


@dataclass(frozen=True)
class Packet:
    """What rules can see of one packet. None: not known, so it may be anything."""

    name: str
    family: str
    """``ip`` or ``ip6``."""
    proto: int
    hooks: tuple[str, ...]
    """The hooks that it passes, in order."""
    saddr: Optional[str] = None
    daddr: Optional[str] = None
    sport: Optional[int] = None
    dport: Optional[int] = None
    flags: int = 0
    icmp: Optional[int] = None
    state: str = "new"
    """``ct state`` if it is tracked: new, established or related."""
    reply: bool = False
    iif: str = ""
    oif: str = ""
    local_src: bool = False
    local_dst: bool = False
    quoted: Optional[tuple[int, int, int]] = None
    """For an ICMP error: protocol and ports of the packet that it quotes."""


@dataclass(frozen=True)
class Met:
    """A statement that the packet met."""

    chain: Chain
    rule: Rule
    use: Use
    sure: bool
    """Whether all conditions before it were understood."""


@dataclass(frozen=True)
class Outcome:
    """What became of a packet."""

    verdict: str
    """``accept``, ``drop`` or ``unknown``."""
    untracked: bool
    chain: Optional[Chain] = None
    rule: Optional[Rule] = None
    """What dropped it; None with a chain: the chain's policy. When it was accepted: the
    last rule that did so, if one did."""
    calls: tuple[tuple[Chain, Rule], ...] = ()
    """The jumps that led to ``chain``, outermost first."""
    met: tuple[Met, ...] = ()


@dataclass
class _Trip:
    """The changing state of one packet on its way."""

    packet: Packet
    chosen: Mapping[str, bool]
    flow_tracked: bool
    """Whether conntrack knows the flow that an ICMP error quotes."""
    hook: str = ""
    priority: int = 0
    track: str = ""
    """Empty before conntrack has looked, then ``template``, ``untracked`` or ``tracked``."""
    mark: Optional[int] = 0
    met: list[Met] = field(default_factory=list)

    def state(self) -> str:
        """What ``ct state`` shows here and now."""
        if self.track == "untracked":
            return "untracked"
        if self.track in ("", "template"):
            return "invalid"  # nft_ct and xt_conntrack: no entry yet, and not untracked
        if self.packet.state == "related" and not self.flow_tracked:
            return "invalid"
        return self.packet.state

    def has_entry(self) -> bool:
        return self.track == "tracked" and self.state() != "invalid"


def evaluate(
    ruleset: Ruleset,
    packet: Packet,
    chosen: Mapping[str, bool],
    *,
    flow_tracked: bool = True,
) -> Outcome:
    """One trip. ``chosen`` says how conditions that are not understood turn out."""
    trip = _Trip(packet, chosen, flow_tracked)
    accepted = Outcome("accept", False)
    for hook in packet.hooks:
        trip.hook = hook
        chains = ruleset.base(hook, packet.family)
        looked = hook not in ("prerouting", "output")
        for chain in chains:
            if not looked and chain.priority >= CONNTRACK:
                _look_up(trip)
                looked = True
            trip.priority = chain.priority
            # NAT chains see the first packet of a tracked connection only.
            if chain.type == "nat" and (trip.state() != "new" or trip.track != "tracked"):
                continue
            done = _chain(ruleset, chain, trip, (), 0)
            if done is not None and done.verdict == "accept":
                accepted = done
            if done is None and chain.policy == "drop":
                done = Outcome("drop", trip.track == "untracked", chain, None)
            if done is not None and done.verdict != "accept":
                return Outcome(
                    done.verdict,
                    trip.track == "untracked",
                    done.chain,
                    done.rule,
                    done.calls,
                    tuple(trip.met),
                )
        if not looked:
            _look_up(trip)
    return replace(accepted, untracked=trip.track == "untracked", met=tuple(trip.met))


def _look_up(trip: _Trip) -> None:
    if trip.track != "untracked":
        trip.track = "tracked"


def _chain(
    ruleset: Ruleset,
    chain: Chain,
    trip: _Trip,
    calls: tuple[tuple[Chain, Rule], ...],
    depth: int,
) -> Optional[Outcome]:
    """A verdict, or None for the end of the chain (or return)."""
    if depth > MAX_DEPTH:
        return Outcome("unknown", False, chain)
    for rule in chain.rules:
        known = _known(rule, trip)
        if known is False:
            continue
        for use in rule.uses:
            trip.met.append(Met(chain, rule, use, known is True))
        moves = rule.verdict is not None or any(
            use.kind in ("mark", "notrack", "zone", "template") for use in rule.uses
        )
        if known is None and moves and not _decide(rule, trip, chain):
            continue
        for use in rule.uses:
            _apply(use, trip, chain)
        verdict = rule.verdict
        if verdict is None:
            continue
        if verdict.kind == "return":
            return None
        if verdict.kind in ("jump", "goto"):
            target = ruleset.chain(chain, verdict.target)
            if target is None:
                return Outcome("unknown", False, chain, rule, calls)
            done = _chain(ruleset, target, trip, (*calls, (chain, rule)), depth + 1)
            if done is not None or verdict.kind == "goto":
                return done
            continue
        return Outcome(verdict.kind, False, chain, rule, calls)
    return None


def _apply(use: Use, trip: _Trip, chain: Chain) -> None:
    early = trip.hook in ("prerouting", "output") and trip.priority < CONNTRACK
    if use.kind == "mark":
        if use.bits is None or trip.mark is None:
            trip.mark = None
        else:
            mask, value = use.bits
            trip.mark = (trip.mark & ~mask & 0xFFFFFFFF) ^ value
    elif not early:
        return
    elif use.kind == "notrack" and trip.track == "":
        trip.track = "untracked"
    elif use.kind == "zone":
        # nft_ct_set_zone_eval puts a template over what was there, also over UNTRACKED.
        trip.track = "template"
    elif (
        use.kind in ("template", "helper", "timeout")
        and chain.tool != "nft"
        and trip.track != "untracked"
    ):
        trip.track = "template"


def _known(rule: Rule, trip: _Trip) -> Optional[bool]:
    """All conditions: False if one is false, else None if one is not known."""
    known: Optional[bool] = True
    stateful = any(match.key == "ct.state" for match in rule.matches)
    for match in rule.matches:
        found = _match(match, trip, stateful)
        if found is False:
            return False
        if found is None:
            known = None
    return known


def _decide(rule: Rule, trip: _Trip, chain: Chain) -> bool:
    stateful = any(match.key == "ct.state" for match in rule.matches)
    for i, match in enumerate(rule.matches):
        if _match(match, trip, stateful) is None:
            negated = match.text.startswith("! ") or " != " in match.text
            text = match.text.removeprefix("! ").replace(" != ", " ")
            if match.key in ("iif", "oif"):  # the same interfaces, however they are written
                negated, text = match.negate, f"{match.key} {','.join(sorted(match.values))}"
            if any(word in text for word in ("limit", "quota", "recent", "{ ", "random")):
                text += f" in {chain.where} {rule.position}.{i}"  # has a state of its own
            if text not in trip.chosen:
                raise _Fork(text)
            if trip.chosen[text] == negated:
                return False
    return True


def _match(match: Match, trip: _Trip, stateful: bool) -> Optional[bool]:
    """Whether the packet meets a condition; None: not known."""
    if match.key == "":
        return None
    if match.key.startswith("ct."):
        return _match_ct(match, trip, stateful)
    found = _equal(match, trip)
    if found is None:
        return None
    return found != match.negate


def _equal(match: Match, trip: _Trip) -> Optional[bool]:  # noqa: PLR0911
    packet, key, values = trip.packet, match.key, match.values
    if key in SPANS:
        number = _number(packet, key)
        if number is None:
            return False if key in ("icmp", "icmp6") else None
        return any(low <= number <= high for low, high in values)
    if key in ADDRESSES:
        text = packet.saddr if key == "saddr" else packet.daddr
        if text is None:
            return None
        address = ip_address(text)
        return any(
            version == address.version and low <= int(address) <= high
            for version, low, high in values
        )
    if key in BITS:
        number = packet.flags if key == "flags" else trip.mark
        if number is None:
            return None
        return any(number & mask == value for mask, value in values)
    if key == "family":
        return packet.family in values
    if key in ("iif", "oif"):
        return _device(packet.iif if key == "iif" else packet.oif, trip.hook, key, values)
    if key in ("saddr.type", "daddr.type"):
        local = packet.local_src if key == "saddr.type" else packet.local_dst
        return ("local" if local else "unicast") in values
    if key == "pkttype":
        return bool({"host", "unicast"} & set(values))
    if key == "quoted":
        return packet.quoted is not None and any(
            packet.quoted[0] == proto and packet.quoted[1 if side == "sport" else 2] == port
            for proto, side, port in values
        )
    return None


def _number(packet: Packet, key: str) -> Optional[int]:
    if key == "proto":
        return packet.proto
    if key == "icmp":
        return packet.icmp if packet.proto == ICMP else None
    if key == "icmp6":
        return packet.icmp if packet.proto == ICMP6 else None
    return packet.sport if key == "sport" else packet.dport


def _device(device: str, hook: str, key: str, values: tuple[object, ...]) -> Optional[bool]:
    """Interfaces exist only at some hooks: incoming not at output, outgoing not before routing."""
    if (key == "iif" and hook in ("output", "postrouting")) or (
        key == "oif" and hook in ("prerouting", "input")
    ):
        return False
    names = [str(value) for value in values]
    for name in names:
        if name == device or (name.endswith("*") and device.startswith(name[:-1])):
            return True
    if device == UNKNOWN_DEVICE and any(name != "lo" for name in names):
        return None
    return False


def _match_ct(match: Match, trip: _Trip, stateful: bool) -> Optional[bool]:
    if match.key == "ct.state":
        return (trip.state() in match.values) != match.negate
    if match.key == CT_EXTRA:
        return None if trip.has_entry() else stateful
    if not trip.has_entry():
        return False  # whatever the operator: without an entry the rule ends
    if match.key == "ct.dir":
        return (("reply" if trip.packet.reply else "original") in match.values) != match.negate
    if match.key == "ct.status" and set(match.values) <= {"dnat", "snat", "expected", "helper"}:
        return match.negate  # these flows are not translated: that is checked elsewhere
    assert match.key in ("ct.status", CT_OTHER)
    return None


T = TypeVar("T")


def explore(run: Callable[[Mapping[str, bool]], T]) -> Iterator[T]:
    """``run`` under every combination of the unknown conditions that it meets.

    Raises TooComplex beyond :data:`MAX_RUNS`.
    """
    todo: list[dict[str, bool]] = [{}]
    runs = 0
    while todo:
        chosen = todo.pop()
        runs += 1
        if runs > MAX_RUNS:
            raise TooComplex
        try:
            yield run(chosen)
        except _Fork as fork:
            todo += [{**chosen, fork.key: False}, {**chosen, fork.key: True}]
