"""Advice for a screen, made from the feed's model. On a live host it can be tried and kept.

A change made from the screen is the same trial as that of ``ctrace apply``: the kernel takes it
back by itself unless it is kept, its guard watches it every second meanwhile, and leaving the
screen before it was kept takes it back at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Optional, Protocol

from ctrace.errors import CtraceError
from ctrace.live import apart
from ctrace.model.snapshot import Snapshot

if TYPE_CHECKING:
    from rich.text import Text

    from ctrace.advice.facts import Facts
    from ctrace.advice.result import Advice
    from ctrace.change.apply import Trial
    from ctrace.live.feed import LiveFeed
    from ctrace.view.screen.advice import Remedy

TRIAL_S: Final = 120
"""Seconds until a trial that is not kept reverts by itself."""
SERVICES, PAIRS = 100, 500
"""Culprits that advice is made from."""


class Moments(Protocol):
    """A feed that can group its moment otherwise, live or replayed."""

    def at(self, group: str, limit: int) -> Snapshot:
        """This moment by another grouping."""


class FeedAdviser:
    """Answers for the advice page; see :class:`ctrace.view.screen.advice.Adviser`.

    By itself it only advises, as over a recording: there is nothing to apply.
    """

    def __init__(self, feed: Moments, facts_of: Callable[[int], Optional[Facts]]) -> None:
        """``facts_of`` a namespace: its rules and settings; None where they are not known."""
        self._feed = feed
        self._facts_of = facts_of

    def advise(self, snapshot: Snapshot, stop: Optional[threading.Event] = None) -> Advice:
        """Advice on everything held now, with each namespace's ruleset, until ``stop`` is set."""
        services = self._feed.at("service", SERVICES)
        pairs = self._feed.at("pair", PAIRS)
        tables = [table.netns for table in snapshot.tables if table.count]
        return apart.advise(services, pairs, tables, self._facts_of, stop or threading.Event())

    def lines(self, advice: Any, width: int, folded: bool) -> Sequence[Text]:
        """The advice in words; ``folded`` without its rules and commands."""
        from ctrace.view.report.advice import advice_lines

        return advice_lines(advice, width, folded=folded)

    def rules(self, advice: Any) -> str:
        """The rules to copy."""
        from ctrace.view.report.advice import rules_text

        return rules_text(advice)

    def about(self, advice: Any, proto: str, port: int, netns: int) -> Optional[Remedy]:
        """The advice about one service; None when it was not judged."""
        from ctrace.view.report.advice import remedy

        return remedy(advice, proto, port, netns)

    @property
    def on_trial(self) -> bool:
        """Never: nothing is applied."""
        return False

    @property
    def untracked(self) -> frozenset[tuple[int, str, int]]:
        """None: nothing is applied."""
        return frozenset()

    def status(self) -> str:
        """Nothing is ever applied."""
        return ""

    def offer(self, advice: Any) -> tuple[str, tuple[str, ...]]:  # noqa: ARG002
        """Raises CtraceError: a recording is in the past, so nothing can be applied."""
        raise CtraceError(
            "nothing can be applied over a recording; ctrace advise FILE --plan makes a plan"
        )

    def act(self, advice: Any, word: str, stop: Optional[threading.Event] = None) -> str:  # noqa: ARG002
        """Raises CtraceError."""
        raise CtraceError("nothing can be applied over a recording")


