"""Whether a change made things worse: the namespace's own counters, before and after."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.change.carry import plain
from ctrace.dropping import Drop
from ctrace.host import sock_diag
from ctrace.plan.plan import Lever, Notrack
from ctrace.record import PROTO_NUMBERS, Events, Status, address_bytes
from ctrace.ruleset.installed import Rule
from ctrace.ruleset.notrack import far_ports

Array = npt.NDArray[Any]

SIGMA: Final = 4.0
"""How many standard deviations of a Poisson count make a change."""

BAD: Final = {
    "Tcp.RetransSegs": "TCP retransmissions",
    "Tcp.EstabResets": "resets of established connections",
    "Tcp.AttemptFails": "failed connection attempts",
    "conntrack.drop": "packets refused by conntrack",
}
"""Counters that must not rise, with what they mean."""
REFUSED: Final = "conntrack.drop"
_UDP_IN: Final = "Udp.InDatagrams"


@dataclass(frozen=True)
class Sample:
    """One reading of a namespace's counters."""

    at: float
    """Monotonic seconds."""
    counters: dict[str, int]
    waiting: int = 0
    """This host's own connections to the services that wait for a first answer."""
    packets: dict[tuple[str, str, int], dict[str, int]] = field(default_factory=dict)
    """(role, protocol, port) to packets untracked so far per flow (``to``, ``from``...)."""
    dropped: dict[str, int] = field(default_factory=dict)
    """``drop-source 192.0.2.1`` to packets dropped so far."""


@dataclass(frozen=True)
class Before:
    """What was normal before the change."""

    rates: dict[str, float]
    """Rise of each counter per second."""
    waiting: int


@dataclass(frozen=True)
class Verdict:
    """What a check found."""

    worse: tuple[str, ...] = ()
    """Empty: nothing got worse."""
    proven: bool = False
    """Whether traffic of the services passed untracked in both directions in the meantime."""
    seen: tuple[str, ...] = ()
    """What was seen, one sentence each."""


def sample(levers: Sequence[Lever], rules: Iterable[Rule] = ()) -> Sample:
    """Read the counters of the namespace that this thread is in. Raises OSError."""
    counters = {**_table("snmp"), **_table("netstat"), REFUSED: _conntrack_drops()}
    # TCP counts both families together, UDP does not
    counters[_UDP_IN] = counters.get(_UDP_IN, 0) + _udp6_in()
    packets: dict[tuple[str, str, int], dict[str, int]] = {}
    dropped: dict[str, int] = {}
    for rule in rules:
        if rule.own and rule.packets is not None and rule.drops:
            dropped[rule.drops] = dropped.get(rule.drops, 0) + rule.packets
        elif rule.own and rule.packets is not None and rule.service[2]:
            flows = packets.setdefault(rule.service, {})
            flows[rule.flow] = flows.get(rule.flow, 0) + rule.packets
    waiting = sock_diag.connecting(_called(levers))
    return Sample(time.monotonic(), counters, waiting, packets, dropped)


def usual(first: Sample, second: Sample, levers: Sequence[Lever]) -> Before:
    """What is normal, from two readings before the change."""
    span = max(second.at - first.at, 1e-3)
    names = [*BAD, *(name for name, _ in _good(levers))]
    rates = {n: (second.counters.get(n, 0) - first.counters.get(n, 0)) / span for n in names}
    return Before(rates, second.waiting)


class Connections:
    """TCP sockets that were open before the change, for what a counter alone can't tell.

    They are listed when this is made, and again only when something rose.
    """

    def __init__(self) -> None:
        self._then = sock_diag.connections()
        self._old = frozenset(self._then)

    def excuse(self, levers: Sequence[Lever]) -> dict[str, int]:
        """By counter, how much of a rise old connections and the levers' services account for.

        A reset connection is gone: each old one that is gone may have been one. What lived
        only between two looks is seen in neither, and excuses nothing.
        """
        ports = {lever.port for lever in levers if lever.proto == "tcp"}
        cut = [one for one in levers if isinstance(one, Drop) and one.sources]
        then, now = self._then, sock_diag.connections()
        self._then = now
        gone = [one for cookie, one in then.items() if cookie in self._old and cookie not in now]
        resent = 0
        for cookie, one in now.items():
            mine = {one.sport, one.dport} & ports or (
                cut and any(drop.comes_from(str(ip_address(plain(one.there)))) for drop in cut)
            )
            if cookie in self._old or mine:
                resent += one.resent - (then[cookie].resent if cookie in then else 0)
        return {
            "Tcp.RetransSegs": resent,
            "Tcp.EstabResets": sum(one.state in sock_diag.OPEN for one in gone),
            "Tcp.AttemptFails": sum(one.state in sock_diag.OPENING for one in gone),
        }


