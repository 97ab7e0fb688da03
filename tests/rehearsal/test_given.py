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
from ctrace.errors import CtraceError
from ctrace.given import Given, from_line, to_line
from ctrace.host.rawlink import split
from ctrace.lab import Lab, Node
from ctrace.rehearsal import nft_copy
from ctrace.rehearsal.given import lacking, modules, safe
from ctrace.rehearsal.given.links import read as read_links
from ctrace.rehearsal.given.rebuild import Rebuilt, _programs, rebuild
from ctrace.rehearsal.given.routes import Tables, route, rule
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
    """nftables, without counters, numbers of rules and the order of a set's elements."""
    out = []
    for kind, family, body in snapshot.nft:
        left_out = {nft_copy.RULE: (3, 6, 7), nft_copy.CHAIN: (8,)}.get(kind, ())
        of: list[Any] = [(k, d) for k, d in split(body)
                         if k not in (*nft_copy._LEFT_OUT[kind], *left_out)]  # fmt: skip
        if kind == nft_copy.ELEMENT:
            timed = (4, 5)  # the time left, and the timeout
            of[-1] = sorted([(k, v) for k, v in split(e) if k not in timed] for _, e in
                            split(of[-1][1]))  # fmt: skip
        counted = rb"(counter\0.{4}).{8}.{4}.{8}"
        out.append((kind, family, [(k, re.sub(counted, rb"\1", d, flags=re.S)) if kind ==
                                   nft_copy.RULE else (k, d) for k, d in of]
                    if kind != nft_copy.ELEMENT else of))  # fmt: skip
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


@pytest.mark.kernel
def test_before_4_10_the_module_alone_tracks() -> None:
    told = replace(WHOLE, legacy_tables={"ip": (), "ip6": ()}, ipvs="none")
    for kernel, tracked in (("3.10.0", True), ("5.10.0", False)):
        made = rebuild(replace(told, kernel=kernel))
        assert made.snapshot is not None, made.lacking
        assert any(b"tracked-by-the-module" in body for _, _, body in made.snapshot.nft) is tracked


def test_entries_that_nothing_in_the_texts_makes_are_never_safe() -> None:
    flow = ("server", bytes(4), 33000, bytes(4), 8063)
    subject = Subject("tcp", 8063, ("server",), flows=(flow,))
    already = [Finding("info", "already", "they are untracked already")]
    judge = Judge(None, None, texts=Rebuilt(None, None, remarks=("of texts",)))
    assert [one.level for one in judge._tracking(subject, already)] == ["unknown"]
    assert judge._tracking(replace(subject, flows=()), already) == already
    assert Judge(None, None)._tracking(subject, already) == already


# -- what is not loaded -----------------------------------------------------------------


BAD_NFT = [
    'include "/etc/shadow"\n',
    "table ip x {\n\tinclude \"/etc/*\"\n}\n",
    "table ip x { chain c { accept; \\\n include \"/etc/passwd\"\n } }\n",
    "table ip x {\n\tdefine a = 1\n}\n",
    "table ip x {\n\tset s {\n\t\ttype ipv4_addr\n\t\tsize 4294967295\n\t}\n}\n",
    "table ip x {\n\tset s {\n\t\tsize  0xffffffff\n\t}\n}\n",
    "table ip x { }; monitor ruleset\n",
    "table ip x {\n# a\x0binclude \"/etc/shadow\"\n}\n",
    "table ip x {\n\tchain c {\n\t\tip saddr evil.example.org drop\n\t}\n}\n",
    "table ip x {\n\tchain c {\n\t\txt match \"owner\" counter\n\t}\n}\n",
]  # fmt: skip
BAD_RULES = [
    "-A INPUT -M /tmp/evil -m owner -j DROP",
    "-A INPUT --modprobe=/tmp/evil -j DROP",
    "-A INPUT --modp /tmp/evil -j DROP",
    "-A INPUT --mod /tmp/evil -j DROP",
    "-A INPUT -vM/tmp/evil -j DROP",
    '-A INPUT "-M" /tmp/evil -j DROP',
    '-A INPUT "--modprobe" /tmp/evil -j DROP',
    "-A INPUT -t nat -j DROP",
    "-A INPUT -m bpf --object-pinned /sys/fs/bpf/x -j DROP",
    "-A INPUT -s evil.example.org -j DROP",
    "-I INPUT -j DROP",
    "-F",
    "-E a b",
]


@pytest.mark.parametrize("text", BAD_NFT)
def test_nft_text_that_no_listing_prints_is_refused(text: str) -> None:
    with pytest.raises(CtraceError):
        safe.nft(text, set())


@pytest.mark.parametrize("line", BAD_RULES)
def test_iptables_text_that_no_listing_prints_is_refused(line: str) -> None:
    with pytest.raises(CtraceError):
        safe.save(f"*filter\n:INPUT ACCEPT [0:0]\n{line}\nCOMMIT\n")


