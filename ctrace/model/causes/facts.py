"""What recognisers read: the tables, the groups of keys, and each service's part of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.batch import Logged
from ctrace.beside import EPHEMERAL, Beside, Stray
from ctrace.model.causes.room import LOADS
from ctrace.model.causes.words import UNKNOWN, duration, entries, pace, percent, stay
from ctrace.model.composition import by_settings, timeouts
from ctrace.model.snapshot import Cause, Counted, Culprit, Rates, Remedy, Table

if TYPE_CHECKING:
    from ctrace.model.groups import Group

LOOKED_AT: Final = 12
"""Services examined in each namespace, by entries held."""
SHARE: Final = 0.10
"""A cause that explains less of its table than this is not worth a line."""
ENDED: Final = 20
"""Ended entries. Shares of fewer mean nothing."""
SPACES: Final = 24
"""Namespaces examined for services: the fullest, and those that refuse flows."""
WHOLE: Final = 0.9
"""Share of the table's entries from which a dump is taken as the whole table."""
OWNED: Final = 0.6
"""A source or process with this share of a service is named for it."""
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


@dataclass(frozen=True)
class Service:
    """One service in one namespace, with its part of that namespace's table."""

    c: Culprit
    table: Optional[Table]
    share: float
    where: str
    """Suffix naming the namespace, where there are several."""
    top: str
    """The source that holds most of it."""
    top_share: float
    owner: str
    """The process that opened what that source holds."""
    sources: int
    nat: str
    """As :attr:`Culprit.nat`, of the service's entries from every source."""
    young: int
    """Looks at living entries, which stand in while hardly any entry has ended."""
    waits: Optional[float]
    """Seconds that an entry stays in TIME_WAIT, by the kernel's own timeout."""
    uptime: float = 0.0
    """Seconds observed."""
    timeouts: Mapping[str, float] = field(default_factory=dict)
    """Seconds that the kernel gives entries in a TCP state, by looks at those in it."""
    words: str = ""
    """Its name where it is several services; empty: named by its key and sources."""
    changes: bool = True
    """Whether entries were seen to come and go."""
    ephemeral: tuple[int, int] = EPHEMERAL
    """Ports that the kernel chooses from in its namespace."""
    seen: int = 0
    """Entries of its table that were seen; a dump may show fewer than there are."""
    strays: tuple[Stray, ...] = ()

    @property
    def judged(self) -> int:
        """How many entries the shares of replies and states rest on."""
        return max(self.c.destroys, self.young, self.c.composition.n)

    @property
    def basis(self) -> str:
        """``1,200 ended`` or ``128 looked at``."""
        if self.c.composition.n >= ENDED:
            return f"{self.c.composition.n:,} of its entries looked at"
        if self.young >= ENDED > self.c.destroys:
            return f"{self.young:,} looked at"
        return f"{self.c.destroys:,} ended"

    @property
    def stay(self) -> str:
        """How long entries stay, as in the table of keys."""
        return stay(self.c.residence)

    @property
    def they(self) -> str:
        """``(they live 4 ms, their entries stay 120 s)``, as far as known."""
        known = [
            f"{what} {value}"
            for what, value in (
                ("they live", duration(self.c.life.p50)),
                ("their entries stay", self.stay),
            )
            if value != UNKNOWN
        ]
        return f" ({', '.join(known)})" if known else ""

    @property
    def of(self) -> str:
        """``tcp/80 from php-fpm``, ``..., mostly from 10.0.0.7`` or ``... from 214 sources``."""
        if self.words:
            return f"{self.words}{self.where}"
        if self.top and self.top_share >= OWNED:
            mostly = "" if self.alone else ", mostly"
            return f"{self.c.key}{mostly} from {self.owner or self.top}{self.where}"
        if not self.sources:
            return f"{self.c.key}{self.where}"
        return f"{self.c.key} from {self.sources:,} sources{self.where}"

    @property
    def quiet(self) -> Optional[float]:
        """Share of its entries without a packet for :attr:`long`; None where unknown."""
        idle = self.c.composition.idle
        return sum(one >= self.long for one in idle) / len(idle) if idle else None

    @property
    def long(self) -> float:
        """Seconds without a packet after which an entry counts as quiet: half of the time observed,
        because looks are some seconds old, but at most a minute."""
        return max(5.0, min(self.uptime / 2, 60.0)) if self.changes else 60.0

    @property
    def alone(self) -> str:
        """Its source; empty where there are several."""
        return self.top if self.top_share >= 0.95 else ""

    def timeout_of(self, state: str) -> Optional[float]:
        """Seconds that the kernel gives an entry in a TCP state, where some were looked at."""
        if state == "TIME_WAIT" and self.waits:
            return round(self.waits)
        return self.timeouts.get(state)

    @property
    def part(self) -> str:
        """``83 % of 65,536 entries``: of what is held, however full the table is."""
        return self.part_of(1.0)

    def part_of(self, share: float) -> str:
        """The same for this share of the service's entries."""
        held = self.table.count if self.table and self.table.count else self.c.held
        if not self.changes and self.seen < WHOLE * held:
            return f"{percent(share * self.share)} of the {entries(self.seen)} shown"
        return f"{percent(share * self.share)} of {entries(held)}"

    @property
    def held_line(self) -> str:
        """How much it holds, as evidence."""
        return ", ".join([f"holds {entries(self.c.held)}", self.part, *self.pace("new/s")])

    def pace(self, of: str) -> tuple[str, ...]:
        """``("120 new/s",)``; nothing where entries were not seen to come."""
        said = pace(self.c.new_per_s, of) if self.changes else ""
        return (said,) if said else ()

    @property
    def ends_line(self) -> str:
        """How its entries ended, as evidence; empty where none was seen to end."""
        if not self.changes:
            return ""
        e = self.c.ends
        ways = f"{e.expired:,} expired, {e.evicted:,} evicted, {e.deleted:,} deleted"
        return f"{self.c.destroys:,} ended: {ways}"

    def cause(
        self, id: str, text: str, evidence: tuple[str, ...], *remedies: Optional[Remedy]
    ) -> Cause:
        """A cause about this service; no setting helps where it has timeouts of its own."""
        settings = by_settings(self.c.composition)
        return Cause(
            id=id,
            text=text,
            evidence=tuple(one for one in evidence if one),
            share=self.share,
            proto=self.c.proto,
            port=self.c.port,
            netns=self.c.netns,
            load=id in LOADS,
            remedies=tuple(
                one
                for one in remedies
                if one is not None and (settings or one.id != "sysctl-timeout")
            ),
        )


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
        top_share = float(parts.max()) / max(1.0, float(weight[at]))
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
        where=facts.where(netns),
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
            where=facts.where(culprit.netns),
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
