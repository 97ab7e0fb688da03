"""``ctrace top`` and ``ctrace replay`` inside tmux, as people keep them open."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from view.test_feed import flows

from ctrace.batch import Batch, Clock, HookInfo, TableReading
from ctrace.lab import Lab
from ctrace.record import N_REASONS, Kind, Reason
from ctrace.recording.format.meta import Header
from ctrace.recording.writer import Writer
from ctrace.view import format as fmt

pytestmark = pytest.mark.kernel
CTRACE = f"{sys.executable} -m ctrace"

NAUGHTY = b"\x1b[31mx\xe2\x80\xaeevil"
"""A process's name: an escape sequence, and a turn to right-to-left."""
SENDER = """
import ctypes, socket, sys, time
name, address = bytes.fromhex(sys.argv[1]), sys.argv[2]
assert ctypes.CDLL(None).prctl(15, name, 0, 0, 0) == 0
port = 20000
while True:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind(("", port))
        sender.sendto(b"x", (address, 8125))
    port = port + 1 if port < 60000 else 20000
    time.sleep(0.02)
"""


class Pane:
    """One pane of a tmux server of its own."""

    def __init__(self, name: str, command: str, size: tuple[int, int]) -> None:
        self._server = ["tmux", "-L", name, "-f", "/dev/null"]
        env = {**os.environ, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "TERM": "xterm-256color"}
        env.pop("TMUX", None)
        width, height = (str(one) for one in size)
        subprocess.run(
            [*self._server, "new-session", "-d", "-x", width, "-y", height, f"{command}; sleep 60"],
            env=env, check=True,
        )  # fmt: skip

    def do(self, *words: str) -> str:
        """A command of tmux."""
        done = subprocess.run([*self._server, *words], capture_output=True, check=True)
        return done.stdout.decode("utf-8")

    def keys(self, *keys: str) -> None:
        """Press keys, by tmux's names."""
        self.do("send-keys", *keys)

    def shown(self) -> str:
        """What the pane shows now."""
        return self.do("capture-pane", "-p")

    def until(self, *wanted: str, timeout: float = 120.0) -> str:
        """Wait until all of this is shown; the pane then."""
        deadline = time.monotonic() + timeout
        while not all(one in (text := self.shown()) for one in wanted):
            assert time.monotonic() < deadline, f"{wanted} not in\n{text}"
            time.sleep(0.1)
        return text


@contextmanager
def tmux(command: str, size: tuple[int, int] = (80, 24)) -> Iterator[Pane]:
    name = f"ctrace-test-{os.getpid()}"
    pane = Pane(name, command, size)
    try:
        yield pane
    finally:
        subprocess.run(["tmux", "-L", name, "kill-server"], check=False, capture_output=True)


def test_keys_resizing_and_a_hostile_name() -> None:
    with Lab() as lab:
        here, there = lab.namespace("here", track=True), lab.namespace("there")
        _, target = lab.link(here, there)
        sender = here.start([sys.executable, "-c", SENDER, NAUGHTY.hex(), target])
        try:
            with tmux(f"{CTRACE} top --netns {here.inum} --group process") as pane:
                text = pane.until("CULPRITS", "evil", "q quit")
                assert len(text.splitlines()) == 24
                assert "\u202e" not in text
                assert "\x1b" not in pane.do("capture-pane", "-p", "-e").replace("\x1b[", "")
                row = next(line for line in text.splitlines() if "evil" in line)
                assert row.index("[31mx") < row.index("evil")  # told as letters, in their order
                pane.keys("?")
                pane.until("KEYS")
                pane.keys("Escape")
                pane.until("CULPRITS")
                pane.do("resize-window", "-x", "120", "-y", "40")
                text = pane.until("CULPRITS", "1 MINUTE", "space pause")
                assert len(text.splitlines()) == 40
                pane.keys("G", "/")
                pane.keys("-l", "dport=8125")
                pane.keys("Enter")
                pane.until(f"filter netns={here.inum} dport=8125", "10.77.")
                pane.keys("Enter")
                pane.until("IN TABLE", "OWNER")
                pane.keys("BSpace", "n")
                pane.until("NAMESPACES")
                pane.do("resize-window", "-x", "40", "-y", "10")
                pane.until("NAMESPACES", "q quit", str(here.inum))
                pane.do("resize-window", "-x", "80", "-y", "24")
                pane.keys("q")
                deadline = time.monotonic() + 60
                while "ctrace top" in pane.shown():  # the shell's own screen is back
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
        finally:
            sender.kill()
            sender.wait()


def recorded(path: Path) -> list[int]:
    """Twenty seconds, refusals in the middle; the ends of the batches, boot clock ns."""
    second = 10**9
    header = Header(HookInfo("fentry"), Clock(1_562_752_987 * second), second, host="web1")
    ends, counts = [], np.zeros(N_REASONS, np.uint64)
    with Writer(str(path), header) as writer:
        for at in range(2, 22):
            events = flows(50, at * second - 500, port=8063)
            if at == 11:
                events["kind"], events["reason"] = Kind.DROP, Reason.TABLE_FULL
                events["ct"] = 0
            counts[int(events["reason"][0])] += np.uint64(len(events))
            table = TableReading(1, at * 40, 1000, 1024)
            ends.append(at * second)
            writer.write(Batch(events, ends[-1], 0, {1: counts.copy()}, (table,)))
    return [header.clock.utc(end) for end in ends]


def test_a_replay_travels(tmp_path: Path) -> None:
    path = tmp_path / "a.data"
    clocks = [fmt.clock(end / 1e9) for end in recorded(path)]
    with tmux(f"{CTRACE} replay --paused {path}", (120, 40)) as pane:
        pane.until("CULPRITS", "PAUSED")
        pane.keys("]")
        pane.until(f"web1  {clocks[9]}", "tcp/8063")
        pane.keys("j")
        pane.keys("-l", "100%")
        pane.keys("Enter")
        pane.until(f"web1  {clocks[-1]}")
        pane.keys("[")
        pane.until(f"web1  {clocks[9]}")
        pane.keys("t")
        pane.until(f"web1  {clocks[10]}")
        pane.keys("Enter")
        pane.until("LIFE", "IN TABLE")
        pane.keys("PageDown")
        pane.until("ADVICE")
        pane.keys("q")
