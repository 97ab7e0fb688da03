"""The wall clock is set while a change is on trial: that neither ends nor prolongs the trial."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from kit.changes import make_plan

from ctrace.change import apply, notes, undo
from ctrace.change.guard import Guard
from ctrace.lab import Lab

pytestmark = pytest.mark.kernel


def wait(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.mark.parametrize("step", [3600, -7200])
@pytest.mark.parametrize("backend", ["nft", "iptables-nft"])
def test_a_trial_ends_when_it_should(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, backend: str, step: int
) -> None:
    """Where rules hold its end as a date, the date is put right; else no date is asked."""
    node = lab.namespace("node", track=True)
    monkeypatch.setattr(apply, "start_guard", lambda _inum: None)
    trial = apply.start(apply.prepare(make_plan(node, backend=backend)), 600)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + step)
    assert 500 < trial.seconds_left <= 600
    guarding = threading.Thread(target=Guard(node.inum).run)
    guarding.start()

    def on() -> bool:
        (found,) = undo.applied(node.inum)
        dates = {rule.until for rule in found.installed.rules if rule.until}
        assert bool(dates) == (backend != "nft")
        ends = time.time() + trial.seconds_left
        return found.installed.state == "trial" and all(
            ends - 5 < date < ends + 10 for date in dates
        )

    wait(on, "it is on")
    note = notes.read(node.inum)
    assert note
    assert guarding.is_alive()
    notes.write(replace(note, deadline=notes.now()))
    guarding.join(60)
    assert not guarding.is_alive()
    assert undo.applied(node.inum) == []
    assert notes.read(node.inum) is None
