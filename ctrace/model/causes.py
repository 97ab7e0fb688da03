"""Causes recognised by shape, each with the evidence it was recognised by.

A recogniser looks at one service's (or one table's) numbers and either stays silent
or names a cause. The thresholds stand beside their reasons. When none fits,
``unknown`` says what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Optional

import numpy as np

from ctrace.model.snapshot import Cause, Counted, Culprit, Rates, Table

if TYPE_CHECKING:
    from ctrace.model.groups import Group

LOOKED_AT: Final = 12
"""Services looked at, by entries held."""
SHARE: Final = 0.10
"""A cause that explains less of its table than this is not worth a line."""
ENDED: Final = 20
"""Ended entries below which shares of them mean nothing."""
NEARLY_FULL: Final = 0.90
LOW_FILL: Final = 0.50
SHORT_LIFE: Final = 5.0
"""Seconds: a connection that was this short is one request."""
TUNNELS: Final = {
    4789: "VXLAN", 8472: "VXLAN (Linux's old port)", 4790: "VXLAN-GPE", 6081: "Geneve",
    4754: "GRE in UDP", 6635: "MPLS in UDP", 51820: "WireGuard",
}  # fmt: skip
TUNNEL_PROTOS: Final = ("ipip", "ipv6", "gre", "esp", "ah")
SHOWN: Final = 5


@dataclass
class Facts:
    """What recognisers look at."""

    tables: tuple[Table, ...]
    totals: Counted
    rates: Rates
    uptime: float
    service: Group
    pair: Group
    src: Group
    space: Group
    """By namespace: whole, however many keys there are."""
    failed_dns: int
    """Insertion races lost by flows to port 53."""
    failed: int
    ticks: int = 0

    def whole(self, netns: int, held: bool) -> float:
        """What all of a namespace holds: entries, or table-seconds."""
        weight = self.space.held if held else self.space.table_seconds
        return float(weight[self.space.inside(netns)].sum())


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
    sources: int
    young: int
    """Looks at young entries, which stand in while hardly any entry has ended."""
    stays: Optional[float]
    """Seconds that a closed entry stays, by the kernel's own timeout."""

    @property
    def judged(self) -> int:
        """How many entries the shares of replies and states rest on."""
        return max(self.c.destroys, self.young)

    @property
    def basis(self) -> str:
        """``1,200 ended`` or ``128 looked at``."""
        if self.young >= ENDED > self.c.destroys:
            return f"{self.young:,} looked at"
        return f"{self.c.destroys:,} ended"

    @property
    def held_for(self) -> str:
        """How long entries stay: measured, or by the timeout while none has ended."""
        if self.c.residence.p50 is None and self.stays is not None:
            return duration((self.c.life.p50 or 0.0) + self.stays)
        return duration(self.c.residence.p50)

    @property
    def of(self) -> str:
        """``tcp/80 from 10.0.0.7`` or ``... from 214 sources``, as far as they are known."""
        if self.top and self.top_share >= 0.6:
            return f"{self.c.key} from {self.top}{self.where}"
        if not self.sources:
            return f"{self.c.key}{self.where}"
        return f"{self.c.key} from {self.sources:,} sources{self.where}"

    @property
    def pressed(self) -> bool:
        """Whether its table is full or nearly so."""
        t = self.table
        return bool(t and (t.fill >= NEARLY_FULL or t.full_since is not None))


UNKNOWN: Final = "unknown"
Recogniser = Callable[[Service, Facts], Optional[Cause]]


def duration(seconds: Optional[float]) -> str:
    """``4 ms``, ``2.5 s``, ``120 s``, ``41 min``, ``3 h``; ``unknown`` for None."""
    if seconds is None:
        return UNKNOWN
    if seconds < 1:
        return f"{max(seconds * 1000, 0):.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"


def percent(share: Optional[float]) -> str:
    """``83 %``; ``unknown`` for None."""
    return UNKNOWN if share is None else f"{100 * share:.0f} %"


def _held(s: Service) -> str:
    part = f"{percent(s.share)} of its table"
    return f"holds {s.c.held:,} entries, {part}, {s.c.new_per_s:,.0f} new/s"


def _ends(s: Service) -> str:
    e = s.c.ends
    ways = f"{e.expired:,} expired, {e.evicted:,} evicted, {e.deleted:,} deleted"
    return f"{s.c.destroys:,} ended: {ways}"


