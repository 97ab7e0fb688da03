"""Unnamed network namespaces, linked by veth pairs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Optional

from ctrace.errors import CtraceError
from ctrace.host.netns import enter

_DYING = (*("setpriv", "--pdeathsig", "KILL"), *("sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"'))
"""With a process's number and a command behind it: the command dies with that process, also
when that one died before the kernel was asked to see to it."""


@dataclass
class Node:
    """One namespace, and ways to act in it."""

    name: str
    holder: subprocess.Popen[bytes]
    inum: int
    addresses: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Peer's name to this node's (IPv4, IPv6) address on the link to it."""

    @property
    def path(self) -> str:
        """A path that opens this namespace while the node lives."""
        return f"/proc/{self.holder.pid}/ns/net"

    def enter(self) -> AbstractContextManager[str]:
        """Context manager: this thread inside the namespace."""
        return enter(self.path)

    def run(self, argv: Sequence[str], *, check: bool = True, stdin: Optional[str] = None) -> str:
        """Run a command inside; its standard output. Raises CtraceError if it fails."""
        try:
            with self.enter():  # which the command inherits
                done = subprocess.run(
                    argv, input=stdin, capture_output=True, text=True, check=False
                )
        except FileNotFoundError as error:
            raise CtraceError(f"{argv[0]} is missing") from error
        if check and done.returncode != 0:
            said = (done.stderr or done.stdout).strip().splitlines() or [""]
            raise CtraceError(f"{' '.join(argv)} failed in namespace {self.name}: {said[0]}")
        return done.stdout

    def start(self, argv: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
        """Start a command inside that dies with this process."""
        return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
            [*_DYING, str(os.getpid()), "nsenter", f"--net={self.path}", *argv], **options
        )

    def socket(self, family: int, kind: int, proto: int = 0) -> socket.socket:
        """A socket that belongs to the namespace, usable from anywhere."""
        with enter(self.path):
            return socket.socket(family, kind, proto)

    def sysctl(self, name: str, value: Optional[object] = None) -> str:
        """Read (or set) a ``net.*`` setting as this namespace sees it."""
        file = "/proc/sys/" + name.replace(".", "/")
        with enter(self.path):
            if value is not None:
                with open(file, "w") as out:
                    out.write(str(value))
            with open(file) as got:
                return got.read().strip()

    def track(self) -> None:
        """Turn conntrack on here, for both families, with rules that decide nothing."""
        self.run(
            ["nft", "-f", "-"],
            stdin=(
                "table inet track {\n"
                " chain pre { type filter hook prerouting priority 0; ct state invalid counter; }\n"
                " chain own { type filter hook output priority 0; ct state invalid counter; }\n"
                "}\n"
            ),
        )

    def count(self) -> int:
        """``conntrack -C`` of this namespace."""
        return int(self.sysctl("net.netfilter.nf_conntrack_count"))

    def stats(self) -> dict[str, int]:
        """``conntrack -S`` of this namespace, summed over CPUs."""
        with enter(self.path), open("/proc/thread-self/net/stat/nf_conntrack") as file:
            names, *rows = [line.split() for line in file]
        total = dict.fromkeys(names, 0)
        for row in rows:
            for name, value in zip(names, row):
                total[name] += int(value, 16)
        return total

    def close(self) -> None:
        """Release the namespace; the kernel removes it when nothing else uses it."""
        self.holder.kill()
        self.holder.wait()


class Lab:
    """A set of namespaces; a context manager that removes them."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._links = 0

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove every namespace; safe to call twice."""
        while self.nodes:
            self.nodes.pop().close()

    def namespace(self, name: str, *, track: bool = False) -> Node:
        """A new namespace with loopback up; ``track`` turns conntrack on in it."""
        for tool in ("setpriv", "unshare", "nsenter", "ip"):
            if shutil.which(tool) is None:
                raise CtraceError(f"{tool} is missing: install util-linux and iproute2")
        if os.geteuid() != 0:
            raise CtraceError("making network namespaces needs root: run it with sudo")
        holder = subprocess.Popen(
            [*_DYING, str(os.getpid()), "unshare", "--net", "sleep", "infinity"],
            stdin=subprocess.DEVNULL,
        )
        ours = os.stat("/proc/self/ns/net").st_ino
        deadline = time.monotonic() + 120
        inum = ours
        # The child is in the new namespace only after unshare(1) ran and sleep(1) replaced it.
        while inum == ours or _comm(holder.pid) != "sleep":
            if holder.poll() is not None or time.monotonic() > deadline:
                holder.kill()
                holder.wait()
                raise CtraceError("could not make a network namespace: is CAP_SYS_ADMIN missing?")
            time.sleep(0.002)
            try:
                inum = os.stat(f"/proc/{holder.pid}/ns/net").st_ino
            except OSError:
                continue
        node = Node(name, holder, inum)
        self.nodes.append(node)
        node.run(["ip", "link", "set", "lo", "up"])
        if track:
            node.track()
        return node

    def link(self, a: Node, b: Node) -> tuple[str, str]:
        """A veth pair between two nodes; returns their IPv4 addresses on it.

        The IPv6 ones are in ``node.addresses[peer.name]``. Interfaces are named
        after the peer.
        """
        self._links += 1
        n = self._links
        # One run of ip for each side, of many lines: starting it takes longer than its work.
        lines = [
            f"link add to-{b.name[:12]} type veth peer name to-{a.name[:12]} netns {b.holder.pid}"
        ]
        for node, peer, last in ((a, b, 1), (b, a, 2)):
            v4, v6 = f"10.77.{n}.{last}", f"fd77:{n:x}::{last}"
            device = f"to-{peer.name[:12]}"
            lines += [
                f"addr add {v4}/24 dev {device}",
                f"addr add {v6}/64 dev {device} nodad",
                f"link set {device} up",
            ]
            node.run(["ip", "-batch", "-"], stdin="\n".join(lines) + "\n")
            lines.clear()
            node.addresses[peer.name] = (v4, v6)
        return a.addresses[b.name][0], b.addresses[a.name][0]


def _comm(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except OSError:
        return ""