def compare(
    before: Before, after: tuple[Sample, Sample], levers: Sequence[Lever], open_before: Connections
) -> Verdict:
    """Judge a window of about a second after the change by what was normal before.

    Counts are compared as Poisson counts. A change counts when it is more than four standard
    deviations, and a fall to less than a fifth or a rise to more than double: rules that break a
    service stop it, while a load that only ebbs is not our doing.

    Resets and retransmissions of connections older than the change, or of the plan's own services,
    prove nothing by themselves. Nor do they where the table refused packets before and refuses
    fewer now: then they come from clients that gave up meanwhile, and segments that had been
    waiting.
    """
    window = _Window(before, after)
    worse, seen = window.falls(levers)
    rose, explained = window.rises(levers, open_before)
    worse += rose
    seen += explained
    if after[1].waiting > 2 * before.waiting + 4:
        worse.append(
            f"{after[1].waiting} connections of this host wait for an answer "
            f"({before.waiting} before)"
        )
    proven = False
    for service, flows in after[1].packets.items():
        first = after[0].packets.get(service, {})
        moved = {flow: n - first.get(flow, 0) for flow, n in flows.items()}
        name = f"{service[0]} {service[1]}/{service[2]}"
        to, back = moved.get("to", 0), moved.get("from", 0)
        if service[1] == "tcp" and to >= 5 and back == 0:
            worse.append(f"{name}: {to} packets went in untracked, and no answer came back")
        if to and back:
            proven = True
            seen.append(f"{name}: {to} packets to the port and {back} from it passed untracked")
    for name, n in after[1].dropped.items():
        span = after[1].at - after[0].at
        seen.append(f"{name}: {n - after[0].dropped.get(name, 0)} packets dropped in {span:.1f} s")
    return Verdict(tuple(worse), proven, tuple(seen))


class _Window:
    """What the counters did between two moments after the change."""

    def __init__(self, before: Before, after: tuple[Sample, Sample]) -> None:
        self._before, self._after = before, after
        self._span = after[1].at - after[0].at

    def _change(self, name: str) -> tuple[float, int]:
        new = self._after[1].counters.get(name, 0) - self._after[0].counters.get(name, 0)
        return self._before.rates.get(name, 0.0) * self._span, new

    def falls(self, levers: Sequence[Lever]) -> tuple[list[str], list[str]]:
        """(counters that fell and must not, what else was seen)."""
        worse, seen = [], []
        for name, meaning in _good(levers):
            expected, found = self._change(name)
            if found < expected / 5 and expected - found > SIGMA * math.sqrt(expected):
                worse.append(f"{meaning} fell from {expected:.0f} to {found} in {self._span:.1f} s")
            elif expected or found:
                seen.append(f"{meaning}: {found} in {self._span:.1f} s, {expected:.0f} before")
        return worse, seen

    def rises(
        self, levers: Sequence[Lever], open_before: Connections
    ) -> tuple[list[str], list[str]]:
        """(counters that rose and must not, those that rose and are explained)."""
        worse, seen = [], []
        refused, still = self._change(REFUSED)
        excused: Optional[dict[str, int]] = None
        for name, meaning in BAD.items():
            expected, found = self._change(name)
            if found <= 2 * expected + 10 or found - expected <= SIGMA * math.sqrt(expected + 1):
                continue
            rose = f"{meaning} rose from {expected:.0f} to {found} in {self._span:.1f} s"
            if refused > 2 * still:
                seen.append(f"{rose}: connections that the full table had held up")
                continue
            if excused is None:
                excused = open_before.excuse(levers)
            if found - excused.get(name, 0) <= 2 * expected + 10:
                seen.append(f"{rose}: of connections from before, or of the service itself")
            else:
                worse.append(rose)
        return worse, seen


def _called(levers: Sequence[Lever]) -> set[int]:
    """Ports that this host itself calls, as far as the levers cover them."""
    return {
        lever.port
        for lever in levers
        if lever.proto == "tcp" and {"client", "loopback"} & set(lever.roles)
    }


