"""A model fed with made events."""

from __future__ import annotations

from typing import Any

from ctrace.batch import Batch, Clock, HookInfo
from ctrace.model.model import Model
from ctrace.model.snapshot import Culprit
from ctrace.record import Events
from kit.shapes import SECOND, START, Trace

OFFSET = 1_700_000_000 * SECOND
PID = 4242 << 32 | 77
DAEMON = 812 << 32 | 5


def model(**options: Any) -> Model:
    return Model(HookInfo("fentry"), Clock(OFFSET), START, **options)


def feed(m: Model, trace: Trace, until: float, step: float = 1.0) -> Model:
    for batch in trace.batches(until, step=step):
        m.update(batch)
    return m


def only(m: Model, group: str = "pair") -> Culprit:
    culprits = m.snapshot(group).culprits
    assert len(culprits) == 1, culprits
    return culprits[0]


def feed_events(m: Model, rows: Events, until: float) -> Model:
    m.update(Batch(rows, START + int(until * SECOND)))
    return m
