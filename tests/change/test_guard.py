"""How often the guard has a change judged again, by made processes and a made clock; what is told
of a change that is off, and undone of it."""

from __future__ import annotations

import errno
import os
import subprocess
from types import SimpleNamespace
from typing import Optional

import pytest

from ctrace.change import apply, condition, guard, keep, notes, undo
from ctrace.change import plan as plans
from ctrace.change.standing import Generation, Standing
from ctrace.errors import CtraceError
from ctrace.host import commands, netns
from ctrace.host.netns import Namespace

TOOK_S = 40


class Made:
    """What the guard starts, in place of subprocess, and the clock that it reads."""

    DEVNULL = -3

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)
        self.now = 1000.0
        self.began: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def Popen(self, *_: object, **__: object) -> SimpleNamespace:
        if self.codes and self.codes[0] < 0:
            self.codes.pop(0)
            raise BlockingIOError("no more processes")
        code = self.codes.pop(0) if self.codes else 0
        ends = self.now + TOOK_S
        self.began.append(self.now)

        def poll() -> Optional[int]:
            return code if self.now >= ends else None

        return SimpleNamespace(poll=poll, kill=int, wait=int, returncode=code)


def watched(monkeypatch: pytest.MonkeyPatch, made: Made, seconds: int, change_s: int) -> None:
    """A guard looks once a second; rules change every ``change_s``."""
    monkeypatch.setattr(guard, "subprocess", made)
    monkeypatch.setattr(guard, "time", made)
    one = guard.Guard(1)
    one._again = made.now + 2 * seconds  # when it may be put back is another matter
    for second in range(seconds):
        made.now += 1
        try:
            one._rejudge((second // change_s, ()))
        except OSError:
            continue


def test_a_judgement_that_failed_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first could not be started, the second failed, the third told."""
    made = Made(-1, 1, 0)
    watched(monkeypatch, made, 5000, 5000)
    assert len(made.began) == 2


def test_rules_that_always_change_cost_a_twentieth(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made()
    watched(monkeypatch, made, 20_000, 10)
    assert len(made.began) > guard.AT_ONCE
    least = guard.AT_ONCE + 1
    assert len(made.began) * TOOK_S <= least * TOOK_S + 20_000 / guard.SHARE


def test_what_is_off_without_a_rule_is_told_so_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """iptables' rules are removed while a change is off, and a reload has dropped its accepts."""
    here = os.stat("/proc/self/ns/net").st_ino
    space = Namespace(here, "here", "/proc/self/ns/net")
    plan = plans.Plan(
        created=0,
        host="host",
        netns=here,
        netns_name="here",
        fingerprint="0" * 64,
        backend="iptables-legacy",
        levers=(plans.Notrack("tcp", 80, ("server",)),),
    )
    monkeypatch.setattr(netns, "find", lambda: [space])
    monkeypatch.setattr(undo, "applied", lambda _only=None: [])
    monkeypatch.setattr(Standing, "look", lambda *_: (False, ()))
    notes.write(
        notes.Note(
            netns=here,
            boot=notes.boot_id(),
            plan=plans.to_json(plan),
            applied=0,
            deadline=0,
            flush=False,
            said="off since 12:00:00",
            off=True,
        )
    )
    assert [(c.state, c.told) for c in condition.conditions()] == [
        (condition.OFF, "off since 12:00:00")
    ]
    undo.undo(here)
    assert notes.read(here) is None, "so nothing puts it back"


def test_a_lease_is_renewed_at_once_after_a_suspend_or_a_set_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = {"boot": 1000.0, "wall": 1e9}
    monkeypatch.setattr(notes, "now", lambda: clock["boot"])
    monkeypatch.setattr(guard, "time", SimpleNamespace(time=lambda: clock["wall"]))
    one = guard.Guard(1)

    def due(boot: float, wall: float) -> bool:
        clock["boot"] += boot
        clock["wall"] += wall
        return one._is_due()

    assert due(0, 0), "the first"
    assert not due(1, 1)
    assert due(1, 3600), "set forward"
    assert not due(1, 1)
    assert due(1, -7200), "set back"
    assert not due(1, 1)
    assert due(3600, 3600), "suspended: no time has passed for CLOCK_MONOTONIC"
    assert not due(keep.RENEW_S - 1, keep.RENEW_S - 1)
    assert due(1, 1)


def test_a_host_that_can_start_nothing_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", full)
    with pytest.raises(CtraceError, match="guard cannot be started: Resource"):
        apply.start_guard(1)
    with pytest.raises(CtraceError, match="sh cannot be started: Resource"):
        commands.output(["sh"])


def test_what_others_change_during_a_renewal_is_not_taken_for_it() -> None:
    """A renewal in nftables is one transaction."""
    cases: list[tuple[Generation, bool]] = [
        ((6, ()), True),
        ((7, ()), False),
        ((6, (("ip raw", 1),)), False),
    ]
    for after, taken in cases:
        one = guard.Guard(1)
        one._generation = (5, ())
        one._seen((5, ()), after, "nft")
        assert (one._generation == after) is taken
