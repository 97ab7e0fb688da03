# ruff: noqa: ARG002
"""A trial from the screen: what is applied is what was asked about, and every outcome is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Optional, cast

import pytest
from kit import samples
from rich.text import Text

from ctrace.change import apply
from ctrace.errors import CtraceError
from ctrace.live.adviser import LiveAdviser
from ctrace.live.feed import LiveFeed
from ctrace.model.snapshot import Snapshot
from ctrace.view.palette import DARK
from ctrace.view.screen.advice import AdvicePane, Remedy


class Adviser:
    """Makes one advice after the other; a word that was typed waits until it may go on."""

    def __init__(self) -> None:
        self.made = 0
        self.done: list[tuple[str, str]] = []
        self.trial = False
        self.fate = ""
        self.fails = ""
        self.advise_now, self.act_now = threading.Event(), threading.Event()
        self.advise_now.set()
        self.act_now.set()

    def advise(self, snapshot: Snapshot, stop: threading.Event) -> str:
        until(lambda: self.advise_now.is_set() or stop.is_set())
        if stop.is_set():
            raise CtraceError("given up")
        self.made += 1
        return f"advice {self.made}"

    def lines(self, advice: str, width: int, folded: bool) -> Sequence[Text]:
        return [Text(advice)]

    def rules(self, advice: str) -> str:
        return ""

    def about(self, advice: str, proto: str, port: int, netns: int) -> Optional[Remedy]:
        return None

    @property
    def on_trial(self) -> bool:
        return self.trial

    @property
    def untracked(self) -> frozenset[tuple[int, str, int]]:
        return frozenset()

    def status(self) -> str:
        return "on trial: reverts by itself" if self.trial else self.fate

    def offer(self, advice: str) -> tuple[str, tuple[str, ...]]:
        return (f"type apply for {advice}", ("apply",)) if not self.trial else ("keep?", ("keep",))

    def act(self, advice: str, word: str, stop: threading.Event) -> str:
        until(lambda: self.act_now.is_set() or stop.is_set())
        if stop.is_set():
            return "given up: nothing was changed"
        if self.fails:
            raise CtraceError(self.fails)
        self.done.append((advice, word))
        self.trial = word == "apply"
        return "in place" if self.trial else "kept"


@pytest.fixture
def adviser() -> Adviser:
    return Adviser()


@pytest.fixture
def pane(adviser: Adviser) -> AdvicePane:
    pane = AdvicePane(adviser)
    pane.ask(samples.incident())
    assert news(pane) == ""
    return pane


def news(pane: AdvicePane) -> str:
    """What the page has to say next."""
    told: list[str] = []

    def came() -> bool:
        said = pane.arrived()
        told.extend([] if said is None else [said])
        return bool(told)

    until(came)
    return told[0]


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def page(pane: AdvicePane) -> str:
    return "\n".join(line.plain for line in pane.lines(100, DARK))


def test_what_is_applied_is_what_was_asked_about(pane: AdvicePane, adviser: Adviser) -> None:
    """Newer advice that comes while the word is typed may name other services."""
    assert pane.offer()[0] == "type apply for advice 1"
    pane.ask(samples.incident())
    assert news(pane) == ""
    assert "advice 2" in page(pane)
    pane.act("apply")
    assert news(pane) == "in place"
    assert adviser.done == [("advice 1", "apply")]


def test_a_word_does_not_wait_for_advice(pane: AdvicePane, adviser: Adviser) -> None:
    """A trial ends by itself, so that keeping it must not be lost to advice in the making."""
    pane.offer()
    pane.act("apply")
    assert news(pane) == "in place"
    adviser.advise_now.clear()
    pane.ask(samples.incident())
    pane.offer()
    pane.act("keep")
    assert news(pane) == "kept"
    adviser.advise_now.set()
    assert news(pane) == ""


def test_what_is_under_way_is_told_and_not_begun_twice(pane: AdvicePane, adviser: Adviser) -> None:
    adviser.act_now.clear()
    pane.offer()
    assert pane.act("apply").startswith("applying: ")
    adviser.trial = True  # in place already, not checked yet
    assert pane.reminder().startswith("applying: ")
    assert "applying: " in page(pane)
    assert "still under way" in pane.act("apply")
    adviser.act_now.set()
    assert news(pane) == "in place"
    assert adviser.done == [("advice 1", "apply")]
    assert pane.reminder().startswith("on trial")


def test_what_is_being_applied_can_be_given_up(pane: AdvicePane, adviser: Adviser) -> None:
    assert not pane.give_up_applying()
    adviser.act_now.clear()
    pane.offer()
    pane.act("apply")
    assert "Esc ends it" in page(pane)
    assert "Esc" not in pane.reminder()
    assert pane.give_up_applying()
    assert news(pane) == "given up: nothing was changed"
    pane.offer()
    pane.act("keep")
    assert "Esc ends it" not in page(pane)
    assert not pane.give_up_applying()  # what is on trial is kept, or not: nothing between
    adviser.act_now.set()
    assert news(pane) == "kept"
    assert adviser.done == [("advice 1", "keep")]


@pytest.mark.parametrize("at", ["prepare", "start", "never"])
def test_given_up_while_it_is_applied_nothing_stays(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    stop = threading.Event()

    def step(name: str) -> Callable[..., object]:
        def carry_out(*_: object) -> object:
            done.append(name)
            if name == at:
                stop.set()
            return SimpleNamespace(seconds_left=60.0, prepared=None)

        return carry_out

    for name in ("prepare", "start", "revert"):
        monkeypatch.setattr(apply, name, step(name))
    monkeypatch.setattr(apply, "fate", lambda _: "")
    adviser = LiveAdviser(cast(LiveFeed, None))
    said = adviser.act(SimpleNamespace(plan=lambda: None), "apply", stop)
    assert adviser.on_trial is (at == "never")
    assert (done, said.partition(":")[0]) == {
        "prepare": (["prepare"], "given up"),
        "start": (["prepare", "start", "revert"], "taken back"),
        "never": (["prepare", "start"], "in place, on trial for 120 s"),
    }[at]
    assert adviser.close() == ("taken back: the rules are as they were" if at == "never" else "")


def test_a_failure_is_told_and_not_the_success_before_it(
    pane: AdvicePane, adviser: Adviser
) -> None:
    pane.offer()
    pane.act("apply")
    assert news(pane) == "in place"
    adviser.fails = "the trial is over and its rules are off"
    pane.act("keep")
    assert news(pane) == adviser.fails
    assert adviser.fails in page(pane)


def test_what_took_a_trial_back_is_told_on_every_page(pane: AdvicePane, adviser: Adviser) -> None:
    pane.offer()
    pane.act("apply")
    assert news(pane) == "in place"
    assert pane.arrived() is None
    adviser.trial, adviser.fate = False, "taken back: connections to tcp/8063 fail"
    assert news(pane) == adviser.fate
    assert pane.arrived() is None
    assert pane.reminder() == ""


def test_advice_that_is_not_wanted_any_more_is_given_up(pane: AdvicePane, adviser: Adviser) -> None:
    assert not pane.give_up()
    adviser.advise_now.clear()
    pane.ask(samples.incident())
    assert pane.give_up()
    assert news(pane) == ""
    assert "advice 1" in page(pane)
    assert "given up" in page(pane)
    adviser.advise_now.set()
    pane.ask(samples.incident())
    assert "given up" not in page(pane)
    assert news(pane) == ""
    assert "advice 2" in page(pane)
