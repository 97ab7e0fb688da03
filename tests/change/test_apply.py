"""Applying, watching, confirming and undoing, with real connections."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from kit.changes import PORT, STRICT, TRACKED, load, make_plan, rules_of
from kit.traffic import tcp_connections, tcp_server, udp_flows, udp_server

from ctrace.change import apply, undo
from ctrace.errors import CtraceError
from ctrace.host import ctnetlink
from ctrace.lab import Lab, Node
from ctrace.plan.plan import Accept

pytestmark = pytest.mark.kernel

BACKENDS = ("nft", "iptables-nft", "iptables-legacy")

# The same firewall three times: what serves the port to tracked packets only, and the
# accept that a plan adds before the rule that would drop.
FIREWALLS = {
    "nft": (STRICT, Accept("nft", "inet", "fw", "in", -1, "input", "server", "to")),
    "iptables-nft": (
        "*filter\n:INPUT ACCEPT [0:0]\n:svc - [0:0]\n"
        "-A INPUT -i lo -j ACCEPT\n"
        "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n"
        "-A INPUT -j svc\n-A INPUT -j DROP\n"
        f"-A svc -p tcp -m conntrack --ctstate NEW -m tcp --dport {PORT} -j ACCEPT\nCOMMIT\n",
        Accept("iptables-nft", "ip", "filter", "INPUT", 3, "input", "server", "to"),
    ),
    "iptables-legacy": (
        "*filter\n:INPUT DROP [0:0]\n"
        "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n"
        f"-A INPUT -p tcp -m conntrack --ctstate NEW -m tcp --dport {PORT} -j ACCEPT\nCOMMIT\n",
        Accept("iptables-legacy", "ip", "filter", "INPUT", -1, "input", "server", "to"),
    ),
}


def pair(lab: Lab, rules: str = TRACKED) -> tuple[Node, Node, str]:
    """A server, a client, and the server's address."""
    server, client = lab.namespace("server"), lab.namespace("client")
    lab.link(server, client)
    if rules.startswith("*"):
        server.run(["iptables-nft-restore"], stdin=rules)
    else:
        server.run(["nft", "-f", "-"], stdin=rules)
    return server, client, server.addresses["client"][0]


def undated(rules: str) -> str:
    """Without the ends of leases, which the guard puts off meanwhile."""
    return re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d", "DATE", rules)


@pytest.mark.machine
@pytest.mark.usefixtures("few_places")
def test_the_incident_ends(lab: Lab) -> None:
    """A full table refuses innocent UDP; the plan frees it; nothing that worked breaks."""
    server, client, address = pair(lab)
    dns = client.addresses["server"][0]
    limit = int(server.sysctl("net.netfilter.nf_conntrack_max"))
    with tcp_server(server, PORT), udp_server(client, 53), udp_server(client, 54):
        # What the service leaves in a few minutes of such traffic: ASSURED, in TIME_WAIT.
        ctnetlink.fill(server.path, limit - 40, target=address, dport=PORT, timeout=120, state=7)
        with load(client, address) as loads:
            deadline = time.monotonic() + 60
            refused, port = 0, 20000
            while not refused and time.monotonic() < deadline:
                refused = len(udp_flows(server, (dns, 53), 40, first_port=port).refused)
                port += 40
            assert refused, "the table is full, so DNS must be refused"

            trial = apply.start(apply.prepare(make_plan(server)), 60, flush=True)
            assert not apply.check(trial).worse
            apply.confirm(server.inum)

            before = ctnetlink.dump(server.path)
            done = [one.done for one in loads]
            failed = sum(one.failed for one in loads)
            sent = udp_flows(server, (dns, 54), 40, first_port=50000)
            assert not sent.refused
            assert len(sent.flows) == 40
            while any(one.done < n + 20 for one, n in zip(loads, done, strict=True)):
                time.sleep(0.02)
            after = ctnetlink.dump(server.path)
            new = after[after["dport"] == PORT]
            assert not len(new), "the service makes no entries any more"
            assert len(after[after["sport"] == PORT]) == 0
            assert len(before) < limit / 2
        assert sum(one.failed for one in loads) == failed
    undo.undo(server.inum)


