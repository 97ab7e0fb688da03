"""A copy of a namespace is the same, and packets fare in it as there."""

from __future__ import annotations

import fcntl
import re
import struct
from collections.abc import Iterator
from contextlib import closing
from ipaddress import ip_address

import pytest

from ctrace.errors import CtraceError
from ctrace.host import commands, ctnetlink, netns
from ctrace.host.rawlink import NETFILTER, Link, Space, attr, number, split, text
from ctrace.lab import Lab, Node
from ctrace.plan.plan import Accept, Notrack
from ctrace.rehearsal import nft_copy, surroundings
from ctrace.rehearsal.conditions import forced
from ctrace.rehearsal.packets import SYN, tcp
from ctrace.rehearsal.room import Room, Setting, ours
from ctrace.rehearsal.snapshot import from_text, take, to_text
from ctrace.rehearsal.stage import Stage, on_one_processor
from ctrace.rehearsal.ways.ends import ENDS
from ctrace.ruleset.notrack import TABLE
from ctrace.ruleset.reader import read

pytestmark = pytest.mark.kernel
RULES = """
table inet fw {
 set friends { type ipv4_addr; flags interval; elements = { 10.77.1.0/25, 192.0.2.7 }; }
 map to { type inet_service : verdict; elements = { 22 : drop, 8063 : accept }; }
 set seen { type ipv4_addr; flags dynamic,timeout; timeout 1h; }
 chain other { ip saddr @friends counter return; log prefix "x" limit rate 3/second; }
 chain in { type filter hook input priority 0; policy drop;
  ct state vmap { established : accept, related : accept, invalid : drop }
  update @seen { ip saddr timeout 10m }
  iif lo accept
  jump other
  tcp dport vmap @to
  tcp option maxseg size set 1300
  meta skuid 1000 meta mark set ct mark
 }
}
table ip n {
 chain post { type nat hook postrouting priority 100; oifname "to-x*" masquerade random; }
}
"""
XT = (
    "*filter\n-A INPUT -p tcp -m multiport --dports 80,443 -m comment --comment web -j ACCEPT\n"
    "-A INPUT -m set --match-set third src -j DROP\n-A INPUT -m limit --limit 3/min -j LOG\n"
    "-A FORWARD -p udp -m hashlimit --hashlimit-name h --hashlimit-upto 5/sec -j ACCEPT\nCOMMIT\n"
)


@pytest.fixture(scope="module")
def host() -> Iterator[Node]:
    with Lab() as lab:
        node, peer = lab.namespace("h"), lab.namespace("c")
        lab.link(node, peer)
        node.run(["ip", "route", "add", "default", "via", "10.77.1.2"])
        node.run(["ip", "rule", "add", "fwmark", "7", "table", "77"])
        node.run(["nft", "-f", "-"], stdin=RULES)
        for name in ("first", "second", "third"):
            node.run(["ipset", "create", name, "hash:ip"])
        node.run(["ipset", "add", "third", "192.0.2.66"])
        node.run(["ipset", "destroy", "second"])  # a gap: rules know a set by its number
        node.run(["iptables-nft-restore"], stdin=XT)
        yield node


def listing(path: str) -> list[str]:
    with netns.enter(path):
        found = commands.run(["nft", "-s", "list", "ruleset"])
    found = re.sub(rf"table inet {ENDS} \{{.*?\n\}}\n", "", found, flags=re.DOTALL)
    return sorted(re.sub(r"expires \S+", "expires", found).split("\n"))


def ipset_number(path: str, name: str) -> int:
    with Link(path, NETFILTER) as link:
        body = struct.pack(">BBH", 2, 0, 0) + attr(1, b"\7") + text(2, name)
        return number(dict(split(link.ask(6 << 8 | 14, body), 4))[11])


def lines(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("-A")]


