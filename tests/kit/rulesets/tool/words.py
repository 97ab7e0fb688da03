"""The network that the rules of tools stand in, and how their tables are written.

The network is that of :mod:`kit.rulesets.net`: ``to-r2`` leads to the world, ``to-s`` is the
container's bridge, tunnel or inner network. The service is tcp/8063 or udp/8063. A published
container port is 7063 to 22, a cluster's address is 10.96.0.10:80, a node port 30063.
"""

from __future__ import annotations

import re

from kit.rulesets.texts import Setup

EXT, BR = "to-r2", "to-s"
POD, NET, GATE = "10.77.4.2", "10.77.4.0/24", "10.77.4.1"
VIP, NODE, HOST = "10.96.0.10", 30063, "10.77.3.2"
EST = "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
INVALID = "-m conntrack --ctstate INVALID -j DROP"
ICMP = "meta l4proto { icmp, ipv6-icmp } accept"
SERVE = "-p tcp -m tcp --dport 8063"
_BUILT_IN = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
_TARGETS = ("ACCEPT", "DROP", "RETURN", "REJECT", "MARK", "CONNMARK", "MASQUERADE", "DNAT",
            "REDIRECT")  # fmt: skip


def table(name: str, rules: str, **policies: str) -> str:
    """A table as iptables-restore takes it, of rules without their ``-A``."""
    lines = [line.strip() for line in rules.strip().splitlines()]
    named = [line.split()[0] for line in lines] + re.findall(r" -[jg] (\S+)", rules)
    chains = dict.fromkeys([*policies, *(one for one in named if one not in _TARGETS)])
    heads = [f":{c} {policies.get(c, 'ACCEPT' if c in _BUILT_IN else '-')}" for c in chains]
    return "\n".join([f"*{name}", *heads, *(f"-A {line}" for line in lines), "COMMIT", ""])


def v4(variant: str, *tables: str) -> Setup:
    return ((f"iptables-{variant}-restore", "".join(tables)),)


def both(variant: str, *tables: str) -> Setup:
    """For IPv6 the same, without what names IPv4 addresses."""
    lines = [line for line in "".join(tables).splitlines() if not re.search(r"\d\.\d", line)]
    text = "\n".join(lines) + "\n"
    text = text.replace("-p icmp", "-p ipv6-icmp").replace("icmp-port", "icmp6-port")
    return (*v4(variant, *tables), (f"ip6tables-{variant}-restore", text))
