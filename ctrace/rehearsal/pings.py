"""Pings of everybody through a copy of the rules, tracked and untracked: echo and its answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple, Optional

from ctrace.rehearsal import talks
from ctrace.rehearsal.constants import evenly
from ctrace.rehearsal.packets import NUMBERS, echo
from ctrace.rehearsal.room import Ours, Room, Setting
from ctrace.rehearsal.snapshot import Snapshot
from ctrace.rehearsal.stage import Outcome, Stage, on_one_processor
from ctrace.rehearsal.talks import Cast
from ctrace.ruleset.notrack import TABLE

MOST: Final = 4000
"""Pings that are tried; where there are more, an even part of them."""


class Ping(NamedTuple):
    """Who asks whom; from which interface, 0 for this host."""

    device: int
    src: bytes
    dst: bytes


Fate = tuple[Optional[Outcome], Optional[Outcome]]
"""Where the question ended, and where its answer."""


def fare_the_same(snapshot: Snapshot, rules: str, seen: Iterable[bytes]) -> bool:
    """Whether all do with ``rules``, a script for nft whose only table is ``inet ctrace``.

    ``seen``: addresses of the table. False where anything could not be copied. Raises CtraceError.
    """
    room = Room(snapshot, None)
    if room.gaps:
        return False
    nft = ("nft", "-f", "-"), rules
    off = ("nft", "-f", "-"), f"delete table inet {TABLE}\n"
    mine = Ours((nft,), (), (nft,), (off,), (), "nft")
    with on_one_processor():
        with room.stage(Setting()) as stage:
            every = list(_pings(snapshot, talks.cast(room.snapshot, stage, room.names, seen, 0)))
        some = evenly(every, MOST)
        for setting in room.settings():
            with room.stage(setting) as stage:
                before = _sent(stage, some)
            with room.stage(setting, mine) as stage:
                if _sent(stage, some) != before:
                    return False
    return bool(some)


def _pings(snapshot: Snapshot, who: Cast) -> Iterator[Ping]:
    for other in who.far.values():
        for address, index in who.local:
            if talks.fits(address, index, other):
                yield Ping(other.device, other.address, address)
                yield Ping(0, address, other.address)
    for address, _ in who.local:
        yield Ping(0, address, address)
    if snapshot.forwards:
        for a, b in talks.pairs_of(list(who.far.values()), set(who.near)):
            yield Ping(a.device, a.address, b.address)


def _sent(stage: Stage, pings: Sequence[Ping]) -> list[Fate]:
    asked = _carried(stage, pings, answer=False)
    answers: list[Optional[Ping]] = [
        None if end is None else Ping(0 if end.way == "in" else end.device, end.dst, end.src)
        for end in asked
    ]
    told = iter(_carried(stage, [one for one in answers if one], answer=True))
    return [(end, next(told) if one else None) for end, one in zip(asked, answers)]


def _carried(stage: Stage, pings: Sequence[Ping], *, answer: bool) -> list[Optional[Outcome]]:
    found: list[Optional[Outcome]] = []
    for at in range(0, len(pings), NUMBERS):
        part = pings[at : at + NUMBERS]
        for number, one in enumerate(part, 1):
            packet = echo(number, one.src, one.dst, answer=answer)
            if one.device:
                stage.receive(one.device, packet)
            else:
                stage.send(packet)
        seen = stage.seen()
        for number in range(1, len(part) + 1):
            ends = [o for o in seen.get(number, ()) if (o.way, o.device) != ("out", 1)]
            found.append(ends[-1] if ends else None)
    return found
