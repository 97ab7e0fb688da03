"""The fourth hook family: ctnetlink events and the kernel's own counters, no BPF.

It needs CAP_NET_ADMIN alone and works since Linux 3.x. What it cannot see it says in
``info.blind``: refused packets and evictions are counted, but have no tuple.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.batch import Counts, HookInfo
from ctrace.capture.family import Capture
from ctrace.capture.netlink import reasons
from ctrace.capture.netlink.ends import OlderEntries
from ctrace.errors import CtraceError
from ctrace.host import ctnetlink
from ctrace.host.ctnetlink.message import Decoder
from ctrace.host.kernel import Module
from ctrace.host.netns import Namespace, enter, here
from ctrace.host.tables import TableReader
from ctrace.record import N_REASONS, Events, Kind, Reason, boot_ns, empty, join

GROUPS: Final = (1, 3)
"""NFNLGRP_CONNTRACK_NEW and _DESTROY."""
QUEUE: Final = 128 << 20
"""Bytes that may wait in the kernel per namespace: about 100 thousand events, because the kernel
charges 1.3 KiB each. Used only while events wait."""
MESSAGES, SLOT = 2048, 1024
"""Messages taken at a time, and the room for each; an event has at most some 600 bytes."""
ROUNDS: Final = 128
"""How often one poll goes back to one socket: a flood in one namespace must not hide others."""
SO_RCVBUFFORCE, SO_MEMINFO = 33, 55
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NETLINK_NO_ENOBUFS = 270, 1, 5
DROPS: Final = slice(32, 36)
"""SK_MEMINFO_DROPS in the nine words of SO_MEMINFO: messages for which the queue had no room."""
TELLS_TIME_LEFT: Final = (5, 11)
"""First release whose DESTROY messages carry the time left (ctnetlink_conntrack_event)."""

_libc = ctypes.CDLL(None, use_errno=True)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class _Msghdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.POINTER(_Iovec)),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Mmsghdr(ctypes.Structure):
    _fields_ = (("hdr", _Msghdr), ("len", ctypes.c_uint32))


class Receiver:
    """recvmmsg(2) into memory that is allocated once."""

    def __init__(self, messages: int = MESSAGES, slot: int = SLOT) -> None:
        self.slot = slot
        self.data: npt.NDArray[np.uint8] = np.zeros(messages * slot, np.uint8)
        self._iov = (_Iovec * messages)()
        self._headers = (_Mmsghdr * messages)()
        base = self.data.ctypes.data
        for i in range(messages):
            self._iov[i].base, self._iov[i].len = base + i * slot, slot
            self._headers[i].hdr.iov = ctypes.pointer(self._iov[i])
            self._headers[i].hdr.iovlen = 1
        raw = np.frombuffer(memoryview(self._headers), np.uint8).reshape(messages, -1)
        at = _Mmsghdr.len.offset
        self._lengths = raw[:, at : at + 4]

    def receive(self, fd: int) -> npt.NDArray[np.int64]:
        """The length of each message that was waiting; they lie ``slot`` bytes apart in ``data``.

        A message longer than its slot counts with its full length. Raises OSError, ENOBUFS
        included; never waits.
        """
        n = _libc.recvmmsg(
            fd, self._headers, len(self._headers), socket.MSG_DONTWAIT | socket.MSG_TRUNC, None
        )
        if n < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        lengths = np.ascontiguousarray(self._lengths[:n]).view(np.uint32).reshape(-1)
        return lengths.astype(np.int64)


@dataclass
class _Listener:
    """One namespace whose events are received."""

    space: Namespace
    sock: socket.socket
    base: dict[str, int]
    """The kernel's counters when listening began."""
    silent: bool = False
    """nf_conntrack_events is 0: the kernel makes no events."""
    older: Optional[OlderEntries] = None
    """Set when nf_conntrack_events is 2 and there were entries: their end will not be reported."""
    missing: Optional[Future[Events]] = None
    """Which of the older entries have ended, while that is being read."""
    dropped: int = 0
    """The socket's own count of lost messages, as last read."""
    received: Counts = field(default_factory=lambda: np.zeros(N_REASONS, np.uint64))
    counts: Counts = field(default_factory=lambda: np.zeros(N_REASONS, np.uint64))


