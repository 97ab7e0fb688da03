"""What recognisers read: the tables, the groups of keys, and each service's part of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.batch import Logged
from ctrace.beside import EPHEMERAL, Beside
from ctrace.model.causes.service import ENDED, Service
from ctrace.model.composition import timeouts
from ctrace.model.snapshot import Counted, Culprit, Rates, Table

if TYPE_CHECKING:
    from ctrace.model.groups import Group

LOOKED_AT: Final = 12
"""Services examined in each namespace, by entries held."""
SHARE: Final = 0.10
"""A cause that explains less of its table than this is not worth a line."""
SPACES: Final = 24
"""Namespaces examined for services: the fullest, and those that refuse flows."""
_S32: Final = np.uint64(32)


@dataclass(frozen=True)
class Failure:
    """Inserts that failed towards one service, without another packet of the same flow."""

    proto: str
    dst: str
    port: int
    netns: int
    failed: int
    translated: tuple[str, ...]
    """Addresses that source NAT gave these connections."""


@dataclass
class Facts:
    """What recognisers read."""

    tables: tuple[Table, ...]
    totals: Counted
    rates: Rates
    uptime: float
    service: Group
    pair: Group
    src: Group
    dst: Group
    space: Group
    """By namespace: complete, however many keys there are."""
    failed_dns: int
    """Insertion races lost by flows to port 53."""
    failed: int
    portless: tuple[Failure, ...] = ()
    """Translated connections that found no free source port."""
    several: tuple[tuple[Culprit, str], ...] = ()
    """The keys of ``who`` that hold several services of one protocol, each described in words."""
    gone: Collection[int] = ()
    """Namespaces that have gone: what they held fills nothing."""
    changes: bool = True
    """Whether entries were seen to come and go; otherwise nothing is said about rates and ends."""
    logged: Optional[Logged] = None
    """What the host's own log says about a full table."""
    beside: Mapping[int, Beside] = field(default_factory=dict)
    """What rules and the table show together, by namespace, as last read."""

    def whole(self, netns: int, held: bool) -> float:
        """The total that a namespace holds: entries, or table-seconds."""
        return self._wholes[held].get(netns, 0.0)

    @cached_property
    def _wholes(self) -> dict[bool, dict[int, float]]:
        """The total of each namespace."""
        group = self.service
        found: dict[bool, dict[int, float]] = {}
        for held, name in ((True, "held"), (False, "table_seconds")):
            spaces = (self.space.key[:, 2] >> _S32).tolist()
            sums = dict(zip(spaces, self.space.measure(name).tolist()))
            numbers, code = np.unique(group.key[:, 2] >> _S32, return_inverse=True)
            told = np.bincount(code.ravel(), group.measure(name), len(numbers))
            for netns, weight in zip(numbers.tolist(), told.tolist()):
                sums[netns] = max(sums.get(netns, 0.0), weight)
            found[held] = sums
        return found

    @cached_property
    def by_held(self) -> bool:
        """Whether shares are of what is held now; otherwise, with hardly anything held, of what was
        held over time."""
        return self.service.total_held >= ENDED or not self.changes

    @cached_property
    def _by_service(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.uint64]]:
        """The order of the pairs by service, and their services in that order."""
        order = np.argsort(self.pair.key[:, 2], kind="stable")
        return order, self.pair.key[order, 2]

    def pairs_of(self, service: int) -> npt.NDArray[np.intp]:
        """The pairs of a service, by the last word of its key."""
        order, meta = self._by_service
        low, high = (np.searchsorted(meta, np.uint64(service), side) for side in ("left", "right"))
        return order[low:high]

    @cached_property
    def _tables(self) -> dict[int, Table]:
        return {table.netns: table for table in self.tables}

    def table(self, netns: int) -> Optional[Table]:
        """A namespace's table."""
        return self._tables.get(netns)

    def where(self, netns: int) -> str:
        """Suffix naming the namespace, where there are several."""
        table = self.table(netns)
        return f" in {table.name}" if table and len(self.tables) > 1 else ""


