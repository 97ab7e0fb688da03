"""What helps besides NOTRACK, with what it frees and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, log2
from typing import Final, Optional

from ctrace.advice.facts import BUCKET_BYTES, Facts
from ctrace.advice.roles import Seen
from ctrace.change.plan import CtTimeout, alone
from ctrace.model.snapshot import Culprit, Table
from ctrace.ruleset import notrack_nft
from ctrace.whatif.predict import Outlook, Part, Range, shortened

POLICY: Final = {
    "tcp": (("fin_wait", 10), ("close_wait", 10), ("last_ack", 5), ("time_wait", 5), ("close", 2)),
    "udp": (("unreplied", 5), ("replied", 15)),
}
"""A per-port timeout policy: closed connections and answered requests go after seconds."""
TIME_WAIT: Final = 30
"""Seconds that a shorter nf_conntrack_tcp_timeout_time_wait keeps: half of the usual 2 MSL."""
ESTABLISHED: Final = 86400
MOSTLY: Final = 0.5
LARGEST: Final = 1 << 24
"""Entries: no larger table is proposed, it would take gigabytes."""


@dataclass(frozen=True)
class Alternative:
    """One other thing to do."""

    id: str
    """``ct-timeout``, ``sysctl-timeout``, ``larger-table``, ``keep-alive``, ``drop-flood``."""
    netns: int
    text: str
    service: str = ""
    frees: Optional[tuple[int, int]] = None
    """Entries, lowest and highest; None where it frees none or that is not known."""
    fill_after: Optional[tuple[float, float]] = None
    commands: tuple[str, ...] = ()
    memory: Optional[tuple[int, int]] = None
    """Bytes that it takes when the table is full."""


def ct_timeout(seen: Seen, roles: tuple[str, ...], facts: Facts) -> Optional[CtTimeout]:
    """A timeout policy for the service, if shorter timeouts would free much of it."""
    culprit = seen.culprit
    if culprit.proto not in POLICY or not culprit.port or not roles or not facts.has_nft:
        return None
    if frees_by_policy(culprit, facts).high < MOSTLY * culprit.held:
        return None
    return CtTimeout(culprit.proto, culprit.port, roles, POLICY[culprit.proto])


def frees_by_policy(culprit: Culprit, facts: Facts) -> Range:
    """What :data:`POLICY` frees of a service, from how its entries ended."""
    if culprit.proto == "tcp":
        old = facts.timeouts["tcp_timeout_time_wait"]
        return shortened(culprit, culprit.closed or 0.0, old, dict(POLICY["tcp"])["time_wait"])
    if culprit.proto == "udp":
        unreplied = culprit.unreplied or 0.0
        one_way = shortened(culprit, unreplied, facts.timeouts["udp_timeout"], 5)
        # Only flows with more than two packets over two seconds reach the longer timeout.
        both = shortened(culprit, 1 - unreplied, facts.timeouts["udp_timeout"], 15)
        return one_way + both
    return Range(0.0, 0.0)


def shorter(policy: CtTimeout) -> dict[Part, float]:
    """The policy's timeouts, as :class:`ctrace.whatif.predict.Outlook` takes them."""
    names = dict(policy.policy)
    first, other = {"tcp": ("time_wait", ""), "udp": ("unreplied", "replied")}[policy.proto]
    return {
        (policy.proto, policy.port, closed): float(names[name])
        for closed, name in ((True, first), (False, other))
        if name in names
    }


def alternatives(
    table: Table, seen: Iterable[Seen], facts: Facts, target: float, outlook: Outlook
) -> Iterator[Alternative]:
    """Everything else that helps one namespace's table, the most freeing first."""
    services = list(seen)
    found = [
        *_time_wait(table, services, facts, outlook),
        *_established(table, services, facts),
        *_larger(table, facts, target, outlook),
        *_keep_alive(table, services),
        *_floods(table, services),
    ]
    yield from sorted(found, key=lambda a: -(a.frees[1] if a.frees else 0))


def fill_after(table: Table, freed: Range) -> Optional[tuple[float, float]]:
    """The fill once ``freed`` entries are gone, lowest first."""
    if not table.max:
        return None
    low, high = (max(0.0, table.count - amount) / table.max for amount in (freed.high, freed.low))
    return round(low, 4), round(high, 4)


def policy_alternative(
    table: Table, policy: CtTimeout, freed: Range, outlook: Outlook, planned: bool
) -> Alternative:
    """A ct timeout lever as an alternative; ``planned``: a plan has it already."""
    script = notrack_nft.script(alone(policy), None)
    states = ", ".join(f"{state} {seconds} s" for state, seconds in policy.policy)
    return Alternative(
        "ct-timeout",
        table.netns,
        f"shorter timeouts for {policy.proto}/{policy.port} only ({states}): tracking, NAT and "
        "stateful rules keep working; connections from before never take them",
        f"{policy.proto}/{policy.port}",
        (round(freed.low), round(freed.high)),
        outlook.fill(shorter=shorter(policy)),
        () if planned else ("sudo nft -f - <<'EOF'", *script.splitlines(), "EOF"),
    )


