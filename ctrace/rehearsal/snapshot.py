"""Everything of a namespace that a packet's fate depends on, read once and kept as bytes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from errno import ENOENT
from functools import cached_property
from typing import Any, Final, Optional

from ctrace.errors import CtraceError, TryAgain
from ctrace.host import commands
from ctrace.host.netns import enter
from ctrace.host.rawlink import NETFILTER, ROUTE, Interrupted, Link, attr, number, split, text, word
from ctrace.rehearsal import nft_copy
from ctrace.rehearsal.nft_copy import BRIDGE

GETLINK, GETADDR, GETROUTE, GETRULE, GETQDISC, GETNEXTHOP = 18, 22, 26, 34, 38, 106
LINK_NETNSID: Final = 37
_STACKED: Final = {"vlan", "macvlan", "macvtap", "ipvlan", "ipvtap", "macsec"}
"""Devices that hand what they send to the one below them."""
PLAIN_QUEUES: Final = {
    "noqueue", "noop", "pfifo_fast", "pfifo", "bfifo", "mq", "fq", "fq_codel", "codel", "sfq", "",
}  # fmt: skip
LOOPBACK: Final = 772
ETHER: Final = 1
UP: Final = 1
_FIXED: Final = re.compile(  # of the whole machine, or a counter, a secret, an action or a module
    r"nf_conntrack_(max|count|buckets|expect_max)$|route/flush|/stable_secret|base_reachable_time"
    r"|retrans_time|nf_log|netdev_|tcp_fastopen_key|_mem$|disable_ipv6$|addr_gen_mode$|/neigh/"
    r"|tcp_congestion_control$|nf_hooks_lwtunnel$"
)
_IPSET: Final = 6 << 8
_IPSET_GET_BYNAME: Final = 14


@dataclass(frozen=True)
class Device:
    """An interface."""

    index: int
    name: str
    kind: int
    """ARPHRD_*."""
    up: bool
    what: str
    """``veth``, ``bridge``, ``vrf``; empty for hardware."""
    master: int
    mac: bytes
    mtu: int
    group: int


@dataclass(frozen=True)
class Snapshot:
    """What :class:`ctrace.rehearsal.stage.Stage` is made from."""

    devices: tuple[Device, ...]
    addresses: tuple[bytes, ...]
    """RTM_NEWADDR bodies."""
    routes: tuple[bytes, ...]
    nexthops: tuple[bytes, ...]
    rules: tuple[bytes, ...]
    sysctls: tuple[tuple[str, str], ...]
    nft: tuple[nft_copy.Thing, ...]
    ipsets: tuple[str, ...]
    """Lines of ``ipset save``."""
    ipset_index: tuple[tuple[int, str], ...]
    legacy: tuple[tuple[str, str], ...]
    """(``ip`` or ``ip6``, what iptables-legacy-save -c printed)."""
    gaps: tuple[str, ...]
    """What could not be read, one sentence each."""
    unmarked: tuple[int, ...] = ()
    """Indexes of interfaces after whose output hook nothing reads a packet's mark."""

    @cached_property
    def local(self) -> tuple[tuple[bytes, int], ...]:
        """(address, interface's index) of the namespace's own addresses."""
        found = []
        for body in self.addresses:
            of = dict(split(body, 8))
            raw = of.get(2) or of.get(1) or b""
            if len(raw) in (4, 16):
                found.append((raw, int(struct.unpack_from("=I", body, 4)[0])))
        return tuple(dict.fromkeys(found))

    @cached_property
    def leaving(self) -> set[str]:
        """Names of the interfaces with chains that see what leaves by them."""
        return nft_copy.at_egress(self.nft)

    @cached_property
    def forwards(self) -> bool:
        """Whether it routes in either family, from any interface."""
        return any(
            value.strip() == "1" and re.search(r"ip_forward$|/forwarding$", path)
            for path, value in self.sysctls
        )

    def hears_mark(self, way: str, device: int) -> bool:
        """Whether anything reads the mark of a packet once it has come to its end (see
        :class:`ctrace.rehearsal.stage.Outcome`)."""
        return self._sockets_hear if way == "in" else device not in self.unmarked

    @cached_property
    def _sockets_hear(self) -> bool:
        """Whether sockets take over the mark of a packet that arrives, or echo it."""
        return any(
            value.strip() != "0" and path.endswith(("/tcp_fwmark_accept", "/fwmark_reflect"))
            for path, value in self.sysctls
        )


