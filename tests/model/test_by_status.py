"""What entries with a status hold, of looks at a sample, against all of them counted."""

from __future__ import annotations

import numpy as np
import pytest
from kit.shapes import ASSURED, ESTABLISHED, SEEN_REPLY, START, Trace

from ctrace.batch import Clock, HookInfo
from ctrace.errors import UsageError
from ctrace.live.filtering import View, check, view
from ctrace.model.model import Model
from ctrace.model.snapshot import Snapshot
from ctrace.view.export.json import snapshot_json

STATUS = {"ASSURED": ASSURED, "SEEN_REPLY": SEEN_REPLY, "UNREPLIED": 0}
PARTS = {
    53: ((400, 0), (700, SEEN_REPLY)),
    443: ((900, SEEN_REPLY | ASSURED), (100, SEEN_REPLY)),
    8125: ((3, 0),),
}
"""By port: how many flows have which status."""


def is_so(status: int, words: str) -> bool:
    """As conntrack -L -u chooses."""
    if words == "UNREPLIED":
        return not status & SEEN_REPLY
    return status & STATUS[words] != 0


@pytest.fixture(scope="module")
def model() -> Model:
    trace = Trace(seed=4)
    for port, parts in PARTS.items():
        for n, status in parts:
            trace.flows(np.sort(trace.rng.uniform(0, 3, n)), 600.0, 30.0, proto=17, dport=port,
                        status=status, state=ESTABLISHED)  # fmt: skip
    trace.walks(12)
    found = Model(HookInfo("fentry"), Clock(0), START)
    for batch in trace.batches(12):
        found.update(batch)
    return found


@pytest.mark.parametrize("word", STATUS)
def test_held_is_within_its_error_of_what_there_is(model: Model, word: str) -> None:
    shown: Snapshot = view(model, View("service", "held", f"status={word}", 50))
    rows = {row.port: row for row in shown.culprits}
    total = 0
    for port, parts in PARTS.items():
        there = sum(n for n, status in parts if is_so(status, word))
        total += there
        row = rows.get(port)
        held, error = (row.held, row.held_error) if row else (0, 3)
        assert error is not None
        assert abs(held - there) <= error, (port, held, there, error)
    assert shown.held_total_error is not None
    assert abs(shown.held_total - total) <= shown.held_total_error < 0.2 * 2103
    assert [row.held for row in shown.culprits] == sorted(r.held for r in shown.culprits)[::-1]


def test_what_is_reckoned_is_not_called_exact_and_what_no_look_tells_is_unknown(
    model: Model,
) -> None:
    said = snapshot_json(view(model, View("service", "held", "proto=udp status=ASSURED", 50)))
    assert said["exact"] is False
    assert {row["key"] for row in said["culprits"]} == {"udp/443"}
    assert [row["inserts"] for row in said["culprits"]] == [None]
    counted = snapshot_json(view(model, View("service", "held", "proto=udp", 50)))
    assert (counted["exact"], counted["held_total_error"]) == (True, None)


def test_what_was_not_looked_at_is_in_the_error() -> None:
    trace = Trace(seed=5)
    trace.flows(np.linspace(0, 1, 200), 600.0, 30.0, proto=17, dport=53, status=SEEN_REPLY)
    model = Model(HookInfo("fentry"), Clock(0), START)
    for batch in trace.batches(3):
        model.update(batch)
    shown = view(model, View("service", "held", "status=UNREPLIED", 50))
    assert (shown.culprits, shown.held_total, shown.held_total_error) == ((), 0, 200)


@pytest.mark.parametrize("text", ["status=OFFLOAD", "status=ASSURED status=UNREPLIED", "status="])
def test_what_nobody_can_tell_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        check("service", text)
