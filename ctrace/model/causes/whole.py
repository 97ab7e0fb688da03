"""Causes that concern a whole table: full, too small, INVALID packets, unknown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Optional

import numpy as np

from ctrace.model import remedies
from ctrace.model.causes.facts import SHARE, Facts, services
from ctrace.model.causes.room import LOW_FILL, NEARLY_FULL
from ctrace.model.causes.service import ENDED, Service
from ctrace.model.causes.strays import UNSAID
from ctrace.model.causes.words import (
    UNKNOWN,
    duration,
    entries,
    pace,
    percent,
    plural,
    stay,
    when,
    where,
)
from ctrace.model.snapshot import Cause, Remedy, Table

INVALID: Final = 100
"""INVALID packets below which nothing is said."""
LITTLE: Final = 0.1
"""Fill below which a table that refuses nothing needs no explanation."""
MUCH: Final = 0.5
"""Share of a table that is worth a line if no known cause fits it;"""
SOME: Final = 100
"""if it holds so many entries."""
LARGER: Final = 1.5
"""How many times larger a table is proposed. Refused flows are retried, so their number is not what
is lacking."""
INVALID_PART: Final = 0.05
"""INVALID packets per insert from which they are worth a line."""


def other_netns(facts: Facts) -> Iterator[Cause]:
    """Some namespaces are full while the host's own table has room."""
    if len(facts.tables) < 2:
        return
    roomy = [t for t in facts.tables if t.max and t.fill < LOW_FILL and t.full_since is None]
    host = next((t for t in facts.tables if t.name == "init"), None)
    if not roomy or (host is not None and host not in roomy):
        return
    beside = host or roomy[-1]
    full = [
        t
        for t in facts.tables
        if t is not beside and t.max and (t.full_since is not None or t.fill >= 0.98)
    ]
    if not full:
        return
    names = ", ".join(t.name for t in full[:3]) + (", ..." if len(full) > 3 else "")
    first = full[0]
    state = "full" if any(_is_full(t) for t in full) else "nearly full"
    subject = f"namespace {names} is" if len(full) == 1 else f"{len(full)} namespaces ({names}) are"
    yield Cause(
        id="other-netns",
        text=f"{subject} {state} ({first.count:,} of {first.max:,}) while {beside.name} "
        f"is at {percent(beside.fill)}: the limit applies to each namespace separately",
        evidence=(
            *(
                f"{t.name}: {t.count:,} of {t.max:,}"
                + (
                    f", {t.rates.drop:,.0f} refused/s, {t.rates.early_drop:,.0f} evicted/s"
                    if facts.changes
                    else ""
                )
                for t in full
            ),
            f"{beside.name}: {beside.count:,} of {beside.max:,}",
        ),
        share=1.0,
        netns=first.netns if len(full) == 1 else 0,
        remedies=(
            Remedy(
                "look",
                "look at that namespace's culprits; nf_conntrack_max is set once, in init",
                first.netns,
            ),
        ),
    )


def _is_full(t: Table) -> bool:
    return t.full_since is not None or t.count >= t.max


def too_small(facts: Facts, found: list[Cause]) -> Iterator[Cause]:
    """A full table whose load looks like honest work."""
    for t in facts.tables:
        if not at_limit(t):
            continue
        explained = sum(c.share for c in found if c.netns == t.netns)
        if explained >= 0.5:
            continue
        replied, ended = _replied(facts, t.netns)
        if ended < ENDED or replied < 0.7:
            continue
        known = ", ".join(one for one in (pace(t.rates.insert, "new/s"), _stay(facts, t)) if one)
        helps = remedies.larger(t, LARGER * t.max)
        yield Cause(
            id="too-small",
            text=f"{t.name}: {t.max:,} entries are too few for this load"
            + (f" ({known})" if known else ""),
            evidence=(
                f"{t.count:,} of {t.max:,} entries ({percent(t.fill)})",
                f"{percent(replied)} of {ended:,} ended entries had replies",
                f"no single cause explains more than {percent(explained)}",
            ),
            share=1.0 - explained,
            netns=t.netns,
            remedies=(helps,) if helps else (),
        )


