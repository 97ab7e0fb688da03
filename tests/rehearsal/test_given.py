"""A namespace made again from what its tools print: the kernel has the same in both."""

from __future__ import annotations

import io
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ctrace.advice.findings import Finding
from ctrace.advice.hazards import Judge
from ctrace.advice.subject import Subject
from ctrace.cli import cli
from ctrace.dumps.files import Text
from ctrace.dumps.found import Found
from ctrace.dumps.recognise import Reader
from ctrace.dumps.rules import given_of
from ctrace.given import Given, from_line, to_line
from ctrace.host.rawlink import split
from ctrace.lab import Lab, Node
from ctrace.rehearsal import nft_copy
from ctrace.rehearsal.given.rebuild import Rebuilt, rebuild
from ctrace.rehearsal.snapshot import Snapshot, take
from ctrace.rehearsal.surroundings import MATTERS

COMMANDS = (
    "uname -r", "ip -d addr", "ip route show table all", "ip rule", "ip -6 rule", "tc qdisc",
    "sysctl -a", "nft list ruleset", "iptables-nft-save -c", "ip6tables-nft-save -c",
    "iptables-legacy-save -c", "ip6tables-legacy-save -c", "ipset save",
)  # fmt: skip
SETUP = """
ip link add br0 type bridge
ip link set br0 up
ip tuntap add dev tun9 mode tun
ip link set tun9 up
ip link set to-one mtu 1400 group 7
tc qdisc add dev to-one clsact
ip addr add 10.50.0.1/24 dev br0 noprefixroute
ip addr add 10.51.0.1 peer 10.51.0.2/32 dev tun9
ip addr add 10.52.0.1/24 metric 50 dev to-one
ip route add default via 10.77.1.2
ip -6 route add default via fd77:1::2
ip route add 192.0.2.0/24 nexthop via 10.77.1.2 weight 3 nexthop via 10.77.2.2
ip route add default via 10.77.2.2 table 100
ip -6 route add default via fd77:2::2 table 100
ip route add blackhole 198.51.100.0/24
ip -6 route add unreachable 2001:db8:9::/48
ip rule add fwmark 0x7/0xff lookup 100 priority 5000
ip rule add not from 10.0.0.0/8 prohibit priority 9999
ip rule add iif lo ipproto tcp dport 443 lookup 100
ip -6 rule add from fd77:1::/64 lookup 100 priority 77
sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=2 net.ipv4.conf.to-two.rp_filter=1
sysctl -qw net.ipv6.conf.all.forwarding=1 net.netfilter.nf_conntrack_tcp_loose=0
ipset create bad hash:ip hashsize 4096 timeout 300
ipset add bad 192.0.2.7
ipset create nets hash:net,port comment counters
ipset add nets 10.0.0.0/8,tcp:80 comment "x y"
iptables-nft -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
iptables-nft -A INPUT -p tcp -m multiport --dports 80,443 -m comment --comment "it -j s" -j ACCEPT
iptables-nft -A INPUT -m set --match-set bad src -j DROP
iptables-nft -t nat -A POSTROUTING -s 10.0.0.0/8 -j MASQUERADE --random-fully
iptables-nft -A INPUT -m hashlimit --hashlimit-upto 5/sec --hashlimit-name y -j ACCEPT
ip6tables-nft -P FORWARD DROP
iptables-legacy -A INPUT -m set --match-set nets src,dst -j DROP
iptables-legacy -A OUTPUT -m owner --uid-owner 33 -j LOG --log-prefix "M - x "
"""
NFT = """
table inet fw {
    set banned { type ipv4_addr; flags interval; elements = { 10.0.0.0/8, 192.0.2.1-192.0.2.9 }; }
    set dyn {
        type ipv4_addr; size 65535; flags dynamic,timeout; timeout 1h
        elements = { 203.0.113.9 timeout 2h expires 1h }
    }
    map vm { type inet_service : verdict; elements = { 22 : accept, 80 : jump web }; }
    counter c1 { packets 7 bytes 700; }
    quota q1 { over 25 mbytes; }
    chain web { counter name c1 accept comment "a } b { c"; }
    chain in {
        type filter hook input priority filter - 5; policy drop;
        ct state established,related accept
        ct state vmap { invalid : drop }
        iif lo accept
        iifname "to-*" ip saddr @banned drop
        tcp dport vmap @vm
        tcp dport 8063 ct state new add @dyn { ip saddr limit rate over 5/second } drop
        ip saddr 10.77.1.2 tcp dport { 8063, 443-445 } counter log prefix "x y: " accept
        tcp flags & (fin|syn|rst|ack) == syn accept
        ct mark 0x10 meta mark set ct mark
        quota name "q1" drop
        fib saddr . iif oif missing drop
        reject with icmpx type admin-prohibited
    }
    chain post {
        type nat hook postrouting priority srcnat;
        oifname "to-two" masquerade fully-random
    }
    chain pre {
        type nat hook prerouting priority dstnat;
        tcp dport 81 redirect to :8063
    }
    chain raw { type filter hook prerouting priority raw; udp dport 53 notrack; }
}
table netdev nd {
    chain i { type filter hook ingress device "to-one" priority 0; ip saddr 192.0.2.7 drop; }
}
"""


