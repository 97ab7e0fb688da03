"""A copy of a namespace in which packets are sent and their fate is observed.

What arrives or would leave is dropped in chains of ours, which come last and report what they saw
through nf_tables' own trace: no further module is needed, nothing is written to a log, and nobody
answers. The whole of it hangs on file descriptors and is gone with them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple, Optional

from ctrace.errors import CtraceError, TryAgain
from ctrace.host import ctnetlink
from ctrace.host.packets import ends as addresses
from ctrace.host.rawlink import APPEND, CREATE, NETFILTER, Layouts, Link, Space, number, split, word
from ctrace.record import ICMP, ICMPV6, TCP, UDP
from ctrace.rehearsal import nft_copy, nft_edit, surroundings
from ctrace.rehearsal.nft_copy import RULE, Batch
from ctrace.rehearsal.nft_edit import Place, Request
from ctrace.rehearsal.packets import MARK, MARKER
from ctrace.rehearsal.snapshot import Snapshot
from ctrace.rehearsal.ways import ends
from ctrace.rehearsal.ways.ends import ENDS, INET
from ctrace.ruleset.notrack import TABLE as OURS

PATIENCE_S: Final = 60.0
"""Seconds without a word from the kernel: what it does in the background waits on a loaded host."""
LONGEST_S: Final = 600.0
_TRACE: Final = 10 << 8 | 17
_NFTABLES_GROUP, _NFTRACE_GROUP = 7, 9
FAMILIES: Final = {"inet": INET, "ip": 2, "ip6": 10}
_INDEX: Final = re.compile(r"(?m)^insert rule (inet|ip|ip6) (\S+) (\S+) index (\d+) (.*)$")
_libc = ctypes.CDLL(None, use_errno=True)


class Outcome(NamedTuple):
    """Where a packet came to an end, and as what."""

    way: str
    """``in``: to this host; ``out``: it would have left."""
    device: int
    mark: int
    tos: int
    proto: int
    src: bytes
    dst: bytes
    sport: int
    dport: int
    extra: bytes
    """TCP's header beyond its ports and numbers, or an ICMP message's type and code; and of TCP and
    UDP what the checksum tells of the rest: options and data."""
    ttl: int = 64
    """Or hop limit."""
    priority: int = 0
    """That rules gave it: its class in a queue."""


class Hit(NamedTuple):
    """A step of a packet's way, as the kernel traced it."""

    family: int
    table: str
    chain: str
    handle: int
    """Of the rule; 0: the chain's policy, or its end."""
    verdict: int
    """NF_DROP 0, NF_ACCEPT 1, or negative: NFT_JUMP -3, NFT_GOTO -4, NFT_CONTINUE -1 ..."""
    kind: int
    """1: policy, 2: return, 3: rule."""
    target: str = ""
    """Of a jump."""


Script = tuple[tuple[str, ...], str]
"""A command and its standard input."""


