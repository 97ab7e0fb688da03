"""What ``ctrace perf`` reads from the kernel, against known packets and other clocks.

Runs natively and in the emulated machines. What changes the whole machine (a small
table, another number of buckets) only runs in those.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

import pytest
from kit import traffic
from kit.costs import PORT, Ballast, open_flows, pair, send, totals
from kit.machines import families

from ctrace.cost import chains
from ctrace.cost import result as model
from ctrace.cost.measure import Measurement
from ctrace.cost.objects import Objects
from ctrace.cost.result import RELATIVE_ERROR
from ctrace.cost.timing import FAMILIES, Timing, active
from ctrace.errors import CtraceError
from ctrace.host import netns
from ctrace.host.tables import TableReader
from ctrace.kernel import symbols
from ctrace.lab import Node

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
KERNEL = os.environ.get("CTRACE_VM", "")
alone = pytest.mark.skipif(not KERNEL, reason="changes the whole machine: in scripts/vm only")
PACKETS = 500 if KERNEL else 2000
ROUNDS = 5
FLOWS = 400 if KERNEL else 1000


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "timers" in metafunc.fixturenames:
        # What needs no emulated machine runs there for function hooks only: netfilter's links are
        # timed natively.
        natively = KERNEL and alone.mark not in metafunc.definition.own_markers
        left_out = ("netfilter",) if natively else ()
        found = [name for name in FAMILIES if name in families() and name not in left_out]
        metafunc.parametrize("timers", found)


@contextlib.contextmanager
def timing(family: str, *nodes: Node) -> Iterator[Timing]:
    """Timers: links in these namespaces alone, where the family has links."""
    wanted = {node.inum for node in nodes}
    objects = Objects()
    try:
        spaces = [space for space in active(netns.find()) if space.inum in wanted]
        with Timing(objects, spaces, family) as timers:
            yield timers
    finally:
        objects.close()


# -- time ------------------------------------------------------------------------------------


@pytest.mark.clocks
def test_every_packet_is_timed_once_at_each_hook(timers: str) -> None:
    with pair() as (a, b), timing(timers, a, b) as timer:
        send(a, b, PACKETS)
        time.sleep(0.1)
        times = timer.read()
    cost, rows = model.latencies(times)
    by_point = {(row.point, row.proto): row for row in rows}
    # One new packet and the rest established, in each of the two namespaces. A packet
    # that is interrupted inside the hook is not timed.
    new, established = by_point["in new", "udp"], by_point["in established", "udp"]
    assert 1 <= new.packets <= 2
    assert 0.98 * 2 * (PACKETS - 1) <= established.packets <= 2 * (PACKETS - 1)
    # In an emulated machine a probe may take longer than what it measures.
    assert 0 <= established.percentiles[0] < established.percentiles[-1]
    assert KERNEL or established.percentiles[0] > 0
    assert cost is not None
    assert cost > 0
    if timers != "netfilter":
        assert 1 <= by_point["confirm", "udp"].packets <= 2
    assert totals(times)[0] == pytest.approx(2 * PACKETS, rel=0.02)


@pytest.mark.clocks
def test_the_timers_agree_with_the_kernels_clock_of_bpf_programs(timers: str) -> None:
    """A program of known run time inside the timed stretch makes it longer by just that.

    In rounds, of which the middle one counts: in one or two of them the machine does
    something else for a while.
    """

    def rounds(a: Node, b: Node, ran: Callable[[], tuple[int, int]]) -> tuple[float, float]:
        """Nanoseconds a packet: timed in all, and of these the program's own."""
        found = []
        with timing(timers, a, b) as timer:
            for _ in range(ROUNDS):
                before, runs = totals(timer.read()), ran()
                send(a, b, PACKETS // ROUNDS)
                times, now = timer.read(), ran()
                packets, ns = (x - y for x, y in zip(totals(times), before))
                found.append(((ns / packets), (now[1] - runs[1]) / max(now[0] - runs[0], 1)))
        packets, ns = totals(times)
        cost, rows = model.latencies(times)
        row = next(r for r in rows if (r.point, r.proto) == ("in established", "udp"))
        # The histogram says the same as the exact sum, where the first packet, which makes the
        # entry and is not in this row, weighs little.
        if ran()[0]:
            assert row.mean + (cost or 0.0) == pytest.approx(ns / packets, rel=RELATIVE_ERROR)
        return sorted(found, key=lambda one: one[0] - one[1])[ROUNDS // 2]

    with pair(track_server=False) as (a, b):
        send(a, b, 10)
        without, _ = rounds(a, b, lambda: (0, 0))
        ballast = Ballast(timers, a)
        try:
            with_it, added = rounds(a, b, ballast.ran)
            runs, _ = ballast.ran()
        finally:
            ballast.close()
    assert runs == pytest.approx(PACKETS, rel=0.02)
    # What is left is the way to the program and back, and what the machine did meanwhile.
    assert with_it - without == pytest.approx(added, rel=0.3 if KERNEL else 0.15)


@pytest.mark.clocks
def test_a_pair_of_function_hooks_and_the_bracket_agree() -> None:
    if not {"fentry", "netfilter"} <= set(families()):
        pytest.skip("this kernel cannot time both ways")
    with pair(track_server=False) as (a, b):
        send(a, b, 10)
        ballast = Ballast("fentry", a)
        try:
            with timing("netfilter", a, b) as outer, timing("fentry", a, b) as inner:
                read = [(totals(outer.read()), totals(inner.read()))]
                for _ in range(ROUNDS):
                    send(a, b, PACKETS // ROUNDS)
                    read.append((totals(outer.read()), totals(inner.read())))
        finally:
            ballast.close()
    (first_around, first_inside), (around, inside) = read[0], read[-1]
    packets = around[0] - first_around[0]
    assert packets == pytest.approx(inside[0] - first_inside[0], rel=0.02)
    # The bracket also holds the walk from hook to hook, and here the pair's own programs.
    ratios = [
        (outer_now[1] - outer_before[1]) / (inner_now[1] - inner_before[1])
        for (outer_before, inner_before), (outer_now, inner_now) in zip(read, read[1:])
    ]
    assert 1 < sorted(ratios)[ROUNDS // 2] < 1.25


@pytest.mark.clocks
def test_notrack_saves_what_was_said(timers: str) -> None:
    with pair(track_server=False) as (a, b), timing(timers, a, b) as timer:
        send(a, b, PACKETS)
        tracked = totals(timer.read())
        rule = (
            "add table inet off; add chain inet off out { type filter hook output "
            f"priority -310; }}; add rule inet off out udp dport {PORT} notrack"
        )
        a.run(["nft", rule])
        send(a, b, PACKETS)
        untracked = totals(timer.read())
    # Untracked, none of its packets is worked on in the hook any more: all that was
    # said to go does go.
    assert tracked[0] == pytest.approx(PACKETS, rel=0.02)
    assert tracked[1] > 0
    assert untracked == tracked


def test_namespaces_that_come_later_are_timed_and_none_is_kept(timers: str) -> None:
    with pair() as others, timing(timers, *others) as timer:
        with pair(track_server=False) as (a, b):
            mine = {node.inum for node in (*others, a, b)}
            timer.follow([one for one in active(netns.find()) if one.inum in mine])
            send(a, b, 100)
            assert totals(timer.read())[0] == pytest.approx(100, rel=0.02)
            gone = a.inum
        timer.follow([one for one in active(netns.find()) if one.inum in mine])
        assert gone not in timer._spaces


def test_services_of_each_protocol_are_told(timers: str) -> None:
    with pair(track_server=False) as (a, b), timing(timers, a, b) as timer:
        target = b.addresses[a.name][0]
        traffic.pings(a, target, 30)
        traffic.udp_flows(a, (target, 65535), 20)
        with traffic.tcp_server(b, 8063):
            traffic.tcp_connections(a, (target, 8063), 5)
        times = timer.read()
    seen = dict(zip(times.services.tolist(), times.totals[:, 0].tolist(), strict=True))
    assert seen[1 << 16] == pytest.approx(2 * 30, abs=2)  # answers too
    assert 20 <= seen[17 << 16 | 65535] <= 2 * 20  # ICMP errors belong to the flow, too
    assert seen[6 << 16 | 8063] >= 5 * 4


def test_two_may_measure_at_once(timers: str) -> None:
    with pair(track_server=False) as (a, b), timing(timers, a, b) as one:
        with timing(timers, a, b) as other:
            send(a, b, PACKETS)
            assert totals(other.read())[0] == pytest.approx(PACKETS, rel=0.02)
            told = any("another ctrace perf" in sentence for sentence in other.blind)
            assert told == (timers == "netfilter")
        send(a, b, PACKETS)
        assert totals(one.read())[0] == pytest.approx(2 * PACKETS, rel=0.02)


# -- the hash table ----------------------------------------------------------------------------


def entries() -> tuple[int, int]:
    """Entries in all namespaces, and buckets."""
    with TableReader() as reader:
        rows = reader.read(netns.find())
    return sum(row.count for row in rows), max(row.buckets for row in rows)


def measured(timer: Timing, symbol: int) -> model.Chains:
    """Chains of the whole table at a moment when as many entries were there before as after."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:  # for a moment in which nobody else makes entries
        before, buckets = entries()
        try:
            found = chains.measure(buckets, symbol, timer.entries(), sample=buckets)
        except CtraceError as gone:  # others' entries, all of them, meanwhile
            told = str(gone)
        else:
            nodes = sum(length * n for length, n in enumerate(found.lengths))
            told = f"{nodes} nodes in the chains of {before} entries"
            # else an entry was not yet, or no longer, in the table
            if nodes == 2 * before == 2 * entries()[0] and not found.disturbed:
                return found
        time.sleep(0.1)
    pytest.fail(told)


def test_all_entries_are_found_in_the_chains(timers: str) -> None:
    flows = FLOWS
    with pair() as (a, b), timing(timers, a, b) as timer:
        open_flows(a, b, flows)
        send(a, b, 20)
        by_entry = measured(timer, 0)
        assert by_entry.measured == by_entry.buckets
        assert sum(length * n for length, n in enumerate(by_entry.lengths)) >= 4 * flows
        symbol = symbols.kernel().data("nf_conntrack_hash")
        if symbol:
            by_symbol = measured(timer, symbol)
            assert by_symbol.mean == pytest.approx(by_entry.mean, rel=0.1)
        part = chains.measure(by_entry.buckets, symbol, timer.entries(), sample=1 << 14)
    assert part.measured + part.disturbed == min(by_entry.buckets, 1 << 14)


@alone
def test_full_buckets_make_chains_as_long_as_even_hashing_says() -> None:
    """By any timers: these only tell where an entry is, as the test before says of each."""
    timers = next(name for name in FAMILIES if name in families())
    with open("/proc/sys/net/netfilter/nf_conntrack_buckets") as file:
        kept = file.read()
    with open("/proc/sys/net/netfilter/nf_conntrack_buckets", "w") as file:
        file.write("1024")
    try:
        with pair() as (a, b), timing(timers, a, b) as timer:
            open_flows(a, b, 1500)
            send(a, b, 20)
            found = measured(timer, symbols.kernel().data("nf_conntrack_hash"))
    finally:
        with open("/proc/sys/net/netfilter/nf_conntrack_buckets", "w") as file:
            file.write(kept)
    assert found.buckets == found.measured == 1024
    assert found.mean >= 4 * 1500 / 1024
    assert abs(found.p99 - found.expected_p99) <= 3
    assert found.longest >= found.p99


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(CtraceError, match="not found"):
        chains.measure(65536, 0, [symbols.kernel().range("nf_conntrack_free")[0]])  # type: ignore[index]
    with pytest.raises(CtraceError, match="not found"):
        chains.measure(65536, 0, [])


# -- stacks --------------------------------------------------------------------------------------


def test_every_insert_has_its_stack(timers: str) -> None:
    flows = 200
    names = symbols.kernel()
    with (
        pair(track_server=False) as (a, b),
        Measurement(names, stacks_of="insert", family=timers) as measurement,
    ):
        open_flows(a, b, flows)
        answer = measurement.answer()
    mine = [(stack, n) for stack, n in answer.stacks if "udp_sendmsg" in stack]
    assert sum(n for _, n in mine) >= flows
    where = "__nf_conntrack_alloc" if timers == "netfilter" else "__nf_conntrack_confirm"
    assert all(where in stack.split(";") for stack, _ in mine)
    assert "bpf_prog" not in mine[0][0]


@alone
@pytest.mark.parametrize("event", ["drop", "evict"])
def test_every_refusal_and_eviction_has_its_stack(timers: str, event: str) -> None:
    names = symbols.kernel()
    limits = {"max": "100", "buckets": "1024" if event == "drop" else "128"}
    kept = {}
    for name in limits:
        with open(f"/proc/sys/net/netfilter/nf_conntrack_{name}") as file:
            kept[name] = file.read()
    try:
        with pair(track_server=False) as (a, b):
            for name, value in limits.items():
                with open(f"/proc/sys/net/netfilter/nf_conntrack_{name}", "w") as file:
                    file.write(value)
            with Measurement(names, stacks_of=event, family=timers) as measurement:
                before = a.stats()
                open_flows(a, b, 400)
                time.sleep(0.5)
                answer = measurement.answer()
                after = a.stats()
    finally:
        for name, value in kept.items():
            with open(f"/proc/sys/net/netfilter/nf_conntrack_{name}", "w") as file:
                file.write(value)
    column = "early_drop" if event == "evict" else "drop"
    expected = after[column] - before[column]
    assert expected > 20
    assert sum(n for _, n in answer.stacks) == expected
    calls = answer.stacks[0][0].split(";")
    assert "udp_sendmsg" in calls
    # at the tracepoint the refused packet has left conntrack's code
    assert (timers == "netfilter" and event == "drop") or "early_drop" in calls
