"""Network namespaces: which exist, what to call them, how to look inside.

A namespace is known by its inode number, as in ``readlink /proc/PID/ns/net``.
"""

from __future__ import annotations

import ctypes
import difflib
import fcntl
import os
import re
import select
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Final, Optional

from ctrace.batch import LOWEST_INODE
from ctrace.errors import CtraceError, TryAgain, UsageError
from ctrace.host import cgroup, marker
from ctrace.names import clean

CLONE_NEWNET: Final = 0x40000000
NS_GET_NSTYPE: Final = 0xB703
SO_NETNS_COOKIE: Final = 71
LOOKS: Final = 20
"""Tries to open a namespace whose processes come and go."""
TURNS: Final = 8
"""A known process is checked again every eighth time only, because setns is rare."""

_libc = ctypes.CDLL(None, use_errno=True)
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Namespace:
    """A network namespace that exists."""

    inum: int
    name: str
    """``init``, an ``ip netns`` name, a container or service, or ``netns:<inum>``;
    harmless to show."""
    path: str
    """Opens it: /proc/PID/ns/net, or where it is mounted."""


class Finder:
    """Finds namespaces again and again, cheaply.

    The first :meth:`find` reads every process's link (about 4 us each); later ones
    only those of new processes, of one process for each namespace, and of every
    eighth of the rest. Threads look one after the other.
    """

    def __init__(self) -> None:
        self._looking = threading.Lock()
        self._of: dict[str, Optional[int]] = {}  # pid -> inode; None: not to be read
        self._pids: dict[int, str] = {}  # inode -> the process that we know it by
        self._names: dict[int, tuple[str, str]] = {}  # inode -> (path when named, name)
        self._turn = 0

    def find(self) -> list[Namespace]:
        """Every namespace that a process lives in or that is mounted, init first; none that a
        rehearsal made."""
        with self._looking:
            return self._find()

    def _find(self) -> list[Namespace]:
        self._look()
        paths = {inum: f"/proc/{pid}/ns/net" for inum, pid in self._pids.items()}
        mounts = _mounts()
        paths.update(mounts)
        init = self._of.get("1") or (self._of.get("2") if _kthreadd() else None)
        before = self._names
        self._names = {
            inum: named for inum, named in self._names.items() if paths.get(inum) == named[0]
        }
        found, taken = [], set()
        for inum in sorted(paths, key=lambda inum: (inum != init, inum)):
            path = paths[inum]
            if inum not in self._names:
                if inum not in mounts and _rehearsal(inum, path, inum in before):
                    continue
                name = "init" if inum == init else self._name(inum, mounts.get(inum))
                self._names[inum] = path, name
            name = self._names[inum][1]
            if name in taken:
                name = f"{name}:{inum}"
            taken.add(name)
            found.append(Namespace(inum, name, path))
        return found

    def _look(self) -> None:
        """Bring the map of processes up to date."""
        of = self._of
        pids = {name for name in os.listdir("/proc") if name.isdecimal()}
        for pid in of.keys() - pids:
            del of[pid]
        self._turn = (self._turn + 1) % TURNS
        again = set(list(of)[self._turn :: TURNS]).union(self._pids.values()) & pids
        for pid in again | (pids - of.keys()):
            of[pid] = _inode(f"/proc/{pid}/ns/net")
        # One process vouches for each namespace: the same as before if it still can.
        vouched = {inum: pid for inum, pid in self._pids.items() if of.get(pid) == inum}
        if set(of.values()) - vouched.keys():
            for pid, inum in of.items():
                if inum is None or inum in vouched:
                    continue
                of[pid] = _inode(f"/proc/{pid}/ns/net")
                if of[pid] == inum:
                    vouched[inum] = pid
        if self._pids.keys() - vouched.keys():
            # A namespace lost its process: another may have moved into it since we looked.
            of = {pid: _inode(f"/proc/{pid}/ns/net") for pid in pids}
            vouched = {inum: pid for inum, pid in vouched.items() if of.get(pid) == inum}
            for pid, inum in of.items():
                if inum is not None:
                    vouched.setdefault(inum, pid)
            self._of = of
        self._pids = vouched

    def _name(self, inum: int, mounted: Optional[str]) -> str:
        given = ""
        if mounted:
            folder, given = os.path.split(mounted)
            if (
                folder.endswith("/netns")
                and "docker" not in folder
                and not given.startswith("cni-")
            ):
                return clean(given)
        pid = self._pids.get(inum)
        path = cgroup.of_pid(int(pid)) if pid else ""
        name = cgroup.container(path)
        if not name and cgroup.unit(path).endswith(".service"):
            # A service with a network of its own; one shared with init is no name for it.
            name = cgroup.unit(path)
        return name or clean(given) or f"netns:{inum}"


