"""Rule sets of nftables by lot, of the idioms that people use."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from typing import Final, TypeVar

from kit.rulesets.texts import Setup

T = TypeVar("T")
PORT = 8063
EXT, INT = "to-r2", "to-s"
HOOK: Final = {"server": "input", "client": "output", "forward": "forward", "loopback": "input"}
NETS: Final = ("10.77.1.0/24", "10.77.0.0/16", "10.0.0.0/8", "10.77.1.1")
NETS6: Final = ("fd77:1::/64", "fd77::/16", "fd77:1::1")
FAR: Final = {"input": ("10.77.1.1", "fd77:1::1"), "output": ("10.77.1.1", "fd77:1::1"),
              "forward": ("10.77.4.2", "fd77:4::2")}  # fmt: skip
PORTS: Final = (str(PORT), f"{{ 80, {PORT} }}", f"{{ 22, 443, {PORT} }}", "8000-8999", "1024-65535")
XT_PORTS: Final = (f"--dport {PORT}", f"-m multiport --dports 80,{PORT}", "--dport 8000:8999",
                   f"-m multiport --ports {PORT},443")  # fmt: skip


@dataclass
class Draw:
    """What one rule set is drawn with."""

    rng: random.Random
    role: str
    proto: str
    sets: list[str] = field(default_factory=list)
    """Declared in the table that is being written."""
    extra: list[str] = field(default_factory=list)
    """Chains that a rule turned out to need."""

    def maybe(self, chance: float, text: str) -> str:
        return text if self.rng.random() < chance else ""

    def one(self, *choices: T) -> T:
        return self.rng.choice(choices)

    @property
    def hook(self) -> str:
        return HOOK[self.role]


# ---- nftables -------------------------------------------------------------------------------


def _state(d: Draw) -> list[str]:
    """How what belongs to a known connection passes."""
    est = d.one(
        "ct state established,related accept",
        "ct state vmap { established : accept, related : accept, invalid : drop }",
        "ct state vmap { established : accept, related : accept }",
        "ct state { established, related } counter accept",
        "ct state established accept\nct state related accept",
        "ct state established,related,untracked accept",
        "ct state & (established | related) != 0 accept",
        "ct state != { new, invalid, untracked } accept",
        "ct direction reply accept\nct state established accept\nct state related accept",
        "ct status seen-reply ct state established accept\nct state established,related accept",
    )
    rules = est.split("\n")
    invalid = d.one("", "", "ct state invalid drop", "ct state invalid counter drop",
                    "meta l4proto tcp ct state invalid reject with tcp reset")  # fmt: skip
    if invalid:
        rules.insert(d.rng.randint(0, len(rules)), invalid)
    return rules


def _source(d: Draw) -> str:
    """Who may: a condition on the far address, of either family or of one."""
    side = "daddr" if d.hook == "output" else "saddr"
    pick = d.rng.randrange(8)
    if pick < 3:
        return ""
    if pick == 3:
        return f"ip {side} {d.one(*NETS)} "
    if pick == 4:
        return f"ip6 {side} {d.one(*NETS6)} "
    name = f"who{len(d.sets)}"
    flags = "flags interval; " if pick == 5 else "flags timeout; " if pick == 6 else ""
    some = {5: "10.77.1.0/24, 192.0.2.0/24", 6: "10.77.1.1 timeout 1h, 192.0.2.9 timeout 2h"}.get(
        pick, "10.77.1.1, 10.77.4.2, 192.0.2.9"
    )
    d.sets.append(f"set {name} {{ type ipv4_addr; {flags}elements = {{ {some} }}; }}")
    return f"ip {side} {d.maybe(0.1, '!= ')}@{name} "


def _device(d: Draw) -> str:
    word = "oif" if d.hook == "output" else "iif"
    return d.one(
        "", "", "", f'{word}name "{EXT}" ', f'{word}name "to-*" ', f'{word} "{EXT}" ',
        f'{word}name {{ "{EXT}", "{INT}" }} ', f"{word}group 0 ", f'{word}name != "{INT}" ',
        f'{word}name != "lo" ', "fib saddr . iif oif exists " if d.hook != "output" else "",
    )  # fmt: skip


def _condition(d: Draw) -> str:
    """One more condition on the service's rule, of the odder kinds."""
    new = ["", "", "ct state new ", "ct state new ", "ct state { new, untracked } ",
           "ct state != invalid ", "ct direction original ", "ct zone 0 "]  # fmt: skip
    odd = [
        "", "", "", "", "meta pkttype host ", "fib daddr type local ", "limit rate 500/second ",
        "ct count over 200 drop\n", "meta mark 0 ", "meta mark & 0xff != 0x10 ", "ct mark 0 ",
        "meta skuid 0 " if d.hook == "output" else "", "meta skuid 0-1000 "
        if d.hook == "output" else "", "meta cgroup 0 " if d.hook == "output" else "",
        "ip ttl > 1 ", "ip dscp cs0 ", "meta length < 1600 ", "quota until 900 mbytes ",
        "numgen inc mod 1 == 0 ", "meta nfproto { ipv4, ipv6 } ", "ct status ! dnat ",
        "ct expiration > 1s ", "rt mtu > 500 " if d.hook == "output" else "",
        "socket transparent 0 " if d.hook == "input" else "", "meta l4proto { tcp, udp } ",
        "limit rate 20/second burst 40 packets ", "quota until 50 kbytes ",
    ]  # fmt: skip
    if d.proto == "tcp":
        odd += ["tcp flags & (fin|syn|rst|ack) == syn ", "tcp flags syn / syn,ack ",
                "tcp option maxseg size > 500 ", "tcp sport >= 1024 "]  # fmt: skip
    count = d.rng.choice(odd)
    if count.endswith("drop\n"):  # a rule of its own before
        return f"{d.proto} dport {PORT} ct state new {count}" + d.rng.choice(new)
    return d.rng.choice(new) + count


