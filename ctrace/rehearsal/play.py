"""Conversations on a stage: each end answers what it saw, so translations are re-enacted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from itertools import zip_longest
from typing import Final, NamedTuple, Optional, Union

from ctrace.record import ICMP, ICMPV6, TCP, UDP
from ctrace.rehearsal.packets import (
    ACK,
    CWR,
    ECE,
    FIN,
    NUMBERS,
    PSH,
    REFUSED,
    RST,
    SYN,
    TOO_BIG,
    URG,
    error,
    tcp,
    udp,
)
from ctrace.rehearsal.stage import Hit, Outcome, Stage


@dataclass(frozen=True)
class Talk:
    """One conversation."""

    role: str
    """Of this host in it: ``server``, ``client``, ``forward``, ``loopback``."""
    proto: int
    client: bytes
    sport: int
    server: bytes
    dport: int
    client_at: int = 0
    """The interface that it comes from; 0: this host."""
    server_at: int = 0
    uid: int = 0
    """User id of the calling process."""
    known: bool = False
    """The host's own table has it: it works."""
    kin: int = 0
    """How many other flows of the table it represents."""
    answering: int = 0
    """User id of the process that serves it here."""

    def __str__(self) -> str:
        name = {TCP: "tcp", UDP: "udp"}[self.proto]
        return f"{name} {_end(self.client, self.sport)} -> {_end(self.server, self.dport)}"


def _end(address: bytes, port: int) -> str:
    text = str(ip_address(address))
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


class Step(NamedTuple):
    """Who sends which packet."""

    who: str
    """``c`` or ``s``; ``C``, ``S``: an error about one of their packets comes back."""
    flags: int = 0
    seq: int = 0
    ack: int = 0
    data: bytes = b""
    name: str = ""


_PATH_MTU: Final = "path MTU error"
REFUSAL: Final = "refusal"
ERRORS: Final = {_PATH_MTU: TOO_BIG, REFUSAL: REFUSED}
"""ICMP errors, by the names of their steps."""
OPENING: Final = {
    TCP: (
        Step("c", SYN, 100, 0, name="SYN"),
        Step("C", name=REFUSAL),
        Step("s", SYN | ACK, 500, 101, name="SYN-ACK"),
        Step("c", ACK, 101, 501, name="ACK"),
    ),
    UDP: (Step("c", name="first datagram"), Step("C", name=REFUSAL)),
}
REST: Final = {
    TCP: (
        Step("c", PSH | ACK, 101, 501, b"question", "data"),
        Step("s", PSH | ACK, 501, 109, b"answer", "answer"),
        Step("S", name=_PATH_MTU),
        Step("C", name=_PATH_MTU),
        Step("s", FIN | ACK, 507, 109, name="FIN"),
        Step("c", FIN | ACK, 109, 508, name="FIN"),
    ),
    UDP: (
        Step("s", name="answer"),
        Step("c", name="later datagram"),
        Step("s", name="later answer"),
        Step("S", name=_PATH_MTU),
        Step("C", name=_PATH_MTU),
    ),
}
FLAGGED: Final = tuple(
    Step(who, flags, seq, 508 if who == "c" else 110, name=name)
    for name, flags, seqs in (
        ("FIN with data", FIN | PSH | ACK, (109, 507)),
        ("urgent segment", URG | PSH | ACK, (110, 508)),
        ("congestion signal", ECE | CWR | ACK, (110, 508)),
        ("reset", RST | ACK, (110, 508)),
        ("reset", RST, (110, 508)),
    )
    for who, seq in zip("cs", seqs)
)
"""Segments of a connection with other flags than most have: sent where rules read flags."""
SPARED: Final = frozenset(step.name for step in FLAGGED)
"""Whoever loses one of these goes on; and one that was refused opens nothing."""
FIRST: Final = {proto: steps[:1] for proto, steps in OPENING.items()}
SERVER_NEXT: Final = {
    TCP: (REST[TCP][1]._replace(ack=101), REST[TCP][0]._replace(ack=507)),
    UDP: REST[UDP][:2],
}
"""The server speaks next: a case that a change in mid-conversation must survive, too."""
View = tuple[int, bytes, int, bytes, int]
"""An end's own: (where, own address, own port, other address, other port)."""


