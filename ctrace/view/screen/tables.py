"""Which columns the tables of culprits, victims and namespaces have."""

from __future__ import annotations

from typing import Final, Optional

from rich.style import Style

from ctrace.batch import inode_of
from ctrace.model.snapshot import Culprit, Ends, OwnerView, Table, Victim
from ctrace.view import format as fmt
from ctrace.view.columns import Column
from ctrace.view.palette import Palette
from ctrace.view.verdict import at_limit, state_word

GROUP_HEADS: Final = {
    "who": "who holds most",
    "src": "sources",
    "prefix": "prefixes of sources",
    "dst": "destinations",
    "ports": "ranges of ports",
    "proto": "protocols",
    "direction": "directions",
    "service": "services",
    "pair": f"source {fmt.ARROW} service",
    "process": "processes",
    "container": "containers",
    "pod": "pods of sources",
    "pod-namespace": "namespaces of pods",
    "netns": "namespaces",
}


def who(owner: Optional[OwnerView], width: int) -> str:
    """The process, with its unit or container in front where there is room."""
    if owner is None:
        return fmt.UNKNOWN
    comm = fmt.clean(owner.comm)
    # Of a cgroup's path the last part tells most; the detail page has the whole.
    unit = fmt.clean(owner.unit.rpartition("/")[2]).removeprefix("docker:")
    unit = unit.removesuffix(".service")
    if unit and unit != comm and width > len(comm) + 5:
        return fmt.cut(unit, width - len(comm) - 1) + "/" + comm
    return fmt.cut(comm, width)


def pod(name: str, width: int) -> str:
    """A pod, by its own name where there is no room for its namespace."""
    name = fmt.clean(name).removeprefix("k8s:").removeprefix("docker:")
    short = name if len(name) <= width else name.rpartition("/")[2]
    return fmt.cut(short, width) or fmt.UNKNOWN


def shown(culprit: Culprit, width: int) -> str:
    """A row's key, with the number of its scattered parts where that is known and fits."""
    words = fmt.prose(culprit.words)
    return words if words and len(words) <= width else fmt.key(culprit.key, width)


def how_they_end(ends: Ends, width: int) -> str:
    """``expired 76 %, evicted 24 %``: the first two reasons, the second if it fits."""
    counted = [
        ("expired", ends.expired),
        ("evicted", ends.evicted),
        ("deleted", ends.deleted),
        ("other", ends.other),
    ]
    total = sum(n for _, n in counted)
    if not total:
        return fmt.UNKNOWN
    counted.sort(key=lambda pair: -pair[1])
    words = [f"{name} {fmt.share(n / total)}" for name, n in counted if n / total >= 0.005]
    both = ", ".join(words[:2])
    return both if len(both) <= width else words[0]


def _drop_style(number: float, palette: Palette) -> Style:
    return palette.bad if number else palette.dim


def culprit_columns(
    group: str, many_namespaces: bool, trouble: bool = True
) -> tuple[Column[Culprit], ...]:
    """The culprits' table: where it goes, how much it holds, why that is so much.

    Without ``trouble`` a large share is nothing to alarm anyone.
    """

    def share_style(culprit: Culprit, palette: Palette) -> Style:
        if not trouble or culprit.share < 0.2:
            return palette.text
        return palette.bad if culprit.share >= 0.5 else palette.warn

    def dim(_: Culprit, palette: Palette) -> Style:
        return palette.dim

    def netns_shown(_: Culprit) -> bool:
        return many_namespaces and group != "netns"

    columns: tuple[Column[Culprit], ...] = (
        Column(
            "key", GROUP_HEADS[group], shown, 0, 27, 60, False,
            lambda c, p: p.strong if c.share >= 0.2 else p.text,
        ),
        Column("who", "WHO", lambda c, w: who(c.owner, w) if c.owner else pod(c.pod, w), 3, 8, 28,
               False, when=lambda c: bool(c.owner or c.pod) and group not in ("process",)),
        Column("netns", "NETNS", lambda c, w: fmt.cut(fmt.clean(c.netns_name), w), 8, 8, 16, False,
               dim, when=netns_shown),
        Column("way", "WAY", lambda c, _: c.direction or fmt.UNKNOWN, 10, 4, 0, False, dim),
        Column("new", "NEW/s", lambda c, _: fmt.rate(c.new_per_s), 1, 6, sort="new"),
        Column("life", "LIFE", lambda c, _: fmt.duration(c.life.p50), 2, 6, sort="life"),
        Column("life99", "p99", lambda c, _: fmt.duration(c.life.p99), 12, 6, style=dim),
        Column("stays", "IN TABLE", lambda c, _: fmt.stays(c.residence), 2, 6,
               sort="residence"),
        Column("held", "HELD", lambda c, _: fmt.held(c), 0, 6, sort="held",
               style=lambda c, p: p.strong if c.share >= 0.2 else p.text),
        Column("share", "SHARE", lambda c, _: fmt.share(c.share), 0, 6, style=share_style),
        Column("bar", "OF TABLE", lambda c, w: fmt.hbar(c.share, w), 7, 10, 10, False,
               lambda c, p: p.area_bad if trouble and c.share >= 0.5 else p.area),
        Column("trend", "1 MINUTE", lambda c, w: fmt.sparkline(c.trend, min(w, 12)), 6, 12, 12,
               False, lambda _, p: p.area),
        Column("drops", "DROP/s", lambda c, _: fmt.rate(c.drop_per_s), 4, 6, sort="drops",
               style=lambda c, p: _drop_style(c.drop_per_s, p), when=lambda c: c.drops > 0),
        Column("nat", "NAT", lambda c, _: c.nat or fmt.UNKNOWN, 5, 3, 0, False,
               lambda c, p: p.dim if c.nat in ("", "no") else p.warn),
        Column("ends", "HOW THEY END", lambda c, w: how_they_end(c.ends, w), 9, 14, 26, False, dim),
        Column("assured", "PINNED", lambda c, _: fmt.share(c.assured), 11, 6, style=dim),
        Column("unreplied", "ONE-WAY", lambda c, _: fmt.share(c.unreplied), 13, 6, style=dim),
        Column("inserts", "ENTRIES", lambda c, _: fmt.count(c.inserts), 14, 7, style=dim),
        Column("error", "±", lambda c, _: fmt.count(c.error), 4, 6,
               style=lambda _, p: p.warn, when=lambda c: c.error > 0),
        Column("older", "OLDER", lambda c, _: fmt.count(c.older), 15, 6, style=dim,
               when=lambda c: c.older > 0),
        Column("sources", "SOURCES", lambda c, _: _number(c.distinct_src), 16, 7, style=dim,
               when=lambda c: (c.distinct_src or 0) > 1),
    )  # fmt: skip
    return columns