def _cause(s: Service, id: str, text: str, evidence: tuple[str, ...], remedy: str) -> Cause:
    return Cause(
        id=id,
        text=text,
        evidence=evidence,
        share=s.share,
        proto=s.c.proto,
        port=s.c.port,
        netns=s.c.netns,
        remedy=remedy,
    )


# -- one service --------------------------------------------------------------


def tunnel(s: Service, facts: Facts) -> Optional[Cause]:
    """An overlay's outer packets: their inner flows are what is worth tracking."""
    del facts
    name = TUNNELS.get(s.c.port or 0) if s.c.proto == "udp" else None
    if name is None and s.c.proto in TUNNEL_PROTOS:
        name = s.c.proto.upper()
    if name is None:
        return None
    one_way = s.c.unreplied is not None and s.c.unreplied >= 0.5
    evidence = [f"{s.c.key} is {name}", _held(s)]
    if s.c.unreplied is not None:
        evidence.append(f"{percent(s.c.unreplied)} of {s.basis} never saw a reply")
    how = ", one-way" if one_way else ""
    return _cause(
        s, "tunnel",
        f"{s.of}: {percent(s.share)} of the table is {name} tunnel underlay{how}; "
        "the flows inside are tracked on their own",
        tuple(evidence),
        "do not track the underlay: NOTRACK this port in both directions",
    )  # fmt: skip


def loopback_probes(s: Service, facts: Facts) -> Optional[Cause]:
    """Short connections that never leave the host."""
    del facts
    short = s.c.life.p50 is not None and s.c.life.p50 < 1.0
    if s.c.direction != "loopback" or s.c.proto != "tcp" or not short or s.judged < ENDED:
        return None
    return _cause(
        s, "loopback-probes",
        f"{s.of}: {percent(s.share)} of the table is loopback connections "
        f"(life p50 {duration(s.c.life.p50)}, held {s.held_for})",
        (_held(s), f"to {s.c.dst or 'loopback addresses'}, direction loopback", _ends(s)),
        "do not track the loopback interface, or probe over one kept connection",
    )  # fmt: skip


def dns_storm(s: Service, facts: Facts) -> Optional[Cause]:
    """Look-ups: every query is a flow that stays for the UDP timeout."""
    del facts
    if s.c.port != 53 or s.c.proto != "udp" or (s.c.new_per_s <= 0 and s.c.inserts < 100):
        return None
    return _cause(
        s, "dns-storm",
        f"{s.of}: {percent(s.share)} of the table is DNS look-ups "
        f"({s.c.new_per_s:,.0f}/s, life p50 {duration(s.c.life.p50)}, "
        f"held {duration(s.c.residence.p50)})",
        (_held(s), _ends(s), f"{percent(s.c.unreplied)} of {s.basis} never saw a reply"),
        "a caching resolver on the host, fewer search domains, or NOTRACK for port 53",
    )  # fmt: skip


def one_way_udp(s: Service, facts: Facts) -> Optional[Cause]:
    """Datagrams that nobody answers: metrics, logs, telemetry."""
    del facts
    if s.c.proto not in ("udp", "udplite") or s.judged < ENDED:
        return None
    if s.c.unreplied is None or s.c.unreplied < 0.9:
        return None
    return _cause(
        s, "one-way-udp",
        f"{s.of}: {percent(s.share)} of the table is one-way UDP "
        f"(no reply to {percent(s.c.unreplied)}"
        f"{'' if s.held_for == UNKNOWN else f', held {s.held_for}'})",
        (_held(s), f"{percent(s.c.unreplied)} of {s.basis} never saw a reply",
         _ends(s)),
        "NOTRACK this port: there is no reply to match; or send from one fixed source port",
    )  # fmt: skip


