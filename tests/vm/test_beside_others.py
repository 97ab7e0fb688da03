"""Beside others: tracers on the same hooks, modules and processors that go and come, clocks that
are set. All of this changes the whole machine, so it only runs in an emulated one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
from kit import traffic
from kit.machines import Net, Watch, flows, objects

import ctrace
from ctrace.capture import open_live
from ctrace.capture.family import Capture
from ctrace.capture.hooks import kprobe
from ctrace.capture.hooks.kprobe import Symbol, open_probe
from ctrace.capture.hooks.netfilter import HOOKS, PRIORITIES
from ctrace.capture.live import FAMILIES
from ctrace.errors import CtraceError
from ctrace.filters import Filter
from ctrace.host import netns
from ctrace.kernel import bpf, btf, layout, symbols
from ctrace.lab import Node
from ctrace.model import Model
from ctrace.record import Kind, Reason
from ctrace.recording.recorder import host_facts
from ctrace.recording.writer import Writer

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(
        os.environ.get("CTRACE_VM") != "6.12",
        reason="unloads modules, sets the clock, switches processors off: in one emulated machine",
    ),
]
PATIENCE = 120.0
RETURN = "b7000000{:02x}000000 9500000000000000"
"""A program that returns a number, and does nothing else."""
TRACED = "__nf_conntrack_hash_insert"
PROCESSOR = Path("/sys/devices/system/cpu/cpu1/online")
LIMIT = Path("/proc/sys/net/netfilter/nf_conntrack_max")
STEPS = (0.0, 3600.0, -7200.0)
"""Seconds by which the wall clock is ahead."""


def wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.3)  # a look may start a program, which takes as long in here


# -- modules ----------------------------------------------------------------------------------


def unload(module: str, gone: list[str]) -> None:
    """Unload it after all that stand on it; ``gone`` gets their names."""
    folder = Path("/sys/module", module)

    def went() -> bool:
        with suppress(FileNotFoundError):
            for holder in (folder / "holders").iterdir():
                unload(holder.name, gone)
        subprocess.run(["rmmod", module], capture_output=True, check=False)
        return not folder.exists()

    # who used it may have ended a moment ago: the kernel empties a namespace some time later
    wait(went, f"{module} is in use")
    gone.append(module)


def alone(module: str, gone: list[str]) -> bool:
    """Unload all that stand on it; whether none of them came back, as who reads a table brings
    nf_conntrack_netlink back, and it is in use all the same."""
    for holder in list(Path("/sys/module", module, "holders").iterdir()):
        unload(holder.name, gone)
    refused = subprocess.run(["rmmod", module], capture_output=True, check=False)
    assert refused.returncode, "nothing held it"
    return refused.stderr.strip().endswith(b"is in use")


@pytest.fixture
def gone() -> Iterator[list[str]]:
    """Modules that a test unloads; they are loaded again, elsewhere in memory."""
    modules: list[str] = []
    yield modules
    subprocess.run(["modprobe", "-a", *modules], check=True)
    for kept in (btf.kernel, kprobe.symbols, layout._functions, symbols.kernel):
        kept.cache_clear()


def test_conntrack_is_unloaded_while_it_is_watched(gone: list[str], tmp_path: Path) -> None:
    """Before any test here tracks something: what tracks holds the module."""
    before = objects()
    said, file = tmp_path / "said", str(tmp_path / "a.data")
    with said.open("wb") as out:
        argv = [sys.executable, "-m", "ctrace", "record", "--hooks", "kprobe", "-o", file]
        child = subprocess.Popen(argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        wait(lambda: "recording to" in said.read_text() or child.poll() is not None, "no start")
        with ExitStack() as opened:
            readings = []
            for family in ("netfilter", "netlink"):
                source = open_live(hooks=family, sample=True)
                opened.callback(source.close)
                readings.append(source.batches(0.1))
                next(readings[-1])
            held = open_live(hooks="fentry")  # trampolines hold the module
            opened.callback(held.close)
            wait(lambda: alone("nf_conntrack", gone), "another module uses nf_conntrack")
            next(held.batches(0.1))
            held.close()
            unload("nf_conntrack", gone)
            for reading in readings:
                with pytest.raises(CtraceError, match="nf_conntrack was unloaded"):
                    for _ in reading:
                        pass
        status = child.wait(timeout=PATIENCE)
    finally:
        child.kill()
        child.wait()
    first, last, *more = said.read_text().splitlines()
    assert first.startswith("ctrace: recording to")
    assert "nf_conntrack was unloaded" in last
    assert (status, more) == (1, [])
    with ctrace.open(file) as recording:
        assert list(recording.batches())
    wait(lambda: objects() <= before, "programs, maps or links stay")


def test_events_that_are_missing_while_their_module_was_gone_are_told(
    net: Net, gone: list[str]
) -> None:
    """ctnetlink goes and comes again: the netlink family says so, and counts the table anew."""
    client, target = net.client, net.server.addresses["client"][0]
    client.run(["conntrack", "-F"])
    source = open_live(Filter(netns=client.inum), hooks="netlink", sample=True)
    try:
        model = Model(source.hooks, source.clock, source.started)
        reading = source.batches(0.2)
        model.update(next(reading))
        traffic.udp_flows(client, (target, 9), 20, first_port=20000)
        unload("nf_conntrack_netlink", gone)
        traffic.udp_flows(client, (target, 9), 30, first_port=21000)
        subprocess.run(["modprobe", "nf_conntrack_netlink"], check=True)
        traffic.udp_flows(client, (target, 9), 10, first_port=22000)
        deadline = time.monotonic() + PATIENCE
        for batch in reading:
            model.update(batch)
            snapshot = model.snapshot("pair")
            told = snapshot.lost and not any(one.stale for one in snapshot.culprits)
            if told and snapshot.held_total == 60:
                break
            assert time.monotonic() < deadline, (snapshot.lost, snapshot.held_total)
        assert client.count() == 60
        assert any("was unloaded" in sentence for sentence in source.hooks.blind)
    finally:
        source.close()


# -- tracers ----------------------------------------------------------------------------------


class Others:
    """Programs at the places that the families want: trampoline, probe and netfilter link."""

    def __init__(self, node: Node) -> None:
        self._fds: list[int] = [bpf.enable_stats()]
        nothing, accept = (bytes.fromhex(RETURN.format(value)) for value in (0, 1))
        module = btf.open_object("nf_conntrack")
        types = btf.kernel("nf_conntrack")
        assert module is not None
        assert types is not None
        function = types.func(TRACED)
        assert function is not None
        self.fentry = self._keep(
            bpf.prog_load(
                nothing,
                bpf.ProgType.TRACING,
                "others_fentry",
                attach_type=bpf.AttachType.TRACE_FENTRY,
                attach_btf_id=function,
                attach_btf_fd=module,
            )
        )
        os.close(module)
        self._keep(bpf.raw_tracepoint_open(self.fentry))
        self.kprobe = self._keep(bpf.prog_load(nothing, bpf.ProgType.KPROBE, "others_kprobe"))
        self._keep(open_probe(self.kprobe, Symbol(TRACED), exit_=False))
        link = self._keep(
            bpf.prog_load(
                accept, bpf.ProgType.NETFILTER, "others_link", attach_type=bpf.AttachType.NETFILTER
            )
        )
        with node.enter():
            for family, hook in HOOKS:
                self._keep(bpf.link_netfilter(link, family, hook, PRIORITIES[0]))

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def counts(self) -> tuple[int, int]:
        """How often the kernel ran the first two."""
        fentry, kprobe = (bpf.prog_info(fd).run_count for fd in (self.fentry, self.kprobe))
        return fentry, kprobe

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


@pytest.fixture(scope="module")
def others(net: Net) -> Iterator[Others]:
    """There before the families come."""
    made = Others(net.client)
    yield made
    made.close()


def test_conntrack_events_and_other_programs_on_the_same_hooks(
    others: Others, family: str, net: Net, capture: Capture, tmp_path: Path
) -> None:
    client, target = net.client, net.server.addresses["client"][0]
    said = tmp_path / "said"
    with said.open("wb") as out:
        listener = client.start(["conntrack", "-E", "-e", "NEW", "-p", "udp"], stdout=out)
    try:
        marks = iter(range(40000, 60000))

        def heard() -> bool:
            traffic.udp_flows(client, (target, 9), 1, first_port=next(marks))
            return said.stat().st_size > 0

        wait(heard, "conntrack -E says nothing")
        with Watch(capture, net.nodes) as watch:
            before = others.counts()
            sent = traffic.udp_flows(client, (target, 9), 200, first_port=30000).flows
        after = others.counts()
        told = {f"sport={flow.sport} " for flow in sent}
        wait(lambda: all(one in said.read_text() for one in told), "conntrack -E lacks some")
    finally:
        listener.kill()
        listener.wait()
    watch.reconcile()
    assert flows(watch.of(client, Kind.INSERT)) == Counter(sent)
    assert flows(watch.of(net.server, Kind.INSERT)) == Counter(sent)
    inserts = sum(len(watch.of(node, Kind.INSERT)) for node in net.nodes)
    assert tuple(b - a for a, b in zip(before, after, strict=True)) == (inserts, inserts)


# -- processors -------------------------------------------------------------------------------


@pytest.fixture
def processors() -> Iterator[None]:
    """A second processor, switched on again afterwards."""
    limit, mine = LIMIT.read_text(), os.sched_getaffinity(0)
    yield
    LIMIT.write_text(limit)
    PROCESSOR.write_text("1")
    os.sched_setaffinity(0, mine)


@pytest.mark.usefixtures("processors")
def test_a_processor_that_goes_and_comes(family: str, net: Net, capture: Capture) -> None:
    """Counts stay the kernel's, also those of a capture that began while it was off."""
    client, target = net.client, net.server.addresses["client"][0]
    spaces = netns.find()
    for node in net.nodes:
        node.run(["conntrack", "-F"])
    PROCESSOR.write_text("0")
    late = FAMILIES[family](Filter(), 1 << 20)
    try:
        late.follow(spaces)
        with Watch(capture, net.nodes) as watch, Watch(late, net.nodes) as watch_late:
            sent = traffic.udp_flows(client, (target, 9), 50, first_port=31000).flows
            PROCESSOR.write_text("1")
            capture.follow(spaces)
            late.follow(spaces)
            os.sched_setaffinity(0, {1})
            there = traffic.udp_flows(client, (target, 9), 50, first_port=32000).flows
            LIMIT.write_text("1")
            full = traffic.udp_flows(client, (target, 9), 50, first_port=33000)
            LIMIT.write_text("262144")
    finally:
        late.close()
    assert len(full.refused) > 25  # what finds an entry to evict gets in
    for seen in (watch, watch_late):
        seen.reconcile()
        assert flows(seen.of(client, Kind.INSERT)) == Counter(sent + there + full.flows)
        assert seen.counts[client.inum][Reason.TABLE_FULL] == len(full.refused)
        if late.info.drop_tuples:
            assert flows(seen.of(client, Kind.DROP)) == Counter(full.refused)
        if late.info.owners:
            owners = seen.of(client, Kind.INSERT)["owner"] >> np.uint64(32)
            assert set(owners.tolist()) == {os.getpid()}


