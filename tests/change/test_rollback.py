"""Connections that were opened during a trial outlive its end, whatever the firewall is."""

from __future__ import annotations

import socket

import pytest
from kit.changes import PORT, TRACKED, make_plan, rules_of
from kit.traffic import tcp_server

from ctrace.change import apply, notes
from ctrace.lab import Lab, Node

pytestmark = pytest.mark.kernel
INVALID = """
table inet fw {
    chain in { type filter hook input priority 0; ct state invalid drop; }
    chain out { type filter hook output priority 0; ct state invalid counter; }
}
"""
NO_SYN = """
table inet fw {
    chain in {
        type filter hook input priority 0;
        tcp flags & (fin | syn | rst | ack) != syn ct state new drop
    }
    chain out { type filter hook output priority 0; ct state invalid counter; }
}
"""
STATEFUL = """
table inet fw {
    chain in {
        type filter hook input priority 0; policy drop;
        ct state established,related accept
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
        ct state untracked tcp sport 8063 tcp flags & (syn | ack) != syn accept
    }
    chain out { type filter hook output priority 0; ct state invalid counter; }
}
"""
RESETS = """
table inet fw {
    chain in {
        type filter hook input priority 0; policy drop;
        ct state established,related accept
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
        ct state untracked tcp dport 8063 accept
        tcp flags & (fin | syn | rst | ack) == syn ct state new tcp dport 8063 accept
        meta l4proto tcp reject with tcp reset
    }
    chain out { type filter hook output priority 0; ct state invalid counter; }
}
"""
CASES = {
    "loose": (TRACKED, 1, "server"),
    "not loose": (INVALID, 0, "server"),
    "new without SYN": (NO_SYN, 1, "server"),
    "resets what is new without SYN": (RESETS, 1, "server"),
    "a client that waits": (STATEFUL, 1, "client"),
}


def echo(connection: socket.socket) -> None:
    connection.settimeout(60)
    while data := connection.recv(64):
        connection.sendall(data)


@pytest.mark.parametrize("case", CASES)
def test_a_connection_that_began_during_the_trial(lab: Lab, case: str) -> None:
    rules, loose, role = CASES[case]
    host, other = lab.namespace("host"), lab.namespace("other")
    lab.link(host, other)
    host.run(["nft", "-f", "-"], stdin=rules)
    host.sysctl("net.netfilter.nf_conntrack_tcp_loose", loose)
    server, client = (host, other) if role == "server" else (other, host)
    prepared = apply.prepare(make_plan(host, roles=(role,)))
    assert not prepared.warnings
    with tcp_server(server, PORT, handle=pushed if role == "client" else echo):
        trial = apply.start(prepared, 60)
        with connected(client, server.addresses[client.name][0]) as connection:
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
            apply.revert(trial)
            # A server that speaks next, and a client that does.
            if role == "server":
                connection.sendall(b"y")
            assert heard(connection)
            assert host.count() > 0, "it is tracked again"


def pushed(connection: socket.socket) -> None:
    """Answer, and a second later speak unasked."""
    connection.settimeout(60)
    connection.sendall(connection.recv(1))
    connection.settimeout(1)
    try:
        connection.recv(1)
    except TimeoutError:
        connection.sendall(b"later")
    connection.settimeout(60)
    connection.recv(1)


def connected(node: Node, address: str) -> socket.socket:
    client = node.socket(socket.AF_INET, socket.SOCK_STREAM)
    client.settimeout(60)
    client.connect((address, PORT))
    return client


def heard(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(8))
    except OSError:
        return False


def test_where_no_guard_can_be_started_nothing_is_left(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a host that has no process left to give."""

    def full(_inum: int) -> None:
        raise BlockingIOError("no more processes")

    node = lab.namespace("node", track=True)
    before = rules_of(node)
    monkeypatch.setattr(apply, "start_guard", full)
    with pytest.raises(BlockingIOError):
        apply.start(apply.prepare(make_plan(node)), 60)
    assert rules_of(node) == before
    assert notes.read(node.inum) is None
