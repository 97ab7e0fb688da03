"""What only some packets meet: users of this host, programs, limits, sets."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import threading
from collections.abc import Iterator

import pytest
from kit.rulesets.cases import RULES
from kit.rulesets.net import Net, ask, asked, entries, install, put, reset, take_away
from kit.rulesets.services import ABORT, CLOSED, PATIENCE, PORT
from kit.rulesets.texts import EST, LO, PING, XT_EST, XT_ICMP, XT_LO, chain, fw, xt, xt_filter
from kit.rulesets.verdicts import bare, judged

from ctrace.lab import Node

pytestmark = pytest.mark.kernel
# ---- users of this host ------------------------------------------------------------------

USER, USERS_PORT = 33, 8064
_libc = ctypes.CDLL(None)


@contextlib.contextmanager
def as_user(ids: int) -> Iterator[None]:
    """This thread's new files are that user's and group's."""
    _libc.setfsgid(ids)
    _libc.setfsuid(ids)
    try:
        yield
    finally:
        _libc.setfsuid(0)
        _libc.setfsgid(0)


@contextlib.contextmanager
def serving_as(node: Node, ids: int, port: int) -> Iterator[None]:
    with node.enter(), as_user(ids):
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)

    def run() -> None:
        with contextlib.suppress(OSError), as_user(ids):  # what is accepted is of who accepts it
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b"u" * len(connection.recv(2)) * 2)

    with server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", port))
        server.listen(16)
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield
        server.shutdown(socket.SHUT_RDWR)
        thread.join(60)


@pytest.mark.parametrize("word", ["skuid", "skgid"])
def test_a_user_who_may_only_answer(net: Net, word: str) -> None:
    """Its service's replies pass by state, before what stops everything else of that user."""
    reset(net)
    install(net, fw(chain("output", f"{EST}meta {word} {USER} reject")))
    door = (net.addresses["h"][4], USERS_PORT)
    with serving_as(net.h, USER, USERS_PORT):
        assert ask(net.c, door)
        judgement = judged(net, port=USERS_PORT)
        assert judgement.verdict == RULES, judgement.reasons
        put(net, bare(judgement))
        assert not ask(net.c, door)
        take_away(net)
        put(net, judgement.lever)
        net.h.run(["conntrack", "-F"], check=False)
        assert ask(net.c, door)
        assert not entries(net, USERS_PORT)
    take_away(net)


# ---- what only some packets meet ------------------------------------------------------


def test_an_address_on_lo_that_others_call(net: Net) -> None:
    """As a balancer's or anycast: nobody called it while the table was read."""
    reset(net)
    anycast = "192.0.2.55"
    rules = f"ip saddr {anycast} ct state established accept\nip saddr {anycast} drop"
    install(net, fw(chain("output", rules)))
    net.h.run(["ip", "addr", "add", f"{anycast}/32", "dev", "lo"])
    try:
        assert ask(net.c, (net.addresses["h"][4], PORT))
        judgement = judged(net)
        assert judgement.verdict == RULES, judgement.reasons
        assert ask(net.c, (anycast, PORT))
        put(net, bare(judgement))
        assert not ask(net.c, (anycast, PORT))
        take_away(net)
        put(net, judgement.lever)
        assert ask(net.c, (anycast, PORT))
        take_away(net)
    finally:
        net.h.run(["ip", "addr", "del", f"{anycast}/32", "dev", "lo"])


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_a_program_that_decides_about_new_connections(net: Net, variant: str) -> None:
    """Nobody listens here, so without a bypass nothing is let in: untracked packets are."""
    queue = "-A INPUT -p tcp --dport 8063 -m conntrack --ctstate NEW -j NFQUEUE --queue-num 9"
    door = (net.addresses["h"][4], PORT)
    reset(net)
    install(net, xt(variant, f"*filter\n{queue} --queue-bypass\nCOMMIT\n"))
    assert ask(net.c, door)
    judgement = judged(net)
    reset(net)
    install(net, xt(variant, f"*filter\n{queue}\nCOMMIT\n"))
    assert not ask(net.c, door)
    put(net, bare(judgement))
    assert ask(net.c, door)
    take_away(net)
    assert judgement.verdict == "unsafe", judgement.reasons


