"""Snapshots of many namespaces, of names that attack the terminal, and of rows that all change."""

from __future__ import annotations

from dataclasses import replace

from ctrace.model.snapshot import Cause, OwnerView, Rates, Snapshot, Table
from ctrace.model.snapshot import Remedy as Help
from kit.samples import NOW, incident


def namespaces(n: int = 40) -> Snapshot:
    """Many namespaces, one of them full."""
    full = incident()
    shown = [
        Table(
            4026532000 + index, f"pod-{index:02d}-checkout-5d9f7b6c4d-x{index:03d}",
            (index * 997) % 50_000, 65_536, 65_536, pinned=(index % 10) / 10,
            rates=Rates(insert=index * 3.0, destroy=index * 2.9),
        )
        for index in range(1, n)
    ]  # fmt: skip
    shown[7] = replace(
        shown[7],
        count=65_536,
        full_since=NOW - 12,
        pinned=0.99,
        pinned_error=0.004,
        rates=Rates(31, 20, 11.0),
    )
    return replace(full, tables=(replace(full.tables[0], count=2_000, full_since=None), *shown))


HOSTILE = (
    "\x1b[2J\x1b[31mowned",
    "\x1b]0;title\x07",
    "abc\u202ecba",
    "\u05d0\u05d1\u05d2 12",
    "zalgo" + "\u0301" * 30,
    "new\nline\ttab",
    "[bold red]markup[/]",
    "\u65e5\u672c\u8a9e-worker",
    "\u200b\u200d\ufeff",
    "\x9b31m",
    "x" * 300,
    "🔥" * 9,
)


def hostile() -> Snapshot:
    """Names that try to disturb the screen."""
    full = incident()
    base = full.culprits[0]
    return replace(
        full,
        host="no\x1bde\u202e",
        culprits=tuple(
            replace(
                base,
                key=f"{name}[{index}]",
                netns_name=name,
                owner=OwnerView(index, name, name, name, "opened"),
            )
            for index, name in enumerate(HOSTILE)
        ),
        victims=tuple(
            replace(
                full.victims[0], key=f"tcp {name} -> {name}:1", netns_name=name,
                owner=OwnerView(index, name, name, name),
            )
            for index, name in enumerate(HOSTILE)
        ),
        why=(Cause("no-keepalive", f"{''.join(HOSTILE[:3])} did it",
                   remedies=(Help("change", HOSTILE[3]),)),),
        tables=tuple(replace(full.tables[0], name=name) for name in HOSTILE),
    )  # fmt: skip


def churning(keys: int, tick: int) -> Snapshot:
    """A snapshot of ``keys`` culprits in which every number moves from tick to tick."""
    full = incident()
    base = full.culprits[0]
    culprits = tuple(
        replace(
            base,
            key=f"10.{index >> 8 & 255}.{index & 255}.{(index * 7 + tick) % 250} -> tcp/8063",
            held=(index * 7919 + tick * 104_729) % 50_000,
            share=((index + tick) % 97) / 100,
            new_per_s=(index * 31 + tick * 17) % 900 + 0.5,
            trend=tuple(float((index + tick + step) % 60) for step in range(60)),
        )
        for index in range(keys)
    )
    table = replace(full.tables[0], count=50_000 + tick * 37 % 15_000)
    return replace(
        full,
        ts=full.ts + tick * 1_000_000_000,
        culprits=culprits,
        culprits_total=keys,
        held_total=sum(one.held for one in culprits),
        table_seconds_total=sum(one.table_seconds for one in culprits),
        tables=(table, *full.tables[1:]),
    )
