"""What conntrack cost, as sections of the report's page."""

from __future__ import annotations

from collections.abc import Callable

from ctrace.cost.result import Perf
from ctrace.view import format as fmt
from ctrace.view.report.cost import (
    PERCENTILES,
    headline,
    latency_name,
    other_lines,
    precision,
    saving,
    services,
    table_lines,
)
from ctrace.view.report.svg import quoted

Table = Callable[..., str]
"""Makes a section of a title, columns, rows of HTML cells and a note."""


def perf_html(host: str, perf: Perf, table: Table) -> str:
    """The sections."""
    told = [*headline(perf).plain.splitlines(), *other_lines(perf)]
    lines = "<br>".join(quoted(line) for line in told)
    return (
        f"<section><h2>What conntrack cost on {quoted(host) or 'this host'}</h2><p>{lines}</p>"
        f"{_missing(perf)}</section>" + _of_packets(perf, table) + _of_the_kernel(perf, table)
    )


def _of_packets(perf: Perf, table: Table) -> str:
    """What each kind of packet took, and what NOTRACK would save."""
    return table(
        "Time in conntrack, nanoseconds",
        ("packets that were", ">packets", ">mean", *(f">{name}" for name in PERCENTILES)),
        (
            [
                quoted(latency_name(row)),
                fmt.count(row.packets),
                fmt.count(row.mean),
                *(fmt.count(value) for value in row.percentiles),
            ]
            for row in perf.latencies
        ),
        precision(perf).capitalize() + ".",
    ) + table(
        "What NOTRACK would save",
        ("service", ">packets/s", ">ns a packet", ">CPU ms a second"),
        (
            [
                quoted(name),
                fmt.count(row.packets_per_s),
                fmt.count(row.ns_per_packet),
                fmt.decimal(row.cores * 1e3, 2),
            ]
            for name, row in services(perf)
        ),
        saving(perf).capitalize() + ".",
    )


def _of_the_kernel(perf: Perf, table: Table) -> str:
    """Functions, stacks, the hash table and its locks."""
    return (
        table(
            "Where conntrack's CPU time went",
            ("function", ">share of all CPU time"),
            ([quoted(row.function), f"{100 * row.share:.2f} %"] for row in perf.hot),
            folded=True,
        )
        + table(
            "Kernel stacks through conntrack",
            (">samples", "outermost function first"),
            (
                [fmt.count(count), quoted(" → ".join(stack.split(";")))]
                for stack, count in perf.sampled_stacks
            ),
        )
        + table(
            "Hash table",
            ("namespace", ">entries", ">search restarts", ">chains too long", ">clashes resolved"),
            (
                [
                    quoted(row.netns),
                    fmt.count(row.count),
                    fmt.count(row.search_restart),
                    fmt.count(row.chaintoolong),
                    fmt.count(row.clash_resolve),
                ]
                for row in perf.tables
            ),
            quoted(". ".join(table_lines(perf))),
        )
        + table(
            "Waiting for conntrack's locks",
            ("lock", ">waits", ">total ms", ">longest us", "kernel stack, innermost first"),
            (
                [
                    quoted(row.lock),
                    fmt.count(row.count),
                    fmt.decimal(row.total_ns / 1e6, 2),
                    fmt.decimal(row.longest_ns / 1e3, 1),
                    quoted(" ← ".join(row.stack.split(";")[::-1][:6])),
                ]
                for row in perf.waits or ()
            ),
            folded=True,
        )
    )


def _missing(perf: Perf) -> str:
    if not perf.blind:
        return ""
    sentences = "; ".join(quoted(sentence) for sentence in perf.blind)
    return f'<p class="note">Not measured: {sentences}</p>'
