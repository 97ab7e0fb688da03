"""Drops before tracking, on trial, kept, expired and undone, with real connections."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from kit.changes import PORT, TRACKED, make_plan, rules_of
from kit.traffic import tcp_connections, tcp_server, udp_flows

from ctrace.change import apply, undo
from ctrace.dropping import Drop
from ctrace.errors import CtraceError
from ctrace.host import ctnetlink
from ctrace.lab import Lab, Node
from ctrace.plan.plan import alone
from ctrace.ruleset import notrack_nft

pytestmark = pytest.mark.kernel
OTHER = 8064


def hosts(lab: Lab) -> tuple[Node, Node, Node]:
    """A server that tracks, and two clients of it."""
    server, good, bad = (lab.namespace(name) for name in ("server", "good", "bad"))
    lab.link(server, good)
    lab.link(server, bad)
    server.run(["nft", "-f", "-"], stdin=TRACKED)
    return server, good, bad


def taken(source: Node, address: str, n: int, port: int = PORT, timeout: float = 60.0) -> int:
    return len(tcp_connections(source, (address, port), n, timeout=timeout).flows)


def entries(server: Node, port: int, source: str = "") -> int:
    """Of conntrack's own listing."""
    argv = ["conntrack", "-L", "-p", "tcp", "--orig-port-dst", str(port)]
    text = server.run([*argv, *(["-s", source] if source else [])])
    return sum("dport=" in line for line in text.splitlines())


def packets(server: Node) -> dict[str, int]:
    (found,) = undo.applied(server.inum)
    counted: dict[str, int] = {}
    for rule in found.installed.rules:
        counted[rule.drops] = counted.get(rule.drops, 0) + (rule.packets or 0)
    return counted


def test_on_trial_then_kept_then_undone_byte_for_byte(lab: Lab) -> None:
    server, good, bad = hosts(lab)
    before = rules_of(server)
    (from_bad, _), (for_bad, _) = bad.addresses["server"], server.addresses["bad"]
    for_good = server.addresses["good"][0]
    drops = (Drop(sources=(from_bad, "2001:db8::/32")), Drop("tcp", OTHER))
    with tcp_server(server, PORT), tcp_server(server, OTHER):
        assert taken(bad, for_bad, 3) == 3
        assert entries(server, PORT, from_bad) == 3
        plan = replace(make_plan(server), levers=drops)
        trial = apply.start(apply.prepare(plan), 60, flush=True)
        assert taken(bad, for_bad, 1, timeout=0.3) == 0
        assert taken(good, for_good, 3) == 3
        assert taken(good, for_good, 1, OTHER, timeout=0.3) == 0
        assert taken(server, "127.0.0.1", 1, OTHER, timeout=0.3) == 0
        verdict = apply.check(trial)
        assert not verdict.worse
        assert any(line.startswith(f"drop-source {from_bad}: ") for line in verdict.seen)
        apply.confirm(server.inum)
        assert entries(server, PORT, from_bad) == 0, "its old entries were asked to go"
        assert entries(server, OTHER) == 0
        assert taken(bad, for_bad, 1, timeout=0.3) == 0
        assert entries(server, PORT, from_bad) == 0
        counted = packets(server)
        assert counted[f"drop-source {from_bad}"] >= 2
        assert counted["drop-source 2001:db8::/32"] == 0
        assert counted[f"drop-service tcp/{OTHER}"] >= 2
        (kept,) = undo.applied(server.inum)
        assert kept.installed.state == "permanent"
        assert set(kept.installed.services) == set(counted)
        assert apply.prepare(plan).present == "permanent", "once more changes nothing"
        undo.undo(server.inum)
        assert rules_of(server) == before
        assert taken(bad, for_bad, 3) == 3
        assert taken(good, for_good, 1, OTHER) == 1


@pytest.mark.parametrize("each", [True, False])
def test_a_limit_lets_its_rate_through_and_no_more(lab: Lab, each: bool) -> None:
    server, good, bad = hosts(lab)
    limit = Drop("tcp", PORT, rate=1, each=each)
    script = notrack_nft.script(alone(limit, Drop("udp", 53, rate=1, each=each)), 600)
    server.run(["nft", "-f", "-"], stdin=script)
    name = "source" if each else "service"
    with tcp_server(server, PORT):
        passed = taken(bad, server.addresses["bad"][0], 30, timeout=0.05)
        # The rate is nft's business: on a busy machine more than one burst was seen to pass.
        assert server.run(["nft", "list", "ruleset"]).count("limit rate over 1/second") > 1
        dropped = packets(server)[f"limit-{name} tcp/{PORT}"]
        assert dropped >= 10
        assert 1 <= passed <= 30 - dropped
        assert entries(server, PORT) == 30 - dropped, "what was dropped has no entry"
        if each:
            assert taken(good, server.addresses["good"][0], 3) == 3, "its own share is not used up"
        assert taken(server, "127.0.0.1", 30) == 30, "this host's own are not limited"
    udp_flows(bad, (server.addresses["bad"][0], 53), 200)
    until = time.monotonic() + 60
    asked = "-p", "udp", "--orig-port-dst", "53"
    listed = over = 0
    while listed + over != 200:  # on a busy machine some of them are still under way
        assert time.monotonic() < until
        over = packets(server)[f"limit-{name} udp/53"]
        listed = server.run(["conntrack", "-L", *asked]).count("dport=53 ")
    assert over >= 100


def test_a_limit_is_judged_and_kept_under_a_flood(lab: Lab) -> None:
    """Sources that come are remembered in sets, which are no change of the rules."""
    server, _, bad = hosts(lab)
    before = rules_of(server)
    address = server.addresses["bad"][0]
    plan = replace(make_plan(server), levers=(Drop("tcp", PORT, rate=1),))
    with tcp_server(server, PORT):
        trial = apply.start(apply.prepare(plan), 60)
        taken(bad, address, 20, timeout=0.05)
        assert not apply.check(trial).worse
        apply.confirm(server.inum)
        taken(bad, address, 20, timeout=0.05)
        assert apply.prepare(plan).present == "permanent"
        assert packets(server)[f"limit-source tcp/{PORT}"] > 0
        undo.undo(server.inum)
    assert rules_of(server) == before


def test_they_end_by_themselves(lab: Lab) -> None:
    """The kernel disarms them, with nothing of ctrace's alive."""
    server, _, bad = hosts(lab)
    (source, _), (address, _) = bad.addresses["server"], server.addresses["bad"]
    drops = alone(Drop(sources=(source,)), Drop("tcp", PORT, rate=1), Drop("tcp", OTHER))
    with tcp_server(server, PORT), tcp_server(server, OTHER):
        server.run(["nft", "-f", "-"], stdin=notrack_nft.script(drops, 2))
        until = time.monotonic() + 60
        while not taken(bad, address, 1, timeout=0.3):
            assert time.monotonic() < until
        assert taken(bad, address, 20) == 20
        assert taken(bad, address, 1, OTHER) == 1
    assert len(ctnetlink.dump(server.path))


def test_iptables_takes_none(lab: Lab) -> None:
    server, _, _ = hosts(lab)
    plan = replace(make_plan(server, backend="iptables-nft"), levers=(Drop("tcp", PORT),))
    with pytest.raises(CtraceError, match="need nftables"):
        apply.prepare(plan)
