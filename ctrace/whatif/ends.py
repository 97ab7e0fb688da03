"""Flows that did not end in a recording: how, and when, they would have.

Entries that ended say little about those that live, because the short-lived end first. So what a
look found in a living entry counts; else looks at others of the same age; else others that ended
after a longer stay; else its end is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from ctrace.record import STATE_UNKNOWN, TCP
from ctrace.whatif.flows import F64, I64, U8, Basis, Bool, Flows, default_timeout

FEW: Final = 5
"""Flows, or looks. Fewer say nothing about others."""
NEAR: Final = 16
"""Looks at entries of about the same age, one of which is drawn."""
CHUNK: Final = 1 << 16
FRESH_S: Final = 5.0
"""Seconds. A state seen this recently is assumed to hold."""
WAITING: Final = (7, 8)
"""TIME_WAIT and CLOSE: nothing but the timeout follows."""


@dataclass(frozen=True)
class Looks:
    """Results of looks at living entries: parallel arrays, oldest first."""

    at: F64
    flow: I64
    """Index of the flow."""
    state: U8
    assured: Bool
    left: F64
    """Seconds until it expires; negative: it is waiting for collection."""
    timeout: F64
    """Seconds, for the state that it was in; 0: unknown."""
    even: Bool
    """Whether it was met by chance, not looked at because it was young."""


@dataclass
class _Fates:
    """What is known of each flow's end; filled in step by step."""

    flows: Flows
    seconds: float
    expire: F64
    timeout: F64
    state: U8
    assured: Bool
    basis: U8
    among: I64

    def open(self) -> Bool:
        """Flows about which nothing is known yet."""
        found: Bool = self.basis == Basis.NOTHING
        return found


def completed(flows: Flows, looks: Looks, seconds: float) -> Flows:
    """The flows, with an end for those whose end was not seen.

    Their ``basis`` is :data:`Basis.NOTHING` where nothing is known, as for flows unlike any that
    ended or was looked at: these keep an unknown end (inf).
    """
    if not (flows.basis == Basis.NOTHING).any():
        return flows
    found = _Fates(
        flows,
        seconds,
        flows.expire.copy(),
        flows.timeout.copy(),
        flows.state.copy(),
        flows.assured.copy(),
        flows.basis.copy(),
        flows.among.copy(),
    )
    held = np.isinf(flows.leave)  # the rest never got in: no age excludes any end
    age = np.where(held, seconds - flows.arrive, 0.0)
    _by_own_look(found, looks)
    _by_looks_at_others(found, looks, age, held)
    for by_port in (True, False):
        _by_ends_of_others(found, age, _groups(flows, by_port))
    # One that is neither looked at nor like another is in a state that nobody knows.
    rest = found.open()
    tcp = rest & (flows.proto == TCP)
    found.state[tcp] = STATE_UNKNOWN
    last = np.minimum(found.state, 9).astype(np.uint8)
    fallback = default_timeout(flows.proto, last, found.assured)
    found.timeout = np.where(np.isnan(found.timeout), fallback, found.timeout)
    found.expire[rest] = np.where(held[rest], np.inf, flows.arrive[rest] + found.timeout[rest])
    return replace(
        flows,
        expire=found.expire,
        timeout=found.timeout,
        state=found.state,
        assured=found.assured,
        basis=found.basis,
        among=found.among,
    )


def _take(found: _Fates, flow: I64, looks: Looks, of: I64, expire: F64, basis: Basis) -> None:
    """Set the ends that looks show for these flows."""
    proto = found.flows.proto[flow]
    found.state[flow], found.assured[flow] = looks.state[of], looks.assured[of]
    by_default = default_timeout(proto, np.minimum(looks.state[of], 9), looks.assured[of])
    found.timeout[flow] = np.where(looks.timeout[of] > 0, looks.timeout[of], by_default)
    found.expire[flow] = expire
    found.basis[flow] = basis


def _waits(proto: U8, looks: Looks) -> Bool:
    waits: Bool = (proto[looks.flow] == TCP) & np.isin(looks.state, WAITING)
    return waits


def _by_own_look(found: _Fates, looks: Looks) -> None:
    """An entry that waits for its timeout, or was looked at just now, ends as the look shows."""
    last = np.full(len(found.flows), -1, np.int64)
    last[looks.flow] = np.arange(len(looks.at))  # later looks overwrite
    flow = np.flatnonzero(found.open() & (last >= 0))
    of = last[flow]
    expire = looks.at[of] + looks.left[of]
    sure = _waits(found.flows.proto, looks)[of]
    sure |= (expire >= found.seconds) & (looks.at[of] >= found.seconds - FRESH_S)
    flow, of, expire = flow[sure], of[sure], expire[sure]
    _take(found, flow, looks, of, expire, Basis.LOOKED)


