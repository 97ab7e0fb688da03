"""What all forms of ctrace's rules share: names, tags, and why they are as they are.

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

from dataclasses import dataclass
from typing import Final

from ctrace.change.plan import Notrack

TABLE: Final = "ctrace"
TAG: Final = "ctrace:"
"""How the comment of every rule of ours, in any table, begins."""

CHAINS: Final = ("CTRACE_PRE", "CTRACE_OUT")
"""Our iptables chains in ``raw``, jumped to from PREROUTING and OUTPUT."""

KEPT: Final = "kept"
"""Comment of an element of ``armed`` that is renewed."""

PROTO_NUMBER: Final = {"tcp": 6, "udp": 17}


@dataclass(frozen=True)
class Step:
    """A command and its standard input."""

    argv: tuple[str, ...]
    stdin: str = ""


def icmp_state(lever: Notrack) -> str:
    """What conntrack calls ICMP errors about the lever's flows."""
    return "untracked" if lever.icmp else "invalid"


def tag_of(lever: Notrack, role: str, flow: str) -> str:
    """The comment of a rule: whose it is, and what it is for."""
    return f"{TAG}{role}:{lever.proto}:{lever.port}:{flow}"