class Mounts:
    """Notices at once that something was mounted or unmounted: there may be a new named namespace.

    poll(2) on mountinfo reports each change once (mounts_poll, fs/proc_namespace.c, 6.18).
    """

    def __init__(self) -> None:
        self._file = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._file, select.POLLPRI)

    def changed(self) -> bool:
        """Whether anything changed since the last call; a microsecond."""
        return bool(self._poll.poll(0))

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


_finder = Finder()


def find() -> list[Namespace]:
    """Every network namespace that a process lives in or that is mounted, init first."""
    return _finder.find()


def resolve(text: str) -> int:
    """The inode number for a name, path, pid or inode. Raises UsageError."""
    bare = re.fullmatch(r"(?:net(?:ns)?:)?\[?(\d+)\]?", text)
    inode = int(bare[1]) if bare else 0
    if inode >= LOWEST_INODE:
        if any(space.inum == inode for space in find()):
            return inode
    elif text.isdecimal():
        inum = _inode(f"/proc/{text}/ns/net")
        if inum is not None:
            return inum
    elif "/" in text and os.path.exists(text):
        inum = _nsfs(text)
        if inum is not None:
            return inum
        raise UsageError(f"{text} is not a network namespace: give one like /run/netns/NAME")
    spaces, shown = find(), clean(text)
    for space in spaces:
        if text and shown in (space.name, space.name.partition(":")[2]):
            return space.inum
    if text.isdecimal() and inode < LOWEST_INODE:
        raise UsageError(f"no process {text} whose network namespace can be read")
    names = [space.name for space in spaces]
    some = difflib.get_close_matches(shown, names, 3) or names[:8]
    rest = f" and {len(names) - len(some)} more" if len(names) > len(some) else ""
    raise UsageError(
        f"no network namespace {text[:40]!r}: give a name, path, pid or inode (here: "
        f"{', '.join(some)}{rest})"
    )


def here() -> int:
    """Inode of the namespace that this thread is in."""
    return int(os.readlink("/proc/thread-self/ns/net")[5:-1])


@contextmanager
def at(space: Namespace) -> Iterator[None]:
    """As :func:`enter`. Raises CtraceError also where the path leads to another namespace by now:
    processes come and go."""
    with enter(space.path):
        if here() != space.inum:
            raise CtraceError(f"namespace {space.name} is no longer at {space.path}")
        yield


