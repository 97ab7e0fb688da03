"""Every command that is printed, pasted into a shell: where it belongs, and elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Final, cast

import pytest
from kit import traffic

from ctrace.advice.alternatives import placed, policy_alternative
from ctrace.advice.facts import Facts
from ctrace.advice.result import Candidate, flush_lines
from ctrace.beside import Left
from ctrace.lab.namespaces import Lab, Node
from ctrace.model import remedies
from ctrace.model.causes import whole
from ctrace.model.causes.beside import stale
from ctrace.model.causes.facts import Facts as CauseFacts
from ctrace.model.snapshot import Culprit, Remedy, Table
from ctrace.plan.plan import CtTimeout, Notrack, alone
from ctrace.ruleset import notrack_nft
from ctrace.whatif.growth import Range

TCP = Culprit("tcp/8063", proto="tcp", port=8063, direction="in", held=9000, nat="no")
UDP = replace(TCP, key="udp/53", proto="udp", port=53)
POLICIES = (
    CtTimeout("tcp", 8063, ("server",), (("time_wait", 5), ("close", 2))),
    CtTimeout("udp", 53, ("client", "loopback"), (("unreplied", 5), ("replied", 15))),
)


class Nothing:
    """An outlook that foretells nothing."""

    def fill(self, *_: object) -> None:
        return None

    rising = fill


WITHOUT: Final = {"notrack", "keep-alive", "change"}
"""Kinds without commands: rules of NOTRACK are pasted elsewhere (test_by_hand.py)."""
LASTING: Final = {**remedies.TIMEOUTS, **remedies.TUNNELS}
"""Timeouts, and their defaults."""


def logging() -> Remedy:
    """As INVALID packets are found out about."""
    table = Table(1, "here", 90, 10000, 4096, invalid=1000)
    facts = cast(CauseFacts, SimpleNamespace(tables=(table,)))
    (cause,) = whole.invalid(facts)
    (found,) = cause.remedies
    return found


def every() -> list[Remedy]:
    """One of each kind that has commands, and of more than one service where rules could clash.

    Not those that are of the host's first namespace: they would change this machine.
    """
    table = Table(1, "here", 9000, 10000, 4096)
    ends = (("192.0.2.1", "10.0.0.9"), ("2001:db8::1", "fd00::9"))
    found = [
        *(remedies.limits(c.proto, (1, 8063), 1, 100) for c in (TCP, UDP)),
        *(remedies.drop_service(c, 10) for c in (TCP, UDP)),
        *(remedies.drop_source(src, 1, 10) for src in ("192.0.2.1", "2001:db8::1")),
        *(remedies.untrack_echo(proto, 1, 10) for proto in ("icmp", "icmpv6")),
        *(remedies.syn_proxy(replace(TCP, port=port, direction=way))
          for port, way in ((443, "in"), (8443, "forward"))),
        *(remedies.timeout(name, 1, old=old + 1000) for name, old in LASTING.items()),
        *(cause.remedies[0] for proto in ("tcp", "udp") for dst, backend in ends
          for cause in stale(table, (Left(proto, dst, 53, backend, 40),))),
        logging(),
        *(remedies.delete(c, 10, state=state, src=src)
          for c, state in ((TCP, "ESTABLISHED"), (UDP, ""))
          for src in ("", "192.0.2.1", "2001:db8::1")),
    ]  # fmt: skip
    assert all(found)
    policies = [
        policy_alternative(table, one, Range(0, 9), Nothing(), Facts(), planned=False)  # type: ignore[arg-type]
        for one in POLICIES
    ]
    return [*(one for one in found if one), *policies]


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    with Lab() as lab:
        yield lab.namespace("here", track=True), lab.namespace("elsewhere", track=True)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Where ``sudo`` is, also on a machine without it."""
    shim = tmp_path / "sudo"
    shim.write_text('#!/bin/sh\nexec "$@"\n')
    shim.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}:/usr/sbin:/sbin"


def pasted(node: Node, commands: tuple[str, ...], path: str) -> list[tuple[int, str]]:
    """Exit status and complaint of each command; a script behind its first line is one."""
    lines = ["\n".join(commands)] if any("<<" in one for one in commands) else list(commands)
    found = []
    for line in lines:
        with node.enter():
            done = subprocess.run(
                ["bash", "-c", line], capture_output=True, text=True, check=False,
                env={**os.environ, "PATH": path},
            )  # fmt: skip
        found.append((done.returncode, f"{line}: {done.stderr}"))
    return found


def state(node: Node) -> tuple[str, ...]:
    """Rules and timeouts of a namespace."""
    names = [f"net.netfilter.nf_conntrack_{name}" for name in LASTING]
    names += [f"net.netfilter.nf_conntrack_{name}" for name in ("tcp_loose", "log_invalid")]
    return (node.run(["nft", "list", "ruleset"]), *(node.sysctl(name) for name in names))


def ordinary(remedy: Remedy, results: list[tuple[int, str]]) -> None:
    for status, said in results:
        # conntrack -D deletes nothing of an empty table, and says so with 1
        nothing = remedy.id == "delete" and "0 flow entries have been deleted" in said
        assert status == 0 or nothing, said


