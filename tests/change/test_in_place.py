"""What is applied already is not proposed again, and the next plan does not forget it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from kit.changes import PORT, TRACKED, in_background
from kit.command import ctrace, said
from kit.traffic import tcp_connections, tcp_server, udp_flows, udp_server

from ctrace.advice.facts import facts
from ctrace.advice.in_place import InPlace, in_place
from ctrace.host import ctnetlink
from ctrace.lab import Lab, Node
from ctrace.record import address_bytes
from ctrace.rehearsal.room import Room

pytestmark = pytest.mark.kernel
OTHER = 9000


def refused(*words: object) -> str:
    """What a command says that fails, with nobody to ask."""
    done = ctrace(*words)
    assert done.returncode == 1, done.stderr
    return done.stderr


def advise(node: Node, plan: Path, target: str) -> dict[str, Any]:
    words = ("--duration", 3, "--netns", node.inum, "--target", target, "--plan", plan)
    found: dict[str, Any] = json.loads(said("advise", *words, "-o", "json"))
    return found


def chosen(advice: dict[str, Any]) -> set[int]:
    return {c["service"]["port"] for c in advice["candidates"] if c["chosen"]}


@pytest.mark.slow
def test_the_second_plan_adds_to_the_first(lab: Lab, tmp_path: Path) -> None:
    server, client = lab.namespace("server"), lab.namespace("client")
    lab.link(server, client)
    server.run(["nft", "-f", "-"], stdin=TRACKED)
    address = server.addresses["client"][0]
    for port, n in ((PORT, 9000), (OTHER, 7000)):
        ctnetlink.fill(server.path, n, target=address, dport=port, timeout=600, state=7)
    first, second = tmp_path / "first", tmp_path / "second"
    with (
        tcp_server(server, PORT),
        tcp_server(server, OTHER),
        in_background(lambda: use(client, address)),
    ):
        before = advise(server, first, "4%")
        assert chosen(before) == {PORT}
        assert before["in_place"] == []
        said("apply", first, "--yes")
        said("confirm", "--netns", server.inum)
        # Its old entries are still there, and still the most.
        after = advise(server, second, "4%")
        assert after["candidates"][0]["service"]["port"] == PORT
        assert after["candidates"][0]["in_place"]
        assert "is in place already, by ctrace" in after["candidates"][0]["reasons"][0]
        assert chosen(after) == {OTHER}
        (done,) = after["in_place"]
        assert (done["port"], done["roles"], done["by"]) == (PORT, ["server"], "ctrace")
        assert done["packets"] > 20
        assert any("run ctrace undo, then apply the plan" in note for note in after["notes"])
        ports = {lever["port"] for lever in json.loads(second.read_text())["levers"]}
        assert ports == {PORT, OTHER}
        said("undo", "--netns", server.inum)
        said("apply", second, "--yes")
        filled = {port: in_table(server, port, but=client) for port in (PORT, OTHER)}
        new = [flow for port in (PORT, OTHER)
               for flow in tcp_connections(client, (address, port), 5).flows]  # fmt: skip
        assert len(new) == 10
        there = {(int(row["sport"]), int(row["dport"])) for row in ctnetlink.dump(server.path)}
        assert not there & {(flow.sport, flow.dport) for flow in new}
        assert {port: in_table(server, port, but=client) for port in (PORT, OTHER)} == filled
        assert "is not what is on trial" in refused("confirm", first)
        said("confirm", second)  # before its services end, as a trial ends with them
    assert "with --netns" in refused("undo")
    assert str(OTHER) in said("applied", "--netns", server.inum)
    said("undo", "--netns", server.inum)


def use(client: Node, address: str) -> None:
    """About ten connections a second to each service: what they hold stays as it is."""
    for port in (PORT, OTHER):
        tcp_connections(client, (address, port), 1)
    time.sleep(0.1)


def in_table(node: Node, port: int, but: Optional[Node] = None) -> int:
    """Entries of a port; without those of a client, which come and go."""
    entries = ctnetlink.dump(node.path)
    mine = (entries["dport"] == port) | (entries["sport"] == port)
    for address in but.addresses["server"] if but else ():
        theirs = np.frombuffer(address_bytes(address), np.uint8)
        mine &= (entries["src"] != theirs).any(axis=1) & (entries["dst"] != theirs).any(axis=1)
    own = (entries["src"] == entries["dst"]).all(axis=1)
    return int((mine & ~own).sum())


BY_HAND = {
    "nft": (
        ["nft", "-f", "-"],
        "table inet mine {\n"
        " chain pre { type filter hook prerouting priority raw; tcp dport 8063 counter notrack; }\n"
        " chain out { type filter hook output priority raw; tcp sport 8063 counter notrack; }\n"
        " ct timeout short { protocol udp; l3proto ip; policy = { unreplied: 5, replied: 5 }; }\n"
        " chain t { type filter hook prerouting priority -150;\n"
        '  udp dport 53 counter ct timeout set "short"\n }\n}\n',
    ),
    **{
        f"iptables-{variant}": (
            [f"iptables-{variant}-restore"],
            "*raw\n-A PREROUTING -p tcp -m tcp --dport 8063 -j CT --notrack\n"
            "-A OUTPUT -p tcp -m tcp --sport 8063 -j CT --notrack\nCOMMIT\n",
        )
        for variant in ("nft", "legacy")
    },
}


@pytest.mark.parametrize("tool", BY_HAND)
def test_rules_by_hand_are_seen_with_what_they_carry(lab: Lab, tool: str) -> None:
    server, client = lab.namespace("server"), lab.namespace("client")
    lab.link(server, client)
    argv, text = BY_HAND[tool]
    server.run(["nft", "-f", "-"], stdin=TRACKED)
    server.run(argv, stdin=text)
    address = server.addresses["client"][0]
    with tcp_server(server, PORT), udp_server(server, 53):
        assert len(tcp_connections(client, (address, PORT), 10).flows) == 10
        udp_flows(client, (address, 53), 7)
        found = {(one.kind, one.proto, one.port): one for one in seen(server)}
    one = found["notrack", "tcp", PORT]
    assert one.complete
    assert one.roles == ("server",)
    assert one.packets is not None
    assert one.packets >= 10 * 8
    if tool == "nft":
        assert found["timeout", "udp", 53].packets == 7
    assert not in_table(server, PORT)


def seen(node: Node) -> list[InPlace]:
    about = facts(node.path)
    assert about.ruleset is not None
    assert about.snapshot is not None
    return list(in_place(about.ruleset, Room(about.snapshot, about.ruleset)))