@contextmanager
def enter(path: str) -> Iterator[str]:
    """Run the block with this thread, and only it, inside the namespace at ``path``.

    Sockets and procfs files opened in it stay bound to it. Yields a path to where the
    thread came from. Where the thread is there already, that takes no capability.
    Raises CtraceError.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CtraceError(f"cannot open namespace {path}: {error.strerror}") from error
        try:
            elsewhere = not os.path.sameopenfile(there, home)
            if elsewhere:
                _setns(there, path)
        finally:
            os.close(there)
        try:
            yield f"/proc/self/fd/{home}"
        finally:
            if elsewhere:
                _setns(home, "of this process")
    finally:
        os.close(home)


class Way:
    """A way into one namespace, found anew whenever it leads elsewhere. Keeps no file open.

    A path through a process leads to wherever that process's first thread is now: soon to
    another namespace, where that one only looked in, or where it ended and its number was used
    again. So whoever reads or changes rules must hold what was opened, and know it by its inode.
    """

    def __init__(self, inum: int, known: Optional[Namespace] = None) -> None:
        self._inum, self._known = inum, known

    @contextmanager
    def held(self) -> Iterator[Optional[Namespace]]:
        """The namespace with a path that leads nowhere else until the block ends; None: it is
        gone. Raises CtraceError when it is there and cannot be opened."""
        fd = self._open()
        if fd is None or self._known is None:
            yield None
            return
        try:
            yield replace(self._known, path=f"/proc/{os.getpid()}/fd/{fd}")
        finally:
            os.close(fd)

    def _open(self) -> Optional[int]:
        why = "its processes come and go"
        for _ in range(LOOKS):
            if self._known is None:
                self._known = next((one for one in find() if one.inum == self._inum), None)
            if self._known is None:
                return None
            try:
                fd = os.open(self._known.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                why = os.strerror(error.errno or 0)
            else:
                if os.fstat(fd).st_ino == self._inum:
                    return fd
                os.close(fd)
            self._known = None
        raise TryAgain(f"cannot open network namespace netns:{self._inum}: {why}")


def move(path: str) -> None:
    """Move this thread to the namespace at ``path``, for good. Raises OSError, CtraceError."""
    there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _setns(there, path)
    finally:
        os.close(there)


def cookie(space: Namespace) -> int:
    """What no other namespace of this boot has (SO_NETNS_COOKIE, 5.14); 0 where not known."""
    with suppress(OSError, CtraceError), at(space), socket.socket(socket.AF_UNIX) as sock:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), sys.byteorder)
    return 0


def local_addresses(path: str) -> tuple[str, ...]:
    """All addresses of the namespace at ``path`` in text form, through rtnetlink."""
    with enter(path), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        # RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP; struct ifaddrmsg for AF_UNSPEC
        sock.sendto(struct.pack("=IHHII8x", 24, 22, 0x301, 1, 0), (0, 0))
        found: dict[str, None] = {}
        while True:
            data = sock.recv(1 << 16)
            at = 0
            while at + 16 <= len(data):
                size, kind = struct.unpack_from("=IH", data, at)
                if kind in (2, 3) or size < 16:  # NLMSG_ERROR, NLMSG_DONE
                    return tuple(found)
                if kind == 20:  # RTM_NEWADDR
                    address = _address(data[at + 16 : at + size])
                    if address:
                        found[address] = None
                at += (size + 3) & ~3


def _address(message: bytes) -> str:
    """The local address in one RTM_NEWADDR: IFA_LOCAL, or where absent IFA_ADDRESS."""
    given = marker.attributes(message, 8)
    raw = given.get(2) or given.get(1) or b""
    family = {4: socket.AF_INET, 16: socket.AF_INET6}.get(len(raw))
    return socket.inet_ntop(family, raw) if family else ""


def _rehearsal(inum: int, path: str, known: bool) -> bool:
    """Whether a ctrace made this namespace, at ``path``, for a rehearsal.

    Yes as well where nobody ``known`` before is seen once, by a process that has left it again.
    """
    with suppress(OSError, CtraceError), enter(path):
        if here() == inum:
            return marker.marked()
    return not known and _inode(path) != inum


def _setns(fd: int, path: str) -> None:
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise CtraceError(f"cannot enter network namespace {path}: {reason} (CAP_SYS_ADMIN?)")


def _inode(link: str) -> Optional[int]:
    """The inode in ``net:[4026531833]``; readlink is three times as fast as stat here."""
    try:
        return int(os.readlink(link)[5:-1])
    except (OSError, ValueError):
        return None


def _nsfs(path: str) -> Optional[int]:
    """The inode of a network namespace file, or None when it is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # On a mounted namespace the link in /proc/self/fd is the mount point's path.
        return os.fstat(fd).st_ino if fcntl.ioctl(fd, NS_GET_NSTYPE) == CLONE_NEWNET else None
    except OSError:
        return None
    finally:
        os.close(fd)


def _kthreadd() -> bool:
    """Whether process 2 is the kernel's own, which lives in the initial namespace.

    Process 1 may hold capabilities that we lack; then its links cannot be read.
    """
    try:
        with open("/proc/2/comm") as file:
            return file.read() == "kthreadd\n"
    except OSError:
        return False


def _mounts() -> dict[int, str]:
    """Inode to mount point for every network namespace mounted here."""
    found: dict[int, str] = {}
    with open("/proc/self/mountinfo", errors="surrogateescape", newline="\n") as file:
        for line in file:
            if " net:[" not in line:
                continue
            fields = line.split(" ")
            root, point = fields[3], fields[4]
            if root.startswith("net:["):
                point = _OCTAL.sub(lambda match: chr(int(match[1], 8)), point)
                found.setdefault(int(root[5:-1]), point)
    return found
