"""Killed at any step, apply leaves the old rules or a change that reverts by itself, and undo no
service that is untracked without the accept that it needs.

A stand-in for nft counts its own runs and, at a chosen one, kills ctrace before
or after doing the real work.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kit.changes import PORT, STRICT, guards, make_plan, rules_of
from kit.command import command
from kit.traffic import tcp_connections, tcp_server

from ctrace.change import guard, keep, notes, steps, undo
from ctrace.host import commands, netns
from ctrace.lab import Lab, Node
from ctrace.plan import plan as plans
from ctrace.plan.plan import Accept
from ctrace.ruleset.installed import listing

pytestmark = pytest.mark.kernel

TRIAL_S = 12
LATE_S = 4
"""A host so busy that the transaction, and the kernel's clock with it, starts this late."""
ACCEPT = Accept("nft", "inet", "fw", "in", 3, "input", "server", "to")

SHIM = """#!/bin/sh
grep -q ctrace.change.guard /proc/$PPID/cmdline && exec {nft} "$@"
n=$(( $(cat {count} 2>/dev/null || echo 0) + 1 ))
echo $n > {count}
if [ "$n" = {at} ] && [ {when} = before ]; then kill -9 $PPID; exit 1; fi
if [ "$n" = {at} ] && [ {when} = late ]; then sleep {late}; fi
{nft} "$@"
status=$?
if [ "$n" = {at} ]; then kill -9 $PPID; fi
exit $status
"""


@dataclass
class Victim:
    """One apply that will be killed."""

    node: Node
    folder: Path
    at: int
    when: str
    before: str = ""
    killed: bool = False
    changed: bool = False
    """Whether the change was there at its death: on a slow machine a trial is soon over."""

    def run(self) -> None:
        """Run ``ctrace apply`` with the stand-in for nft first in its path."""
        self.folder.mkdir()
        self.node.run(["nft", "-f", "-"], stdin=STRICT)
        self.before = rules_of(self.node)
        plan = self.folder / "plan.json"
        plan.write_text(plans.to_json(make_plan(self.node, accepts=(ACCEPT,))))
        shim = self.folder / "nft"
        shim.write_text(
            SHIM.format(
                count=self.folder / "count",
                at=self.at,
                when=self.when,
                late=LATE_S,
                nft=shutil.which("nft"),
            )
        )
        shim.chmod(0o755)
        done = subprocess.run(
            **command(
                "apply", "--yes", "--confirm-within", f"{TRIAL_S}s", plan,
                env={
                    **os.environ,
                    "PATH": f"{self.folder}:{os.environ['PATH']}",
                    notes.VARIABLE: str(self.folder / "state"),
                },
            ),
            capture_output=True,
            check=False,
        )  # fmt: skip
        self.changed = rules_of(self.node) != self.before
        self.killed = done.returncode == -signal.SIGKILL
        assert self.killed or done.returncode == 0, done.stderr


@pytest.mark.slow
def test_killed_at_every_run_of_nft(lab: Lab, tmp_path: Path) -> None:
    """Each time the guard brings the old rules back, byte for byte, and then ends."""
    victims = [
        Victim(lab.namespace(f"{when}{at}"), tmp_path / f"{when}{at}", at, when)
        for when, runs in (("after", range(1, 9)), ("before", (6, 7, 8)), ("late", (6,)))
        for at in runs
    ]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(Victim.run, victims))
    assert all(victim.killed for victim in victims)
    changed = {f"{v.when}{v.at}" for v in victims if v.changed}
    # The sixth run is the transaction.
    assert not changed & {f"after{at}" for at in range(1, 6)} | (changed & {"before6"})
    assert changed, "some kills must come after the change, or this proves nothing"
    deadline = time.monotonic() + 60
    waiting = list(victims)
    while waiting and time.monotonic() < deadline:
        waiting = [victim for victim in waiting if rules_of(victim.node) != victim.before]
        time.sleep(0.3)
    assert not waiting, [(victim.at, victim.when) for victim in waiting]
    while guards({victim.node.inum for victim in victims}):
        assert time.monotonic() < deadline, "a guard outlives its trial"
        time.sleep(0.2)


@pytest.mark.slow
def test_the_kernel_alone_reverts(lab: Lab, tmp_path: Path) -> None:
    """With ctrace and its guard both killed, tracking comes back and undo tidies up."""
    victim = Victim(lab.namespace("server"), tmp_path / "alone", 0, "never")
    client = lab.namespace("client")
    lab.link(victim.node, client)
    address = victim.node.addresses["client"][0]
    victim.run()
    for pid in guards({victim.node.inum}):
        os.kill(pid, signal.SIGKILL)
    with tcp_server(victim.node, PORT):
        assert not tcp_connections(client, (address, PORT), 5).failed
        assert victim.node.count() == 0, "on trial the service is not tracked"
        deadline = time.monotonic() + TRIAL_S + 5
        while victim.node.count() == 0:
            assert time.monotonic() < deadline
            assert not tcp_connections(client, (address, PORT), 1).failed
            time.sleep(0.2)
        (left,) = undo.applied(victim.node.inum)
        assert left.installed.state == "expired"
        assert not tcp_connections(client, (address, PORT), 5).failed
    undo.undo(victim.node.inum)
    assert rules_of(victim.node) == victim.before


# ---- undo ------------------------------------------------------------------------------