@pytest.mark.parametrize("backend", BACKENDS)
def test_confirmed_then_undone_byte_for_byte(lab: Lab, backend: str) -> None:
    """Firewall and backend of each kind; the plan's accept keeps the service reachable."""
    text, accept = FIREWALLS[backend]
    server, client = lab.namespace("server"), lab.namespace("client")
    lab.link(server, client)
    loader = ["nft", "-f", "-"] if backend == "nft" else [f"{backend}-restore"]
    server.run(loader, stdin=text)
    for family in ("ip", "ip6") if backend == "iptables-legacy" else ():
        # The kernel never forgets a legacy table once something has asked for it.
        server.run([f"{family}tables-legacy", "-t", "raw", "-S"])
    before = rules_of(server)
    address = server.addresses["client"][0]
    with tcp_server(server, PORT), load(client, address, parallel=1) as loads:
        plan = make_plan(server, backend=backend, accepts=(accept,))
        trial = apply.start(apply.prepare(plan), 60)
        verdict = apply.check(trial)
        assert not verdict.worse
        assert verdict.proven
        (on_trial,) = undo.applied(server.inum)
        assert on_trial.installed.state == "trial"

        apply.confirm(server.inum)
        confirmed = undated(rules_of(server))
        assert confirmed != before
        (kept,) = undo.applied(server.inum)
        assert kept.installed.state == "permanent"
        assert kept.installed.services == (f"server tcp/{PORT}",)

        # Once more changes nothing.
        assert apply.prepare(plan).present == "permanent"
        assert undated(rules_of(server)) == confirmed

        (undone,) = undo.undo(server.inum)
        assert undone.namespace.inum == server.inum
        assert rules_of(server) == before
        assert not undo.applied(server.inum)
        done = loads[0].done
        while loads[0].done < done + 20:
            time.sleep(0.02)
    assert loads[0].failed == 0


