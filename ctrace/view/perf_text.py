"""``ctrace perf`` for a terminal, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ctrace.model.perf import RELATIVE_ERROR, Perf

PERCENTILES = ("p50", "p90", "p99", "p99.9", "p99.99")


def perf_json(perf: Perf) -> dict[str, Any]:
    """Every field of :class:`Perf`; times in nanoseconds unless the name says otherwise."""
    document = asdict(perf)
    for latency in document["latencies"]:
        values = latency.pop("percentiles")
        latency["ns"] = dict(zip(PERCENTILES, values, strict=True))
    document["relative_error"] = RELATIVE_ERROR
    return document


def render(perf: Perf) -> RenderableType:
    """The answer as tables, the most important first."""
    parts: list[RenderableType] = [_headline(perf)]
    if perf.latencies:
        parts.append(_latencies(perf))
    if perf.services:
        parts.append(_services(perf))
    if perf.hot:
        hot = _table("function", "share of CPU")
        for function in perf.hot:
            hot.add_row(function.function, f"{function.share:.2%}")
        parts += [Text("\nWhere that CPU time goes", style="bold"), hot]
    if perf.tables:
        parts += [Text("\nHash table", style="bold"), _tables(perf)]
    if perf.gc_lag:
        p50, p90, p99 = perf.gc_lag
        parts.append(
            Text(
                f"\nExpired entries stayed {p50:.1f} s (p50), {p90:.1f} s (p90), {p99:.1f} s (p99) "
                f"past their timeout: {perf.expired:,} seen"
            )
        )
    if perf.drop_stacks:
        parts.append(Text("\nStacks of refused packets", style="bold"))
        for stack, count in perf.drop_stacks:
            parts.append(Text(f"{count:>8,}  {stack.replace(';', ' > ')}"))
    for sentence in perf.blind:
        parts.append(Text(f"not measured: {sentence}", style="dim"))
    return Group(*parts)


def _headline(perf: Perf) -> Text:
    text = Text()
    if perf.cpu_share is None:
        text.append("CPU share of connection tracking: not sampled", style="bold")
    else:
        text.append(f"Connection tracking takes {perf.cpu_share:.2%} of all CPU time", style="bold")
        text.append(f" ({perf.samples:,} samples, CPUs {perf.busy_share or 0:.0%} busy)")
    text.append(f"\n{perf.duration_s:.1f} s with {perf.family} timers")
    if perf.cost_ns is not None:
        text.append(f"; measuring itself took {perf.cost_ns:.0f} ns a packet, subtracted")
    return text


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _latencies(perf: Perf) -> RenderableType:
    table = _table("time in conntrack", "packets", "mean ns", *PERCENTILES)
    for row in perf.latencies:
        table.add_row(
            f"{row.point}, {row.proto}",
            f"{row.packets:,}",
            f"{row.mean:,.0f}",
            *(f"{value:,.0f}" for value in row.percentiles),
        )
    return Group(Text(""), table, Text(f"percentiles ±{RELATIVE_ERROR:.0%}", style="dim"))


def _services(perf: Perf) -> RenderableType:
    table = _table("what NOTRACK would save", "packets/s", "ns/packet", "cores")
    for row in perf.services[:10]:
        port = f"/{row.port}" if row.port else ""
        table.add_row(
            f"{row.proto}{port}",
            f"{row.packets_per_s:,.0f}",
            f"{row.ns_per_packet:,.0f}",
            f"{row.cores:.4f}",
        )
    return Group(Text(""), table)


def _tables(perf: Perf) -> Table:
    table = _table(
        "namespace", "entries", "buckets", "mean chain", "p99 chain", "restarts", "too long",
        "clashes",
    )  # fmt: skip
    for row in perf.tables:
        table.add_row(
            row.netns, f"{row.count:,}", f"{row.buckets:,}", f"{row.load:.2f}",
            f"{row.chain_p99}", f"{row.search_restart:,}", f"{row.chaintoolong:,}",
            f"{row.clash_resolve:,}",
        )  # fmt: skip
    return table
