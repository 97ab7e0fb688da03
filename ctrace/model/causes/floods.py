"""Floods and scans: connections that are never completed, from many sources or from one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple, Optional

import numpy as np
import numpy.typing as npt

from ctrace.model import remedies
from ctrace.model.causes.facts import SHARE, Facts
from ctrace.model.causes.service import ENDED, OWNED, Service
from ctrace.model.causes.tcp import most_held_state, notrack
from ctrace.model.causes.words import pace, percent, plural
from ctrace.model.snapshot import Cause, Culprit
from ctrace.record import TCP, UDP

SOME: Final = 500
"""Connections below which nothing is called a flood or a scan."""
MANY: Final = 100
"""Sources from which a flood counts as coming from many."""
FRESH: Final = 5000
"""Sources with one connection each from which on it is a flood before any entry has ended."""
SPREAD: Final = 50
"""Services, or hosts, that one source must try before it is called a scan."""
AGAIN: Final = 3
"""Entries to each service of each host, on average, above which a source does not scan."""
SHOWN: Final = 5
MOSTLY: Final = 0.5
PART: Final = 0.1
FEW: Final = 20
"""Pairs examined to find the process that opened them."""
PICKED_UP: Final = ("ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT", "LAST_ACK", "TIME_WAIT")
"""States of connections that are past their handshake, or were taken up without one."""
_S32: Final = np.uint64(32)


class _Asked(NamedTuple):
    """What a source has entries to, of one protocol."""

    proto: int
    services: int
    held: int
    most: tuple[int, ...]
    """Ports that have :data:`PART` of the entries each, the busiest first."""
    busiest: float
    """The share of the busiest port."""


def half_open(c: Culprit, judged: int) -> bool:
    """Whether hardly any of its connections was completed.

    A listening port answers a forged SYN too; only the handshake's last packet makes an entry
    ASSURED. Refused connections are over at once, and hold nothing.
    """
    states = c.composition.states
    if states and states[0][0] in PICKED_UP:
        return False  # not begun here, and never answered here
    refused = sum(n for state, n in c.ended_states if state == "CLOSE")
    if judged <= c.destroys and refused >= 0.5 * c.destroys:
        return False
    unfinished = 1 - c.assured if c.assured is not None else 0.0
    return judged >= ENDED and max(c.unreplied or 0.0, unfinished) >= 0.8


def syn_flood(s: Service) -> Optional[Cause]:
    """Many half-open connections to one service: forged sources, or a client that keeps trying."""
    c = s.c
    if c.proto != "tcp" or max(c.inserts, c.held) < SOME or c.held < ENDED:
        return None
    open_ = half_open(c, s.judged)
    if open_ and one_sided(s):
        return _one_way(s)
    per_source = c.inserts / max(1, s.sources)
    fresh = s.changes and s.judged < ENDED and s.sources >= FRESH and per_source < 1.3
    if not (open_ or fresh):
        return None
    if open_:
        unfinished = 1 - c.assured if c.assured is not None else 0.0
        seen = f"{percent(unfinished)} of {s.basis} never completed the handshake, "
        seen += f"{percent(c.unreplied)} never saw a reply"
    else:
        seen = f"{per_source:.2f} connections per source, and none of {c.inserts:,} has ended yet"
    many = s.sources >= MANY
    if not many and (c.unreplied or 0.0) >= 0.8 and c.direction in ("out", "loopback"):
        return _unanswered(s, seen)
    mostly = s.top if s.top_share >= OWNED else ""
    who = f"about {plural(s.sources, 'source')}"
    if not many:
        who = mostly or plural(s.sources, "source")
    what = ", ".join(("SYN flood" if many else "scan or unanswered SYNs", *s.pace("new/s")))
    received = c.direction in ("in", "forward", "mixed")
    answered = (c.unreplied or 0.0) < 0.5
    return s.cause(
        "syn-flood",
        f"{c.key}{s.where}: {s.part} are half-open connections from {who} ({what})",
        (seen, f"about {s.sources:,} distinct sources (estimated)", s.held_line),
        remedies.syn_proxy(c) if many and received and s.nat == "no" else None,
        remedies.limit(c, c.held)
        if received and (many or _fast(s.changes, c, s.top_share))
        else None,
        remedies.timeout("tcp_timeout_syn_recv" if answered else "tcp_timeout_syn_sent", c.netns),
        remedies.drop_source(mostly, c.netns, c.held) if received and mostly else None,
    )


def one_sided(s: Service) -> bool:
    """Whether the connections go on unseen: what follows their SYNs is INVALID where no answer
    passes (an ACK in SYN_SENT, tcp_conntracks in nf_conntrack_proto_tcp.c)."""
    c, looked_at = s.c, sum(one.packets for one in s.strays)
    if (c.unreplied or 0.0) < 0.8:
        return False
    if looked_at >= ENDED:
        here = [one for one in s.strays if (one.proto, one.port) == (c.proto, c.port)]
        return sum(one.packets for one in here if one.why == "one-way") >= MOSTLY * looked_at
    # of one zone the others' entries tell nothing
    if s.table is None or (not s.zone and c.inserts < MOSTLY * s.table.totals.insert):
        return False
    return s.table.invalid >= max(0.8 * c.inserts, MANY)


def _one_way(s: Service) -> Cause:
    """Connections whose answers take another way, as a balancer with direct return has them."""
    assert s.table is not None
    unseen = "this host sees one direction only: no answer passes here"
    both = "let both directions pass this host"
    if s.zone:
        unseen = f"zone {s.zone} sees one direction only: no answer comes to it"
        both = f"let rules put both directions into zone {s.zone}"
    return s.cause(
        "one-way-tcp",
        f"{s.of}: {s.part} are connections of which {unseen}, and what follows their SYNs is "
        "INVALID",
        (
            f"{percent(s.c.unreplied)} of {s.basis} never saw a reply",
            f"{plural(s.table.invalid, 'packet')} were INVALID meanwhile: forged SYNs have none",
            s.held_line,
        ),
        remedies.change(both, s.c.netns, s.c.key),
        notrack(s),
        remedies.timeout("tcp_timeout_syn_sent", s.c.netns),
    )


def ack_flood(s: Service) -> Optional[Cause]:
    """Lone packets of connections that never were: each is taken up as an open one."""
    c, once = s.c, s.c.composition.once
    state, count, share = most_held_state(s)
    if state != "ESTABLISHED" or share < 0.8 or count < SOME or (c.unreplied or 0.0) < 0.8:
        return None
    if s.sources < MANY or c.held > 2 * s.sources or once is None or once < 0.8:
        return None
    return s.cause(
        "ack-flood",
        f"{c.key}{s.where}: {s.part} are lone packets of about {plural(s.sources, 'source')} that "
        f"belong to no connection ({', '.join(('ACK flood', *s.pace('new/s')))}): each is taken "
        "up as an open one",
        (
            f"{percent(c.unreplied)} of {s.basis} never saw a reply, and are ESTABLISHED",
            f"{percent(once)} of them had one packet",
            s.held_line,
        ),
        remedies.change(
            "set nf_conntrack_tcp_loose to 0 and drop INVALID packets, so that only a SYN begins "
            "an entry",
            c.netns,
            c.key,
        ),
        remedies.delete(c, count, state="ESTABLISHED", src=s.alone),
    )


def _unanswered(s: Service, seen: str) -> Cause:
    """A client that keeps asking and gets no answer."""
    nobody = f"{s.c.dst} does not answer" if s.c.dst else "nobody answers"
    return s.cause(
        "unanswered",
        f"{s.of}: {s.part} are connections that {nobody}"
        f"{''.join(f' ({pace})' for pace in s.pace('new/s'))}",
        (seen, s.held_line),
        remedies.change(f"find out why {nobody} on {s.c.key}", s.c.netns, s.c.key),
        remedies.timeout("tcp_timeout_syn_sent", s.c.netns),
    )


def udp_flood(s: Service) -> Optional[Cause]:
    """Datagrams from ever new sources, each with hardly an entry, and no answer: forged sources.

    Agents that send from where they are have an entry each too, but no new ones appear.
    """
    c = s.c
    if c.proto not in ("udp", "udplite") or max(c.inserts, c.held) < SOME:
        return None
    per_source = max(c.inserts, c.held) / max(1, s.sources)
    unreplied = c.unreplied is not None and s.judged >= ENDED and c.unreplied >= 0.9
    if not unreplied or not s.flooded(SOME) or c.new_per_s * 60 < c.held:
        return None
    return s.cause(
        "udp-flood",
        f"{f'{c.key}{s.where}' if c.port else s.of}: {s.part} are datagrams of about "
        f"{plural(s.sources, 'source')} that nobody answers "
        f"({', '.join(('UDP flood', *s.pace('new/s')))})",
        (
            f"{percent(c.unreplied)} of {s.basis} never saw a reply",
            f"{per_source:.2f} entries for each of about {s.sources:,} sources (estimated)",
            s.held_line,
        ),
        remedies.drop_service(c, c.held) if c.port else None,
        remedies.timeout("udp_timeout", c.netns),
    )


def scans(facts: Facts) -> Iterator[Cause]:
    """One source behind half-open connections to many services or hosts."""
    group = facts.src
    for at in group.order("held", 3).tolist():
        if group.held[at] < SHARE * group.total_held or group.unreplied(at) < 0.8:
            continue
        c = group.culprit(at)
        looks = group.looks(at)
        judged = max(c.destroys, looks["young"], c.composition.n)
        if max(c.inserts, c.held) < SOME or not half_open(c, judged):
            continue
        whole = facts.whole(c.netns, held=True)
        asked = max((_asked(facts, group.key[at], x) for x in (TCP, UDP)), key=lambda x: x.held)
        if asked.held < 0.8 * c.held:  # pings are no connections
            continue
        hosts = int(np.count_nonzero(facts.dst.inside(c.netns))) if c.held >= 0.8 * whole else 0
        if max(asked.services, hosts) < SPREAD:
            continue
        if hosts and not facts.dst.floor and c.held > AGAIN * asked.services * hosts:
            continue  # it asks the same ones again and again
        share = c.held / whole if whole else c.share
        yield _scan(facts, c, judged, share, asked, hosts)


def _scan(facts: Facts, c: Culprit, judged: int, share: float, asked: _Asked, hosts: int) -> Cause:
    """A source that scans, and what stops it: a process of this host is stopped where it runs."""
    table = facts.table(c.netns)
    held = table.count if table and table.count else c.held
    to = [plural(asked.services, "service")] + ([f"{hosts:,} hosts or more"] if hosts > 1 else [])
    here, tcp = c.direction in ("out", "loopback"), asked.proto == TCP
    owner = _opener(facts, c) if here else ""
    stop = remedies.drop_source(c.src, c.netns, c.held)
    if here:
        stop = remedies.change(f"stop or slow down {owner or c.src}, of this host", c.netns)
    slower = None
    if asked.most and not here and _fast(facts.changes, c, asked.busiest):
        slower = remedies.limits("tcp" if tcp else "udp", asked.most, c.netns, c.held)
    what = "connections" if tcp else "datagrams"
    like = "a scan" if tcp else "a scan, traceroutes or peer-to-peer"
    shorter = remedies.timeout("tcp_timeout_syn_sent" if tcp else "udp_timeout", c.netns)
    helps = (stop, slower, shorter)
    return Cause(
        id="scan",
        text=f"{c.src}{f' ({owner})' if owner else ''}{facts.where(c.netns)}: {percent(share)} of "
        f"{held:,} entries are its unanswered {what} to {' of '.join(to)} "
        f"({like}{_pace(facts, c)})",
        evidence=(
            f"{percent(c.unreplied)} of {judged:,} looked at or ended never saw a reply",
            f"holds {c.held:,} entries of {held:,}",
        ),
        share=share,
        netns=c.netns,
        src=c.src,
        load=not tcp,
        remedies=tuple(one for one in helps if one is not None),
    )


def _fast(changes: bool, c: Culprit, share: float) -> bool:
    """Whether a limit would refuse anything of a source with this share; where nothing was seen to
    come, that is not known."""
    return not changes or share * c.new_per_s > remedies.LIMIT_PER_S


def _opener(facts: Facts, c: Culprit) -> str:
    """The process that opened most of a source's entries; empty if unknown."""
    group = facts.pair
    mine = [at for at in group.order("held", FEW) if group.address(int(at)) == c.src]
    for at in mine:
        found = group.culprit(int(at))
        if found.netns == c.netns and found.owner and found.owner.role == "opened":
            return f"{found.owner.comm}[{found.owner.pid}]"
    return ""