def test_what_listings_print_passes() -> None:
    rules = "*filter\n:INPUT ACCEPT [0:0]\n[1:2] -A INPUT -p tcp -m statistic --mode random -j DROP"
    assert safe.save(rules + "\n-A INPUT -j AUDIT --type drop\nCOMMIT\n") == f"{rules}\nCOMMIT\n"
    with pytest.raises(CtraceError, match="cut off"):
        safe.save(rules)
    text = (
        'table ip x {\n\tchain c {\n\t\tip saddr 10.0.0.1 drop comment "do include this"\n\t}\n}\n'
    )
    assert safe.nft(text, set()) == text
    assert safe.nft(text, {("ip", "x")}) == "\n"
    with pytest.raises(CtraceError):
        safe.ipsets("create a hash:ip\nflush\n")
    assert (
        safe.ipsets("create a hash:ip hashsize 99999999 maxelem 9\n")
        == "create a hash:ip maxelem 9\n"
    )
    for line in ("list:set size  99999999", "hash:ip --hashsize 99999999", "hash:ip -f /etc/x"):
        with pytest.raises(CtraceError):
            safe.ipsets(f"create a {line}\n")


# -- what is lacking --------------------------------------------------------------------


LINKS = """\
1: lo: <LOOPBACK,UP,LOWER_UP> mtu 65536 qdisc noqueue state UNKNOWN group default qlen 1000
    link/loopback 00:00:00:00:00:00 brd 00:00:00:00:00:00
    inet 127.0.0.1/8 scope host lo
2: eth0: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 qdisc mq state UP group default qlen 1000
    link/ether 02:00:00:00:00:01 brd ff:ff:ff:ff:ff:ff
    inet 192.0.2.10/24 brd 192.0.2.255 scope global eth0
"""
WHOLE = Given(
    nft_text="table ip x {\n}\n", links=LINKS, qdiscs="qdisc mq 0: dev eth0 root\n",
    routes="default via 192.0.2.1 dev eth0\n", rules="0:\tfrom all lookup local\n",
    settings={f"net/ipv4/{name}": "0" for name in
              ("ip_forward", "conf/all/rp_filter", "conf/lo/rp_filter", "conf/eth0/rp_filter")},
    modules=("x_tables", "nf_tables"), kernel="3.10.0-1160.el7",
)  # fmt: skip


def lacks(**changes: Any) -> list[str]:
    told = replace(WHOLE, **changes)
    return list(lacking.texts(told, read_links(told.links)))


def test_what_is_lacking_is_named_as_it_is_typed() -> None:
    assert lacks() == []
    assert lacks(rules="") == ["ip rule"]
    assert lacks(rules="9:\tfrom all lookup vpn\n") == ["ip route show table all"]
    assert lacks(qdiscs="", modules=None)[:1] == ["tc qdisc"]
    assert "iptables-save" in lacks(modules=None)
    assert lacks(modules=("x_tables", "nf_tables", "iptable_nat")) == ["iptables-save"]
    old = (("iptables-legacy", "ip", ""),)
    assert lacks(nft_text="", modules=None, saves=old) == ["lsmod"]  # 3.10 has no nf_tables
    assert lacks(nft_text="", modules=None, saves=old, kernel="4.19.0") == [
        "nft list ruleset", "lsmod"
    ]  # fmt: skip
    assert lacks(settings={}) == ["sysctl -a"]
    assert "ip -6 rule" in lacks(links=LINKS + "    inet6 fe80::1/64 scope link\n")
    bridged = (
        LINKS.replace("qdisc mq state", "qdisc mq master br0 state")
        + LINKS[:0]
        + ("3: br0: <BROADCAST,MULTICAST,UP> mtu 1500\n    link/ether 02:00:00:00:00:02\n")
    )
    assert lacks(links=bridged)[0].startswith("ip -d addr")
    named = ("-A INPUT -m set --match-set bad src -j DROP",)
    assert "ipset save" in lacks(saves=(("iptables-nft", "ip", named[0]),))


def unlike(**changes: Any) -> str:
    told = replace(WHOLE, **changes)
    return " ".join(lacking.sentences(told, read_links(told.links), "6.12.9"))


def test_what_another_kernel_does_otherwise_is_no_copy() -> None:
    assert unlike() == ""
    mark = (("iptables-legacy", "ip", "-A INPUT -m connmark --mark 0 -j DROP"),)
    assert "answers otherwise" in unlike(saves=mark)  # untracked had an entry until 4.12
    assert unlike(saves=mark, kernel="4.18.0") == ""
    assert "without a rule" in unlike(modules=("x_tables", "nf_conntrack_ftp"))
    assert "IPVS" in unlike(modules=("x_tables", "ip_vs"))
    assert "nft -t" in unlike(nft_text="table ip x {\n\tset s {\n\t\ttype ipv4_addr\n\t}\n}\n")


