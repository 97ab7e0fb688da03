"""Processes by name: who opened a flow, who listens on a port.

The kernel side captures pid, start time, command and cgroup id at a flow's first
packet. What is added here (command line, container, unit) is read while the process
and its cgroup still exist; a process that has gone keeps what was captured.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from typing import Final, Optional

from ctrace.batch import Owner
from ctrace.host import cgroup, command_line
from ctrace.host.netns import Namespace
from ctrace.host.sockets import Bound, Holders, try_bound
from ctrace.names import clean

REMEMBERED: Final = 8192
"""cgroup ids whose paths are remembered, also after the cgroup has gone."""
FILEID_KERNFS: Final = 0xFE
_SAME_MS: Final = 1000
"""ms by which a captured start time and /proc/PID/stat's may differ: the latter counts in ticks of
10 ms. A process id is reused only after all the others."""

_libc = ctypes.CDLL(None, use_errno=True)
_TICKS: Final = os.sysconf("SC_CLK_TCK")


def owner(key: int, comm: str, cgroup_id: int, path: str = "") -> Owner:
    """What is known about the process behind a record's ``owner`` key.

    ``comm``, ``cgroup_id`` and the end of the cgroup's ``path`` are as captured in the kernel; the
    path is used when the cgroup has gone, as a container's does.
    """
    pid = key >> 32
    alive = key != 0 and _is(pid, key)
    unit = cgroup_label(cgroup_id)
    if alive and not unit:
        unit = cgroup.label(cgroup.of_pid(pid))
    unit = unit or cgroup.label(path)
    return Owner(key, clean(comm), cgroup_id, unit, cmdline(pid) if alive else "")


def owner_of_pid(pid: int, cgroup_id: int = 0) -> Optional[Owner]:
    """Like :func:`owner`, for a living process; None when it has gone."""
    started = start_ms(pid)
    if started is None:
        return None
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as file:
            comm = file.read().rstrip("\n")
    except OSError:
        return None
    return owner(pid << 32 | (started & 0xFFFFFFFF), comm, cgroup_id)


def start_ms(pid: int) -> Optional[int]:
    """When a process started, in ms of the boot clock (to a tick); None when it has gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The command may hold spaces and parentheses; nothing after it does.
            fields = file.read().rpartition(b")")[2].split()
        return int(fields[19]) * 1000 // _TICKS
    except (OSError, IndexError, ValueError):
        return None


def cmdline(pid: int) -> str:
    """A process's command line on one line; ``***`` stands for what may be a secret.

    Empty for kernel threads and processes that have gone.
    """
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            raw = file.read(command_line.READ)
    except OSError:
        return ""
    return command_line.masked(command_line.split(raw))


def _is(pid: int, key: int) -> bool:
    """Whether the process that has this id now is the one that the key refers to."""
    started = start_ms(pid)
    if started is None:
        return False
    apart = (started - key) & 0xFFFFFFFF
    return min(apart, 0x100000000 - apart) <= _SAME_MS


# cgroups ---------------------------------------------------------------------------

_paths: dict[int, str] = {}


def cgroup_label(cgroup_id: int) -> str:
    """The container or unit of a cgroup v2 id; empty when unknown."""
    return cgroup.label(cgroup_path(cgroup_id))


def cgroup_path(cgroup_id: int) -> str:
    """The path of a cgroup v2 id below the hierarchy's root; empty when unknown.

    Once found it is remembered, so a container that has ended keeps its name.
    """
    if cgroup_id == 0:
        return ""
    known = _paths.get(cgroup_id)
    if known is None:
        known = _by_handle(cgroup_id)
        if known is None:
            known = _by_walk().get(cgroup_id)
        if known is None:
            return ""
        if len(_paths) >= REMEMBERED:
            del _paths[next(iter(_paths))]
        _paths[cgroup_id] = known
    return known


@lru_cache(maxsize=1)
def cgroup_root() -> str:
    """Where cgroup v2 is mounted; empty when it is not."""
    with open("/proc/self/mountinfo", errors="surrogateescape", newline="\n") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            if after.startswith("cgroup2 "):
                return before.split(" ")[4]
    return ""


def _by_handle(cgroup_id: int) -> Optional[str]:
    """By file handle, which for kernfs is the id itself (5.5 and later): 10 us."""
    root = cgroup_root()
    if not root:
        return None
    try:
        mount = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # another mount lies over it
        return None
    try:
        # struct file_handle: bytes, type, the handle
        handle = ctypes.create_string_buffer(struct.pack("=IiQ", 8, FILEID_KERNFS, cgroup_id), 16)
        fd = _libc.open_by_handle_at(mount, handle, os.O_RDONLY | os.O_CLOEXEC)
        if fd < 0:
            return None
        try:
            if os.fstat(fd).st_ino != cgroup_id:
                return None
            path = os.readlink(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
    finally:
        os.close(mount)
    if path.endswith(" (deleted)") or not path.startswith(root):
        return None
    return path[len(root) :] or "/"


def _by_walk() -> dict[int, str]:
    """Every cgroup by inode number, which is the cgroup id where the kernel has no file handles for
    it."""
    return dict(_cgroups(cgroup_root())) if _no_handles() else {}


@lru_cache(maxsize=1)
def _no_handles() -> bool:
    root = cgroup_root()
    return os.path.isdir(root) and _by_handle(os.stat(root).st_ino) is None


def _cgroups(root: str) -> Iterator[tuple[int, str]]:
    for folder, _, _ in os.walk(root):
        try:
            yield os.stat(folder).st_ino, folder[len(root) :] or "/"
        except OSError:
            continue


# listeners -------------------------------------------------------------------------

Service = tuple[int, int, int]
"""(namespace, protocol, port)."""


class Listeners:
    """Who listens where; remembers what it found, and looks up new sockets in portions."""

    def __init__(self) -> None:
        self._holders = Holders()
        self._owners: dict[int, Owner] = {}  # socket inode -> owner

    def look(
        self, namespaces: Sequence[Namespace], wanted: Optional[Collection[Service]] = None
    ) -> dict[Service, Owner]:
        """(namespace, protocol, port) to the process that listens there.

        With ``wanted``, only those services, and only namespaces that have some. A holder that
        could not be found within the time allowed comes with a later call.
        """
        asked = None if wanted is None else {service[0] for service in wanted}
        sockets: dict[Service, Bound] = {}
        for space in namespaces:
            if asked is not None and space.inum not in asked:
                continue
            for one in try_bound(space.path):
                service = (space.inum, one.proto, one.port)
                if wanted is None or service in wanted:
                    sockets[service] = one
        holders = self._holders.find({one.inode for one in sockets.values()})
        found: dict[Service, Owner] = {}
        owners: dict[int, Owner] = {}
        for service, one in sockets.items():
            pid = holders.get(one.inode)
            known = self._owners.get(one.inode)
            if pid and (known is None or known.pid != pid):
                known = owner_of_pid(pid, one.cgroup)
            if known is None and one.cgroup:
                # No visible process holds it, but the cgroup that created it is known.
                unit = cgroup_label(one.cgroup)
                known = Owner(0, "", one.cgroup, unit) if unit else None
            if known is not None:
                found[service] = owners[one.inode] = known
        self._owners = owners
        return found


_listeners = Listeners()


def listeners(
    namespaces: Sequence[Namespace], wanted: Optional[Collection[Service]] = None
) -> dict[Service, Owner]:
    """(namespace, protocol, port) to the process that listens there; see Listeners."""
    return _listeners.look(namespaces, wanted)
