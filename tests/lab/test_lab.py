"""The namespaces that everything else is tested in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from kit.traffic import tcp_connections, tcp_server, udp_flows, udp_server

from ctrace.lab import Lab

pytestmark = pytest.mark.kernel


def test_traffic_makes_the_entries_that_it_says() -> None:
    with Lab() as lab:
        server, client = lab.namespace("server", track=True), lab.namespace("client", track=True)
        lab.link(client, server)
        for address in server.addresses["client"]:
            before = server.count()
            with tcp_server(server, 8063), udp_server(server, 8125, reply=False):
                tcp = tcp_connections(client, (address, 8063), 20)
                udp = udp_flows(client, (address, 8125), 30)
            assert (len(tcp.flows), len(udp.flows)) == (20, 30)
            assert tcp.failed == udp.failed == 0
            assert server.count() - before >= 50
        listed = client.run(["conntrack", "-L", "-p", "tcp"])
        assert all(f"sport={flow.sport} " in listed for flow in tcp.flows if "." in flow.src)


def test_nothing_outlives_a_killed_process() -> None:
    code = (
        "from ctrace.lab import Lab\nimport time\n"
        "lab = Lab(); n = lab.namespace('x')\n"
        "print(n.holder.pid, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    holder = int(child.stdout.readline())
    assert os.path.exists(f"/proc/{holder}")
    child.send_signal(signal.SIGKILL)
    child.wait()
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{holder}/ns/net") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{holder}/ns/net")