def test_what_breaks_is_taken_back(lab: Lab) -> None:
    """Under a firewall that the plan does not fit, the check says so and clients survive."""
    server, client, address = pair(lab, STRICT)
    before = rules_of(server)
    with tcp_server(server, PORT), load(client, address) as loads:
        trial = apply.start(apply.prepare(make_plan(server)), 60)
        verdict = apply.check(trial)
        assert any("accepted connections fell" in line for line in verdict.worse)
        apply.revert(trial)
        assert rules_of(server) == before
        done = [one.done for one in loads]
        deadline = time.monotonic() + 60
        while any(one.done < n + 5 for one, n in zip(loads, done, strict=True)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    # SYN retransmission carried every connection over the gap.
    assert sum(one.failed for one in loads) == 0


def test_rules_that_do_not_take_are_noticed(lab: Lab) -> None:
    """``ct zone set`` defeats NOTRACK in any order: the entries keep coming."""
    server, client, address = pair(
        lab,
        "table inet z { chain p { type filter hook prerouting priority raw; ct zone set 5; }\n"
        " chain o { type filter hook output priority raw; ct zone set 5; }\n}\n",
    )
    with tcp_server(server, PORT), load(client, address):
        trial = apply.start(apply.prepare(make_plan(server)), 60)
        verdict = apply.check(trial)
        apply.revert(trial)
    assert any("have no effect" in line for line in verdict.worse)


@pytest.mark.parametrize("role", ["client", "forward", "loopback"])
def test_roles(lab: Lab, role: str) -> None:
    """The pair of rules that each role needs leaves no entry; both families."""
    left, right = lab.namespace("left"), lab.namespace("right")
    if role == "forward":
        middle = lab.namespace("middle", track=True)
        lab.link(left, middle)
        lab.link(middle, right)
        middle.sysctl("net.ipv4.ip_forward", 1)
        left.run(["ip", "route", "add", "default", "via", middle.addresses["left"][0]])
        right.run(["ip", "route", "add", "default", "via", middle.addresses["right"][0]])
        subject, server, source = middle, right, left
        targets = [right.addresses["middle"][0]]
    else:
        lab.link(left, right)
        subject = source = left
        left.track()
        server = right if role == "client" else left
        targets = list(right.addresses["left"]) if role == "client" else ["127.0.0.1", "::1"]
    with tcp_server(server, PORT):
        assert len(tcp_connections(source, (targets[0], PORT), 5).flows) == 5
        assert subject.count() >= 5
        with load(source, targets[0], parallel=1), load(source, targets[-1], parallel=1):
            trial = apply.start(apply.prepare(make_plan(subject, roles=(role,))), 60, flush=True)
            verdict = apply.check(trial)
            assert not verdict.worse
            assert verdict.proven
            apply.confirm(subject.inum)
        entries = ctnetlink.dump(subject.path)
        ours = (entries["dport"] == PORT) | (entries["sport"] == PORT)
        assert not ours.any()
    undo.undo(subject.inum)


def test_an_old_connection_goes_on(lab: Lab) -> None:
    """A connection from before speaks before, during and after the change."""
    server, client, address = pair(lab)
    with tcp_server(server, PORT, handle=_echo), client.enter():
        import socket

        with socket.create_connection((address, PORT), timeout=60) as old:
            for step in ("before", "during", "after", "undone"):
                if step == "during":
                    trial = apply.start(apply.prepare(make_plan(server)), 60, flush=True)
                    assert not apply.check(trial).worse
                elif step == "after":
                    apply.confirm(server.inum)
                elif step == "undone":
                    undo.undo(server.inum)
                old.sendall(step.encode())
                assert old.recv(64) == step.encode()


def _echo(connection: object) -> None:
    import socket

    assert isinstance(connection, socket.socket)
    while data := connection.recv(64):
        connection.sendall(data)


def test_applying_again_on_trial_starts_the_trial_anew(lab: Lab) -> None:
    server, _, _ = pair(lab)
    before = rules_of(server)
    plan = make_plan(server)
    apply.start(apply.prepare(plan), 30)
    (first,) = undo.applied(server.inum)
    apply.start(apply.prepare(plan), 60)
    (second,) = undo.applied(server.inum)
    assert len(second.installed.rules) == len(first.installed.rules)
    assert (second.installed.seconds_left or 0) > 40
    undo.undo(server.inum)
    assert rules_of(server) == before


def test_another_plan_is_refused_while_one_is_confirmed(lab: Lab) -> None:
    server, _, _ = pair(lab)
    apply.start(apply.prepare(make_plan(server)), 30)
    apply.confirm(server.inum)
    listed = rules_of(server)
    with pytest.raises(CtraceError, match="run ctrace undo first"):
        apply.prepare(make_plan(server, port=9999))
    assert rules_of(server) == listed
    undo.undo(server.inum)


def test_undo_without_the_note(lab: Lab, state: Path) -> None:
    """The truth is the ruleset: losing /run loses nothing that matters."""
    server, _, _ = pair(lab)
    before = rules_of(server)
    apply.start(apply.prepare(make_plan(server)), 30)
    apply.confirm(server.inum)
    for file in state.iterdir():
        file.unlink()
    (change,) = undo.undo(server.inum)
    assert change.note is None
    assert rules_of(server) == before


def test_others_changes_after_apply_survive_undo(lab: Lab) -> None:
    """Undo takes out our rules only, also from a chain that somebody has edited since."""
    server, _, _ = pair(lab, STRICT)
    accept = Accept("nft", "inet", "fw", "in", 3, "input", "server", "to")
    apply.start(apply.prepare(make_plan(server, accepts=(accept,))), 30)
    apply.confirm(server.inum)
    server.run(["nft", "insert", "rule", "inet", "fw", "in", "tcp", "dport", "22", "accept"])
    server.run(["nft", "add", "rule", "inet", "fw", "in", "tcp", "dport", "23", "accept"])
    undo.undo(server.inum)
    text = rules_of(server)
    assert "ctrace" not in text
    assert "tcp dport 22 accept" in text
    assert "tcp dport 23 accept" in text
    server.run(["nft", "delete", "table", "inet", "fw"])
    server.run(["nft", "-f", "-"], stdin=STRICT)
    fresh = rules_of(server)
    assert text.replace("tcp dport 22 accept", "").split() != fresh.split()
    assert [w for w in text.split() if w not in ("22", "23")] != []