# -- clocks -----------------------------------------------------------------------------------


@pytest.fixture
def clock() -> Iterator[Callable[[float], None]]:
    """Sets the wall clock so many seconds from where it should be; put right afterwards."""
    ahead = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)

    def step(seconds: float) -> None:
        right = time.clock_gettime(time.CLOCK_BOOTTIME) + ahead
        time.clock_settime(time.CLOCK_REALTIME, right + seconds)

    yield step
    step(0)


def test_the_clock_is_set_while_recording(
    net: Net, clock: Callable[[float], None], tmp_path: Path
) -> None:
    client, target = net.client, net.server.addresses["client"][0]
    client.run(["conntrack", "-F"])
    file, sent = str(tmp_path / "a.data"), list[traffic.Flow]()
    began = time.time(), time.clock_gettime(time.CLOCK_BOOTTIME)
    source = open_live(Filter(netns=client.inum, kinds=frozenset({Kind.INSERT})))
    try:
        sink = Writer(file, host_facts.header(source))
        for batch in source.batches(0.1):
            sink.write(batch)
            if sink.events >= 50 * len(STEPS):
                break
            if sink.events == len(sent):
                clock(STEPS[len(sent) // 50])
                port = 34000 + len(sent)
                sent += traffic.udp_flows(client, (target, 9), 50, first_port=port).flows
        sink.close()
    finally:
        source.close()
    took = time.clock_gettime(time.CLOCK_BOOTTIME) - began[1]
    with ctrace.open(file) as found:
        events = np.concatenate([batch.events for batch in found.batches()])
        at = [found.clock.utc(int(ts)) / 1e9 for ts in events["ts"]]
    assert flows(events) == Counter(sent)
    assert at == sorted(at)
    assert began[0] - 0.1 <= at[0] <= at[-1] <= began[0] + took + 0.1
