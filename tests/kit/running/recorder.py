"""``ctrace record`` beside traffic of our own, and what its file says afterwards."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ctrace
from ctrace.host import ctnetlink
from ctrace.lab import Lab, Node
from kit.command import command, said


def pair(lab: Lab) -> tuple[Node, Node, str]:
    """Two namespaces, the first of them tracked, and the second's address."""
    here, there = lab.namespace("here", track=True), lab.namespace("there")
    _, target = lab.link(here, there)
    outlive(here)
    return here, there, target


def outlive(node: Node) -> None:
    """No entry expires while a test runs, however busy the machine is."""
    for name in ("udp_timeout", "udp_timeout_stream", "tcp_timeout_time_wait"):
        node.sysctl(f"net.netfilter.nf_conntrack_{name}", 600)


def fill_up(node: Node, room: int) -> None:
    """Leave this many places in the namespace's table."""
    limit = int(node.sysctl("net.netfilter.nf_conntrack_max"))
    assert limit, "no limit, so no table can be full"
    ctnetlink.fill(node.path, limit - room - node.count(), timeout=3600)


class Running:
    """A command, and what it says."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            **command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self.process.stderr is not None
        assert self.process.stdout is not None
        self.said = b""

    def until(self, words: bytes, timeout: float = 60.0) -> None:
        """Wait until it has said this on standard error."""
        deadline = time.monotonic() + timeout
        assert self.process.stderr is not None
        while words not in self.said:
            assert time.monotonic() < deadline, self.said
            if select.select([self.process.stderr], [], [], 0.1)[0]:
                more = os.read(self.process.stderr.fileno(), 1 << 16)
                assert more, self.said
                self.said += more

    def frame(self) -> dict[str, Any]:
        """The next JSON line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self, how: signal.Signals = signal.SIGINT) -> int:
        """Send a signal; the exit status."""
        self.process.send_signal(how)
        self.said += self.process.communicate(timeout=60)[1]
        return self.process.returncode


@contextmanager
def running(*arguments: object) -> Iterator[Running]:
    one = Running(*arguments)
    try:
        yield one
    finally:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def report(path: Path, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        said("report", path, "-o", "json", "--limit", "1000", *options)
    )
    return found


def table(data: dict[str, Any], node: Node) -> dict[str, Any]:
    """What is said of the namespace's table: counters are kept for the whole host."""
    found: dict[str, Any] = next(one for one in data["tables"] if one["netns"] == node.inum)
    return found


def kinds(path: Path) -> Counter[int]:
    """How many records of each kind are in the file."""
    found: Counter[int] = Counter()
    with ctrace.open(str(path)) as recording:
        for batch in recording:
            found.update(batch.events["kind"].tolist())
    return found


def rules_in(path: Path) -> dict[int, str]:
    """Rules of each namespace that the file has by now."""
    with ctrace.open(str(path)) as recording:
        return dict(recording.rulesets())
