"""Who opened a flow: real processes in cgroups as container runtimes and systemd make them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kit import traffic

from ctrace.batch import Owner
from ctrace.capture import open_live
from ctrace.filters import Filter
from ctrace.host.process import cgroup_root
from ctrace.lab import Lab, Node
from ctrace.record import Events, Kind, join

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
ID = "3f4e" + "0" * 56 + "beef"
POD = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice"
NAMES = {
    f"docker-{ID}.scope": "docker:3f4e00000000",
    f"docker/{ID}": "docker:3f4e00000000",
    f"{POD}/cri-containerd-{ID}.scope": "k8s:3f4e00000000",
    f"{POD}/crio-{ID}.scope": "k8s:3f4e00000000",
    f"machine.slice/libpod-{ID}.scope": "podman:3f4e00000000",
    "system.slice/statsd.service": "statsd.service",
}

SENDER = """
import os, socket, sys
with open(sys.argv[1] + "/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
with open("/proc/self/comm", "w") as file:
    file.write(sys.argv[3])
for port in range(int(sys.argv[4]), int(sys.argv[4]) + 5):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("", port))
        s.sendto(b"x", (sys.argv[2], 4477))
"""


@pytest.fixture
def tree() -> Iterator[Path]:
    """A part of the cgroup hierarchy of our own."""
    root = cgroup_root()
    if not root:
        pytest.fail("cgroup v2 is not mounted")
    top = Path(root) / f"ctrace-test-{os.getpid()}"
    top.mkdir()
    try:
        yield top
    finally:
        remove(top)


def remove(top: Path) -> None:
    for folder, _, _ in os.walk(top, topdown=False):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:  # until its last process is reaped
            with contextlib.suppress(OSError):
                os.rmdir(folder)
                break
            time.sleep(0.01)


def send(node: Node, group: Path, target: str, comm: str, port: int) -> int:
    """Five flows of a process that has ended when this returns; its id."""
    argv = [sys.executable, "-c", SENDER, str(group), target, comm, str(port)]
    with node.enter():
        child = subprocess.Popen(argv)
    assert child.wait() == 0
    return child.pid


def arrived(events: Events, *nodes: Node) -> int:
    """Inserts of the senders' flows, at either end."""
    mine = np.isin(events["netns"], [node.inum for node in nodes])
    return int((mine & (events["kind"] == Kind.INSERT) & (events["sport"] >= 30000)).sum())


@pytest.mark.parametrize("gone", [False, True], ids=["cgroup stays", "cgroup is gone too"])
def test_a_process_that_ended_is_named_with_its_container(tree: Path, gone: bool) -> None:
    pids: dict[int, str] = {}
    events: list[Events] = []
    owners: dict[int, Owner] = {}
    with Lab() as lab:
        a, b = lab.namespace("a", track=True), lab.namespace("b", track=True)
        lab.link(a, b)
        traffic.udp_flows(a, (b.addresses["a"][0], 4477), 1)
        wanted = Filter(dport=4477)  # of all flows a busy reader may lose some
        with contextlib.closing(open_live(wanted, seed=False)) as source:
            if not source.hooks.owners:
                pytest.fail("these hooks know no owner")
            batches = source.batches(0.2)
            next(batches)
            for at, (path, _) in enumerate(NAMES.items()):
                group = tree / path
                group.mkdir(parents=True)
                port = 30000 + 10 * at
                pids[send(a, group, b.addresses["a"][0], f"sender{at}", port)] = path
            if gone:
                remove(tree)
                assert not tree.exists()
                tree.mkdir()
            until = time.monotonic() + 60
            while sum(arrived(one, a, b) for one in events) < 2 * 5 * len(NAMES):
                assert time.monotonic() < until
                batch = next(batches)
                events.append(batch.events)
                owners.update(batch.names.owners)
        inum, other = a.inum, b.inum
    seen = join(events)
    inserts = seen[seen["kind"] == Kind.INSERT]
    sent = inserts[inserts["netns"] == inum]
    for at, (pid, path) in enumerate(pids.items()):
        mine = sent[(sent["sport"] >= 30000 + 10 * at) & (sent["sport"] < 30005 + 10 * at)]
        assert len(mine) == 5
        assert set((mine["owner"] >> np.uint64(32)).tolist()) == {pid}
        found = owners[int(mine["owner"][0])]
        assert (found.comm, found.unit) == (f"sender{at}", NAMES[path])
        assert set(mine["cgroup"].tolist()) == {found.cgroup}
    # who runs while a packet arrives is not its owner
    assert not inserts["owner"][inserts["netns"] == other].any()
