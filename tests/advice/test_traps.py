"""Traps of rules by port alone: each breaks something for real, and ours do not."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from kit.rulesets.net import Net, ask, asked, entries, install, put, put_text, reset, take_away
from kit.rulesets.services import BACKEND, CLOSED, FAMILIES, HIGH, LOCAL, PORT, WAIT
from kit.rulesets.texts import EST, LO, NAIVE, PING, TRACK, Setup, chain, docker, fw, nft
from kit.rulesets.verdicts import judged
from kit.traffic import tcp_connections, tcp_server

from ctrace.lab import Lab
from ctrace.plan.plan import Notrack, alone
from ctrace.ruleset import notrack_nft

pytestmark = pytest.mark.kernel


def script(lever: Notrack) -> str:
    return notrack_nft.script(alone(lever), None)


# ---- translated connections ---------------------------------------------------------


def nat(text: str, hook: str, priority: int) -> Setup:
    return nft(
        f"table ip n {{ chain {hook} {{ type nat hook {hook} priority {priority};\n{text}\n}}\n}}\n"
    )


def peer_seen(net: Net) -> bytes:
    """The address that ``s`` sees of a connection of ``c``, as far as it is ``h``'s own."""
    mine = net.h.addresses["s"][0]
    with net.s.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.settimeout(WAIT)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((net.addresses["s"][4], PORT))
        listener.listen()
        with net.c.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(WAIT)
            with contextlib.suppress(OSError):
                client.connect((net.addresses["s"][4], PORT))
                connection, peer = listener.accept()
                connection.close()
                return mine.encode() if peer[0] == mine else b""
    return b""


def hidden(net: Net) -> bytes:
    """A connection of ``s`` to ``c``, which has no way back to the address of ``s`` itself."""
    net.r2.run(["ip", "route", "add", "blackhole", "10.77.4.0/24"])
    try:
        return ask(net.s, (net.addresses["c"][4], PORT))
    finally:
        net.r2.run(["ip", "route", "del", "blackhole", "10.77.4.0/24"])


NAT: dict[str, tuple[Setup, Callable[[Net], bytes], Callable[[Net], bytes]]] = {
    "backend of a DNAT": (
        docker(7063, PORT),
        lambda net: ask(net.c, (net.addresses["s"][4], PORT)),
        lambda net: ask(net.c, (net.addresses["h"][4], 7063)),
    ),
    "redirected to it": (
        nat("tcp dport 7063 redirect to :8063", "prerouting", -100),
        lambda net: ask(net.c, (net.addresses["h"][4], PORT)),
        lambda net: ask(net.c, (net.addresses["h"][4], 7063)),
    ),
    "masqueraded on the way": (
        nat('oifname "to-s" masquerade', "postrouting", 100),
        lambda net: ask(net.c, (net.addresses["s"][4], PORT)),
        peer_seen,
    ),
    "others' calls, masqueraded": (
        nat('ip saddr 10.77.4.0/24 oifname "to-r2" masquerade', "postrouting", 100),
        lambda net: ask(net.h, (net.addresses["c"][4], PORT)),
        hidden,
    ),
    "called by another address": (
        nat("ip daddr 10.96.0.10 tcp dport 8063 dnat to 10.77.1.1:8063", "output", -100),
        lambda net: ask(net.h, (net.addresses["c"][4], PORT)),
        lambda net: ask(net.h, ("10.96.0.10", PORT)),
    ),
}


SPARED = {"redirected to it"}
"""The rules know these by how they begin."""


@pytest.mark.parametrize("name", NAT)
def test_translated_connections_are_refused(net: Net, name: str) -> None:
    setup, plain, translated = NAT[name]
    reset(net)
    install(net, setup)
    assert plain(net)
    judgement = judged(net)
    assert translated(net)
    put_text(net, NAIVE)
    assert not translated(net)
    reset(net)
    if name in SPARED:
        install(net, setup)
        assert judgement.verdict in ("safe", "safe-with-rules"), judgement.reasons
        put(net, judgement.lever)
        assert translated(net)
        assert plain(net)
        take_away(net)
    else:
        assert judgement.verdict == "unsafe", judgement.reasons


# ---- what counts and marks entries ---------------------------------------------------


@contextlib.contextmanager
def held(net: Net, many: int) -> Iterator[int]:
    """How many of so many connections are accepted; they are open as long as the block runs."""
    with contextlib.ExitStack() as stack:
        accepted = 0
        for _ in range(many):
            client = stack.enter_context(net.c.socket(socket.AF_INET, socket.SOCK_STREAM))
            client.settimeout(WAIT)
            with contextlib.suppress(OSError):
                client.connect((net.addresses["h"][4], PORT))
                accepted += 1
            time.sleep(0.05)  # xt_connlimit forgets connections without entries once a tick
        yield accepted


