"""What counts as worse after a change: what it broke, not what it set free."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
from types import SimpleNamespace
from typing import cast

import pytest
from kit.changes import PORT, TRACKED, in_background, load, make_plan
from kit.traffic import tcp_connections, tcp_server, udp_flows, udp_server

from ctrace.change import apply, health, undo, watch
from ctrace.host import ctnetlink, netns
from ctrace.lab import Lab, Node
from ctrace.plan.plan import Plan

pytestmark = pytest.mark.kernel
TCP_REPAIR = 19
CLIENTS = 160


def pair(lab: Lab) -> tuple[Node, Node, str]:
    server, client = lab.namespace("server"), lab.namespace("client")
    lab.link(server, client)
    server.run(["nft", "-f", "-"], stdin=TRACKED)
    return server, client, server.addresses["client"][0]


def connected(
    server: Node, client: Node, address: str, n: int
) -> tuple[list[socket.socket], list[socket.socket]]:
    """(server's ends, clients' ends) of ``n`` connections to the service."""
    with server.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, PORT))
        listener.listen(n)
        near, far = [], []
        for _ in range(n):
            end = client.socket(socket.AF_INET, socket.SOCK_STREAM)
            end.connect((address, PORT))
            far.append(end)
            near.append(listener.accept()[0])
    return near, far


@pytest.mark.machine
@pytest.mark.usefixtures("few_places")
@pytest.mark.parametrize("others", ["quiet", "still refused"])
def test_clients_that_were_stuck_are_no_harm(lab: Lab, others: str) -> None:
    """A full table held their packets up; they gave up; now the answers reach nobody."""
    server, client, address = pair(lab)
    dns = client.addresses["server"][0]
    near, far = connected(server, client, address, CLIENTS)
    limit = int(server.sysctl("net.netfilter.nf_conntrack_max"))
    server.run(["conntrack", "-F"], check=False)
    ctnetlink.fill(server.path, limit + 8, target="10.99.0.1", dport=9, timeout=300, state=7)
    for end in far:  # gone without a word, like a client behind a dead link
        end.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        end.close()
    began, sent = time.monotonic(), 0

    def refused() -> None:
        """400 a second by the clock, as other hosts would send however busy this one is."""
        nonlocal sent
        due = int(400 * (time.monotonic() - began)) - sent
        udp_flows(server, (dns, 53), due, first_port=20000 + sent % 40000)
        sent += due
        time.sleep(0.02)

    def answer() -> None:
        """A few more servers' answers: each is sent again after 0.2, 0.4, 0.8 s and so on."""
        for end in near[:8]:
            with contextlib.suppress(OSError):
                end.send(b"late")
            near.append(near.pop(0))
        time.sleep(0.1)

    with contextlib.ExitStack() as stack:
        stack.enter_context(udp_server(client, 53))
        if others != "quiet":
            stack.enter_context(in_background(refused))
        stack.enter_context(in_background(answer))
        time.sleep(1.0)
        told: list[str] = []
        patience = time.monotonic() + 120
        while not told and time.monotonic() < patience:  # on a busy one, some are without
            trial = apply.start(apply.prepare(make_plan(server)), 60)
            verdict = apply.check(trial)
            apply.revert(trial)
            assert not verdict.worse, verdict
            told = [line for line in verdict.seen if line.startswith("resets of established")]
    for end in near:
        end.close()
    assert told, "the resets must have been there, or this proves nothing"
    # how many refusals fall into the last second is chance, so either may be what is said
    said = ["held up"] if others == "quiet" else ["from before", "held up"]
    assert any(words in told[0] for words in said)


def test_datagrams_of_both_families_count(lab: Lab) -> None:
    """/proc/net/snmp has those of IPv4 alone."""
    node = lab.namespace("n")

    def received() -> int:
        with node.enter():
            return health.sample([]).counters["Udp.InDatagrams"]

    before, until = received(), time.monotonic() + 60
    with udp_server(node, 9000, reply=False):
        for to in ("127.0.0.1", "::1"):
            udp_flows(node, (to, 9000), 5)
        while received() - before < 10 and time.monotonic() < until:
            time.sleep(0.01)
    assert received() - before == 10


def test_fresh_failures_of_others_count(lab: Lab) -> None:
    """Nothing was refused before, and connections that began since fail: that is ours."""
    server, client, address = pair(lab)
    there = client.addresses["server"][0]
    with tcp_server(server, PORT), load(client, address):
        for _ in range(5):  # on a busy machine a second may pass with few of them
            trial = apply.start(apply.prepare(make_plan(server)), 60)
            # Nobody listens there: each is answered with a reset.
            with in_background(lambda: tcp_connections(server, (there, 9), 5)):
                verdict = apply.check(trial)
            apply.revert(trial)
            rose = any("failed connection attempts rose" in line for line in verdict.worse)
            if rose:
                break
    assert rose, verdict
    assert not undo.applied(server.inum)


def test_rules_that_something_else_removed_are_missed(lab: Lab) -> None:
    server, client, address = pair(lab)
    with tcp_server(server, PORT), load(client, address):
        trial = apply.start(apply.prepare(make_plan(server)), 60)
        server.run(["nft", "delete", "table", "inet", "ctrace"])
        verdict = apply.check(trial)
        apply.revert(trial)
    assert any("the rules are gone" in line for line in verdict.worse)


@pytest.mark.parametrize("refused", [0, 3])
def test_a_full_table_is_not_taken_for_a_service_that_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    """Connections of ctrace's own are refused there like all others."""
    drops, clock = itertools.count(0, refused), itertools.count(0.0, 1.0)

    def sample(_: watch.Watch) -> tuple[health.Sample, str]:
        return health.Sample(next(clock), {health.REFUSED: next(drops)}), "active"

    monkeypatch.setattr(watch, "answering", lambda _: frozenset())
    monkeypatch.setattr(watch.Watch, "_sample", sample)
    plan = cast(Plan, SimpleNamespace(levers=()))
    before = health.Before(dict.fromkeys(health.BAD, float(refused)), 0)
    here = netns.Way(os.stat("/proc/self/ns/net").st_ino)
    looks = watch.Watch(plan, here, before, (("192.0.2.1", PORT),))
    worse = [one for _ in range(3) for one in looks.look().worse]
    assert any("not taken any more" in one for one in worse) == (not refused)
