"""Rule sets of iptables by lot, of the idioms that people use."""

from __future__ import annotations

import random
import re

from kit.rulesets.drawn_nft import EXT, INT, NETS, PORT, XT_PORTS, Draw
from kit.rulesets.texts import Setup

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
