"""What all forms of ctrace's rules share: names, tags, which packets each rule is for, and why.

Every role of a port needs its own pair of rules, one a direction; half a pair
frees nothing, because nf_conntrack_tcp_loose picks the tracked direction up in
mid-stream. ICMP errors that quote an untracked flow are INVALID to conntrack,
so firewalls that drop INVALID would break path MTU discovery: precise rules
untrack those errors too.

Their priority is ``raw - 10`` (-310): after defragmentation (-400), before conntrack (-200), and
before templates at raw (-300), which would make a later notrack a silent no-op.

The nftables form is gated by a set ``armed``: while a plan is on trial its
elements have a timeout, and when they expire the rules stop matching by
themselves. Once confirmed they stay; where the plan needs accepts in chains of
others they have a timeout all the same, which is renewed as long as somebody
sees that those accepts stand (:mod:`ctrace.change.guard`). The iptables form
uses an end date for a trial.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Optional

from ctrace.plan.plan import Notrack

TABLE: Final = "ctrace"
TAG: Final = "ctrace:"
"""The prefix of the comment of every rule of ours, in any table."""

CHAINS: Final = ("CTRACE_PRE", "CTRACE_OUT")
"""Our iptables chains in ``raw``, jumped to from PREROUTING and OUTPUT."""

KEPT: Final = "kept"
"""Comment of an element of ``armed`` that is renewed regularly."""

UNPRIVILEGED: Final = (1024, 65535)
"""Ports on which no well-known service accepts packets from strangers."""
PROTO_NUMBER: Final = {"tcp": 6, "udp": 17}

PRE, OUT = "pre", "output"
"""Where our rules are: on incoming packets, and on those that this host sends."""

NEAR, AWAY, LO, WIRE = "near", "away", "lo", "wire"
"""Packets that come to an address of this host, from elsewhere; to any other; that leave through
``lo``; that leave by another device.

What this host sends to itself is tracked as it leaves, or is not: later NOTRACK no longer touches
it (nft_notrack_eval). So it is a role of its own, which no other role's rules meet."""


@dataclass(frozen=True)
class Packets:
    """The packets that one NOTRACK rule matches (ICMP errors need several): a row of
    :data:`PACKETS`."""

    role: str
    hook: str
    flow: str
    """``to`` goes to the service's port, ``from`` comes from it, ``icmp`` quotes those."""
    where: str = ""
    """``NEAR``, ``AWAY``, ``LO`` or ``WIRE``; empty: wherever they go."""


PACKETS: Final = (
    Packets("server", PRE, "to", NEAR),
    Packets("server", OUT, "from", WIRE),
    Packets("client", PRE, "from", NEAR),
    Packets("client", OUT, "to", WIRE),
    Packets("forward", PRE, "to", AWAY),
    Packets("forward", PRE, "from", AWAY),
    Packets("loopback", OUT, "to", LO),
    Packets("loopback", OUT, "from", LO),
    # Only errors about this host's own packets concern it, and those are sent to it.
    Packets("server", PRE, "icmp", NEAR),
    Packets("client", PRE, "icmp", NEAR),
    # A router makes ICMP errors about forwarded packets itself: those leave through output.
    Packets("forward", PRE, "icmp"),
    Packets("forward", OUT, "icmp"),
)
"""The packets that the rules of a role untrack, in the order of the rules."""

QUOTED: Final = {"server": ("sport",), "client": ("dport",), "forward": ("sport", "dport")}
"""Which port of the quoted packet is the service's: what a server sent came from that port, what
a client sent went to it. Over ``lo`` there are no errors."""


@dataclass(frozen=True)
class Ends:
    """The field of a packet that names the service's end, and the one with the other port."""

    port: str
    address: str
    """The address that a lever's peers restrict: the peers are servers."""
    far_port: str


ENDS: Final = {"to": Ends("dport", "daddr", "sport"), "from": Ends("sport", "saddr", "dport")}
"""By flow."""


@dataclass(frozen=True)
class Step:
    """A command and its standard input."""

    argv: tuple[str, ...]
    stdin: str = ""


def icmp_state(lever: Notrack) -> str:
    """What conntrack calls ICMP errors about the lever's flows."""
    return "untracked" if lever.icmp else "invalid"


def tag_of(lever: Notrack, role: str, flow: str) -> str:
    """The comment of a rule: that it is ours, and what it is for."""
    return f"{TAG}{role}:{lever.proto}:{lever.port}:{flow}"


def packets_of(lever: Notrack, hook: str) -> Iterator[Packets]:
    """The packets that the lever's rules at a hook match, in order."""
    for role in lever.roles:
        for packets in PACKETS:
            here = (packets.role, packets.hook) == (role, hook)
            if here and (lever.icmp or packets.flow != "icmp"):
                yield packets


def far_ports(lever: Notrack, role: str) -> Optional[tuple[int, int]]:
    """The only far ports that the role's rules are for; None: any.

    What this host calls is called from its ephemeral range. A server's datagrams through this
    host pass for answers: those to well-known ports don't.
    """
    if role == "client":
        return lever.ephemeral
    return UNPRIVILEGED if (role, lever.proto) == ("forward", "udp") else None


def peers_of(lever: Notrack, role: str) -> tuple[str, ...]:
    """The servers that the role's rules are limited to; empty: any."""
    return lever.peers if role in ("client", "forward") else ()
