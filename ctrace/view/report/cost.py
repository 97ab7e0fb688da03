"""``ctrace perf`` for a terminal, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ctrace.cost.result import RELATIVE_ERROR, Chains, Latency, Perf, ServiceCost, Wait, poisson_p99
from ctrace.view import format as fmt

PERCENTILES = ("p50", "p90", "p99", "p99.9", "p99.99")


def perf_json(perf: Perf) -> dict[str, Any]:
    """Every field of :class:`Perf`; times in nanoseconds unless the name says otherwise."""
    document = asdict(perf)
    for latency in document["latencies"]:
        values = latency.pop("percentiles")
        latency["ns"] = dict(zip(PERCENTILES, values))
    document["relative_error"] = RELATIVE_ERROR
    return document


POINTS = {
    "in new": "new",
    "in established": "established",
    "in other": "untracked, refused",
    "confirm": "confirm",
    "early_drop": "a scan of early_drop",
    "gc_worker": "a run of the collector",
}
"""For people; packets' protocol is added."""
NO_PACKET = ("early_drop", "gc_worker")
WORTH_SHOWING = 0.01
"""Share of the time of all services' packets. Less is noise of single packets."""
EVENTS = {"insert": "inserts", "drop": "refused packets", "evict": "evictions"}
"""Names of events as given to ``ctrace perf --stacks``."""


def render(perf: Perf) -> RenderableType:
    """The answer as tables, the most important first."""
    parts: list[RenderableType] = [headline(perf)]
    if perf.latencies:
        parts.append(_latencies(perf))
    if perf.services:
        parts.append(_services(perf))
    if perf.hot:
        hot = grid("function", "share of CPU")
        for function in perf.hot:
            hot.add_row(fmt.clean(function.function), f"{100 * function.share:.2f} %")
        parts += [Text("\nWhere that CPU time goes", style="bold"), hot]
    if perf.tables:
        parts += [Text("\nHash table", style="bold"), _tables(perf)]
    parts += map(Text, table_lines(perf))
    parts += map(Text, other_lines(perf))
    if perf.waits:
        parts += [Text("\nWaiting for conntrack's locks", style="bold"), *_waits(perf.waits)]
    if perf.stacks_of:
        parts.append(Text(f"\nStacks of {EVENTS.get(perf.stacks_of, '')}", style="bold"))
        for stack, count in perf.stacks:
            parts.append(Text(f"{count:>8,}  {_calls(stack)}"))
        if not perf.stacks:
            parts.append(Text("none seen"))
    for sentence in perf.blind:
        parts.append(Text(f"not measured: {fmt.clean(sentence)}", style="dim"))
    return Group(*parts)


def other_lines(perf: Perf) -> list[str]:
    """What waiting and the collector of expired entries cost, and how late collection is."""
    lines = []
    if perf.waiting_share is not None:
        lines.append(
            f"Spinning for conntrack's locks takes {100 * perf.waiting_share:.2f} % of all CPU time"
        )
    if perf.gc_share is not None:
        lines.append(f"The collector takes {100 * perf.gc_share:.2f} % of all CPU time")
    if perf.gc_lag:
        p50, p90, p99 = perf.gc_lag
        lines.append(
            f"Expired entries stayed {p50:.1f} s (p50), {p90:.1f} s (p90), {p99:.1f} s (p99) "
            f"past their timeout: {perf.expired:,} seen"
        )
    return lines


def headline(perf: Perf) -> Text:
    """The share of CPU time, and how it was measured."""
    text = Text()
    if perf.cpu_share is None:
        text.append("CPU share of connection tracking: not sampled", style="bold")
    else:
        text.append(
            f"Connection tracking takes {100 * perf.cpu_share:.2f} % of all CPU time", style="bold"
        )
        lost = f", {perf.lost_samples:,} more had no room" if perf.lost_samples else ""
        text.append(
            f" ({perf.samples:,} samples{lost}, CPUs {100 * (perf.busy_share or 0):.0f} % busy)"
        )
    timed = f"{perf.family} timers" if perf.family else "no timers"
    text.append(f"\n{perf.duration_s:.1f} s with {timed}")
    if perf.cost_ns is not None:
        text.append(f"; measuring itself took {perf.cost_ns:.0f} ns a packet, subtracted")
    return text


