"""What conntrack cost, as sections of the report's page."""

from __future__ import annotations

import html
from collections.abc import Callable

from ctrace.model.perf import RELATIVE_ERROR, Chains, Perf
from ctrace.view import format as fmt
from ctrace.view.perf_text import PERCENTILES, chains_text, headline, other_lines


def perf_html(host: str, perf: Perf, table: Callable[..., str]) -> str:
    """The sections; ``table`` makes one of a title, columns, rows of HTML cells and a note."""
    told = [*headline(perf).plain.splitlines(), *other_lines(perf)]
    lines = "<br>".join(_text(line) for line in told)
    return (
        f"<section><h2>What conntrack cost on {_text(host) or 'this host'}</h2><p>{lines}</p>"
        f"{_missing(perf)}</section>"
        + table(
            "Time in conntrack, nanoseconds",
            ("packets that were", ">packets", ">mean", *(f">{name}" for name in PERCENTILES)),
            (
                [_text(f"{row.point}, {row.proto}"), f"{row.packets:,}", f"{row.mean:,.0f}",
                 *(f"{value:,.0f}" for value in row.percentiles)]
                for row in perf.latencies
            ),
            f"Percentiles ±{RELATIVE_ERROR:.1%}.",
        )
        + table(
            "What NOTRACK would save",
            ("service", ">packets/s", ">ns a packet", ">cores"),
            (
                [_text(f"{row.proto}/{row.port}" if row.port else row.proto),
                 f"{row.packets_per_s:,.0f}", f"{row.ns_per_packet:,.0f}", f"{row.cores:.4f}"]
                for row in perf.services
            ),
        )
        + table(
            "Where conntrack's CPU time went",
            ("function", ">share of all CPU time"),
            ([_text(row.function), f"{row.share:.2%}"] for row in perf.hot),
        )
        + table(
            "Kernel stacks through conntrack",
            (">samples", "outermost function first"),
            ([f"{count:,}", _text(" → ".join(stack.split(";")))]
             for stack, count in perf.sampled_stacks),
        )
        + table(
            "Hash table",
            ("namespace", ">entries", ">buckets", ">mean chain", ">restarts", ">chains too long",
             ">clashes resolved"),
            (
                [_text(row.netns), f"{row.count:,}", f"{row.buckets:,}", f"{row.load:.2f}",
                 f"{row.search_restart:,}", f"{row.chaintoolong:,}", f"{row.clash_resolve:,}"]
                for row in perf.tables
            ),
            _chains(perf.chains) if perf.chains else "",
        )
        + table(
            "Waiting for conntrack's locks",
            ("lock", ">waits", ">total ms", ">longest us", "kernel stack, innermost first"),
            (
                [_text(row.lock), f"{row.count:,}", f"{row.total_ns / 1e6:,.2f}",
                 f"{row.longest_ns / 1e3:,.1f}", _text(" ← ".join(row.stack.split(";")[::-1][:6]))]
                for row in perf.waits or ()
            ),
        )
    )  # fmt: skip


def _chains(chains: Chains) -> str:
    return _text(chains_text(chains))


def _missing(perf: Perf) -> str:
    if not perf.blind:
        return ""
    sentences = "; ".join(_text(sentence) for sentence in perf.blind)
    return f'<p class="note">Not measured: {sentences}</p>'


def _text(text: str) -> str:
    return html.escape(fmt.clean(text))