def take(path: str) -> Snapshot:
    """The namespace at ``path`` as it is now. Changes nothing there. Raises CtraceError."""
    gaps: list[str] = []
    try:
        with Link(path, ROUTE) as link:
            devices = [
                _device(body) for body in link.dump(GETLINK, struct.pack("=BxHiII", 0, 0, 0, 0, 0))
            ]
            quiet = _unmarked(link)
            addresses = link.dump(GETADDR, struct.pack("=BBBBI", 0, 0, 0, 0, 0))
            nexthops = link.dump(GETNEXTHOP, bytes(8))
            routes, rules = [], []
            for family in (2, 10):
                ask = struct.pack("=BBBBBBBBI", family, 0, 0, 0, 0, 0, 0, 0, 0)
                routes += [body for body in link.dump(GETROUTE, ask) if _made_by_hand(body)]
                rules += link.dump(GETRULE, ask)
        things = nft_copy.read(path)
    except Interrupted:
        raise TryAgain("its rules changed again and again while they were read") from None
    except OSError as error:
        raise CtraceError(f"its rules cannot be read: {error.strerror}") from None
    gaps += _below(devices, nft_copy.at_egress(things))
    legacy = _legacy(path, gaps)
    sets, index = _ipsets(path, gaps)
    if _by_bridge_port(path, devices, things, legacy):
        gaps.append("rules that tell a bridge's ports apart (physdev, by br_netfilter)")
    return Snapshot(
        tuple(devices), tuple(addresses), tuple(routes), tuple(nexthops), tuple(rules),
        tuple(read_sysctls(path).items()), things, tuple(sets), tuple(index), tuple(legacy),
        tuple(gaps), () if any(family == BRIDGE for _, family, _ in things) else quiet,
    )  # fmt: skip


def _below(devices: list[Device], at_egress: set[str]) -> Iterator[str]:
    """Sentences on chains at a device by which packets of others leave: a copy's don't reach it."""
    stacked = any(device.what in _STACKED for device in devices)
    for device in devices:
        if device.name in at_egress and (device.master or stacked):
            yield f"the egress chain at {device.name}, which other interfaces send by"


def _unmarked(link: Link) -> tuple[int, ...]:
    """Interfaces that hand a packet to a card or another namespace, and shape nothing."""
    shaped = set()
    for body in link.dump(GETQDISC, bytes(20)):
        if word(dict(split(body, 20)).get(1, b"")) not in PLAIN_QUEUES:
            shaped.add(struct.unpack_from("=i", body, 4)[0])
    found = []
    for body in link.dump(GETLINK, struct.pack("=BxHiII", 0, 0, 0, 0, 0)):
        of = dict(split(body, 16))
        what = word(dict(split(of.get(18, b""))).get(1, b""))
        (index,) = struct.unpack_from("=i", body, 4)
        # The mark of a packet survives a veth pair within one namespace.
        away = what in ("", "bridge") or (what == "veth" and LINK_NETNSID in of)
        if away and index not in shaped:
            found.append(index)
    return tuple(found)


def _device(body: bytes) -> Device:
    _, kind, index, flags = struct.unpack_from("=BxHiI", body)
    of = dict(split(body, 16))
    info = dict(split(of.get(18, b"")))
    return Device(
        index,
        word(of[3]),
        kind,
        bool(flags & UP),
        word(info.get(1, b"")),
        _native(of.get(10)),
        of.get(1, b""),
        _native(of.get(4)),
        _native(of.get(27)),
    )


def _native(data: Optional[bytes]) -> int:
    return int(struct.unpack("=I", data)[0]) if data else 0


def _made_by_hand(body: bytes) -> bool:
    """Not cached (RTM_F_CLONED), and none of those that the kernel makes for addresses."""
    cached = struct.unpack_from("=I", body, 8)[0] & 0x200
    return not cached and not (body[5] == 2 and body[7] != 1)


def read_sysctls(path: str) -> dict[str, str]:
    """Settings of IPv4, IPv6 and netfilter below /proc/sys/net, by path."""
    found = {}
    with enter(path):
        for top in ("ipv4", "ipv6", "netfilter"):
            for folder, _, names in os.walk(f"/proc/sys/net/{top}"):
                if "/neigh" in folder:
                    continue
                for name in names:
                    where = f"{folder}/{name}"
                    if _FIXED.search(where):
                        continue
                    with contextlib.suppress(OSError, UnicodeDecodeError), open(where) as file:
                        found[where] = file.read()
    return found