@pytest.mark.slow
@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_commands_work_as_pasted_wherever_the_shell_is(
    nodes: tuple[Node, Node], path: str, where: str
) -> None:
    """All beside one another, then all taken back; another namespace is never touched."""
    here, elsewhere = nodes
    shell = here if where == "here" else elsewhere
    facts = Facts(enter=("nsenter", f"--net={here.path}"))
    for name, old in LASTING.items():
        here.sysctl(f"net.netfilter.nf_conntrack_{name}", old + 1000)
    before, other = state(here), state(elsewhere)
    made = [
        placed(one, facts) if one.id != "ct-timeout" else policy_as_typed(one, facts)
        for one in every()
    ]
    for one in made:
        ordinary(one, pasted(shell, one.commands, path))
    assert state(here) != before
    assert state(elsewhere) == other
    for one in reversed(made):
        ordinary(one, pasted(shell, one.undo, path))
    assert state(here) == before
    assert state(elsewhere) == other


def test_no_kind_of_remedy_is_left_out() -> None:
    """Kinds that the source makes, wherever it does, against those that are pasted here."""
    made = set()
    for file in (Path(__file__).parents[2] / "ctrace").rglob("*.py"):
        made |= set(re.findall(r"\bRemedy\(\s*\"([a-z-]+)\"", file.read_text()))
    made.add(remedies.UNTRACK_ECHO)
    assert {one.id for one in every()} | {one.id for one in of_the_machine()} == made - WITHOUT
    assert all(one.commands for one in every())


def of_the_machine() -> list[Remedy]:
    """Those for all namespaces, with what is so on this machine: they change nothing."""
    size, buckets = (
        int(Path(f"/proc/sys/net/netfilter/nf_conntrack_{name}").read_text())
        for name in ("max", "buckets")
    )
    table = Table(1, "here", 10, size, buckets)
    found = [remedies.larger(table, 2 * size), remedies.buckets(table)]
    same = {"max": size, "buckets": buckets}
    return [
        replace(one, commands=tuple(
            re.sub(r"(max|buckets)=\d+", lambda m: f"{m[1]}={same[m[1]]}", line)
            for line in one.commands))
        for one in found if one
    ]  # fmt: skip


def test_commands_for_the_machine_work_in_its_first_namespace_only(
    nodes: tuple[Node, Node], path: str
) -> None:
    """They say so there, and change nothing."""
    here, _ = nodes
    facts = Facts(enter=("nsenter", f"--net={here.path}"))
    machine = SimpleNamespace(enter=nullcontext)
    for one in of_the_machine():
        shown = placed(one, facts)
        for lines in (shown.commands, shown.undo):
            ordinary(one, pasted(cast(Node, machine), lines, path))
            # sysctl(8) complains, and some of its versions exit with 0 all the same.
            assert all(not said.endswith(": ") for _, said in pasted(here, lines, path))


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_what_deletes_entries_deletes_as_many_as_it_says_and_no_others(
    nodes: tuple[Node, Node], path: str, where: str
) -> None:
    """Of a remedy, and of what stays behind once NOTRACK is in place."""
    shell = nodes[0] if where == "here" else nodes[1]
    facts = Facts(enter=("nsenter", f"--net={nodes[0].path}"))
    held = 20
    for node in nodes:
        node.sysctl("net.netfilter.nf_conntrack_udp_timeout", 600)
        traffic.udp_flows(node, ("127.0.0.1", 53), held)
        traffic.udp_flows(node, ("127.0.0.1", 54), held)
    left = Candidate(1, "here", "udp", 53, ("loopback",), "safe", (), held, 1.0, None,
                     Notrack("udp", 53, ("loopback",)), enter=facts.enter)  # fmt: skip
    offered = remedies.delete(replace(UDP, held=held), held)
    assert offered
    assert offered.now == held
    for commands in (placed(offered, facts).commands, tuple(flush_lines(left))):
        assert count(nodes[0]) == 2 * held
        said = "".join(text for _, text in pasted(shell, commands, path))
        deleted = map(int, re.findall(r"(\d+) flow entries have been deleted", said))
        assert sum(deleted) == held, said
        assert [count(node) for node in nodes] == [held, 2 * held]
        traffic.udp_flows(nodes[0], ("127.0.0.1", 53), held)


def count(node: Node) -> int:
    return int(node.sysctl("net.netfilter.nf_conntrack_count"))


def policy_as_typed(one: Remedy, facts: Facts) -> Remedy:
    """With the way into the namespace: what ``every`` made has none."""
    bare = replace(
        one,
        commands=tuple(line.removeprefix("sudo ") for line in one.commands),
        undo=tuple(line.removeprefix("sudo ") for line in one.undo),
    )
    return placed(bare, facts)


def test_a_policy_typed_by_hand_leaves_what_is_applied_alone(
    nodes: tuple[Node, Node], path: str
) -> None:
    here, _ = nodes
    here.run(["nft", "-f", "-"], stdin=notrack_nft.script(alone(POLICIES[0]), 600))
    applied = here.run(["nft", "-s", "list", "table", "inet", "ctrace"])
    for one in every():
        if one.id == "ct-timeout":
            ordinary(one, pasted(here, one.commands, path))
            assert here.run(["nft", "-s", "list", "table", "inet", "ctrace"]) == applied
            ordinary(one, pasted(here, one.undo, path))
            assert here.run(["nft", "-s", "list", "table", "inet", "ctrace"]) == applied
