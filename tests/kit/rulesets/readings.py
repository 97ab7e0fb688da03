"""Rules as they are read beside the events, and what causes make of them."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from typing import Any

from ctrace.batch import Clock, HookInfo
from ctrace.beside import Beside
from ctrace.lab import Node
from ctrace.model.causes.beside import FEW
from ctrace.model.model import Model
from ctrace.model.snapshot import Cause, Table
from ctrace.ruleset.told import Told, told
from kit.shapes import NETNS, START, Trace

TABLE = Table(NETNS, "init", 200, 1000, 1024)


def rules(*expressions: list[Any], saves: str = "", ipvs: str = "") -> Told:
    items = [
        {"rule": {"family": "ip", "table": "t", "chain": "c", "handle": n, "expr": one}}
        for n, one in enumerate(expressions)
    ]
    saved = (("iptables-nft", "ip", saves),) if saves else ()
    return told({"nft": json.dumps({"nftables": items}), "saves": saved, "ipvs": ipvs, "gaps": (),
                 "planes": ()})  # fmt: skip


SAVED = """*filter
:INPUT ACCEPT [0:0]
[9:540] -A INPUT -p tcp -m tcp --dport 22 -j ACCEPT
[5:300] -A INPUT -p tcp -m connlimit --connlimit-above 8 --connlimit-mask 32 -j REJECT
[5:300] -A INPUT -p tcp -m connlimit --connlimit-upto 8 --connlimit-mask 32 -j REJECT
[7:420] -A FORWARD -m conntrack --ctstate INVALID -j DROP
[8:480] -A FORWARD -m conntrack ! --ctstate INVALID -j DROP
[8:480] -A FORWARD -m state --state INVALID,NEW -j DROP
[1:60] -A FORWARD -m conntrack --ctstate INVALID -j LOG
COMMIT
"""


def explained(trace: Trace, *readings: Beside) -> tuple[Cause, ...]:
    """What is said of a trace whose last batch carries what was read beside it."""
    model = Model(HookInfo("fentry"), Clock(0), START)
    *before, last = trace.batches(12)
    for batch in before:
        model.update(batch)
    model.update(replace(last, beside=readings))
    return model.snapshot().why


NAT = """table ip n {{ chain p {{ type nat hook prerouting priority dstnat;
 ip daddr 192.0.2.10 udp dport 5060 dnat to {backend}
 ip daddr 192.0.2.11 udp dport 5060 dnat to {other}
}}
}}
"""


def translated(node: Node, backend: str) -> int:
    listed = node.run(["conntrack", "-L", "-p", "udp"], check=False)
    return len(re.findall(rf"dst=\S+ .* src={re.escape(backend)} ", listed))


def settled(node: Node, backend: str) -> int:
    """How many there are once enough of those sent have come: some wait for a neighbour."""
    deadline, before = time.monotonic() + 60, -1
    while (now := translated(node, backend)) < FEW or now != before:
        assert time.monotonic() < deadline, node.run(["conntrack", "-L"], check=False)
        before = now
        time.sleep(0.2)
    return now
