"""What works beside netfilter is found and named, and keeps a verdict from being safe."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from kit.rulesets.cases import SAFE
from kit.rulesets.net import Net, ask, install, reset, seen, verdict_on
from kit.rulesets.services import FAMILIES, PORT
from kit.rulesets.texts import TRACK
from kit.traffic import tcp_connections, tcp_server

from ctrace.advice.hazards import Judge, Judgement
from ctrace.advice.roles import subject
from ctrace.advice.subject import Subject
from ctrace.host.ctnetlink import dump
from ctrace.host.netns import local_addresses
from ctrace.kernel import bpf
from ctrace.lab import Lab
from ctrace.plan.plan import Notrack, alone
from ctrace.record import TCP
from ctrace.ruleset import notrack_nft, planes
from ctrace.ruleset.model import Ruleset

EXIT = b"\x95\0\0\0\0\0\0\0"
UNKNOWN = "cannot-say"
PASS = {
    "an XDP program": (6, b"\xb7\0\0\0\2\0\0\0", 37, struct.pack("<I", 2)),
    "an eBPF program (tcx)": (3, b"\xb7\0\0\0\xff\xff\xff\xff", 46, b""),
    "an eBPF program": (32, b"\xb7\0\0\0\1\0\0\0", 45, struct.pack("<IIIiI", 0, 2, 0, -390, 0)),
}
"""Program type, ``r0 = pass``, attach type, the rest of the attributes (XDP_FLAGS_SKB_MODE;
NF_INET_PRE_ROUTING of IPv4, priority -390)."""


def judged(net: Net) -> Judgement:
    about = subject(seen(net), net.local, (32768, 60999), True, ())
    return verdict_on(about, net.h.path)


def of_tcp(path: str) -> int:
    """TCP entries: a bridge that comes up also reports its groups (IGMP, MLD), for seconds."""
    return int((dump(path)["proto"] == TCP).sum())


@contextmanager
def running(net: Net, what: str) -> Iterator[None]:
    """A program that only lets packets pass: but nobody can tell by looking from outside."""
    kind, verdict, place, rest = PASS[what]
    loaded = bpf.prog_load(verdict + EXIT, kind, "t_pass", attach_type=place)  # type: ignore[arg-type]
    try:
        with net.h.enter():
            index = 0 if place == 45 else socket.if_nametoindex("to-r2")
            link, _ = bpf.bpf(bpf.Cmd.LINK_CREATE, struct.pack("<III", loaded, index, place) + rest)
        assert link >= 0, os.strerror(-link)
        try:
            yield
        finally:
            os.close(link)
    finally:
        os.close(loaded)


@pytest.mark.kernel
@pytest.mark.machine  # a program at netfilter's hooks is seen from every namespace
@pytest.mark.parametrize("what", PASS)
def test_an_ebpf_program_is_never_called_safe(net: Net, what: str) -> None:
    reset(net)
    install(net, TRACK)
    for node, target in ((net.c, net.addresses["h"][4]), (net.h, "127.0.0.1")):
        assert ask(node, (target, PORT))
    assert judged(net).verdict == SAFE
    with running(net, what):
        assert ask(net.c, (net.addresses["h"][4], PORT))
        told = judged(net)
        about = subject(seen(net), net.local, (32768, 60999), True, ())
        inside = verdict_on(replace(about, roles=("loopback",)), net.h.path)
    assert told.verdict == UNKNOWN
    assert f"{what} at " in told.reasons[0]
    # What works at a device has no business with packets over lo.
    assert inside.verdict == (UNKNOWN if "netfilter" in told.reasons[0] else SAFE)
    assert any(what in reason for reason in inside.reasons)
    assert judged(net).verdict == SAFE


LINKS: dict[str, dict[str, Any]] = {
    "Open vSwitch": {"info_kind": "openvswitch"},
    "Open vSwitch, a port": {"info_kind": "veth", "info_slave_kind": "openvswitch"},
    "netkit": {"info_kind": "netkit", "info_data": {"mode": "l3"}},
    "a VRF": {"info_kind": "vrf", "info_data": {"table": 10}},
    "a VRF, a port": {"info_kind": "veth", "info_slave_kind": "vrf"},
}
"""As ``ip -d -j link`` prints them, where the kernel at hand has no such devices."""


@pytest.mark.parametrize("name", LINKS)
def test_devices_of_other_planes(name: str) -> None:
    what = name.split(",", maxsplit=1)[0]
    assert list(planes._of_link({"ifname": "x0", "linkinfo": LINKS[name]})) == [what]
    about = Subject("tcp", PORT, ("server",), ("192.0.2.1",), ("198.51.100.7",), nat="no")
    told = Judge(Ruleset(planes=(("x0", what),)), None).judge(about)
    assert told.verdict == UNKNOWN
    assert f"{what} at x0" in told.reasons[0]


@pytest.mark.parametrize("info", [{}, {"info_kind": "bridge"}, {"info_slave_kind": "bridge"}])
def test_ordinary_devices(info: dict[str, Any]) -> None:
    assert not list(planes._of_link({"ifname": "x0", "linkinfo": info}))


FILTERS: dict[str, dict[str, Any]] = {
    "a tc rule in the card itself": {
        "kind": "flower",
        "options": {"in_hw": True, "in_hw_count": 1},
    },
    "tc's ct action": {"kind": "flower", "options": {"actions": [{"order": 1, "kind": "ct"}]}},
    "an eBPF program (tc)": {"kind": "bpf", "options": {"handle": "0x1", "bpf_name": "x.o"}},
}
"""As ``tc -j filter show`` prints them."""


@pytest.mark.parametrize("what", FILTERS)
def test_filters(what: str) -> None:
    asked = []

    def ask_tc(*argv: str) -> list[dict[str, Any]]:
        asked.append(argv)
        if "qdisc" in argv:
            return [{"kind": "clsact", "dev": "x0", "ingress_block": 7}]
        return [FILTERS[what]] if argv[-2:] == ("block", "7") else []

    assert list(planes._filters(ask_tc)) == [("x0", what)]
    assert ("tc", "-j", "filter", "show", "dev", "x0", "egress") in asked
    assert not list(planes._of_filter({"kind": "flower", "options": {"not_in_hw": True}}))


@pytest.mark.kernel
@pytest.mark.parametrize("called", [False, True])
def test_rules_that_ask_for_a_bridges_port(called: bool) -> None:
    """A copy has no ports to tell apart: nothing is called safe, but where none is asked for."""
    with Lab() as lab:
        h = lab.namespace("h", track=True)
        h.run(["ip", "link", "add", "br0", "type", "bridge"])
        h.sysctl("net.bridge.bridge-nf-call-iptables", int(called))
        h.run(["iptables-nft", "-A", "FORWARD", "-m", "physdev", "--physdev-in", "eth7", "-j",
               "DROP"])  # fmt: skip
        about = Subject("tcp", PORT, ("server",), ("10.9.0.1",), ("10.9.0.2",), nat="no")
        judgement = verdict_on(about, h.path)
        assert any("physdev" in reason for reason in judgement.reasons) == called
        assert (judgement.verdict == UNKNOWN) == called


@pytest.mark.kernel
@pytest.mark.parametrize("called", [False, True], ids=["apart", "through iptables"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bridge_that_calls_iptables(family: int, called: bool) -> None:
    """bridge-nf-call-iptables: bridged packets meet the rules that were read, so they are judged.

    Without it they are none of netfilter's business.
    """
    with Lab() as lab:
        a, b, h = (lab.namespace(name) for name in "abh")
        lab.link(a, h)
        lab.link(b, h)
        h.run(["ip", "link", "add", "br0", "type", "bridge"])
        for node, port, last in ((a, "to-a", 2), (b, "to-b", 3), (h, "br0", 1)):
            device = "to-h" if node is not h else "br0"
            if node is not h:
                h.run(["ip", "addr", "flush", "dev", port])
                h.run(["ip", "link", "set", port, "master", "br0"])
                node.run(["ip", "addr", "flush", "dev", device])
            node.run(["ip", "addr", "add", f"10.9.0.{last}/24", "dev", device])
            node.run(["ip", "addr", "add", f"fd09::{last}/64", "dev", device, "nodad"])
        h.run(["ip", "link", "set", "br0", "up"])
        for name in ("iptables", "ip6tables"):
            h.sysctl(f"net.bridge.bridge-nf-call-{name}", int(called))
        h.run(["nft", "-f", "-"], stdin=TRACK[0][1])
        mine, other = ("10.9.0.1", "10.9.0.3") if family == 4 else ("fd09::1", "fd09::3")
        here = local_addresses(h.path)
        for node, address, role in ((h, mine, "server"), (b, other, "forward")):
            about = Subject("tcp", PORT, (role,), here, (address,), nat="no")
            judgement = verdict_on(about, h.path)
            assert judgement.verdict == SAFE, judgement.reasons
            with tcp_server(node, PORT):
                h.run(["conntrack", "-F"], check=False)
                assert tcp_connections(a, (address, PORT), 3).flows
                assert bool(of_tcp(h.path)) == (called or role == "server")
                lever: Notrack = judgement.lever
                plan = alone(lever)
                h.run(["nft", "-f", "-"], stdin=notrack_nft.script(plan, None))
                h.run(["conntrack", "-F"], check=False)
                assert len(tcp_connections(a, (address, PORT), 3).flows) == 3
                assert not of_tcp(h.path)
                h.run(["nft", "-f", "-"], stdin=notrack_nft.remove_table())
