"""What rules tell beside the table: NAT that they have left, limits of their own, INVALID drops."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import struct
import time
from dataclasses import replace
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from kit import traffic
from kit.shapes import NETNS, START, Trace, steady

from ctrace.advice import beside
from ctrace.advice.beside import short
from ctrace.advice.beside.pings import Pings
from ctrace.advice.beside.table import Reading
from ctrace.batch import Clock, HookInfo
from ctrace.beside import Beside, Left, PortsTaken, Refusing, Short
from ctrace.host import ctnetlink, ethtool
from ctrace.host.netns import enter
from ctrace.lab import Lab, Node
from ctrace.model.causes import beside as causes
from ctrace.model.causes.beside import FEW, stale
from ctrace.model.causes.facts import Facts
from ctrace.model.causes.short import limits
from ctrace.model.model import Model
from ctrace.model.snapshot import Cause, Table
from ctrace.record import RECORD, Status, address_bytes, empty
from ctrace.ruleset.reader import dump
from ctrace.ruleset.told import Met, Told, told

TABLE = Table(NETNS, "init", 200, 1000, 1024)


def rules(*expressions: list[Any], saves: str = "", ipvs: str = "") -> Told:
    items = [
        {"rule": {"family": "ip", "table": "t", "chain": "c", "handle": n, "expr": one}}
        for n, one in enumerate(expressions)
    ]
    saved = (("iptables-nft", "ip", saves),) if saves else ()
    return told({"nft": json.dumps({"nftables": items}), "saves": saved, "ipvs": ipvs, "gaps": (),
                 "planes": ()})  # fmt: skip


@pytest.mark.parametrize(
    ("said", "address", "leads"),
    [
        (rules([{"dnat": {"addr": "10.0.0.1", "port": 80}}]), "10.0.0.1", True),
        (rules([{"dnat": {"addr": "10.0.0.1"}}]), "10.0.0.2", False),
        (rules([{"dnat": {"addr": {"range": ["10.0.0.1", "10.0.0.9"]}}}]), "10.0.0.5", True),
        (rules([{"dnat": {"addr": {"range": ["10.0.0.1", "10.0.0.9"]}}}]), "10.0.0.10", False),
        (
            rules([{"dnat": {"addr": {"prefix": {"addr": "10.1.0.0", "len": 16}}}}]),
            "10.1.9.9",
            True,
        ),
        (
            rules(
                [
                    {
                        "dnat": {
                            "addr": {
                                "map": {
                                    "key": {"numgen": {"mod": 2}},
                                    "data": {"set": [[0, "10.0.0.1"], [1, "10.0.0.2"]]},
                                }
                            }
                        }
                    }
                ]
            ),
            "10.0.0.2",
            True,
        ),
        (rules([{"dnat": {"addr": {"map": {"key": 1, "data": "@backends"}}}}]), "10.9.9.9", True),
        (rules([{"redirect": {"port": 80}}]), "10.9.9.9", True),
        (
            rules(saves="-A PREROUTING -j DNAT --to-destination 10.0.0.1-10.0.0.3:8080"),
            "10.0.0.3",
            True,
        ),
        (rules(saves="-A PREROUTING -j DNAT --to-destination [fd00::1]:80"), "fd00::1", True),
        (rules(saves="-A PREROUTING -j DNAT --to-destination [fd00::1]:80"), "fd00::2", False),
        (rules(saves="-A P -d 10.0.0.0/8 -j NETMAP --to 10.1.0.0/16"), "10.9.9.9", True),
        (rules(ipvs="TCP 0A000001:0050 rr"), "10.9.9.9", True),
        (told({"nft": "", "ipvs": "", "gaps": ("?",)}), "10.9.9.9", True),
    ],
)
def test_where_destination_nat_leads(said: Told, address: str, leads: bool) -> None:
    """An address counts as left only where nothing else may translate to it."""
    assert said.leads_to(address) is leads


def test_rules_with_a_limit_and_rules_that_drop_invalid() -> None:
    counter, drop = {"counter": {"packets": 7, "bytes": 420}}, {"drop": None}
    state = {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "invalid"}}
    said = rules(
        [{"set": {"op": "add", "stmt": [{"ct count": {"val": 20, "inv": True}}]}}, counter, drop],
        [state, drop],
        [state, counter],  # counts them, and lets them pass
        [{"xt": {"type": "match", "name": "connlimit"}}, counter,
         {"xt": {"type": "target", "name": "REJECT"}}],
        [{"ct count": {"val": 5, "inv": True}}, counter, {"log": None}],
        [{"ct count": {"val": 5}}, counter, drop],  # without "over": those within the number
        [{"vmap": {"key": {"ct": {"key": "state"}},
                   "data": {"set": [["invalid", drop], ["established", {"accept": None}]]}}}],
        [state, {"jump": {"target": "c"}}],  # not all that comes there is refused
    )  # fmt: skip
    assert said.met == (
        Met("ip t c", 0, "limit", 20, 7),
        Met("ip t c", 1, "invalid", 0, None),
        Met("ip t c", 3, "limit", 0, 7),
        Met("ip t c", 6, "invalid", 0, None),
    )


SAVED = """*filter
:INPUT ACCEPT [0:0]
[9:540] -A INPUT -p tcp -m tcp --dport 22 -j ACCEPT
[5:300] -A INPUT -p tcp -m connlimit --connlimit-above 8 --connlimit-mask 32 -j REJECT
[5:300] -A INPUT -p tcp -m connlimit --connlimit-upto 8 --connlimit-mask 32 -j REJECT
[7:420] -A FORWARD -m conntrack --ctstate INVALID -j DROP
[8:480] -A FORWARD -m conntrack ! --ctstate INVALID -j DROP
[8:480] -A FORWARD -m state --state INVALID,NEW -j DROP
[1:60] -A FORWARD -m conntrack --ctstate INVALID -j LOG
COMMIT
"""


def test_rules_of_iptables_with_a_limit_and_such_as_drop_invalid() -> None:
    """By their arguments, which nft's listing of iptables-nft's tables lacks."""
    listed = [{"xt": {"type": "match", "name": "connlimit"}},
              {"xt": {"type": "target", "name": "REJECT"}}]  # fmt: skip
    rule = {"family": "ip", "table": "filter", "chain": "INPUT", "handle": 5, "expr": listed}
    for tool, family in (("iptables-nft", "ip"), ("iptables-legacy", "ip6")):
        document = {"nft": json.dumps({"nftables": [{"rule": rule}] if family == "ip" else []}),
                    "saves": ((tool, family, SAVED),)}  # fmt: skip
        name = f"{family}tables"
        assert told(document).met == (
            Met(f"{name} filter INPUT, rule 2", 0, "limit", 8, 5),
            Met(f"{name} filter FORWARD, rule 1", 0, "invalid", 0, 7),
        )


def test_a_rule_that_sends_to_a_chain_which_refuses_all() -> None:
    counter, drop = {"counter": {"packets": 7, "bytes": 420}}, {"drop": None}
    over = {"ct count": {"val": 5, "inv": True}}
    items = [
        {"rule": {"family": "ip", "table": "t", "chain": chain, "handle": n, "expr": expr}}
        for n, (chain, expr) in enumerate([
            ("refuse", [{"log": None}, counter, drop]),
            ("some", [{"match": {"op": "==", "left": {"meta": {}}, "right": 1}}, drop]),
            ("c", [over, counter, {"goto": {"target": "refuse"}}]),
            ("c", [over, counter, {"goto": {"target": "some"}}]),
        ])
    ]  # fmt: skip
    assert told({"nft": json.dumps({"nftables": items})}).met == (Met("ip t c", 2, "limit", 5, 7),)


def explained(trace: Trace, *readings: Beside) -> tuple[Cause, ...]:
    """What is said of a trace whose last batch carries what was read beside it."""
    model = Model(HookInfo("fentry"), Clock(0), START)
    *before, last = trace.batches(12)
    for batch in before:
        model.update(batch)
    model.update(replace(last, beside=readings))
    return model.snapshot().why


def test_what_drops_invalid_packets_stands_with_them() -> None:
    trace = Trace(seed=7)
    trace.flows(steady(5, 12, trace.rng), 1.0, 3.0)
    dropping = Refusing("ip t c", 1, "invalid", packets=290, since=290)

    def said(netns: int) -> str:
        model = Model(HookInfo("fentry"), Clock(0), START)
        for number, batch in enumerate(trace.batches(12)):
            tables = tuple(replace(t, stats={**t.stats, "invalid": 30 * number})
                           for t in batch.tables)  # fmt: skip
            model.update(replace(batch, tables=tables, beside=(Beside(netns, (dropping,)),)))
        return next(one.text for one in model.snapshot().why if one.id == "invalid")

    assert said(NETNS).endswith(
        "; a rule dropped 290 such packets since it was first read (ip t c, handle 1)"
    )
    assert said(NETNS + 1).endswith("a rule may drop them")


def test_what_was_read_beside_goes_when_it_is_gone() -> None:
    """The newest reading of a namespace is what is said of it."""
    trace = Trace(seed=7)
    trace.flows(steady(5, 12, trace.rng), 1.0, 3.0)
    limit = Refusing("ip t c", 1, "limit", 20, packets=9, since=9)
    left = Left("udp", "192.0.2.1", 53, "10.0.0.9", 40)
    found = explained(trace, Beside(NETNS, (limit,), (left,)))
    assert [one.id for one in found] == ["stale-nat", "rule-limit"]
    assert [one.id for one in explained(trace, Beside(NETNS, (limit,)), Beside(NETNS))] == [
        "unknown"
    ]


NAT = """table ip n {{ chain p {{ type nat hook prerouting priority dstnat;
 ip daddr 192.0.2.10 udp dport 5060 dnat to {backend}
 ip daddr 192.0.2.11 udp dport 5060 dnat to {other}
}}
}}
"""


def translated(node: Node, backend: str) -> int:
    listed = node.run(["conntrack", "-L", "-p", "udp"], check=False)
    return len(re.findall(rf"dst=\S+ .* src={re.escape(backend)} ", listed))


def settled(node: Node, backend: str) -> int:
    """How many there are once enough of those sent have come: some wait for a neighbour."""
    deadline, before = time.monotonic() + 60, -1
    while (now := translated(node, backend)) < FEW or now != before:
        assert time.monotonic() < deadline, node.run(["conntrack", "-L"], check=False)
        before = now
        time.sleep(0.2)
    return now


@pytest.mark.kernel
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_entries_that_keep_to_a_backend_that_is_gone() -> None:
    """The command that is printed removes just these, as many as it says."""
    with Lab() as lab:
        client, gateway, server = (lab.namespace(name) for name in ("c", "g", "s"))
        gateway.sysctl("net.ipv4.ip_forward", 1)
        _, near = lab.link(client, gateway)
        _, far = lab.link(gateway, server)
        client.run(["ip", "route", "add", "192.0.2.0/24", "via", near])
        gone, stays = far, far.rpartition(".")[0] + ".7"
        server.run(["ip", "addr", "add", f"{stays}/24", "dev", "to-g"])
        gateway.run(["nft", "-f", "-"], stdin=NAT.format(backend=gone, other=stays))
        gateway.sysctl("net.netfilter.nf_conntrack_udp_timeout", 600)
        for dst in ("192.0.2.10", "192.0.2.11"):
            traffic.udp_flows(client, (dst, 5060), 30)
        n, others = settled(gateway, gone), settled(gateway, stays)
        assert not beside.leftovers(gateway.path, told(dump(gateway.path)))

        moved = "flush table ip n\n" + NAT.format(backend=stays, other=stays)
        gateway.run(["nft", "-f", "-"], stdin=moved)
        left = beside.leftovers(gateway.path, told(dump(gateway.path)))
        assert left == (Left("udp", "192.0.2.10", 5060, gone, n),)
        (cause,) = stale(replace(TABLE, netns=gateway.inum), left)
        assert cause.id == "stale-nat"
        assert cause.remedies[0].now == n
        gateway.run(shlex.split(cause.remedies[0].commands[0]))
        assert translated(gateway, gone) == 0
        assert translated(gateway, stays) == others


@pytest.mark.kernel
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_rules_own_limit_is_counted_as_the_rule_counts() -> None:
    with Lab() as lab:
        client, server = lab.namespace("c"), lab.namespace("s", track=True)
        _, target = lab.link(client, server)
        server.run(["nft", "-f", "-"], stdin="table ip z {\n chain i {\n"
                   "  type filter hook input priority 0\n  tcp dport 80 ct state new "
                   "ct count over 2 counter reject with tcp reset\n }\n}\n")  # fmt: skip
        listener = server.socket(socket.AF_INET, socket.SOCK_STREAM)
        with listener:
            listener.bind((target, 80))
            listener.listen(50)
            space = beside.Space(server.inum, told(dump(server.path)))
            held = [client.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(12)]
            refused = 0
            for one in held:
                try:
                    one.connect((target, 80))
                except ConnectionRefusedError:
                    refused += 1
            (rule,) = space.see(told(dump(server.path))).refusing
            for one in held:
                one.close()
    assert refused == 10
    assert (rule.kind, rule.limit, rule.since) == ("limit", 2, refused)


def test_the_ports_that_source_nat_may_take() -> None:
    said = rules(
        [{"masquerade": None}],
        [{"snat": {"addr": "10.0.0.1", "port": {"range": [40000, 40009]}}}],
        saves="-A POSTROUTING -j MASQUERADE --to-ports 1024-2047\n-A POSTROUTING -j SNAT "
        "--to-source 10.0.0.1:5000-5003",
    )
    assert said.ports == ((1024, 2047), (5000, 5003), (1024, 65535), (40000, 40009))


def test_source_ports_are_told_before_they_are_used_up() -> None:
    """How long it takes comes with its error, and only where ports are taken quickly."""
    trace = Trace(seed=7)
    trace.flows(steady(5, 12, trace.rng), 1.0, 3.0)

    def said(used: int, was: int) -> str:
        taken = PortsTaken("tcp", "10.0.0.1", "10.0.0.9", 443, used, 1000, was, 10.0)
        return explained(trace, Beside(NETNS, ports=(taken,)))[0].text

    assert "uses 900 of the 1,000 ports" in said(900, 800)
    assert "at this rate used up in 8.3 s to 12 s" in said(900, 800)
    assert "used up" not in said(900, 895)
    assert "ports" not in said(700, 0)


def test_of_a_large_table_an_even_sample_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in five of its entries leads where no rule does; a fifth of the table is read."""
    rows = empty(50_000)
    rows["proto"], rows["dport"], rows["reply_dport"] = 17, 5060, np.arange(50_000) % 65_536
    for name, text in (("dst", "192.0.2.1"), ("reply_src", "10.0.0.1"), ("reply_dst", "192.0.2.9")):
        rows[name] = np.frombuffer(address_bytes(text), np.uint8)
    rows["reply_src"][::5] = np.frombuffer(address_bytes("10.0.0.9"), np.uint8)
    rows["status"] = int(Status.DST_NAT | Status.SRC_NAT)
    parts = [SimpleNamespace(events=rows[at : at + 2000]) for at in range(0, 50_000, 2000)]
    monkeypatch.setattr(ctnetlink, "slices", lambda _: iter(parts))
    monkeypatch.setattr(beside.table, "local_addresses", lambda _: ())
    found = beside.table.read("", rules([{"dnat": {"addr": "10.0.0.1"}}]), 50_000, 10_000)
    assert (found.seen, found.part) == (10_000, 0.2)
    assert found.left() == (Left("udp", "192.0.2.1", 5060, "10.0.0.9", 10_000),)
    (cause,) = stale(replace(TABLE, count=50_000, max=65_536), found.left(), part=found.part)
    assert "about 10,000 entries to 192.0.2.1" in cause.text
    assert "by a sample of 20 % of the 50,000 entries" in cause.evidence[0]
    frees = cause.remedies[0].frees
    assert frees is not None
    assert frees[0] < 10_000 < frees[1]
    ports = beside.table.read("", Told(ports=((0, 65535),)), 50_000, 10_000).ports()
    assert ports["udp", "192.0.2.9", "10.0.0.1", 0][0] == pytest.approx(40_000, rel=0.05)


