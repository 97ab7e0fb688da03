"""What the tests of apply share: a served port under load, rulesets as text, plans."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ctrace.lab import Node
from ctrace.plan.plan import Accept, Notrack, Plan, clean_text
from ctrace.ruleset.reader import fingerprint
from kit.traffic import tcp_connections

PORT = 8063

TRACKED = """
table inet fw {
    chain in { type filter hook input priority 0; ct state invalid counter; }
    chain out { type filter hook output priority 0; ct state invalid counter; }
}
"""

STRICT = """
table inet fw {
    chain in {
        type filter hook input priority 0; policy drop;
        iifname "lo" accept
        ct state established,related accept
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
        ct state new tcp dport 8063 accept
    }
}
"""
"""Serves the port, but only to tracked packets."""


def make_plan(
    node: Node,
    *,
    backend: str = "nft",
    roles: tuple[str, ...] = ("server",),
    accepts: tuple[Accept, ...] = (),
    port: int = PORT,
    proto: str = "tcp",
) -> Plan:
    """A plan for the node's ruleset as it is now."""
    return Plan(
        created=int(time.time()),
        host=clean_text(os.uname().nodename),
        netns=node.inum,
        netns_name=node.name,
        fingerprint=fingerprint(node.path),
        backend=backend,
        levers=(Notrack(proto, port, roles, accepts=accepts),),
    )


def rules_of(node: Node) -> str:
    """Every rule of the namespace as the tools print it, counters aside."""
    texts = [node.run(["nft", "list", "ruleset"])]
    for family in ("ip", "ip6"):
        for variant in ("nft", "legacy"):
            texts.append(node.run([f"{family}tables-{variant}-save"]))
    lines = [line for line in "\n".join(texts).splitlines() if not line.startswith("#")]
    text = "\n".join(lines)
    text = re.sub(r"packets \d+ bytes \d+| expires \w+", "", text)
    return re.sub(r"\[\d+:\d+\]", "", text)


@dataclass
class Load:
    """Short connections from one node to another's port, until stopped."""

    source: Node
    target: tuple[str, int]
    done: int = 0
    failed: int = 0
    errors: list[BaseException] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """In a thread of its own."""
        try:
            while not self._stop.is_set():
                sent = tcp_connections(self.source, self.target, 5, timeout=30)
                self.done += len(sent.flows)
                self.failed += sent.failed + len(sent.refused)
                time.sleep(0.02)
        except BaseException as error:
            self.errors.append(error)


@contextmanager
def load(source: Node, address: str, port: int = PORT, parallel: int = 2) -> Iterator[list[Load]]:
    """Keep connections coming; stopped and joined on the way out."""
    loads = [Load(source, (address, port)) for _ in range(parallel)]
    threads = [threading.Thread(target=one.run) for one in loads]
    for thread in threads:
        thread.start()
    try:
        deadline = time.monotonic() + 60
        while not all(one.done for one in loads) and time.monotonic() < deadline:
            time.sleep(0.02)
        yield loads
    finally:
        for one in loads:
            one._stop.set()
        for thread in threads:
            thread.join()
        for one in loads:
            assert not one.errors, one.errors


@contextmanager
def in_background(work: Callable[[], object]) -> Iterator[None]:
    """``work()`` again and again until the block is over."""
    stop = threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            while not stop.is_set():
                work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not failed


def guards(inums: set[int]) -> list[int]:
    """Guards of these namespaces that run."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        mine = b"ctrace.change.guard"
        if mine in words and int(words[words.index(mine) + 1]) in inums:
            found.append(int(pid))
    return found
