"""Which parts of a rule set a copy has to load otherwise, and what packets leave behind in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

from ctrace.host.rawlink import first, number, split, word
from ctrace.rehearsal.conditions import recent
from ctrace.rehearsal.conditions.forced import KEEPING, MEASURES, change, is_lot, odd
from ctrace.rehearsal.conditions.quiet import Chain, Does, Quiet, decides, does, unheard
from ctrace.rehearsal.nft_copy import Expression
from ctrace.rehearsal.packets import SYN

_Conditional = tuple[Chain, Does[Chain], bool, bool, tuple[bool, bool]]
"""(chain, what a rule does, whether it depends, whether it may change, its groups)."""


class Needs:
    """Parts of a rule set that a copy can't decide as they are."""

    def __init__(self) -> None:
        self.depends = False
        """A condition that can only be forced, where more than a log hangs on it."""
        self.turns = False
        """The same, but for lots: it may change while a connection is open."""
        self.groups = False, False
        """Whether such conditions read something of a packet, and whether others depend, too."""
        self.draws = False
        """A translation that chooses random ports."""
        self.counts = False
        """A limit on tracked connections."""
        self.changed: set[bytes] = set()
        """Attributes of the rules with any of it: the others are loaded as they are."""
        self.learns: set[tuple[int, bytes, bytes]] = set()
        """(family, table, name) of sets that rules fill."""
        self.keeps = False
        """What packets leave behind elsewhere than in sets and entries."""
        self.maps: set[bytes] = set()
        """Names of maps to limits and quotas."""
        self.meters: dict[bytes, str] = {}
        """By name of a set or a map what its elements measure by themselves, whoever asks."""
        self._listed: dict[tuple[int, bytes, bytes], set[int]] = {}
        """Elements of one byte each, by (family, table, name) of their set."""
        self.recent = recent.Lists()
        self.classes = False
        """Whether rules give packets a priority."""
        self.flags = False
        """Whether rules read the flags of segments that are no SYN."""
        self._quiet: Quiet[Chain] = Quiet()
        self._conditional: list[_Conditional] = []
        with_these = partial(change, maps=self.maps, meters=self.meters)
        self._ways = (
            with_these(True, untracked=False),
            with_these(False, untracked=False),
            with_these(True, untracked=False, draw=False),
            with_these(True, untracked=True),
            with_these(False, untracked=False, kept=True),
            with_these(True, untracked=False, packet=False),
        )

    def see_set(self, family: int, of: Mapping[int, bytes]) -> None:
        """One set or map of nftables, as its attributes."""
        if number(of.get(5, b"")) == 1 and not number(of.get(3, b"")) & 4:  # without ranges
            self._listed[family, of[1], of[2]] = set()
        if number(of.get(15, b"")) in MEASURES:
            self.maps.add(of[2])

    def see_elements(self, family: int, of: Mapping[int, bytes]) -> None:
        """Some elements of a set that was seen."""
        found = self._listed.get((family, of[1], of[2]))
        if found is not None:
            for _, one in split(of[3]):
                found.update(first(first(one, 1), 1) or range(256))

    def see(self, family: int, body: bytes, rule: list[Expression]) -> None:
        """One rule of nftables, as its attributes and their expressions."""
        self.classes |= any(_gives_class(name, dict(attributes)) for name, attributes in rule)
        self.flags |= _reads_flags(rule)
        chain = family, first(body, 1), first(body, 2)
        what = None if self._quiet.knows_loud(chain) else does(rule, chain)
        if what is not None:
            self._quiet.see(chain, what[0])
        metered = self.meters and any(
            name == "lookup" and dict(attributes)[1] in self.meters for name, attributes in rule
        )
        if not metered and not any(odd(name, of) for name, of in rule):
            return
        yes, no, kept, apart = (way(rule) for way in self._ways[:4])
        plain = [one for one in rule if not is_lot(*one)]
        turns = self._ways[0](plain) != self._ways[4](plain)
        if turns or any(said is not None for said in (yes, no, kept, apart)):
            self.changed.add(body)
        if (turns or yes != no) and not unheard(
            rule, lambda name: self._listed.get((*chain[:2], name), set())
        ):
            split = self._ways[5](rule)
            groups = split != yes, split != no
            self._conditional.append((chain, what or does(rule, chain), yes != no, turns, groups))
        self.draws |= yes != kept
        self.counts |= yes != apart
        for name, attributes in rule:
            if name == "dynset":
                self.learns.add((family, first(body, 1), dict(attributes)[1]))
            elif name == "target":
                self.keeps |= word(dict(attributes)[1]) in KEEPING
            elif name == "match" and word(dict(attributes)[1]) == recent.MATCH:
                self.recent.see(dict(attributes)[3])

    def decide(self) -> None:
        """All rules are seen: which of their conditions matter."""
        loud = self._quiet.loud()
        for chain, what, depends, turns, groups in self._conditional:
            if decides(loud, chain, what):
                self.depends |= depends
                self.turns |= turns
                self.groups = self.groups[0] or groups[0], self.groups[1] or groups[1]


def _gives_class(name: str, of: dict[int, bytes]) -> bool:
    """Whether it sets NFT_META_PRIORITY."""
    if name == "target":
        return word(of[1]) == "CLASSIFY"
    return name == "meta" and 3 in of and number(of[2]) == 2


def _reads_flags(rule: list[Expression]) -> bool:
    """Whether it asks for TCP's flags of segments that are no SYN."""
    mask, read = 0xFF, False
    for name, attributes in rule:
        of = dict(attributes)
        if name == "match" and word(of[1]) == "tcp":  # struct xt_tcp: flags at 9, values at 10
            mask, value = of[3][9], of[3][10]
        elif name == "payload" and 1 in of:
            read = tuple(number(of[key]) for key in (2, 3, 4)) == (2, 13, 1)
            mask = 0xFF
            continue
        elif name == "bitwise" and 4 in of:
            mask = first(of[4], 1)[-1]
            continue
        elif read and name in ("cmp", "lookup", "range"):
            value = first(of[3], 1)[-1] if name == "cmp" else 0
        else:
            continue
        if mask & ~SYN and not mask & value & SYN:
            return True
    return False


def flags_in(text: str) -> bool:
    """The same of what iptables-legacy-save printed."""
    return bool(re.search(r" --tcp-flags (?!\S+ \S*SYN)", text))