def test_limits_that_are_not_the_table() -> None:
    first: dict[str, int] = {}
    counted = {"conntrack_allowance_exceeded": 70, "conntrack_allowance_available": 0}
    (before,) = short.clouds({"ens5": counted, "lo": {"drops": 3}}, first)
    (after,) = short.clouds({"ens5": {**counted, "conntrack_allowance_exceeded": 95}}, first)
    assert (before.since, after.since) == (0, 25)
    many = Short("expectations", used=1000, of=1024)
    few = Short("expectations", used=10, of=1024)
    found = list(limits(TABLE, (before, after, many, few)))
    assert [one.id for one in found] == ["cloud-limit", "expectations"]
    assert "ens5" in found[0].text
    assert "dropped 25 packets since it was first read; this table is 20 % full" in found[0].text
    assert "1,000 of 1,024 expected connections" in found[1].text


@pytest.mark.kernel
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_statistics_of_a_device_are_those_of_its_driver() -> None:
    """As sysfs has them: the number of the device at the other end."""
    with Lab() as lab:
        one, other = lab.namespace("a"), lab.namespace("b")
        lab.link(one, other)
        with enter(one.path):
            found, others = ethtool.statistics("veth"), ethtool.statistics("ena")
        index = one.run(["sh", "-c", "ip -o link show to-b"]).partition("link-netns")[0]
    assert found["to-b"]["peer_ifindex"] == int(re.findall(r"@if(\d+)", index)[0])
    assert others == {}