def grid(*columns: str) -> Table:
    """A table with text in the first column and numbers in the others."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _latencies(perf: Perf) -> RenderableType:
    table = grid("time in conntrack", "packets", "mean ns", *PERCENTILES)
    for row in perf.latencies:
        table.add_row(
            fmt.clean(latency_name(row)),
            fmt.count(row.packets),
            fmt.count(row.mean),
            *(fmt.count(value) for value in row.percentiles),
        )
    return Group(Text(""), table, Text(precision(perf), style="dim"))


def latency_name(row: Latency) -> str:
    """The name of what took the time."""
    name = POINTS.get(row.point, row.point)
    return name if row.point in NO_PACKET else f"{name}, {row.proto}"


def precision(perf: Perf) -> str:
    """How right the percentiles are."""
    of = ", of the time before measuring is subtracted" if perf.cost_ns is not None else ""
    return f"percentiles ±{100 * RELATIVE_ERROR:.1f} %{of}"


def services(perf: Perf) -> list[tuple[str, ServiceCost]]:
    """Named services, the dearest first, without the noise of single packets."""
    least = WORTH_SHOWING * sum(row.cores for row in perf.services)
    return [
        (fmt.clean(f"{row.proto}/{row.port}" if row.port else row.proto), row)
        for row in perf.services
        if row.cores > least
    ]


def saving(perf: Perf) -> str:
    """What the services' numbers hold."""
    if perf.family == "netfilter":
        return "in conntrack's hook alone; less work on new connections (confirm) comes on top"
    return "in nf_conntrack_in alone; confirm, above, comes on top for new connections"


def _services(perf: Perf) -> RenderableType:
    table = grid("what NOTRACK would save", "packets/s", "ns a packet", "CPU ms a second")
    for name, row in services(perf)[:10]:
        table.add_row(
            name,
            fmt.count(row.packets_per_s),
            fmt.count(row.ns_per_packet),
            fmt.decimal(row.cores * 1e3, 2),
        )
    return Group(Text(""), table, Text(saving(perf), style="dim"))


def _tables(perf: Perf) -> Table:
    table = grid("namespace", "entries", "search restarts", "chain too long", "clash resolved")
    for row in perf.tables:
        table.add_row(
            fmt.clean(row.netns),
            fmt.count(row.count),
            fmt.count(row.search_restart),
            fmt.count(row.chaintoolong),
            fmt.count(row.clash_resolve),
        )
    return table


def table_lines(perf: Perf) -> list[str]:
    """The hash table that all namespaces share: as expected, and as found."""
    lines = []
    if perf.tables:
        buckets = max(row.buckets for row in perf.tables)
        entries = sum(row.count for row in perf.tables)
        load = sum(row.load for row in perf.tables)
        lines.append(
            f"{entries:,} entries, each in two of {buckets:,} buckets: chains of {load:.2f} "
            f"expected, p99 {poisson_p99(load)}"
        )
    return lines + ([chains_text(perf.chains)] if perf.chains else [])


def chains_text(chains: Chains) -> str:
    """The table's chains as found, on one line."""
    share = chains.measured / chains.buckets if chains.buckets else 0.0
    return (
        f"Found in {chains.measured:,} of them ({100 * share:.0f} %): mean {chains.mean:.2f}, p99 "
        f"{chains.p99} (evenly hashed: {chains.expected_p99}), longest {chains.longest}"
    )


def _waits(waits: tuple[Wait, ...]) -> list[RenderableType]:
    table = grid("lock", "waits", "total ms", "longest us")
    stacks: list[RenderableType] = []
    for row in waits[:5]:
        table.add_row(
            f"{fmt.clean(row.lock)} in {fmt.clean(row.stack.rpartition(';')[2])}",
            fmt.count(row.count),
            fmt.decimal(row.total_ns / 1e6, 2),
            fmt.decimal(row.longest_ns / 1e3, 1),
        )
        stacks.append(Text(f"{row.count:>8,}  {_calls(row.stack)}", style="dim"))
    return [table, *stacks]


def _calls(stack: str) -> str:
    return fmt.clean(stack.replace(";", " > "))