def _good(levers: Sequence[Lever]) -> list[tuple[str, str]]:
    """Counters that must not fall, for what the plan touches; a drop is meant to reduce what comes
    in."""
    names = []
    drops = any(isinstance(lever, Drop) for lever in levers)
    for lever in levers:
        roles = set(lever.roles)
        if lever.proto == "tcp" and roles & {"server", "loopback"} and not drops:
            names.append(("Tcp.PassiveOpens", "accepted connections"))
        if lever.proto == "tcp" and roles & {"client", "loopback"}:
            names.append(("Tcp.ActiveOpens", "connections opened"))
        if lever.proto == "udp" and roles & {"server", "client", "loopback"} and not drops:
            names.append((_UDP_IN, "UDP datagrams received"))
    return list(dict.fromkeys(names))


# ---- the services' entries ---------------------------------------------------


def of_services(made: Events, levers: Sequence[Lever], local: Iterable[str]) -> Events:
    """The entries in ``made`` that the plan's rules should have kept out of the table.

    Both tuple orders: an entry whose *source* port is the service's, and that saw
    no reply, is what half a pair of rules leaves. Only roles that the plan covers.
    """
    here = np.array([address_bytes(text) for text in local], dtype="V16")
    wanted = np.zeros(len(made), bool)
    for lever in levers:
        if isinstance(lever, Notrack) and len(made):
            wanted |= covered(made, lever, here)
    return made[wanted]


def covered(events: Events, lever: Notrack, here: Array) -> Array:
    """Which entries the lever's rules should have kept out of the table.

    ``here``: the local addresses, 16 bytes each.
    """
    proto = events["proto"] == PROTO_NUMBERS[lever.proto]
    src = _local(events["src"], here)
    dst = _local(events["dst"], here)
    to = proto & (events["dport"] == lever.port)
    half = (events["status"] & int(Status.SEEN_REPLY)) == 0
    back = proto & (events["sport"] == lever.port) & half & ~to
    far = np.where(to, events["sport"], events["dport"])
    roles = set(lever.roles)

    def ranged(role: str) -> Array:
        low, high = far_ports(lever, role) or (0, 65535)
        found: Array = (far >= low) & (far <= high)
        return found

    found = np.zeros(len(events), bool)
    if "server" in roles:
        found |= to & dst & ~src | back & src & ~dst
    if "loopback" in roles:
        found |= (to | back) & src & dst
    if "client" in roles:
        peer = np.where(to[:, None], events["dst"], events["src"])
        called = (to & src & ~dst | back & dst & ~src) & ranged("client")
        found |= called & _peer(peer, lever.peers)
    if "forward" in roles:
        peer = np.where(to[:, None], events["dst"], events["src"])
        found |= (to | back) & ~src & ~dst & ranged("forward") & _peer(peer, lever.peers)
    return found


def _local(addresses: Array, here: Array) -> Array:
    raw: Array = np.ascontiguousarray(addresses)
    loopback = (raw[:, :12] == np.frombuffer(bytes(10) + b"\xff\xff", "u1")).all(axis=1) & (
        raw[:, 12] == 127
    )
    found: Array = loopback | np.isin(raw.view("V16").ravel(), here)
    return found


def _peer(addresses: Array, peers: Sequence[str]) -> Array:
    if not peers:
        return np.ones(len(addresses), bool)
    wanted = np.array([address_bytes(str(ip_address(peer))) for peer in peers], dtype="V16")
    return np.isin(np.ascontiguousarray(addresses).view("V16").ravel(), wanted)


# ---- counters ----------------------------------------------------------------


def _table(name: str) -> dict[str, int]:
    """/proc/net/snmp or netstat of this thread's namespace: ``Tcp.PassiveOpens``..."""
    found: dict[str, int] = {}
    with open(f"/proc/thread-self/net/{name}") as file:
        lines = file.read().splitlines()
    for names, values in zip(lines[::2], lines[1::2]):
        prefix = names.split(":", 1)[0]
        pairs = zip(names.split()[1:], values.split()[1:])
        found.update({f"{prefix}.{key}": int(value) for key, value in pairs})
    return found


def _udp6_in() -> int:
    with suppress(OSError), open("/proc/thread-self/net/snmp6") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Udp6InDatagrams"))
    return 0  # a kernel without IPv6


def _conntrack_drops() -> int:
    try:
        with open("/proc/thread-self/net/stat/nf_conntrack") as file:
            head, *rows = file.read().splitlines()
    except OSError:
        return 0
    column: Optional[int] = head.split().index("drop") if "drop" in head.split() else None
    return 0 if column is None else sum(int(row.split()[column], 16) for row in rows)
