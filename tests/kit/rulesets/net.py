"""A host under test between a client and a server, with a narrow link in the middle.

    c ---- r1 ==1300== r2 ---- h ---- s        (h is the host whose rules are judged)

Real TCP and UDP, both families; every measurement says what really went through.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ctrace.advice.hazards import Judge, Judgement
from ctrace.advice.roles import Seen
from ctrace.advice.subject import Subject
from ctrace.host.ctnetlink import dump
from ctrace.host.netns import local_addresses
from ctrace.lab import Lab, Node
from ctrace.model.snapshot import Culprit, Tuple5
from ctrace.plan.plan import Notrack, alone
from ctrace.record import address_text, proto_name
from ctrace.rehearsal.snapshot import take
from ctrace.ruleset import notrack_iptables, notrack_nft
from ctrace.ruleset.reader import read
from kit.rulesets.services import (
    ABORT,
    BACKEND,
    BIG,
    CLOSED,
    FAMILIES,
    HIGH,
    LOCAL,
    PATIENCE,
    PORT,
    SHORT,
    STRANGER,
    WAIT,
    Address,
    aborted,
    tcp_service,
    udp_service,
)


@dataclass(frozen=True)
class Measured:
    """What really happened, by family."""

    works: dict[int, bytes]
    """Short connections complete: what the service answered."""
    path_mtu: dict[int, bool]
    """Large segments through the narrow link arrive."""
    local: dict[int, bool]
    """The host's own health check."""
    open: frozenset[str]
    """Doors that a stranger could open."""

    def worse_than(self, before: Measured) -> list[str]:
        """What worked before and does not now, and doors that are new."""
        found = []
        for name in ("works", "path_mtu", "local"):
            then, now = getattr(before, name), getattr(self, name)
            found += [f"{name} v{family}" for family in then if then[family] and not now[family]]
        found += [
            f"another service answers v{family}"
            for family, answer in before.works.items()
            if answer and self.works[family] not in (answer, b"")
        ]
        return found + [f"open {door}" for door in sorted(self.open - before.open)]


@dataclass
class Net:
    """The five nodes, and what runs on them."""

    lab: Lab
    c: Node
    r1: Node
    r2: Node
    h: Node
    s: Node
    stop: list[socket.socket] = field(default_factory=list)
    local: tuple[str, ...] = ()

    @property
    def addresses(self) -> dict[str, dict[int, str]]:
        """Of the nodes that talk, on the side of the others, by family."""
        pairs = {
            "c": self.c.addresses["r1"],
            "h": self.h.addresses["r2"],
            "s": self.s.addresses["h"],
        }
        return {name: dict(zip((4, 6), pair, strict=True)) for name, pair in pairs.items()}

    def close(self) -> None:
        for listener in self.stop:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.lab.close()


def build() -> Net:
    lab = Lab()
    c, r1, r2, h, s = (lab.namespace(name) for name in ("c", "r1", "r2", "h", "s"))
    for a, b in ((c, r1), (r1, r2), (r2, h), (h, s)):
        lab.link(a, b)
    for a, b in ((r1, r2), (r2, r1)):
        a.run(["ip", "link", "set", f"to-{b.name}", "mtu", "1300"])
    for node in (r1, r2, h):
        node.sysctl("net.ipv4.ip_forward", 1)
        node.sysctl("net.ipv6.conf.all.forwarding", 1)
    for node, gate in ((c, r1), (r1, r2), (h, r2), (s, h), (r2, h)):
        for version, via in zip(("-4", "-6"), gate.addresses[node.name], strict=True):
            node.run(["ip", version, "route", "add", "default", "via", via])
    for version, prefix, via in zip(
        ("-4", "-6"), ("10.77.1.0/24", "fd77:1::/64"), r1.addresses["r2"], strict=True
    ):
        r2.run(["ip", version, "route", "add", prefix, "via", via])
    c.run(["ip", "addr", "add", "10.77.1.100/24", "dev", "to-r1"])
    c.run(["ip", "addr", "add", "fd77:1::100/64", "dev", "to-r1", "nodad"])
    net = Net(lab, c, r1, r2, h, s)
    for node, ports in ((c, (PORT,)), (h, (PORT, CLOSED, HIGH, BACKEND)), (s, (PORT, CLOSED))):
        net.stop += [tcp_service(node, port) for port in ports]
        net.stop.append(udp_service(node, PORT))
    net.local = local_addresses(h.path)
    at, deadline = net.addresses, time.monotonic() + 60
    # Neighbour discovery and link-local addresses take a moment.
    while not all(ask(c, (at[name][family], PORT)) for name in "hs" for family in (4, 6)):
        assert time.monotonic() < deadline, "the private network does not carry traffic"
    return net


