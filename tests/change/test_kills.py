"""Killed at any step, apply leaves the old rules or a change that reverts by itself.

A stand-in for nft counts its own runs and, at a chosen one, kills ctrace before
or after doing the real work.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from kit.changes import PORT, STRICT, guards, make_plan, rules_of
from kit.traffic import tcp_connections, tcp_server

from ctrace.change import notes, undo
from ctrace.lab import Lab, Node
from ctrace.plan import plan as plans
from ctrace.plan.plan import Accept

pytestmark = pytest.mark.kernel

TRIAL_S = 12
LATE_S = 4
"""A host so busy that the transaction, and the kernel's clock with it, starts this late."""
ACCEPT = Accept("nft", "inet", "fw", "in", 3, "input", "server", "to")

SHIM = """#!/bin/sh
grep -q guard /proc/$PPID/cmdline && exec {nft} "$@"
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
            [sys.executable, "-m", "ctrace", "apply", "--yes", "--confirm-within", f"{TRIAL_S}s",
             str(plan)],
            env={
                **os.environ,
                "PATH": f"{self.folder}:{os.environ['PATH']}",
                notes.VARIABLE: str(self.folder / "state"),
            },
            capture_output=True,
            check=False,
        )  # fmt: skip
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
    changed = {f"{v.when}{v.at}" for v in victims if rules_of(v.node) != v.before}
    # The sixth run is the transaction. Later ones may be over already on a slow machine.
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
