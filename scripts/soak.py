"""Four verbs at once under all the load that this machine makes, killed again and again."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from ctrace import interpreter
from ctrace.errors import CtraceError
from ctrace.lab import Lab

FLOOD = r"""
import mmap, os, socket, struct, sys
count = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 8)
raw, sent = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW), 0
ports = [struct.pack(">HHHH", port, 9, 8, 0) for port in range(1024, 2024)]
while True:
    n = sent // 1000
    source = bytes([127, 1 + (n >> 16) % 250, n >> 8 & 255, n & 255])
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 64, 17, 0, source, b"\x7f\0\0\1")
    for port in ports:
        sent += 1
        count[:8] = struct.pack("<Q", sent)  # before: a process is stopped as it leaves a call
        raw.sendto(head + port, ("127.0.0.1", 0))
"""
"""A new flow with every packet; how many there were stands in the file."""


@dataclass
class Verb:
    """One of the four, started again whenever it ends."""

    name: str
    arguments: list[str]
    limit: int
    """MiB that it should stay under."""
    process: Optional[subprocess.Popen[str]] = None
    last: dict[str, Any] = field(default_factory=dict)
    """The last JSON that it printed."""
    peak: int = 0
    before: tuple[str, ...] = ()
    """What starts it: words before its own command."""
    died: int = 0
    """How often it ended by itself."""
    lost: int = 0
    killed: int = 0
    said: str = ""
    """Its last word on standard error."""

    def start(self) -> None:
        """Start it; what it prints is read, and the last of it kept."""
        self.last = {}
        self.process = subprocess.Popen(
            [*self.before, *interpreter.module("ctrace", *self.arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for read in (self._read, self._hear):
            threading.Thread(target=read, args=(self.process,), daemon=True).start()

    def _hear(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self.said = line.strip() or self.said

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if self.name == "top" and process is self.process:
                with contextlib.suppress(ValueError):
                    self.last = json.loads(line)
                    self.lost = max(self.lost, int(self.last["lost"]))

    def memory(self) -> int:
        """MiB that it has now; its peak is noted."""
        try:
            text = Path(f"/proc/{self.process.pid}/status").read_text() if self.process else ""
        except OSError:
            return 0
        found = dict(re.findall(r"(VmHWM|VmRSS):\s+(\d+)", text))
        self.peak = max(self.peak, int(found.get("VmHWM", 0)) >> 10)
        return int(found.get("VmRSS", 0)) >> 10

    def end(self, how: signal.Signals) -> None:
        """End it and wait."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(how)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()


def verbs(folder: Path, *of: str) -> list[Verb]:
    """The four; ``of``: the namespaces that top shows."""
    return [
        Verb("top", ["top", *of, "--format", "json"], 160),
        Verb("record", ["record", "--ring", "64M", "-o", str(folder / "ring")], 160),
        Verb("metrics", ["metrics", "--listen", "127.0.0.1:0"], 128),
        Verb("trace", ["trace", "--kinds", "drop,insert_failed"], 160),
    ]


class Flood:
    """New flows in a namespace of its own, when told to."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.node = lab.namespace("flood", track=True)
        self.node.run(["ip", "link", "set", "lo", "up"])
        with self.node.enter():
            Path("/proc/sys/net/netfilter/nf_conntrack_udp_timeout").write_text("5")
        self._file = folder / "sent"
        self._file.write_bytes(bytes(8))
        self._process = self.node.start([sys.executable, "-c", FLOOD, str(self._file)])
        self.stop()

    def go(self) -> None:
        """Send."""
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Stand still."""
        self._process.send_signal(signal.SIGSTOP)

    def sent(self) -> int:
        """Flows until now."""
        return int.from_bytes(self._file.read_bytes(), "little")

    def end(self) -> None:
        """For good."""
        self.go()
        self._process.kill()