def test_what_may_hang_at_tc_is_no_copy() -> None:
    qdiscs = "qdisc clsact ffff: dev eth0 parent ffff:fff1\nqdisc fq 0: dev eth1 root\n"
    none = "tc filter show dev eth0 {}: none\n"
    both = none.format("ingress") + none.format("egress")
    for filters, said in (
        (both, []),
        (none.format("ingress"), [("eth0", "what hangs at tc, which only ctrace collect lists,")]),
        (both.replace("egress: none", "egress: filter bpf"), [("eth0", "what hangs at tc egress")]),
    ):
        assert _programs(Given(qdiscs=qdiscs, filters=filters)) == said


def test_modules_that_are_not_loaded_are_named(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/modules").write_text("nf_tables 1 1 -\nxt_conntrack 1 1 -\n")
    save = ("iptables-legacy", "ip", "*filter\n-A INPUT -m state --state NEW -j LOG\n")
    assert modules.missing("masquerade", [save], "", str(tmp_path)) == [
        "iptable_filter", "nf_log_syslog", "nft_masq", "xt_LOG"
    ]  # fmt: skip
    for text, wanted in (
        ('ct helper f { type "ftp" protocol tcp }', "nf_conntrack_ftp"),
        ('{"ct helper": {"type": "netbios-ns", "protocol": "udp"}}', "nf_conntrack_netbios_ns"),
        ('ct helper r { type "rpc" protocol tcp }', "nfnetlink_cthelper"),
        ("flowtable f { hook ingress priority 0 }", "nf_flow_table"),
    ):
        assert wanted in modules.missing(text, [], "", str(tmp_path)), text
    for line, wanted in (
        ("-j CT --helper ftp-2121", "nf_conntrack_ftp"),
        ("-j CT --timeout short", "nfnetlink_cttimeout"),
        ("-m string --algo bm --string x -j DROP", "ts_bm"),
        ("-j NFLOG --nflog-group 5", "nfnetlink_log"),
    ):
        rules = ("iptables-nft", "ip", f"*nat\n-A PREROUTING {line}\nCOMMIT\n")
        assert {wanted, "nft_chain_nat"} <= set(modules.missing("", [rules], "", str(tmp_path)))
    assert modules.missing("masquerade", [save], "", str(tmp_path / "none")) == []
    rule = {"comment": "a quota", "expr": [{"masquerade": None}]}
    told = json.dumps({"nftables": [{"chain": {"type": "nat"}}, {"rule": rule}]})
    assert modules.missing(told, [], "", str(tmp_path)) == ["nft_chain_nat", "nft_masq"]
    with pytest.raises(CtraceError):  # it would stand in a command
        modules.missing("", [(*save[:2], "-A INPUT -m $(reboot) -j LOG\n")], "", str(tmp_path))


# -- lines of ip ------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "said"), [
    ("default via 192.0.2.1 dev eth0 proto dhcp src 192.0.2.10 metric 100",
     "unicast default table 254 via 192.0.2.1 dev eth0 src 192.0.2.10 metric 100"),
    ("local 192.0.2.10 dev eth0 table local proto kernel scope host src 192.0.2.10", None),
    ("10.0.0.0/8 nhid 12 via 192.0.2.1 dev eth0 proto zebra metric 20 rt_offload linkdown",
     "unicast 10.0.0.0/8 table 254 via 192.0.2.1 dev eth0 metric 20"),
    ("10.1.0.0/16 via inet6 fe80::1 dev eth0 mtu lock 1400",
     "unicast 10.1.0.0/16 table 254 via inet6 fe80::1 dev eth0"),
    ("10.2.0.0/16 table vpn nexthop via 192.0.2.1 dev e0 weight 1 nexthop via 192.0.2.2 dev e0",
     "unicast 10.2.0.0/16 table 70000 nexthop via 192.0.2.1 dev e0 weight 1 nexthop via 192.0.2.2 "
     "dev e0"),
])  # fmt: skip
def test_a_route_is_added_as_it_was_printed(line: str, said: Any) -> None:
    assert route(line, Tables()) == said


@pytest.mark.parametrize("line", ["10.0.0.0/8 encap mpls 100 via 192.0.2.1", "default; reboot",
                                  "10.0.0.0/8 via $(x) dev eth0"])  # fmt: skip
def test_a_route_with_more_to_it_is_none(line: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        route(line, Tables())


def test_rules_and_routes_name_the_same_table() -> None:
    tables = Tables()
    number, said = rule("100:\tfrom all fwmark 0x1/0xff lookup vpn suppress_prefixlength 0", tables)
    assert said == f"priority 100 from all fwmark 0x1/0xff lookup {number} suppress_prefixlength 0"
    assert f"table {number} " in str(route("default via 192.0.2.1 dev eth0 table vpn", tables))
