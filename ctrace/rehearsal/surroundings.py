"""What surrounds the rules, made again in an empty namespace from a snapshot.

Every interface but lo becomes a TAP (a TUN where it has no link header) with the name, index,
type, address and MTU of the original. A packet written to its file has been received, and the
kernel is done with it when write() returns. Where the tun module is not loaded a veth pair takes
its place, whose other end lies in one more namespace; packets wait there in the processor's own
queue, as over lo. NOARP: no neighbour is ever asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import struct
import time
from errno import EEXIST
from typing import Final

from ctrace.errors import CtraceError, TryAgain
from ctrace.host.rawlink import (
    ACK,
    APPEND,
    CREATE,
    EXCL,
    ROUTE,
    Link,
    Space,
    attr,
    message,
    nested,
    split,
    text,
)
from ctrace.rehearsal.snapshot import (
    ETHER,
    GETROUTE,
    GETRULE,
    LOOPBACK,
    UP,
    Device,
    Snapshot,
    read_sysctls,
)

TUNSETIFF, TUNSETLINK, TUNSETIFINDEX = 0x400454CA, 0x400454CD, 0x400454DA
TUN, TAP, NO_PI = 1, 2, 0x1000
NOARP: Final = 0x80
PATIENCE_S: Final = 60.0
LASTS_S: Final = 600
NEWLINK, NEWADDR, NEWROUTE, NEWRULE, DELRULE, NEWNEXTHOP = 16, 20, 24, 32, 33, 104
_FAR: Final = b"\x02\0\0\0\0\x01"
"""The link address of whoever sends."""
NONE: Final = 65534
"""ARPHRD_NONE: what a TUN is by itself."""
_REJECT: Final = re.compile(r" -j REJECT( --reject-with \S+)?$", re.M)
_FALLBACK: Final = ("sit", "gre", "gretap", "erspan", "ipip", "ip6tnl", "vti", "vti6", "ip6gre")
"""Some tunnels have a device that always exists; while it is down, no packets take it."""
Files = dict[int, tuple[int, bytes]]
"""Index: (file to write packets to, Ethernet header's addresses or nothing)."""


def can() -> str:
    """Why there can't be interfaces here; empty when there can. Loads no module."""
    if _has_tun() or os.path.exists("/sys/module/veth") or not os.path.exists("/proc/modules"):
        return ""
    return "neither the tun nor the veth module is loaded, and none is unasked: modprobe tun"


def _has_tun() -> bool:
    return os.path.exists("/sys/class/misc/tun") and os.path.exists("/dev/net/tun")


def interfaces(snapshot: Snapshot, space: Space) -> tuple[Files, list[str]]:
    """Make them all: (files to write to, what could not be made). Raises CtraceError."""
    files: Files = {}
    why = can()
    if why:
        raise CtraceError(why)
    try:
        return files, _made(snapshot, space, files)
    except BaseException:
        for file, _ in files.values():  # each holds the namespace
            os.close(file)
        raise


def _made(snapshot: Snapshot, space: Space, files: Files) -> list[str]:
    wanted = [
        device
        for device in snapshot.devices
        if device.kind != LOOPBACK and (device.up or device.what not in _FALLBACK)
    ]
    with space.inside():
        _quiet()
        for device in wanted if _has_tun() else ():
            header = device.mac + _FAR if device.kind == ETHER else b""
            files[device.index] = _tap(device), header
    if not _has_tun():
        _pairs(wanted, space, files)
    messages = [
        _up(device)
        for device in snapshot.devices
        if device.index in files or device.kind == LOOPBACK
    ]
    with Link(space.path, ROUTE) as link:
        failed = link.send(messages)
    names = {device.index: device.name for device in snapshot.devices}
    return [f"interface {names.get(i, i)}: {os.strerror(code)}" for i, code in failed]


def _quiet() -> None:
    """No addresses and no questions of the stage's own."""
    for name, value in (
        ("default/addr_gen_mode", "1"),
        ("default/accept_ra", "0"),
        ("default/router_solicitations", "0"),
        ("default/dad_transmits", "0"),
        ("all/accept_ra", "0"),
    ):
        with contextlib.suppress(OSError), open(f"/proc/sys/net/ipv6/conf/{name}", "w") as file:
            file.write(value)


def _tap(device: Device) -> int:
    mode = TAP if device.kind == ETHER else TUN
    file = -1
    try:
        file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(file, TUNSETIFINDEX, struct.pack("=I", device.index))
        fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", device.name.encode(), mode | NO_PI))
        if device.kind not in (ETHER, NONE):
            fcntl.ioctl(file, TUNSETLINK, device.kind)
    except OSError as error:
        if file >= 0:
            os.close(file)
        raise CtraceError(f"cannot make interface {device.name}: {error.strerror}") from None
    return file


def _pairs(wanted: list[Device], space: Space, files: Files) -> None:
    """veth pairs instead: their far ends in a namespace that goes when their sockets do."""
    far = Space()
    try:
        with far.inside(), contextlib.suppress(OSError):
            for name in ("all", "default"):
                with open(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "w") as file:
                    file.write("1")
        with Link(space.path, ROUTE) as link:
            failed = link.send([_pair(device, far.fd) for device in wanted])
        if failed:
            raise CtraceError(f"cannot make a veth pair: {os.strerror(failed[0][1])}")
        with Link(far.path, ROUTE) as link:
            up = struct.pack("=BxHiII", 0, 0, 0, UP, UP)
            link.send([message(NEWLINK, ACK, up + text(3, f"p{d.index}"), d.index) for d in wanted])
        with far.inside():
            for device in wanted:
                sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
                sock.bind((f"p{device.index}", 0x0800))
                files[device.index] = sock.detach(), _mac(device) + _FAR
    finally:
        far.close()


def _pair(device: Device, far: int) -> bytes:
    peer = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + text(3, f"p{device.index}")
    peer += attr(1, _FAR) + attr(28, struct.pack("=I", far))  # IFLA_NET_NS_FD
    info = nested(18, text(1, "veth"), nested(2, attr(1, peer)))  # VETH_INFO_PEER
    head = struct.pack("=BxHiII", 0, 0, device.index, 0, 0)
    body = head + text(3, device.name) + attr(1, _mac(device)) + info
    return message(NEWLINK, ACK | CREATE | EXCL, body, device.index)


def _mac(device: Device) -> bytes:
    good = device.kind == ETHER and any(device.mac) and not device.mac[0] & 1
    return device.mac if good else b"\x02\0\0\0\0\x02"


def _up(device: Device) -> bytes:
    quiet = NOARP if device.kind != LOOPBACK else 0
    head = struct.pack("=BxHiII", 0, 0, device.index, (UP if device.up else 0) | quiet, UP | quiet)
    body = attr(4, struct.pack("=I", device.mtu))
    if device.kind == ETHER and any(device.mac):
        body += attr(1, device.mac)
    if device.group:
        body += attr(27, struct.pack("=I", device.group))
    return message(NEWLINK, ACK, head + body, device.index)


def addresses(snapshot: Snapshot, space: Space) -> list[str]:
    """Give them; returns what was refused."""
    messages = []
    for seq, body in enumerate(snapshot.addresses):
        family, length, flags, scope, index = struct.unpack_from("=BBBBI", body)
        of = dict(split(body, 8))
        wide = int.from_bytes(of.pop(8, bytes([flags])), "little")
        # Of the flags: no DAD (the stage has no neighbours), no prefix route, home address.
        keep = wide & 0x206 | (2 if family == 10 else 0)
        parts = b"".join(attr(key, data) for key, data in of.items() if key not in (6, 11))
        head = struct.pack("=BBBBI", family, length, keep & 0xFF, scope, index)
        parts += attr(8, struct.pack("=I", keep))
        messages.append(message(NEWADDR, ACK | CREATE | EXCL, head + parts, seq))
    with Link(space.path, ROUTE) as link:
        failed = link.send(messages, ok=(EEXIST,))
    return [f"address number {seq}: {os.strerror(code)}" for seq, code in failed]


def wait(snapshot: Snapshot, space: Space) -> None:
    """Wait until the kernel has made its IPv6 addresses usable, which it does in the background.

    Raises CtraceError when it never does (addrconf_dad_work, net/ipv6/addrconf.c).
    """
    up = {device.index for device in snapshot.devices if device.up}
    waiting = [(a, index) for a, index in snapshot.local if len(a) == 16 and index in up]
    until = time.monotonic() + PATIENCE_S
    with Link(space.path, ROUTE) as link:
        while waiting:
            waiting = [one for one in waiting if not _is_local(link, *one)]
            if waiting and time.monotonic() > until:
                raise TryAgain("the kernel did not make an address usable in time")
            if waiting:
                time.sleep(0.001)


def _is_local(link: Link, address: bytes, index: int) -> bool:
    ask = struct.pack("=BBBBBBBBI", 10, 128, 0, 0, 0, 0, 0, 0, 0) + attr(1, address)
    if address[:2] == b"\xfe\x80":
        ask += attr(4, struct.pack("=I", index))
    try:
        return link.ask(GETROUTE, ask)[7] == 2  # RTN_LOCAL
    except OSError:
        return False


def routes(snapshot: Snapshot, space: Space) -> list[str]:
    """Routes, again and again until no more can be added (a gateway wants a route to itself
    first), then routing rules; returns what was refused."""
    waiting = [(NEWNEXTHOP, body) for body in snapshot.nexthops]
    waiting += [(NEWROUTE, body) for body in snapshot.routes]
    gaps: list[str] = []
    with Link(space.path, ROUTE) as link:
        while waiting:
            messages = [_route(kind, body, seq) for seq, (kind, body) in enumerate(waiting)]
            failed = link.send(messages, ok=(EEXIST,))
            if len(failed) == len(waiting):
                gaps += [
                    f"a route of table {waiting[seq][1][4]}: {os.strerror(code)}"
                    for seq, code in failed
                    if waiting[seq][1][5] != 2
                ]
                break
            waiting = [waiting[seq] for seq, _ in failed]
        for family in (2, 10):
            ask = struct.pack("=BBBBBBBBI", family, 0, 0, 0, 0, 0, 0, 0, 0)
            link.send([message(DELRULE, ACK, body) for body in link.dump(GETRULE, ask)])
        rules = [message(NEWRULE, ACK | CREATE | EXCL, body) for body in snapshot.rules]
        gaps += [f"a routing rule: {os.strerror(code)}" for _, code in link.send(rules)]
    return gaps


def _route(kind: int, body: bytes, seq: int) -> bytes:
    head = 8 if kind == NEWNEXTHOP else 12
    keep = split(body, head)
    if kind == NEWROUTE:
        # Cache data; with a nexthop object (30) it says the rest.
        left_out = (12, 5, 4, 9) if any(key == 30 for key, _ in keep) else (12,)
        keep = [(key, data) for key, data in keep if key not in left_out]
    flags = struct.unpack_from("=I", body, head - 4)[0] & 4  # RTNH_F_ONLINK
    top = body[:1] + b"\0" + body[2:4] if kind == NEWNEXTHOP else body[: head - 4]
    how = APPEND if kind == NEWROUTE and body[0] == 2 else EXCL
    parts = b"".join(attr(key, data) for key, data in keep)
    return message(kind, ACK | CREATE | how, top + struct.pack("=I", flags) + parts, seq)


Settings = list[tuple[str, str]]


def sysctls(snapshot: Snapshot, space: Space, known: Settings) -> list[str]:
    """Write what differs, until nothing does; returns what still does.

    ``known`` is what differed in another stage of this snapshot, and is filled for the next.
    """
    want = {path: _lasting(path, value) for path, value in snapshot.sysctls}
    if known:
        write(space, known)
        return []
    differ: Settings = []
    for _ in range(3):  # some set others when written
        have = read_sysctls(space.path)
        differ = [(path, value) for path, value in want.items() if have.get(path, value) != value]
        if not differ:
            break
        known += differ
        write(space, differ)
    return [
        f"{path[14:]} = {value.strip()}"
        for path, value in differ
        if path.rsplit("/", 1)[1] in MATTERS
    ]


def _lasting(path: str, value: str) -> str:
    """A setting as a stage has it: no entry may go while packets are played, however slowly."""
    timeout = "/nf_conntrack_" in path and "_timeout" in path and value.strip().isdigit()
    return f"{LASTS_S}\n" if timeout and int(value) < LASTS_S else value


MATTERS: Final = (
    "rp_filter",
    "ip_forward",
    "forwarding",
    "route_localnet",
    "accept_local",
    "src_valid_mark",
    "fwmark_reflect",
    "nf_conntrack_tcp_loose",
    "nf_conntrack_tcp_be_liberal",
)
"""Settings without which a packet may fare otherwise."""


def write(space: Space, values: Settings) -> None:
    """Set what can be set; forwarding first, which sets others."""
    with space.inside():
        for path, value in sorted(values, key=lambda item: "forward" not in item[0]):
            with contextlib.suppress(OSError), open(path, "w") as file:
                file.write(value)


def ipsets(snapshot: Snapshot, space: Space) -> None:
    """Recreate them with the same indexes, because rules refer to those. Raises CtraceError."""
    if not snapshot.ipset_index:
        return
    by_index = dict(snapshot.ipset_index)
    lines: list[str] = []
    fill = []
    for index in range(max(by_index) + 1):
        name = by_index.get(index)
        if name is not None:
            lines += [line for line in snapshot.ipsets if line.startswith(f"create {name} ")]
        else:
            fill.append(f"rehearsal-{index}")
            lines.append(f"create {fill[-1]} bitmap:port range 0-1")
    lines += [line for line in snapshot.ipsets if not line.startswith("create ")]
    lines += [f"destroy {name}" for name in fill]
    space.run(["ipset", "restore"], "\n".join(lines) + "\n")


def legacy(snapshot: Snapshot, space: Space, silent: bool) -> None:
    """Load the legacy tables with their counters. Raises CtraceError.

    ``silent``: what is rejected is dropped. The answer of a REJECT is a packet, too, and the way
    of the one that it is about is told from the counters (:mod:`ctrace.rehearsal.ways.legacy`).
    """
    for family, rules in snapshot.legacy:
        loaded = _REJECT.sub(" -j DROP", rules) if silent else rules
        space.run([f"{family}tables-legacy-restore", "-c"], loaded)
