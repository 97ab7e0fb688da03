"""Every command that is printed, pasted into a shell: where it belongs, and elsewhere."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ctrace.advice.alternatives import placed, policy_alternative
from ctrace.advice.facts import Facts
from ctrace.change.plan import CtTimeout, alone
from ctrace.lab.namespaces import Lab, Node
from ctrace.model import remedies
from ctrace.model.snapshot import Culprit, Remedy, Table
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

    def fill(self, **_: object) -> None:
        return None

    rising = fill


def every() -> list[Remedy]:
    """One of each kind that has commands, and of more than one service where rules could clash.

    Not those that are of the host's first namespace: they would change this machine.
    """
    table = Table(1, "here", 9000, 10000, 4096)
    found = [
        *(remedies.limit(replace(c, port=port), 100) for c in (TCP, UDP) for port in (1, 8063)),
        *(remedies.drop_service(c, 10) for c in (TCP, UDP)),
        *(remedies.drop_source(src, 1, 10) for src in ("192.0.2.1", "2001:db8::1")),
        *(remedies.syn_proxy(replace(TCP, port=port, direction=way))
          for port, way in ((443, "in"), (8443, "forward"))),
        *(remedies.timeout(name, 1, old=remedies.TIMEOUTS[name] + 1000)
          for name in remedies.TIMEOUTS),
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
    names = [f"net.netfilter.nf_conntrack_{name}" for name in remedies.TIMEOUTS]
    names.append("net.netfilter.nf_conntrack_tcp_loose")
    return (node.run(["nft", "list", "ruleset"]), *(node.sysctl(name) for name in names))


def ordinary(remedy: Remedy, results: list[tuple[int, str]]) -> None:
    for status, said in results:
        # conntrack -D deletes nothing of an empty table, and says so with 1
        nothing = remedy.id == "delete" and "0 flow entries have been deleted" in said
        assert status == 0 or nothing, said


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_commands_work_as_pasted_wherever_the_shell_is(
    nodes: tuple[Node, Node], path: str, where: str
) -> None:
    """All beside one another, then all taken back; another namespace is never touched."""
    here, elsewhere = nodes
    shell = here if where == "here" else elsewhere
    facts = Facts(enter=("nsenter", f"--net={here.path}"))
    for name in remedies.TIMEOUTS:
        here.sysctl(f"net.netfilter.nf_conntrack_{name}", remedies.TIMEOUTS[name] + 1000)
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
