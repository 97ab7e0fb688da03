"""Which conversations are tried, without a kernel."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.examples import examples

from ctrace.record import PROTO_NUMBERS
from ctrace.rehearsal.constants import Named
from ctrace.rehearsal.snapshot import Snapshot
from ctrace.rehearsal.talks import MOST_PAIRS, Cast, Far, Plot, pairs_of


def hosts(first: int, n: int, device: int, family: int = 4) -> list[Far]:
    return [Far((first + i).to_bytes(family, "big"), device, b"") for i in range(n)]


def by_definition(far: list[Far], near: set[Far]) -> list[tuple[Far, Far]]:
    """Every pair made, then left out: what thousands of addresses have no time for."""
    pairs = [(a, b) for a in far for b in far
             if a.device != b.device and len(a.address) == len(b.address)]  # fmt: skip
    if len(pairs) > MOST_PAIRS:
        pairs = [(a, b) for a, b in pairs if a in near or b in near]
        pairs = pairs[:: max(1, len(pairs) // MOST_PAIRS)]
    return pairs


@examples(30)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 3), st.sampled_from([4, 16])),
                max_size=5), st.integers(0, 9))  # fmt: skip
def test_pairs_are_those_of_the_definition(parts: list[tuple[int, int, int]], every: int) -> None:
    far = [one for at, (n, device, family) in enumerate(parts)
           for one in hosts(1000 * at, n, device, family)]  # fmt: skip
    near = set(far[:: every + 1])
    assert pairs_of(far, near) == by_definition(far, near)


@pytest.mark.slow
def test_a_flood_of_sources_has_as_many_pairs_as_any() -> None:
    """A hundred thousand addresses: every pair of them would never end."""
    far = [*hosts(1, 100_000, 1), *hosts(1 << 24, 4, 2)]
    found = pairs_of(far, set(far[-4:]))
    assert MOST_PAIRS <= len(found) <= 2 * MOST_PAIRS
    assert all(a.device != b.device for a, b in found)


FORWARDS = (("/proc/sys/net/ipv4/ip_forward", "1"),)
HOST = Snapshot((), (), (), (), (), FORWARDS, (), (), (), (), ())
POD, NEAR, ALSO, CLIENT, VIRTUAL = (
    Far(bytes([10, 0, *last]), device, b"")
    for last, device in (((4, 2), 2), ((4, 3), 2), ((3, 3), 1), ((3, 1), 1), ((9, 9), 1))
)


def forwarded(names: Named, port: int) -> set[tuple[bytes, bytes, int]]:
    """Who is tried to call whom through the host, and where."""
    far = {one.address: one for one in (POD, NEAR, ALSO, CLIENT, VIRTUAL)}
    who = Cast((), far, far, [POD, NEAR, ALSO, CLIENT])
    plot = Plot(HOST, who, PROTO_NUMBERS["tcp"], port, (32768, 60999))
    return {(t.client, t.server, t.dport) for t in plot.talks(names, []) if t.role == "forward"}


def test_a_virtual_address_is_called_from_the_side_that_its_route_leads_to() -> None:
    names = Named(ports={80}, nat=True)
    tried = forwarded(names, 8063)
    for dport in (80, 8063):
        assert (CLIENT.address, VIRTUAL.address, dport) in tried
        assert (NEAR.address, VIRTUAL.address, dport) in tried


def test_of_a_shifted_range_the_port_that_becomes_the_service_is_tried() -> None:
    names = Named()
    names.text("-A PREROUTING -j DNAT --to-destination 10.0.4.2:8000-8999/7000", "nat")
    assert 7063 in {dport for _, _, dport in forwarded(names, 8063)}
