"""Help and advice are one head: what WHY offers to untrack, advice does not refuse."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import pytest
from kit.shapes import NETNS, START, TIME_WAIT, Trace, steady

from ctrace.advice.advise import advise
from ctrace.advice.facts import Facts, facts
from ctrace.advice.result import GOOD
from ctrace.batch import Batch, Clock, HookInfo, Names, Netns
from ctrace.lab import Lab
from ctrace.model.model import Model
from ctrace.model.snapshot import Snapshot
from ctrace.record import Direction, Status

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
HERE, THERE = "192.0.2.10", "192.0.2.77"
SIX, SIX_THERE = "2001:db8:9::10", "2001:db8:9::77"
IN, OUT = Direction.IN, Direction.OUT
SOME = Status.SEEN_REPLY | Status.ASSURED


@dataclass(frozen=True)
class Situation:
    """One service's flows: where they go, and what they look like."""

    proto: int
    port: int
    src: str
    dst: str
    direction: Direction
    ports: tuple[int, int] = (32768, 60999)
    """From which the clients' ports are."""
    status: Status = SOME
    translated: str = ""
    """Another source of the answers: destination NAT."""
    servers: int = 1


SITUATIONS = (
    (
        Situation(6, 8063, THERE, HERE, IN),
        Situation(6, 8064, SIX_THERE, SIX, IN),
        Situation(6, 8065, HERE, THERE, OUT),
        Situation(17, 8125, HERE, THERE, OUT, status=Status(0)),
    ),
    (
        Situation(6, 8063, HERE, THERE, OUT, ports=(20000, 30000)),
        Situation(6, 8064, SIX, SIX_THERE, OUT, ports=(700, 1000)),
        Situation(6, 8065, "127.0.0.1", "127.0.0.1", OUT),
        Situation(17, 53, HERE, THERE, OUT, status=Status.SEEN_REPLY),
    ),
    (
        Situation(6, 8063, HERE, THERE, OUT, ports=(25000, 40000)),
        Situation(6, 8064, THERE, HERE, IN, translated="192.0.2.11"),
        Situation(17, 8125, THERE, HERE, IN, status=Status(0)),
        Situation(17, 9999, HERE, THERE, OUT, status=Status(0), ports=(20000, 30000)),
    ),
    (
        Situation(6, 50000, THERE, HERE, IN),
        Situation(17, 8125, HERE, THERE, OUT, status=Status(0), servers=40),
        Situation(17, 51820, THERE, HERE, IN),
        Situation(17, 53, THERE, HERE, IN, status=Status.SEEN_REPLY),
    ),
)


def flows(trace: Trace, one: Situation) -> None:
    at = steady(50, 12, trace.rng)
    rows = trace.flows(
        at, 0.004, 30.0, src=one.src, dst=one.dst, proto=one.proto, dport=one.port,
        status=int(one.status), state=TIME_WAIT, direction=int(one.direction),
    )  # fmt: skip
    ports = trace.rng.integers(*one.ports, len(at))
    for part in (trace.parts[-2], rows):
        part["sport"] = part["reply_dport"] = ports
        if one.translated:
            part["reply_src"][:, -1] = int(one.translated.rpartition(".")[2])
            part["status"] |= int(Status.DST_NAT)
        if one.servers > 1:
            part["dst"][:, -1] = 100 + trace.rng.permutation(len(at)) % one.servers
            part["reply_src"] = part["dst"]


def seen(some: tuple[Situation, ...]) -> tuple[Snapshot, Snapshot]:
    """The situations by service and by pair, in a table that they nearly fill."""
    trace = Trace(seed=11)
    for one in some:
        flows(trace, one)
    trace.walks(12)
    model = Model(HookInfo("fentry"), Clock(0), START)
    names = Names(netns={NETNS: Netns(NETNS, "init")})
    model.update(Batch(trace.events(0)[:0], START, names=names))
    for batch in trace.batches(12, limit=2700):
        model.update(batch)
    return model.snapshot("service"), model.snapshot("pair")


def offered(snapshot: Snapshot) -> set[str]:
    """Services that help would untrack."""
    return {
        one.service
        for cause in snapshot.why
        for one in (*cause.remedies, *cause.at_need)
        if one.id == "notrack"
    }


@pytest.fixture(scope="module")
def about() -> Facts:
    """A host that tracks, with the addresses of the situations; its own table is not looked at."""
    with Lab() as lab:
        node, other = lab.namespace("h", track=True), lab.namespace("c")
        lab.link(node, other)
        for address in (f"{HERE}/24", f"{SIX}/64"):
            node.run(["ip", "addr", "add", address, "dev", "to-c", "nodad"])
        node.sysctl("net.ipv4.ip_forward", 1)
        return replace(facts(node.path), entries=None)


@pytest.mark.parametrize("some", SITUATIONS)
def test_what_is_offered_to_untrack_is_not_refused(
    some: tuple[Situation, ...], about: Facts
) -> None:
    services, pairs = seen(some)
    told = offered(services)
    found = advise(services, pairs, {NETNS: about})
    verdicts = {f"{c.proto}/{c.port}": c for c in found.candidates}
    for name in told:
        assert verdicts[name].verdict in GOOD, (name, verdicts[name].reasons)
        assert not verdicts[name].remarks, (name, verdicts[name].remarks)
    assert told, "nothing is offered where something could be"
    assert len(told) < len(some) or some is SITUATIONS[0]