class Soak:
    """The stage, the load and the four."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.flood = Flood(lab, folder)
        self.verbs = verbs(folder, "--netns", self.flood.node.path)
        self.spaces = 0
        self.over = threading.Event()
        threading.Thread(target=self._churn, daemon=True).start()

    def _churn(self) -> None:
        """Namespaces come, track something, and go."""
        while not self.over.wait(0.5):
            with contextlib.suppress(CtraceError, OSError), Lab() as lab:
                lab.namespace("short", track=True)
                self.spaces += 1

    def told(self, patience: float = 60) -> Optional[tuple[int, int]]:
        """(inserts, refused) that top tells of a flood that is standing; None: it tells nothing.

        It is asked until two answers in a row are the same.
        """
        top, before = self.verbs[0], None
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if top.last:
                total = top.last["totals"]
                now = (top.last["ts"], total["insert"], total["drop"] + total["insert_failed"])
                if before and now[0] != before[0] and now[1:] == before[1:]:
                    return now[1], now[2]
                before = now
            time.sleep(1.2)
        return None

    def minute(self, seconds: float) -> tuple[str, str]:
        """Load for so long: (what top tells against what was sent, memory)."""
        for verb in self.verbs:
            if verb.process is None or verb.process.poll() is not None:
                if verb.process is not None:
                    verb.died += 1
                    print(f"        {verb.name} ended by itself: {verb.said}", flush=True)
                verb.start()
        base, sent = self.told(), self.flood.sent()
        self.flood.go()
        end, memory = time.monotonic() + seconds, ""
        while time.monotonic() < end:
            memory = "  ".join(f"{verb.name} {verb.memory()}" for verb in self.verbs)
            time.sleep(2)
        self.flood.stop()
        after, made = self.told(), self.flood.sent() - sent
        if base is None or after is None:
            return f"{made:,} sent, top told nothing", memory
        told, refused = after[0] - base[0], after[1] - base[1]
        return f"{made:,} sent, {told + refused:,} told: {told + refused - made:+,}", memory

    def close(self) -> None:
        """End everything."""
        self.over.set()
        for verb in self.verbs:
            verb.end(signal.SIGTERM)
        self.flood.end()


def programs() -> Optional[set[int]]:
    """BPF programs that no process holds; None without bpftool."""
    try:
        done = subprocess.run(["bpftool", "-j", "prog", "show"], capture_output=True, check=False)
        found = {int(one["id"]) for one in json.loads(done.stdout)}
    except (OSError, ValueError):
        return None
    for info in Path("/proc").glob("[0-9]*/fdinfo/*"):
        with contextlib.suppress(OSError):
            found -= {int(number) for number in re.findall(r"prog_id:\s*(\d+)", info.read_text())}
    return found


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--minutes", type=int, default=60, help="default: 60")
    minutes = parser.parse_args().minutes
    before = programs()
    folder = Path(tempfile.mkdtemp(prefix="soak."))
    try:
        with Lab() as lab:
            soak = Soak(lab, folder)
            try:
                print("minute  flows sent to the namespace and told by top     MiB resident")
                for number in range(1, minutes + 1):
                    told, memory = soak.minute(45)
                    victim = random.choice(soak.verbs)
                    print(
                        f"{number:>6}  {told:<46}  {memory}  (then killed: {victim.name})",
                        flush=True,
                    )
                    victim.end(signal.SIGKILL)
                    victim.killed += 1
                    victim.process = None
            finally:
                soak.close()
        for verb in soak.verbs:
            print(
                f"{verb.name}: peak {verb.peak} MiB (limit {verb.limit}), killed {verb.killed} "
                f"times, ended by itself {verb.died}, lost {verb.lost:,}"
            )
        print(f"{soak.spaces} namespaces came and went")
        time.sleep(2)
        after = programs()
        left = "?" if before is None or after is None else str(len(after - before))
        print(f"left over: {left} BPF programs that no process holds")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(any(verb.peak > verb.limit or verb.died for verb in soak.verbs))


if __name__ == "__main__":
    main()