def _service(d: Draw) -> list[str]:
    """The rule that lets it live."""
    ports = d.one(*PORTS)
    end = d.one("accept", "accept", "counter accept", "jump svc", "goto svc",
                'log prefix "svc " accept')  # fmt: skip
    kind = d.rng.randrange(8)
    if "svc" in end:
        last = d.one("accept", "counter accept", f"{d.proto} dport {PORT} accept")
        d.extra.append(f"chain svc {{\n{d.maybe(0.4, 'ct state new ')}{last}\n}}")
    plain = end if " " not in end or end.startswith("jump") or end.startswith("goto") else "accept"
    if kind == 0:
        return [f"{d.proto} dport vmap {{ 22 : drop, {PORT} : {plain} }}"]
    if kind == 1:
        d.sets.append("map doors { type inet_proto . inet_service : verdict; elements = "
                      f"{{ {d.proto} . {PORT} : {plain}, tcp . 4443 : drop }}; }}")  # fmt: skip
        return ["meta l4proto . th dport vmap @doors"]
    if kind == 2:
        far = FAR[d.hook]
        d.sets.append("set pairs { type ipv4_addr . inet_service; elements = "
                      f"{{ {far[0]} . {PORT}, 192.0.2.7 . 80 }}; }}")  # fmt: skip
        side = "saddr" if d.hook == "input" else "daddr"
        return [f"ip {side} . {d.proto} dport @pairs {plain}",
                *([f"meta nfproto ipv6 {d.proto} dport {ports} accept"]
                  if d.rng.random() < 0.7 else [])]  # fmt: skip
    made = f"{_source(d)}{_device(d)}"
    condition = _condition(d)
    before, _, condition = condition.rpartition("\n")
    if "ip6 " in made and "ip " in condition:
        condition = ""
    rule = f"{made}{d.proto} dport {ports} {condition}{end}"
    return [*([before] if before else []), rule]


def _rest(d: Draw) -> list[str]:
    return [r for r in (
        d.maybe(0.2, f"ip saddr {d.one('10.77.1.100', '192.0.2.0/24')} "
                     f"{d.one('', 'tcp dport 22 ')}drop"),
        d.maybe(0.15, "tcp dport 22 ct state new limit rate 900/second accept"),
        d.maybe(0.1, "ct state new counter"), d.maybe(0.1, "ct state untracked counter"),
        d.maybe(0.1, f"{d.proto} sport {PORT} accept"), d.maybe(0.1, "ct state new accept"),
        d.maybe(0.1, "udp dport { 53, 123 } accept"), d.maybe(0.1, "meta pkttype multicast drop"),
    ) if r]  # fmt: skip


def _filter(d: Draw, hook: str, strict: bool, priority: str) -> str:
    here = Draw(d.rng, d.role, d.proto, d.sets, d.extra)
    lo = d.one("iif lo accept", 'iifname "lo" accept', 'iif "lo" accept')
    rules = _state(here)
    if hook == "output":
        lo = lo.replace("iif", "oif")
    head = [*rules, "meta l4proto { icmp, ipv6-icmp } accept"]
    if hook != "forward":
        head.insert(d.rng.randint(0, len(head)), lo)
    mine = hook == d.hook
    body = [*head, *_rest(here), *(_service(here) if mine else [])]
    if not mine and d.rng.random() < 0.3:
        body.append("ct state new accept")
    if not strict:
        body = body[: d.rng.randint(1, len(body))]
    end = d.one("", "", "reject", "reject with icmpx admin-prohibited", "counter drop",
                "meta l4proto tcp reject with tcp reset\nreject") if strict else ""  # fmt: skip
    policy = d.one("drop", "drop", "accept") if end else "drop" if strict else "accept"
    text = "\n".join([*body, *end.split("\n")])
    head_line = f"type filter hook {hook} priority {priority}; policy {policy};"
    return f"chain {hook}_{len(d.extra)} {{\n{head_line}\n{text}\n}}"


