"""What a window holds beyond its packed counters, extracted once for all tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from ctrace.model import histogram
from ctrace.model.keys.columns import I64, U64, Window
from ctrace.model.keys.pairing import EXISTING, UNKNOWN
from ctrace.model.keys.rich import registers_of
from ctrace.model.keys.scatter import Rows
from ctrace.model.keys.timeouts import Timeouts
from ctrace.record import Kind, Reason

_DIRECTION_SAMPLE: Final = 1024
SAMPLED: Final = 8
ENDS_MEASURED: Final = 16_384
"""Lifetimes measured in a window (of 131,072 events); ``n`` of percentiles counts these."""


@dataclass
class Details:
    """What a window holds beyond its packed counters; all arrays are indices of events."""

    adds: list[tuple[str, Rows, int]]
    """Counters to change by so much, once for each event at these indices."""
    nat: Rows
    owned: Rows
    owner: U64
    """Aligned with ``owned``."""
    born: Rows
    ends: Rows
    """Ends with a lifetime to measure: all that were looked up in the births, or an even sample."""
    state: Rows
    """Aligned with ``ends``."""
    residence: Rows
    """Which of ``ends`` have a known residence; ``residence_bin`` is aligned with it."""
    residence_bin: I64
    life: Rows
    life_bin: I64
    register: I64
    rest: U64
    """Aligned with ``born``: HyperLogLog's register and remaining bits of the source."""
    directions: list[tuple[int, Rows]]
    """Each direction that some of the inserts had, with these; keys seldom have two."""
    latest: U64
    """The last few of ``ends``, as words of their records."""


def details(
    w: Window,
    ends: Rows,
    age: I64,
    extra: npt.NDArray[np.uint16],
    owned: Rows,
    part: int,
    timeouts: Timeouts,
) -> Details:
    """Extract once what all tables need, using the ages of ``ends`` and each event's ``extra`` from
    pairing.

    ``ends`` are one in ``part`` of all.
    """
    adds = _changes(w, ends.take(np.flatnonzero(age == UNKNOWN)), extra, part)
    step = max(1, -(-len(ends) // ENDS_MEASURED))
    ends, age = ends[::step], age[::step]
    residence = np.flatnonzero(age >= 0)
    milliseconds = age.take(residence).astype(np.float32)
    milliseconds *= np.float32(1e-6)
    idle = w.idle_ms(ends.take(residence))
    doubtful = timeouts.doubtful(w, ends.take(residence), age.take(residence))
    told = np.flatnonzero((idle >= 0) & ~doubtful)
    life = milliseconds.take(told) - idle.take(told).astype(np.float32)
    np.maximum(life, np.float32(0), out=life)
    born = w.where(Kind.INSERT)
    register, rest = registers_of(w.sources(born))
    looked = born[:: max(1, born.size // _DIRECTION_SAMPLE)]
    direction = w.directions(looked)
    return Details(
        adds=adds,
        nat=w.nat(),
        owned=owned,
        owner=w.owner(owned),
        born=born,
        ends=ends,
        state=np.minimum(w.states(ends), np.uint8(15)).astype(np.intp),
        residence=residence,
        residence_bin=histogram.bins(milliseconds),
        life=residence.take(told),
        life_bin=histogram.bins(life),
        register=register,
        rest=rest,
        directions=[(one, looked[direction == one]) for one in np.unique(direction).tolist()],
        latest=w.words[ends[-SAMPLED:]],
    )


def _changes(
    w: Window, unpaired: Rows, extra: npt.NDArray[np.uint16], part: int
) -> list[tuple[str, Rows, int]]:
    """Counters to change; ``unpaired`` are the ends whose births nobody saw."""
    adds = [
        (name, at, 1)
        for name, at in (
            ("drops", w.where(Kind.DROP)),
            ("failed", w.where(Kind.INSERT_FAILED)),
            ("deleted", w.because(Reason.DELETED)),
            ("evicted", w.because(Reason.EVICTED, Reason.GC_PRESSURE)),
        )
        if at.size
    ]
    existing = w.where(Kind.EXISTING)
    if existing.size:
        adds += [("existing", existing, 1), ("older", existing, 1)]
    found = w.where(Kind.FOUND)
    if found.size:
        adds.append(("found", found, 1))
    if unpaired.size:
        adds.append(("older", unpaired, -1))
        if part > 1:  # those of the first dump are all known, others stand for what is left out
            adds.append(("older", unpaired[extra.take(unpaired) & EXISTING == 0], 1 - part))
    return adds
