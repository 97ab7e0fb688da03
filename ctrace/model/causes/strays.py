"""INVALID packets: whose they are and why, and which rules drop them, as far as that was read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Optional

from ctrace.beside import MOST, Beside, Refusing, Stray
from ctrace.model.causes.words import percent, plural
from ctrace.model.remedies import change
from ctrace.model.snapshot import Cause, Remedy, Table

SHOWN: Final = 3
FEW: Final = 20
"""Packets. Shares of fewer mean nothing."""
MOSTLY: Final = 0.8
"""A source with this share of them is named for them."""
UNSAID: Final = "; whose they are and why is not known here, and a rule may drop them"
"""What a cause says as long as nothing of it was read."""
WORDS: Final[dict[str, str]] = {
    "syn-ack": "SYN-ACKs without an entry (nobody asked for them, or the SYN did not pass here)",
    "fin": "FINs without an entry (it expired or was deleted before)",
    "rst": "resets without an entry (it was closed or expired)",
    "ack": "packets of open connections without an entry, which nf_conntrack_tcp_loose=0 refuses",
    "reply": "echo replies without an entry (nobody asked for them)",
    "error": "ICMP errors about flows without an entry",
    "checksum": "packets with a wrong checksum",
    "window": "out of their connection's window, by their sequence numbers",
    "one-way": "of connections whose answers do not pass here",
    "half-notrack": "of connections that rules untrack in one direction only (half of a NOTRACK "
    "pair)",
}
HELPS: Final[dict[str, str]] = {
    "syn-ack": "let both directions pass this host; drop answers to forged addresses upstream",
    "fin": "TCP keep-alive below nf_conntrack_tcp_timeout_established",
    "ack": "set nf_conntrack_tcp_loose to 1 to take up open connections",
    "checksum": "find what spoils them: a cable, a tunnel, an offload that is broken",
    "window": "find who sends them; nf_conntrack_tcp_be_liberal=1 lets them pass",
    "one-way": "let both directions pass this host",
    "half-notrack": "untrack the other direction as well, or neither",
}


def told(cause: Cause, table: Table, reading: Beside) -> Cause:
    """A cause about INVALID packets, with what was read of them; any other cause unchanged."""
    if cause.id != "invalid" or cause.netns != table.netns:
        return cause
    rules = [_dropped(one) for one in reading.refusing if one.kind == "invalid"]
    whose = _whose(reading.strays)
    if not rules and whose is None:
        return cause
    text, evidence, remedies = cause.text.replace(UNSAID, ""), cause.evidence, cause.remedies
    if whose is None:
        text += "; whose they are and why is not known here"
    else:
        words, more, helps = whose
        text, evidence = f"{text}; {words}", (evidence[0], *more, *evidence[2:])
        remedies = (*helps, *remedies)
    if rules:
        others = "" if len(rules) == 1 else f" (and {plural(len(rules) - 1, 'other rule')})"
        text += f"; {rules[0]}{others}"
    else:
        text += "; no rule that could be read drops them"
    return replace(cause, text=text, evidence=(*evidence, *rules[:SHOWN]), remedies=remedies)


def _whose(found: Sequence[Stray]) -> Optional[tuple[str, tuple[str, ...], tuple[Remedy, ...]]]:
    """The most frequent reason with its source in words, all reasons, and what helps."""
    total = sum(one.packets for one in found)
    if total < FEW:
        return None
    by_why: Counter[str] = Counter()
    for one in found:
        by_why[one.why] += one.packets
    why, n = by_why.most_common(1)[0]
    mine = [one for one in found if one.why == why]
    return (
        f"of {total:,} looked at {percent(n / total)} are {WORDS[why]}, {_from(mine)}",
        tuple(f"{n:,} of {total:,} looked at: {WORDS[why]}" for why, n in by_why.most_common()),
        (change(HELPS[why]),) if why in HELPS else (),
    )


def _from(found: Sequence[Stray]) -> str:
    """``from 10.0.0.1 (tcp/80)``, ``from 12 sources, tcp/80``."""
    sources: Counter[str] = Counter()
    services: Counter[str] = Counter()
    for one in found:
        sources[one.src] += one.packets
        services[f"{one.proto}/{one.port}" if one.port else one.proto] += one.packets
    total = sum(sources.values())
    src, most = sources.most_common(1)[0]
    service, its = services.most_common(1)[0]
    what = service if its >= MOSTLY * total else f"{len(services):,} services"
    if most >= MOSTLY * total:
        return f"from {src} ({what})"
    more = " or more" if len(found) >= MOST else ""  # no more are kept
    return f"from {plural(len(sources), 'source')}{more} ({what})"


def _dropped(rule: Refusing) -> str:
    if rule.since is None:
        return f"a rule without a counter drops such packets ({place(rule)})"
    packets = plural(max(rule.since, 0), "such packet")
    return f"a rule dropped {packets} since it was first read ({place(rule)})"


def place(rule: Refusing) -> str:
    """Where a rule stands."""
    return f"{rule.place}, handle {rule.handle}" if rule.handle else rule.place
