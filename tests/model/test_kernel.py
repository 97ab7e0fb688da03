"""The model over real traffic, against conntrack's own listing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing

import pytest
from kit.traffic import tcp_connections, tcp_server, udp_flows

from ctrace.batch import Batch
from ctrace.capture import open_live
from ctrace.filters import Filter
from ctrace.lab import Lab, Node
from ctrace.model import Model

pytestmark = pytest.mark.kernel


def listed(node: Node) -> Counter[str]:
    """Entries per source and service, as ``conntrack -L`` shows them."""
    found: Counter[str] = Counter()
    for line in node.run(["conntrack", "-L"]).splitlines():
        words = line.split()
        if words and words[0] in ("tcp", "udp"):
            first = dict(word.split("=", 1) for word in reversed(words) if "=" in word)
            found[f"{first['src']} -> {words[0]}/{first['dport']}"] += 1
    return found


def held(model: Model, node: Node) -> dict[str, int]:
    culprits = model.snapshot("pair", limit=1000).culprits
    return {c.key: c.held for c in culprits if c.netns == node.inum and c.held}


def settle(model: Model, batches: Iterator[Batch], node: Node) -> None:
    """Until they agree, or a minute has passed: collected entries may go meanwhile."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        before = listed(node)
        model.update(next(batches))
        if held(model, node) == dict(before) == dict(listed(node)):
            return
    assert held(model, node) == dict(listed(node))


def test_held_agrees_with_conntrack_at_several_moments() -> None:
    with Lab() as lab:
        client, server = lab.namespace("client"), lab.namespace("server", track=True)
        _, address = lab.link(client, server)
        udp_flows(client, (address, 7000), 20)  # older than the tracer
        with (
            tcp_server(server, 8080),
            tcp_server(server, 8081),
            # a flood elsewhere on the host would take the rows of these few keys
            closing(open_live(Filter(netns=server.inum), sample=True)) as source,
        ):
            model = Model(source.hooks, source.clock, source.started)
            batches = source.batches(0.1)
            settle(model, batches, server)
            for flows in (50, 150):
                tcp_connections(client, (address, 8080), flows)
                tcp_connections(client, (address, 8081), 20, reset=True)
                udp_flows(client, (address, 8125), flows, first_port=30000 + flows * 10)
                settle(model, batches, server)
            server.run(["conntrack", "-F"])
            settle(model, batches, server)
            service = {
                c.key: c for c in model.snapshot("service").culprits if c.netns == server.inum
            }
            tcp = service["tcp/8080"]
            assert tcp.inserts == tcp.destroys == 200
            assert tcp.ends.deleted + tcp.ends.other == 200
            assert tcp.life.p50 is not None
            assert tcp.life.p50 < 30  # a busy machine's; the entries stay for two minutes
            table = next(t for t in model.snapshot().tables if t.netns == server.inum)
            assert table.off_by.count == 0