def syn_flood(s: Service, facts: Facts) -> Optional[Cause]:
    """Many half-open connections: a flood of forged sources, or a scan."""
    del facts
    if s.c.proto != "tcp" or s.c.inserts < 500:
        return None
    # A listening port answers a forged SYN too; only the handshake's last packet makes ASSURED.
    unfinished = 1 - s.c.assured if s.c.assured is not None else 0.0
    half_open = s.judged >= ENDED and max(s.c.unreplied or 0.0, unfinished) >= 0.8
    per_source = s.c.inserts / max(1, s.sources)
    fresh = s.judged < ENDED and s.sources >= 5000 and per_source < 1.3
    if not (half_open or fresh):
        return None
    if s.sources < 100 and not half_open:
        return None
    if half_open:
        seen = f"{percent(unfinished)} of {s.basis} never completed the handshake, "
        seen += f"{percent(s.c.unreplied)} never saw a reply"
    else:
        seen = f"{per_source:.2f} connections per source, and none of {s.c.inserts:,} has ended yet"
    what = "SYN flood" if s.sources >= 100 else "scan or unanswered SYNs"
    return _cause(
        s, "syn-flood",
        f"{s.c.key}{s.where}: {percent(s.share)} of the table is half-open connections "
        f"from about {s.sources:,} sources ({what}, {s.c.new_per_s:,.0f}/s)",
        (seen, f"about {s.sources:,} distinct sources (estimated)", _held(s)),
        "drop it before conntrack: raw table or ingress rate limit, SYN proxy",
    )  # fmt: skip


def no_keepalive(s: Service, facts: Facts) -> Optional[Cause]:
    """Short TCP connections whose closed entries wait out TIME_WAIT."""
    del facts
    c = s.c
    if c.proto != "tcp" or s.judged < ENDED or c.closed is None or c.closed < 0.6:
        return None
    life = c.life.p50
    residence = c.residence.p50 if c.residence.p50 is not None else s.stays
    if life is None or residence is None or life > SHORT_LIFE or residence < 4 * life:
        return None
    return _cause(
        s, "no-keepalive",
        f"{s.of}: {percent(s.share)} of the table is closed connections waiting out TIME_WAIT "
        f"(life p50 {duration(life)}, held {s.held_for})",
        (_held(s), f"{percent(c.closed)} of {s.basis} were in TIME_WAIT or CLOSE",
         f"life p50 {duration(life)}, p99 {duration(c.life.p99)}; "
         f"residence p50 {duration(residence)}, p99 {duration(c.residence.p99)}"),
        "keep connections open (keep-alive, pooling), or shorten "
        "nf_conntrack_tcp_timeout_time_wait, or NOTRACK this port",
    )  # fmt: skip


def idle_established(s: Service, facts: Facts) -> Optional[Cause]:
    """Connections that nobody closed: they stay for days."""
    c = s.c
    if c.proto != "tcp" or c.held < 50 or not c.assured or c.assured < 0.6:
        return None
    if c.closed is not None and c.closed >= 0.5:
        return None
    leaving = c.destroys / max(1.0, facts.uptime) * 60 / c.held
    if leaving > 0.02:  # more than 2 % of them go per minute: they do end
        return None
    old = c.older >= 0.5 * c.held
    expired_open = sum(n for state, n in c.states if state == "ESTABLISHED")
    if not old and expired_open < max(5, 0.5 * c.destroys):
        return None
    return _cause(
        s, "idle-established",
        f"{s.of}: {percent(s.share)} of the table is long-lived ESTABLISHED connections "
        f"({c.held:,} held, {100 * leaving:.2f} % of them end per minute)",
        (_held(s), f"{percent(c.assured)} ASSURED: early_drop can't evict them",
         f"{c.older:,} are older than ctrace" if c.older else _ends(s)),
        "close idle connections, TCP keep-alive below the timeout, or a lower "
        "nf_conntrack_tcp_timeout_established",
    )  # fmt: skip


PER_SERVICE: Final[tuple[Recogniser, ...]] = (
    tunnel, loopback_probes, dns_storm, one_way_udp, syn_flood, no_keepalive, idle_established,
)  # fmt: skip
"""The first that fits a service names it: from the most specific to the least."""


# -- whole tables -------------------------------------------------------------


def clash(facts: Facts) -> Iterator[Cause]:
    """Inserts fail though there is room: two packets of one flow raced."""
    for t in facts.tables:
        failed = t.totals.insert_failed
        if failed < 5 or t.fill >= LOW_FILL or t.totals.drop or not t.max:
            continue
        if failed < 0.0005 * max(1, t.totals.insert):
            continue
        dns = facts.failed_dns >= 0.5 * max(1, facts.failed) and facts.failed > 0
        what = "DNS look-ups (A and AAAA at once from one port)" if dns else "racing packets"
        yield Cause(
            id="clash",
            text=f"{t.name}: {failed:,} inserts lost a race at {percent(t.fill)} fill: {what}",
            evidence=(
                f"{failed:,} insert_failed of {t.totals.insert:,} inserts",
                f"{t.count:,} of {t.max:,} entries, no table-full drops",
                f"{facts.failed_dns:,} of {facts.failed:,} failures seen are to port 53",
            ),
            netns=t.netns,
            proto="udp" if dns else "",
            port=53 if dns else None,
            remedy="a local caching resolver, single-request-reopen, TCP for DNS, or NOTRACK "
            "for port 53" if dns else "spread the flow's first packets over one CPU or queue",
        )  # fmt: skip


