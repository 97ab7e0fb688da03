"""Two linked nodes with empty tables, and captures of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kit import traffic
from kit.running.tracing import Trace

from ctrace.filters import Filter
from ctrace.host import ctnetlink
from ctrace.lab import Lab, Node


@pytest.fixture
def pair(lab: Lab) -> tuple[Node, Node]:
    a, b = lab.namespace("a", track=True), lab.namespace("b", track=True)
    lab.link(a, b)
    # neighbours resolved, so that no first packet waits; then empty tables
    with traffic.tcp_server(b, 0) as port:
        for address in b.addresses["a"]:
            traffic.tcp_connections(a, (address, port), 1)
    for node in (a, b):
        ctnetlink.flush(node.path)
    return a, b


@pytest.fixture
def trace(pair: tuple[Node, Node]) -> Iterator[Trace]:
    made = Trace(*pair)
    yield made
    made.capture.close()


@pytest.fixture
def alone(pair: tuple[Node, Node]) -> Iterator[Trace]:
    """Of the first node only: no room in its rings goes to what others delete meanwhile."""
    made = Trace(*pair, wanted=Filter(netns=pair[0].inum))
    yield made
    made.capture.close()
