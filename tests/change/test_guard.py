"""How often the guard has a change judged again, by made processes and a made clock."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Optional

import pytest

from ctrace.change import guard

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
