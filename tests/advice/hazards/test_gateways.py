"""A service's port that translated connections come from, too, and calls that begin there."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from dataclasses import replace
from ipaddress import ip_address

import pytest
from kit.rulesets.cases import RULES, SAFE
from kit.rulesets.net import (
    Net,
    ask,
    echo,
    entries,
    forget_paths,
    install,
    put,
    reset,
    seen,
    take_away,
    verdict_on,
)
from kit.rulesets.services import ABORT, FAMILIES, PORT, WAIT, serving
from kit.rulesets.texts import EST, LO, PING, TRACK, Setup, chain, fw, nft, xt
from kit.rulesets.tool.words import VIP
from kit.rulesets.verdicts import judged

from ctrace.advice.hazards import to_many
from ctrace.advice.roles import subject
from ctrace.advice.subject import Subject
from ctrace.plan.plan import Notrack
from ctrace.rehearsal.snapshot import take

pytestmark = pytest.mark.kernel
TOOLS = ("nft", "iptables-nft", "iptables-legacy")
FAR = 7065

# ---- a port that masqueraded connections come from, too ---------------------------------

INSIDE = {4: "10.77.4.2", 6: "fd77:4::2"}
FIREWALL = fw(chain("input", "ct state invalid drop\n" + EST + LO + PING
                    + "meta l4proto { tcp, udp } th dport 8063 accept", "drop"))  # fmt: skip


def masquerade(tool: str, proto: str, to: str = "") -> Setup:
    """Everything from behind ``h`` gets its address; with ``to`` that port, too."""
    if tool == "nft":
        return nft("".join(
            f"table {family} n {{ chain post {{ type nat hook postrouting priority 100;\n"
            f'{family} saddr {INSIDE[version]} oifname "to-r2" meta l4proto {proto} masquerade'
            f"{f' to :{to}' if to else ''}\n}}\n}}\n"
            for family, version in (("ip", 4), ("ip6", 6))
        ))  # fmt: skip
    v4, v6 = (
        f"*nat\n-A POSTROUTING -s {net} -o to-r2 -p {proto} -j MASQUERADE"
        f"{f' --to-ports {to}' if to else ''}\nCOMMIT\n"
        for net in INSIDE.values()
    )
    return xt(tool.removeprefix("iptables-"), v4, v6)


def through(net: Net, proto: str, family: int, port: int, what: bytes = b"s") -> bytes:
    """Another host's connection through ``h``, which must arrive with ``h``'s address."""
    far, source = net.addresses["c"][family], (net.addresses["s"][family], port)
    net.h.run(["conntrack", "-F"], check=False)
    if proto == "tcp":
        return ask(net.s, (far, PORT), what, source=source)

    def once(server: socket.socket) -> None:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        asked, info, _, peer = server.recvmsg(64, 256)
        if not asked:  # it was shut down
            raise OSError
        # Only the question is answered: two echo services would go on for ever.
        if asked == b"hello":
            server.sendmsg([b"far"], info, 0, peer)

    with serving(net.c, socket.SOCK_DGRAM, FAR, once):
        return echo(net.s, (far, FAR), source=source)


@pytest.mark.parametrize("chosen", ["by the host", "by the rule"])
@pytest.mark.parametrize("proto", ["tcp", "udp"])
@pytest.mark.parametrize("tool", TOOLS)
def test_a_gateways_own_service(net: Net, tool: str, proto: str, chosen: str) -> None:
    """Another host's connection, translated to the service's port, keeps its replies."""
    reset(net)
    by_rule = chosen == "by the rule"
    install(net, (*masquerade(tool, proto, str(PORT) if by_rule else ""), *FIREWALL))
    use = ask if proto == "tcp" else echo
    port = 50_505 if by_rule else PORT
    assert all(use(net.c, (net.addresses["h"][family], PORT)) for family in FAMILIES)
    judgement = judged(net, proto)
    lever = judgement.lever
    assert judgement.verdict == RULES, judgement.reasons
    assert any(f"to port {PORT}: the rules recognise" in reason for reason in judgement.reasons)

    def works(what: bytes = b"s") -> list[bool]:
        found = []
        for family in FAMILIES:
            found.append(bool(through(net, proto, family, port, what)))
            left = [e for e in entries(net, None) if e.src == net.addresses["s"][family]]
            if found[-1]:
                assert [(e.reply_dst, e.reply_dport) for e in left] == [
                    (net.h.addresses["r2"][family == 6], PORT)
                ]
        return found

    assert works() == [True, True]
    put(net, replace(lever, shared=False, icmp=True, accepts=()))
    assert works() == [False, False]
    take_away(net)
    put(net, lever)
    assert works() == [True, True]
    if proto == "tcp":
        # Path MTU errors about either reach whom they are for.
        forget_paths(net)
        assert works(b"u") == [True, True]
        forget_paths(net)
        hosts = net.addresses["h"]
        assert all(ask(net.c, (hosts[family], PORT), b"d") for family in FAMILIES)
    net.h.run(["conntrack", "-F"], check=False)
    assert all(use(net.c, (net.addresses["h"][family], PORT)) for family in FAMILIES)
    assert not entries(net)
    take_away(net)


def test_a_clusters_address_with_the_services_own_port(net: Net) -> None:
    """Whoever calls it is led to this host: by the port alone that looks like the service."""
    reset(net)
    install(net, (*nft("table ip n { chain pre { type nat hook prerouting priority -100;\n"
                       f"ip daddr {VIP} tcp dport 8063 dnat to 10.77.3.2\n}}\n}}\n"),
                  *FIREWALL))  # fmt: skip
    direct, through_it = (net.addresses["h"][4], PORT), (VIP, PORT)
    assert ask(net.c, direct)
    judgement = judged(net)
    assert judgement.verdict == RULES, judgement.reasons
    lever = judgement.lever
    assert ask(net.c, through_it)
    put(net, replace(lever, shared=False, accepts=()))
    assert not ask(net.c, through_it)
    take_away(net)
    put(net, lever)
    assert ask(net.c, through_it)
    net.h.run(["conntrack", "-F"], check=False)
    assert ask(net.c, direct)
    assert not entries(net)
    take_away(net)


def test_a_gateways_rules_survive_a_reload(net: Net) -> None:
    """As when somebody saves the ruleset for the next boot."""
    reset(net)
    install(net, (*masquerade("nft", "tcp"), *TRACK))
    assert ask(net.c, (net.addresses["h"][4], PORT))
    put(net, judged(net).lever)
    assert through(net, "tcp", 4, PORT)
    saved = net.h.run(["nft", "list", "ruleset"])
    assert net.addresses["c"][4] in saved  # the far end is remembered
    net.h.run(["nft", "-f", "-"], stdin=f"flush ruleset\n{saved}")
    assert through(net, "tcp", 4, PORT)


def test_a_hosts_own_call_that_gets_the_port_keeps_its_entry(net: Net) -> None:
    reset(net)
    rule = 'oifname "to-r2" tcp sport 1024-65535 masquerade to :8063'
    install(net, (*nft("table ip n { chain post { type nat hook postrouting priority 100;\n"
                       f"{rule}\n}}\n}}\n"), *TRACK))  # fmt: skip
    assert ask(net.c, (net.addresses["h"][4], PORT))
    judgement = judged(net)
    far = (net.addresses["c"][4], PORT)
    assert ask(net.h, far)
    put(net, judgement.lever)
    assert ask(net.h, far)
    net.h.run(["conntrack", "-F"], check=False)
    assert ask(net.c, (net.addresses["h"][4], PORT))
    assert not entries(net)  # the service itself is untracked
    take_away(net)
    assert judgement.lever.shared
    # Several such calls to one service want the same port, tracked: that isn't taken for safe.
    assert judgement.verdict == "unsafe"
    assert {one["role"] for one in judgement.evidence["differed"]} == {"client"}


def test_a_connection_that_is_translated_to_the_port_now(net: Net) -> None:
    reset(net)
    install(net, (*masquerade("nft", "tcp"), *TRACK))
    assert ask(net.c, (net.addresses["h"][4], PORT))
    about = replace(subject(seen(net), net.local, (32768, 60999), True, ()), shared_now=True)
    judgement = verdict_on(about, net.h.path)
    assert judgement.verdict == "unsafe"
    assert "right now" in judgement.reasons[0]


# ---- a host behind the router that calls out from the service's port -------------------


CALLS = {
    "by state": (fw(chain("forward", EST + PING + "tcp dport 8063 accept\n"
                          'ct state new iifname "to-s" accept', "drop")), RULES, True),
    "masqueraded": (nft("table ip n { chain post { type nat hook postrouting priority 100;\n"
                        'oifname "to-r2" tcp dport 22 masquerade\n}\n}\n'), SAFE, True),
    "stateless": ((*TRACK, *nft("table inet f {" + chain(
        "forward", EST + PING + 'tcp dport 8063 accept\niifname "to-s" accept', "drop"
    ) + "}")), SAFE, True),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_server_behind_the_router_calls_from_its_port(net: Net, name: str) -> None:
    setup, verdict, works = CALLS[name]
    reset(net)
    install(net, setup)

    def who_asks(server: socket.socket) -> None:
        connection, peer = server.accept()
        with connection, contextlib.suppress(ConnectionError):
            connection.sendall(peer[0].removeprefix("::ffff:").encode())
            connection.recv(1)

    def call() -> str:
        with net.s.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(WAIT)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            client.bind((net.addresses["s"][4], PORT))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            with contextlib.suppress(OSError):
                client.connect((net.addresses["c"][4], 22))
                return client.recv(64).decode()
            return ""

    with serving(net.c, socket.SOCK_STREAM, 22, who_asks):
        seen_as = net.h.addresses["r2"][0] if name == "masqueraded" else net.addresses["s"][4]
        assert call() == seen_as
        net.h.run(["conntrack", "-F"], check=False)
        assert ask(net.c, (net.addresses["s"][4], PORT))
        judgement = judged(net)
        put(net, judgement.lever)
        assert (call() == seen_as) == works
        assert ask(net.c, (net.addresses["s"][4], PORT))
        take_away(net)
    assert judgement.lever.roles == ("forward",)
    assert judgement.verdict == verdict
    differed = judgement.evidence["differed"]
    assert works or any(f":{PORT} -> " in one["of"] for one in differed)


def expires(net: Net, name: str) -> int:
    """Seconds until a set of ours forgets the only end in it; 0: nothing is there."""
    said = json.loads(net.h.run(["nft", "-j", "list", "set", "inet", "ctrace", name]))["nftables"]
    every = [one for part in said for one in part.get("set", {}).get("elem", ())]
    return max((int(one["elem"]["expires"]) for one in every), default=0)


@pytest.mark.parametrize(
    ("name", "role", "caller"), [("others4", "server", "h"), ("calls4", "forward", "s")]
)
def test_a_call_from_the_port_is_remembered_while_it_talks(
    net: Net, name: str, role: str, caller: str
) -> None:
    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(connection.recv(1))
            connection.recv(1)

    reset(net)
    install(net, TRACK)
    put(net, Notrack("tcp", PORT, (role,), shared=True, icmp=False))
    node, deadline = {"h": net.h, "s": net.s}[caller], time.monotonic() + 60
    with (
        serving(net.c, socket.SOCK_STREAM, FAR, answer),
        node.socket(socket.AF_INET, socket.SOCK_STREAM) as client,
    ):
        client.settimeout(WAIT * 10)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        client.bind((net.addresses[caller][4], PORT))
        client.connect((net.addresses["c"][4], FAR))
        left = first = expires(net, name)
        assert first > 86400
        while left > first - 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
            left = expires(net, name)
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        assert expires(net, name) > left
    take_away(net)


@pytest.mark.parametrize(
    ("target", "many"),
    [("224.0.0.251", True), ("255.255.255.255", True), ("10.77.9.255", True), ("ff02::fb", True),
     ("10.77.3.2", False), ("fd77:3::2", False)],
)  # fmt: skip
def test_what_goes_to_many_at_once_is_not_judged(net: Net, target: str, many: bool) -> None:
    more = ["10.77.9.1/24", "brd", "10.77.9.255", "dev", "to-r2"]
    net.h.run(["ip", "addr", "add", *more])
    flow = "server", b"\x0a\x4d\x03\x01", 40000, ip_address(target).packed, 5353
    found = list(to_many(Subject("udp", 5353, ("server",), flows=(flow,)), take(net.h.path)))
    net.h.run(["ip", "addr", "del", *more])
    assert [one.level for one in found] == ["unknown"] * many
    assert all(target in one.text for one in found)
