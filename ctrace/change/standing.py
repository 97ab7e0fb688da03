"""Whether NOTRACK and the accepts that it needs are still in place together.

Accepts stand in other tools' chains, and go when those are reloaded: ufw, firewalld,
iptables-restore, kube-proxy. NOTRACK in a table of ours would stay, and cut its service off.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from typing import Final, Optional

from ctrace.change import steps
from ctrace.plan.plan import Notrack, Plan
from ctrace.ruleset import notrack_iptables, notrack_nft
from ctrace.ruleset.notrack import CHAINS, TABLE, TAG, tag_of
from ctrace.ruleset.tags import Reader

LEGACY_S: Final = 5.0
"""Seconds between two looks at legacy tables, which have no generation number."""
Generation = tuple[int, tuple[tuple[str, int], ...]]
Place = tuple[str, str, str, str]
"""(tool, family, table, chain); the chain is empty for a legacy table."""


def accepts(plan: Plan) -> dict[Place, Counter[str]]:
    """The comments of a plan's accepts, by where they are."""
    found: dict[Place, Counter[str]] = defaultdict(Counter)
    for lever in plan.levers:
        if not isinstance(lever, Notrack):
            continue
        for one in lever.accepts:
            rules = (
                len(notrack_nft.accept_rules(lever, one))
                if one.tool == "nft"
                else len(notrack_iptables.accept_rules(lever, one))
            )
            chain = "" if one.tool == "iptables-legacy" else one.chain
            tag = tag_of(lever, one.role, one.flow)
            found[one.tool, one.family, one.table, chain][tag] += rules
    return dict(found)


def own(plan: Plan) -> dict[Place, Counter[str]]:
    """The comments of its own rules, by where they are: each family's, or each chain's, may be
    flushed apart, and half a pair of rules cuts a service off. Of nftables, each once."""
    found: dict[Place, Counter[str]] = {}
    if plan.backend == "nft":
        chain = ""
        for line in notrack_nft.script(plan, None).splitlines():
            if line == "}":  # the end of our table
                return found
            if line.startswith("\tchain "):
                chain = line.split()[1]
            elif f'comment "{TAG}' in line:
                tag = TAG + line.split(f'comment "{TAG}')[1].split('"')[0]
                found.setdefault(("nft", "inet", TABLE, chain), Counter())[tag] = 1
    for family in steps.families():
        lines = notrack_iptables.restore(plan, family).splitlines()
        for chain in CHAINS:
            hook = next(hook for hook, name in notrack_iptables.HOOKS if name == chain)
            tags = Counter(
                line.split(f'"{TAG}')[1].split('"')[0]
                for line in lines
                if line.startswith(f"-A {chain} ")
            )
            counted = Counter({TAG + tag: n for tag, n in tags.items()})
            if plan.backend == "iptables-legacy":
                place = (plan.backend, family, "raw", "")
                found[place] = found.get(place, Counter()) + counted + Counter([f"{TAG}jump"])
            else:
                found[plan.backend, family, "raw", chain] = counted
                found[plan.backend, family, "raw", hook] = Counter([f"{TAG}jump"])
    return found


class Standing:
    """Checks one plan's rules again and again."""

    def __init__(self, plan: Plan) -> None:
        self._own, self._nft = own(plan), plan.backend == "nft"
        self._untracks = any(isinstance(lever, Notrack) for lever in plan.levers)
        self._accepts = accepts(plan)
        self._legacy = any(place[0] == "iptables-legacy" for place in (*self._own, *self._accepts))
        self._seen: Optional[int] = None
        self._found: tuple[bool, tuple[str, ...]] = (False, ())
        self._old: dict[str, int] = {}
        self._due = 0.0
        self.generation: Optional[Generation] = None
        """As of the last look."""

    @property
    def depends(self) -> bool:
        """Whether its verdict depended on the rules around it."""
        return self._untracks

    @property
    def needs(self) -> bool:
        """Whether it has accepts in chains of others."""
        return bool(self._accepts)

    def now(self, path: str) -> Generation:
        """What is another after every change of rules in the namespace; legacy tables are looked
        at anew. Raises CtraceError."""
        with Reader(path) as reader:
            self._due = 0.0
            return self._generation(reader)

    def _generation(self, reader: Reader) -> Generation:
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + LEGACY_S
            self._old = reader.legacy_digest()
        return reader.generation(), tuple(self._old.items())

    def look(self, path: str) -> tuple[bool, tuple[str, ...]]:
        """(whether its NOTRACK is there, all of it; where accepts are missing).

        Where the rules are those of the last look nothing is read. Raises CtraceError.
        """
        with Reader(path) as reader:
            self.generation = self._generation(reader)
            now = self.generation[0]
            if self._legacy or not now or now != self._seen:
                there = reader.has_table("inet", TABLE) if self._nft else bool(self._own)
                there = there and not _lacking(reader, self._own)
                self._found = there, _lacking(reader, self._accepts)
                self._seen = now
        return self._found


def _lacking(reader: Reader, wanted: dict[Place, Counter[str]]) -> tuple[str, ...]:
    found = []
    for place, tags in wanted.items():
        have = _tags(reader, place, tags)
        if any(have[tag] < n for tag, n in tags.items()):
            found.append(" ".join(place[1:]).strip())
    return tuple(dict.fromkeys(found))


def _tags(reader: Reader, place: Place, tags: Counter[str]) -> Counter[str]:
    tool, family, table, chain = place
    if tool == "iptables-legacy":
        return reader.in_legacy(family, table, tags)
    return reader.in_chain(family, table, chain, tags)