def other_netns(facts: Facts) -> Iterator[Cause]:
    """One namespace is full while the host's own table has room."""
    if len(facts.tables) < 2:
        return
    roomy = [t for t in facts.tables if t.max and t.fill < LOW_FILL and t.full_since is None]
    host = next((t for t in facts.tables if t.name == "init"), None)
    if not roomy or (host is not None and host not in roomy):
        return
    beside = host or roomy[-1]
    for t in facts.tables:
        if t is beside or not t.max:
            continue
        if t.full_since is None and t.fill < 0.98:
            continue
        full = "full" if t.full_since is not None or t.count >= t.max else "nearly full"
        yield Cause(
            id="other-netns",
            text=f"namespace {t.name} is {full} ({t.count:,} of {t.max:,}) while {beside.name} "
            f"is at {percent(beside.fill)}: the limit holds for each namespace by itself",
            evidence=(
                f"{t.name}: {t.rates.drop:,.0f} refused/s, {t.rates.early_drop:,.0f} evicted/s",
                f"{beside.name}: {beside.count:,} of {beside.max:,}",
            ),
            share=1.0,
            netns=t.netns,
            remedy="look at that namespace's culprits; nf_conntrack_max is set once, in init",
        )


def scans(facts: Facts) -> Iterator[Cause]:
    """One source behind half-open connections to many services or hosts."""
    group = facts.src
    for at in group.order("held", 3):
        c = group.culprit(int(at), facts.ticks)
        if c.share < SHARE or c.inserts < 500 or c.destroys < ENDED:
            continue
        if (c.unreplied or 0) < 0.8 or c.assured is None or c.assured > 0.1:
            continue
        services = np.flatnonzero(
            (group.key[int(at), :2] == facts.pair.key[:, :2]).all(axis=1)
        ).size
        if services < 50:
            continue
        table = next((t for t in facts.tables if t.netns == c.netns), None)
        yield Cause(
            id="syn-flood",
            text=f"{c.src}: {percent(c.share)} of the table is unanswered connections to "
            f"{services:,} services (a scan, {c.new_per_s:,.0f}/s)",
            evidence=(
                f"{percent(c.unreplied)} of {c.destroys:,} ended never saw a reply",
                f"{c.held:,} entries held" + (f" of {table.count:,}" if table else ""),
            ),
            share=c.share,
            netns=c.netns,
            remedy="drop this source before conntrack, in the raw table or at ingress",
        )


def scattered(facts: Facts, found: list[Cause]) -> Iterator[Cause]:
    """More sources than can be named, each with hardly an entry, to no service above all."""
    src, space = facts.src, facts.space
    if not src.floor:
        return  # every source has a row
    for at in space.order("held", SHOWN):
        c = space.culprit(int(at), facts.ticks)
        if c.inserts < 500 or sum(one.share for one in found if one.netns == c.netns) >= 0.5:
            continue
        named = int(src.held[src.inside(c.netns)].sum())
        share = 1 - named / c.held if c.held else 0.0
        unfinished = 1 - c.assured if c.assured is not None else 0.0
        half_open = max(c.unreplied or 0.0, unfinished) >= 0.8
        if share < SHARE or (c.destroys >= ENDED and not half_open):
            continue
        seen = f"none of {c.inserts:,} has ended yet"
        if c.destroys >= ENDED:
            seen = f"{percent(c.unreplied)} of {c.destroys:,} ended never saw a reply"
        where = f"{c.netns_name}: " if len(facts.tables) > 1 else ""
        yield Cause(
            id="syn-flood",
            text=f"{where}{percent(share)} of the table belongs to about {src.distinct:,} sources "
            f"with hardly an entry each, to many services (scan or flood, {c.new_per_s:,.0f}/s)",
            evidence=(
                seen,
                f"about {src.distinct:,} distinct sources (estimated), too many to name",
                f"{c.held - named:,} of {c.held:,} entries are theirs",
            ),
            share=share,
            netns=c.netns,
            remedy="drop it before conntrack: raw table or ingress rate limit",
        )