class Stage:
    """One copy."""

    def __init__(
        self,
        snapshot: Snapshot,
        rules: Optional[Batch] = None,
        known: Optional[surroundings.Settings] = None,
        *,
        silent: bool = False,
        classed: bool = False,
    ) -> None:
        """Make it. Raises CtraceError; ``gaps`` says what is missing.

        ``rules``: nftables as prepared from the snapshot; ``silent``: what legacy tables reject is
        dropped without an answer; ``classed``: packets' priorities are looked at, too.
        """
        self.gaps: list[str] = []
        self._raw: dict[tuple[bytes, int], socket.socket] = {}
        self._files: surroundings.Files = {}
        self._scope = {a: index for a, index in snapshot.local if a[:2] == b"\xfe\x80"}
        self.space = Space()
        try:
            self._build(snapshot, rules, [] if known is None else known, silent, classed)
        except BaseException:
            for file, _ in self._files.values():  # each holds the namespace
                os.close(file)
            self.space.close()
            raise

    def _build(
        self,
        snapshot: Snapshot,
        rules: Optional[Batch],
        known: surroundings.Settings,
        silent: bool,
        classed: bool,
    ) -> None:
        space = self.space
        self._files, self.gaps = surroundings.interfaces(snapshot, space)
        self.gaps += surroundings.addresses(snapshot, space)
        self.gaps += surroundings.sysctls(snapshot, space, known)
        self.gaps += surroundings.routes(snapshot, space)
        # First of all: of chains with one priority the latest is first, and conntrack has to
        # confirm its entries, at the same priority, before we drop.
        refused = nft_copy.write(space.path, nft_copy.batch(ends.table(snapshot, classed)))
        if refused:
            raise CtraceError(f"a rehearsal is not possible here: {refused[0]}")
        surroundings.ipsets(snapshot, space)
        made = rules or nft_copy.batch(snapshot.nft)
        refused = nft_copy.write(space.path, made)
        if refused:
            raise CtraceError(f"its rules cannot be copied: {refused[0]}")
        surroundings.legacy(snapshot, space, silent)
        surroundings.wait(snapshot, space)
        self._listen = Link(space.path, NETFILTER)
        self._listen.sock.setsockopt(270, 1, _NFTRACE_GROUP)  # NETLINK_ADD_MEMBERSHIP
        self._news = Link(space.path, NETFILTER)
        self._news.sock.setsockopt(270, 1, _NFTABLES_GROUP)
        with space.inside():
            self._lo = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._lo.bind(("lo", 0x0800))
        self.ways: dict[int, list[Hit]] = {}
        self._layouts = Layouts()
        self._positions = made.positions
        self.added: set[tuple[Place, int]] = set()
        """Rules that :meth:`run` added: (chain, handle)."""

    def run(self, scripts: Sequence[Script]) -> None:
        """Run commands in it. Raises CtraceError, OSError.

        For an index nft reads all rules: what has no set of its own is added, and moved there.
        """
        for argv, stdin in scripts:
            moves: list[tuple[Place, Optional[int]]] = []
            if argv[0] == "nft":
                stdin = _INDEX.sub(lambda found: self._last(found, moves), stdin)  # noqa: B023,PLW2901
            self.space.run(argv, stdin)
            added = nft_edit.moved(self.space.path, self._news, moves)
            self.added |= {one for one in added if one[0][1] != ENDS}

    def _last(self, found: re.Match[str], moves: list[tuple[Place, Optional[int]]]) -> str:
        where = FAMILIES[found[1]], found[2], found[3]
        handles, at = list(self.positions(where)), int(found[4])
        before = handles[at] if at < len(handles) and "{" not in found[5] else None
        moves.append((where, before))
        return f"add rule {found[1]} {found[2]} {found[3]} {found[5]}" if before else found[0]

    def turn(self, made: nft_copy.Batch) -> None:
        """Load these rules in place of the tables of these names. Raises CtraceError."""
        self._news.sock.setsockopt(270, 2, _NFTABLES_GROUP)  # NETLINK_DROP_MEMBERSHIP
        refused = nft_copy.write(self.space.path, nft_copy.instead(made))
        self._news.sock.setsockopt(270, 1, _NFTABLES_GROUP)
        if refused:
            raise CtraceError(f"its rules cannot be copied: {refused[0]}")
        self.added = {one for one in self.added if one[0][1] == OURS}

    def positions(self, where: Place) -> dict[int, int]:
        """The place of each of a chain's rules, by handle, without what was added here."""
        if where not in self._positions:
            added = {handle for place, handle in self.added if place == where}
            kept = (one for one in nft_edit.handles(self.space.path, where) if one not in added)
            self._positions[where] = {handle: at for at, handle in enumerate(kept)}
        return self._positions[where]

    def trace(self) -> None:
        """From now on also tell each step of a packet's way (:attr:`ways`). Raises OSError."""
        nft_edit.carry_out(
            self.space.path,
            [(RULE, CREATE | APPEND, ends.rule(name, ends.trace())) for name in ("pre", "send")],
        )

    def reset(self, requests: Iterable[Request] = ()) -> None:
        """No entries, nothing traced, no added rules, and ``requests`` carried out.

        Raises CtraceError, OSError.
        """
        ctnetlink.flush(self.space.path)
        gone = [nft_edit.without((INET, ENDS, name)) for name in ("pre", "send")]
        gone += [nft_edit.without(*one) for one in self.added if one[0][1] != OURS]
        nft_edit.carry_out(self.space.path, [*gone, *requests])
        self.added.clear()
        nft_edit.added(self._news)

    def close(self) -> None:
        """Take it down, beside: the kernel waits for all its processors in each close."""
        threading.Thread(target=self._close).start()

    def _close(self) -> None:
        # With entries the kernel would walk the whole host's table for each interface that goes
        # (nf_nat_masquerade.c), and once more while nobody may make or end a namespace, or load a
        # first masquerade (cleanup_net, net_namespace.c): other tools waited half a minute for it.
        with contextlib.suppress(CtraceError, OSError):
            ctnetlink.flush(self.space.path)
        for file, _ in self._files.values():
            os.close(file)
        for sock in (*self._raw.values(), self._lo, self._listen.sock, self._news.sock):
            sock.close()
        self.space.close()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def receive(self, index: int, packet: bytes) -> None:
        """As if it had come in by an interface."""
        file, header = self._files[index]
        six = packet[0] >> 4 == 6
        kind = b"\x86\xdd" if six else b"\x08\0"
        with contextlib.suppress(OSError):  # the interface is down
            os.write(file, header + kind + packet if header else packet)

    def send(self, packet: bytes, uid: int = 0) -> None:
        """As if the host itself had sent it, in a process of this user and the group of that id."""
        six = packet[0] >> 4 == 6
        src, dst = addresses(packet, six)
        family = socket.AF_INET6 if six else socket.AF_INET
        scope = self._scope.get(src, 0)
        sock = self._raw.get((src, uid))
        with contextlib.suppress(OSError):  # dropped by a rule, or there is no route
            if sock is None:
                sock = self._raw[src, uid] = self._open(family, src, scope, uid)
            name = socket.inet_ntop(family, dst)
            sock.sendto(packet, (name, 0, 0, scope) if six else (name, 0))

    def _open(self, family: int, src: bytes, scope: int, uid: int) -> socket.socket:
        with self.space.inside():
            for become in (_libc.setfsgid, _libc.setfsuid) if uid else ():
                become(uid)
            try:
                sock = socket.socket(family, socket.SOCK_RAW, 255)
            finally:
                for become in (_libc.setfsuid, _libc.setfsgid) if uid else ():
                    become(0)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        name = socket.inet_ntop(family, src)
        if family == socket.AF_INET6:
            sock.setsockopt(41, 78, 1)  # IPV6_FREEBIND
            sock.bind((name, 0, 0, scope))
        else:
            sock.setsockopt(0, 15, 1)  # IP_FREEBIND
            sock.bind((name, 0))
        return sock

    def seen(self) -> dict[int, list[Outcome]]:
        """What came to an end since the last call, by the packets' numbers.

        All is over when a marker that was sent last comes through lo: its queue is of this
        processor alone (see :func:`on_one_processor`). Raises CtraceError when it never comes.
        """
        self._lo.send(MARK)
        found: dict[int, list[Outcome]] = defaultdict(list)
        self.ways = defaultdict(list)
        numbers: dict[bytes, int] = {}
        until = time.monotonic() + LONGEST_S
        self._listen.sock.settimeout(PATIENCE_S)
        while time.monotonic() < until:
            try:
                data, at = self._listen.sock.recv(1 << 18), 0
            except OSError:
                break
            while at < len(data):
                size, kind = struct.unpack_from("=IH", data, at)
                body = data[at + 20 : at + size]
                at += (size + 3) & ~3
                if kind == _TRACE and self._told(body, numbers, found):
                    return found
        raise TryAgain("the rehearsal came to a stop: the kernel did not answer in time")

    def _told(
        self, body: bytes, numbers: dict[bytes, int], found: dict[int, list[Outcome]]
    ) -> bool:
        """Take one trace message; True when it is the marker's."""
        of = self._layouts.split(body)
        key, head = of[6], of.get(8)
        if head:
            if head[0] >> 4 == 4 and head[9] == MARKER:
                return True
            numbers[key] = _number(head)
        mine = numbers.get(key, 0)
        chain = word(of[2])
        if word(of[1]) != ENDS:
            verdict = dict(split(of.get(5, b"")))
            code = of.get(1) and verdict.get(1)
            if 16 in of:
                code = of[16]
            self.ways[mine].append(
                Hit(
                    number(of[15]) if 15 in of else 0,
                    word(of[1]),
                    chain,
                    number(of.get(3, b"")),
                    struct.unpack(">i", code)[0] if code else -1,
                    number(of[4]),
                    word(verdict.get(2, b"")),
                )
            )
        elif head and chain in ("in", "out"):
            found[mine].append(_outcome(chain, of, head))
        elif chain == "out" and found[mine] and 14 in of:  # where the mark is the priority by now
            found[mine][-1] = found[mine][-1]._replace(priority=number(of[14]))
        return False


