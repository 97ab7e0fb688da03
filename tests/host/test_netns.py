"""Namespaces found, named, entered and let go of."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from typing import Optional

import pytest

from ctrace.errors import CtraceError, UsageError
from ctrace.host import netns
from ctrace.host.rawlink import Space
from ctrace.lab import Lab

pytestmark = pytest.mark.kernel


def test_a_namespace_is_found_while_it_exists() -> None:
    finder = netns.Finder()
    with Lab() as lab:
        before = {space.inum for space in finder.find()}
        node = lab.namespace("one")
        found = {space.inum: space for space in finder.find()}
        assert node.inum not in before
        assert found[node.inum].name == f"netns:{node.inum}"
        assert os.stat(found[node.inum].path).st_ino == node.inum
        assert finder.find()[0].name == "init"
    assert node.inum not in {space.inum for space in finder.find()}


def test_a_process_that_moves_later_is_noticed() -> None:
    finder = netns.Finder()
    code = (
        "import ctypes, sys\nsys.stdin.readline()\n"
        "ctypes.CDLL(None).unshare(0x40000000)\nprint('moved', flush=True)\nsys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin
        assert child.stdout
        before = {space.inum for space in finder.find()}
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "moved\n"
        inum = os.stat(f"/proc/{child.pid}/ns/net").st_ino
        assert inum not in before
        # Each time an eighth of the known processes; which, shifts as others come and go.
        turns = (finder.find() for _ in range(10 * netns.TURNS))
        assert any(inum in {space.inum for space in found} for found in turns)
        child.stdin.close()


def test_another_process_vouches_when_the_first_has_gone() -> None:
    finder = netns.Finder()
    with Lab() as lab:
        node = lab.namespace("two")
        first = {space.inum: space for space in finder.find()}[node.inum]
        other = node.start(["sleep", "60"])
        try:
            while os.readlink(f"/proc/{other.pid}/ns/net") != f"net:[{node.inum}]":
                pass
            finder.find()
            assert first.path == node.path
            node.close()
            second = {space.inum: space for space in finder.find()}[node.inum]
            assert os.stat(second.path).st_ino == node.inum
            assert second.path != first.path
        finally:
            other.kill()
            other.wait()


def test_names_of_ip_netns_in_a_mount_namespace_of_its_own() -> None:
    script = (
        "mount --make-rprivate / && mount -t tmpfs none /run && ip netns add shop && "
        f"exec {sys.executable} -c '"
        "from ctrace.host import netns\n"
        "found = {s.name: s for s in netns.find()}\n"
        'print(found["shop"].path, netns.resolve("shop") == found["shop"].inum,'
        ' netns.resolve("/run/netns/shop") == found["shop"].inum)\''
    )
    said = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert said.split() == ["/run/netns/shop", "True", "True"]


def test_resolve() -> None:
    own = os.stat("/proc/self/ns/net").st_ino
    with Lab() as lab:
        node = lab.namespace("three")
        for text in (
            str(node.inum),
            f"netns:{node.inum}",
            f"net:[{node.inum}]",
            node.path,
            str(node.holder.pid),
        ):
            assert netns.resolve(text) == node.inum
    assert netns.resolve("init") == netns.find()[0].inum
    assert netns.resolve(str(os.getpid())) == own
    for wrong in ("nowhere", "4194999999", "/etc/passwd", "/no/such", "999999999", ""):
        with pytest.raises(UsageError):
            netns.resolve(wrong)


def test_enter_and_return() -> None:
    own = os.readlink("/proc/thread-self/ns/net")
    with Lab() as lab:
        node = lab.namespace("four")
        with netns.enter(node.path):
            assert os.readlink("/proc/thread-self/ns/net") == f"net:[{node.inum}]"
        assert os.readlink("/proc/thread-self/ns/net") == own
        with pytest.raises(ZeroDivisionError), netns.enter(node.path):
            raise ZeroDivisionError
        assert os.readlink("/proc/thread-self/ns/net") == own
    for path in (node.path, "/etc/passwd"):
        with pytest.raises(CtraceError), netns.enter(path):
            pass


def test_local_addresses() -> None:
    with Lab() as lab:
        a, b = lab.namespace("a"), lab.namespace("b")
        lab.link(a, b)
        mine = set(netns.local_addresses(a.path))
        assert {"127.0.0.1", "::1", *a.addresses["b"]} <= mine
        assert not mine & set(b.addresses["a"])
        for address in mine:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            assert socket.inet_ntop(family, socket.inet_pton(family, address)) == address


@pytest.mark.kernel
def test_a_namespace_stays_found_when_a_visitor_leaves_before_its_owner_is_seen() -> None:
    finder = netns.Finder()
    code = "import ctypes,sys\nsys.stdin.readline()\nctypes.CDLL(None).unshare(0x40000000)\n"
    code += "print(1, flush=True)\nsys.stdin.readline()"
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdin is not None
    assert owner.stdout is not None
    try:
        finder.find()  # the owner is known, still in our namespace
        owner.stdin.write("\n")
        owner.stdin.flush()
        owner.stdout.readline()
        path = f"/proc/{owner.pid}/ns/net"
        inum = os.stat(path).st_ino
        visitor = subprocess.Popen(["nsenter", f"--net={path}", "sleep", "60"])
        while os.stat(f"/proc/{visitor.pid}/ns/net").st_ino != inum:
            time.sleep(0.01)
        assert inum in {space.inum for space in finder.find()}
        visitor.kill()
        visitor.wait()
        for _ in range(10):
            assert inum in {space.inum for space in finder.find()}
    finally:
        owner.kill()
        owner.wait()
    assert inum not in {space.inum for space in finder.find()}


@pytest.mark.parametrize("mine", [True, False])
def test_a_namespace_of_a_rehearsal_is_none_of_the_hosts(mine: bool) -> None:
    """Its firewall has the rules that are tried: whoever found it would call them applied."""
    # Root of another user namespace can't hide behind the mark.
    code = "import sys\nfrom ctrace.host import marker\nmarker.mark()\nprint(1, flush=True)\n"
    code += "sys.stdin.readline()"
    with closing(Space()) as space, space.inside():
        into = [] if mine else ["unshare", "--user", "--map-root-user", "--net"]
        visitor = subprocess.Popen(
            [*into, sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    try:
        assert visitor.stdout is not None
        assert visitor.stdout.readline()
        inum = os.stat(f"/proc/{visitor.pid}/ns/net").st_ino
        assert (inum not in {one.inum for one in netns.Finder().find()}) == mine
    finally:
        visitor.kill()
        visitor.communicate()


def test_threads_look_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The map of processes must not change while another thread goes through it."""
    finder, ended = netns.Finder(), list[str]()
    read = netns._inode

    def look(name: str) -> None:
        finder.find()
        ended.append(name)

    second = threading.Thread(target=look, args=("second",))

    def begin(path: str) -> Optional[int]:
        if threading.current_thread() is not second and second.ident is None:
            second.start()
            second.join(1)  # which it does at once where nothing keeps it out
        return read(path)

    monkeypatch.setattr(netns, "_inode", begin)
    look("first")
    second.join()
    assert ended == ["first", "second"]