XT_STRICT = f"""*filter
:INPUT DROP
-A INPUT -i lo -j ACCEPT
-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A INPUT -p tcp --dport {PORT} -m conntrack --ctstate NEW -j ACCEPT
COMMIT
"""
PAIRS = (
    ("nft", "iptables-nft"),
    ("iptables-nft", "iptables-nft"),
    ("iptables-nft", "nft"),
    ("iptables-legacy", "iptables-nft"),
)
"""Where the untracking rules are, and where the accepts: these orders differ."""


class Killed(BaseException):
    """What ends a process is no error that it could handle."""


def strict(node: Node, tool: str) -> tuple[Accept, ...]:
    """A firewall that accepts the service by state alone, and what it lacks for it untracked."""
    if tool == "nft":
        node.run(["nft", "-f", "-"], stdin=STRICT)
        return (Accept("nft", "inet", "fw", "in", 3, "input", "server", "to"),)
    for family in ("ip", "ip6"):
        node.run([f"{family}tables-{tool.split('-')[1]}-restore"], stdin=XT_STRICT)
    return tuple(
        Accept(tool, family, "filter", "INPUT", 2, "input", "server", "to")
        for family in ("ip", "ip6")
    )


def confirmed(node: Node, backend: str, tool: str) -> None:
    """A change that stays, with its note."""
    accepts = strict(node, tool)
    plan = make_plan(node, backend=backend, accepts=accepts)
    with notes.locked(node.inum) as lock, netns.enter(node.path):
        made = tuple(sorted(steps.to_be_made(plan)))
        steps.carry_out(plan, 60, lock)
        keep.make_lasting(plan)
        note = notes.Note(
            node.inum, notes.boot_id(), plans.to_json(plan), int(time.time()), 0.0, False, made
        )
        notes.write(note.confirmed(listing()))


def rules(node: Node) -> list[str]:
    """Without tables, which legacy iptables leaves for ever once asked for them."""
    return [line for line in rules_of(node).splitlines() if "ctrace" in line.lower()]


def cut_off(node: Node, backend: str, tool: str) -> list[str]:
    """Families in which the service is untracked, and not accepted as such."""
    native = node.run(["nft", "list", "ruleset"])
    bad = []
    for family in ("ip", "ip6"):
        kind = backend.rsplit("-", 1)[-1]
        raw = "" if backend == "nft" else node.run([f"{family}tables-{kind}-save", "-t", "raw"])
        jump = any("-A PREROUTING" in one and "ctrace:" in one for one in raw.splitlines())
        untracked = "elements" in native if backend == "nft" else jump and "--notrack" in raw
        there = native.split("table inet fw")[-1]
        if tool != "nft":
            there = node.run([f"{family}tables-{tool.split('-')[1]}-save", "-t", "filter"])
        if untracked and f"ctrace:server:tcp:{PORT}" not in there:
            bad.append(family)
    return bad


def killed_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Ends the next undo after so many commands that change rules; what it ran is in the list."""
    ran: list[str] = []
    real = commands.run

    def run(argv: Sequence[str], *words: Any, **more: Any) -> str:
        ran.append(argv[0])
        said = real(argv, *words, **more)
        if len(ran) == number:
            raise Killed
        return said

    monkeypatch.setattr(commands, "run", run)
    return ran


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "tool"), PAIRS)
def test_no_kill_of_undo_leaves_a_service_cut_off(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, backend: str, tool: str
) -> None:
    """After each command of undo that changes rules: looked at, then what the guard makes of it."""
    monkeypatch.setattr(guard, "BY_HAND_S", 0.0)
    monkeypatch.setattr(guard, "QUIET_S", math.inf)
    monkeypatch.setattr(guard.Guard, "_judge", lambda _self: pytest.fail("nothing is judged here"))
    number, whole = 0, False
    while not whole:
        number += 1
        node = lab.namespace(f"{number}")
        confirmed(node, backend, tool)
        assert not cut_off(node, backend, tool)
        with monkeypatch.context() as patched:
            ran = killed_at(patched, number)
            try:
                undo.undo(node.inum)
            except Killed:
                assert not cut_off(node, backend, tool), (number, ran)
        whole = len(ran) < number
        one = guard.Guard(node.inum)
        for _ in range(4):
            if not one._turn():
                break
            assert not cut_off(node, backend, tool), (number, ran)
        undo.undo(node.inum)
        assert not rules(node), (number, ran)
    assert number > 1, "at least one command changes rules"


@pytest.mark.parametrize("backend", ["iptables-nft", "iptables-legacy"])
def test_a_lease_brings_nothing_back(lab: Lab, backend: str) -> None:
    """The guard waits for the lock to renew the lease; an undo that has it is killed when only its
    note is left."""
    node = lab.namespace("host")
    confirmed(node, backend, "iptables-nft")
    note = notes.read(node.inum)
    assert note is not None
    one = guard.Guard(node.inum)
    assert one._standing(note).look(node.path) == (True, ())
    undo.undo(node.inum)
    notes.write(note)
    one._renew(note)
    assert not rules(node)


def test_what_a_killed_undo_began_keeps_others_waiting(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands have the lock: until they are over nobody else changes anything."""
    node = lab.namespace("host")
    confirmed(node, "nft", "nft")
    real = commands.find("nft")
    shim = tmp_path / "nft"
    shim.write_text(
        f'#!/bin/sh\n[ "$1" = -f ] && ls -l /proc/$$/fd >{tmp_path}/held\n{real} "$@"\n'
    )
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    undo.undo(node.inum)
    assert f"netns-{node.inum}.lock" in (tmp_path / "held").read_text()