def test_each_zone_has_every_source_port_once() -> None:
    rows = np.zeros(24, RECORD)
    rows["proto"], rows["status"] = 6, int(Status.SRC_NAT)
    rows["reply_sport"] = 443
    for zone, ports in ((7, range(20000, 20012)), (8, range(20008, 20020))):
        mine = slice(0, 12) if zone == 7 else slice(12, 24)
        rows["zone"][mine], rows["reply_dport"][mine] = zone, list(ports)
    reading = Reading(Told(ports=((20000, 20019),)))
    reading.add(rows)
    assert list(reading.ports().values()) == [(12, 20)]


def test_source_ports_that_fail_and_how_many_there_are_stand_together() -> None:
    failing = Cause("source-ports", "init: 30 packets found no free port", netns=NETNS,
                    proto="tcp", port=443)  # fmt: skip
    taken = PortsTaken("tcp", "10.0.0.1", "10.0.0.9", 443, 900, 1000)
    facts = cast(Facts, SimpleNamespace(
        tables=(TABLE,), gone=(), beside={NETNS: Beside(NETNS, ports=(taken,))},
        where=lambda _: "",
    ))  # fmt: skip
    (told_once,) = causes.beside(facts, [failing])
    assert told_once.text.startswith(f"{failing.text}; source NAT to 10.0.0.1 uses 900")


