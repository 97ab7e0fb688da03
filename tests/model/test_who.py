"""The fewest keys that explain most: right for each shape, and the same from second to second."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.examples import examples
from kit.shapes import NETNS, START, SYN_SENT, Trace, steady

from ctrace.batch import Batch, Clock, HookInfo, Names, Netns, Owner
from ctrace.model.model import Model
from ctrace.model.snapshot import Holder, Snapshot
from ctrace.model.who.lattice import ENOUGH, Key, Lattice
from ctrace.model.who.weigh import Weighed

OTHER = 4026532500
SECONDS = 35
WARM = 5
NGINX = Owner((812 << 32) + 1, "nginx", unit="nginx.service")
HELPER = Owner((901 << 32) + 1, "fetch", unit="docker:crawl")
CRAWLER = Owner((900 << 32) + 1, "crawler", unit="docker:crawl")


def addresses(t: Trace, base: int, many: int, n: int) -> np.ndarray:
    return base + t.rng.integers(0, many, n)


def one_pair(t: Trace) -> None:
    t.flows(steady(200, SECONDS, t.rng), 0.01, 20)


def one_source_many_ports(t: Trace) -> None:
    n = 100 * SECONDS
    t.flows(steady(100, SECONDS, t.rng), 0, 20, src="10.6.6.6", status=0, state=SYN_SENT,
            dport=t.rng.integers(1, 65535, n))  # fmt: skip


def one_source_few_ports(t: Trace) -> None:
    n = 100 * SECONDS
    t.flows(steady(100, SECONDS, t.rng), 0, 20, src="10.6.6.6", status=0, state=SYN_SENT,
            dst=addresses(t, 0xC6120000, 65536, n),
            dport=t.rng.choice([22, 23, 80, 443, 445, 3389, 5900, 8080], n))  # fmt: skip


def one_service_many_sources(t: Trace) -> None:
    n = 200 * SECONDS
    t.flows(steady(200, SECONDS, t.rng), 0, 20, src=addresses(t, 0x0B000000, 1 << 29, n),
            dport=443, status=0, state=SYN_SENT)  # fmt: skip


def scatter_over_a_range(t: Trace) -> None:
    n = 200 * SECONDS
    t.flows(steady(200, SECONDS, t.rng), 0, 20, proto=17, dport=t.rng.integers(10000, 10007, n),
            src=addresses(t, 0x0B000000, 1 << 29, n), status=0)  # fmt: skip


def two_services(t: Trace) -> None:
    for port, rate in ((80, 120), (443, 80)):
        n = rate * SECONDS
        t.flows(steady(rate, SECONDS, t.rng), 0.1, 20, dport=port,
                src=addresses(t, 0x0A010000, 4000, n) * 7919 % 0xDF000000)  # fmt: skip


def a_prefix(t: Trace) -> None:
    n = 120 * SECONDS
    t.flows(steady(120, SECONDS, t.rng), 0.1, 20, src=addresses(t, 0x0A2A0300, 256, n),
            dport=t.rng.integers(1024, 40000, n))  # fmt: skip


def scanner_and_service(t: Trace) -> None:
    one_source_many_ports(t)
    n = 150 * SECONDS
    t.flows(steady(150, SECONDS, t.rng), 0.1, 20, dport=8063,
            src=addresses(t, 0x0B000000, 1 << 28, n))  # fmt: skip


def pings(t: Trace) -> None:
    n = 200 * SECONDS
    t.flows(steady(200, SECONDS, t.rng), 0, 20, proto=1, dport=0, src="10.0.0.2", status=0,
            dst=addresses(t, 0x0A000000, 250, n))  # fmt: skip


def a_process(t: Trace) -> None:
    n = 120 * SECONDS
    t.flows(steady(120, SECONDS, t.rng), 0.1, 20, src=addresses(t, 0x0A000000, 3, n) << 8,
            dst=addresses(t, 0x0B000000, 1 << 28, n), direction=2, owner=CRAWLER.key,
            dport=t.rng.integers(1024, 40000, n))  # fmt: skip


def a_listener(t: Trace) -> None:
    n = 120 * SECONDS
    t.flows(steady(120, SECONDS, t.rng), 0.1, 20, src=addresses(t, 0x0B000000, 1 << 29, n),
            dport=t.rng.choice([7001, 7101, 7201, 7301], n))  # fmt: skip


def a_namespace(t: Trace) -> None:
    n = 120 * SECONDS
    t.flows(steady(120, SECONDS, t.rng), 0.1, 20, src=addresses(t, 0x0B000000, 1 << 29, n),
            dst=addresses(t, 0x20000000, 1 << 29, n), dport=t.rng.integers(1024, 40000, n),
            netns=OTHER)  # fmt: skip
    t.flows(steady(5, SECONDS, t.rng), 0.1, 20, dport=22)


def a_destination(t: Trace) -> None:
    n = 120 * SECONDS
    t.flows(steady(120, SECONDS, t.rng), 0.1, 20, src=addresses(t, 0x0B000000, 1 << 29, n),
            dst="10.9.9.9", dport=t.rng.integers(1024, 40000, n))  # fmt: skip
    t.flows(steady(10, SECONDS, t.rng), 0.1, 20, dport=22)


def a_container(t: Trace) -> None:
    for owner in (CRAWLER, HELPER):
        n = 150 * SECONDS
        t.flows(steady(150, SECONDS, t.rng), 0.1, 20, src=addresses(t, 0x0A000000, 200, n) << 8,
                dst=addresses(t, 0x0B000000, 1 << 28, n), direction=2, owner=owner.key,
                dport=t.rng.integers(1024, 40000, n))  # fmt: skip


def a_protocol(t: Trace) -> None:
    n = 120 * SECONDS
    t.flows(steady(120, SECONDS, t.rng), 0, 20, proto=17, src=addresses(t, 0x0B000000, 1 << 29, n),
            dst=addresses(t, 0x20000000, 1 << 29, n),
            dport=t.rng.integers(1024, 60000, n))  # fmt: skip
    t.flows(steady(8, SECONDS, t.rng), 0.1, 20, dport=22)


def a_state(t: Trace) -> None:
    """Half tcp, half udp, of everybody to everywhere; nearly all that is held is closing."""
    for proto, rate, linger in ((6, 120, 30), (17, 12, 15)):
        n = rate * SECONDS
        t.flows(steady(rate, SECONDS, t.rng), 0.05, linger, proto=proto,
                src=addresses(t, 0x0B000000, 1 << 29, n), dst=addresses(t, 0x20000000, 1 << 29, n),
                dport=t.rng.integers(1024, 60000, n))  # fmt: skip
    t.walks(SECONDS)


def a_zone(t: Trace) -> None:
    """Tenants with the same addresses, each in a conntrack zone; one of them holds nearly all."""
    for zone, rate in ((7, 150), (8, 12)):
        n = rate * SECONDS
        t.flows(steady(rate, SECONDS, t.rng), 0.1, 20, src=addresses(t, 0x0A2A0300, 256, n),
                dport=t.rng.integers(1024, 40000, n), zone=zone)  # fmt: skip
    t.walks(SECONDS)


SHAPES: list[tuple[Callable[[Trace], None], str, str]] = [
    (one_pair, "pair", "tcp/8063 from 10.0.0.7"),
    (one_source_many_ports, "src", "10.6.6.6 to "),
    (one_source_few_ports, "src", "10.6.6.6 to 8 services"),
    (one_service_many_sources, "service", "tcp/443 from "),
    (scatter_over_a_range, "ports", "udp/10000-10006 from "),
    (two_services, "service", "tcp/80 from "),
    (a_prefix, "prefix", "10.42.3.0/24 ("),
    (scanner_and_service, "service", "tcp/8063 from "),
    (pings, "pair", "icmp from 10.0.0.2"),
    (a_process, "process", "crawler[900]"),
    (a_listener, "process", "nginx[812]"),
    (a_namespace, "netns", "namespace web"),
    (a_destination, "dst", "to 10.9.9.9"),
    (a_container, "unit", "docker:crawl"),
    (a_protocol, "proto", "all udp to "),
    (a_state, "state", "tcp in TIME_WAIT"),
    (a_zone, "zone", "zone 7"),
]


def answers(make: Callable[[Trace], None]) -> list[tuple[Holder, ...]]:
    """Who holds most, each second from the fifth on."""
    trace = Trace(seed=5)
    make(trace)
    model = Model(HookInfo("fentry"), Clock(0), START)
    names = Names(
        netns={NETNS: Netns(NETNS, "init"), OTHER: Netns(OTHER, "web")}
        if make is a_namespace else {NETNS: Netns(NETNS, "init")},
        owners={CRAWLER.key: CRAWLER, HELPER.key: HELPER},
        listeners={(NETNS, 6, port): NGINX for port in (7001, 7101, 7201, 7301)},
    )  # fmt: skip
    model.update(Batch(trace.events(0)[:0], START, names=names))
    found = []
    for second, batch in enumerate(trace.batches(SECONDS)):
        model.update(batch)
        if second >= WARM:
            found.append(model.snapshot("service", limit=1).who)
    return found


def without_counts(text: str) -> str:
    """What is counted grows; who is told must not change."""
    return re.sub(r"(more than )?[\d,]+ (source|service)s?", "", text)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "kind", "text"), SHAPES, ids=[m.__name__ for m, _, _ in SHAPES])
def test_the_right_key_comes_first_and_stays(
    make: Callable[[Trace], None], kind: str, text: str
) -> None:
    found = answers(make)
    first = [who[0] for who in found]
    assert {one.kind for one in first} == {kind}, first[-1]
    assert all(text in one.text for one in first), first
    assert sum(one.share for one in found[-1]) >= ENOUGH
    assert len({tuple((one.kind, without_counts(one.text)) for one in who) for who in found}) == 1


@pytest.mark.slow
def test_two_causes_of_different_kinds_are_both_named() -> None:
    last = answers(scanner_and_service)[-1]
    assert [one.kind for one in last] == ["service", "src"]
    assert last[1].text.startswith("10.6.6.6")


def test_two_services_tell_more_than_the_network_of_their_clients() -> None:
    def pools(t: Trace) -> None:
        for port, rate in ((5432, 90), (6379, 60)):
            n = rate * SECONDS
            t.flows(steady(rate, SECONDS, t.rng), 0.1, 20, dport=port,
                    src=addresses(t, 0x0A2A0300, 9, n))  # fmt: skip

    found = answers(pools)
    assert {tuple(one.text for one in who) for who in found} == {
        ("tcp/5432 from 9 sources", "tcp/6379 from 9 sources")
    }


def test_processes_that_are_known_later_are_named_all_the_same() -> None:
    trace = Trace(seed=5)
    a_listener(trace)
    model = Model(HookInfo("fentry"), Clock(0), START)
    model.update(
        Batch(trace.events(0)[:0], START, names=Names(netns={NETNS: Netns(NETNS, "init")}))
    )
    known = Names(listeners={(NETNS, 6, port): NGINX for port in (7001, 7101, 7201, 7301)})
    kinds = []
    for second, batch in enumerate(trace.batches(12)):
        model.update(replace(batch, names=known) if second == 7 else batch)
        kinds.append(model.snapshot().who[0].kind)
    assert "process" not in kinds[:7]
    assert set(kinds[7:]) == {"process"}


def test_what_outgrows_another_key_comes_first() -> None:
    def changing(t: Trace) -> None:
        t.flows(steady(60, 8, t.rng), 0.01, 60, dport=80)
        n = 40 * (SECONDS - 10)
        t.flows(10 + steady(40, SECONDS - 10, t.rng), 0, 60, dport=443, status=0, state=SYN_SENT,
                src=addresses(t, 0x0B000000, 1 << 29, n))  # fmt: skip

    found = answers(changing)
    assert [one.text for one in found[0]] == ["tcp/80 from 10.0.0.7"]
    assert [one.text.partition(" ")[0] for one in found[-1]] == ["tcp/443", "tcp/80"]
    assert sum(a[0].text[:7] != b[0].text[:7] for a, b in zip(found, found[1:])) == 1


def test_one_process_that_serves_and_calls_is_one_key() -> None:
    """Its start is known in milliseconds from its calls, and in ticks from its sockets."""
    key = (700 << 32) + 1234567
    opened, listens = Owner(key, "proxy"), Owner(key - 7, "proxy")
    trace, n = Trace(seed=5), 100 * 20
    trace.flows(steady(100, 20, trace.rng), 0.1, 20, dport=trace.rng.choice([8080, 8443], n),
                src=addresses(trace, 0x0B000000, 1 << 28, n))  # fmt: skip
    trace.flows(steady(100, 20, trace.rng), 0.1, 20, src="10.0.0.9", direction=2, owner=key,
                dst=addresses(trace, 0x0B000000, 1 << 28, n),
                dport=trace.rng.integers(1024, 40000, n))  # fmt: skip
    model = Model(HookInfo("fentry"), Clock(0), START)
    places = {(NETNS, 6, port): listens for port in (8080, 8443)}
    named = Names(netns={NETNS: Netns(NETNS, "init")}, listeners=places)
    model.update(Batch(trace.events(0)[:0], START, names=named))
    batches = trace.batches(20)
    for batch in (replace(batches[0], names=Names(owners={key: opened})), *batches[1:]):
        model.update(batch)
    (only,) = model.snapshot().who
    assert (only.kind, only.text) == ("process", "proxy[700]")
    assert only.share > 0.99


def proxy(main: int, beside: int) -> Snapshot:
    """A full table: a process serves one port, another one, and sends look-ups beside."""
    key = (700 << 32) + 1234567
    trace = Trace(seed=5)
    for port, rate in ((8063, main), (8064, beside)):
        trace.flows(steady(rate, 40, trace.rng), 0.004, 20, dport=port)
    trace.flows(steady(4, 40, trace.rng), 0.1, 20, proto=17, dport=53, direction=2, owner=key)
    model = Model(HookInfo("fentry"), Clock(0), START)
    places = {(NETNS, 6, port): Owner(key, "proxy") for port in (8063, 8064)}
    named = Names(
        netns={NETNS: Netns(NETNS, "init")}, listeners=places, owners={key: Owner(key, "proxy")}
    )
    model.update(Batch(trace.events(0)[:0], START, names=named))
    for batch in trace.batches(40, limit=(main + beside + 4) * 20):
        model.update(batch)
    return model.snapshot()


def test_a_process_with_nearly_all_in_one_service_is_told_by_that_service() -> None:
    """What helps is for the service; the few entries beside do not hide it."""
    why = proxy(300, 2).why[0]
    assert (why.id, why.proto, why.port) == ("no-keepalive", "tcp", 8063)
    assert [one.id for one in why.remedies].count("notrack") == 1


def test_a_timeout_longer_than_the_entries_stay_is_no_help() -> None:
    """TIME_WAIT is 20 s here, as the stays tell: 30 s would free nothing."""
    why = proxy(150, 150).why[0]
    assert (why.id, why.port) == ("no-keepalive", None)
    assert why.remedies
    assert not any("tcp_timeout_time_wait" in one.text for one in why.remedies)


@pytest.mark.slow
def test_what_is_scattered_is_not_explained_by_force() -> None:
    def scattered(t: Trace) -> None:
        n = 150 * SECONDS
        t.flows(steady(150, SECONDS, t.rng), 0.1, 20, dport=t.rng.integers(1024, 65000, n),
                dst=addresses(t, 0x20000000, 1 << 29, n),
                src=addresses(t, 0x0B000000, 1 << 30, n))  # fmt: skip

    last = answers(scattered)[-1]
    assert [one.kind for one in last] in ([], ["netns"], ["proto"])


def rows(weights: list[int], sources: list[int], ports: list[int]) -> Weighed:
    n = len(weights)
    zero = np.zeros(n, np.uint64)
    meta = np.array([NETNS << 32 | 6 << 16 | port for port in ports], np.uint64)
    low = np.array(sources, np.uint64) << np.uint64(32) | np.uint64(0xFFFF0000)
    weight = np.array(weights, float)
    return Weighed(zero, low, meta, zero, zero, weight, float(weight.sum()), zero)


@examples(60)
@given(st.data())
def test_what_keys_explain_is_what_their_members_have(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 40))
    some = st.lists(st.integers(1, 50), min_size=n, max_size=n)
    lattice = Lattice(rows(data.draw(some), data.draw(some), data.draw(some)))
    chosen = lattice.narrow()
    inside = np.zeros(n, bool)
    for key in chosen:
        inside |= lattice.members(key)
    assert lattice.covered(chosen) == pytest.approx(
        float(lattice.w.weight[inside].sum()) / lattice.w.total
    )
    assert lattice.covered(chosen[:1]) <= lattice.covered(chosen) <= 1 + 1e-9


def test_a_single_heavy_pair_is_found_by_brute_force() -> None:
    """Against every single key of every grouping, counted row by row."""
    lattice = Lattice(rows([5, 90, 3, 2], [1, 2, 3, 4], [80, 81, 82, 9000]))
    (first,) = lattice.narrow()
    assert first.kind == "pair"
    assert lattice.members(first).tolist() == [False, True, False, False]


def test_a_process_in_two_namespaces_has_in_one_what_it_holds_there() -> None:
    """A share of a namespace's table never counts what the process holds in another's."""
    pairs = rows([60, 36, 4], [1, 2, 3], [80, 81, 82])
    pairs.meta[2] = np.uint64(OTHER << 32 | 6 << 16 | 82)
    pairs.process[:] = CRAWLER.key
    ((_, parts),) = Lattice(pairs).told((Key("process", (CRAWLER.key,)),))
    assert (parts.held, parts.proto >> 16, parts.of_proto) == (100, NETNS, 96)