def _pace(facts: Facts, c: Culprit) -> str:
    said = pace(c.new_per_s, "new/s") if facts.changes else ""
    return f", {said}" if said else ""


def _asked(facts: Facts, src: npt.NDArray[np.uint64], proto: int) -> _Asked:
    """What a source has entries to."""
    key = facts.pair.key
    mine = (key[:, :2] == src[:2]).all(axis=1) & (key[:, 2] >> _S32 == src[2] >> _S32)
    mine &= key[:, 2] >> np.uint64(16) & np.uint64(0xFF) == np.uint64(proto)
    held, ports = facts.pair.held[mine], key[mine, 2] & np.uint64(0xFFFF)
    order = np.argsort(-held, kind="stable")
    most = [at for at in order[:SHOWN].tolist() if ports[at] and held[at] >= PART * held.sum()]
    busiest = float(held.max() / held.sum()) if len(held) else 0.0
    return _Asked(proto, len(held), int(held.sum()), tuple(ports[most].tolist()), busiest)


def scattered(facts: Facts, found: list[Cause]) -> Iterator[Cause]:
    """More sources than can be named, each with hardly an entry, and no service that stands out."""
    src, space = facts.src, facts.space
    if not src.floor:
        return  # every source has a row
    for at in space.order("held", SHOWN):
        c = space.culprit(int(at))
        if c.inserts < SOME or sum(one.share for one in found if one.netns == c.netns) >= 0.5:
            continue
        named = int(src.held[src.inside(c.netns)].sum())
        share = 1 - named / c.held if c.held else 0.0
        judged = max(c.destroys, c.composition.n)
        if share < SHARE or not half_open(c, judged):
            continue  # as a popular site has; or nothing shows what they are
        seen = f"{percent(c.unreplied)} of {judged:,} ended or looked at never saw a reply"
        where = f"{c.netns_name}: " if len(facts.tables) > 1 else ""
        tcp = _of_tcp(facts, c.netns) >= MOSTLY
        yield Cause(
            id="syn-flood" if tcp else "udp-flood",
            text=f"{where}{percent(share)} of {c.held:,} entries belong to about "
            f"{src.distinct:,} sources with hardly an entry each, to many services "
            f"(scan or flood{_pace(facts, c)})",
            evidence=(
                seen,
                f"about {src.distinct:,} distinct sources (estimated), too many to name",
                f"{c.held - named:,} of {c.held:,} entries are theirs",
            ),
            share=share,
            netns=c.netns,
            remedies=tuple(
                one
                for one in (
                    remedies.change("drop what nobody should send before conntrack", c.netns),
                    remedies.timeout("tcp_timeout_syn_sent" if tcp else "udp_timeout", c.netns),
                )
                if one is not None
            ),
        )


def _of_tcp(facts: Facts, netns: int) -> float:
    """The share of a namespace's entries that are TCP's."""
    group = facts.service
    mine = group.inside(netns)
    tcp = mine & (group.key[:, 2] >> np.uint64(16) & np.uint64(0xFF) == np.uint64(TCP))
    return float(group.held[tcp].sum()) / max(1.0, float(group.held[mine].sum()))
