"""A namespace's packet filter in one small model, whichever tool wrote it.

Only what affects tracking and verdicts is represented; a match that is not understood has an empty
key and may be either true or false.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any, Final, Optional

from ctrace.ruleset.installed import Rule as OurRule

Span = tuple[int, int]
"""Inclusive range of ports, protocol numbers or ICMP types."""
AddressSpan = tuple[int, int, int]
"""IP version, lowest and highest address as integers."""
Bits = tuple[int, int]
"""(mask, value): true when ``field & mask == value``."""
Value = Any
"""A word, Span, AddressSpan or Bits: which one follows from the match's key."""

CT_OTHER: Final = "ct.other"
"""Anything else of an entry: unknown when tracked, false when untracked (nft_ct_get_eval
and xt_conntrack give up without an entry)."""
CT_EXTRA: Final = "ct.extra"
"""In iptables, beside ``--ctstate`` of the same match: ignored when untracked."""


@dataclass(frozen=True)
class Match:
    """One condition of a rule: the packet's ``key`` is one of ``values``."""

    key: str
    """``proto``, ``sport``, ``dport``, ``icmp``, ``icmp6`` (spans); ``saddr``, ``daddr``;
    ``flags``, ``mark`` (bits); ``family``, ``iif``, ``oif``, ``ct.state``, ``ct.dir``,
    ``ct.status``, ``saddr.type``, ``daddr.type`` (words), or one of the above;
    empty: not understood."""
    values: tuple[Value, ...] = ()
    negate: bool = False
    text: str = ""


@dataclass(frozen=True)
class Use:
    """A statement that needs, sets or defeats tracking."""

    kind: str
    """``dnat``, ``snat``, ``masquerade``, ``redirect``, ``notrack``, ``zone``, ``template``,
    ``helper``, ``timeout``, ``synproxy``, ``connlimit``, ``ct-mark``, ``ct-set``, ``flow``,
    ``tproxy``, ``mark`` (of the packet; ``bits`` says how)."""
    text: str = ""
    port: Optional[int] = None
    """The port that a NAT statement changes to, when it is one port."""
    bits: Optional[Bits] = None
    """For ``mark``: new = (old & ~mask) ^ value; None: unknown."""


@dataclass(frozen=True)
class Verdict:
    """``accept``, ``drop`` (also reject), ``return``, ``jump``, ``goto``, or ``unknown``."""

    kind: str
    target: str = ""


@dataclass(frozen=True)
class Rule:
    """Conditions, statements that matter to tracking, and a verdict (None: goes on)."""

    matches: tuple[Match, ...] = ()
    verdict: Optional[Verdict] = None
    uses: tuple[Use, ...] = ()
    text: str = ""
    position: int = 0
    """0-based, not counting ctrace's own rules; parts of one verdict map share it."""
    packets: Optional[int] = None
    """Packets that matched it so far; None when it does not count."""


@dataclass(frozen=True)
class Chain:
    """A chain; a base chain when it has a hook."""

    tool: str
    """``nft``, ``iptables-nft`` or ``iptables-legacy``."""
    family: str
    """``ip``, ``ip6`` or ``inet``."""
    table: str
    name: str
    rules: tuple[Rule, ...] = ()
    hook: str = ""
    priority: int = 0
    policy: str = "accept"
    type: str = "filter"

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Identifies a chain among all."""
        return self.tool, self.family, self.table, self.name

    @property
    def where(self) -> str:
        """As shown: ``nft inet fw input`` or ``iptables-nft filter INPUT``."""
        if self.tool == "nft":
            return f"{self.family} {self.table} {self.name}"
        tool = self.tool.replace("ip", "ip6", 1) if self.family == "ip6" else self.tool
        return f"{tool} {self.table} {self.name}"


@dataclass(frozen=True)
class Ruleset:
    """Everything that a packet may meet in one namespace."""

    chains: tuple[Chain, ...] = ()
    fingerprint: str = ""
    ipvs: tuple[tuple[str, int], ...] = ()
    """(protocol, port) of IPVS virtual services; port 0: by firewall mark."""
    ours: tuple[OurRule, ...] = ()
    """ctrace's own rules, which are not part of ``chains``."""
    planes: tuple[tuple[str, str], ...] = ()
    """(device, what runs there): what sees packets before these rules, and is not read."""
    gaps: tuple[str, ...] = ()
    """What could not be read or understood at all, one sentence each."""

    def uses(self) -> set[str]:
        """Kinds of statements anywhere in the ruleset."""
        return {use.kind for chain in self.chains for rule in chain.rules for use in rule.uses}


def address_span(text: str) -> AddressSpan:
    """An address, prefix or ``first-last`` range. Raises ValueError."""
    if "-" in text:
        first, last = (ip_address(part) for part in text.split("-", 1))
        if first.version != last.version:
            raise ValueError(text)
        return first.version, int(first), int(last)
    if "/" not in text:
        one = ip_address(text)
        return one.version, int(one), int(one)
    net = ip_network(text, strict=False)
    return net.version, int(net.network_address), int(net.broadcast_address)