SCARCE = "1/minute"
XT_FEW = f"{XT_EST}{XT_LO}{XT_ICMP}-A INPUT -p tcp --dport 8063"
NO_V6 = "*filter\nCOMMIT\n"
FEW = {
    "nft limit": fw(chain("input", EST + LO + PING + f"tcp dport 8063 limit rate {SCARCE} burst 5 "
                          "packets accept\ndrop")),
    "nft quota": fw(chain("input", EST + LO + PING + "tcp dport 8063 quota until 9 kbytes accept",
                          "drop")),
    "iptables-nft limit": xt("nft", xt_filter(f"{XT_FEW} -m limit --limit {SCARCE} --limit-burst "
                                              "5 -j ACCEPT\n"), NO_V6),
    "iptables-legacy quota": xt("legacy", xt_filter(f"{XT_FEW} -m quota --quota 9000 -j ACCEPT\n"),
                                NO_V6),
}  # fmt: skip


@pytest.mark.parametrize("name", FEW)
def test_a_limit_that_only_first_packets_meet(net: Net, name: str) -> None:
    """The others pass by state, before it: once untracked, all would count."""
    reset(net)
    install(net, FEW[name])
    door = (net.addresses["h"][4], PORT)
    assert ask(net.c, door, b"u")
    judgement = judged(net)
    put(net, bare(judgement))
    assert not ask(net.c, door, b"u")
    reset(net)
    install(net, FEW[name])
    if judgement.verdict == "unsafe":
        assert "legacy" in name, judgement.reasons
        assert any("asked about every packet" in reason for reason in judgement.reasons)
        return
    assert judgement.verdict == RULES, judgement.reasons
    put(net, judgement.lever)
    assert ask(net.c, door, b"u")
    assert not entries(net)
    take_away(net)


def test_a_set_that_new_connections_fill(net: Net) -> None:
    """Who uses the service is let in elsewhere for a while."""
    reset(net)
    rules = (
        EST
        + LO
        + PING
        + (
            "tcp dport 8063 ct state new update @seen { ip saddr }\n"
            "tcp dport 8063 accept\nip saddr @seen tcp dport 22 accept"
        )
    )
    install(
        net,
        fw(
            chain("input", rules, "drop"),
            extra="set seen { type ipv4_addr; flags dynamic,timeout; timeout 5m; }\n",
        ),
    )
    at = net.addresses["h"][4]
    assert ask(net.c, (at, PORT))
    assert ask(net.c, (at, CLOSED))
    judgement = judged(net)
    net.h.run(["nft", "flush", "set", "inet", "fw", "seen"])
    put(net, judgement.lever)
    assert ask(net.c, (at, PORT))
    assert not ask(net.c, (at, CLOSED))
    take_away(net)
    assert judgement.verdict == "unsafe", judgement.reasons
    assert any("set fw seen" in reason for reason in judgement.reasons)


@pytest.mark.parametrize("tool", ["nft", "legacy"])
def test_resets_of_open_connections_arrive(net: Net, tool: str) -> None:
    """Of those that no connection has are dropped, as scripts against scans do: untracked, all."""
    old = "-A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT\n"
    drop = {
        "nft": fw(chain("input", EST + "tcp flags & rst == rst counter drop")),
        "legacy": xt("legacy", xt_filter(old + "-A INPUT -p tcp --tcp-flags RST RST -j DROP\n",
                                         inp="ACCEPT")),
    }  # fmt: skip
    reset(net)
    install(net, drop[tool])
    server = (net.addresses["h"][4], PORT)
    assert asked(net.c, server)
    judgement = judged(net)
    assert judgement.verdict == "safe-with-rules", judgement.reasons
    assert "reset" in str(judgement.reasons)
    put(net, judgement.lever)
    with net.h.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((server[0], PORT))
        listener.listen()
        client = net.c.socket(socket.AF_INET, socket.SOCK_STREAM)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        client.connect(server)
        listener.settimeout(PATIENCE)
        served, _ = listener.accept()
        client.close()
        served.settimeout(PATIENCE)
        with served, pytest.raises(ConnectionResetError):
            served.recv(1)
    take_away(net)
