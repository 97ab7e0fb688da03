"""What rules tell beside the table: NAT that they have left, limits of their own, INVALID drops."""

from __future__ import annotations

import json
import os
import shlex
import socket
from dataclasses import replace

import pytest
from kit import traffic
from kit.rulesets.readings import NAT, SAVED, TABLE, explained, rules, settled, translated
from kit.shapes import NETNS, START, Trace, steady

from ctrace.advice import beside
from ctrace.batch import Clock, HookInfo
from ctrace.beside import Beside, Left, Refusing
from ctrace.lab import Lab
from ctrace.model.causes.beside import stale
from ctrace.model.model import Model
from ctrace.ruleset.reader import dump
from ctrace.ruleset.told import Met, Told, told


@pytest.mark.parametrize(
    ("said", "address", "leads"),
    [
        (rules([{"dnat": {"addr": "10.0.0.1", "port": 80}}]), "10.0.0.1", True),
        (rules([{"dnat": {"addr": "10.0.0.1"}}]), "10.0.0.2", False),
        (rules([{"dnat": {"addr": {"range": ["10.0.0.1", "10.0.0.9"]}}}]), "10.0.0.5", True),
        (rules([{"dnat": {"addr": {"range": ["10.0.0.1", "10.0.0.9"]}}}]), "10.0.0.10", False),
        (
            rules([{"dnat": {"addr": {"prefix": {"addr": "10.1.0.0", "len": 16}}}}]),
            "10.1.9.9",
            True,
        ),
        (
            rules(
                [
                    {
                        "dnat": {
                            "addr": {
                                "map": {
                                    "key": {"numgen": {"mod": 2}},
                                    "data": {"set": [[0, "10.0.0.1"], [1, "10.0.0.2"]]},
                                }
                            }
                        }
                    }
                ]
            ),
            "10.0.0.2",
            True,
        ),
        (rules([{"dnat": {"addr": {"map": {"key": 1, "data": "@backends"}}}}]), "10.9.9.9", True),
        (rules([{"redirect": {"port": 80}}]), "10.9.9.9", True),
        (
            rules(saves="-A PREROUTING -j DNAT --to-destination 10.0.0.1-10.0.0.3:8080"),
            "10.0.0.3",
            True,
        ),
        (rules(saves="-A PREROUTING -j DNAT --to-destination [fd00::1]:80"), "fd00::1", True),
        (rules(saves="-A PREROUTING -j DNAT --to-destination [fd00::1]:80"), "fd00::2", False),
        (rules(saves="-A P -d 10.0.0.0/8 -j NETMAP --to 10.1.0.0/16"), "10.9.9.9", True),
        (rules(ipvs="TCP 0A000001:0050 rr"), "10.9.9.9", True),
        (told({"nft": "", "ipvs": "", "gaps": ("?",)}), "10.9.9.9", True),
    ],
)
def test_where_destination_nat_leads(said: Told, address: str, leads: bool) -> None:
    """An address counts as left only where nothing else may translate to it."""
    assert said.leads_to(address) is leads


def test_rules_with_a_limit_and_rules_that_drop_invalid() -> None:
    counter, drop = {"counter": {"packets": 7, "bytes": 420}}, {"drop": None}
    state = {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "invalid"}}
    said = rules(
        [{"set": {"op": "add", "stmt": [{"ct count": {"val": 20, "inv": True}}]}}, counter, drop],
        [state, drop],
        [state, counter],  # counts them, and lets them pass
        [{"xt": {"type": "match", "name": "connlimit"}}, counter,
         {"xt": {"type": "target", "name": "REJECT"}}],
        [{"ct count": {"val": 5, "inv": True}}, counter, {"log": None}],
        [{"ct count": {"val": 5}}, counter, drop],  # without "over": those within the number
        [{"vmap": {"key": {"ct": {"key": "state"}},
                   "data": {"set": [["invalid", drop], ["established", {"accept": None}]]}}}],
        [state, {"jump": {"target": "c"}}],  # not all that comes there is refused
    )  # fmt: skip
    assert said.met == (
        Met("ip t c", 0, "limit", 20, 7),
        Met("ip t c", 1, "invalid", 0, None),
        Met("ip t c", 3, "limit", 0, 7),
        Met("ip t c", 6, "invalid", 0, None),
    )


def test_rules_of_iptables_with_a_limit_and_such_as_drop_invalid() -> None:
    """By their arguments, which nft's listing of iptables-nft's tables lacks."""
    listed = [{"xt": {"type": "match", "name": "connlimit"}},
              {"xt": {"type": "target", "name": "REJECT"}}]  # fmt: skip
    rule = {"family": "ip", "table": "filter", "chain": "INPUT", "handle": 5, "expr": listed}
    for tool, family in (("iptables-nft", "ip"), ("iptables-legacy", "ip6")):
        document = {"nft": json.dumps({"nftables": [{"rule": rule}] if family == "ip" else []}),
                    "saves": ((tool, family, SAVED),)}  # fmt: skip
        name = f"{family}tables"
        assert told(document).met == (
            Met(f"{name} filter INPUT, rule 2", 0, "limit", 8, 5),
            Met(f"{name} filter FORWARD, rule 1", 0, "invalid", 0, 7),
        )