# ---- measurements ------------------------------------------------------------


def ask(
    node: Node,
    target: Address,
    what: bytes = b"s",
    *,
    source: Address | None = None,
    wait: float = WAIT,
) -> bytes:
    """One connection: the end of the answer (of ``w`` all), empty unless all of it came."""
    family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
    with node.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(wait)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with aborted(client):
            if source:
                client.bind(source)
                # Free the port at once: the next scan uses it again.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
            client.connect(target)
            client.sendall(what + (b"x" * BIG if what == b"u" else b""))
            got, want = 0, BIG if what == b"d" else 2
            while got < want:
                data = client.recv(65536)
                if not data:
                    return b""
                got += len(data)
            return data if what == b"w" else data[-2:]
        return b""


def asked(
    node: Node, target: Address, what: bytes = b"s", *, source: Address | None = None
) -> bytes:
    """The same of one that is to be answered, however busy the machine is."""
    return ask(node, target, what, source=source, wait=PATIENCE)


def echo(
    node: Node, target: Address, *, source: Address | None = None, wait: float = WAIT
) -> bytes:
    """One datagram there and back: the answer, if any."""
    family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
    with node.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(wait)
        try:
            if source:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                client.bind(source)
            client.connect(target)
            client.send(b"hello")
            return client.recv(64)
        except OSError:
            return b""


def measure(
    net: Net, role: str, proto: str = "tcp", port: int = PORT, patience: float = 1.0
) -> Measured:
    """Use the service as its role has it, check the path, and try the doors, all at once."""
    forget_paths(net)
    with ThreadPoolExecutor(12) as pool:
        uses = {f: pool.submit(_use, net, role, f, proto, port, WAIT * patience) for f in FAMILIES}
        checks = {
            f: pool.submit(_check, net, role, f, proto, port, WAIT * patience) for f in FAMILIES
        }
        tries = {
            name: pool.submit(ask, net.c, door, source=source, wait=SHORT * patience)
            for name, door, source in _doors(net, role, port)
            if proto == "tcp"
        }
        return Measured(
            {family: use.result()[0] for family, use in uses.items()},
            {family: use.result()[1] for family, use in uses.items()},
            {family: check.result() for family, check in checks.items()},
            frozenset(name for name, got in tries.items() if got.result()),
        )


def _use(
    net: Net, role: str, family: int, proto: str, port: int, wait: float
) -> tuple[bytes, bool]:
    """Two short connections, then a large transfer: (works, path MTU discovery works)."""
    at = net.addresses
    node, target, big = {
        "server": (net.c, at["h"][family], b"d"),
        "client": (net.h, at["c"][family], b"u"),
        "forward": (net.c, at["s"][family], b"d"),
        "loopback": (net.h, LOCAL[family], b""),
    }[role]
    once = echo if proto == "udp" else ask
    works = once(node, (target, port), wait=wait) and once(node, (target, port), wait=wait)
    if not big or proto != "tcp" or not works:
        return works, True
    return works, bool(ask(node, (target, port), big, wait=wait))


def _check(net: Net, role: str, family: int, proto: str, port: int, wait: float) -> bool:
    once = echo if proto == "udp" else ask
    return role != "server" or bool(once(net.h, (LOCAL[family], port), wait=wait))


def _doors(net: Net, role: str, port: int) -> Iterator[tuple[str, Address, Address]]:
    """What a stranger tries: (name, target, source)."""
    for family in FAMILIES:
        at = {name: addresses[family] for name, addresses in net.addresses.items()}
        stranger = STRANGER[family]
        doors = {"server": ("h", CLOSED), "client": ("h", HIGH), "forward": ("s", CLOSED)}
        if role in doors:
            name, door = doors[role]
            yield f"v{family} {name}:{door} from :{port}", (at[name], door), (stranger, port)
        if role == "server":
            yield f"v{family} h:{port} by a stranger", (at["h"], port), (stranger, 0)