def too_small(facts: Facts, found: list[Cause]) -> Iterator[Cause]:
    """A full table whose load looks like honest work."""
    for t in facts.tables:
        if not t.max or (t.fill < NEARLY_FULL and t.full_since is None):
            continue
        explained = sum(c.share for c in found if c.netns == t.netns)
        if explained >= 0.5:
            continue
        replied, ended = _replied(facts, t.netns)
        if ended < ENDED or replied < 0.7:
            continue
        stay = t.count / t.rates.destroy if t.rates.destroy else None
        text = f"{t.name}: {t.max:,} entries are too few for this load"
        if stay and t.rates.insert:
            needed = t.rates.insert * stay
            text += f": {t.rates.insert:,.0f} new/s, each held {duration(stay)}, need {needed:,.0f}"
        yield Cause(
            id="too-small",
            text=text,
            evidence=(
                f"{t.count:,} of {t.max:,} entries ({percent(t.fill)})",
                f"{percent(replied)} of {ended:,} ended entries had replies",
                f"no single shape explains more than {percent(explained)}",
            ),
            share=1.0 - explained,
            netns=t.netns,
            remedy="raise nf_conntrack_max (and the buckets) after looking at its memory",
        )


def _replied(facts: Facts, netns: int) -> tuple[float, int]:
    mine = facts.space.inside(netns)
    ended = float(facts.space.sums["destroys"][mine].sum())
    unreplied = float(facts.space.sums["unreplied"][mine].sum())
    return (1 - unreplied / ended if ended else 0.0), int(ended)


def explain(facts: Facts) -> tuple[Cause, ...]:
    """Every cause that fits, the one that explains most first; never empty."""
    found: list[Cause] = []
    for s in services(facts):
        if s.share < SHARE:
            continue
        for recognise in PER_SERVICE:
            cause = recognise(s, facts)
            if cause:
                found.append(cause)
                break
    found += scans(facts)
    found += scattered(facts, found)
    fill = {table.netns: table.fill for table in facts.tables}
    # A share of a nearly empty table explains little: by entries, where limits are alike.
    found.sort(key=lambda cause: -cause.share * fill.get(cause.netns, 1.0))
    found += too_small(facts, found)
    found = [*other_netns(facts), *clash(facts), *found]
    return tuple(found[:SHOWN]) or (_unknown(facts),)


def services(facts: Facts) -> Iterator[Service]:
    """The services that hold most, each with its part of its own table."""
    group, pair = facts.service, facts.pair
    use_held = group.total_held >= ENDED
    weight = group.held.astype(float) if use_held else group.table_seconds
    for at in group.order("held", LOOKED_AT):
        netns = int(group.key[at, 2]) >> 32
        whole = max(float(weight[group.inside(netns)].sum()), facts.whole(netns, use_held))
        culprit = group.culprit(int(at), facts.ticks)
        table = next((t for t in facts.tables if t.netns == netns), None)
        mine = np.flatnonzero(pair.key[:, 2] == group.key[at, 2])
        top, top_share, sources = "", 0.0, mine.size
        if mine.size:
            parts = pair.held[mine].astype(float) if use_held else pair.table_seconds[mine]
            best = int(parts.argmax())
            top = pair.address(int(mine[best]))
            top_share = float(parts[best]) / max(1.0, float(weight[at]))
        estimate = culprit.distinct_src
        if pair.floor and estimate is not None:
            sources = max(sources, estimate)
        looks, stays = group.looks(int(at))
        where = f" in {table.name}" if table and len(facts.tables) > 1 else ""
        yield Service(
            culprit, table, float(weight[at]) / whole if whole else 0.0, where, top, top_share,
            int(sources), looks["young"], stays,
        )  # fmt: skip


def _unknown(facts: Facts) -> Cause:
    first = next(services(facts), None)
    if first is None:
        return Cause(
            id="unknown", text="nothing tracked yet: no entry has come or gone since the start"
        )
    times = (("life p50", first.c.life.p50), ("held", first.c.residence.p50))
    known = [f"{name} {duration(value)}" for name, value in times if value is not None]
    return Cause(
        id="unknown",
        text=f"no known shape fits; most is {first.of}: {percent(first.share)} of the table "
        f"({', '.join([f'{first.c.new_per_s:,.0f} new/s', *known])})",
        evidence=(_held(first), _ends(first)),
        share=first.share,
        proto=first.c.proto,
        port=first.c.port,
        netns=first.c.netns,
    )