def unexplained(facts: Facts, found: list[Cause]) -> Iterator[Cause]:
    """What the causes found leave open: the greater part of a table, or all of a full one."""
    largest: Optional[list[Service]] = None
    for t in sorted(facts.tables, key=lambda t: -t.fill):
        mine = [c for c in found if c.netns == t.netns and c.share > 0]
        left = 1.0 - sum(c.share for c in mine)
        if left <= MUCH or t.netns in facts.gone or t.count < SOME:
            continue
        if not mine and (len(facts.tables) < 2 or not at_limit(t)):
            continue  # where nothing else is said, this comes as unknown
        largest = list(services(facts)) if largest is None else largest
        named = {(c.proto, c.port) for c in mine}
        first = next(
            (s for s in largest if s.c.netns == t.netns and (s.c.proto, s.c.port) not in named),
            None,
        )
        most = f"most is {first.of}: {percent(first.share)}" if first else "in no known service"
        if first and first.share < SHARE:
            most = f"no service has more than {percent(first.share)}"
        yield Cause(
            id="unknown",
            text=f"{percent(left)} of {t.count:,} entries{facts.where(t.netns)} fit no known "
            f"cause; {most}",
            evidence=(f"the causes named explain {percent(1 - left)}",),
            share=left,
            netns=t.netns,
        )


def at_limit(t: Table) -> bool:
    """Whether a table is full, or nearly."""
    return bool(t.max) and (t.full_since is not None or t.fill >= NEARLY_FULL)


def _stay(facts: Facts, table: Table) -> str:
    """``their entries stay 20 s``, of a whole table; empty where it is not known."""
    for at in np.flatnonzero(facts.space.inside(table.netns)).tolist():
        said = stay(facts.space.residence(at))
        return f"their entries stay {said}" if said != UNKNOWN else ""
    return ""


def _replied(facts: Facts, netns: int) -> tuple[float, int]:
    mine = facts.space.inside(netns)
    ended = float(facts.space.sums["destroys"][mine].sum())
    unreplied = float(facts.space.sums["unreplied"][mine].sum())
    return (1 - unreplied / ended if ended else 0.0), int(ended)


def logged(facts: Facts) -> Iterator[Cause]:
    """The host's own log says that the table was full, whatever it held when it was read."""
    log = facts.logged
    if log is None:
        return
    text = (
        f"the table was full{where(log)} {when(log)}, by the host's own log: at least "
        f"{plural(log.refused, 'packet')} refused"
    )
    calm = [t for t in facts.tables if t.max and t.full_since is None and t.fill < NEARLY_FULL]
    if calm and len(calm) == len(facts.tables):
        fill = percent(max(t.fill for t in calm))
        what = "may be another table" if log.netns else "is from another moment"
        text += f"; what was read {what}, at {fill} fill"
    yield Cause(
        id="logged-full",
        text=text,
        evidence=(
            f"{plural(log.full, 'message')} that the table was full, dropping packet",
            f"{log.refused - log.full:,} more were suppressed next to them; that limit counts all "
            "of networking's warnings"
            if log.refused > log.full
            else "none was suppressed",
            "a log does not say whose packets they were",
        ),
        share=1.0,
    )


def invalid(facts: Facts) -> Iterator[Cause]:
    """Packets that belong to no entry: only the kernel's log shows which flows they belong to."""
    for t in facts.tables:
        if t.invalid < INVALID or t.invalid < INVALID_PART * t.totals.insert:
            continue
        setting = "net.netfilter.nf_conntrack_log_invalid"
        yield Cause(
            id="invalid",
            text=f"{t.name}: {plural(t.invalid, 'packet')} were INVALID, against "
            f"{t.totals.insert:,} new entries{UNSAID}",
            evidence=(
                f"{t.invalid:,} more INVALID packets in conntrack -S",
                "no entry, out of the window, a bad checksum, or one direction untracked",
            ),
            netns=t.netns,
            remedies=(
                Remedy(
                    "look",
                    "let the kernel log them (nf_conntrack_log_invalid)",
                    t.netns,
                    commands=(f"sysctl -w {setting}=255",),
                    undo=(f"sysctl -w {setting}=0",),
                ),
            ),
        )


