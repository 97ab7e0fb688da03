"""Where an accept belongs: next to the rule that accepted the packet while it was tracked.

The kernel's trace tells which rule that was, and which base chain drops the packet now. The
accept takes over that rule's own conditions but for its state: it is never wider.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, summarize_address_range
from typing import Final, Optional

from ctrace.plan.plan import Accept, name_ok
from ctrace.plan.terms import MAX_TERMS, Term
from ctrace.rehearsal import nft_edit
from ctrace.rehearsal.nft_copy import NETDEV
from ctrace.rehearsal.stage import Hit, Stage
from ctrace.rehearsal.ways.ends import ENDS, INET
from ctrace.ruleset.model import Chain, Match, Rule, Ruleset

NF_DROP, NF_ACCEPT, NF_STOLEN = 0, 1, 2
HOOKS: Final = ("prerouting", "input", "forward", "output", "postrouting")
DEVICE_HOOKS: Final = ("ingress", "egress")
_FAMILIES: Final = {1: "inet", 2: "ip", 5: "netdev", 10: "ip6"}
_SET: Final = re.compile(r"(\S.*?) (!= )?(@[\w.-]+)\Z")
_IPSET: Final = re.compile(r"(?:! )?--match-set ([\w.-]+) ([srcdt,]+)\Z")
_OWNER: Final = re.compile(
    r"(?:meta sk|(?:! )?--)([ug]id)(?:-owner)? (?:!= )?(?:\{ )?(\d[\d, -]*?)(?: \})?\Z"
)
LATER: Final = Term("later", ("tcp",))
MOST_PARTS: Final = 8
"""Of one rule, tried one after the other."""
_STATES: Final = ("ct.state", "ct.dir")
Place = tuple[str, str, str]
"""(family, table, chain)."""


@dataclass(frozen=True)
class Passage:
    """A packet's way through one base chain."""

    place: Place
    hook: str
    hits: tuple[Hit, ...]

    @property
    def verdict(self) -> int:
        """The verdict that it ended with."""
        return self.hits[-1].verdict


class Map:
    """The rules of a stage by handle: the place of each, not counting ours."""

    def __init__(
        self,
        at: dict[tuple[Place, int], int],
        base: dict[Place, str],
        model: dict[Place, Chain],
        tool: str = "nft",
    ) -> None:
        """``at``: index by (chain, handle), -1 for ours; ``base``: the hook of base chains."""
        self._at, self._base, self._model, self._tool = at, base, model, tool
        self._chains: dict[tuple[str, str], set[str]] = {}
        for family, table, chain in (*base, *(place for place, _ in at)):
            self._chains.setdefault((table, chain), set()).add(family)

    def place(self, hit: Hit) -> Place:
        """A hit's chain: the trace has the packet's family, not the table's."""
        families = sorted(self._chains.get((hit.table, hit.chain), ()))
        own = _FAMILIES.get(hit.family, "ip")
        usable = [f for f in families if f in (own, "inet")] or ["inet"]
        for family in usable:
            place = family, hit.table, hit.chain
            if not hit.handle or (place, hit.handle) in self._at:
                return place
        return usable[0], hit.table, hit.chain

    def passages(self, hits: Sequence[Hit]) -> list[Passage]:
        """A packet's path, split by base chains."""
        found: list[tuple[Place, list[Hit]]] = []
        over = True
        for hit in hits:
            if hit.table == ENDS:
                continue
            place = self.place(hit)
            if place in self._base and (over or found[-1][0] != place):
                found.append((place, []))
            if found:
                found[-1][1].append(hit)
            over = hit.kind == 1 or (hit.kind == 3 and hit.verdict in (NF_DROP, NF_ACCEPT))
        return [Passage(place, self._base[place], tuple(hits)) for place, hits in found if hits]

    def dropped(self, hits: Sequence[Hit]) -> list[Passage]:
        """The base chains in which a packet's path ended."""
        return [p for p in self.passages(hits) if p.verdict in (NF_DROP, NF_STOLEN)]

    def position(self, hit: Hit) -> Optional[int]:
        """A rule's index in its chain; -1: the end; None: it is one of ours."""
        if hit.kind != 3:
            return -1
        at = self._at.get((self.place(hit), hit.handle))
        return None if at is None or at < 0 else at

    def path(self, passage: Passage) -> list[Hit]:
        """The deciding hit and the jumps that led to it, innermost first."""
        path = [passage.hits[-1]]
        for hit in reversed(passage.hits[:-1]):
            if hit.verdict in (-3, -4) and hit.target == path[-1].chain:
                path.append(hit)
        return path

    def rules(self, hit: Hit, port: int) -> list[Rule]:
        """A rule as it was read; of a map, or of fields compared together, the parts for the port.
        None where it is not certain."""
        chain = self._model.get(self.place(hit))
        at = self.position(hit)
        if chain is None or at is None or at < 0:
            return []
        parts = [rule for rule in chain.rules if rule.position == at]
        if len(parts) == 1:
            return parts
        return [
            part
            for part in parts
            if part.verdict and part.verdict.target == hit.target and _of_port(part, port)
            if hit.target or part.verdict.kind == "accept"
        ]

    def where(self, hit: Hit, port: int) -> str:
        """A rule or a policy, as people read it: its text and place."""
        place = self.place(hit)
        chain = self._model.get(place)
        name = chain.where if chain else " ".join(place)
        if hit.kind != 3:
            return f"the policy of {name}"
        rules = self.rules(hit, port)
        at = self.position(hit)
        order = "" if at is None else f", rule {at + 1}"
        return f'"{rules[0].text}" in {name}{order}' if rules else f"a rule of {name}{order}"

    def tool(self, place: Place) -> str:
        """The tool that owns a chain."""
        chain = self._model.get(place)
        return chain.tool if chain else self._tool


