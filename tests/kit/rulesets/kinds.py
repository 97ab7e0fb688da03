"""Rule sets by lot, of the idioms that people use: every feature alone is common, the mix is not.

The network is that of :mod:`kit.rulesets.net`. A rule set lets the service live in its role more
often than not; what else it does is drawn.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from kit.rulesets.cases import Setup

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


# ---- iptables -------------------------------------------------------------------------------


def _xt_source(d: Draw) -> str:
    side = "-d" if d.hook == "output" else "-s"
    way = "dst" if d.hook == "output" else "src"
    span = "--dst-range" if d.hook == "output" else "--src-range"
    return d.one("", "", "", f"{side} {d.one(*NETS)} ", f"! {side} 192.0.2.0/24 ",
                 f"-m set --match-set wide {way} ", f"-m iprange {span} 10.77.1.0-10.77.1.99 ",
                 f"-m set ! --match-set widenet {way} ")  # fmt: skip


def _xt_condition(d: Draw) -> str:
    state = d.one("", "", "-m conntrack --ctstate NEW ", "-m state --state NEW ",
                  "-m conntrack ! --ctstate INVALID ", "-m conntrack --ctstate NEW,UNTRACKED ",
                  "-m conntrack --ctdir ORIGINAL ", "-m conntrack --ctstatus NONE ")  # fmt: skip
    odd = ["", "", "", "-m limit --limit 500/s --limit-burst 500 ", "-m mark --mark 0x0/0xff ",
           "-m addrtype --dst-type LOCAL " if d.hook == "input" else "",
           "-m connmark --mark 0x0 ", "-m pkttype --pkt-type unicast ", "-m ttl --ttl-gt 1 ",
           "-m hashlimit --hashlimit-upto 500/s --hashlimit-burst 500 --hashlimit-mode srcip "
           "--hashlimit-name wide ", "-m length --length 0:1600 ", "-m statistic --mode nth "
           "--every 1 --packet 0 ", "-m comment --comment \"svc\" ", "-m recent ! --rcheck "
           "--name wide --rsource " if d.hook != "output" else "",
           "-m connlimit --connlimit-upto 500 ", "-m devgroup --src-group 0x0 "
           if d.hook == "input" else "", "-m owner --uid-owner 0 " if d.hook == "output" else "",
           "-m tos --tos 0x00/0xff ", "-m dscp --dscp 0x00 ", "-m time --timestart 00:00 ",
           "-m u32 --u32 \"0&0xF0000000=0x40000000\" ", "-m quota --quota 50000 ",
           "-m limit --limit 20/s --limit-burst 40 "]  # fmt: skip
    if d.proto == "tcp":
        odd += ["--syn ", "--tcp-flags FIN,SYN,RST,ACK SYN ", "-m tcpmss --mss 500:9000 "]
    return state + d.rng.choice(odd)


def _xt_chain(d: Draw, chain: str, mine: bool) -> list[str]:
    est = d.one("-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
                "-m state --state ESTABLISHED,RELATED -j ACCEPT",
                "-m conntrack --ctstate ESTABLISHED -j ACCEPT\n-m conntrack --ctstate RELATED -j "
                "ACCEPT", "-m conntrack --ctstate RELATED,ESTABLISHED,UNTRACKED -j ACCEPT",
                "-m conntrack --ctdir REPLY -j ACCEPT\n-m conntrack --ctstate "
                "RELATED,ESTABLISHED -j ACCEPT")  # fmt: skip
    rules = est.split("\n")
    if d.rng.random() < 0.4:
        rules.insert(d.rng.randint(0, len(rules)), "-m conntrack --ctstate INVALID -j DROP")
    if chain != "FORWARD":
        rules.insert(d.rng.randint(0, len(rules)), f"-{'o' if chain == 'OUTPUT' else 'i'} lo -j "
                     "ACCEPT")  # fmt: skip
    rules.append("-p icmp -j ACCEPT")
    if d.rng.random() < 0.15:
        rules.append("-p tcp ! --syn -m conntrack --ctstate NEW -j DROP")
    if d.rng.random() < 0.15:
        rules.append("-s 10.77.1.100/32 -j DROP" if chain != "OUTPUT" else "-d 192.0.2.1 -j DROP")
    if mine:
        way = "o" if chain == "OUTPUT" else "i"
        device = d.one("", "", "", f"-{way} {EXT} ", f"-{way} to-+ ", f"! -{way} {INT} ")
        service = f"{device}{_xt_source(d)}-p {d.proto} {d.one(*XT_PORTS)} {_xt_condition(d)}"
        rules.append(f"{service}-j {d.one('ACCEPT', 'ACCEPT', 'SVC')}")
    return [f"-A {chain} {rule}" for rule in rules]


def _xt_six(text: str) -> str:
    """The same for IPv6, without what names IPv4 addresses or can't be there."""
    odd = re.compile(r"\d+\.\d+\.\d+|u32|-m ttl|match-set")
    keep = [line for line in text.splitlines() if not odd.search(line)]
    six = "\n".join(keep).replace("-p icmp ", "-p ipv6-icmp ").replace("icmp-", "icmp6-")
    return six.replace("icmp6-host-prohibited", "icmp6-adm-prohibited") + "\n"


