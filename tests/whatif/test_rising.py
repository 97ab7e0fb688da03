"""A recording in which entries come and stay: the table is said to go on rising, and until when."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ctrace.batch import Batch, TableReading
from ctrace.record import Events, Kind, Reason, Status, empty, join
from ctrace.view.report.whatif_text import whatif_text
from ctrace.whatif.gather import gather
from ctrace.whatif.run import of_recording
from ctrace.whatif.settings import Levers, parse_levers

NETNS, SECOND, LIMIT = 4026532000, 10**9, 10_000


def leak(rate: int, seconds: int, timeout: int, *, looks: int = 20, close: int = 0) -> list[Batch]:
    """``rate`` connections a second that stay; from 2 s of age on ``close`` of them end again."""
    random = np.random.default_rng(1)
    batches, made = [], 0
    alive: list[int] = []
    for second in range(seconds):
        rows = [_row(second, Kind.INSERT, number, 1, 0) for number in range(made, made + rate)]
        old = alive[:close] if second > 1 else []
        rows += [_row(second, Kind.DESTROY, number, 3, timeout) for number in old]
        alive = [number for number in alive if number not in old] + [*range(made, made + rate)]
        made += rate
        for number in random.choice(alive, min(looks, len(alive)), replace=False):
            rows.append(_row(second, Kind.MET, int(number), 3, timeout))
        until = (second + 2) * SECOND
        reading = TableReading(NETNS, len(alive), LIMIT, LIMIT, at=until)
        batches.append(Batch(join(rows), until=until, tables=(reading,)))
    return batches


def _row(second: int, kind: Kind, number: int, state: int, timeout: int) -> Events:
    row = empty(1)
    row["ts"] = (second + 1) * SECOND + number % 1000 * 1000 + int(kind)
    row["kind"], row["reason"], row["proto"], row["state"] = kind, Reason.NEW, 6, state
    row["src"][:, 12:] = np.frombuffer(np.uint32(number // 60000 + 1).tobytes(), "u1")
    row["sport"], row["dport"], row["netns"] = number % 60000, 8063, NETNS
    if kind != Kind.INSERT:
        row["timeout_ms"], row["overdue_ms"] = timeout * 1000, -timeout * 1000
        row["status"] = int(Status.ASSURED)
    if kind == Kind.DESTROY:
        row["reason"] = Reason.DELETED
    return row


@pytest.mark.parametrize("rate", [5, 40])
def test_connections_that_stay(rate: int) -> None:
    answer = of_recording(gather(leak(rate, 60, 432_000)), Levers())
    (place,) = answer.places
    assert place.rising is not None
    low, high = place.rising.per_s
    assert low <= rate <= high
    assert place.rising.full_s is not None
    soon, late = place.rising.full_s
    assert soon <= (LIMIT - 60 * rate) / rate <= late
    assert "still rising" in whatif_text(answer)


@pytest.mark.parametrize("lever", ["--notrack", "--timeout"])
def test_a_lever_against_them_ends_it(lever: str) -> None:
    levers = (
        parse_levers(["tcp/8063"])
        if lever == "--notrack"
        else parse_levers([], ["tcp_established=30"])
    )
    (place,) = of_recording(gather(leak(40, 60, 432_000)), levers).places
    assert place.rising is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("looks", "timeout", "close"), [(0, 432_000, 0), (20, 60, 0), (20, 432_000, 40)]
)
def test_what_is_not_known_to_stay_is_not_said_to_rise(
    looks: int, timeout: int, close: int
) -> None:
    """Nothing tells its timeout; it expires in a minute; as many end as come."""
    batches = leak(40, 60, timeout, looks=looks, close=close)
    (place,) = of_recording(gather(batches), Levers()).places
    assert place.rising is None


def test_gone_namespaces_do_not_rise() -> None:
    batches = [replace(batch, tables=()) for batch in leak(1, 5, 432_000)]
    (place,) = of_recording(gather(batches), Levers()).places
    assert place.rising is None
