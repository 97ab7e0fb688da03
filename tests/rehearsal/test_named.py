"""What a rule set names is tried, and what a copy can't decide as the host would with both answers.

The oracle is nft, which writes the rules in the kernel's form.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from ctrace.lab import Lab, Node
from ctrace.rehearsal.room import Room
from ctrace.rehearsal.snapshot import take
from ctrace.ruleset.reader import read

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def host() -> Iterator[Node]:
    with Lab() as lab:
        node, peer = lab.namespace("h"), lab.namespace("c")
        lab.link(node, peer)
        yield node


def room(host: Node, rules: str, held: str = "") -> Room:
    chain = f"chain c {{ type filter hook output priority 0;\n{rules}\n}}\n"
    host.run(["nft", "-f", "-"], stdin=f"flush ruleset\ntable inet t {{\n{held}\n{chain}}}\n")
    return Room(take(host.path), read(host.path))


USERS = "set a { type uid; flags interval; elements = { 60-70, 80 }; }\n"
USERS += "set b { type uid . inet_service; flags interval; elements = { 90-95 . 22 }; }"


def test_users_alone_in_ranges_and_in_sets(host: Node) -> None:
    rules = "meta skuid 33 accept\nmeta skuid 30-40 accept\nmeta skgid { 50, 51 } accept\n"
    rules += "meta skuid @a accept\nmeta skuid . tcp dport @b accept"
    named = room(host, rules, USERS).names.uids
    assert {33, 30, 40, 50, 51, 60, 80, 90, 95} <= named
    assert max(named) < 100  # a range is compared in network byte order


KEYS = 'set a { type ifname . ipv4_addr; elements = { "to-c" . 192.0.2.7 }; }\n'
KEYS += (
    "set b { type ipv4_addr . inet_proto . inet_service; elements = { 192.0.2.8 . tcp . 4711 }; }"
)


def test_every_part_of_a_key_and_fields_that_are_compared_at_once(host: Node) -> None:
    rules = "oifname . ip daddr @a accept\nip daddr . meta l4proto . th dport @b accept\n"
    rules += "tcp sport 4712 tcp dport 4713 accept"
    named = room(host, rules, KEYS).names
    found = {address for one in named.classes.values() for address in one}
    assert {ip_address("192.0.2.7").packed, ip_address("192.0.2.8").packed} <= found
    assert {4711, 4712, 4713} <= named.ports


TIMED = "set t { type ipv4_addr; flags timeout; elements = { 192.0.2.9, 192.0.2.10 timeout 1h }; }"
LIMITS = "limit few {\nrate 1/minute burst 5 packets\n}"
FULL = "set full { type ipv4_addr; flags dynamic; ct count over 2; "
FULL += "elements = { 192.0.2.9 ct count over 2 }; }"
LIMIT = "limit rate 1/second"
LOGGED = f"chain few {{\nct state invalid {LIMIT} return\njump more\n}}\nchain more {{\nlog\n}}"
CHANGES = {
    "an hour": ('tcp dport 7 meta hour "09:00"-"17:00" accept', ""),
    "what a program sent": ("tcp dport 7 @ih,0,8 0x47 accept", ""),
    "a length": ("udp dport 7 udp length < 100 accept", ""),
    "bytes of an entry": ("tcp dport 7 ct avgpkt < 100 drop", ""),
    "a limit by a map": ('limit name tcp dport map { 7 : "few" } accept', LIMITS),
    "an element that expires": ("ip daddr @t accept", TIMED),
    "what elements measure": ("ip saddr @full accept", FULL),
    "a limit before more than logs": (f"{LIMIT} jump few", "chain few {\nlog\ndrop\n}"),
    "a limit before the end of a chain": (f"{LIMIT} goto few\ndrop", "chain few {\nlog\n}"),
    "a ping among others": ("icmpv6 type { 128, 135 } ip6 hoplimit 255 drop", ""),
    "a ping's hop limit": ("icmpv6 type echo-request ip6 hoplimit 255 drop", ""),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_may_change_while_a_connection_is_open(host: Node, name: str) -> None:
    made = room(host, *CHANGES[name])
    assert made.turns() or len(made.settings()) > 1


LASTING = {
    "a limit before logs": (f"{LIMIT} jump few", LOGGED),
    "messages that nobody sends": ("icmpv6 type 133 ip6 hoplimit 255 drop", ""),
    "some of these": (f"icmpv6 type {{ 133, 135 }} {LIMIT} drop", ""),
    "another protocol": (f"meta l4proto sctp {LIMIT} drop", ""),
    "a label": ("tcp dport 7 ct label 5 accept", ""),
    "a user": ("meta skuid 33 accept", ""),
    "an element that nobody asks for": ("tcp dport 7 accept", TIMED),
    "elements that stay": ("ip daddr @t accept", TIMED.replace(" timeout 1h", "")),
    "a counter by a map": ('counter name tcp dport map { 7 : "total" }', "counter total {\n}"),
}


@pytest.mark.parametrize("name", LASTING)
def test_what_stays_the_same(host: Node, name: str) -> None:
    made = room(host, *LASTING[name])
    assert not made.turns()
    assert len(made.settings()) == 1


def test_of_thousands_of_alike_rules_some_are_tried_and_those_with_the_port(host: Node) -> None:
    alike = [f"ip saddr 198.18.{n // 250}.{n % 250} drop\n" for n in range(1, 1500)]
    chains = "".join(
        f"chain s{n} {{\nip saddr 198.19.{n // 250}.9 accept\n}}\n" for n in range(600)
    )
    rules = "".join(alike) + "ip saddr 192.0.2.1 accept\nip saddr 192.0.2.2 tcp dport 22 drop\n"
    pairs = "set p { type ipv4_addr . inet_service; elements = { 192.0.2.3 . 22 }; }\n"
    names = room(host, rules + "ip saddr . tcp dport @p drop\n", pairs + chains).names
    found, left_out = names.addresses(600, 22)
    rare = {ip_address(f"192.0.2.{n}").packed for n in (1, 2, 3)}
    assert rare <= set(found)
    assert len(found) < 200
    assert left_out == len({a for one in names.classes.values() for a in one}) - len(found)


def test_security_marks_of_connections_cannot_be_copied(host: Node) -> None:
    assert not room(host, "tcp dport 7 meta mark set ct mark").gaps
    (gap,) = room(host, "tcp dport 7 meta secmark set ct secmark").gaps
    assert "ct secmark" in gap
