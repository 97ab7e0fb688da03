"""A change on trial, looked at once a second: the namespace's counters, its own rules, probes.

Each look reads files of /proc and one small table; nothing is dumped unless something rose.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final

from ctrace.change import health, probe
from ctrace.change.plan import Plan
from ctrace.change.probe import Target
from ctrace.errors import CtraceError
from ctrace.host import ctnetlink, netns
from ctrace.ruleset.installed import EXPIRED, NOTHING, read_own

LISTEN_S: Final = 0.2
"""Shortest time for which new entries are listened to."""
TWICE: Final = 2
"""One probe that gets no answer may have been lost."""


@dataclass
class Watch:
    """What a look compares with; made when the rules are in."""

    plan: Plan
    path: str
    """Of the namespace."""
    before: health.Before
    local: tuple[str, ...]
    probes: tuple[Target, ...] = ()
    last: health.Sample = field(init=False)
    _open: health.Connections = field(init=False)
    _silent: dict[Target, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with netns.enter(self.path):
            self._open = health.Connections()
            self.last = self._sample()[0]

    def look(self, listen_s: float = 0.0) -> health.Verdict:
        """What has become of things since the last look. Raises CtraceError.

        ``listen_s``: how long new entries are listened to, which should not come.
        """
        fresh = 0
        if listen_s:
            made = ctnetlink.new_entries(self.path, max(LISTEN_S, listen_s))
            fresh = len(health.of_services(made, self.plan.levers, self.local))
        with netns.enter(self.path):
            second, state = self._sample()
            verdict = health.compare(self.before, (self.last, second), self.plan.levers, self._open)
            more = [] if verdict.proven else self._ask()
        self.last = second
        if state == NOTHING:
            more.append("the rules are gone: something else removed them")
        elif fresh and state != EXPIRED:
            more.append(f"{fresh} new entries of the services: the rules do not take")
        if not more:
            return verdict
        return health.Verdict((*verdict.worse, *more), False, verdict.seen)

    def _sample(self) -> tuple[health.Sample, str]:
        own = read_own(self.plan.backend, time.time())
        try:
            return health.sample(self.plan.levers, own.rules), own.state
        except OSError as error:
            raise CtraceError(f"the namespace's counters cannot be read: {error}") from None

    def _ask(self) -> list[str]:
        """Try the probes; one sentence for each that has been silent twice."""
        answered = probe.answering(self.probes)
        self._silent = {t: self._silent.get(t, 0) + 1 for t in self.probes if t not in answered}
        return [
            f"a connection of its own to {address} port {port} is not taken any more"
            for (address, port), times in self._silent.items()
            if times >= TWICE
        ]