@pytest.mark.kernel
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_source_ports_in_use_are_counted_as_the_table_has_them() -> None:
    with Lab() as lab:
        client, gateway, server = (lab.namespace(name) for name in ("c", "g", "s"))
        gateway.sysctl("net.ipv4.ip_forward", 1)
        _, near = lab.link(client, gateway)
        out, far = lab.link(gateway, server)
        client.run(["ip", "route", "add", far, "via", near])
        masquerade = (
            "table ip n { chain p { type nat hook postrouting priority srcnat; "
            "ip protocol udp masquerade to :40000-40031\n}\n}\n"
        )
        gateway.run(["nft", "-f", "-"], stdin=masquerade)
        gateway.sysctl("net.netfilter.nf_conntrack_udp_timeout", 600)
        with traffic.udp_server(server, 53):
            traffic.udp_flows(client, (far, 53), 30)
        settled(gateway, far)
        listed = gateway.run(["conntrack", "-L", "-p", "udp"], check=False)
        taken = set(re.findall(rf"dst={re.escape(out)} sport=53 dport=(\d+)", listed))
        assert len(taken) >= FEW
        found = beside.used(gateway.path, told(dump(gateway.path)).ports)
        assert found == {("udp", out, far, 53): (len(taken), 32)}


@pytest.mark.parametrize(
    ("said", "echo"),
    [
        (rules([{"match": {"op": "==", "left": {"ct": {"key": "state"}}, "right": "new"}},
                {"counter": None}]), True),
        (rules([{"match": {"op": "==", "left": {"ct": {"key": "state"}}, "right": "new"}},
                {"accept": None}]), False),
        (rules([{"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}},
                           "right": 80}}, {"dnat": {"addr": "10.0.0.1"}}]), True),
        (rules([{"match": {"op": "!=", "left": {"meta": {"key": "l4proto"}}, "right": "tcp"}},
                {"masquerade": None}]), False),
        (rules([{"masquerade": None}]), False),
        (rules([{"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": []}}}]), False),
        (rules(ipvs="TCP 0A000001:0050 rr"), False),
        (told({"nft": "", "ipvs": "", "gaps": ("?",)}), False),
        (told({"nft": "", "saves": (("iptables-legacy", "ip", SAVED),)}), False),
        (told({"nft": "", "saves": (("iptables-legacy", "ip",
              "-A FORWARD -p tcp -m state --state NEW -j ACCEPT"),)}), True),
    ],
)  # fmt: skip
def test_whether_a_rule_may_decide_of_pings_by_their_entries(said: Told, echo: bool) -> None:
    assert said.echo is echo