def _number(head: bytes) -> int:
    """IPv4's identification or IPv6's flow label: it survives translation and forwarding."""
    if head[0] >> 4 == 4:
        return int(struct.unpack_from(">H", head, 4)[0])
    return int(struct.unpack_from(">I", head)[0] & 0xFFFFF)


def _outcome(chain: str, of: dict[int, bytes], head: bytes) -> Outcome:
    six = head[0] >> 4 == 6
    tos = struct.unpack_from(">H", head)[0] >> 4 & 255 if six else head[1]
    proto, (src, dst) = head[6 if six else 9], addresses(head, six)
    rest = of.get(9, b"")
    ports = struct.unpack_from(">HH", rest) if proto in (TCP, UDP) and len(rest) >= 4 else (0, 0)
    extra = rest[:2] if proto in (ICMP, ICMPV6) else b""
    if proto in (TCP, UDP):
        size = int.from_bytes(head[4:6] if six else head[2:4], "big") - (0 if six else 20)
        extra = _beyond(src + dst, proto, size, rest)
    device = number(of.get(10 if chain == "in" else 12, b""))
    mark = number(of.get(14, b""))
    sport, dport = ports
    ttl = head[7 if six else 8]
    return Outcome(chain, device, mark, tos, proto, src, dst, sport, dport, extra, ttl)


def _beyond(ends: bytes, proto: int, size: int, rest: bytes) -> bytes:
    """Of a segment or datagram what rules may rewrite beyond addresses and ports; a trace has the
    first 20 bytes of it. What a checksum is made of beside that follows from it (RFC 1071), and
    translations keep it right."""
    at, known, shown = {TCP: (16, 20, rest[12:16] + rest[18:20]), UDP: (6, 8, b"")}[proto]
    if rest[at : at + 2] in (b"\0\0", b""):
        return shown  # it has none
    begin = ends + struct.pack(">II", size, proto) + rest[:known]
    return shown + struct.pack(">H", -int.from_bytes(begin, "big") % 0xFFFF)


@contextlib.contextmanager
def on_one_processor() -> Iterator[None]:
    """This thread on the processor that it is on: what it sends over lo stays in order."""
    before = os.sched_getaffinity(0)
    try:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {min(before)})
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, before)