def without(tun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the device asked for, where there is a choice."""
    if tun and not surroundings._has_tun():
        pytest.skip("the tun module is not loaded")
    monkeypatch.setattr(surroundings, "_has_tun", lambda: tun)


@pytest.mark.parametrize("tun", [True, False], ids=["tun", "veth"])
def test_the_rules_are_the_same(host: Node, tun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    without(tun, monkeypatch)
    with Stage(take(host.path)) as stage:
        assert listing(stage.space.path) == listing(host.path)
        assert ipset_number(stage.space.path, "third") == ipset_number(host.path, "third")
        saved = lines(stage.space.run(["iptables-nft-save"]))
        assert saved == lines(host.run(["iptables-nft-save"]))
        assert len(saved) == 4
        assert stage.gaps == []


def test_what_surrounds_them_is_the_same(host: Node) -> None:
    with Stage(take(host.path)) as stage:
        for words in (["ip", "rule"], ["ip", "-6", "rule"], ["ip", "-4", "route"]):
            there = host.run(words)
            assert stage.space.run(words) == there
        for key in ("net.ipv4.ip_forward", "net.ipv4.conf.to-c.rp_filter"):
            words = ["sysctl", "-n", key]
            assert stage.space.run(words) == host.run(words)


def test_a_snapshot_as_text_is_the_same(host: Node) -> None:
    found = take(host.path)
    assert from_text(to_text(found)) == found
    with pytest.raises(ValueError, match="damaged"):
        from_text("no snapshot")


@pytest.mark.parametrize("tun", [True, False], ids=["tun", "veth"])
def test_packets_are_seen_where_they_end(
    host: Node, tun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = take(host.path)
    without(tun, monkeypatch)
    device = next(d.index for d in found.devices if d.name == "to-c")
    far, here = ip_address("10.77.1.2").packed, ip_address("10.77.1.1").packed
    with Stage(found) as stage, on_one_processor():
        stage.receive(device, tcp(1, far, here, (40000, 8063), SYN))
        stage.receive(device, tcp(2, far, here, (40000, 22), SYN))
        stage.send(tcp(3, here, far, (40000, 9), SYN))
        seen = stage.seen()
    assert [(o.way, o.dport) for o in seen[1]] == [("in", 8063)]
    assert 2 not in seen
    assert [(o.way, o.device, o.dport) for o in seen[3]] == [("out", device, 9)]


def test_a_stage_that_was_used_is_as_new(host: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Room, "_worth_it", lambda *_: True)
    here, far = ip_address("10.77.1.1").packed, ip_address("10.77.1.2").packed
    room = Room(take(host.path), read(host.path))
    device = next(d.index for d in room.snapshot.devices if d.name == "to-c")
    accept = Accept("nft", "inet", "fw", "in", position=4, hook="input", role="server", flow="to")
    lever = Notrack("tcp", 8063, ("server",), accepts=(accept,))
    with room.stage(Setting()) as stage:
        before = listing(stage.space.path)
    with room.stage(Setting(), ours(lever, "nft"), traced=True) as stage, on_one_processor():
        assert f"table inet {TABLE} {{" in listing(stage.space.path)
        stage.receive(device, tcp(1, far, here, (40000, 8063), SYN))
        stage.receive(device, tcp(2, far, here, (40000, 9063), SYN))
        stage.send(tcp(3, here, far, (40000, 9), SYN))
        assert {number: bool(ends) for number, ends in stage.seen().items()} == {1: True, 3: True}
        assert stage.ways[1]
        assert "10.77.1.2" in "".join(stage.space.run(["nft", "list", "set", "inet", "fw", "seen"]))
        assert len(ctnetlink.dump(stage.space.path)) == 1
    with room.stage(Setting()) as again, on_one_processor():
        assert again is stage
        assert listing(again.space.path) == before
        assert not len(ctnetlink.dump(again.space.path))
        again.receive(device, tcp(1, far, here, (40000, 8063), SYN))
        assert again.seen()[1]
        assert not again.ways


def test_its_iptables_does_not_wait_for_the_hosts() -> None:
    with closing(Space()) as space, open(space.path) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CtraceError, match="lock"):
            space.run(["iptables-legacy-restore", "-w", "1"], "*filter\nCOMMIT\n")
        fcntl.flock(held, fcntl.LOCK_UN)
        space.run(["iptables-legacy-restore"], "*filter\n-A INPUT -j DROP\nCOMMIT\n")
        assert "-A INPUT -j DROP" in space.run(["iptables-legacy-save"])


LOTS = """
table ip n {
 chain in { type filter hook input priority 0;
  tcp dport 8063 numgen random mod 3 vmap { 0 : accept, 1 : drop, 2 : drop }
  tcp dport 9063 jhash tcp sport mod 3 seed 7 offset 5 vmap { 5 : drop, 6 : drop, 7 : accept }
 }
}
"""
OLD_LOTS = (
    "*filter\n-A INPUT -p tcp --dport 7063 -m statistic --mode random --probability 0.5 -j DROP"
)


@pytest.mark.parametrize("first", [True, False])
def test_a_lot_falls_on_the_first_or_on_the_last(first: bool) -> None:
    with Lab() as lab:
        node, peer = lab.namespace("h"), lab.namespace("c")
        lab.link(node, peer)
        node.run(["nft", "-f", "-"], stdin=LOTS)
        node.run(["iptables-nft-restore"], stdin=f"{OLD_LOTS}\nCOMMIT\n")
        found = take(node.path)
    rules = nft_copy.batch(found.nft, forced.change(first, untracked=False))
    device = next(d.index for d in found.devices if d.name == "to-c")
    far, here = ip_address("10.77.1.2").packed, ip_address("10.77.1.1").packed
    with Stage(found, rules=rules) as stage, on_one_processor():
        for number, port in enumerate([8063, 9063, 7063] * 10, 1):
            stage.receive(device, tcp(number, far, here, (40000 + number, port), SYN))
        seen = [outcome.dport for outcomes in stage.seen().values() for outcome in outcomes]
    assert sorted(seen) == ([8063] * 10 if first else [7063] * 10 + [9063] * 10)


def test_rules_that_change_all_the_time_are_told(
    host: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = iter(range(200))
    monkeypatch.setattr(nft_copy, "_generation", lambda _: bytes([next(turn)]))
    with pytest.raises(CtraceError, match="changed again and again"):
        take(host.path)


def test_without_a_device_it_says_what_it_needs(
    host: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = take(host.path)
    monkeypatch.setattr(surroundings, "can", lambda: "the tun module is not loaded")
    with pytest.raises(CtraceError, match="tun module"):
        Stage(found)
