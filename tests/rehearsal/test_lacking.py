"""What of given texts is not loaded, what is lacking in them, and the lines of ip."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ctrace.errors import CtraceError
from ctrace.given import Given
from ctrace.rehearsal.given import lacking, modules, safe
from ctrace.rehearsal.given.links import read as read_links
from ctrace.rehearsal.given.rebuild import _programs, rebuild
from ctrace.rehearsal.given.routes import Tables, route, rule


@pytest.mark.kernel
def test_before_4_10_the_module_alone_tracks() -> None:
    told = replace(WHOLE, legacy_tables={"ip": (), "ip6": ()}, ipvs="none")
    for kernel, tracked in (("3.10.0", True), ("5.10.0", False)):
        made = rebuild(replace(told, kernel=kernel))
        assert made.snapshot is not None, made.lacking
        assert any(b"tracked-by-the-module" in body for _, _, body in made.snapshot.nft) is tracked


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
