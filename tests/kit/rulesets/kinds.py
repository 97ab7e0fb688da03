"""Rule sets by lot, of the idioms that people use: every feature alone is common, the mix is not.

The network is that of :mod:`kit.rulesets.net`. A rule set lets the service live in its role more
often than not; what else it does is drawn.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Final

from kit.rulesets.drawn_nft import EXT, INT, PORT, nftables
from kit.rulesets.drawn_xt import iptables
from kit.rulesets.texts import Setup

# ---- the plain ones ---------------------------------------------------------------------

PING = "meta l4proto { icmp, ipv6-icmp } accept"
EST = "ct state established,related accept"
PLAIN_NETS = ("10.77.1.0/24", "10.77.1.1", "10.77.0.0/16")


def service(rng: random.Random, hook: str) -> str:
    """A rule that lets the service's first packet in, in one of many ways."""
    state = rng.choice(
        ["", "ct state new ", "ct state { new, untracked } ", "ct state != invalid "]
    )
    device = {"input": "iifname", "output": "oifname", "forward": "iifname"}[hook]
    who = rng.choice(
        ["", "", f"ip saddr {rng.choice(PLAIN_NETS)} ", f'{device} "{rng.choice((EXT, INT))}" ',
         "tcp flags & (fin|syn|rst|ack) == syn "]
    )  # fmt: skip
    return (
        f"{who}{state}tcp dport {rng.choice([str(PORT), f'{{ 80, {PORT} }}', '1024-9000'])} accept"
    )


def nft_chain(rng: random.Random, hook: str, strict: bool) -> str:
    rules = [EST, PING, f"{'oif' if hook == 'output' else 'iif'} lo accept"]
    if rng.random() < 0.4:
        rules.append("ct state invalid drop")
    if rng.random() < 0.2:
        rules.append("ct state untracked counter")
    rng.shuffle(rules)
    if rng.random() < 0.3:  # the head's order as most have it
        rules.sort(key=lambda rule: rule != EST)
    rules += [service(rng, hook) for _ in range(rng.randint(1, 2))]
    if rng.random() < 0.2:
        rules.insert(
            rng.randrange(len(rules)), f"ip saddr {rng.choice(PLAIN_NETS)} tcp dport 22 drop"
        )
    if rng.random() < 0.3:
        rules.append("reject")
    policy = "drop" if strict else "accept"
    if not strict:
        rules = rules[: rng.randint(1, 3)]
    body = "\n".join(rules)
    return f"chain {hook} {{ type filter hook {hook} priority 0; policy {policy};\n{body}\n}}\n"


def by_nft(rng: random.Random, role: str) -> Setup:
    hook = {"server": "input", "client": "output", "forward": "forward"}[role]
    strict = {hook} | set(rng.sample(["input", "output", "forward"], rng.randint(0, 1)))
    hooks = strict | set(rng.sample(["input", "output"], 1))
    chains = "".join(nft_chain(rng, hook, hook in strict) for hook in sorted(hooks))
    return (("nft", f"table inet fw {{\n{chains}}}\n"),)


def by_iptables(rng: random.Random, role: str, variant: str) -> Setup:
    chain = {"server": "INPUT", "client": "OUTPUT", "forward": "FORWARD"}[role]
    other = {"server": "OUTPUT", "client": "INPUT", "forward": "INPUT"}[role]
    state = rng.choice(["", "-m conntrack --ctstate NEW ", "-m state --state NEW ",
                        "-m conntrack ! --ctstate INVALID "])  # fmt: skip
    invalid = rng.random() < 0.4
    policies = dict.fromkeys(("INPUT", "OUTPUT", "FORWARD"), "ACCEPT")
    policies[chain] = "DROP"
    if rng.random() < 0.5:
        policies[other] = "DROP"
    texts = []
    for icmp in ("icmp", "ipv6-icmp"):
        lines = ["*filter", *(f":{name} {policy}" for name, policy in policies.items()), ":SVC -"]
        for name, policy in policies.items():
            if policy == "DROP":
                head = [f"-A {name} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
                        f"-A {name} -p {icmp} -j ACCEPT"]  # fmt: skip
                if invalid:
                    head.insert(1, f"-A {name} -m conntrack --ctstate INVALID -j DROP")
                lines += head
                if name != "FORWARD":
                    lines.append(f"-A {name} -{'o' if name == 'OUTPUT' else 'i'} lo -j ACCEPT")
        lines.append(f"-A {chain} -p tcp -m multiport --dports 80,{PORT} -j SVC")
        lines += [f"-A SVC -p tcp {state}-j ACCEPT", "COMMIT", ""]
        texts.append("\n".join(lines))
    return tuple(
        (f"{family}tables-{variant}-restore", text)
        for family, text in (("ip", texts[0]), ("ip6", texts[1]))
    )


def gateway(rng: random.Random, role: str) -> Setup:
    """A filter, and a translation that may or may not concern the service."""
    device = rng.choice((EXT, INT))
    post = rng.choice(["masquerade", "ip saddr 10.77.4.0/24 masquerade", "masquerade random",
                       "tcp dport 443 masquerade"])  # fmt: skip
    pre = rng.choice(
        ["", f"tcp dport 9063 redirect to :{PORT}", "tcp dport 9000 dnat to 10.77.4.2:80"]
    )
    post = f'type nat hook postrouting priority 100;\noifname "{device}" {post}\n'
    pre = f"type nat hook prerouting priority -100;\n{pre}\n"
    nat = f"table ip n {{ chain post {{ {post} }}\nchain pre {{ {pre} }}\n}}\n"
    return (*by_nft(rng, role), ("nft", nat))


def for_datagrams(setup: Setup) -> Setup:
    """The same rule set for a UDP service."""
    return tuple(
        (tool, re.sub(r"tcp flags [^=]*== syn ", "", text).replace("tcp dport", "udp dport")
         .replace("-p tcp", "-p udp"))
        for tool, text in setup
    )  # fmt: skip


Maker = Callable[[random.Random, str, str], Setup]


def _plain(make: Callable[[random.Random, str], Setup]) -> Maker:
    def made(rng: random.Random, role: str, proto: str) -> Setup:
        setup = make(rng, role)
        return for_datagrams(setup) if proto == "udp" else setup

    return made


KINDS: Final[dict[str, Maker]] = {
    "nft": _plain(by_nft),
    "iptables-nft": _plain(lambda rng, role: by_iptables(rng, role, "nft")),
    "iptables-legacy": _plain(lambda rng, role: by_iptables(rng, role, "legacy")),
    "gateway": _plain(gateway),
    "mixed nft": nftables,
    "mixed iptables-nft": lambda rng, role, proto: iptables(rng, role, proto, "nft"),
    "mixed iptables-legacy": lambda rng, role, proto: iptables(rng, role, proto, "legacy"),
}
ROLES: Final = ("server", "client", "forward")