def iptables(rng: random.Random, role: str, proto: str, variant: str) -> Setup:
    """The same with iptables, in either variant, with ipsets."""
    d = Draw(rng, role, proto)
    own = d.hook.upper()
    strict = {own, *rng.sample(["INPUT", "OUTPUT", "FORWARD"], rng.randint(0, 1))}
    lines: list[str] = []
    for chain in sorted(strict):
        lines += _xt_chain(d, chain, chain == own)
        if rng.random() < 0.3:
            lines.append(f"-A {chain} -j REJECT --reject-with icmp-host-prohibited")
    policies = {c: "DROP" if c in strict else "ACCEPT" for c in ("INPUT", "FORWARD", "OUTPUT")}
    heads = [f":{name} {policy}" for name, policy in policies.items()]
    svc = ["-A SVC " + d.maybe(0.4, "-m conntrack --ctstate NEW ") + "-j ACCEPT"]
    text = "\n".join(["*filter", *heads, ":SVC -", *lines, *svc, "COMMIT", ""])
    if rng.random() < 0.25:
        rule = d.one("PREROUTING -j CONNMARK --restore-mark",
                     "PREROUTING -m conntrack --ctstate NEW -j MARK --set-mark 0x10",
                     "FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu",
                     "PREROUTING -m conntrack --ctstate INVALID -j DROP",
                     "PREROUTING -m rpfilter --invert -j DROP",
                     "POSTROUTING -j CONNMARK --save-mark")  # fmt: skip
        text = f"*mangle\n-A {rule}\nCOMMIT\n" + text
    if rng.random() < 0.15:
        rule = d.one("PREROUTING -p udp --dport 53 -j CT --notrack",
                     "PREROUTING -s 192.0.2.0/24 -j DROP", "PREROUTING -i to-s -j RETURN",
                     "PREROUTING -p tcp --dport 9999 -j CT --notrack")  # fmt: skip
        text = f"*raw\n-A {rule}\nCOMMIT\n" + text
    six = _xt_six(text) if rng.random() < 0.7 else ""
    if rng.random() < 0.35:
        post = d.one(f"-o {EXT} -j MASQUERADE", f"-s 10.77.4.0/24 -o {EXT} -j MASQUERADE",
                     f"-s 10.77.4.0/24 -o {EXT} -j SNAT --to-source 10.77.3.2",
                     f"-o {EXT} -j MASQUERADE --random-fully",
                     "-m mark --mark 0x4000/0x4000 -j MASQUERADE")  # fmt: skip
        pre = d.one("", f"-A PREROUTING -i {EXT} -p {proto} --dport 7063 -j DNAT --to 10.77.4.2:22",
                    f"-A PREROUTING -p {proto} --dport 9080 -j REDIRECT --to-ports {PORT}",
                    f"-A PREROUTING -d 10.96.0.10 -p {proto} --dport 80 -j DNAT --to "
                    f"10.77.4.2:{PORT}")  # fmt: skip
        text += "\n".join(["*nat", *([pre] if pre else []), f"-A POSTROUTING {post}", "COMMIT", ""])
    setup: Setup = ((f"iptables-{variant}-restore", text),)
    if six:
        setup = (*setup, (f"ip6tables-{variant}-restore", six))
    if "match-set" in text:
        sets = ("ipset create wide hash:ip -exist; ipset add wide 10.77.1.1 -exist; "
                "ipset add wide 10.77.4.2 -exist; ipset create widenet hash:net -exist; "
                "ipset add widenet 192.0.2.0/24 -exist\n")  # fmt: skip
        setup = (("sh", sets), *setup)
    return setup


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