def of_stage(stage: Stage, ruleset: Optional[Ruleset], ways: Iterable[Sequence[Hit]]) -> Map:
    """Of nf_tables on a stage: the chains that packets came through on these ways."""
    at: dict[tuple[Place, int], int] = {}
    base: dict[Place, str] = {}
    met = dict.fromkeys((hit.family, hit.table, hit.chain) for way in ways for hit in way)
    asked = dict.fromkeys((f, t, c) for own, t, c in met if t != ENDS for f in (own, INET))
    for where in asked:
        hook = nft_edit.hook_of(stage.space.path, where)
        if hook is None or where[0] not in _FAMILIES:
            continue
        place = _FAMILIES[where[0]], *where[1:]
        if hook >= 0:
            base[place] = DEVICE_HOOKS[hook] if where[0] == NETDEV else HOOKS[hook]
        at.update({(place, handle): index for handle, index in stage.positions(where).items()})
        at.update({(place, handle): -1 for there, handle in stage.added if there == where})
    model = {
        (chain.family, chain.table, chain.name): chain
        for chain in (ruleset.chains if ruleset else ())
        if chain.tool != "iptables-legacy"
    }
    return Map(at, base, model)


def _of_port(rule: Rule, port: int) -> bool:
    return all(
        match.negate or any(low <= port <= high for low, high in match.values)
        for match in rule.matches
        if match.key == "dport"
    )


@dataclass(frozen=True)
class Need:
    """A lost packet: its paths tracked and untracked, and its fields."""

    tracked: Sequence[Hit]
    opening: Sequence[Hit]
    """The path of its conversation's first packet, tracked; empty when that went the other way."""
    untracked: Sequence[Hit]
    role: str
    flow: str
    proto: str
    port: int


