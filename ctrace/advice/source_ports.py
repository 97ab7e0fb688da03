"""How many of its source ports a translated address uses towards each destination: before
connections fail, where :mod:`ctrace.model.ports` sees those that do."""

from __future__ import annotations

import numpy as np

from ctrace.host import ctnetlink
from ctrace.record import Status, address_text, proto_name

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
            key = (
                proto_name(int(row["proto"])),
                address_text(row["reply_dst"]),
                address_text(row["reply_src"]),
                int(row["reply_sport"]),
            )
            ports.setdefault(key, set()).update(mine.tolist())
    found = {}
    for key, some in ports.items():
        fits = [high - low + 1 for low, high in ranges if low <= min(some) and max(some) <= high]
        if fits and key[0] in ("tcp", "udp"):
            found[key] = len(some), min(fits)
    return found