def _legacy(path: str, gaps: list[str]) -> list[tuple[str, str]]:
    found = []
    with enter(path):
        for family in ("ip", "ip6"):
            try:
                with open(f"/proc/thread-self/net/{family}_tables_names") as file:
                    names = file.read().split()
            except OSError:
                continue
            if not names:
                continue
            command = f"{family}tables-legacy-save"
            if not commands.have(command):
                gaps.append(f"{command} is missing, and legacy iptables tables are in use")
                continue
            try:
                found.append((family, commands.run([command, "-c"])))
            except CtraceError as error:
                gaps.append(str(error))
    return found


def _by_bridge_port(
    path: str,
    devices: list[Device],
    things: tuple[nft_copy.Thing, ...],
    legacy: list[tuple[str, str]],
) -> bool:
    """Whether bridged packets meet rules that ask for the port: a copy's bridge has none.

    Without such rules a bridged packet fares as one that is routed over the bridge.
    """
    if not any(device.what == "bridge" for device in devices):
        return False
    for family, kind, name in (("ip", 2, "iptables"), ("ip6", 10, "ip6tables")):
        try:
            with enter(path), open(f"/proc/sys/net/bridge/bridge-nf-call-{name}") as file:
                called = file.read().strip() != "0"
        except OSError:
            continue
        asked = any(" -m physdev " in text for where, text in legacy if where == family)
        if called and (
            asked or any(b"physdev\0" in body for _, where, body in things if where == kind)
        ):
            return True
    return False


def _ipsets(path: str, gaps: list[str]) -> tuple[list[str], list[tuple[int, str]]]:
    with Link(path, NETFILTER) as link:
        if not _has_ipset(link):
            return [], []
        try:
            with enter(path):
                lines = commands.run(["ipset", "save"]).splitlines()
        except CtraceError as error:
            gaps.append(str(error))
            return [], []
        index = []
        for line in lines:
            if line.startswith("create "):
                name = line.split()[1]
                body = struct.pack(">BBH", 2, 0, 0) + attr(1, b"\7") + text(2, name)
                of = dict(split(link.ask(_IPSET | _IPSET_GET_BYNAME, body), 4))
                index.append((number(of[11]), name))
    return lines, sorted(index)


def _has_ipset(link: Link) -> bool:
    """Whether there are any, without loading the module by asking: only if it is there."""
    if os.path.exists("/proc/modules"):
        with open("/proc/modules") as file:
            if "ip_set " not in file.read():
                return False
    try:
        # IPSET_CMD_LIST without a name, names only (IPSET_FLAG_LIST_SETNAME): a dump.
        body = struct.pack(">BBH", 2, 0, 0) + attr(1, b"\7") + attr(6, struct.pack(">I", 4))
        return bool(link.dump(_IPSET | 7, body))
    except OSError as error:
        if error.errno == ENOENT:
            return False
        return False


# ---- as text, for recordings ------------------------------------------------------------


def to_text(snapshot: Snapshot) -> str:
    """One line of ASCII; :func:`from_text` reads it back."""
    body = json.dumps(_plain(asdict(snapshot)), separators=(",", ":")).encode()
    return base64.b85encode(zlib.compress(body, 6)).decode()


def from_text(line: str) -> Snapshot:
    """The snapshot of :func:`to_text`. Raises ValueError."""
    inflate = zlib.decompressobj()
    try:
        body = inflate.decompress(base64.b85decode(line), BIGGEST)
        found = json.loads(body)
        things = tuple((k, f, _raw(b)) for k, f, b in found["nft"])
        bodies = {
            name: tuple(_raw(b) for b in found[name])
            for name in ("addresses", "routes", "nexthops", "rules")
        }
        return Snapshot(
            devices=tuple(Device(**{**d, "mac": _raw(d["mac"])}) for d in found["devices"]),
            nft=things,
            sysctls=tuple((str(a), str(b)) for a, b in found["sysctls"]),
            ipsets=tuple(str(x) for x in found["ipsets"]),
            ipset_index=tuple((int(a), str(b)) for a, b in found["ipset_index"]),
            legacy=tuple((str(a), str(b)) for a, b in found["legacy"]),
            gaps=tuple(str(x) for x in found["gaps"]),
            unmarked=tuple(int(x) for x in found.get("unmarked", ())),
            **bodies,
        )
    except (zlib.error, KeyError, TypeError, ValueError) as error:
        raise ValueError("the snapshot is damaged") from error


BIGGEST: Final = 256 << 20


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _raw(value: str) -> bytes:
    return bytes.fromhex(value)
