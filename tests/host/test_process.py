"""Owners, cgroups and listeners of real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ctrace.host import command_line, process
from ctrace.host.netns import Namespace
from ctrace.host.sockets import Holders, bound
from ctrace.lab import Lab, Node

pytestmark = pytest.mark.kernel

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP


@contextmanager
def server(node: Node, name: str) -> Iterator[tuple[int, dict[str, int]]]:
    """A process that listens in ``node``; its pid, and the port of each of its sockets."""
    code = (
        "import socket, sys\n"
        "open('/proc/self/comm', 'w').write(sys.argv[1])\n"
        "a = socket.create_server(('127.0.0.1', 0))\n"
        "b = socket.create_server(('::', 0), family=socket.AF_INET6, dualstack_ipv6=True)\n"
        "c = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); c.bind(('::', 0))\n"
        "d = socket.create_connection(a.getsockname())\n"
        "print(*(s.getsockname()[1] for s in (a, b, c, d)), flush=True)\n"
        "sys.stdin.read()"
    )
    child = node.start(
        [sys.executable, "-c", code, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout
        ports = [int(word) for word in child.stdout.readline().split()]
        yield child.pid, dict(zip(("tcp4", "tcp6", "udp6", "client"), ports, strict=True))
    finally:
        child.kill()
        child.wait()


def test_listeners_by_namespace_and_protocol() -> None:
    with Lab() as lab:
        a, b = lab.namespace("a"), lab.namespace("b")
        spaces = [Namespace(node.inum, node.name, node.path) for node in (a, b)]
        finder = process.Listeners()
        with server(a, "shop") as (pid, ports), server(b, "other") as (other, _):
            found = finder.look(spaces)
            here = {key[1:]: owner for key, owner in found.items() if key[0] == a.inum}
            assert {key: owner.pid for key, owner in here.items()} == {
                (TCP, ports["tcp4"]): pid,
                (TCP, ports["tcp6"]): pid,
                (UDP, ports["udp6"]): pid,
            }
            assert {owner.comm for owner in here.values()} == {"shop"}
            assert {owner.pid for key, owner in found.items() if key[0] == b.inum} == {other}
            wanted = (a.inum, TCP, ports["tcp6"])
            assert set(finder.look(spaces, {wanted})) == {wanted}
        assert finder.look(spaces) == {}
    assert finder.look(spaces) == {}  # the namespaces themselves have gone


def test_a_walk_over_open_files_is_resumed_until_it_is_done() -> None:
    with Lab() as lab:
        node = lab.namespace("a")
        with server(node, "slow") as (pid, _):
            inodes = {one.inode for one in bound(node.path)}
            holders = Holders(budget=0.0)
            assert holders.find(inodes) == {}  # no time, nothing looked at
            holders.budget = 0.001
            for _ in range(10_000):
                found = holders.find(inodes)
                if len(found) == len(inodes):
                    break
            assert found == dict.fromkeys(inodes, pid)
            holders.budget = 0.0
            assert holders.find(inodes) == found  # remembered
        holders.budget = 5.0
        assert holders.find(inodes) == {}


def test_an_owner_while_it_lives_and_after() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()", "/" + "a" * 250, "x" * 5000],
        stdin=subprocess.PIPE,
    ) as child:
        while "/aa" not in process.cmdline(child.pid):
            pass
        started = process.start_ms(child.pid)
        assert started is not None
        key = child.pid << 32 | started & 0xFFFFFFFF
        alive = process.owner(key, "py\x1b]0;t\x07", 0)
        assert alive.pid == child.pid
        assert alive.comm == "py\\x1b]0;t\\x07"
        assert alive.cmdline.isprintable()
        assert len(alive.cmdline) == command_line.MOST
        assert process.owner(key + 5, "py", 0).cmdline  # ticks are coarse
        # The same pid, another start: another process.
        assert process.owner(key ^ 0x10000, "py", 0).cmdline == ""
        child.kill()
    gone = process.owner(key, "python", 0)
    assert (gone.comm, gone.cmdline, gone.pid) == ("python", "", child.pid)
    assert process.owner_of_pid(child.pid) is None
    assert process.owner(0, "", 0).cmdline == ""


def test_start_times_are_the_boot_clocks() -> None:
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
    with subprocess.Popen(["sleep", "60"]) as child:
        after = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
        started = process.start_ms(child.pid)
        child.kill()
    assert started is not None
    assert before - 20 <= started <= after + 20


def test_a_process_name_with_parentheses() -> None:
    code = "open('/proc/self/comm', 'w').write(') S 1 (')\nprint(flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout
        child.stdout.readline()
        found = process.owner_of_pid(child.pid)
        plain = process.start_ms(os.getpid())
        child.kill()
    assert found is not None
    assert found.comm == ") S 1 ("
    assert plain is not None
    assert (found.key - plain) & 0xFFFFFFFF < 3_600_000


def test_a_cgroup_by_its_id_also_after_it_has_gone() -> None:
    root = process.cgroup_root()
    if not root:
        pytest.skip("no cgroup v2 here")
    ident = "c7ace" + "0" * 59
    folder = f"{root}/docker-{ident}.scope"
    os.mkdir(folder)
    try:
        inode = os.stat(folder).st_ino
        assert process.cgroup_path(inode) == f"/docker-{ident}.scope"
        assert process.cgroup_label(inode) == "docker:" + ident[:12]
        other = process._by_walk() if process._no_handles() else dict(process._cgroups(root))
        assert other[inode] == f"/docker-{ident}.scope"
    finally:
        os.rmdir(folder)
    assert process.cgroup_label(inode) == "docker:" + ident[:12]
    assert process._by_handle(inode) is None
    assert process.cgroup_path(1 << 50) == process.cgroup_label(0) == ""
    assert process.cgroup_path(os.stat(root).st_ino) == "/"