def test_a_rule_that_sends_to_a_chain_which_refuses_all() -> None:
    counter, drop = {"counter": {"packets": 7, "bytes": 420}}, {"drop": None}
    over = {"ct count": {"val": 5, "inv": True}}
    items = [
        {"rule": {"family": "ip", "table": "t", "chain": chain, "handle": n, "expr": expr}}
        for n, (chain, expr) in enumerate([
            ("refuse", [{"log": None}, counter, drop]),
            ("some", [{"match": {"op": "==", "left": {"meta": {}}, "right": 1}}, drop]),
            ("c", [over, counter, {"goto": {"target": "refuse"}}]),
            ("c", [over, counter, {"goto": {"target": "some"}}]),
        ])
    ]  # fmt: skip
    assert told({"nft": json.dumps({"nftables": items})}).met == (Met("ip t c", 2, "limit", 5, 7),)


def test_what_drops_invalid_packets_stands_with_them() -> None:
    trace = Trace(seed=7)
    trace.flows(steady(5, 12, trace.rng), 1.0, 3.0)
    dropping = Refusing("ip t c", 1, "invalid", packets=290, since=290)

    def said(netns: int) -> str:
        model = Model(HookInfo("fentry"), Clock(0), START)
        for number, batch in enumerate(trace.batches(12)):
            tables = tuple(replace(t, stats={**t.stats, "invalid": 30 * number})
                           for t in batch.tables)  # fmt: skip
            model.update(replace(batch, tables=tables, beside=(Beside(netns, (dropping,)),)))
        return next(one.text for one in model.snapshot().why if one.id == "invalid")

    assert said(NETNS).endswith(
        "; a rule dropped 290 such packets since it was first read (ip t c, handle 1)"
    )
    assert said(NETNS + 1).endswith("a rule may drop them")


def test_what_was_read_beside_goes_when_it_is_gone() -> None:
    """The newest reading of a namespace is what is said of it."""
    trace = Trace(seed=7)
    trace.flows(steady(5, 12, trace.rng), 1.0, 3.0)
    limit = Refusing("ip t c", 1, "limit", 20, packets=9, since=9)
    left = Left("udp", "192.0.2.1", 53, "10.0.0.9", 40)
    found = explained(trace, Beside(NETNS, (limit,), (left,)))
    assert [one.id for one in found] == ["stale-nat", "rule-limit"]
    assert [one.id for one in explained(trace, Beside(NETNS, (limit,)), Beside(NETNS))] == [
        "unknown"
    ]


@pytest.mark.kernel
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_entries_that_keep_to_a_backend_that_is_gone() -> None:
    """The command that is printed removes just these, as many as it says."""
    with Lab() as lab:
        client, gateway, server = (lab.namespace(name) for name in ("c", "g", "s"))
        gateway.sysctl("net.ipv4.ip_forward", 1)
        _, near = lab.link(client, gateway)
        _, far = lab.link(gateway, server)
        client.run(["ip", "route", "add", "192.0.2.0/24", "via", near])
        gone, stays = far, far.rpartition(".")[0] + ".7"
        server.run(["ip", "addr", "add", f"{stays}/24", "dev", "to-g"])
        gateway.run(["nft", "-f", "-"], stdin=NAT.format(backend=gone, other=stays))
        gateway.sysctl("net.netfilter.nf_conntrack_udp_timeout", 600)
        for dst in ("192.0.2.10", "192.0.2.11"):
            traffic.udp_flows(client, (dst, 5060), 30)
        n, others = settled(gateway, gone), settled(gateway, stays)
        assert not beside.leftovers(gateway.path, told(dump(gateway.path)))

        moved = "flush table ip n\n" + NAT.format(backend=stays, other=stays)
        gateway.run(["nft", "-f", "-"], stdin=moved)
        left = beside.leftovers(gateway.path, told(dump(gateway.path)))
        assert left == (Left("udp", "192.0.2.10", 5060, gone, n),)
        (cause,) = stale(replace(TABLE, netns=gateway.inum), left)
        assert cause.id == "stale-nat"
        assert cause.remedies[0].now == n
        gateway.run(shlex.split(cause.remedies[0].commands[0]))
        assert translated(gateway, gone) == 0
        assert translated(gateway, stays) == others


@pytest.mark.kernel
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_rules_own_limit_is_counted_as_the_rule_counts() -> None:
    with Lab() as lab:
        client, server = lab.namespace("c"), lab.namespace("s", track=True)
        _, target = lab.link(client, server)
        server.run(["nft", "-f", "-"], stdin="table ip z {\n chain i {\n"
                   "  type filter hook input priority 0\n  tcp dport 80 ct state new "
                   "ct count over 2 counter reject with tcp reset\n }\n}\n")  # fmt: skip
        listener = server.socket(socket.AF_INET, socket.SOCK_STREAM)
        with listener:
            listener.bind((target, 80))
            listener.listen(50)
            space = beside.Space(server.inum, told(dump(server.path)))
            held = [client.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(12)]
            refused = 0
            for one in held:
                try:
                    one.connect((target, 80))
                except ConnectionRefusedError:
                    refused += 1
            (rule,) = space.see(told(dump(server.path))).refusing
            for one in held:
                one.close()
    assert refused == 10
    assert (rule.kind, rule.limit, rule.since) == ("limit", 2, refused)
