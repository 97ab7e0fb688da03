"""Source ports, limits that are not the table, pings: what is read beside the events, counted."""

from __future__ import annotations

import os
import re
import socket
import struct
from dataclasses import replace
from ipaddress import ip_address
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from kit import traffic
from kit.rulesets.readings import SAVED, TABLE, explained, rules, settled
from kit.shapes import NETNS, Trace, steady

from ctrace.advice import beside
from ctrace.advice.beside import short
from ctrace.advice.beside.pings import Pings
from ctrace.advice.beside.table import Reading
from ctrace.beside import Beside, Left, PortsTaken, Short
from ctrace.host import ctnetlink, ethtool
from ctrace.host.netns import enter
from ctrace.lab import Lab
from ctrace.model.causes import beside as causes
from ctrace.model.causes.beside import FEW, stale
from ctrace.model.causes.facts import Facts
from ctrace.model.causes.short import limits
from ctrace.model.snapshot import Cause
from ctrace.record import RECORD, Status, address_bytes, empty
from ctrace.ruleset.reader import dump
from ctrace.ruleset.told import Told, told


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
