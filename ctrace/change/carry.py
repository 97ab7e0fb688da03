"""Connections that began untracked, given entries before they are tracked again.

When NOTRACK ends, a firewall that takes only a SYN as the beginning of a connection
would drop or reset those that are open, since conntrack sees them in mid-stream: as
NEW, or as INVALID with nf_conntrack_tcp_loose=0. Every open TCP socket of this host
says what its entry would be, so it is made; a packet that is not tracked yet does not
touch it. Forwarded connections have no socket here: for those there is only a warning
(:func:`cut_off`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Final

from ctrace.batch import inode_of
from ctrace.dropping import Drop
from ctrace.errors import CtraceError
from ctrace.host import commands, ctnetlink, sock_diag
from ctrace.host.caller import Connected, connected
from ctrace.host.ctnetlink import Flow
from ctrace.host.sock_diag import Connection
from ctrace.plan.plan import Notrack, Plan
from ctrace.record import address_text
from ctrace.ruleset.installed import XT_TOOLS, nft_ruleset, saved_rules

HERE: Final = "/proc/thread-self/ns/net"
LONGEST_S: Final = 8000
"""Seconds. Timeout of such an entry until its first packet: more than the two hours after which TCP
keep-alive sends one."""
_MAPPED: Final = bytes(10) + b"\xff\xff"
_FLAGS: Final = r"(--syn|--tcp-flags \S+ SYN)\b"
_XT_SYN: Final = re.compile(rf"{_FLAGS}.*\bNEW\b|\bNEW\b.*{_FLAGS}")


def carry_over(services: Collection[tuple[str, str, int]]) -> int:
    """Make entries for the open connections of (role, protocol, port); returns how many.

    Acts in the namespace that this thread is in. Connections for which none can be made are left
    out: they fare as they would have without.
    """
    accepted = {port for role, proto, port in services if proto == "tcp" and role != "client"}
    called = {port for role, proto, port in services if proto == "tcp" and role == "client"}
    if not accepted and not called:
        return 0
    try:
        flows = list(_flows(sock_diag.connections().values(), accepted, called))
        return ctnetlink.insert(HERE, flows, min(_established(), LONGEST_S)) if flows else 0
    except (CtraceError, OSError):
        return 0


def _flows(sockets: Collection[Connection], accepted: set[int], called: set[int]) -> Iterator[Flow]:
    for one in sockets:
        if one.state == sock_diag.SYN_SENT:
            continue  # its SYN is sent again, and is tracked then
        here, there = plain(one.here), plain(one.there)
        if one.sport in accepted:
            yield Flow(there, here, one.dport, one.sport)
        elif one.dport in called:
            yield Flow(here, there, one.sport, one.dport)


def plain(address: bytes) -> bytes:
    """An IPv4 address in an IPv6 socket is sent as IPv4."""
    return address[12:] if len(address) == 16 and address[:12] == _MAPPED else address


def _established() -> int:
    try:
        with open("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established") as file:
            return int(file.read())
    except (OSError, ValueError):
        return LONGEST_S


def cuts_caller(plan: Plan) -> Iterator[str]:
    """Says that a drop would cut the connection through which its caller is logged in here."""
    caller, home = connected(), f"/proc/{os.getppid()}/ns/net"
    with suppress(OSError):
        if caller is None or os.stat(home).st_ino != inode_of(plan.netns):
            return
        for lever in plan.levers:
            if not isinstance(lever, Drop) or lever.rate:
                continue
            if lever.comes_from(caller.client):
                yield f"you are connected from {caller.client} by ssh: it would be dropped, too"
            elif lever.proto == "tcp" and lever.port in _called_ports(caller, home):
                yield f"you are connected by ssh to port {lever.port}: it would be dropped, too"


def _called_ports(caller: Connected, home: str) -> set[int]:
    """The ports that the caller's packets are for: a translation may lead them to sshd's. Drops see
    them before that."""
    with suppress(CtraceError, OSError):
        table = ctnetlink.dump(home)
        mine = table[(table["sport"] == caller.sport) & (table["reply_sport"] == caller.port)]
        found = {int(e["dport"]) for e in mine if address_text(e["src"]) == caller.client}
        if found:
            return found
    return {caller.port}


def cut_off(plan: Plan) -> Iterator[str]:
    """One sentence for each reason; reads the ruleset of the namespace that this thread is in.

    Forwarded connections have no socket here: they are picked up in mid-stream, as NEW.
    """
    if not any(
        isinstance(lever, Notrack) and lever.proto == "tcp" and "forward" in lever.roles
        for lever in plan.levers
    ):
        return
    with open("/proc/sys/net/netfilter/nf_conntrack_tcp_loose") as file:
        if file.read().strip() == "0":
            yield (
                "nf_conntrack_tcp_loose is 0: forwarded TCP connections that are opened during "
                "the trial become INVALID if it is taken back"
            )
    saves = "".join(saved_rules(tool, family) for tool in XT_TOOLS for family in ("ip", "ip6"))
    if _XT_SYN.search(saves) or (commands.have("nft") and _nft_looks_at_syn()):
        yield (
            "a rule tells NEW packets with SYN from those without: forwarded TCP connections "
            "that are opened during the trial may be cut off if it is taken back"
        )


def _nft_looks_at_syn() -> bool:
    for item in nft_ruleset().get("nftables", ()):
        text = str(item.get("rule", {}).get("expr", "")) if isinstance(item, dict) else ""
        if "'new'" in text and "'flags'" in text:
            return True
    return False