def _number(value: Optional[int]) -> str:
    return fmt.UNKNOWN if value is None else fmt.count(value)


def victim_columns(many_namespaces: bool) -> tuple[Column[Victim], ...]:
    """The victims' table: who was refused, how often, and which process was told EPERM."""

    def dim(_: Victim, palette: Palette) -> Style:
        return palette.dim

    columns: tuple[Column[Victim], ...] = (
        Column("key", "refused or evicted", lambda v, w: fmt.key(v.key, w), 0, 30, 64, False),
        Column("who", "GOT EPERM", _eperm, 1, 14, 30, False,
               lambda v, p: p.text if v.owner else p.dim),
        Column("pod", "POD", lambda v, w: pod(v.pod, w), 2, 8, 28, False,
               when=lambda v: bool(v.pod)),
        Column("netns", "NETNS", lambda v, w: fmt.cut(fmt.clean(v.netns_name), w), 6, 8, 16, False,
               dim, when=lambda _: many_namespaces),
        Column("rate", "DROP/s", lambda v, _: fmt.rate(v.drop_per_s), 1, 6, sort="drops",
               style=lambda v, p: _drop_style(v.drop_per_s, p)),
        Column("drops", "DROPPED", lambda v, _: fmt.count(v.drops), 0, 7,
               style=lambda v, p: _drop_style(v.drops, p)),
        Column("of", "REFUSED %", lambda v, _: fmt.share(v.share_of_new), 3, 6, style=dim),
        Column("evicted", "EVICTED", lambda v, _: fmt.count(v.evicted), 2, 7,
               style=lambda v, p: p.warn if v.evicted else p.dim),
        Column("failed", "LOST RACE", lambda v, _: fmt.count(v.failed), 5, 6, style=dim,
               when=lambda v: v.failed > 0),
    )  # fmt: skip
    return columns


def _eperm(victim: Victim, width: int) -> str:
    owner = victim.owner
    if owner is None:
        return fmt.UNKNOWN
    pid = f"[{owner.pid}]" if owner.pid else ""
    room = width - len(pid)
    if room < len(fmt.clean(owner.comm)):
        return who(owner, width)
    return who(owner, room) + pid


def namespace_columns() -> tuple[Column[Table], ...]:
    """The namespaces' table."""

    def dim(_: Table, palette: Palette) -> Style:
        return palette.dim

    columns: tuple[Column[Table], ...] = (
        Column("name", "", lambda t, w: fmt.cut(fmt.clean(t.name), w), 0, 16, 40, False),
        Column("state", "STATE", lambda t, _: state_word(t), 1, 8, 0, False,
               lambda t, p: p.bad if at_limit(t) else p.text),
        Column("fill", "FILL", lambda t, _: fmt.share(t.fill) if t.max else no_limit(t), 0, 6,
               style=lambda t, p: p.fill(t.fill, at_limit(t))),
        Column("bar", "", lambda t, w: fmt.hbar(t.fill, w), 5, 16, 16, False,
               lambda t, p: p.gauge(t.fill, at_limit(t))),
        Column("count", "ENTRIES", lambda t, _: fmt.count(t.count), 0, 7),
        Column("max", "LIMIT", lambda t, _: fmt.count(t.max) if t.max else no_limit(t), 3, 7,
               style=dim),
        Column("new", "NEW/s", lambda t, _: fmt.rate(t.rates.insert), 1, 6),
        Column("gone", "GONE/s", lambda t, _: fmt.rate(t.rates.destroy), 4, 6),
        Column("evicted", "EVICT/s", lambda t, _: fmt.rate(t.rates.early_drop), 2, 6,
               style=lambda t, p: p.warn if t.rates.early_drop else p.dim),
        Column("drops", "DROP/s", lambda t, _: fmt.rate(t.rates.drop), 2, 6,
               style=lambda t, p: _drop_style(t.rates.drop, p)),
        Column("dropped", "DROPPED", lambda t, _: fmt.count(t.totals.drop), 3, 7,
               style=lambda t, p: _drop_style(t.totals.drop, p)),
        Column("pinned", "PINNED", lambda t, _: fmt.share(t.pinned), 6, 6, style=dim),
        Column("off", "DIFFERS", lambda t, _: fmt.count(t.off_by.count), 7, 6, style=dim),
        Column("netns", "INODE", lambda t, _: str(inode_of(t.netns)), 8, 10, style=dim),
    )  # fmt: skip
    return columns


OF_CHANGES: Final = frozenset(("new", "life", "life99", "stays", "ends", "inserts", "older"))
"""Columns that say nothing where entries are not seen to come and go."""


def no_limit(table: Table) -> str:
    """Text in place of a limit, for a table without one or with one that was not read."""
    return "no limit" if table.max_known else "limit unknown"