def _time_wait(
    table: Table, services: list[Seen], facts: Facts, outlook: Outlook
) -> Iterator[Alternative]:
    old = facts.timeouts["tcp_timeout_time_wait"]
    freed = Range(0.0, 0.0)
    for seen in services:
        if seen.culprit.proto == "tcp":
            freed += shortened(seen.culprit, seen.culprit.closed or 0.0, old, TIME_WAIT)
    if freed.high < 0.05 * table.count or freed.high < 1:
        return
    yield Alternative(
        "sysctl-timeout",
        table.netns,
        f"nf_conntrack_tcp_timeout_time_wait from {old} to {TIME_WAIT} s, for every port; entries "
        "that exist keep their old timeout",
        "",
        (round(freed.low), round(freed.high)),
        outlook.fill(
            shorter={
                ("tcp", seen.culprit.port or 0, True): float(TIME_WAIT)
                for seen in services
                if seen.culprit.proto == "tcp"
            }
        ),
        (f"sudo sysctl -w net.netfilter.nf_conntrack_tcp_timeout_time_wait={TIME_WAIT}",),
    )


def _established(table: Table, services: list[Seen], facts: Facts) -> Iterator[Alternative]:
    old = facts.timeouts["tcp_timeout_established"]
    idle = [
        seen.culprit
        for seen in services
        if seen.culprit.proto == "tcp"
        and seen.culprit.older > MOSTLY * max(1, seen.culprit.held)
        and seen.samples
        and all(sample.state == "ESTABLISHED" for sample in seen.samples)
    ]
    count = sum(culprit.held for culprit in idle)
    if old <= ESTABLISHED or count < 0.1 * table.count or count < 100:
        return
    yield Alternative(
        "sysctl-timeout",
        table.netns,
        f"nf_conntrack_tcp_timeout_established from {old} s to {ESTABLISHED} s: {count} entries "
        "are old and quiet; keep it above the keep-alive interval of your idle connections",
        commands=(
            f"sudo sysctl -w net.netfilter.nf_conntrack_tcp_timeout_established={ESTABLISHED}",
        ),
    )


def _larger(table: Table, facts: Facts, target: float, outlook: Outlook) -> Iterator[Alternative]:
    growth = outlook.most
    need = max(table.count, growth) / target
    if not table.max or need <= table.max:
        return
    size = 1 << ceil(log2(need))
    if size > LARGEST:
        return
    low, high = (size * each + size * BUCKET_BYTES for each in facts.entry_bytes)
    known = "" if low != high else " (read from this kernel's slab)"
    commands = (
        f"sudo sysctl -w net.netfilter.nf_conntrack_max={size}",
        f"sudo sysctl -w net.netfilter.nf_conntrack_buckets={size}",
    )
    where = "" if facts.initial else "; both are set in the host's first namespace, for all"
    yield Alternative(
        "larger-table",
        table.netns,
        f"nf_conntrack_max and nf_conntrack_buckets to {size}: at most {_mib(low, high)} when "
        f"full{known}{where}",
        fill_after=(round(table.count / size, 4), round(max(table.count, growth) / size, 4)),
        commands=commands,
        memory=(low, high),
    )


def _keep_alive(table: Table, services: list[Seen]) -> Iterator[Alternative]:
    for seen in services:
        whole = seen.culprit
        if whole.proto != "tcp" or (whole.closed or 0.0) < MOSTLY or whole.held < 0.1 * table.count:
            continue
        life, stay = whole.life.p50, whole.residence.p50
        if life is None or stay is None or life > 1.0:
            continue
        named = sorted(seen.parts, key=lambda part: -part.held)[:1]
        who = named[0].src if named and named[0].held >= MOSTLY * whole.held else "its clients"
        if named and named[0].owner and named[0].owner.role == "opened":
            who = f"{named[0].owner.comm}[{named[0].owner.pid}]"
        freed = Range(0.8 * whole.held, 1.0 * whole.held)
        yield Alternative(
            "keep-alive",
            table.netns,
            f"keep-alive or pooling at {who}: {whole.new_per_s:.0f} connections a second to "
            f"tcp/{whole.port} live {_time(life)} each and hold an entry for {_time(stay)}",
            f"tcp/{whole.port}",
            (round(freed.low), round(freed.high)),
            fill_after(table, freed),
        )


def _floods(table: Table, services: list[Seen]) -> Iterator[Alternative]:
    for seen in services:
        whole = seen.culprit
        unreplied = whole.unreplied or 0.0
        if unreplied < 0.9 or whole.held < 0.1 * table.count or whole.direction == "out":
            continue
        sources = whole.distinct_src
        many = f" from about {sources} sources" if sources else ""
        chain = "type filter hook prerouting priority raw"
        limit = "meter flood { ip saddr limit rate over 50/second } drop"
        syn = "tcp flags & (syn | ack) == syn " if whole.proto == "tcp" else ""
        yield Alternative(
            "drop-flood",
            table.netns,
            f"{whole.proto}/{whole.port}: {100 * unreplied:.0f} % of its entries never saw a "
            f"reply{many}; "
            "if nobody should send it, drop it before conntrack sees it",
            f"{whole.proto}/{whole.port}",
            (0, whole.held),
            fill_after(table, Range(0.0, float(whole.held))),
            (
                f"nft 'add table inet flood; add chain inet flood pre {{ {chain}; }}; "
                f"add rule inet flood pre {syn}{whole.proto} dport {whole.port} {limit}'",
            ),
        )


def _mib(low: int, high: int) -> str:
    first, last = (round(value / (1 << 20)) for value in (low, high))
    return f"{last} MiB" if first == last else f"{first} to {last} MiB"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.0f} s"
