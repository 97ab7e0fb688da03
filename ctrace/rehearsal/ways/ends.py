"""Where packets come to an end on a stage: chains of ours that report them and drop them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from ctrace.host.rawlink import attr, be32, nested, text
from ctrace.rehearsal import nft_copy
from ctrace.rehearsal.nft_copy import CHAIN, EGRESS, NETDEV, RULE, TABLE, Expression, Thing
from ctrace.rehearsal.packets import MARKER
from ctrace.rehearsal.snapshot import LOOPBACK, Snapshot

ENDS: Final = "rehearsal-ends"
INET, LO = 1, 1
PREROUTING, INPUT, FORWARD, OUTPUT, POSTROUTING = range(5)
FIRST, LAST = -(1 << 31) + 1, (1 << 31) - 1
_META_PRIORITY, _META_MARK, _META_OIF, _META_NFTRACE, _META_L4PROTO = 2, 3, 5, 12, 16
_DROP, _ACCEPT = 0, 1


def table(snapshot: Snapshot, classed: bool = False) -> Iterator[Thing]:
    """The table that sees what comes to an end, in nf_tables' own form.

    Where rules look at packets at a device that they leave by, the end is behind these.
    ``classed``: where it leaves its priority is told, as its mark, after its mark.
    """
    behind = bool(snapshot.leaving)
    yield TABLE, INET, text(1, ENDS)
    chains = [("in", INPUT, LAST), ("out", POSTROUTING, LAST), ("mark", PREROUTING, FIRST)]
    chains += [("pre", PREROUTING, FIRST + 1), ("send", OUTPUT, FIRST)]  # empty: see Stage.trace
    for name, hook, priority in chains:
        where = nested(4, attr(1, be32(hook)), attr(2, struct.pack(">i", priority)))
        yield (
            CHAIN,
            INET,
            text(1, ENDS) + text(3, name) + where + attr(5, be32(_ACCEPT)) + text(7, "filter"),
        )
    rules: list[tuple[str, list[Expression]]] = [
        ("in", [*trace(), _verdict(_DROP)]),
        ("out", [*_equal(_META_OIF, struct.pack("=I", LO)), _verdict(_ACCEPT)]),
        *([("out", [_verdict(_ACCEPT)])] if behind else _out(classed)),
        ("mark", [*_equal(_META_L4PROTO, bytes([MARKER])), *trace(), _verdict(_DROP)]),
    ]
    for name, found in rules:
        yield RULE, INET, rule(name, found)[4:]
    if behind:
        yield from _at_devices(snapshot, classed)


def _out(classed: bool) -> list[tuple[str, list[Expression]]]:
    if not classed:
        return [("out", [*trace(), _verdict(_DROP)])]
    load = [(1, be32(1)), (2, be32(_META_PRIORITY))], [(2, be32(_META_MARK)), (3, be32(1))]
    return [("out", trace()), ("out", [*(("meta", of) for of in load), _verdict(_DROP)])]


def _at_devices(snapshot: Snapshot, classed: bool) -> Iterator[Thing]:
    names = [text(1, device.name) for device in snapshot.devices if device.kind != LOOPBACK]
    yield TABLE, NETDEV, text(1, ENDS)
    last = attr(1, be32(EGRESS)), attr(2, struct.pack(">i", LAST)), nested(4, *names)
    base = nested(4, *last) + attr(5, be32(_ACCEPT)) + text(7, "filter")
    yield CHAIN, NETDEV, text(1, ENDS) + text(3, "out") + base
    for name, found in _out(classed):
        yield RULE, NETDEV, rule(name, found, NETDEV)[4:]


def rule(chain: str, found: list[Expression], family: int = INET) -> bytes:
    """A rule in one of our chains, with its message's head."""
    body = text(1, ENDS) + text(2, chain) + attr(4, nft_copy.packed(found))
    return struct.pack(">BBH", family, 0, 0) + body


def trace() -> list[Expression]:
    """From here on the kernel tells each of a packet's steps."""
    one = nested(2, attr(1, b"\1"))
    return [
        ("immediate", [(1, be32(1)), (2, one[4:])]),
        ("meta", [(2, be32(_META_NFTRACE)), (3, be32(1))]),
    ]


def _equal(key: int, value: bytes) -> list[Expression]:
    return [
        ("meta", [(1, be32(1)), (2, be32(key))]),
        ("cmp", [(1, be32(1)), (2, be32(0)), (3, attr(1, value))]),
    ]


def _verdict(code: int) -> Expression:
    return "immediate", [(1, be32(0)), (2, nested(2, attr(1, be32(code))))]