class Run:
    """One conversation on one stage."""

    def __init__(self, talk: Talk) -> None:
        self.talk, self.alive = talk, True
        self.steps: list[Step] = []
        self.outcomes: list[Union[Outcome, str, None]] = []
        """By step: where it ended; None: it did not; a text: why it was not sent."""
        self.ways: list[Sequence[Hit]] = []
        self.first: Optional[Outcome] = None
        self._ends: dict[str, View] = {
            "c": (talk.client_at, talk.client, talk.sport, talk.server, talk.dport)
        }
        self._sent: dict[str, Outcome] = {}

    @property
    def whole(self) -> bool:
        """Whether all that it needs arrived: errors are no part of that, nor are spared steps."""
        return all(
            end is not None or step.who in "CS" or step.name in SPARED
            for step, end in zip_longest(self.steps, self.outcomes)
        )

    @property
    def untranslated(self) -> bool:
        """Whether its first packet arrived where it was sent to, from whom it was sent."""
        talk, end = self.talk, self.first
        return end is not None and (end.src, end.dst) == (talk.client, talk.server)

    def packet(self, step: Step, number: int) -> Optional[tuple[int, int, bytes]]:
        """(interface, user, packet) of a step; None when it cannot be sent."""
        talk = self.talk
        if step.who in "CS":
            about = step.who.lower()
            other = self._ends.get("s" if about == "c" else "c")
            # Nobody else is between, when the other end is this host.
            if other is None or not other[0] or about not in self._sent:
                return None
            quoted = _quoted(self._sent[about])
            return other[0], 0, error(number, other[1], other[3], quoted, ERRORS[step.name])
        end = self._ends.get(step.who)
        if end is None:
            return None
        where, own, port, far, far_port = end
        if talk.proto == TCP:
            made = tcp(number, own, far, (port, far_port), step.flags, step[2:4], step.data)
        else:
            made = udp(number, own, far, (port, far_port))
        return where, talk.uid if step.who == "c" else talk.answering, made

    def got(self, step: Step, outcomes: Sequence[Outcome], way: Sequence[Hit]) -> None:
        """How it ended."""
        six = len(self.talk.client) == 16
        error = step.who in "CS"
        proto = (ICMPV6 if six else ICMP) if error else self.talk.proto
        ends = [o for o in outcomes if o.proto == proto and (o.way, o.device) != ("out", 1)]
        end = ends[-1] if ends else None
        self._note(step, end, way)
        if error:
            return
        if end is None:
            self.alive = step.name in SPARED
            return
        self.first = self.first or end
        if end.way == "out" and end.src == end.dst:
            self.alive = False  # its sender is led to itself, and answers without this host
            return
        other = "s" if step.who == "c" else "c"
        view = (0 if end.way == "in" else end.device, end.dst, end.dport, end.src, end.sport)
        if other not in self._ends:
            self._ends[other] = view
        elif self._ends[other][1:] != view[1:]:
            self.alive = False  # not the packet that this end waits for
        self._sent[step.who] = end

    def _note(self, step: Step, end: Union[Outcome, str, None], way: Sequence[Hit]) -> None:
        self.steps.append(step)
        self.outcomes.append(end)
        self.ways.append(way)

    def skipped(self, step: Step) -> None:
        """It could not be sent."""
        self._note(step, "-", ())


def _quoted(end: Outcome) -> bytes:
    """What a router beyond would quote is the packet as the far end sees it."""
    ports = end.sport, end.dport
    if end.proto == TCP:
        return tcp(1, end.src, end.dst, ports, ACK, (1, 1))
    return udp(1, end.src, end.dst, ports)


Steps = dict[int, tuple[Step, ...]]


def rest(*, flagged: bool) -> Steps:
    """What follows the opening. ``flagged``: with :data:`FLAGGED`."""
    return {TCP: (*REST[TCP], *(FLAGGED if flagged else ())), UDP: REST[UDP]}


def whole(*, flagged: bool) -> Steps:
    """All of a conversation's steps."""
    return {proto: (*OPENING[proto], *steps) for proto, steps in rest(flagged=flagged).items()}