class NetlinkCapture(Capture):
    """ctnetlink's NEW and DESTROY events of many namespaces as records.

    ``ts`` is the time of receipt: with nf_conntrack_timestamp the kernel would tell when
    an entry went, but not when a new one came, and the two must stay in order. ``ct`` is
    CTA_ID. An open socket keeps its namespace
    alive until :meth:`follow` no longer lists it.
    """

    lags = True

    def __init__(self, *, queue: int = QUEUE) -> None:
        """Raises CtraceError when this process may not listen."""
        self.info = HookInfo("netlink", drop_tuples=False, evictions=False, owners=False)
        self._queue = queue
        self._listeners: dict[int, _Listener] = {}
        self._by_fd: dict[int, _Listener] = {}
        self._ready = select.epoll()
        self._receiver = Receiver()
        self._decoder = Decoder()
        self._reader = TableReader()
        self.tells_left = _release() >= TELLS_TIME_LEFT
        """Whether DESTROY messages carry the time left and the TCP state (5.11 and later)."""
        self._looking = ThreadPoolExecutor(1)
        self._lost = 0
        self._module = Module("nf_conntrack_netlink")
        self._gaps = 0
        """Namespaces that lost something while the module was unloaded, not reported yet;"""
        self._gap = False
        """and whether that ever happened."""
        try:
            self._listen(Namespace(here(), "self", "/proc/thread-self/ns/net"))
        except CtraceError:
            self.close()
            raise
        self._describe()

    def follow(self, namespaces: Sequence[Namespace]) -> None:
        """Listen in these namespaces and no others."""
        wanted = {space.inum: space for space in namespaces}
        for inum in [inum for inum in self._listeners if inum not in wanted]:
            self._drop(inum)
        for inum, space in wanted.items():
            known = self._listeners.get(inum)
            if known is not None:
                known.space = space
                continue
            try:
                self._listen(space)
            except CtraceError:
                continue  # it went away while we looked; a living one comes again
        if self._module.changed():
            self._gap = True
            self._gaps += len(self._listeners)
            for listener in self._listeners.values():  # one at least
                listener.received[Reason.RING_FULL] += np.uint64(1)
        self._describe()

    def poll(self) -> tuple[Events, int]:
        """What has arrived, in order of arrival, and how many events were lost."""
        parts: list[Events] = []
        lost = 0
        # What was found missing before this poll is reported at its end: a DESTROY message that
        # waits comes first.
        looked = [one for one in self._listeners.values() if one.missing and one.missing.done()]
        for fd, _ in self._ready.poll(0):
            listener = self._by_fd[fd]
            for _ in range(ROUNDS):
                events, more, missed = self._take(listener)
                lost += missed
                if len(events):
                    parts.append(events)
                if not more:
                    break
        for listener in looked:
            parts.append(self._missing(listener))
        for listener in self._listeners.values():
            lost += self._newly_dropped(listener)
            older = listener.older
            if older is not None and listener.missing is None and older.due:
                listener.missing = self._looking.submit(older.look, listener.space)
        events = join(parts)
        if (events["ts"][1:] < events["ts"][:-1]).any():
            events = events[np.argsort(events["ts"], kind="stable")]
        if lost:
            self._lost += lost
            self._describe()
        gaps, self._gaps = self._gaps, 0
        return events, lost + gaps

    def counts(self) -> dict[int, Counts]:
        """Events received, and from the kernel's counters whatever has no event."""
        spaces = [listener.space for listener in self._listeners.values()]
        for reading in self._reader.read(spaces):
            listener = self._listeners[reading.netns]
            since = {
                name: max(n - listener.base.get(name, 0), 0) for name, n in reading.stats.items()
            }
            reasons.merge(listener.counts, listener.received, since)
        return {inum: listener.counts.copy() for inum, listener in self._listeners.items()}

    def close(self) -> None:
        """Close every socket; safe to call twice."""
        for inum in list(self._listeners):
            self._drop(inum)
        self._looking.shutdown(wait=False, cancel_futures=True)
        self._reader.close()
        if not self._ready.closed:
            self._ready.close()

    def _listen(self, space: Namespace) -> None:
        sock, inum = ctnetlink.open_socket(space.path)
        try:
            if inum != space.inum:
                raise CtraceError(f"namespace {space.name} has gone")
            try:
                sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, self._queue)
            except PermissionError:  # root of a user namespace: net.core.rmem_max at most
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._queue)
            if _drops(sock) is not None:
                # An overrun then costs the messages that found no room, and not all until
                # the queue is empty again; how many, the socket counts.
                sock.setsockopt(SOL_NETLINK, NETLINK_NO_ENOBUFS, 1)
            for group in GROUPS:
                sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
            with enter(space.path):
                mode = _setting("events")
            with TableReader() as reader:
                readings = reader.read([space])
            base = dict(readings[0].stats) if readings else {}
            late = mode == "2" and bool(readings) and readings[0].count > 0
            older = OlderEntries(space) if late else None
            listener = _Listener(space, sock, base, silent=mode == "0", older=older)
        except OSError as error:
            sock.close()
            raise CtraceError(
                f"cannot listen to conntrack events in {space.name}: {error.strerror} "
                "(it needs CAP_NET_ADMIN)"
            ) from error
        except CtraceError:
            sock.close()
            raise
        self._listeners[inum] = listener
        self._by_fd[sock.fileno()] = listener
        self._ready.register(sock.fileno(), select.EPOLLIN)

    def _missing(self, listener: _Listener) -> Events:
        """The older entries that have ended without a message."""
        if listener.older is None or listener.missing is None:
            return empty()
        rows = listener.older.take(listener.missing.result())
        listener.missing = None
        listener.received[Reason.GONE] += np.uint64(len(rows))
        return rows

    def _drop(self, inum: int) -> None:
        listener = self._listeners.pop(inum)
        fd = listener.sock.fileno()
        self._ready.unregister(fd)
        del self._by_fd[fd]
        listener.sock.close()

    def _take(self, listener: _Listener) -> tuple[Events, bool, int]:
        """One recvmmsg: its events, whether more may be waiting, and losses that have no number."""
        receiver = self._receiver
        try:
            lengths = receiver.receive(listener.sock.fileno())
        except BlockingIOError:
            return empty(), False, 0
        except OSError:  # ENOBUFS
            return empty(), True, 0 if _drops(listener.sock) is not None else 1
        now = boot_ns()
        starts = np.arange(len(lengths), dtype=np.int64) * receiver.slot
        whole = lengths <= receiver.slot
        said = self._decoder.decode(receiver.data, starts[whole], lengths[whole])
        events = said.events
        events["ts"] = now
        events["netns"] = listener.space.inum
        new, gone = said.kind == 0, said.kind == 2
        events["kind"][new], events["kind"][gone] = Kind.INSERT, Kind.DESTROY
        events["reason"][new] = np.where(said.portid[new] == 0, Reason.NEW, Reason.USER)
        ends = gone, said.left, said.portid, said.mark
        reasons.why_ended(events, *ends, tells_left=self.tells_left)
        events = reasons.with_untold_births(events[new | gone])
        if listener.older is not None:
            listener.older.ended(events)
        listener.received += np.bincount(events["reason"], minlength=N_REASONS).astype(np.uint64)
        return events, len(lengths) == MESSAGES, int((~whole).sum())

    def _newly_dropped(self, listener: _Listener) -> int:
        total = _drops(listener.sock)
        if total is None:
            return 0
        newly = (total - listener.dropped) & 0xFFFFFFFF
        listener.dropped = total
        listener.received[Reason.RING_FULL] += np.uint64(newly)
        return newly

    def _describe(self) -> None:
        blind = [
            "refused packets are counted from the kernel's statistics, without their tuples; one "
            "refused for lack of memory counts as refused by a full table",
            "evictions by early_drop are counted, but look like other deletions",
            "which process opened a flow is not known",
            "entries inserted beside a clashing one (NAT) are reported when they end",
        ]
        late = [one.space.name for one in self._listeners.values() if one.older is not None]
        silent = [one.space.name for one in self._listeners.values() if one.silent]
        if late:
            blind.append(
                "with nf_conntrack_events=2 the kernel does not report the end of entries older "
                "than ctrace; the table is read every few seconds to find it: " + _some(late)
            )
        if silent:
            blind.append("nf_conntrack_events=0, so no events at all: " + _some(silent))
        if self._lost:
            blind.append(f"{self._lost} events were lost: inserts and deletions are lower bounds")
        if self._gap:
            blind.append("nf_conntrack_netlink was unloaded meanwhile: counts are lower bounds")
        if not self.tells_left:
            blind.append("kernels before 5.11 do not report why an entry ended")
        n = len(self._listeners)
        self.info = HookInfo(
            "netlink",
            (f"ctnetlink NEW and DESTROY in {n} namespace{'' if n == 1 else 's'}",),
            tuple(blind),
            drop_tuples=False,
            evictions=False,
            owners=False,
        )


def _drops(sock: socket.socket) -> Optional[int]:
    """How many messages the socket has lost since it was opened; None before 4.12."""
    try:
        info = sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, DROPS.stop)
    except OSError:
        return None
    return int(struct.unpack("=I", info[DROPS])[0]) if len(info) == DROPS.stop else None


def _some(names: list[str]) -> str:
    """A few of the names, and how many more."""
    first = ", ".join(sorted(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"


def _setting(name: str) -> str:
    try:
        with open(f"/proc/sys/net/netfilter/nf_conntrack_{name}") as file:
            return file.read().strip()
    except OSError:
        return ""


def _release() -> tuple[int, ...]:
    numbers = os.uname().release.split("-")[0].split(".")
    return tuple(int(number) for number in numbers[:2] if number.isdecimal())
