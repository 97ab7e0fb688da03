"""A packet's path through legacy iptables, from the counters of its rules before and after.

nf_tables' trace does not see legacy tables, and their own TRACE needs modules that write to
the log. In a stage no other packet moves a counter.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Optional

from ctrace.rehearsal.play import OPENING, Run, Steps, Talk, advance
from ctrace.rehearsal.stage import Hit, Stage
from ctrace.rehearsal.ways.place import HOOKS, Map, Place
from ctrace.ruleset.model import Ruleset
from ctrace.ruleset.notrack import TAG

_LINE: Final = re.compile(r"\[(\d+):\d+\] -A (\S+) (.*)")
_POLICY: Final = re.compile(r":(\S+) (\S+) \[(\d+):\d+\]")
_TARGET: Final = re.compile(r"(?:^| )-([jg]) (\S+)")
_VERDICTS: Final = {"ACCEPT": 1, "DROP": 0, "REJECT": 0, "RETURN": -5}


@dataclass
class _Chain:
    policy: str
    passed: int
    rules: list[tuple[int, str]] = field(default_factory=list)
    """(packets, text)."""


Tables = dict[Place, _Chain]


class _Saved:
    """The output of iptables-legacy-save -c again and again, of which little changes."""

    def __init__(self, stage: Stage, family: str) -> None:
        self._stage, self._family = stage, family
        self._lines: list[str] = []
        self._at: list[Optional[tuple[Place, int]]] = []
        """By line: the chain, and the rule's number there, -1 for its policy."""
        self._tables: Tables = {}

    def read(self) -> Tables:
        """The tables as they are now. Raises CtraceError."""
        lines = self._stage.space.run([f"{self._family}tables-legacy-save", "-c"]).splitlines()
        if len(lines) != len(self._lines):
            self._parse(lines)
        found = dict(self._tables)
        for number, line in enumerate(lines):
            at = self._at[number]
            if at is None or line == self._lines[number]:
                continue
            place, rule = at
            if found[place] is self._tables[place]:
                chain = found[place]
                found[place] = _Chain(chain.policy, chain.passed, list(chain.rules))
            if rule < 0:
                found[place].passed = _packets(_POLICY, line, 3)
            else:
                found[place].rules[rule] = _packets(_LINE, line, 1), found[place].rules[rule][1]
        self._lines, self._tables = lines, found
        return found

    def _parse(self, lines: list[str]) -> None:
        self._lines, self._at, self._tables = lines, [], {}
        table = ""
        for line in lines:
            at = None
            if line.startswith("*"):
                table = line[1:].strip()
            elif (policy := _POLICY.match(line)) is not None:
                at = (self._family, table, policy[1]), -1
                self._tables[at[0]] = _Chain(policy[2], int(policy[3]))
            elif (rule := _LINE.match(line)) is not None:
                place = self._family, table, rule[2]
                at = place, len(self._tables[place].rules)
                self._tables[place].rules.append((int(rule[1]), rule[3]))
            self._at.append(at)


def _packets(form: re.Pattern[str], line: str, group: int) -> int:
    found = form.match(line)
    return int(found[group]) if found else 0


def ways(
    stage: Stage, talk: Talk, todo: Steps, between: Optional[Callable[[], None]] = None
) -> tuple[Run, list[list[Hit]], Tables]:
    """A conversation on a stage, with the way of each step; and the tables. ``todo``: all
    steps; ``between``: called after its opening. Raises CtraceError."""
    family = "ip6" if len(talk.client) == 16 else "ip"
    run, found = Run(talk), []
    saved = _Saved(stage, family)
    tables = saved.read()
    for number, step in enumerate(todo[talk.proto]):
        if not run.alive:
            break
        if between is not None and number == len(OPENING[talk.proto]):
            between()
            saved = _Saved(stage, family)
            tables = saved.read()
        advance(stage, [run], step)
        now = saved.read()
        found.append([hit for place in now if _hook(place) for hit in _way(place, tables, now)])
        tables = now
    return run, found, tables


def _hook(place: Place) -> str:
    return place[2].lower() if place[2].lower() in HOOKS else ""


def _way(place: Place, before: Tables, after: Tables) -> list[Hit]:
    """The path through one chain and those that it jumps to; empty when no packet came there."""
    chain, old = after[place], before[place]
    family = 10 if place[0] == "ip6" else 2
    hits: list[Hit] = []
    for number, (packets, text) in enumerate(chain.rules, 1):
        if packets == old.rules[number - 1][0]:
            continue
        target = _TARGET.search(text)
        name = target[2] if target else ""
        user = (*place[:2], name) in after
        verdict = (-4 if target and target[1] == "g" else -3) if user else _VERDICTS.get(name, -1)
        hits.append(Hit(family, *place[1:], number, verdict, 3, name if user else ""))
        if user:
            inner = _way((*place[:2], name), before, after)
            hits += inner
            verdict = inner[-1].verdict if inner and inner[-1].verdict in (0, 1) else -1
        if verdict in (0, 1, -5):
            break
    if _hook(place) and chain.passed != old.passed:
        hits.append(Hit(family, *place[1:], 0, _VERDICTS.get(chain.policy, 1), 1))
    return hits


def known(tables: Tables, ruleset: Optional[Ruleset]) -> Map:
    """Where the rules of legacy tables stand."""
    at: dict[tuple[Place, int], int] = {}
    for place, chain in tables.items():
        position = 0
        for number, (_, text) in enumerate(chain.rules, 1):
            ours = TAG in text
            at[place, number] = -1 if ours else position
            position += not ours
    base = {place: hook for place in tables if (hook := _hook(place))}
    model = {
        (chain.family, chain.table, chain.name): chain
        for chain in (ruleset.chains if ruleset else ())
        if chain.tool == "iptables-legacy"
    }
    return Map(at, base, model, "iptables-legacy")
