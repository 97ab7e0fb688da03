"""Runs the same tests once per hook family that holds on this kernel.

What was seen goes to $CTRACE_VM_OUT/<release>.json when that is set: the README's
table of kernels and families is made of it (scripts/kernels-table).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import traffic
from kit.machines import ASSURED, OTHERS, Net, Seen, Watch, families, followed

from ctrace.capture.family import Capture
from ctrace.capture.live import FAMILIES
from ctrace.filters import Filter
from ctrace.lab import Lab
from ctrace.record import Events, Kind

KERNEL = os.environ.get("CTRACE_VM", "")
_seen: Seen = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", families(), scope="module")


def pytest_sessionfinish() -> None:
    folder = os.environ.get("CTRACE_VM_OUT")
    if folder and _seen:
        release = os.uname().release
        file = Path(folder) / f"{release}.json"
        told = json.loads(file.read_text())["families"] if file.exists() else {}
        for family, what in _seen.items():  # some tests may have been repeated
            told[family] = {**told.get(family, {}), **what}
        text = json.dumps({"kernel": release, "families": told}, indent=1)
        file.write_text(text + "\n")


@pytest.fixture(scope="session")
def seen() -> Seen:
    """Family -> what -> how; filled in by a test after its assertions."""
    return _seen


@pytest.fixture(scope="session")
def net() -> Iterator[Net]:
    with Lab() as lab:
        yield Net(lab)


@pytest.fixture(scope="module")
def capture(family: str, net: Net) -> Iterator[Capture]:
    for node in net.nodes:
        node.run(["conntrack", "-F"], check=False)
    made = FAMILIES[family](Filter(), 1 << 23)
    made.follow(followed(*net.nodes))
    # The kernel empties a namespace some time after its last process: what others left
    # must be over before anything is counted.
    quiet = time.monotonic()
    while time.monotonic() - quiet < 1.0:
        time.sleep(0.05)
        events, lost = made.poll()
        if len(events) or lost:
            quiet = time.monotonic()
    yield made
    made.close()


@pytest.fixture
def entries(net: Net, capture: Capture) -> Iterator[Events]:
    """Some ASSURED entries and some that are not, as their inserts were seen."""
    if capture.info.family == "netlink":
        pytest.skip("tells no addresses, and has no programs")
    for node in net.nodes:
        node.run(["conntrack", "-F"])
    target = net.server.addresses["client"][0]
    with Watch(capture, net.nodes) as watch, traffic.tcp_server(net.server, 8063):
        traffic.tcp_connections(net.client, (target, 8063), ASSURED)
        traffic.udp_flows(net.client, (target, 9), OTHERS)
    yield watch.of(net.client, Kind.INSERT)
    for node in net.nodes:
        node.run(["conntrack", "-F"])