def _mangle(d: Draw) -> str:
    """Marks and fields."""
    pre = d.one(
        "meta mark set ct mark", "ct mark set meta mark", f"{d.proto} dport {PORT} counter",
        "ct state new meta mark set 0x10\nct mark set meta mark", "iifname to-s meta mark set 0x4",
        "tcp flags & (fin|syn|rst|ack) == syn ct state new counter",
        "fib saddr . iif oif missing drop", "ct state new ct mark set 0x1",
        "tcp flags & (fin|syn|rst|ack) != syn ct state new drop",
        "tcp flags syn / syn,rst tcp option maxseg size set rt mtu",
    )  # fmt: skip
    hook = d.one("prerouting", "prerouting", "forward", "postrouting")
    if "rt mtu" in pre:
        hook = d.one("forward", "postrouting")
    if "fib" in pre:
        hook = "prerouting"
    if "iifname" in pre and hook == "postrouting":
        hook = "forward"
    priority = d.one("mangle", "-150", "-140", "-10")
    return f"chain m {{\ntype filter hook {hook} priority {priority};\n{pre}\n}}"


def _raw(d: Draw) -> str:
    rule = d.one("udp dport 53 notrack", "tcp dport 9999 notrack", f"iifname {INT} counter",
                 "fib saddr . iif oif missing drop", "ip saddr 192.0.2.0/24 drop",
                 "tcp flags & (fin|syn) == fin|syn drop", "tcp dport 21 counter")  # fmt: skip
    priority = d.one("raw", "-310", "-299", "-250")
    return f"chain r {{\ntype filter hook prerouting priority {priority};\n{rule}\n}}"


def _nat(d: Draw) -> str:
    proto = d.proto
    post = d.one(
        f"oifname {EXT} masquerade", f"oifname {EXT} ip saddr 10.77.4.0/24 masquerade",
        f"oifname {EXT} masquerade random",
        f"oifname {EXT} ip saddr 10.77.4.0/24 snat to 10.77.3.2",
        f"oifname {INT} masquerade", "ip saddr 10.77.4.0/24 ip daddr != 10.77.0.0/16 masquerade",
        "meta mark 0x4000 masquerade", f"oifname {EXT} meta l4proto tcp masquerade to :1024-65535",
    )  # fmt: skip
    pre = d.one(
        "", f"iifname {EXT} {proto} dport 7063 dnat to 10.77.4.2:22",
        f"iifname {EXT} {proto} dport 7063 dnat to 10.77.4.2:{PORT}",
        f"{proto} dport 9080 redirect to :{PORT}", f"fib daddr type local {proto} dport 7063 "
        "dnat to 10.77.4.2:22", f"ip daddr 10.96.0.10 {proto} dport 80 dnat to 10.77.4.2:{PORT}",
        f"{proto} dport {PORT} dnat to 10.77.4.2:{PORT}",
        f"{proto} dport 15001 redirect to :15006",
    )  # fmt: skip
    out = d.maybe(0.3, f"ip daddr 10.96.0.10 {proto} dport 80 dnat to 10.77.4.2:{PORT}")
    chains = [("post", "postrouting", "srcnat", post), ("pre", "prerouting", "dstnat", pre),
              ("out", "output", "-100", out)]  # fmt: skip
    text = "".join(
        f"chain {name} {{\ntype nat hook {hook} priority {priority};\n{rule}\n}}\n"
        for name, hook, priority, rule in chains if rule
    )  # fmt: skip
    return f"table ip wide_nat {{\n{text}}}\n"


def nftables(rng: random.Random, role: str, proto: str = "tcp") -> Setup:
    """A filter of mixed idioms, marks, raw rules and translations beside it."""
    d = Draw(rng, role, proto)
    strict = {d.hook} | set(rng.sample(["input", "output", "forward"], rng.randint(0, 1)))
    hooks = strict | set(rng.sample(["input", "output", "forward"], rng.randint(0, 1)))
    priority = d.one("0", "filter", "0", "-5", "10", "-100", "-199", "50", "100", "300")
    family = d.one("inet", "inet", "inet", "ip")
    chains = []
    for hook in sorted(hooks):
        chains.append(_filter(d, hook, hook in strict, priority))
        if rng.random() < 0.1:
            chains.append(_filter(d, hook, False, d.one("1", "-1", "20")).replace(
                f"chain {hook}_", f"chain {hook}_too_"))  # fmt: skip
    if rng.random() < 0.3:
        chains.append(_mangle(d))
    if rng.random() < 0.2:
        chains.append(_raw(d))
    parts = [*dict.fromkeys(d.sets), *dict.fromkeys(d.extra), *chains]
    text = f"table {family} wide {{\n" + "\n".join(parts) + "\n}\n"
    if family == "ip":
        text = re.sub(r"\n[^\n]*(ip6 |nfproto)[^\n]*", "", text).replace(
            "{ icmp, ipv6-icmp }", "icmp").replace("icmpx admin", "icmp admin")  # fmt: skip
    setup: Setup = (("nft", text),)
    if rng.random() < 0.35:
        setup = (*setup, ("nft", _nat(d)))
    return setup
