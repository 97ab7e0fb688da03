"""A timeout policy for one port, really applied: whom it reaches, and whom it does not."""

from __future__ import annotations

import re
import socket
import threading
import time
from dataclasses import replace

import pytest
from kit.changes import PORT, TRACKED, make_plan
from kit.traffic import tcp_connections, tcp_server

from ctrace.advice.alternatives import POLICY
from ctrace.change import apply, undo
from ctrace.lab import Lab, Node
from ctrace.plan.plan import CtTimeout

pytestmark = pytest.mark.kernel
OTHER = 9000
TIME_WAIT = "TIME_WAIT"


def left(node: Node, port: int) -> dict[int, tuple[str, float]]:
    """Source port to (TCP state, seconds until the timeout) of a service's entries."""
    text = node.run(["conntrack", "-L", "-p", "tcp", "--orig-port-dst", str(port)])
    lines = re.findall(r"^tcp +6 (\d+) (\w+) src=\S+ dst=\S+ sport=(\d+)", text, re.M)
    return {int(sport): (state, float(seconds)) for seconds, state, sport in lines}


def at_once(connection: socket.socket) -> None:
    """Answer every line in a thread: one connection is kept open beside the others."""
    mine = connection.dup()

    def answer() -> None:
        with mine:
            while mine.recv(64):
                mine.sendall(b"ok\n")

    threading.Thread(target=answer, daemon=True).start()


@pytest.mark.parametrize("role", ["server", "client", "loopback", "forward"])
def test_new_connections_have_it_and_older_ones_never(lab: Lab, role: str) -> None:
    """nft_ct_timeout_obj_eval leaves confirmed entries alone, whatever packets follow."""
    far, here, near = (lab.namespace(name) for name in ("far", "here", "near"))
    lab.link(far, here)
    lab.link(here, near)
    here.run(["nft", "-f", "-"], stdin=TRACKED)
    here.sysctl("net.ipv4.ip_forward", 1)
    far.run(["ip", "route", "add", "default", "via", here.addresses["far"][0]])
    near.run(["ip", "route", "add", "default", "via", here.addresses["near"][0]])
    source, server, target = {
        "server": (far, here, here.addresses["far"][0]),
        "client": (here, near, near.addresses["here"][0]),
        "forward": (far, near, near.addresses["here"][0]),
        "loopback": (here, here, "127.0.0.1"),
    }[role]
    old = int(here.sysctl("net.netfilter.nf_conntrack_tcp_timeout_time_wait"))
    new = dict(POLICY["tcp"])["time_wait"]
    assert old > 10 * new
    with tcp_server(server, PORT, handle=at_once), tcp_server(server, OTHER):
        first = tcp_connections(source, (target, PORT), 5).flows
        living = source.socket(socket.AF_INET, socket.SOCK_STREAM)
        living.settimeout(60)
        living.connect((target, PORT))
        lever = CtTimeout("tcp", PORT, (role,), POLICY["tcp"])
        trial = apply.start(apply.prepare(replace(make_plan(here), levers=(lever,))), 60)
        assert not apply.check(trial).worse
        second = tcp_connections(source, (target, PORT), 5).flows
        others = tcp_connections(source, (target, OTHER), 5).flows
        name = living.getsockname()[1]
        living.sendall(b"hi\n")  # refreshed under the policy, and then closed under it
        living.recv(64)
        living.close()
        until = time.monotonic() + 60
        while left(here, PORT)[name][0] != TIME_WAIT and time.monotonic() < until:
            time.sleep(0.02)
        found, beside = left(here, PORT), left(here, OTHER)
    for flow in second:
        state, seconds = found[flow.sport]
        assert state == TIME_WAIT
        assert seconds <= new
    for flow in first:
        assert found[flow.sport][1] > old - 30
    assert found[name][0] == TIME_WAIT
    assert found[name][1] > old - 30, "an entry from before never takes the policy"
    assert all(beside[flow.sport][1] > old - 30 for flow in others)
    undo.undo(here.inum)
