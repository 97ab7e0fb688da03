"""The same packets on two stages: which ones fare differently, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Final, Optional, Union

from ctrace.record import TCP, UDP
from ctrace.rehearsal.play import SPARED, Run, Stray, Talk
from ctrace.rehearsal.stage import Outcome

BREAKS, OPENS, MARKS, OWN = "breaks", "opens", "marks", "own"
HARMLESS: Final = "harmless"
PORTS: Final = frozenset({4, 5})
"""Where :func:`_place` has them."""
HearsMark = Callable[[str, int], bool]
"""By way and interface of an outcome."""
Trusted = Callable[[bytes, bytes, tuple[int, int]], bool]
"""Whether a datagram passes for an answer knowingly: by its source, destination and ports."""


@dataclass(frozen=True)
class Difference:
    """One packet that fares differently once the service is untracked."""

    kind: str
    """``breaks``: what arrived is lost, or arrives as another or elsewhere; ``opens``: what was
    refused gets in; ``marks``: it only has another mark, TOS or priority; ``own``: it breaks for a
    call that this host would have to make from the service's port; ``harmless``."""
    what: Union[Talk, Stray]
    step: int
    """Of a conversation."""
    name: str
    """Which packet."""
    before: Optional[Outcome]
    after: Optional[Outcome]

    @property
    def how(self) -> str:
        """``lost``, ``translated``, ``elsewhere``, ``let in``, ``rewritten`` or ``marked``."""
        if self.after is None:
            return "translated" if self._moved else "lost"
        if self.before is None:
            return "let in"
        if _place(self.before) != _place(self.after):
            return (
                "translated" if _place(self.before)[2:] != _place(self.after)[2:] else "elsewhere"
            )
        return "marked" if _header(self.before) == _header(self.after) else "rewritten"

    @property
    def _moved(self) -> bool:
        """Whether a conversation's first packet arrived at another end than it was sent to."""
        what, end = self.what, self.before
        return (
            isinstance(what, Talk)
            and not self.step
            and end is not None
            and (end.dst, end.dport) != (what.server, what.dport)
        )


def runs(
    before: Sequence[Run],
    after: Sequence[Run],
    again: Sequence[Run] = (),
    *,
    hears_mark: HearsMark,
    drawn: bool = False,
    trusted: Optional[Trusted] = None,
) -> list[Difference]:
    """By conversation the gravest difference, of its packets the first.

    ``again``: a second run without the rules. What differs between the two is drawn by lot and
    is not compared; nor are ports where rules have them ``drawn``, for twice may give the same.
    ``hears_mark``: whether anything reads the mark of a packet there.
    """
    found = []
    always = PORTS if drawn else frozenset()
    for one, other, twin in zip_longest(before, after, again or before):
        difference = _run(one, other, twin, hears_mark, always)
        if difference is not None:
            talk = one.talk
            if (
                difference.kind == OPENS
                and talk.proto == UDP
                and trusted
                and trusted(talk.client, talk.server, (talk.sport, talk.dport))
            ):
                difference = replace(difference, kind=HARMLESS)
            found.append(difference)
    return found


def _run(
    one: Run, other: Run, twin: Run, hears_mark: HearsMark, always: frozenset[int]
) -> Optional[Difference]:
    marked = None
    for number, step in enumerate(one.steps):
        x, z = one.outcomes[number], _at(twin, number)
        y = _at(other, number)
        if isinstance(x, str) or isinstance(y, str):
            continue
        lots = always | _lots(x, z)
        if x is None and (step.who in "CS" or step.name in SPARED):
            continue  # it ends nothing, and opens nothing once it is heard
        if x is None and y is None:
            break
        if x is None or y is None:
            kind = BREAKS if y is None else OPENS
            if x is None and number >= len(other.steps):
                break
            return Difference(kind, one.talk, number, step.name, x, y)
        if _differ(_place(x), _place(y), lots) and not _within(one.talk, x, y):
            return Difference(BREAKS, one.talk, number, step.name, x, y)
        if _header(x) != _header(y) and (not isinstance(z, Outcome) or _header(x) == _header(z)):
            return Difference(BREAKS, one.talk, number, step.name, x, y)
        other_mark = x.mark != y.mark and hears_mark(x.way, x.device)
        other_class = x.tos != y.tos or x.priority != y.priority
        if (other_class or other_mark) and marked is None:
            marked = Difference(MARKS, one.talk, number, step.name, x, y)
    return marked


def lost(before: Sequence[Run], after: Sequence[Run], name: str) -> bool:
    """Whether a packet of that name no longer arrives in any of these conversations."""
    return any(
        step.name == name and isinstance(x, Outcome) and y is None
        for one, other in zip_longest(before, after)
        for step, x, y in zip(one.steps, one.outcomes, other.outcomes)
    )


def _within(talk: Talk, x: Outcome, y: Outcome) -> bool:
    """Whether only the source differs, of a packet that this host sends to itself: its answer
    arrives."""
    return talk.role == "loopback" and x[0:2] == y[0:2] and (x.dst, x.dport) == (y.dst, y.dport)


def _at(run: Run, number: int) -> Union[Outcome, str, None]:
    return run.outcomes[number] if number < len(run.outcomes) else None


def _place(outcome: Outcome) -> tuple[object, ...]:
    return (outcome.way, outcome.device, outcome.src, outcome.dst, outcome.sport, outcome.dport)


def _header(outcome: Outcome) -> tuple[object, ...]:
    """What rules may rewrite, and an end or a router heeds."""
    return outcome.ttl, outcome.extra


def _lots(x: Optional[Outcome], z: Union[Outcome, str, None]) -> set[int]:
    if x is None or not isinstance(z, Outcome):
        return set()
    return {i for i, (a, b) in enumerate(zip_longest(_place(x), _place(z))) if a != b}


def _differ(x: tuple[object, ...], y: tuple[object, ...], lots: Set[int]) -> bool:
    return any(a != b for i, (a, b) in enumerate(zip_longest(x, y)) if i not in lots)


def strays(
    packets: Sequence[Stray],
    before: Sequence[Optional[Outcome]],
    after: Sequence[Optional[Outcome]],
    welcome: Iterable[tuple[bytes, bytes, int]],
    trusted: Trusted,
) -> list[Difference]:
    """Packets of strangers. ``welcome``: (source, destination, port) that may connect anyway;
    ``trusted``: whether a datagram is let in knowingly.

    What cannot open a connection is harmless where its sender may open one, or where only an
    answer to it is spared.
    """
    known = set(welcome)
    found = []
    for packet, x, y in zip_longest(packets, before, after):
        if (x is None) == (y is None):
            continue
        kind = HARMLESS
        if packet.opening and y is None:
            kind = BREAKS
        elif packet.proto == UDP and trusted(packet.src, packet.dst, (packet.sport, packet.dport)):
            kind = HARMLESS
        elif packet.opening and (packet.src, packet.dst, packet.dport) not in known:
            kind = OPENS
        found.append(Difference(kind, packet, 0, _name(packet), x, y))
    return found


def _name(packet: Stray) -> str:
    if packet.proto != TCP:
        return "datagram"
    return {2: "SYN", 16: "ACK", 18: "SYN-ACK", 4: "RST", 17: "FIN"}[packet.flags]
