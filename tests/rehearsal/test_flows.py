"""Which flows of a full table are played, without a kernel."""

from __future__ import annotations

from collections import Counter
from ipaddress import ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st
from kit.examples import examples

from ctrace.rehearsal import flows
from ctrace.rehearsal.constants import Named
from ctrace.rehearsal.flows import OF_A_CLASS, of_table
from ctrace.rehearsal.talks import Cast, Far

HERE = bytes([10, 0, 0, 1])
PORT = 8063


def named(*nets: str) -> Named:
    names = Named()
    for text in nets:
        names.text(f"-A INPUT -s {text} -j DROP", "filter INPUT")
    return names


def cast(addresses: list[bytes]) -> Cast:
    ways = {one: Far(one, 2, HERE) for one in addresses}
    return Cast(((HERE, 2),), {}, ways, [])


def sources(n: int) -> list[bytes]:
    return [(int(ip_address("198.18.0.0")) + 7 * i).to_bytes(4, "big") for i in range(n)]


@examples(30)
@given(
    st.integers(2001, 5000),
    st.lists(st.tuples(st.integers(0, 40_000), st.integers(17, 32)), max_size=5),
)
def test_every_network_in_a_rule_has_its_flows_played(
    n: int, chosen: list[tuple[int, int]]
) -> None:
    """By the definition of a network: whoever the rules can tell apart is not represented."""
    nets = [ip_network((int(ip_address("198.18.0.0")) + at, length), strict=False)
            for at, length in chosen]  # fmt: skip
    found = sources(n)
    rows = [("server", one, 40_000, HERE, PORT) for one in found]
    played = of_table(rows, 6, PORT, cast(found), named(*map(str, nets)))

    def inside(address: bytes) -> tuple[bool, ...]:
        return tuple(ip_address(address) in net for net in nets)

    kinds = Counter(map(inside, found))
    seen = Counter(inside(talk.client) for talk in played)
    assert kinds.keys() == seen.keys()
    assert all(seen[kind] >= min(many, OF_A_CLASS) // 2 for kind, many in kinds.items())
    assert sum(1 + talk.kin for talk in played) == n
    assert len(played) <= OF_A_CLASS * (2 * len(nets) + 1)


def test_few_servers_are_all_called_however_many_call_one_of_them() -> None:
    """Rules that list servers list those that were seen."""
    callers = sources(4000)
    targets = [bytes([192, 0, 2, i]) for i in range(1, 41)]
    rows = [("forward", one, 40_000, targets[0], PORT) for one in callers]
    rows += [("forward", callers[0], 40_000, one, PORT) for one in targets]
    played = of_table(rows, 6, PORT, cast([*callers, *targets]), named())
    assert {talk.server for talk in played} == set(targets)
    assert sum(1 + talk.kin for talk in played) == len(rows)
    assert len(played) < 2 * OF_A_CLASS


def test_where_rules_choose_by_other_bits_than_a_networks_all_are_played() -> None:
    found = sources(flows.MOST_KINDS + 1)
    rows = [("server", one, 40_000, HERE, PORT) for one in found]
    for text in (
        "-A INPUT -s 10.0.0.7/255.0.0.255 -j DROP",
        "-A INPUT -m cluster --cluster-total-nodes 2 --cluster-local-node 1 -j ACCEPT",
        "-A INPUT -m u32 --u32 0xc&0x1=0x1 -j DROP",
    ):
        names = Named()
        names.text(text, "filter INPUT")
        assert len(of_table(rows, 6, PORT, cast(found), names)) == len(found), text
    assert len(of_table(rows, 6, PORT, cast(found), named())) <= OF_A_CLASS