def settle(node: Node, *peers: str) -> None:
    """Until its links have carriers and IPv6 addresses of their own: the kernel gives these to them
    a second or more after they are up, later on a busy machine."""
    until = time.monotonic() + 60
    while True:
        links = {one["ifname"]: one for one in json.loads(node.run(["ip", "-j", "addr"]))}
        addresses = [one for link in links.values() for one in link["addr_info"]]
        own = [
            {"link", "global"} <= {one["scope"] for one in links[f"to-{peer}"]["addr_info"]}
            and links[f"to-{peer}"]["operstate"] == "UP"
            for peer in peers
        ]
        if all(own) and not any(one.get("tentative") for one in addresses):
            return
        assert time.monotonic() < until, links
        time.sleep(0.05)


def printed(node: Node, commands: tuple[str, ...] = COMMANDS) -> str:
    """What its tools print, as somebody would copy it from a terminal."""
    parts = [f"[root@gw ~]# {line}\n{node.run(line.split(), check=False)}" for line in commands]
    for family in ("ip", "ip6"):
        names = node.run(["cat", f"/proc/net/{family}_tables_names"], check=False).split()
        parts.append(f"/proc/net/{family}_tables_names: {' '.join(names) or 'none'}\n")
    parts += [f"tc filter show dev to-one {side}: none\n" for side in ("ingress", "egress")]
    return "".join(parts) + "/proc/net/ip_vs: none\n"


def given(text: str) -> Given:
    found = Found()
    Reader(found).read(Text("typed", None, io.BytesIO(text.encode())))
    assert found.unread.count == 0, found.unread.first
    return given_of(found, found.space())


def things(snapshot: Snapshot) -> list[Any]:
    """nftables, without what was counted, numbers of rules and the order of a set's elements."""
    out = []
    for kind, family, body in snapshot.nft:
        left_out = {nft_copy.RULE: (3, 6, 7), nft_copy.CHAIN: (8,)}.get(kind, ())
        of: list[Any] = [(k, d) for k, d in split(body)
                         if k not in (*nft_copy._LEFT_OUT[kind], *left_out)]  # fmt: skip
        if kind == nft_copy.ELEMENT:
            timed = (4, 5)  # the time left, and the timeout
            of[-1] = sorted([(k, v) for k, v in split(e) if k not in timed] for _, e in
                            split(of[-1][1]))  # fmt: skip
        counted = {
            nft_copy.RULE: rb"(counter\0.{4}).{8}.{4}.{8}",
            nft_copy.OBJECT: rb"(\x0c\0\x04\0).{8}",
        }.get(kind)  # a quota's used bytes
        if counted:
            of = [(k, re.sub(counted, rb"\1", d, flags=re.S)) for k, d in of]
        out.append((kind, family, of))
    return sorted(out, key=repr)