def play(
    stage: Stage, talks: Sequence[Talk], steps: Steps, between: Optional[Callable[[], None]] = None
) -> list[Run]:
    """All conversations, step by step together. ``between``: called after their opening.

    Raises CtraceError.
    """
    runs = [Run(talk) for talk in talks]
    if between is None:
        _steps(stage, runs, steps)
        return runs
    _steps(stage, runs, dict(OPENING))
    between()
    _steps(stage, runs, steps)
    return runs


def _steps(stage: Stage, runs: Sequence[Run], todo: Steps) -> None:
    for proto, steps in todo.items():
        mine = [run for run in runs if run.talk.proto == proto]
        for step in steps:
            waiting = [run for run in mine if run.alive]
            for at in range(0, len(waiting), NUMBERS):
                advance(stage, waiting[at : at + NUMBERS], step)


def advance(stage: Stage, runs: Sequence[Run], step: Step) -> None:
    """One step of conversations that are alive. Raises CtraceError."""
    sent = {}
    for number, run in enumerate(runs, 1):
        made = run.packet(step, number)
        if made is None:
            run.skipped(step)
            continue
        sent[number] = run
        where, uid, packet = made
        if where:
            stage.receive(where, packet)
        else:
            stage.send(packet, uid)
    if sent:
        found = stage.seen()
        for number, run in sent.items():
            run.got(step, found.get(number, ()), stage.ways.get(number, ()))


class Stray(NamedTuple):
    """A packet that belongs to no conversation."""

    where: int
    proto: int
    src: bytes
    sport: int
    dst: bytes
    dport: int
    flags: int

    def __str__(self) -> str:
        return str(Talk("", self.proto, self.src, self.sport, self.dst, self.dport))

    @property
    def opening(self) -> bool:
        """Whether it could begin a conversation."""
        return self.proto == UDP or self.flags == SYN


def throw(stage: Stage, strays: Sequence[Stray]) -> list[tuple[Optional[Outcome], Sequence[Hit]]]:
    """Where each came to an end (None: nowhere), and its way. Raises CtraceError."""
    found: list[tuple[Optional[Outcome], Sequence[Hit]]] = []
    for at in range(0, len(strays), NUMBERS):
        part = strays[at : at + NUMBERS]
        for number, stray in enumerate(part, 1):
            ports = stray.sport, stray.dport
            made = (
                tcp(number, stray.src, stray.dst, ports, stray.flags)
                if stray.proto == TCP
                else udp(number, stray.src, stray.dst, ports)
            )
            stage.receive(stray.where, made)
        seen = stage.seen()
        for number, stray in enumerate(part, 1):
            ends = [o for o in seen.get(number, ()) if o.proto == stray.proto]
            found.append((ends[-1] if ends else None, stage.ways.get(number, ())))
    return found


def by_their_users(stage: Stage, talks: Sequence[Talk], uids: Sequence[int]) -> list[Talk]:
    """The same; flows of the table that only one of these users can have opened are that user's.

    A table does not tell whose a flow is. Raises CtraceError.
    """
    whose: dict[Talk, Talk] = {}
    left = [talk for talk in talks if talk.known and talk.role in ("client", "loopback")]
    for uid in uids:
        runs = play(stage, [replace(talk, uid=uid) for talk in left], FIRST)
        whose.update((old, run.talk) for old, run in zip(left, runs) if run.first is not None)
        left = [talk for talk in left if talk not in whose]
    return [whose.get(talk, talk) for talk in talks]


FIRST_LOW: Final = 600
"""First of the ports below 1024 that numbered conversations get."""
KEPT_FREE: Final = 16
"""Ports at each end of the ephemeral range that no numbered conversation gets. Single packets and
calls from the service's port use them: one with the ports of another's entry would pass for it."""


def renumbered(talks: Sequence[Talk], ephemeral: tuple[int, int]) -> list[Talk]:
    """The same conversations from source ports of their own (0: an ephemeral one, 1: one below
    1024).

    Otherwise one would find another's entry, or its translation taken.
    """
    first = max(ephemeral[0], 1024) + KEPT_FREE
    low, high, last = FIRST_LOW, first, max(ephemeral[1] - KEPT_FREE, first)
    out = []
    for talk in talks:
        if talk.sport == 0:
            high = high + 1 if high < last else first
            out.append(replace(talk, sport=high))
        elif talk.sport == 1:
            low = low + 1 if low < 1023 else FIRST_LOW
            out.append(replace(talk, sport=low))
        else:
            out.append(talk)
    return out