def _by_looks_at_others(found: _Fates, looks: Looks, age: F64, held: Bool) -> None:
    """An entry is in a state that others of its service were in at its age."""
    flows = found.flows
    waits = _waits(flows.proto, looks)
    aged = looks.at - flows.arrive[looks.flow]
    # How old each was when a look still found it doing something.
    lived = np.zeros(len(flows))
    np.maximum.at(lived, looks.flow[~waits], aged[~waits])
    group = _groups(flows, True) << 1 | flows.existed
    donors = np.flatnonzero(looks.even)
    donors = donors[np.lexsort((aged[donors], group[looks.flow[donors]]))]
    numbers, first = np.unique(group[looks.flow[donors]], return_index=True)
    bounds = np.append(first, len(donors))
    random = np.random.default_rng(1)
    for number, low, high in zip(numbers, bounds[:-1], bounds[1:]):
        some = donors[low:high]
        mine = np.flatnonzero(found.open() & held & (group == number))
        if len(some) < FEW:
            continue
        # When what those wait for began: an entry that did something later is none of them.
        closed = np.where(waits[some], aged[some] + looks.left[some] - looks.timeout[some], np.inf)
        for at in range(0, len(mine), CHUNK):
            part = mine[at : at + CHUNK]
            of = _near(aged[some], closed, age[part], lived[part], random)
            part, chosen = part[of >= 0], some[of[of >= 0]]
            expire = found.seconds + looks.left[chosen]
            _take(found, part, looks, chosen, expire, Basis.LIKE)
            found.among[part] = len(np.unique(looks.flow[some]))


def _near(aged: F64, closed: F64, age: F64, lived: F64, random: np.random.Generator) -> I64:
    """For each age, one of the looks at about that age, drawn at random; -1 where there is none."""
    width = min(NEAR, len(aged))
    start = (np.searchsorted(aged, age) - width // 2).clip(0, len(aged) - width)
    near = start[:, None] + np.arange(width)
    fits = np.abs(aged[near] - age[:, None]) <= np.maximum(1.0, 0.25 * age)[:, None]
    fits &= closed[near] >= lived[:, None]
    drawn = np.argmax(np.where(fits, random.random(fits.shape), -1.0), axis=1)
    row = np.arange(len(age))
    chosen: I64 = np.where(fits[row, drawn], near[row, drawn], -1)
    return chosen


def _by_ends_of_others(found: _Fates, age: F64, group: I64) -> None:
    """An entry ends like another one that had stayed longer."""
    flows = found.flows
    born = ~flows.existed
    ended = np.minimum(flows.expire, flows.end)
    stayed = np.where(np.isnan(flows.leave), flows.expire, flows.leave) - flows.arrive
    random = np.random.default_rng(1)
    todo = found.open()
    for number in np.unique(group[todo]):
        donors = np.flatnonzero(flows.known & (group == number) & born)
        if len(donors) < FEW:
            continue
        mine = np.flatnonzero(todo & (group == number))
        chance = found.seconds - flows.arrive[(group == number) & born]
        of = like(stayed[donors], chance, age[mine], random)
        mine, donor = mine[of >= 0], donors[of[of >= 0]]
        found.state[mine], found.timeout[mine] = flows.state[donor], flows.timeout[donor]
        expire = flows.arrive[mine] + ended[donor] - flows.arrive[donor]
        # It was still there at the end: its timeout can't have passed long before.
        there = np.isinf(flows.leave[mine])
        found.expire[mine] = np.where(there, np.maximum(expire, found.seconds), expire)
        # At its first packet no entry is ASSURED yet: what others became counts.
        found.assured[mine] |= flows.assured[donor]
        found.basis[mine], found.among[mine] = Basis.LIKE, len(donors)


def like(stayed: F64, chance: F64, age: F64, random: np.random.Generator) -> I64:
    """For each age, one of those that stayed longer, drawn at random; -1 where none did.

    One that stayed long was seen to end only if it began early: it weighs the inverse of the
    part of all that were watched for so long (``chance``), as in Kaplan and Meier's estimate.
    """
    order = np.argsort(stayed, kind="stable")
    watched = len(chance) - np.searchsorted(np.sort(chance), stayed[order], "left")
    weight = np.cumsum(len(chance) / np.maximum(watched, 1))
    first = np.searchsorted(stayed[order], age, "right")
    below = np.concatenate([[0.0], weight])[first]
    drawn = below + random.random(len(age)) * (weight[-1] - below)
    at = np.searchsorted(weight, drawn, "right").clip(first, len(order) - 1)
    chosen: I64 = np.where(first < len(order), order[at], -1).astype(np.int64)
    return chosen


def _groups(flows: Flows, by_port: bool) -> I64:
    group = flows.proto.astype(np.int64)
    if by_port:
        _, ns = np.unique(flows.netns, return_inverse=True)
        group = group | flows.dport << 8 | ns.astype(np.int64) << 24
    return group