def unknown(facts: Facts) -> Cause:
    """What is in the table, where no pattern fits: never a guess."""
    first = next(services(facts), None)
    if first is None and facts.gone:
        went = "namespace has" if len(facts.gone) == 1 else f"{len(facts.gone)} namespaces have"
        return Cause(id="unknown", text=f"nothing is held: the {went} gone with all entries")
    if first is None and facts.service.n:
        return _nothing(facts)
    if first is None:
        return Cause(
            id="unknown",
            text="nothing tracked yet: no entry has come or gone since the start"
            if facts.changes
            else "no entries are in the texts: what held the table is not known",
        )
    most = _most(first, facts)
    if not most:
        return _nothing(facts)
    return shapeless(first, most)


def _nothing(facts: Facts) -> Cause:
    held = sum(table.count for table in facts.tables)
    if held:
        some = f"{entries(held)} {'is' if held == 1 else 'are'} held"
        return Cause(id="unknown", text=f"{some}, and too little was seen to say why")
    if not all(table.read for table in facts.tables):
        return Cause(id="unknown", text="nothing that came is left; what was there is not known")
    return Cause(id="unknown", text="nothing is held: what came has gone, or was refused")


def _most(first: Service, facts: Facts) -> str:
    """What most of the table is, or was while it held something; empty where nothing is held."""
    if first.share >= SHARE and not facts.by_held:
        now = entries(first.table.count) if first.table and first.table.count else "nothing"
        held = (
            "held now" if first.table is None or first.table.read else "of those that came is left"
        )
        return f"{now} {held}, most of what was is {first.of}"
    if first.share >= SHARE:
        return f"most is {first.of}: {first.part}"
    most = _protocol(facts, first.c.netns)
    return f"most is {most}" if most else ""


def shapeless(s: Service, most: str) -> Cause:
    """States that no known cause fits, what most of the table is, and its largest service."""
    times = (("they live", s.c.life.p50), ("their entries stay", s.c.residence.p50))
    known = [f"{words} {duration(value)}" for words, value in times if value is not None]
    if not s.changes and s.c.states:
        (state, n), looked = s.c.states[0], sum(n for _, n in s.c.states)
        known.append(f"{n:,} of {looked:,} looked at in {state}")
    rate = ", ".join([*s.pace("new/s"), *known])
    return s.cause(
        "unknown",
        f"{_verdict(s.table, s.changes)}; {most}" + (f" ({rate})" if rate else ""),
        (s.held_line, s.ends_line),
    )


def _verdict(table: Optional[Table], changes: bool) -> str:
    if table is None or not table.max or table.fill >= LITTLE or table.totals.drop:
        return "no known cause fits"
    if not changes:
        return f"{100 * table.fill:.1f} % full when it was read"
    return f"nothing to explain at {100 * table.fill:.1f} % fill"


def _protocol(facts: Facts, netns: int) -> str:
    """``41 % udp to 12,000 ports``, for a table in which no service stands out."""
    group = facts.service
    held: dict[str, list[int]] = {}
    for at in range(group.n):
        if int(group.key[at, 2]) >> 32 == netns and group.held[at]:
            held.setdefault(group.label(at).partition("/")[0], []).append(int(group.held[at]))
    whole = max(1.0, facts.whole(netns, held=True))
    if not held:
        return ""
    name = max(held, key=lambda proto: sum(held[proto]))
    ports = f" to {plural(len(held[name]), 'port')}" if name in ("tcp", "udp") else ""
    return f"{percent(sum(held[name]) / whole)} {name}{ports}{facts.where(netns)}"