def candidates(need: Need, before: Map, after: Map) -> Iterator[Accept]:
    """Accepts that may fix it, the narrowest place first."""
    lost = after.dropped(need.untracked)
    if not lost:
        return
    drop = lost[-1]
    if drop.hook in DEVICE_HOOKS:  # an accept is of three families, and sees no device's hook
        return
    # What state alone let through is let through alone: no SYN may come by such an accept.
    later = [LATER] if need.opening and need.proto == "tcp" else []
    for hits, first in ((need.opening, []), (need.tracked, later)):
        same = [p for p in before.passages(hits) if p.place == drop.place]
        if not same:
            continue
        terms: dict[tuple[Term, ...], None] = {tuple(first): None}
        for hit in before.path(same[-1]):
            at = before.position(hit)
            if hit.kind == 3 and at is not None and need.flow != "icmp":
                every = [carried(rule, need) for rule in before.rules(hit, need.port)]
                terms = {
                    tuple(dict.fromkeys([*some, *more])): None
                    for some in terms
                    for more in every[:MOST_PARTS]
                    if more is not None
                }
            if hit.kind == 3 and at is not None:
                for some in terms:
                    yield from _accept(need, before, hit, at, drop.hook, some)
        # Before what drops it, in the order from the outermost chain inwards.
        for hit in reversed(after.path(drop)):
            at = after.position(hit)
            if at is None:
                continue
            for some in terms:
                yield from _accept(need, after, hit, at, drop.hook, some)


def _accept(
    need: Need, known: Map, hit: Hit, at: int, hook: str, terms: tuple[Term, ...]
) -> Iterator[Accept]:
    place = known.place(hit)
    if need.role == "loopback" and hook in ("input", "output"):
        lo = Term("iif" if hook == "input" else "oif", ("lo",))
        terms = terms if lo in terms else (lo, *terms)
    if len(terms) > MAX_TERMS or not (name_ok(place[1]) and name_ok(place[2])):
        return
    terms = tuple(t for t in terms if _sees(t, hook))
    accept = Accept(
        known.tool(place),
        *place,
        position=at,
        hook=hook,
        role=need.role,
        flow=need.flow,
        terms=terms,
    )
    if not any(term.problem() for term in terms):
        yield accept


def _sees(term: Term, hook: str) -> bool:
    blind = {"oif": ("prerouting", "input"), "iif": ("output", "postrouting")}
    return hook not in blind.get(term.field, ())


def carried(rule: Rule, need: Need) -> Optional[list[Term]]:
    """A rule's conditions but for its state; None when one can't be taken over."""
    found = []
    for match in rule.matches:
        if match.key in _STATES or match.key in ("proto", "flags"):
            continue
        if match.key == "ct.status" and match.negate:
            continue
        mine = "dport" if need.flow == "to" else "sport"
        if (
            match.key == mine
            and not match.negate
            and any(low <= need.port <= high for low, high in match.values)
        ):
            continue
        term = _term(match)
        if term is None:
            return None
        found.append(term)
    return found


def _term(match: Match) -> Optional[Term]:  # noqa: PLR0911
    text = match.text
    for pattern in (_SET, _IPSET, _OWNER):
        hit = pattern.search(text)
        if hit and pattern is _SET:
            return Term("set", (f"{hit[1]} {hit[3]}",), bool(hit[2]))
        if hit and pattern is _IPSET:
            return Term("set", (f"{hit[2]} @{hit[1]}",), text.startswith("!"))
        if hit:
            return Term(hit[1], tuple(hit[2].split(", ")), "!" in text)
    values = match.values
    if match.key in ("saddr", "daddr"):
        nets = tuple(str(net) for span in values for net in _networks(span))
        return Term(match.key, nets, match.negate)
    if match.key in ("iif", "oif"):
        return Term(match.key, tuple(str(v) for v in values), match.negate)
    if match.key in ("sport", "dport") and len(values) == 1:
        return Term(match.key, (f"{values[0][0]}-{values[0][1]}",), match.negate)
    if match.key == "mark" and len(values) == 1:
        mask, value = values[0]
        return Term("mark", (f"{value:#x}/{mask:#x}",), match.negate)
    if match.key in ("saddr.type", "daddr.type") and tuple(values) == ("local",):
        return Term("type", (f"{match.key[:5]} local",), match.negate)
    if match.key == "family" and len(values) == 1:
        return Term("family", (str(values[0]),), match.negate)
    return None


def _networks(span: tuple[int, int, int]) -> Iterator[object]:
    version, low, high = span
    if version == 4:
        yield from summarize_address_range(IPv4Address(low), IPv4Address(high))
    else:
        yield from summarize_address_range(IPv6Address(low), IPv6Address(high))
