"""Applying on a gateway: what it translates to the service's own port goes on."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest
from kit.changes import PORT, load, make_plan, rules_of
from kit.traffic import tcp_server

from ctrace.change import apply, undo
from ctrace.lab import Lab, Node
from ctrace.plan.plan import Notrack

pytestmark = pytest.mark.kernel
FAR = 443
MOVED = 444
GATEWAY = """
table ip n {
    chain post {
        type nat hook postrouting priority srcnat; policy accept;
        oifname "to-far" iifname "to-inside" masquerade
        oifname "to-far" tcp dport 444 masquerade to :8063
    }
}
"""


def call(inside: Node, far: str) -> socket.socket:
    """A connection from the service's port that is translated on its way."""
    client = inside.socket(socket.AF_INET, socket.SOCK_STREAM)
    client.settimeout(60)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    client.bind((inside.addresses["gate"][0], PORT))
    client.connect((far, FAR))
    return client


def own_call(gate: Node, far: str) -> None:
    """One of the gateway's own, which leaves from the service's port."""
    with gate.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.settimeout(60)
        client.connect((far, MOVED))
        client.sendall(b"x")
        assert client.recv(1) == b"x"


def patient(connection: socket.socket) -> None:
    """Answer the first word, however late it comes."""
    connection.settimeout(60)
    connection.sendall(connection.recv(1))
    connection.recv(1)


def test_translated_connections_survive_apply_and_undo(lab: Lab) -> None:
    """Opened before, during and after; and what they teach the rules is no change of ours."""
    far, gate, inside = (lab.namespace(name) for name in ("far", "gate", "inside"))
    lab.link(far, gate)
    lab.link(gate, inside)
    gate.sysctl("net.ipv4.ip_forward", 1)
    inside.run(["ip", "route", "add", "default", "via", gate.addresses["inside"][0]])
    gate.run(["nft", "-f", "-"], stdin=GATEWAY)
    before, there = rules_of(gate), far.addresses["gate"][0]
    with (
        tcp_server(gate, PORT),
        tcp_server(far, FAR, handle=patient),
        tcp_server(far, MOVED, handle=patient),
        load(far, gate.addresses["far"][0]) as loads,
    ):
        plan = make_plan(gate)
        (lever,) = plan.levers
        assert isinstance(lever, Notrack)
        plan = replace(plan, levers=(replace(lever, shared=True, icmp=False),))
        with call(inside, there) as old:
            trial = apply.start(apply.prepare(plan), 60)
            assert not apply.check(trial).worse
            old.sendall(b"x")
            assert old.recv(1) == b"x"
        own_call(gate, there)
        call(inside, there).close()
        apply.confirm(gate.inum)
        call(inside, there).close()
        assert there in gate.run(["nft", "list", "set", "inet", "ctrace", "others4"])
        gate.run(["nft", "flush", "set", "inet", "ctrace", "others4"])
        assert apply.prepare(plan).present == "permanent"
        call(inside, there).close()
        assert apply.prepare(plan).present == "permanent"
        undo.undo(gate.inum)
        call(inside, there).close()
    assert rules_of(gate) == before
    assert sum(one.failed for one in loads) == 0