class LiveAdviser(FeedAdviser):
    """Advice on a running host, which can be tried out."""

    def __init__(self, feed: LiveFeed) -> None:
        super().__init__(feed, _live_facts)
        self._trial: Optional[Trial] = None
        self._told = ""
        self._in_place: Optional[Trial] = None
        self._lock = threading.Lock()
        self._over = threading.Event()

    def status(self) -> str:
        """What is on trial now; empty when nothing is."""
        trial = self._trial
        if trial is None:
            return self._told
        left = f"{trial.seconds_left:.0f} s"
        return f"on trial: reverts by itself in {left}; p keeps it or takes it back"

    @property
    def on_trial(self) -> bool:
        """Whether a change is in place and not kept yet."""
        return self._trial is not None

    @property
    def untracked(self) -> frozenset[tuple[int, str, int]]:
        """(namespace, protocol, port) of what is on trial, or was kept here."""
        if self._in_place is None:
            return frozenset()
        plan = self._in_place.prepared.plan
        levers = [one for one in plan.levers if one.kind == "notrack"]
        return frozenset((plan.netns, one.proto, one.port) for one in levers)

    def offer(self, advice: Any) -> tuple[str, tuple[str, ...]]:
        """The question and the words that answer it. Raises CtraceError when there is none."""
        from ctrace.change.steps import named

        if self._trial is not None:
            return "type keep to keep the change, undo to take it back", ("keep", "undo")
        plan = advice.plan()
        where = plan.netns_name or str(plan.netns)
        services = ", ".join(named(lever) for lever in plan.levers)
        question = f"type apply to change the rules of {where} for {services}, on trial"
        return question, ("apply",)

    def act(self, advice: Any, word: str, stop: Optional[threading.Event] = None) -> str:
        """Carry out what was typed, and say what was done. Raises CtraceError; may take seconds.

        What is being applied is not put in place once ``stop`` is set, or is taken back at once.
        """
        from ctrace.advice.again import judge_plan
        from ctrace.change import apply, keep

        with self._lock:
            if word == "apply":
                unwanted = stop or threading.Event()
                prepared = apply.prepare(advice.plan(), judge_plan)
                if unwanted.is_set():
                    return "given up: nothing was changed"
                self._begin(apply.start(prepared, TRIAL_S))
                if not unwanted.is_set():
                    return f"in place, on trial for {TRIAL_S} s: p keeps it or takes it back"
            trial_now = self._trial
            if trial_now is None:
                return "nothing is on trial any more"
            if word == "keep":
                plan, _ = apply.confirm(trial_now.prepared.plan.netns)
                told = f"kept. {keep.stays(plan)}"
            elif apply.revert(trial_now):
                told = "taken back: the rules are as they were"
            else:
                told = apply.fate(trial_now)
            self._trial, self._told = None, told  # where that failed it is on trial still
            if word != "keep":
                self._in_place = None
            self._over.set()
            return told

    def _begin(self, trial: Trial) -> None:
        self._trial, self._told, self._in_place = trial, "", trial
        self._over.clear()
        threading.Thread(target=self._watch, args=(trial,), daemon=True).start()

    def _watch(self, trial: Trial) -> None:
        """Tell when its guard took the trial back, or its time was over."""
        from ctrace.change import apply

        while trial is self._trial and not self._over.wait(1.0):
            told = apply.fate(trial)
            if trial.seconds_left <= 0:
                told = "the trial is over and reverted by itself"
            with self._lock:
                if told and trial is self._trial:
                    self._trial, self._told, self._in_place = None, told, None

    def close(self) -> str:
        """Revert a change that was not kept. Returns the outcome; empty if there was none."""
        with self._lock:  # a change that is being made is made first
            trial = self._trial
        return self.act(None, "undo") if trial is not None else ""


def recorded_facts(rules: Mapping[int, str]) -> Callable[[int], Optional[Facts]]:
    """What a recording knows about each namespace, from its :meth:`rulesets`."""
    return partial(_recorded, dict(rules))


def _recorded(rules: Mapping[int, str], netns: int) -> Optional[Facts]:
    from ctrace.advice.facts import from_text

    try:
        return from_text(rules[netns]) if netns in rules else None
    except CtraceError:  # as a later version wrote it
        return None


def _live_facts(netns: int) -> Optional[Facts]:
    from ctrace.advice.again import facts_of

    return facts_of(netns)