@pytest.mark.kernel
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_pings_taken_out_of_tracking_are_answered_without_entries() -> None:
    """Offered only where the rules allow it; then taken back."""
    trace = Trace(seed=7)
    trace.flows(steady(50, 12, trace.rng), 0.01, 30.0, proto=1, dport=2048)
    allowed = explained(trace, Beside(NETNS, echo=True))[0].at_need  # they are answered
    assert [one.id for one in allowed].count("untrack-echo") == 1
    assert "untrack-echo" not in {one.id for one in explained(trace)[0].at_need}
    with Lab() as lab:
        client, server = lab.namespace("c"), lab.namespace("s", track=True)
        _, target = lab.link(client, server)

        def pings() -> tuple[int, int]:
            """Those answered, and entries of them."""
            server.run(["conntrack", "-F"])
            answered = 0
            with client.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as one:
                one.settimeout(60)
                for number in range(3):
                    check = 0xFFFF - (0x0800 + 77 + number)  # of type, code, id and number
                    request = struct.pack("!BBHHH", 8, 0, check, 77, number)
                    one.sendto(request, (target, 0))
                    answered += one.recv(128)[20] == 0
            return answered, server.count()

        offered = next(one for one in allowed if one.id == "untrack-echo")
        assert told(dump(server.path)).echo
        seen = {ip_address(a).packed for a in server.addresses["c"] + client.addresses["s"]}
        assert Pings().fare_the_same(server.path, seen)
        assert not Pings().fare_the_same(server.path, set()), "nobody pings, so it is not said"
        server.run(
            ["nft", "add rule inet track pre icmpv6 type echo-request ct state untracked drop"]
        )
        assert not Pings().fare_the_same(server.path, seen)
        server.run(["nft", "flush chain inet track pre"])
        assert Pings().fare_the_same(server.path, seen)
        assert pings() == (3, 1)
        server.run(["sh", "-c", offered.commands[0]])
        assert pings() == (3, 0)
        server.run(["sh", "-c", offered.undo[0]])
        assert pings() == (3, 1)