LIMITS: dict[str, Setup] = {
    "nft": fw(chain("input", "tcp dport 8063 ct state new ct count over 3 reject")),
    "elements": fw(chain("input", "tcp dport 8063 ct state new ip saddr @full reject"),
                   extra="set full { type ipv4_addr; flags dynamic; ct count over 3; "
                   "elements = { 10.77.1.1 ct count over 3 }; }\n"),
    **{
        f"iptables-{variant}": ((
            f"iptables-{variant}-restore",
            "*filter\n-A INPUT -p tcp --syn --dport 8063 -m connlimit --connlimit-above 3 "
            "-j REJECT --reject-with tcp-reset\nCOMMIT\n",
        ),)
        for variant in ("nft", "legacy")
    },
}  # fmt: skip


@pytest.mark.parametrize("tool", LIMITS)
def test_a_connection_limit_would_be_gone(net: Net, tool: str) -> None:
    reset(net)
    install(net, LIMITS[tool])
    with held(net, 8) as accepted:
        assert accepted == 3
        judgement = judged(net)  # a set forgets an element that counts none, within a second
    put(net, judgement.lever)
    with held(net, 8) as accepted:
        assert accepted == 8
    take_away(net)
    assert judgement.verdict == "unsafe"
    assert re.search("ct count|connlimit|@full", judgement.reasons[0])


def test_marks_would_not_come_back(net: Net) -> None:
    """Replies with a mark kept in the entry would lose it: that matters where something reads it
    after the last hook, and else to nobody."""
    reset(net)
    rule = "tcp sport 8063 meta mark 7 counter"
    install(
        net,
        fw(
            chain("prerouting", 'iifname "to-r2" ct state new ct mark set 7', priority="mangle"),
            chain("output", f"meta mark set ct mark\n{rule}", priority="mangle").replace(
                "type filter", "type route"
            ),
        ),
    )

    def marked() -> int:
        before = _counted(net)
        assert asked(net.c, (net.addresses["h"][4], PORT))
        return _counted(net) - before

    assert marked() > 0
    assert judged(net).verdict == "safe"
    net.h.run(["tc", "qdisc", "add", "dev", "to-r2", "root", "htb"])
    try:
        judgement = judged(net)
    finally:
        net.h.run(["tc", "qdisc", "del", "dev", "to-r2", "root"])
    put(net, judgement.lever)
    assert marked() == 0
    take_away(net)
    assert judgement.verdict == "warn"
    assert any("mark" in reason for reason in judgement.reasons)


def _counted(net: Net) -> int:
    found = re.search(r"counter packets (\d+)", net.h.run(["nft", "list", "table", "inet", "fw"]))
    assert found
    return int(found[1])


# ---- other packets with the same number ------------------------------------------------


def test_own_connections_from_a_served_port_of_the_ephemeral_range(net: Net) -> None:
    reset(net)
    install(net, fw(chain("input", EST + LO + PING + 'iifname "to-s" tcp dport 40000 accept',
                          "drop")))  # fmt: skip
    assert asked(net.s, (net.h.addresses["s"][0], HIGH))
    far, source = (net.addresses["c"][4], PORT), (net.addresses["h"][4], HIGH)
    assert asked(net.h, far, source=source)
    judgement = judged(net, port=HIGH)
    put(net, replace(judgement.lever, shared=False))
    assert not ask(net.h, far, source=source)
    take_away(net)
    assert judgement.verdict in ("safe", "safe-with-rules"), judgement.reasons
    put(net, judgement.lever)
    assert asked(net.s, (net.h.addresses["s"][0], HIGH))
    assert not entries(net, HIGH)
    assert asked(net.h, far, source=source)
    assert {entry.sport for entry in entries(net, HIGH)} == {HIGH}, "it is tracked"
    take_away(net)


def test_others_connections_from_a_forwarded_port_stay_tracked(net: Net) -> None:
    reset(net)
    ports = f"ct state new tcp dport {{ {CLOSED}, {PORT} }} accept"
    install(net, fw(chain("forward", EST + PING + ports, "drop")))
    use, other = (net.addresses["s"][4], PORT), (net.addresses["s"][4], CLOSED)
    source = net.addresses["c"][4], PORT
    assert asked(net.c, use)
    assert asked(net.c, other, source=source)
    judgement = judged(net)
    assert judgement.verdict in ("safe", "safe-with-rules"), judgement.reasons
    every = replace(judgement.lever, peers=())
    put(net, replace(every, shared=False))
    assert not ask(net.c, other, source=source)
    take_away(net)
    put(net, every)
    assert asked(net.c, use)
    assert not entries(net)
    assert asked(net.c, other, source=source)
    assert [entry.dport for entry in entries(net)] == [CLOSED]
    take_away(net)


