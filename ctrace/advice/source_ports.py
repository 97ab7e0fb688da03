"""How many of its source ports a translated address uses towards each destination, and until when
that goes on: before connections fail, where :mod:`ctrace.model.ports` sees those that do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Final, Optional

import numpy as np

from ctrace.host import ctnetlink
from ctrace.model.causes.words import duration, percent
from ctrace.model.remedies import change
from ctrace.model.snapshot import Cause, Table
from ctrace.record import Status, address_text, proto_name

NEARLY: Final = 0.8
"""Part of the ports from which on it is told."""
GREW: Final = 20
"""Ports that have to be taken between two readings for a time to be told."""
SHOWN: Final = 3

Towards = tuple[str, str, str, int]
"""Protocol, translated source address, destination and its port."""
Ports = tuple[int, int]
"""In use, and how many there are."""


def used(netns_path: str, ranges: tuple[tuple[int, int], ...]) -> dict[Towards, Ports]:
    """Ports in use, of groups whose ports are all in one range that rules name.

    ``ranges``: first and last port that source NAT may take, by its rules. Raises CtraceError.
    """
    ports: dict[Towards, set[int]] = {}
    for table in ctnetlink.slices(netns_path) if ranges else ():
        rows = table.events
        rows = rows[rows["status"] & np.uint16(int(Status.SRC_NAT)) != 0]
        if not len(rows):
            continue
        names = ("proto", "reply_dst", "reply_src", "reply_sport")
        parts = (np.ascontiguousarray(rows[name]).view(np.uint8) for name in names)
        ends = np.concatenate([one.reshape(len(rows), -1) for one in parts], axis=1)
        _, first, code = np.unique(ends, axis=0, return_index=True, return_inverse=True)
        order = np.argsort(code.ravel(), kind="stable")
        taken = np.split(rows["reply_dport"][order], np.cumsum(np.bincount(code.ravel()))[:-1])
        for at, mine in zip(first.tolist(), taken):
            if len(mine) < 2:
                continue
            row = rows[at]
            key = (proto_name(int(row["proto"])), address_text(row["reply_dst"]),
                   address_text(row["reply_src"]), int(row["reply_sport"]))  # fmt: skip
            ports.setdefault(key, set()).update(mine.tolist())
    found = {}
    for key, some in ports.items():
        fits = [high - low + 1 for low, high in ranges if low <= min(some) and max(some) <= high]
        if fits and key[0] in ("tcp", "udp"):
            found[key] = len(some), min(fits)
    return found


def filling(
    table: Table, now: Mapping[Towards, Ports], before: Mapping[Towards, Ports], seconds: float
) -> Iterator[Cause]:
    """Where most of the ports are in use; ``before`` was read so many ``seconds`` earlier."""
    most = sorted(now.items(), key=lambda item: -item[1][0] / item[1][1])
    for (proto, source, dst, port), (n, of) in most[:SHOWN]:
        if n < NEARLY * of:
            continue
        place = f"[{dst}]:{port}" if ":" in dst else f"{dst}:{port}"
        was = before.get((proto, source, dst, port))
        until = _until(n, of, was[0], seconds) if was else ""
        service = f"{proto}/{port}"
        yield Cause(
            id="source-ports",
            text=f"{table.name}: source NAT to {source} uses {n:,} of the {of:,} ports that it "
            f"may take towards {proto} {place} ({percent(n / of)}{until})",
            evidence=(
                f"{n:,} different source ports in the table, all inside one range of {of:,}",
                "one address has each port once towards a destination and port",
            ),
            netns=table.netns,
            proto=proto,
            port=port,
            remedies=(
                change("more addresses or a wider port range for the source NAT",
                       table.netns, service),
                change("keep connections to it alive", table.netns, service),
            ),
        )  # fmt: skip


def _until(n: int, of: int, was: int, seconds: float) -> str:
    """When they are used up, if they go on to be taken as between two readings: with its error."""
    grew = n - was
    if n >= of or grew < GREW or seconds <= 0:
        return ""
    error = 2 * math.sqrt(grew)
    soon, late = ((of - n) * seconds / rate for rate in (grew + error, max(grew - error, 1.0)))
    return f"; at this rate used up in {duration(soon)} to {duration(late)}"


def same(one: Cause, other: Cause) -> bool:
    """Whether both are of one destination."""
    key: tuple[Optional[int], ...] = (one.netns, one.port)
    return one.id == other.id == "source-ports" and one.proto == other.proto and key == (
        other.netns, other.port)  # fmt: skip
