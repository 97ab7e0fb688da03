"""One service, or several as one, as recognisers read it: what it holds, of whom, and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Optional

from ctrace.beside import EPHEMERAL, Stray
from ctrace.model import remedies
from ctrace.model.causes.room import LOADS
from ctrace.model.causes.words import UNKNOWN, duration, entries, pace, percent, plural, stay
from ctrace.model.composition import by_settings
from ctrace.model.snapshot import Cause, Culprit, Remedy, Table
from ctrace.record import Status

ENDED: Final = 20
"""Ended entries. Shares of fewer mean nothing."""
ONCE_EACH: Final = 1.5
"""Entries for each source, on average, up to which the sources are ever new ones."""
WHOLE: Final = 0.9
"""Share of the table's entries from which a dump is taken as the whole table."""
OWNED: Final = 0.6
"""A source or process with this share of a service is named for it."""


@dataclass(frozen=True)
class Service:
    """One service in one namespace, with its part of that namespace's table."""

    c: Culprit
    table: Optional[Table]
    share: float
    where: str
    """Suffix naming the zone, if it is all in one, and the namespace, where there are several."""
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
        return f"{self.c.key} from {plural(self.sources, 'source')}{self.where}"

    @property
    def zone(self) -> int:
        """The conntrack zone that all of it is in, as far as looks tell; 0: the default one, or
        several."""
        return self.c.composition.zone

    def samples_have(self, bit: Status) -> bool:
        """Whether half of the entries shown of it, or more, have a bit of status."""
        seen = [one.status & bit for one in self.c.samples]
        return bool(seen) and 2 * sum(map(bool, seen)) >= len(seen)

    def flooded(self, least: int) -> bool:
        """Whether ever new sources send to it from outside, at ``least`` so many, each with hardly
        an entry: those that come again have one after the other."""
        per_source = max(self.c.inserts, self.c.held) / max(1, self.sources)
        received = self.c.direction in ("in", "forward", "mixed")
        return received and self.sources >= least and per_source <= ONCE_EACH

    @property
    def expected_line(self) -> str:
        """That a helper expected its entries, as evidence; else empty."""
        if not self.samples_have(Status.EXPECTED):
            return ""
        return "a conntrack helper expected them, as it does FTP's or TFTP's data connections"

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

    def raised(self, name: str, state: str = "") -> str:
        """``; nf_conntrack_udp_timeout is 90 s here, 30 s by default``, where it is much more."""
        now, usual = self.timeout_of(state or name), remedies.TIMEOUTS.get(name, 0)
        if not usual or now is None or now < 2 * usual:
            return ""
        return f"; nf_conntrack_{name} is {round(now):,} s here, {usual:,} s by default"

    def timeout_of(self, state: str) -> Optional[float]:
        """Seconds that the kernel gives an entry in a TCP state, or by a setting of another
        protocol, where some were looked at."""
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
        self, id: str, text: str, evidence: tuple[str, ...], *helps: Optional[Remedy]
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
                one for one in helps if one is not None and (settings or one.id != "sysctl-timeout")
            ),
        )