@pytest.mark.parametrize("family", FAMILIES)
def test_clients_that_come_from_a_called_port(net: Net, family: int) -> None:
    """Gateways give connections any source port above 1023: also that of a service we call."""
    reset(net)
    install(net, fw(chain("input", EST + LO + PING + f"ct state new tcp dport {CLOSED} accept",
                          "drop")))  # fmt: skip
    assert asked(net.h, (net.addresses["c"][family], PORT))
    lever = judged(net).lever
    assert lever.roles == ("client",)
    door, source = (net.addresses["h"][family], CLOSED), (net.addresses["c"][family], PORT)
    assert asked(net.c, door, source=source)
    put(net, replace(lever, ephemeral=(1, 65535)))
    assert not ask(net.c, door, source=source)
    take_away(net)
    put(net, lever)
    assert asked(net.c, door, source=source)
    assert asked(net.h, (net.addresses["c"][family], PORT))
    take_away(net)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_forwarded_to_the_same_port(net: Net, family: int) -> None:
    """A server's rules that are not bound to this host untrack half of others' connections."""
    reset(net)
    install(net, fw(chain("forward", EST + PING + 'iifname "to-r2" ct state new accept', "drop"),
                    chain("input", "ct state invalid counter")))  # fmt: skip
    here, there = ((net.addresses[name][family], PORT) for name in "hs")
    assert asked(net.c, here)
    judgement = judged(net)
    assert (judgement.verdict, judgement.lever.roles) == ("safe", ("server",))
    unbound = script(judgement.lever).replace(" fib daddr type local", "")
    put_text(net, unbound)
    assert not ask(net.c, there)
    take_away(net)
    put(net, judgement.lever)
    assert asked(net.c, there)
    assert asked(net.c, here)
    assert {entry.dst for entry in entries(net)} == {there[0]}
    take_away(net)


def test_several_roles_at_once(net: Net) -> None:
    """The union, each part guarded: everything works and leaves no entry."""
    reset(net)
    install(net, TRACK)
    uses = [
        (node, (address, PORT))
        for family in FAMILIES
        for node, address in (
            (net.c, net.addresses["h"][family]),
            (net.h, net.addresses["c"][family]),
            (net.c, net.addresses["s"][family]),
            (net.h, LOCAL[family]),
        )
    ]
    assert all(ask(node, target) for node, target in uses)
    judgement = judged(net)
    assert judgement.verdict == "safe", judgement.reasons
    assert judgement.lever.roles == ("server", "client", "forward", "loopback")
    put(net, judgement.lever)
    assert all(ask(node, target) for node, target in uses)
    assert not entries(net)
    take_away(net)


def test_a_servers_rules_leave_what_the_host_sends_to_itself(net: Net) -> None:
    """By any of its addresses, and as it was: a user's packets may be redirected."""
    reset(net)
    redirect = f"meta skuid 1337 tcp dport {PORT} redirect to :{BACKEND}"
    install(net, fw(chain("input", "ct state invalid drop\n" + EST
                          + f"ct state new tcp dport {PORT} accept", "drop"),
                    chain("output", redirect, priority="-100").replace(
                        "type filter", "type nat")))  # fmt: skip
    assert asked(net.c, (net.addresses["h"][4], PORT))
    judgement = judged(net)
    assert judgement.verdict in ("safe", "safe-with-rules"), judgement.reasons
    put(net, judgement.lever)
    for address in (LOCAL[4], net.addresses["h"][4]):
        assert asked(net.h, (address, PORT))
        assert [entry.dst for entry in entries(net)] == [address], "it is tracked"
        net.h.run(["conntrack", "-F"], check=False)
    assert asked(net.c, (net.addresses["h"][4], PORT))
    assert not entries(net)
    take_away(net)


def test_rules_of_ours_alone_turn_no_tracking_on() -> None:
    """Also those that learn which connections are translated: they ask for no entry."""
    lever = Notrack("tcp", PORT, ("server", "client", "forward", "loopback"), shared=True)
    with Lab() as lab:
        server, client = lab.namespace("server"), lab.namespace("client")
        lab.link(server, client)
        server.run(["nft", "-f", "-"], stdin=script(lever))
        for address in server.addresses["client"]:
            with tcp_server(server, 9063):
                assert tcp_connections(client, (address, 9063), 5).flows
        assert "0 flow entries" in server.run(["sh", "-c", "conntrack -L 2>&1"])
        server.run(["nft", "add", "table", "inet", "t"])
        server.run(["nft", "-f", "-"], stdin="table inet t {" + chain(
            "input", "ct state invalid counter") + "}")  # fmt: skip
        with tcp_server(server, 9063):
            assert tcp_connections(client, (server.addresses["client"][0], 9063), 5).flows
        assert "0 flow entries" not in server.run(["sh", "-c", "conntrack -L 2>&1"])