@pytest.mark.kernel
def test_the_kernel_has_the_same_of_texts_as_of_the_host() -> None:
    with Lab() as lab:
        gw, one, two = (lab.namespace(name, track=True) for name in ("gw", "one", "two"))
        lab.link(gw, one)
        lab.link(gw, two)
        gw.run(["sh", "-ec", SETUP])
        gw.run(["nft", "-f", "-"], stdin=NFT)
        settle(gw, "one", "two")
        text, host = printed(gw), take(gw.path)
    line = to_line(given(text))
    made = rebuild(from_line(line))
    assert made.lacking == ""
    copy = made.snapshot
    assert copy is not None
    assert [replace(d, master=0) for d in host.devices] == list(copy.devices)
    assert sorted(host.local) == sorted(copy.local)
    for name, head in (("routes", 12), ("rules", 12)):
        mine, its = (
            sorted((body[:5], body[6:8], sorted(p for p in split(body, head)
                                                if p[0] not in (12, 21)))
                   for body in getattr(which, name))
            for which in (host, copy)
        )  # fmt: skip
        assert mine == its, name
    settings = [{path: value for path, value in one.sysctls if path.rsplit("/", 1)[1] in MATTERS}
                for one in (host, copy)]  # fmt: skip
    assert settings[0] == settings[1]
    # iptables-nft-restore makes the chains of a table that were never used, too.
    made_of = things(copy)
    assert [one for one in things(host) if one not in made_of] == []
    rules = [[t for t in things(one) if t[0] == nft_copy.RULE] for one in (host, copy)]
    assert rules[0] == rules[1]
    assert [line for line in host.ipsets if line.startswith("add nets")] == [
        line for line in copy.ipsets if line.startswith("add nets")
    ]
    assert "add bad 192.0.2.7 timeout 0" in copy.ipsets  # it stays as long as it is rehearsed
    legacy = [[line for _, text in one.legacy for line in text.splitlines() if " -A " in line]
              for one in (host, copy)]  # fmt: skip
    assert legacy[0] == legacy[1] != []


ENTRY = (
    "tcp      6 28 TIME_WAIT src=10.77.1.2 dst=10.77.1.1 sport={} dport=8063 src=10.77.1.1 "
    "dst=10.77.1.2 sport=8063 dport={} [ASSURED] mark=0 use=1\n"
)


@pytest.mark.kernel
def test_advice_rehearses_what_texts_give_and_names_what_they_lack(tmp_path: Path) -> None:
    with Lab() as lab:
        gw, one = lab.namespace("gw", track=True), lab.namespace("one")
        lab.link(gw, one)
        gw.run(["nft", "-f", "-"], stdin="""
            table inet f { chain in { type filter hook input priority 0; policy drop;
                ct state established accept
                iif lo accept
                tcp dport 8063 ct state new accept
            }
        }""")  # fmt: skip
        text = printed(gw)
    entries = "[root@gw ~]# conntrack -L\n"
    entries += "".join(ENTRY.format(port, port) for port in range(33000, 33400))
    path = tmp_path / "evidence.txt"

    def advised(evidence: str) -> Any:
        path.write_text(re.sub(r"conntrack_max = \d+", "conntrack_max = 500", evidence))
        done = CliRunner().invoke(cli, ["advise", str(path), "-o", "json"])
        assert done.exit_code == 0, (done.output, done.exception)
        return json.loads(done.stdout)["candidates"][0]

    whole = advised(entries + text)
    assert whole["verdict"] == "safe-with-rules"
    assert any("the policy of inet f in would drop its SYN" in one for one in whole["reasons"])
    assert whole["evidence"]["flows_of_table"] == 400
    part = advised(entries + text[: text.index("[root@gw ~]# ip rule")] + "".join(
        block for block in re.split(r"(?=\[root@gw ~\]# )", text) if "nft list" in block[:40]
    ))  # fmt: skip
    assert part["verdict"] == "cannot-say"
    for name in ("`ip rule`", "`ip -6 rule`", "`sysctl -a`", "`tc qdisc`", "`iptables-save`"):
        assert name in part["reasons"][0], name
    assert "`ip -d addr`" not in part["reasons"][0]


def test_entries_that_nothing_in_the_texts_makes_are_never_safe() -> None:
    flow = ("server", bytes(4), 33000, bytes(4), 8063)
    subject = Subject("tcp", 8063, ("server",), flows=(flow,))
    already = [Finding("info", "already", "they are untracked already")]
    judge = Judge(None, None, texts=Rebuilt(None, None, remarks=("of texts",)))
    assert [one.level for one in judge._tracking(subject, already)] == ["unknown"]
    assert judge._tracking(replace(subject, flows=()), already) == already
    assert Judge(None, None)._tracking(subject, already) == already