def entries(net: Net, port: int | None = PORT) -> list[Tuple5]:
    """The entries of a port (None: of all) in the host's table."""
    found = []
    for event in dump(net.h.path):
        if port in (None, event["sport"], event["dport"]):
            found.append(
                Tuple5(
                    proto_name(int(event["proto"])),
                    address_text(event["src"]),
                    address_text(event["dst"]),
                    int(event["sport"]),
                    int(event["dport"]),
                    address_text(event["reply_src"]),
                    address_text(event["reply_dst"]),
                    int(event["reply_sport"]),
                    int(event["reply_dport"]),
                    int(event["status"]),
                )
            )
    return found


def seen(net: Net, proto: str = "tcp", port: int = PORT) -> Seen:
    """The service as its entries show it now."""
    samples = tuple(entry for entry in entries(net, port) if entry.proto == proto)
    mine = tuple(entry for entry in samples if entry.dport == port)
    return Seen(
        Culprit(
            key=f"{proto}/{port}",
            proto=proto,
            port=port,
            netns=net.h.inum,
            held=max(1, len(mine)),
            nat="no" if mine and all(not entry.status & 0x30 for entry in mine) else "",
            samples=mine[:40],
        )
    )


# ---- rules -------------------------------------------------------------------


def forget_paths(net: Net) -> None:
    """Path MTUs learned before: each measurement has to learn them again."""
    for node in (net.c, net.h, net.s):
        with node.enter():
            for name in ("ipv4", "ipv6"):
                with open(f"/proc/sys/net/{name}/route/flush", "w") as file:
                    file.write("1")


def reset(net: Net) -> None:
    """No rules, no entries."""
    script = ["nft flush ruleset"]
    for family in ("ip", "ip6"):
        for table in _legacy_tables(net, family):
            tool = f"{family}tables-legacy -t {table}"
            script += [f"{tool} -F", f"{tool} -X"]
            chains = ("INPUT", "FORWARD", "OUTPUT") if table == "filter" else ()
            script += [f"{tool} -P {chain} ACCEPT" for chain in chains]
    script.append("conntrack -F")
    net.h.run(["sh", "-c", "; ".join(script)], check=False)
    net.h.sysctl("net.netfilter.nf_conntrack_tcp_loose", 1)


def _legacy_tables(net: Net, family: str) -> list[str]:
    try:
        with net.h.enter(), open(f"/proc/thread-self/net/{family}_tables_names") as file:
            return file.read().split()
    except FileNotFoundError:
        return []


def install(net: Net, setup: Iterable[tuple[str, str]]) -> None:
    """Load rulesets: (tool, text), tool being nft, a ``*-restore`` command or sh."""
    for tool, text in setup:
        argv = {"nft": ["nft", "-f", "-"], "sh": ["sh", "-e"]}.get(tool, [tool])
        net.h.run(argv, stdin=text)


def put_text(net: Net, script: str) -> None:
    net.h.run(["nft", "-f", "-"], stdin=script)
    net.h.run(["conntrack", "-F"], check=False)


def put(net: Net, lever: Notrack, seconds: int | None = None) -> None:
    """Apply a lever as the tool does: accepts of iptables first, then one nft transaction."""
    plan = alone(lever)
    for tool in ("iptables-nft", "iptables-legacy"):
        for family in ("ip", "ip6"):
            text = notrack_iptables.accepts(plan, tool, family)
            if text:
                net.h.run([*notrack_iptables.restore_argv(tool, family)], stdin=text)
    net.h.run(["nft", "-f", "-"], stdin=notrack_nft.script(plan, seconds))
    net.h.run(["conntrack", "-F"], check=False)


def take_away(net: Net) -> None:
    net.h.run(["nft", "-f", "-"], stdin=notrack_nft.remove_table())
    net.h.run(["conntrack", "-F"], check=False)


def verdict_on(about: Subject, path: str) -> Judgement:
    """The verdict on a service in the namespace at ``path``, as its rules are now."""
    return Judge(read(path), take(path)).judge(about)