def services(facts: Facts, least: float = 0.0) -> Iterator[Service]:
    """The services that hold most of each namespace, with their part of its table.

    With more than :data:`SPACES` namespaces, only those of the fullest. ``least``: the share of its
    namespace that a service must hold; none is of one that holds nothing.
    """
    group, use_held = facts.service, facts.by_held
    weight = group.measure("held" if use_held else "table_seconds")
    order = group.order("held", group.n)
    spaces, code = np.unique(group.key[order, 2] >> _S32, return_inverse=True)
    code = code.ravel()
    fullest = _fullest(facts)
    needed = np.array([
        np.inf if one in facts.gone or (fullest is not None and one not in fullest)
        else max(1e-9, least * facts.whole(one, use_held)) for one in spaces.tolist()
    ])  # fmt: skip
    chosen = order[(_places(code) < LOOKED_AT) & (weight[order] >= needed[code])]
    for at in chosen.tolist():
        yield _service(facts, at, int(group.key[at, 2]) >> 32, weight)


def _places(code: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """The rank of each among those with the same code, from 0."""
    order = np.argsort(code, kind="stable")
    ordered = code[order]
    places = np.empty(len(code), np.intp)
    places[order] = np.arange(len(code)) - np.searchsorted(ordered, ordered)
    return places


def _fullest(facts: Facts) -> Optional[set[int]]:
    """The namespaces to examine where there are many; None: all."""
    if len(facts.tables) <= SPACES:
        return None
    order = sorted(facts.tables, key=lambda t: (-t.totals.drop, -t.fill, -t.count))
    return {t.netns for t in order[:SPACES]}


def _service(facts: Facts, at: int, netns: int, weight: npt.NDArray[np.float64]) -> Service:
    group, pair = facts.service, facts.pair
    whole = facts.whole(netns, facts.by_held)
    culprit = group.culprit(at)
    mine = facts.pairs_of(int(group.key[at, 2]))
    top, top_share, sources, owner, nat = "", 0.0, mine.size, "", {culprit.nat}
    if mine.size:
        parts = pair.measure("held" if facts.by_held else "table_seconds")[mine]
        best = int(mine[int(parts.argmax())])
        top = pair.address(best)
        top_share = float(parts.max()) / (float(weight[at]) or 1.0)
        how, opener = pair.opened(best)
        nat.add(how)
        owner = opener.comm if opener else ""
    estimate = culprit.distinct_src
    if pair.floor and estimate is not None:
        sources = max(sources, estimate)
    looks, waits = group.looks(at), group.closed_for(at)[0]
    seen = {word for one in nat for word in one.split(",")} - {"", "no"}
    return Service(
        c=_at_first(culprit, looks),
        table=facts.table(netns),
        share=float(weight[at]) / whole if whole else 0.0,
        where=_in_zone(culprit) + facts.where(netns),
        top=top,
        top_share=top_share,
        owner=owner,
        sources=int(sources),
        nat=",".join(sorted(seen)) or "no",
        young=looks["young"],
        waits=waits,
        uptime=facts.uptime,
        timeouts=timeouts(group.looks_at(at)),
        changes=facts.changes,
        ephemeral=facts.beside[netns].ephemeral if netns in facts.beside else EPHEMERAL,
        seen=round(facts.whole(netns, held=True)),
        strays=facts.beside[netns].strays if netns in facts.beside else (),
    )


def _in_zone(c: Culprit) -> str:
    """Suffix naming the conntrack zone that all of a key is in, as far as looks tell."""
    return f" in zone {c.composition.zone}" if c.composition.zone else ""


def _at_first(c: Culprit, looks: Mapping[str, int]) -> Culprit:
    """With shares by looks at young entries, before looks at the table itself have met any.

    What is closed, or answered, at that age stays so. Only of entries that were seen to come.
    """
    young = looks["young"]
    if c.composition.n or c.unreplied is not None or young < ENDED or c.older > 0.1 * c.held:
        return c
    closed = min(1.0, looks["closed"] / young) if c.proto == "tcp" else None
    return replace(c, closed=closed, unreplied=min(1.0, looks["unreplied"] / young))


def several(facts: Facts) -> Iterator[Service]:
    """A key of ``who`` that holds several services, treated as one service."""
    for culprit, words in facts.several:
        whole = facts.whole(culprit.netns, held=True)
        if culprit.held < ENDED or not whole or culprit.netns in facts.gone:
            continue
        yield Service(
            c=culprit,
            table=facts.table(culprit.netns),
            share=culprit.held / whole,
            where=_in_zone(culprit) + facts.where(culprit.netns),
            top="",
            top_share=0.0,
            owner="",
            sources=culprit.distinct_src or 0,
            nat=culprit.nat,
            young=0,
            waits=None,
            uptime=facts.uptime,
            words=words,
            changes=facts.changes,
            seen=round(whole),
        )
